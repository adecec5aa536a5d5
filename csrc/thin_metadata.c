/*
 * Invariants:
 * 1. A device's root and details are authoritative in struct thin_device while one exists, else in the trees.
 * 2. Before a device's tree is changed the first time in a transaction the top-level path to it is shadowed:
 *    with a held metadata snapshot that is what counts the old root once more.
 * 3. A mapping whose data block another device reaches has time < snapshotted_time in both (set by each
 *    snapshot), so time alone proves a block unshared; the reverse needs the counts of the path and of the data
 *    block.
 * 4. A data block may be overwritten in place only if nobody else reaches it in the running transaction *and*
 *    in the committed state: the other's mapping may have gone only a moment ago, and a crash would bring it
 *    back.
 * 5. Order of a commit: (data flushed by the engine,) details and roots, data map, metadata map, all blocks,
 *    flush, superblock, flush.
 */
#include "thin_metadata.h"

#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>

#include "blocksnap.h"
#include "error.h"
#include "seed_bug.h"
#include "thin_state.h"

#define CACHE_BLOCKS 8192 /* 32 MiB */
#define OPERATION_ROOM 36 /* metadata blocks that one change allocates at most */
#define MAX_RESERVE 4096  /* blocks kept for changes that give space back, as the kernel does */

static const struct bm_validator superblock_validator = {"superblock copy", SUPERBLOCK_SALT, NULL};

/* ---- values of the trees ---- */

static int inc_data(void *context, const void *value)
{
	struct thin_metadata *md = context;
	const struct le64 *packed = value;

	return sm_inc(&md->data_sm.ll.sm, mapping_block(le64_get(*packed)));
}

static int dec_data(void *context, const void *value)
{
	struct thin_metadata *md = context;
	const struct le64 *packed = value;
	uint32_t left;

	return sm_dec(&md->data_sm.ll.sm, mapping_block(le64_get(*packed)), &left);
}

static int inc_root(void *context, const void *value)
{
	struct thin_metadata *md = context;
	const struct le64 *root = value;

	return tm_inc(&md->tm, le64_get(*root));
}

static int dec_root(void *context, const void *value)
{
	struct thin_metadata *md = context;
	const struct le64 *root = value;

	return btree_delete(&md->mappings, le64_get(*root));
}

static int init(struct io *io, uint64_t nr_blocks, struct thin_metadata **ret)
{
	struct thin_metadata *md = calloc(1, sizeof(*md));

	if (!md)
		return bs_fail(-ENOMEM, "out of memory");
	int r = bm_create(io, nr_blocks, CACHE_BLOCKS, &md->bm);
	if (r < 0) {
		free(md);
		return r;
	}
	md->io = io;
	md->tm.bm = md->bm;
	md->mappings = (struct btree){&md->tm, 8, inc_data, dec_data, md};
	md->top = (struct btree){&md->tm, 8, inc_root, dec_root, md};
	md->details = (struct btree){&md->tm, sizeof(struct disk_device_details), NULL, NULL, NULL};
	*ret = md;
	return 0;
}

static void deinit_maps(struct thin_metadata *md)
{
	ll_deinit(&md->data_sm.ll);
	ll_deinit(&md->metadata_sm.ll);
	bm_reset(md->bm);
}

void thin_metadata_close(struct thin_metadata *md)
{
	if (!md)
		return;
	deinit_maps(md);
	bm_destroy(md->bm);
	while (md->devices) {
		struct thin_device *next = md->devices->next;

		free(md->devices);
		md->devices = next;
	}
	free(md);
}

/* ---- superblock ---- */

