/*
 * Every prototype of the C core that Python sees: one copy, included by the C compiler through blocksnap.h
 * and read by cffi. Offsets, lengths and sizes are bytes unless the name says blocks or sectors. Functions
 * return 0 or a useful count, a negative errno on failure; bs_last_error() then holds the message
 * (thread-local). Python owns every buffer, C owns the opaque handles. Every call may run on any thread; cffi
 * drops the GIL around each.
 */

const char *bs_last_error(void);

/* ---- thin pool, user engine (thin_pool.c, thin_io.c) ---- */

struct bs_pool;
struct bs_device;

#define BS_POOL_READ_ONLY 1
#define BS_POOL_DIRECT_IO 2
#define BS_POOL_PASSDOWN 4 /* give the space of freed data blocks back to the backing file */
#define BS_POOL_LOCKED 8   /* the caller holds the lock */

struct bs_pool_status {
	uint64_t transaction_id;
	uint64_t block_size;
	uint64_t data_blocks;
	uint64_t data_blocks_free;
	uint64_t metadata_blocks;
	uint64_t metadata_blocks_free;
	uint64_t held_root;
	uint32_t time;
	uint32_t nr_devices;
	uint8_t read_only;
	uint8_t needs_check;
	uint8_t out_of_space;
	uint8_t metadata_low; /* a quarter (at most 4 MiB) or less is free, or the next change does not fit */
	uint8_t failed;
	uint8_t direct_io;
};

/* Bytes since the pool was opened; each is counted where it is written to (or read from) the backing. */
struct bs_pool_counters {
	uint64_t application_bytes;      /* written by callers of bs_device_write */
	uint64_t application_read_bytes; /* asked for by callers of bs_device_read */
	uint64_t zero_filled_bytes;      /* written to fill a partly written new block */
	uint64_t copied_bytes;           /* written only because sharing was broken */
	uint64_t read_for_copy_bytes;    /* read only because sharing was broken */
	uint64_t metadata_bytes;         /* metadata blocks and superblocks written */
	uint64_t padding_bytes;          /* written again to fill a sector of direct I/O */
	uint64_t discarded_bytes;        /* unmapped by discard */
	uint64_t blocks_provisioned;     /* holes that got a data block */
	uint64_t blocks_copied;          /* sharing broken with a copy */
	uint64_t blocks_overwritten;     /* sharing broken by a write that covers the block: nothing copied */
	uint64_t commits;                /* superblocks written */
	uint64_t flushes;                /* flush requests, several of which may share a commit */
};

struct bs_device_info {
	uint32_t id;
	uint32_t creation_time;
	uint32_t snapshotted_time;
	uint32_t padding;
	uint64_t mapped_blocks;
	uint64_t transaction_id;
};

struct bs_mapping {
	uint64_t thin_block;
	uint64_t data_block;
	uint64_t time;
};

/* -EINVAL unless data blocks can have that size, in bytes. */
int bs_check_block_size(uint64_t block_size);
/* Write an empty pool: metadata and data must exist and be large enough. Refuses a metadata device whose
 * first block is not zero with -EEXIST. data_bytes is rounded down to whole blocks. */
int bs_pool_format(const char *metadata, const char *data, uint64_t data_bytes, uint64_t block_size);
/* Open and lock. -EBUSY names the process that holds it. A pool with needs_check opens read-only. */
int bs_pool_open(const char *metadata, const char *data, unsigned int flags, struct bs_pool **ret);
/* Let the pool on a metadata device that no one has open be written to again. The caller has checked it and found it
 * clean. */
int bs_pool_clear_needs_check(const char *metadata);
/* Commit (unless read-only) and release. The handle is gone whatever is returned: an error says that something was lost,
 * now or in an earlier commit. -EBUSY while devices are open: then nothing happened. */
int bs_pool_close(struct bs_pool *pool);
/* Drop every handle without committing: what a killed process leaves. For tests. */
void bs_pool_abandon(struct bs_pool *pool);
/* After a failure every later one fails too: what was lost never counts as flushed. */
int bs_pool_commit(struct bs_pool *pool);
/* Between begin and end no commit happens but the one of end: the operations of one transaction reach the
 * disk together with the new transaction id. Flushes of other threads wait. end fails with -EINVAL if current
 * is not the pool's id. */
