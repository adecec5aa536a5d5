/*
 * What the kernel answers to a device-mapper ioctl, read out of the ioctl's buffer.
 *
 * Every offset, length and string of an answer is checked before it is used: capacity is the size of the
 * buffer, and nothing outside of data_size is looked at. A bad answer is -EBADMSG, without a message: the
 * caller knows the operation and the device.
 */
#ifndef DM_REPLY_H
#define DM_REPLY_H

#include <linux/dm-ioctl.h>

#include "blocksnap.h"

int dm_reply_info(const struct dm_ioctl *reply, size_t capacity, struct bs_dm_info *ret);
/* These return as the functions of blocksnap_api.h do. */
int dm_reply_devices(const struct dm_ioctl *reply, size_t capacity, struct bs_dm_entry *out, int count);
int dm_reply_target_versions(
	const struct dm_ioctl *reply, size_t capacity, struct bs_dm_target_version *out, int count);
int dm_reply_dependencies(const struct dm_ioctl *reply, size_t capacity, uint64_t *out, int count);
int dm_reply_lines(const struct dm_ioctl *reply, size_t capacity, char *out, int length);
int dm_reply_message(const struct dm_ioctl *reply, size_t capacity, char *out, int length);

#endif
