/* Runs a fuzz target over files and directories of inputs. */
#include <dirent.h>
#include <sys/stat.h>

#include "fuzz.h"

static size_t replayed;

static void replay_file(const char *path)
{
	FILE *file = fopen(path, "rb");
	struct stat found;

	if (!file || fstat(fileno(file), &found) < 0) {
		perror(path);
		exit(1);
	}
	/* Of exactly the input's size: a read behind its end is found. */
	uint8_t *data = malloc((size_t)found.st_size);
	if (fread(data, 1, (size_t)found.st_size, file) != (size_t)found.st_size) {
		perror(path);
		exit(1);
	}
	fclose(file);
	LLVMFuzzerTestOneInput(data, (size_t)found.st_size);
	free(data);
	replayed++;
}

static void replay(const char *path)
{
	DIR *directory = opendir(path);
	struct dirent *entry;

	if (!directory) {
		replay_file(path);
		return;
	}
	while ((entry = readdir(directory))) {
		char inside[4096];

		snprintf(inside, sizeof(inside), "%s/%s", path, entry->d_name);
		if (entry->d_name[0] != '.')
			replay_file(inside);
	}
	closedir(directory);
}

int main(int argc, char **argv)
{
	for (int i = 1; i < argc; i++)
		replay(argv[i]);
	printf("%zu inputs\n", replayed);
	return replayed == 0;
}