int bs_pool_begin(struct bs_pool *pool);
int bs_pool_end(struct bs_pool *pool, uint64_t current_id, uint64_t new_id);
int bs_pool_status(struct bs_pool *pool, struct bs_pool_status *ret);
int bs_pool_counters(struct bs_pool *pool, struct bs_pool_counters *ret);
/* Grow to the sizes that the backing files have now (data at most data_bytes, 0 = all of it). Never shrinks.
 */
int bs_pool_extend(struct bs_pool *pool, uint64_t data_bytes);
/* Add 1 to an eventfd when the free data fall to data_low bytes, or metadata are low: once each until the next
 * call. Who finds the pool full waits up to wait_ms for it to grow. fd -1: no
 * more of this. */
int bs_pool_watch(struct bs_pool *pool, int fd, uint64_t data_low, int wait_ms);
int bs_pool_create_device(struct bs_pool *pool, uint32_t id);
int bs_pool_create_snapshot(struct bs_pool *pool, uint32_t id, uint32_t origin);
int bs_pool_delete_device(struct bs_pool *pool, uint32_t id);
/* Resumable listing by ascending id from begin on; returns the number written to out. */
int bs_pool_devices(struct bs_pool *pool, uint32_t begin, struct bs_device_info *out, int capacity);
/* Commit, and hold what is committed for the walkers until it is released; -EBUSY if somebody holds a metadata
 * snapshot already. Both wait for the end of another thread's transaction. */
int bs_pool_hold_metadata(struct bs_pool *pool);
int bs_pool_release_metadata(struct bs_pool *pool);

/* A device is activated with its size, which the pool does not store. Several handles to one id share one
 * state. */
int bs_device_open(struct bs_pool *pool, uint32_t id, uint64_t size, struct bs_device **ret);
void bs_device_close(struct bs_device *device);
int64_t bs_device_read(struct bs_device *device, uint64_t offset, void *buffer, uint64_t length);
int64_t bs_device_write(struct bs_device *device, uint64_t offset, const void *buffer, uint64_t length);
/* Unmap the whole blocks inside the range; the partial blocks at its ends are zeroed. */
int bs_device_discard(struct bs_device *device, uint64_t offset, uint64_t length);
int bs_device_flush(struct bs_device *device);
/* Shrinking unmaps what lies behind the new end. */
int bs_device_resize(struct bs_device *device, uint64_t size);
uint64_t bs_device_size(struct bs_device *device);

/* ---- read-only walkers (thin_check.c, thin_dump.c, thin_delta.c) ---- */
/* They read a metadata file or device that no one writes: the caller holds the lock, or has the pool
 * committed and quiescent. With held they read the metadata snapshot that the pool holds, and the pool may go
 * on. fd is where text goes. */

struct bs_check_result {
	uint64_t fatal;    /* findings that lose or endanger data */
	uint64_t leaks;    /* blocks whose count is too high: space lost, nothing else */
	uint64_t warnings; /* odd but harmless */
	uint64_t devices;
	uint64_t mappings;
	uint64_t metadata_blocks_used;
	uint64_t data_blocks_used;
	uint8_t needs_check;
};

/* Recompute everything; each finding is a line on fd: "<fatal|leak|warning>: <path>: <what>". Goes on past
 * damage. */
int bs_metadata_check(const char *metadata, int fd, struct bs_check_result *ret);
int bs_metadata_dump(const char *metadata, int held, int fd);
int bs_metadata_delta(const char *metadata, int held, uint32_t left, uint32_t right, int fd);

#define BS_DELTA_LEFT_ONLY 1
#define BS_DELTA_RIGHT_ONLY 2
#define BS_DELTA_DIFFERENT 3
#define BS_DELTA_SAME 4

struct bs_delta_range {
	uint64_t thin_begin;
	uint64_t length;
	uint64_t kind;
};

/* Differences of two devices from thin block begin on, same ranges left out; returns the number written to
 * out; the next call begins behind the last range. Subtrees that both sides share are not read. */
int bs_metadata_delta_ranges(const char *metadata, int held, uint32_t left, uint32_t right, uint64_t begin,
	struct bs_delta_range *out, int capacity);

struct bs_usage {
	uint32_t id;
	uint32_t padding;
	uint64_t mapped_blocks;
	uint64_t exclusive_blocks;
};

