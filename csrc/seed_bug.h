/*
 * Bugs on purpose, to test the tests: each is one that a writer of this format has had or could have, and each must be
 * caught by a suite (tests/test_seeded_bugs.py). In an ordinary build BS_BUG is false and nothing of it is left.
 *
 *   cmake -DBLOCKSNAP_SEED_BUG=7               build with bug 7
 *   cmake -DBLOCKSNAP_SEED_BUG=environment     one build for all: the variable BLOCKSNAP_SEED_BUG says which
 */
#ifndef BS_SEED_BUG_H
#define BS_SEED_BUG_H

enum seed_bug {
	/* Commit */
	BUG_METADATA_NOT_FLUSHED = 1,  /* before the superblock that refers to it */
	BUG_FAILED_FLUSH_PASSED_OVER,  /* the superblock is written though the flush before it failed */
	BUG_SUPERBLOCK_FIRST,          /* the superblock is written before the blocks that it refers to */
	BUG_DATA_NOT_FLUSHED,          /* before the metadata that map it */
	BUG_OVERWRITE_NOT_FLUSHED,     /* a flush does nothing where no mapping changed: FUA lost */
	BUG_FLUSH_JOINS_PAST_COMMIT,   /* a flush is content with a commit that began before it */
	BUG_METADATA_MAP_BEFORE_DATA,  /* the metadata space map is written before the data space map */
	BUG_DETAILS_NOT_WRITTEN,       /* mapped_blocks and times stay what they were */
	BUG_FREED_SPACE_PUNCHED_EARLY, /* given back before the commit that frees it */
	/* Shadowing and reference counts */
	BUG_SHADOW_MISSED,               /* a committed block is changed in the cache */
	BUG_SHADOW_KEEPS_OLD_BLOCK,      /* whoever shadows a block does not drop it */
	BUG_SHARED_CHILDREN_NOT_COUNTED, /* children of a shared node that is copied */
	BUG_SHARED_VALUES_NOT_COUNTED,   /* data blocks of a shared leaf that is copied */
	BUG_REBALANCE_FORGETS_COUNTS,    /* of a shared node that is shadowed only to fill its neighbour */
	BUG_COLLAPSE_FORGETS_COUNTS,     /* of the only child of a root, if it is shared */
	BUG_SNAPSHOT_ROOT_NOT_COUNTED,
	BUG_HOLD_FORGETS_DETAILS, /* the details tree of a metadata snapshot is not counted */
	BUG_PATH_NOT_SHADOWED, /* a device's tree is changed, the held path to it still counts the old root once */
	/* Trees */
	BUG_FIRST_KEY_NOT_LOWERED,      /* for a key below all others */
	BUG_SPLIT_LOSES_AN_ENTRY,       /* between the halves */
	BUG_SEPARATOR_NOT_MOVED,        /* when entries move between neighbours */
	BUG_MERGE_TOO_LATE,             /* nodes get emptier than a third */
	BUG_MERGED_NODE_KEPT,           /* the block of a node that was merged away is never freed */
	BUG_DISCARD_KEEPS_DATA_BLOCK,   /* the count of an unmapped data block is not lowered */
	BUG_OVERWRITE_KEEPS_DATA_BLOCK, /* nor that of a block that another one replaces */
	BUG_DELETE_GOES_INTO_SHARED,    /* the children of a node that stays in use lose a reference too */
	/* Space maps */
	BUG_FREED_BLOCK_REUSED,    /* in the transaction that frees it: the committed state still has it */
	BUG_BLOCK_BEYOND_THE_END,  /* the last bitmap has one entry too many */
	BUG_OVERFLOW_ENTRY_KEPT,   /* when a count falls from 3 to 2 */
	BUG_OVERFLOW_FROM_FOUR,    /* a count of 3 gets no overflow entry */
	BUG_PENDING_COUNT_IGNORED, /* look-ups see the committed count only */
	BUG_FREE_COUNT_CUT_SHORT,  /* nr_free of the last bitmap counts only the blocks that exist */
	BUG_RESERVED_BLOCK_GIVEN_AGAIN, /* two writers get one data block */
	BUG_NEW_BITMAP_FORGOTTEN,       /* the last one of a map that grew */
	/* Time and sharing */
	BUG_TIME_NOT_RAISED,              /* by a snapshot */
	BUG_ORIGIN_TIME_NOT_RAISED,       /* the origin takes shared blocks for its own */
	BUG_SHARING_IN_COMMITTED_IGNORED, /* a mapping that went a moment ago comes back in a crash */
	BUG_CACHED_TIME_NOT_RAISED,       /* the data path keeps the origin's old snapshotted_time */
	/* Data */
	BUG_NEW_BLOCK_NOT_ZEROED,    /* around a small write: old data shine through */
	BUG_COPY_LOSES_TAIL,         /* what lies behind a small write to a shared block */
	BUG_DISCARD_ROUNDS_OUTWARDS, /* and unmaps blocks that it covers in part */
	/* Cache */
	BUG_RUN_LOSES_LAST_BLOCK,  /* of a full run of dirty blocks */
	BUG_SEALED_WITHOUT_NUMBER, /* a copy keeps the number of its original */
	/* After a failure */
	BUG_READ_WITH_LOST_ROOTS, /* where a failed transaction began, which could not be read again */
	BUG_OPENED_UNFLUSHED, /* what a killed process wrote is built upon, and may be gone after a power cut */
	BUG_COUNT
};

#if !defined(BLOCKSNAP_SEED_BUG)
#define BS_BUG(name) 0
#elif BLOCKSNAP_SEED_BUG > 0
#define BS_BUG(name) (BLOCKSNAP_SEED_BUG == BUG_##name)
#else
#include <stdlib.h>

static inline int seed_bug_chosen(void)
{
	static int chosen = -1;

	if (chosen < 0) {
		const char *text = getenv("BLOCKSNAP_SEED_BUG");

		chosen = text ? atoi(text) : 0;
	}
	return chosen;
}
#define BS_BUG(name) (seed_bug_chosen() == BUG_##name)
#endif

#endif
