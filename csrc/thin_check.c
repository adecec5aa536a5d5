/*
 * Check a pool's metadata in full: recompute every count from the pointers and prove the invariants of the
 * format.
 *
 *  1. The file is as large as the superblock says; the superblock's fields are possible.
 *  2. Every node: checksum, place, one kind, sizes, ascending keys inside its parent's range, at least a
 * third full, all leaves of a tree at one depth, at most 12 levels.
 *  3. Every pointer is inside the device; no node lies below itself; a block plays one role.
 *  4. The details and the top-level tree have the same ids; mapped_blocks is right; times are not in the
 * future.
 *  5. Mappings are inside the data device; no shared data block looks unshared to a device that can write to
 * it.
 *  6. Bitmaps, index entries and overflow trees agree with each other and with the recomputed counts.
 *  7. A held metadata snapshot is a valid copy of a superblock whose trees pass as well.
 *
 * A metadata block's count is the number of pointers to it in distinct blocks, a data block's the number of
 * entries in distinct leaves; so a node is read at its first visit only, whatever shares it. Order: space map
 * structures, live devices, held snapshot, then the comparison of counts. Nothing that was read is trusted by
 * a later step. Memory: 40 bytes a metadata block, 4 a data block up to the last one in use, 3 MiB of
 * buffers.
 */
#include "thin_check.h"

#include <errno.h>
#include <inttypes.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "crc32c.h"
#include "error.h"

/* ---- shared by the files of the check */

void check_finding(struct check *c, enum severity severity, const char *format, ...)
{
	static const char *const names[] = {[FATAL] = "fatal", [LEAK] = "leak", [WARNING] = "warning"};
	char text[2048];
	va_list args;

	va_start(args, format);
	vsnprintf(text, sizeof(text), format, args);
	va_end(args);
	text_printf(c->out, "%s: %s\n", names[severity], text);
	if (severity == FATAL)
		c->result.fatal++;
	else if (severity == LEAK)
		c->result.leaks++;
	else
		c->result.warnings++;
}

const char *role_name(enum role role)
{
	static const char *const names[] = {
		[ROLE_NONE] = "nothing",
		[ROLE_SUPERBLOCK] = "superblock",
		[ROLE_HELD_SUPERBLOCK] = "held superblock",
		[ROLE_DETAILS] = "node of the details tree",
		[ROLE_TOP_LEVEL] = "node of the top-level tree",
		[ROLE_MAPPING] = "node of a mapping tree",
		[ROLE_DATA_INDEX] = "node of the data index tree",
		[ROLE_DATA_OVERFLOW] = "node of the data overflow tree",
		[ROLE_DATA_BITMAP] = "data bitmap",
		[ROLE_METADATA_INDEX] = "metadata index block",
		[ROLE_METADATA_OVERFLOW] = "node of the metadata overflow tree",
		[ROLE_METADATA_BITMAP] = "metadata bitmap",
	};

	return names[role];
}

bool check_claim(struct check *c, const char *path, uint64_t block, enum role role)
{
	if (block == 0 || block >= c->r.nr_blocks) {
		check_finding(c, FATAL, "%s: pointer to block %" PRIu64 " is outside 1..%" PRIu64, path,
			block, c->r.nr_blocks - 1);
		c->metadata_incomplete = true;
		return false;
	}
	struct block_info *info = &c->blocks[block];
	if (info->role != ROLE_NONE) {
		check_finding(c, FATAL, "%s: block %" PRIu64 " is in use as %s already", path, block,
			role_name(info->role));
		c->metadata_incomplete = true;
		return false;
	}
	info->role = role;
	count_pointer(info);
	return true;
}

bool check_grow(struct check *c, void **array, size_t *capacity, size_t used, size_t element_size)
{
	size_t wanted = *capacity ? *capacity * 2 : 64;

	if (used < *capacity)
		return true;
	void *grown = reallocarray(*array, wanted, element_size);
	if (!grown) {
		c->error = bs_fail(-ENOMEM, "out of memory");
		return false;
	}
	*array = grown;
	*capacity = wanted;
	return true;
}

/* ---- superblock */

static bool all_zero(const void *data, size_t length)
{
	const unsigned char *p = data;

	return length == 0 || (p[0] == 0 && memcmp(p, p + 1, length - 1) == 0);
}