/* Mapped and exclusive data blocks of every device by ascending id; returns the number of devices (even if
 * more than capacity; then only capacity are written). */
int bs_metadata_usage(const char *metadata, int held, struct bs_usage *out, int capacity);
/* The details of the devices by ascending id from begin on; returns the number written to out. */
int bs_metadata_devices(
	const char *metadata, int held, uint32_t begin, struct bs_device_info *out, int capacity);
/* The mappings of a device by ascending thin block from begin on; returns the number written to out. */
int bs_metadata_mappings(
	const char *metadata, int held, uint32_t id, uint64_t begin, struct bs_mapping *out, int capacity);

/* Set the bit (of nr_bits, the lowest of a byte first) of each data block that a device maps. */
int bs_metadata_mapped_blocks(const char *metadata, int held, uint8_t *bits, uint64_t nr_bits);

/* ---- repair (thin_repair.c) ---- */

/* What the damaged superblock may not tell; 0 = not known. */
struct bs_repair_options {
	uint64_t block_size; /* of data blocks */
	uint64_t data_bytes; /* of the data device */
	uint64_t transaction_id;
};

/* The new pool. */
struct bs_repair_result {
	uint64_t devices;
	uint64_t mappings;
	uint64_t devices_lost; /* with all of their mappings */
	uint64_t losses;       /* ranges and single mappings of other devices that are lost */
	uint64_t changes;      /* what had to be made up, nothing of which loses data */
	uint64_t failed_reads; /* of the damaged metadata, and may succeed another time */
	uint64_t transaction_id;
	uint64_t block_size;
	uint64_t data_blocks;
	uint32_t time;
	uint8_t roots_found; /* the superblock did not lead to the trees: they were found by a scan */
};

/* Write to output, which must begin with a zero block, what can be read of damaged metadata that nobody writes;
 * the damaged ones are only read. Counts are made anew, needs_check is cleared, a held metadata snapshot is
 * dropped. Each line on fd has fields separated by tabs, "-" for none:
 *   device  ID  MAPPINGS  BEFORE  -        a device of the new pool, and what its details said
 *   gone    ID  -         BEFORE  WHY      a device of which nothing is left
 *   lost    ID  BEGIN     LAST    WHY      mappings between these thin blocks (no ID: devices between these ids)
 *   changed ID  -         -       WHAT
 * -EOPNOTSUPP for features that this version does not know, -EINVAL if an option is needed, -ENOSPC if output is
 * too small, -EILSEQ if there is nothing to save. */
int bs_metadata_repair(const char *metadata, const char *output, const struct bs_repair_options *options,
	int fd, struct bs_repair_result *ret);

/* ---- loop devices and mounts (mount.c) ---- */

#define BS_LOOP_READ_ONLY 1
#define BS_LOOP_DIRECT_IO 2
#define BS_LOOP_AUTOCLEAR 4

struct bs_loop_info {
	int number;
	unsigned int flags;
	uint64_t backing_device;
	uint64_t backing_inode;
	char backing_path[4096];
};

/* Attach a file to a free loop device; ret is N of /dev/loopN. sector_size 0 = the kernel's default (512). An
 * autoclear device detaches by itself once this process has ended (or detached it) and nobody has it open or
 * mounted. */
int bs_loop_attach(const char *path, unsigned int flags, unsigned int sector_size, int *ret);
/* Detach; waits up to timeout_ms while someone holds it open, then -EBUSY, and the kernel detaches it at
 * their last close. Detaching a free device succeeds. */
int bs_loop_detach(int number, int timeout_ms);
/* -ENXIO when the loop device is free. Device and inode are 0 when the backing file's server does not answer.
 */
int bs_loop_info(int number, struct bs_loop_info *ret);
/* Take over a changed size of the backing file. */
int bs_loop_refresh(int number);
/* flags are mount(2)'s MS_*; type, data may be NULL. */
int bs_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *data);
/* flags are umount2(2)'s. */
int bs_umount(const char *target, int flags);
/* Limit the requests that the kernel sends in the background, read-ahead and direct I/O, to the FUSE file system whose
 * device has this minor number. */
int bs_fuse_set_max_background(unsigned int connection, unsigned int limit);
/* Write back the file system that holds path. */
int bs_filesystem_sync(const char *path);
/* Ask the file system mounted at path for a sign of life: -ETIMEDOUT without one, -ENOTCONN or -ECONNABORTED when
 * its FUSE server is gone. */
