/* The text of a dump, and an output that cannot be written. */
#include <errno.h>
#include <fcntl.h>
#include <signal.h>

#include "thin_image.h"

#define SUPERBLOCK                                                                                           \
	"<superblock uuid=\"\" time=\"3\" transaction=\"9\" flags=\"0\" version=\"2\" "                      \
	"data_block_size=\"128\" "                                                                           \
	"nr_data_blocks=\"400\">\n"

static void runs_cross_leaves_and_end_where_time_changes(void)
{
	struct image *im = image_create();
	int fd = memfd_create("dump", MFD_CLOEXEC);

	image_write(im);
	CHECK_EQ(bs_metadata_dump(im->path, 0, fd), 0);
	char *text = text_of(fd);
	CHECK(strncmp(text, SUPERBLOCK, strlen(SUPERBLOCK)) == 0);
	CHECK(strstr(text,
		"  <device dev_id=\"1\" mapped_blocks=\"200\" transaction=\"0\" creation_time=\"0\" "
		"snap_time=\"3\">\n"
		"    <range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"200\" time=\"0\"/>\n"
		"  </device>\n"
		"  <device dev_id=\"2\" mapped_blocks=\"200\" transaction=\"1\" creation_time=\"1\" "
		"snap_time=\"1\">\n"
		"    <range_mapping origin_begin=\"0\" data_begin=\"0\" length=\"100\" time=\"0\"/>\n"
		"    <range_mapping origin_begin=\"100\" data_begin=\"200\" length=\"100\" time=\"1\"/>\n"
		"  </device>\n"));
	CHECK(strstr(text, "  </device>\n</superblock>\n"));
	free(text);
	image_destroy(im);
}

static void closed_pipe_is_an_error_and_raises_no_signal(void)
{
	struct image *im = image_create();
	int ends[2];
	sigset_t pending;

	image_write(im);
	CHECK_EQ(pipe(ends), 0);
	close(ends[0]);
	CHECK(signal(SIGPIPE, SIG_DFL) != SIG_ERR);
	CHECK_EQ(bs_metadata_dump(im->path, 0, ends[1]), -EPIPE);
	CHECK(strstr(bs_last_error(), "Broken pipe"));
	sigpending(&pending);
	CHECK(!sigismember(&pending, SIGPIPE));
	close(ends[1]);
	image_destroy(im);
}

static void ids_that_differ_in_the_two_trees_are_refused(void)
{
	struct image *im = image_create();
	int null = open("/dev/null", O_WRONLY | O_CLOEXEC);
	uint32_t top = (uint32_t)le64_get(im->blocks[0].superblock.data_mapping_root);

	im->blocks[top].node.keys[5] = le64_of(99);
	image_write(im);
	CHECK_EQ(bs_metadata_dump(im->path, 0, null), -EILSEQ);
	CHECK(strstr(bs_last_error(), "thin device 6 has details but no mapping tree"));
	close(null);
	image_destroy(im);
}

int main(void)
{
	RUN(runs_cross_leaves_and_end_where_time_changes);
	RUN(closed_pipe_is_an_error_and_raises_no_signal);
	RUN(ids_that_differ_in_the_two_trees_are_refused);
	return 0;
}
