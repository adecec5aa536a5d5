/* The guarded way to blocksnap_api.h, which itself holds nothing but declarations (cffi reads it without a
 * preprocessor). */
#ifndef BLOCKSNAP_H
#define BLOCKSNAP_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#include "blocksnap_api.h"

#endif