static void check_identity(struct check *c)
{
	const struct disk_superblock *sb = &c->r.superblock;
	uint32_t csum = block_checksum(sb, SUPERBLOCK_SALT);

	if (le32_get(sb->csum) != csum)
		check_finding(c, FATAL, "superblock: checksum is 0x%08x, expected 0x%08x", le32_get(sb->csum),
			csum);
	if (le64_get(sb->magic) != SUPERBLOCK_MAGIC)
		check_finding(c, FATAL, "superblock: magic number is %" PRIu64 ", expected %llu",
			le64_get(sb->magic), SUPERBLOCK_MAGIC);
	if (le64_get(sb->blocknr) != 0)
		check_finding(
			c, FATAL, "superblock: it says that it is block %" PRIu64, le64_get(sb->blocknr));
	/* thin_restore writes version 1 when its input names none; the layout is the same. */
	if (le32_get(sb->version) != SUPERBLOCK_VERSION)
		check_finding(c, le32_get(sb->version) == 1 ? WARNING : FATAL,
			"superblock: version is %u, expected %u", le32_get(sb->version), SUPERBLOCK_VERSION);
}

static void check_features(struct check *c)
{
	const struct disk_superblock *sb = &c->r.superblock;
	uint32_t unknown = le32_get(sb->flags) & ~SUPERBLOCK_NEEDS_CHECK;

	if (unknown)
		check_finding(c, FATAL, "superblock: unknown flags 0x%x", unknown);
	if (le32_get(sb->incompat_flags))
		check_finding(c, FATAL, "superblock: unknown incompatible features 0x%x",
			le32_get(sb->incompat_flags));
	if (le32_get(sb->compat_ro_flags))
		check_finding(c, FATAL, "superblock: unknown features 0x%x that forbid writing",
			le32_get(sb->compat_ro_flags));
	if (le32_get(sb->compat_flags))
		check_finding(c, WARNING, "superblock: unknown compatible features 0x%x",
			le32_get(sb->compat_flags));
	c->result.needs_check = le32_get(sb->flags) & SUPERBLOCK_NEEDS_CHECK;
	if (c->result.needs_check)
		check_finding(c, WARNING, "superblock: needs_check is set");
}

static void check_sizes(struct check *c)
{
	const struct disk_superblock *sb = &c->r.superblock;
	uint64_t nr = le64_get(sb->metadata_sm_root.nr_blocks),
		 nr_data = le64_get(sb->data_sm_root.nr_blocks);

	if (!is_data_block_size((uint64_t)le32_get(sb->data_block_size) * SECTOR_SIZE))
		check_finding(c, FATAL, "superblock: data_block_size of %u sectors is impossible",
			le32_get(sb->data_block_size));
	if (le32_get(sb->metadata_block_size) != METADATA_BLOCK_SECTORS)
		check_finding(c, FATAL, "superblock: metadata_block_size is %u sectors, expected %u",
			le32_get(sb->metadata_block_size), METADATA_BLOCK_SECTORS);
	if (nr == 0 || nr > METADATA_MAX_BLOCKS)
		check_finding(c, FATAL, "superblock: %" PRIu64 " metadata blocks, possible are 1..%llu", nr,
			METADATA_MAX_BLOCKS);
	else if (nr > c->r.file_blocks)
		check_finding(c, FATAL,
			"superblock: %" PRIu64 " metadata blocks, but the file holds %" PRIu64
			": it is truncated",
			nr, c->r.file_blocks);
	/* The kernel does not raise the field when metadata grows. */
	if (le64_get(sb->metadata_nr_blocks) > nr)
		check_finding(c, WARNING,
			"superblock: metadata_nr_blocks is %" PRIu64 ", the space map has %" PRIu64,
			le64_get(sb->metadata_nr_blocks), nr);
	if (nr_data > MAX_DATA_BLOCKS)
		check_finding(c, FATAL, "superblock: %" PRIu64 " data blocks, possible are up to %llu",
			nr_data, MAX_DATA_BLOCKS);
	if (le32_get(sb->time) > MAX_TIME)
		check_finding(
			c, FATAL, "superblock: time %u is larger than %u", le32_get(sb->time), MAX_TIME);
}

static void check_superblock(struct check *c)
{
	const struct disk_superblock *sb = &c->r.superblock;

	check_identity(c);
	check_features(c);
	check_sizes(c);
	/* The kernel leaves what was in its memory behind the fields of the space map roots. */
	if (!all_zero(sb->zero, sizeof(sb->zero)))
		check_finding(c, WARNING, "superblock: bytes behind the last field are not zero");
	c->blocks[0].role = ROLE_SUPERBLOCK;
	c->blocks[0].count = 1;
}

/* ---- devices */

static void check_live(struct check *c, struct tree_check *t)
{
	const struct disk_superblock *sb = &c->r.superblock;
	const struct device_set set = {
		.prefix = "",
		.details_root = le64_get(sb->device_details_root),
		.mapping_root = le64_get(sb->data_mapping_root),
		.transaction_id = le64_get(sb->trans_id),
		.time = le32_get(sb->time),
		.live = true,
	};

	check_devices(c, t, &set);
}

static const char held_path[] = "metadata snapshot";