int bs_filesystem_probe(const char *path, int timeout_ms);
/* Freeze the file system mounted at path; if that takes longer than timeout_ms it is given up, thawed and
 * -ETIMEDOUT. The end of this process, by whatever signal, thaws it too. */
int bs_filesystem_freeze(const char *path, int timeout_ms);
int bs_filesystem_thaw(const char *path);
/* Let the I/O of the calling thread wait for that of all others, where the block layer knows priorities. */
int bs_io_idle(void);

/* ---- FUSE export (fuse_export.c) ---- */

struct bs_export;

/* Mount a file system at mountpoint in which each added device is a file of its size. Threads serve it until
 * bs_export_stop. allow_other lets other users (and the kernel's loop driver) in. */
int bs_export_start(const char *mountpoint, int threads, int allow_other, struct bs_export **ret);
/* name: one path component. The export uses the handle until removed; the caller closes it afterwards. */
int bs_export_add(struct bs_export *export_, const char *name, struct bs_device *device);
/* -EBUSY while the file is open; a close that is under way is waited for. */
int bs_export_remove(struct bs_export *export_, const char *name);
/* Unmount, end the threads, free the handle. Whoever still uses a file gets errors from then on. */
void bs_export_stop(struct bs_export *export_);

/* ---- opening below a directory (confined.c) ---- */

/* Open path with the directory root as the file system's root, whatever symlinks and ".." are on the way;
 * flags are open(2)'s without O_CREAT, O_CLOEXEC is added. Returns a descriptor. Needs no privilege. */
int bs_open_in_root(int root, const char *path, int flags);

/* ---- device-mapper (dm_ioctl.c, dm_guard.c, dm_cookie.c) ---- */

/* The descriptor of /dev/mapper/control that every call takes; the caller closes it. Flags have the kernel's
 * values (linux/dm-ioctl.h). A device is looked up by its uuid, and by its name if uuid is NULL; messages call
 * it by its name. No call ever touches a device that it was not given. */

#define BS_DM_READ_ONLY 0x1
#define BS_DM_SUSPENDED 0x2
#define BS_DM_TABLE 0x10           /* in bs_dm_lines: the table instead of the status */
#define BS_DM_LIVE 0x20            /* has a live table */
#define BS_DM_PENDING 0x40         /* has a table that the next resume makes live */
#define BS_DM_SKIP_LOCKFS 0x400    /* suspend without freezing the file system above */
#define BS_DM_NOFLUSH 0x800        /* suspend without completing queued I/O; status without a commit */
#define BS_DM_QUERY_PENDING 0x1000 /* lines and dependencies of the pending table */
#define BS_DM_UEVENT_GENERATED 0x2000
#define BS_DM_DEFERRED_REMOVE 0x20000
#define BS_DM_INTERNAL_SUSPEND 0x40000

/* device is a dev_t. */
struct bs_dm_info {
	char name[128];
	char uuid[129];
	uint64_t device;
	uint32_t flags;
	int32_t open_count;
	uint32_t event_nr;
	uint32_t target_count;
};

/* uuid is empty if there is none, or if the kernel (before 5.13) does not tell it in lists. */
struct bs_dm_entry {
	char name[128];
	char uuid[129];
	uint64_t device;
	uint32_t event_nr;
};

struct bs_dm_target_version {
	char name[128];
	uint32_t version[3];
};

/* A line of a table. */
struct bs_dm_target {
	uint64_t start_sector;
	uint64_t length_sectors;
	const char *type;
	const char *parameters;
};

/* Open /dev/mapper/control, close-on-exec; returns the descriptor. */
int bs_dm_open(void);
/* The kernel's version of the interface. */
int bs_dm_version(int control, uint32_t version[3]);
/* Every device of the machine; returns the number (even if more than capacity; then only capacity are
 * written). */
int bs_dm_devices(int control, struct bs_dm_entry *out, int capacity);
/* Every target that the kernel has loaded; returns like bs_dm_devices. */
int bs_dm_target_versions(int control, struct bs_dm_target_version *out, int capacity);
/* One target's version; the kernel loads its module. -EOPNOTSUPP if there is none. */
int bs_dm_target_version(int control, const char *type, struct bs_dm_target_version *ret);

