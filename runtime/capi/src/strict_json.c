#include "strict_json.h"

enum { DEEPEST = 64 };

static int is_flat(const json_t *value, int depth) {
    const char *key;
    json_t *inner;
    size_t at;
    if (depth > DEEPEST) return 0;
    if (json_is_object(value)) {
        if (json_object_size(value) && depth == DEEPEST) return 0;
        json_object_foreach((json_t *)value, key, inner) if (!is_flat(inner, depth + 1)) return 0;
    }
    json_array_foreach(value, at, inner) if (!is_flat(inner, depth + 1)) return 0;
    return 1;
}

json_t *strict_json(const void *bytes, size_t count) {
    json_error_t where;
    json_t *found = json_loadb(bytes, count, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &where);
    if (!found || is_flat(found, 0)) return found;
    json_decref(found);
    return NULL;
}
