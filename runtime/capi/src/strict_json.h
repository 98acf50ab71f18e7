/* JSON that is not the manifest's, read as strict_json.py reads it: no two keys of one name, no NUL, not too deep. */
#ifndef TUSFM_STRICT_JSON_H
#define TUSFM_STRICT_JSON_H

#include "status.h"

#include <jansson.h>

/* NULL: not JSON, or with one of these surprises. The caller owns it. */
json_t *strict_json(const void *bytes, size_t count);

#endif