/* A device without a table. Names: 1 to 127 of [A-Za-z0-9+_.-], not starting with '.' or '-'; uuids: 1 to 128
 * of the same and ':', or NULL. -EBUSY if one of them is taken. */
int bs_dm_create(int control, const char *name, const char *uuid, struct bs_dm_info *ret);
/* flags: BS_DM_DEFERRED_REMOVE removes at the last close. A cookie of 0 is none. -EBUSY while it is open. */
int bs_dm_remove(int control, const char *name, const char *uuid, unsigned int flags, uint32_t cookie,
	struct bs_dm_info *ret);
/* The kernel renames by name only: ask for the uuid first. ret has the flags, but still the old name. */
int bs_dm_rename(
	int control, const char *name, const char *new_name, uint32_t cookie, struct bs_dm_info *ret);
/* flags: BS_DM_SKIP_LOCKFS, BS_DM_NOFLUSH. Waits for the I/O under way. -EINTR if a signal came first; the
 * device is then as before. */
int bs_dm_suspend(
	int control, const char *name, const char *uuid, unsigned int flags, struct bs_dm_info *ret);
/* Make a pending table live and let I/O go on. If the target refuses, the device stays suspended with the new
 * table: load a good one and resume again. */
int bs_dm_resume(int control, const char *name, const char *uuid, unsigned int flags, uint32_t cookie,
	struct bs_dm_info *ret);
/* Load a pending table: lines from sector 0 on, without gaps. flags: BS_DM_READ_ONLY. */
int bs_dm_load(int control, const char *name, const char *uuid, const struct bs_dm_target *targets, int count,
	unsigned int flags, struct bs_dm_info *ret);
/* Drop the pending table. */
int bs_dm_clear(int control, const char *name, const char *uuid, struct bs_dm_info *ret);
int bs_dm_info(int control, const char *name, const char *uuid, struct bs_dm_info *ret);
/* The devices (dev_t) below a device; returns like bs_dm_devices. flags: BS_DM_QUERY_PENDING. */
int bs_dm_dependencies(
	int control, const char *name, const char *uuid, unsigned int flags, uint64_t *out, int capacity);
/* The status of each target, or with BS_DM_TABLE its table, each as "START LENGTH TYPE TEXT" with a NUL behind
 * it. Returns the bytes that this takes; nothing is written if they are more than capacity. Without
 * BS_DM_NOFLUSH a thin pool commits first. */
int bs_dm_lines(int control, const char *name, const char *uuid, unsigned int flags, char *out, int capacity,
	struct bs_dm_info *ret);
/* Wait until the device's event counter is not event_nr; info as it is then. -EINTR if a signal came first. */
int bs_dm_wait(int control, const char *name, const char *uuid, uint32_t event_nr, struct bs_dm_info *ret);
/* From now on poll(2) on the descriptor reports only events that come later. */
int bs_dm_arm_poll(int control);
/* Send a message to the target at a sector. Returns the length of its answer, 0 if there is none; at most
 * capacity - 1 bytes of it are written, and a NUL. */
int bs_dm_message(int control, const char *name, const char *uuid, uint64_t sector, const char *message,
	char *out, int capacity);

struct bs_dm_guard;

/* Suspend like bs_dm_suspend, in a guard process that resumes the device when this process ends, by whatever
 * signal. If it takes longer than timeout_ms it is given up, undone once it is through, and -ETIMEDOUT. */
int bs_dm_guard_suspend(
	const char *name, const char *uuid, unsigned int flags, int timeout_ms, struct bs_dm_guard **ret);
/* Resume and free the guard. Fails like bs_dm_resume. */
int bs_dm_guard_resume(struct bs_dm_guard *guard);

/* What udev is told with a cookie, in its upper half: flags of libdevmapper. */
#define BS_DM_UDEV_NO_SUBSYSTEM_RULES 0x20000
#define BS_DM_UDEV_NO_DISK_RULES 0x40000
#define BS_DM_UDEV_NO_OTHER_RULES 0x80000
#define BS_DM_UDEV_PRIMARY_SOURCE 0x400000

/* A cookie for one change of one device; or flags to it. Only where udev runs with the rules of device-mapper. */
int bs_dm_cookie_create(uint32_t *ret);
/* Wait until udev is done. -ETIMEDOUT, and -EINTR if a signal came first. */
int bs_dm_cookie_wait(uint32_t cookie, int timeout_ms);
/* Must follow every bs_dm_cookie_create; a cookie that is gone is accepted. */
void bs_dm_cookie_destroy(uint32_t cookie);
/* Destroy the cookies whose makers were killed. */
void bs_dm_cookies_sweep(void);

