/*
 * A pool's metadata as XML, byte for byte what thin_dump 0.9.0 prints.
 *
 * A run is a stretch of consecutive thin blocks on consecutive data blocks provisioned at the same time; runs
 * cross leaves. Memory does not depend on the pool: one leaf walk and one text buffer.
 */
#include <errno.h>
#include <inttypes.h>
#include <stdlib.h>

#include "blocksnap.h"
#include "error.h"
#include "metadata_reader.h"
#include "text_output.h"

struct run {
	uint64_t thin_begin, data_begin, length; /* length 0: none yet */
	uint64_t next_value;                     /* packed mapping that would continue it */
	uint32_t time;
};

static void put_run(struct text_output *out, const struct run *run)
{
	char *p = text_output_reserve(out, 256);

	if (run->length == 0)
		return;
	if (run->length == 1) {
		p = text_put_literal(p, "    <single_mapping origin_block=\"");
		p = text_put_number(p, run->thin_begin);
		p = text_put_literal(p, "\" data_block=\"");
		p = text_put_number(p, run->data_begin);
	} else {
		p = text_put_literal(p, "    <range_mapping origin_begin=\"");
		p = text_put_number(p, run->thin_begin);
		p = text_put_literal(p, "\" data_begin=\"");
		p = text_put_number(p, run->data_begin);
		p = text_put_literal(p, "\" length=\"");
		p = text_put_number(p, run->length);
	}
	p = text_put_literal(p, "\" time=\"");
	p = text_put_number(p, run->time);
	p = text_put_literal(p, "\"/>\n");
	text_output_advance(out, p);
}

static void dump_leaf(struct text_output *out, const struct disk_node *leaf, struct run *run)
{
	const uint64_t one_block = mapping_pack(1, 0);
	uint32_t nr = node_nr(leaf);

	for (uint32_t i = 0; i < nr; i++) {
		uint64_t key = node_key(leaf, i), value = node_value64(leaf, i);

		if (value == run->next_value && key == run->thin_begin + run->length && run->length > 0) {
			run->length++;
		} else {
			put_run(out, run);
			*run = (struct run){key, mapping_block(value), 1, 0, mapping_time(value)};
		}
		run->next_value = value + one_block;
	}
}

static int dump_mappings(const struct metadata_reader *r, uint64_t root, struct text_output *out)
{
	struct leaf_walk walk;
	struct run run = {0};
	const struct disk_node *leaf;
	int found = leaf_walk_init(&walk, r, root, sizeof(uint64_t));

	if (found == 0) {
		while (!out->error && (found = leaf_walk_next(&walk, &leaf)) > 0)
			dump_leaf(out, leaf, &run);
		put_run(out, &run);
	}
	leaf_walk_deinit(&walk);
	return found < 0 ? found : 0;
}

static int dump_device(
	const struct metadata_reader *r, const struct device_entry *device, struct text_output *out)
{
	const struct disk_device_details *details = &device->details;

	text_printf(out,
		"  <device dev_id=\"%" PRIu64 "\" mapped_blocks=\"%" PRIu64 "\" transaction=\"%" PRIu64
		"\" creation_time=\"%u\" snap_time=\"%u\">\n",
		device->id, le64_get(details->mapped_blocks), le64_get(details->transaction_id),
		le32_get(details->creation_time), le32_get(details->snapshotted_time));
	int err = dump_mappings(r, device->root, out);
	text_printf(out, "  </device>\n");
	return err;
}

static int dump_pool(const struct metadata_reader *r, struct text_output *out)
{
	const struct disk_superblock *sb = &r->superblock;
	struct device_walk walk;
	struct device_entry device;
	int found = device_walk_init(&walk, r);

	text_printf(out,
		"<superblock uuid=\"\" time=\"%u\" transaction=\"%" PRIu64
		"\" flags=\"%u\" version=\"%u\" data_block_size=\"%u\" nr_data_blocks=\"%" PRIu64 "\">\n",
		le32_get(sb->time), le64_get(sb->trans_id), le32_get(sb->flags), le32_get(sb->version),
		le32_get(sb->data_block_size), le64_get(sb->data_sm_root.nr_blocks));
	while (found >= 0 && !out->error && (found = device_walk_next(&walk, &device)) > 0) {
		int err = dump_device(r, &device, out);

		if (err)
			found = err;
	}
	device_walk_deinit(&walk);
	if (found < 0)
		return found;
	text_printf(out, "</superblock>\n");
	return 0;
}

int bs_metadata_dump(const char *metadata, int held, int fd)
{
	struct metadata_reader reader;
	struct text_output *out = malloc(sizeof(*out));
	int err = metadata_reader_open(&reader, metadata, held);

	if (!out && !err)
		err = bs_fail(-ENOMEM, "%s: out of memory", metadata);
	if (!err) {
		text_output_init(out, fd);
		err = text_output_finish(out, dump_pool(&reader, out));
	}
	metadata_reader_deinit(&reader);
	free(out);
	return err;
}