static void fill_superblock(struct thin_metadata *md)
{
	struct disk_superblock *sb = &md->superblock;

	sb->flags = le32_of(md->flags);
	sb->magic = le64_of(SUPERBLOCK_MAGIC);
	sb->version = le32_of(SUPERBLOCK_VERSION);
	sb->time = le32_of(md->time);
	sb->trans_id = le64_of(md->transaction_id);
	sb->held_root = le64_of(md->held_root);
	sb->data_mapping_root = le64_of(md->top_root);
	sb->device_details_root = le64_of(md->details_root);
	sb->data_block_size = le32_of(md->data_block_sectors);
	sb->metadata_block_size = le32_of(METADATA_BLOCK_SECTORS);
	sb->metadata_nr_blocks = le64_of(md->metadata_sm.ll.nr_blocks);
}

static int write_superblock(struct thin_metadata *md)
{
	block_seal(&md->superblock, 0, SUPERBLOCK_SALT);
	int r = io_write(md->io, 0, &md->superblock, sizeof(md->superblock));

	return r < 0 ? r : io_flush(md->io);
}

static bool all_zero(const void *data, size_t length)
{
	const char *p = data;

	return length == 0 || (p[0] == 0 && memcmp(p, p + 1, length - 1) == 0);
}

static int read_block_zero(struct io *io, struct disk_superblock *ret)
{
	int64_t size = io_size(io);

	if (size < 0)
		return size;
	if (size < (int64_t)METADATA_BLOCK_SIZE)
		return bs_fail(-EMEDIUMTYPE, "%s is too short to be the metadata of a thin pool", io->name);
	return io_read(io, 0, ret, sizeof(*ret));
}

int bs_check_block_size(uint64_t block_size)
{
	if (is_data_block_size(block_size))
		return 0;
	return bs_fail(-EINVAL,
		"a block size of %" PRIu64 " bytes: 4K, 8K, 16K, 32K or a multiple of 64K up to 1G",
		block_size);
}

static int check_superblock(struct io *io, const struct disk_superblock *sb)
{
	int64_t size = io_size(io);
	uint64_t blocks = le64_get(sb->metadata_sm_root.nr_blocks);

	if (all_zero(sb, sizeof(*sb)))
		return bs_fail(-EMEDIUMTYPE, "%s holds no thin pool yet: run pool create", io->name);
	if (le64_get(sb->magic) != SUPERBLOCK_MAGIC)
		return bs_fail(-EMEDIUMTYPE, "%s is not the metadata of a thin pool (magic %" PRIu64 ")",
			io->name, le64_get(sb->magic));
	int r = block_verify(sb, 0, &(struct bm_validator){"superblock", SUPERBLOCK_SALT, NULL});
	if (r < 0)
		return r;
	/* thin_restore writes version 1 when its input names none; the layout is the same. */
	if (le32_get(sb->version) == 0 || le32_get(sb->version) > SUPERBLOCK_VERSION ||
		le32_get(sb->metadata_block_size) != METADATA_BLOCK_SECTORS)
		return bs_fail(-EMEDIUMTYPE,
			"%s: version %u with metadata blocks of %u sectors is not supported", io->name,
			le32_get(sb->version), le32_get(sb->metadata_block_size));
	if (le32_get(sb->incompat_flags) || le32_get(sb->compat_ro_flags) ||
		le32_get(sb->flags) & ~SUPERBLOCK_NEEDS_CHECK)
		return bs_fail(-EMEDIUMTYPE, "%s uses features that this version does not know", io->name);
	if (!is_data_block_size((uint64_t)le32_get(sb->data_block_size) * SECTOR_SIZE))
		return bs_fail(-EMEDIUMTYPE, "%s: data blocks of %u sectors are not possible: run pool check",
			io->name, le32_get(sb->data_block_size));
	if (blocks > METADATA_MAX_BLOCKS || size < 0 || (uint64_t)size / METADATA_BLOCK_SIZE < blocks)
		return bs_fail(-EUCLEAN,
			"%s is shorter (%" PRId64 " bytes) than its metadata (%" PRIu64 " blocks): "
			"restore its size",
			io->name, size, blocks);
	/* Each bitmap is a metadata block; the index of them is held in memory. */
	if (le64_get(sb->data_sm_root.nr_blocks) / ENTRIES_PER_BITMAP >= blocks)
		return bs_fail(-EUCLEAN,
			"%s: %" PRIu64 " metadata blocks cannot hold the bitmaps of %" PRIu64
			" data blocks: run pool check",
			io->name, blocks, le64_get(sb->data_sm_root.nr_blocks));
	if (le32_get(sb->time) > MAX_TIME)
		return bs_fail(-EUCLEAN, "%s: snapshot time %u is out of range: run pool check", io->name,
			le32_get(sb->time));
	return 0;
}

