/*
 * Inside of bs_metadata_check: what its files share.
 *
 *   thin_check.c          superblock, order of the steps, held metadata snapshot
 *   thin_check_tree.c     any B-tree, node by node
 *   thin_check_devices.c  details, mapping trees, what their entries mean
 *   thin_check_space.c    bitmaps, index entries and overflow trees against the recomputed counts
 *
 * One record a metadata block and one cell a data block hold all that is known; nodes are read once. See
 * thin_check.c for the invariants.
 */
#ifndef BS_THIN_CHECK_H
#define BS_THIN_CHECK_H

#include "blocksnap.h"
#include "count_map.h"
#include "metadata_reader.h"
#include "text_output.h"

enum severity { FATAL, LEAK, WARNING };

/* A block plays one role only. */
enum role {
	ROLE_NONE,
	ROLE_SUPERBLOCK,
	ROLE_HELD_SUPERBLOCK,
	ROLE_DETAILS,
	ROLE_TOP_LEVEL,
	ROLE_MAPPING,
	ROLE_DATA_INDEX,
	ROLE_DATA_OVERFLOW,
	ROLE_DATA_BITMAP,
	ROLE_METADATA_INDEX,
	ROLE_METADATA_OVERFLOW,
	ROLE_METADATA_BITMAP,
};

/* What is known of a metadata block. Of a node also what lies below it, so that a node that is met again need
 * not be read again. */
struct block_info {
	uint64_t entries;             /* in the leaves below */
	uint64_t first_key, last_key; /* valid if entries > 0 */
	uint32_t count;               /* pointers met */
	uint32_t max_time;            /* of the mappings below */
	uint32_t owner;               /* index of the device that met it first */
	uint8_t role;
	uint8_t height; /* of a node above its leaves; a leaf has 0 */
	bool open;      /* on the path that is walked now */
	bool damaged;   /* it or something below cannot be used */
	bool owner_told;
};

/* A data block: bits 0..6 references (127: see the map), bit 7 a mapping that the kernel takes for unshared
 * names it, bits 8..31 a signature of the thin block and time under which it is mapped. */
#define CELL_COUNT 0x7fu
#define CELL_CLAIMED 0x80u
#define CELL_SIGNATURE 0xffffff00u

struct data_cells {
	uint32_t *cells;
	uint64_t nr;
	uint64_t used; /* cells with a reference */
	struct count_map large;
};

struct check {
	struct metadata_reader r; /* its prefix is empty: messages become parts of findings */
	struct text_output *out;
	struct bs_check_result result;
	struct block_info *blocks; /* r.nr_blocks of them */
	struct data_cells data;
	/* Something that refers to blocks could not be read: counts that seem too high may be right. */
	bool metadata_incomplete, data_incomplete;
	int error; /* out of memory */
};

/* Print a finding and count it. The text names the path first. */
void check_finding(struct check *c, enum severity severity, const char *format, ...)
	__attribute__((format(printf, 3, 4)));
const char *role_name(enum role role);
static inline void count_pointer(struct block_info *info)
{
	info->count += info->count < UINT32_MAX;
}
/* Count a pointer to a block that is no tree node. False, and a finding, if it cannot be one of this role. */
bool check_claim(struct check *c, const char *path, uint64_t block, enum role role);
/* Grow an array by doubling. False when out of memory (c->error is set). */
bool check_grow(struct check *c, void **array, size_t *capacity, size_t used, size_t element_size);

/* ---- thin_check_tree.c */

struct tree_check;

struct tree_kind {
	enum role role;
	uint32_t value_size;
	const char *keys; /* what a range of keys is called */
	/* Known nodes are opened too, for leaf to see all entries; they are not counted again. */
	bool revisit;
	void (*leaf)(struct tree_check *t, const struct disk_node *leaf, bool known);
	/* A node of this tree was met before; may be NULL. */
	void (*known)(struct tree_check *t, struct block_info *info);
};

struct tree_frame {
	uint64_t block;
	uint64_t low, high; /* range of its keys */
	const struct disk_node *node;
	bool known;
	uint32_t index;
	uint32_t batch_begin, batch_end;
	char *batch;
	bool ok[WALK_BATCH];
};

struct tree_check {
	struct check *c;
	const struct tree_kind *kind;
	const char *label;
	void *context;  /* the kind's */
	uint32_t owner; /* the caller's: whoever walks is noted as owner of the nodes that it meets first */
	int depth;      /* frames that are open; the frame behind them is the one being looked at */
	struct disk_node *root_node;
	uint64_t damages;
	char first_damage[1100]; /* kept until it is known how much is lost */
	struct tree_frame frames[BTREE_MAX_DEPTH + 1];
};

/* The buffers serve any number of runs. */
int tree_check_init(struct tree_check *t, struct check *c);
void tree_check_deinit(struct tree_check *t);
/* Walk the tree of a root pointer. The findings of what is lost come with tree_check_tell_damage. */
void tree_check_run(
	struct tree_check *t, const struct tree_kind *kind, const char *label, uint64_t root, void *context);
/* lost: mappings missing, 0 if that is not known. */
void tree_check_tell_damage(struct tree_check *t, uint64_t lost);
/* A finding at the frame being looked at: label, range and nodes from the root go before it. */
void tree_finding(struct tree_check *t, enum severity severity, const char *format, ...)
	__attribute__((format(printf, 3, 4)));

/* ---- thin_check_devices.c */

/* The devices of the superblock, or of a held metadata snapshot. */
struct device_set {
	const char *prefix; /* of labels: "" or "metadata snapshot, " */
	uint64_t details_root, mapping_root;
	uint64_t transaction_id;
	uint32_t time;
	bool live;
};

void check_devices(struct check *c, struct tree_check *t, const struct device_set *set);

int data_cells_init(struct data_cells *data, uint64_t nr);
void data_cells_deinit(struct data_cells *data);
uint64_t data_cells_count(const struct data_cells *data, uint64_t block);

/* ---- thin_check_space.c */

struct overflow_entry {
	uint64_t block;
	uint32_t count;
};

struct index_entry {
	uint64_t bitmap;
	uint64_t block;
	uint32_t nr_free, none_free_before;
};

struct space_map {
	const char *name; /* "data" or "metadata" */
	enum role bitmap_role;
	uint64_t nr_blocks; /* of the map, already bounded */
	uint64_t nr_allocated;
	bool index_damaged, overflow_damaged;
	struct index_entry *index;
	size_t index_used, index_capacity;
	struct overflow_entry *overflow;
	size_t overflow_used, overflow_capacity;
};

/* Walk the structures of a space map (and count what they point to); needed before any comparison. */
void check_metadata_map(struct check *c, struct tree_check *t, struct space_map *map);
void check_data_map(struct check *c, struct tree_check *t, struct space_map *map);
/* Compare with the counts, once everything was walked. */
void check_counts(struct check *c, struct space_map *map);
void space_map_deinit(struct space_map *map);

#endif