/* ---- block traces (trace_text.c, trace_blktrace.c, trace_vscsi.c, trace_srt.c, trace_names.c) ---- */

/* One request; time in nanoseconds. The same bytes as REQUEST of traces/request.py. */
struct bs_request {
	uint64_t time;
	uint64_t offset;
	uint64_t length;
	uint32_t kind;
	uint32_t device;
};

#define BS_REQUEST_READ 0
#define BS_REQUEST_WRITE 1
#define BS_REQUEST_DISCARD 2
#define BS_REQUEST_FLUSH 3
#define BS_TRACE_WAIT 4    /* in a text only: the offset's field says how many microseconds pass */
#define BS_TRACE_NOTHING 5 /* in a text only: not a request */

/* Which field of a line holds what, from 0 on; -1: none. Only offset, length and kind must be there. */
struct bs_trace_layout {
	char separator; /* ' ' stands for any run of blanks */
	bool letters;   /* the kind is in blkparse's letters, not in words */
	bool ordered;   /* a time before that of the line before is bad */
	int32_t time;
	int32_t offset;
	int32_t length;
	int32_t kind;
	int32_t device;
	int32_t host;   /* of the device: its number is added from bit 16 on */
	int32_t filter; /* only lines that have filter_word there are requests */
	char filter_word[8];
	uint64_t time_unit;   /* nanoseconds */
	uint64_t offset_unit; /* bytes */
	uint64_t length_unit;
};

/* What an operation is called, whatever the case; the first eight characters count. */
struct bs_trace_word {
	char text[8];
	uint32_t kind;
};

struct bs_trace_progress {
	uint64_t consumed; /* bytes of this call's input */
	uint64_t count;    /* requests of this call */
	uint64_t record;   /* the last one read, from 1 on; binary traces count on from what stands there */
	uint64_t line;     /* of a text */
	uint64_t clock;    /* time of the last request of a vscsi or SRT trace */
};

/* Names of devices and hosts, numbered from 0 in order of appearance; files of one trace share them. */
struct bs_trace_names;

int bs_trace_names_create(struct bs_trace_names **ret);
void bs_trace_names_destroy(struct bs_trace_names *names);
/* Returns the number of a name of 1 to 254 bytes. -ENOSPC beyond 4096 names. */
int bs_trace_names_number(struct bs_trace_names *names, const char *text, size_t length);
/* The name of a number, with a NUL; returns its length. -ENODATA: there is none. */
int bs_trace_names_name(const struct bs_trace_names *names, int number, char *out, int capacity);

struct bs_trace_parser;

/* The names must outlive the parser. */
int bs_trace_parser_create(const struct bs_trace_layout *layout, const struct bs_trace_word *words,
	int nr_words, struct bs_trace_names *names, struct bs_trace_parser **ret);
void bs_trace_parser_destroy(struct bs_trace_parser *parser);
/* Read whole lines until the text ends or no two more requests fit. Fails behind a bad line (-EBADMSG); ret is
 * right then too, and calling again with the rest goes on. */
int bs_trace_parser_parse(struct bs_trace_parser *parser, const char *text, size_t length,
	struct bs_request *out, size_t capacity, struct bs_trace_progress *ret);

/* Read whole records of a blktrace file, requests from events of one action (1 queue, 7 issue, 8 complete).
 * -EBADMSG behind a bad record; -EUCLEAN if no record can be found here. */
int bs_trace_blktrace(const void *data, size_t length, uint32_t action, bool swapped, struct bs_request *out,
	size_t capacity, struct bs_trace_progress *ret);

struct bs_trace_vscsi {
	int version;  /* 1 or 2 */
	bool swapped; /* big-endian */
	bool ordered; /* a time before that of the record before is bad */
};

/* Read whole records of a vscsi trace. -EBADMSG behind a bad record. */
int bs_trace_vscsi(const void *data, size_t length, const struct bs_trace_vscsi *as, struct bs_request *out,
	size_t capacity, struct bs_trace_progress *ret);