/* Take over the committed state that the superblock names. */
static int load(struct thin_metadata *md)
{
	struct disk_superblock *sb = &md->superblock;
	int r = read_block_zero(md->io, sb);

	if (r == 0)
		r = check_superblock(md->io, sb);
	if (r < 0)
		return r;
	bm_set_nr_blocks(md->bm, le64_get(sb->metadata_sm_root.nr_blocks));
	md->top_root = le64_get(sb->data_mapping_root);
	md->details_root = le64_get(sb->device_details_root);
	md->transaction_id = le64_get(sb->trans_id);
	md->held_root = le64_get(sb->held_root);
	md->time = le32_get(sb->time);
	md->data_block_sectors = le32_get(sb->data_block_size);
	md->flags = le32_get(sb->flags);
	md->changed = false;
	r = sm_metadata_open(&md->metadata_sm, &md->tm, &sb->metadata_sm_root);
	return r < 0 ? r : sm_disk_open(&md->data_sm, &md->tm, &sb->data_sm_root);
}

int thin_metadata_open(struct io *io, struct thin_metadata **ret)
{
	struct thin_metadata *md;
	int r = init(io, 0, &md);

	if (r < 0)
		return r;
	r = load(md);
	if (r < 0) {
		thin_metadata_close(md);
		return r;
	}
	*ret = md;
	return 0;
}

static int format(struct thin_metadata *md, uint64_t nr_blocks, uint64_t nr_data_blocks)
{
	int r = sm_metadata_create(&md->metadata_sm, &md->tm, nr_blocks);

	if (r == 0)
		r = sm_disk_create(&md->data_sm, &md->tm, nr_data_blocks);
	if (r == 0)
		r = btree_create(&md->top, &md->top_root);
	if (r == 0)
		r = btree_create(&md->details, &md->details_root);
	md->changed = true;
	return r < 0 ? r : thin_metadata_commit(md);
}

int thin_metadata_format(struct io *io, uint32_t data_block_sectors, uint64_t nr_data_blocks)
{
	struct thin_metadata *md;
	struct disk_superblock sb;
	int r = read_block_zero(io, &sb);

	if (r < 0)
		return r;
	if (!all_zero(&sb, sizeof(sb)))
		return bs_fail(-EEXIST, "%s is not empty: zero its first 4096 bytes if its content may go",
			io->name);
	r = bs_check_block_size((uint64_t)data_block_sectors * SECTOR_SIZE);
	if (r < 0)
		return r;
	uint64_t nr_blocks = io_size(io) / METADATA_BLOCK_SIZE;
	if (nr_blocks > METADATA_MAX_BLOCKS)
		nr_blocks = METADATA_MAX_BLOCKS;
	r = init(io, nr_blocks, &md);
	if (r < 0)
		return r;
	md->data_block_sectors = data_block_sectors;
	r = format(md, nr_blocks, nr_data_blocks);
	thin_metadata_close(md);
	return r;
}

/* ---- transactions ---- */

void thin_metadata_status(const struct thin_metadata *md, struct thin_metadata_status *ret)
{
	*ret = (struct thin_metadata_status){
		.transaction_id = md->transaction_id,
		.data_block_sectors = md->data_block_sectors,
		.data_blocks = md->data_sm.ll.nr_blocks,
		.data_free = md->data_sm.ll.nr_blocks - md->data_sm.ll.nr_allocated,
		.metadata_blocks = md->metadata_sm.ll.nr_blocks,
		.metadata_free = md->metadata_sm.ll.nr_blocks - md->metadata_sm.ll.nr_allocated,
		.held_root = md->held_root,
		.freed_data_blocks = md->data_sm.ll.nr_freed,
		.time = md->time,
		.changed = md->changed,
		.needs_check = md->flags & SUPERBLOCK_NEEDS_CHECK,
		.failed = md->failed,
	};
}