/* The copy is right if its checksum, place and magic are; then its trees are worth a walk. */
static bool check_held_copy(struct check *c, const struct disk_superblock *held, uint64_t block)
{
	uint32_t csum = block_checksum(held, SUPERBLOCK_SALT);
	static const struct disk_sm_root none;

	if (le32_get(held->csum) != csum || le64_get(held->magic) != SUPERBLOCK_MAGIC ||
		le64_get(held->blocknr) != block) {
		check_finding(
			c, FATAL, "%s: node %" PRIu64 ": it is no copy of a superblock", held_path, block);
		c->metadata_incomplete = c->data_incomplete = true;
		return false;
	}
	if (le32_get(held->version) != SUPERBLOCK_VERSION)
		check_finding(c, FATAL, "%s: node %" PRIu64 ": version is %u, expected %u", held_path, block,
			le32_get(held->version), SUPERBLOCK_VERSION);
	if (le64_get(held->held_root) != 0)
		check_finding(c, FATAL, "%s: node %" PRIu64 ": it holds another one at block %" PRIu64,
			held_path, block, le64_get(held->held_root));
	if (memcmp(&held->data_sm_root, &none, sizeof(none)) ||
		memcmp(&held->metadata_sm_root, &none, sizeof(none)))
		check_finding(
			c, WARNING, "%s: node %" PRIu64 ": space map roots are not zero", held_path, block);
	return true;
}

static void check_held(struct check *c, struct tree_check *t)
{
	uint64_t block = le64_get(c->r.superblock.held_root);
	struct disk_superblock held;

	if (block == 0)
		return;
	if (!check_claim(c, held_path, block, ROLE_HELD_SUPERBLOCK)) {
		c->data_incomplete = true;
		return;
	}
	if (metadata_read_block(&c->r, block, &held)) {
		check_finding(c, FATAL, "%s: node %" PRIu64 ": %s", held_path, block, bs_last_error());
		c->metadata_incomplete = c->data_incomplete = true;
		return;
	}
	if (!check_held_copy(c, &held, block))
		return;
	const struct device_set set = {
		.prefix = "metadata snapshot, ",
		.details_root = le64_get(held.device_details_root),
		.mapping_root = le64_get(held.data_mapping_root),
		.transaction_id = le64_get(held.trans_id),
		.time = le32_get(held.time),
	};
	check_devices(c, t, &set);
}

/* ---- all of it */

/* A claim of more data blocks than the metadata could have bitmaps for must not decide how much memory is
 * taken. */
static uint64_t bounded_data_blocks(struct check *c)
{
	uint64_t nr = le64_get(c->r.superblock.data_sm_root.nr_blocks);
	uint64_t limit = c->r.file_blocks * ENTRIES_PER_BITMAP;

	if (nr <= limit)
		return nr;
	check_finding(c, FATAL,
		"superblock: %" PRIu64 " data blocks need more bitmaps than the metadata has blocks", nr);
	return limit < MAX_DATA_BLOCKS ? limit : MAX_DATA_BLOCKS;
}

static void check_all(struct check *c, struct tree_check *t)
{
	struct space_map metadata = {0}, data = {0};

	check_superblock(c);
	check_metadata_map(c, t, &metadata);
	check_data_map(c, t, &data);
	check_live(c, t);
	c->result.data_blocks_used = c->data.used;
	check_held(c, t);
	check_counts(c, &data);
	check_counts(c, &metadata);
	space_map_deinit(&metadata);
	space_map_deinit(&data);
	for (uint64_t block = 0; block < c->r.nr_blocks; block++)
		c->result.metadata_blocks_used += c->blocks[block].count > 0;
}

static int check_run(struct check *c)
{
	struct tree_check *t = malloc(sizeof(*t));
	int err;

	c->r.prefix[0] = '\0';
	c->blocks = calloc(c->r.nr_blocks, sizeof(*c->blocks));
	if (!t || !c->blocks) {
		free(t);
		return bs_fail(-ENOMEM, "out of memory");
	}
	err = tree_check_init(t, c);
	if (!err)
		err = data_cells_init(&c->data, bounded_data_blocks(c));
	if (!err)
		check_all(c, t);
	tree_check_deinit(t);
	free(t);
	return err ? err : c->error;
}

int bs_metadata_check(const char *metadata, int fd, struct bs_check_result *ret)
{
	struct check *c = calloc(1, sizeof(*c));
	struct text_output *out = malloc(sizeof(*out));
	int err;

	if (!c || !out) {
		free(c);
		free(out);
		return bs_fail(-ENOMEM, "%s: out of memory", metadata);
	}
	c->out = out;
	err = metadata_reader_init(&c->r, metadata);
	if (!err) {
		text_output_init(out, fd);
		err = text_output_finish(out, check_run(c));
	}
	*ret = c->result;
	data_cells_deinit(&c->data);
	free(c->blocks);
	metadata_reader_deinit(&c->r);
	free(out);
	free(c);
	return err;
}