/* Read whole records of an SRT trace, from behind its header on. -EBADMSG behind a bad record, -EUCLEAN if no
 * record can be found here. */
int bs_trace_srt(const void *data, size_t length, uint32_t sector_size, bool ordered, struct bs_request *out,
	size_t capacity, struct bs_trace_progress *ret);

/* ---- copy-on-write model (cow_model.c) ---- */

/* What a thin pool would do under a block trace, at several block sizes at once; nothing is written. Devices of a
 * trace are thin devices of one pool, sized in whole blocks of the largest size, and are snapshotted together;
 * snapshots are kept. An epoch is the time between two snapshots. One thread at a time. */

#define BS_COW_FRESH 1      /* devices begin as holes; else every block is shared with a parent that stays */
#define BS_COW_KEEP_PARTS 2 /* what a discard covers of a block in part is left alone, as the kernel does */

/* 0: never, unknown. Snapshots by count come after the write that makes it full; those by time before the first
 * request at or after a multiple of it since the trace began, if anything was written or discarded meanwhile. */
struct bs_cow_options {
	uint64_t snapshot_writes;
	uint64_t snapshot_bytes;
	uint64_t snapshot_ns;
	uint64_t commit_ns;    /* metadata are committed at this interval, and at flushes and snapshots */
	uint64_t device_bytes; /* of the largest device; else the highest byte seen so far counts */
	uint32_t flags;
	uint32_t padding;
};

struct bs_cow_trace {
	uint64_t requests, reads, writes, discards, flushes;
	uint64_t read_bytes, written_bytes, discarded_bytes;
	uint64_t first_time, last_time;
	uint64_t highest_byte; /* the end of the highest request */
	uint64_t snapshots;
	uint64_t memory_bytes; /* of the model */
};

struct bs_cow_result {
	uint64_t block_size;
	uint64_t blocks_provisioned; /* holes that got a data block */
	uint64_t blocks_copied;      /* sharing broken with a copy */
	uint64_t blocks_overwritten; /* sharing broken by a write that covers the block */
	uint64_t blocks_discarded;   /* mapped blocks that a discard unmapped */
	uint64_t blocks_freed;       /* of these, those allocated in the same epoch: no snapshot holds them */
	uint64_t copied_bytes;       /* as in struct bs_pool_counters */
	uint64_t zero_filled_bytes;  /* as in struct bs_pool_counters */
	uint64_t metadata_blocks;    /* that commits write, by an approximation: cow_metadata.c */
	uint64_t commits;
};

/* Sums over bs_cow_model_epochs_a_record() epochs. */
struct bs_cow_epoch {
	uint64_t blocks_allocated;
	uint64_t blocks_freed; /* allocated and unmapped within the epoch */
	uint64_t
		blocks_exclusive; /* held by the snapshot at its end alone; of the running one: by the devices alone */
	uint64_t blocks_copied;
	uint64_t metadata_blocks; /* of commits in the epoch, the one of the snapshot at its end among them */
};

struct bs_cow_model;

/* block_sizes: ascending powers of two from 512 to 1 GiB. */
int bs_cow_model_create(const uint64_t *block_sizes, int nr_sizes, const struct bs_cow_options *options,
	struct bs_cow_model **ret);
void bs_cow_model_destroy(struct bs_cow_model *model);
/* Go on with the next requests of the trace. -EINVAL names the first one that cannot be (bytes beyond 2^63, a
 * write of more than 4 GiB, an unknown kind); those before it have been taken. */
int bs_cow_model_feed(struct bs_cow_model *model, const struct bs_request *requests, uint64_t count);
int bs_cow_model_snapshot(struct bs_cow_model *model);
void bs_cow_model_trace(const struct bs_cow_model *model, struct bs_cow_trace *ret);
/* By block size; returns the number of block sizes. What is pending of metadata counts as committed. */
int bs_cow_model_results(struct bs_cow_model *model, struct bs_cow_result *out, int capacity);
/* Records of a block size from number begin on, the last one being the running epoch; returns the number written
 * to out. Their number is bounded: when there are too many, each comes to stand for twice as many epochs. What is
 * pending of metadata counts as committed. */
int bs_cow_model_epochs(
	struct bs_cow_model *model, int size, uint64_t begin, struct bs_cow_epoch *out, int capacity);
uint64_t bs_cow_model_epochs_a_record(const struct bs_cow_model *model);