int thin_metadata_room(struct thin_metadata *md, bool releasing)
{
	struct ll *ll = &md->metadata_sm.ll, *data = &md->data_sm.ll;
	uint64_t reserve = ll->nr_blocks / 10 < MAX_RESERVE ? ll->nr_blocks / 10 : MAX_RESERVE;
	uint64_t need = OPERATION_ROOM + (releasing ? 0 : reserve), of_metadata, of_data;

	if (ll_available(ll) >= need + ll_commit_cost(ll) + ll_commit_cost(data))
		return 0;
	int r = ll_exact_commit_cost(ll, &of_metadata);
	if (r == 0)
		r = ll_exact_commit_cost(data, &of_data);
	if (r < 0)
		return r;
	if (ll_available(ll) >= need + of_metadata + of_data)
		return 0;
	return bs_fail(-ENOSPC,
		"the metadata device is full (%" PRIu64 " blocks): run pool extend with a larger one",
		ll->nr_blocks);
}

static int write_devices(struct thin_metadata *md)
{
	int r = 0;

	for (struct thin_device *d = md->devices; r == 0 && d; d = d->next) {
		if (!d->changed)
			continue;
		r = BS_BUG(DETAILS_NOT_WRITTEN) ? 0 : thin_write_details(md, d);
		if (r == 0)
			r = thin_write_root(md, d);
	}
	return r;
}

/* The transaction is on disk: forget its marks and the devices that were only kept for it. */
static void settle_devices(struct thin_metadata *md)
{
	for (struct thin_device **link = &md->devices; *link;) {
		struct thin_device *d = *link;

		d->changed = d->path_shadowed = false;
		if (d->references) {
			link = &d->next;
			continue;
		}
		*link = d->next;
		free(d);
	}
}

int thin_metadata_commit(struct thin_metadata *md)
{
	if (md->failed)
		return bs_fail_lost();
	if (!md->changed)
		return 0;
	int r = write_devices(md);
	if (r == 0 && BS_BUG(METADATA_MAP_BEFORE_DATA))
		r = sm_metadata_flush(&md->metadata_sm, &md->superblock.metadata_sm_root);
	if (r == 0)
		r = sm_disk_flush(&md->data_sm, &md->superblock.data_sm_root);
	if (r == 0 && !BS_BUG(METADATA_MAP_BEFORE_DATA))
		r = sm_metadata_flush(&md->metadata_sm, &md->superblock.metadata_sm_root);
	if (r == 0 && BS_BUG(SUPERBLOCK_FIRST)) {
		fill_superblock(md);
		r = write_superblock(md);
	}
	if (r == 0)
		r = bm_write_dirty(md->bm);
	if (r == 0 && !BS_BUG(METADATA_NOT_FLUSHED))
		r = io_flush(md->io);
	if (r < 0 && !BS_BUG(FAILED_FLUSH_PASSED_OVER))
		return r;
	fill_superblock(md);
	r = write_superblock(md);
	if (r < 0)
		return r;
	ll_committed(&md->data_sm.ll);
	ll_committed(&md->metadata_sm.ll);
	settle_devices(md);
	bm_trim(md->bm);
	md->changed = false;
	return 0;
}

int thin_metadata_abort(struct thin_metadata *md)
{
	deinit_maps(md);
	int r = load(md);
	for (struct thin_device *d = md->devices; r == 0 && d; d = d->next) {
		d->changed = d->path_shadowed = false;
		r = thin_load_device(md, d);
		if (r == -ENODATA) {
			d->gone = true;
			r = 0;
		}
	}
	if (r < 0 && !BS_BUG(READ_WITH_LOST_ROOTS))
		bm_shut(md->bm);
	if (r == 0) {
		md->flags |= SUPERBLOCK_NEEDS_CHECK;
		md->superblock.flags = le32_of(md->flags);
		r = write_superblock(md);
	}
	md->failed = r < 0;
	return r;
}

