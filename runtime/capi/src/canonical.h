/* JSON as the Python runtime writes it, so that a manifest can be held against itself byte for byte:
 * json.dumps(data, sort_keys=True, indent=1) + "\n", and json.dumps(..., separators=(",", ":")) for its hash. */
#ifndef TUSFM_CANONICAL_H
#define TUSFM_CANONICAL_H

#include "status.h"

#include <jansson.h>

typedef struct text {
    char *bytes;
    size_t count, room;
} text;

/* Appends; an error leaves what there is to be freed by text_free. */
tusfm_status *text_add(text *to, const char *bytes, size_t count);
void text_free(text *t);

/* Writes a value. `leave_out`: a key of the outermost object that is not written, or NULL. */
tusfm_status *canonical_write(text *to, const json_t *value, int pretty, const char *leave_out);

/* A finite number as Python's repr writes it: the fewest digits that give it back. `into` has room for 32 bytes. */
void canonical_real(double value, char into[32]);

#endif
