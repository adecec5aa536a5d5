#include "transaction_manager.h"

#include <string.h>

#include "seed_bug.h"

int tm_read(struct transaction_manager *tm, uint64_t nr, const struct bm_validator *validator,
	struct bm_block **ret)
{
	return bm_read(tm->bm, nr, validator, ret);
}

int tm_new(struct transaction_manager *tm, const struct bm_validator *validator, struct bm_block **ret)
{
	uint64_t nr;
	int r = sm_new_block(tm->sm, &nr);

	return r < 0 ? r : bm_new(tm->bm, nr, validator, ret);
}

int tm_shadow(struct transaction_manager *tm, uint64_t nr, const struct bm_validator *validator,
	struct bm_block **ret, bool *ret_shared)
{
	struct bm_block *old, *copy;
	uint32_t count;
	int r = bm_read(tm->bm, nr, validator, &old);

	if (r == 0)
		r = sm_count(tm->sm, nr, &count);
	if (r < 0)
		return r;
	*ret_shared = count > 1 && !BS_BUG(SHARED_CHILDREN_NOT_COUNTED);
	if ((old->dirty || BS_BUG(SHADOW_MISSED)) && count == 1) {
		*ret = old;
		return 0;
	}
	r = tm_new(tm, validator, &copy);
	if (r < 0)
		return r;
	memcpy(copy->data, old->data, METADATA_BLOCK_SIZE);
	*ret = copy;
	return BS_BUG(SHADOW_KEEPS_OLD_BLOCK) ? 0 : tm_dec(tm, nr);
}

int tm_inc(struct transaction_manager *tm, uint64_t nr)
{
	return sm_inc(tm->sm, nr);
}

int tm_dec(struct transaction_manager *tm, uint64_t nr)
{
	uint32_t left;
	int r = sm_dec(tm->sm, nr, &left);

	if (r == 0 && left == 0)
		bm_forget(tm->bm, nr);
	return r;
}

int tm_count(struct transaction_manager *tm, uint64_t nr, uint32_t *ret)
{
	return sm_count(tm->sm, nr, ret);
}

int tm_committed_count(struct transaction_manager *tm, uint64_t nr, uint32_t *ret)
{
	return sm_committed_count(tm->sm, nr, ret);
}