int thin_metadata_clear_needs_check(struct thin_metadata *md)
{
	md->flags &= ~SUPERBLOCK_NEEDS_CHECK;
	md->superblock.flags = le32_of(md->flags);
	return write_superblock(md);
}

int thin_metadata_set_transaction_id(struct thin_metadata *md, uint64_t current, uint64_t id)
{
	if (md->transaction_id != current)
		return bs_fail(-EINVAL, "the pool's transaction id is %" PRIu64 ", not %" PRIu64,
			md->transaction_id, current);
	md->transaction_id = id;
	md->changed = true;
	return 0;
}

int thin_metadata_extend(struct thin_metadata *md, uint64_t nr_metadata_blocks, uint64_t nr_data_blocks)
{
	int r = 0;

	if (nr_metadata_blocks > METADATA_MAX_BLOCKS)
		nr_metadata_blocks = METADATA_MAX_BLOCKS;
	if (nr_metadata_blocks > md->metadata_sm.ll.nr_blocks) {
		bm_set_nr_blocks(md->bm, nr_metadata_blocks);
		r = sm_metadata_extend(&md->metadata_sm, nr_metadata_blocks);
		md->changed = true;
	}
	if (r == 0 && nr_data_blocks > md->data_sm.ll.nr_blocks) {
		uint64_t bitmaps = (nr_data_blocks - md->data_sm.ll.nr_blocks) / ENTRIES_PER_BITMAP + 2;

		if (ll_available(&md->metadata_sm.ll) < 2 * bitmaps + OPERATION_ROOM)
			return bs_fail(-ENOSPC,
				"the metadata device is too small for %" PRIu64
				" data blocks: extend it first",
				nr_data_blocks);
		r = sm_disk_extend(&md->data_sm, nr_data_blocks);
		md->changed = true;
	}
	return r;
}

/* ---- held metadata snapshot ---- */

int thin_hold_snapshot(struct thin_metadata *md)
{
	struct bm_block *copy;

	if (md->held_root)
		return bs_fail(
			-EBUSY, "a metadata snapshot is held already, at block %" PRIu64, md->held_root);
	int r = thin_metadata_commit(md);
	if (r == 0)
		r = tm_new(&md->tm, &superblock_validator, &copy);
	if (r == 0)
		r = tm_inc(&md->tm, md->top_root);
	if (r == 0)
		r = BS_BUG(HOLD_FORGETS_DETAILS) ? 0 : tm_inc(&md->tm, md->details_root);
	if (r < 0)
		return r;
	struct disk_superblock *sb = (struct disk_superblock *)copy->data;
	*sb = md->superblock;
	memset(&sb->data_sm_root, 0, sizeof(sb->data_sm_root));
	memset(&sb->metadata_sm_root, 0, sizeof(sb->metadata_sm_root));
	md->held_root = copy->nr;
	md->changed = true;
	return thin_metadata_commit(md);
}

int thin_release_snapshot(struct thin_metadata *md)
{
	struct bm_block *b;

	if (!md->held_root)
		return bs_fail(-EINVAL, "no metadata snapshot is held");
	int r = tm_read(&md->tm, md->held_root, &superblock_validator, &b);
	if (r < 0)
		return r;
	const struct disk_superblock *sb = (const struct disk_superblock *)b->data;
	uint64_t top = le64_get(sb->data_mapping_root), details = le64_get(sb->device_details_root);
	md->changed = true;
	r = btree_delete(&md->top, top);
	if (r == 0)
		r = btree_delete(&md->details, details);
	if (r == 0)
		r = tm_dec(&md->tm, md->held_root);
	md->held_root = 0;
	return r;
}
