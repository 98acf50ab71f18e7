/* Anti-rollback: the highest security version that a device has opened; as trust/rollback.py. */
#ifndef TUSFM_FLOOR_H
#define TUSFM_FLOOR_H

#include "status.h"

/* By the caller's two functions, or in a file of the user's own (options.floor_file, or the toolkit's cache folder). */
tusfm_status *floor_read(const tusfm_trust_options *options, const char *model, int64_t *version);
tusfm_status *floor_raise(const tusfm_trust_options *options, const char *model, int64_t version);

#endif
