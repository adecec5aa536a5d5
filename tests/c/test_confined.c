/* Opening below a directory: whatever the path says, the result lies below. */
#include <errno.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "test.h"

static char base[] = "/tmp/blocksnap-confined-XXXXXX";
static int root;

static ino_t inode_of(int fd)
{
	struct stat st;

	CHECK_EQ(fstat(fd, &st), 0);
	close(fd);
	return st.st_ino;
}

static ino_t open_inode(const char *path)
{
	int fd = bs_open_in_root(root, path, O_PATH | O_DIRECTORY);

	CHECK(fd >= 0);
	CHECK(fcntl(fd, F_GETFD) & FD_CLOEXEC);
	return inode_of(fd);
}

static void set_up(void)
{
	CHECK(mkdtemp(base) != NULL);
	CHECK_EQ(chdir(base), 0);
	CHECK_EQ(mkdir("root", 0755), 0);
	CHECK_EQ(mkdir("root/inside", 0755), 0);
	CHECK_EQ(symlink("/inside", "root/absolute"), 0);
	CHECK_EQ(symlink("../../../../..", "root/inside/climbing"), 0);
	CHECK_EQ(symlink("/proc/self/fd/0", "root/magic"), 0);
	root = open("root", O_PATH | O_DIRECTORY);
	CHECK(root >= 0);
}

static void tear_down(void)
{
	close(root);
	CHECK_EQ(unlink("root/absolute"), 0);
	CHECK_EQ(unlink("root/inside/climbing"), 0);
	CHECK_EQ(unlink("root/magic"), 0);
	CHECK_EQ(rmdir("root/inside"), 0);
	CHECK_EQ(rmdir("root"), 0);
	CHECK_EQ(rmdir(base), 0);
}

static void test_paths_resolve_below_the_root(void)
{
	ino_t inside = open_inode("inside"), top = open_inode(".");

	CHECK_EQ(open_inode("/inside"), inside);
	CHECK_EQ(open_inode("absolute"), inside);
	CHECK_EQ(open_inode("../../inside"), inside);
	CHECK_EQ(open_inode("/.."), top);
	CHECK_EQ(open_inode("inside/climbing"), top);
	CHECK_EQ(open_inode("inside/climbing/absolute"), inside);
}

static void test_what_is_not_there_is_an_error_with_its_name(void)
{
	CHECK_EQ(bs_open_in_root(root, "inside/nothing", O_PATH), -ENOENT);
	CHECK(strstr(bs_last_error(), "inside/nothing") != NULL);
	CHECK_EQ(bs_open_in_root(root, "magic", O_PATH | O_DIRECTORY), -ENOENT);
	CHECK_EQ(bs_open_in_root(root, base, O_PATH), -ENOENT);
}

int main(void)
{
	set_up();
	RUN(test_paths_resolve_below_the_root);
	RUN(test_what_is_not_there_is_an_error_with_its_name);
	tear_down();
	return 0;
}
