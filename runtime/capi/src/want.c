#include "want.h"

#include <string.h>

static char kind_of(const json_t *value) {
    switch (json_typeof(value)) {
    case JSON_OBJECT: return 'o';
    case JSON_ARRAY: return 'a';
    case JSON_STRING: return 's';
    case JSON_INTEGER: return 'i';
    case JSON_REAL: return 'n';
    case JSON_TRUE:
    case JSON_FALSE: return 'b';
    case JSON_NULL: break;
    }
    return '0';
}

tusfm_status *want_object(const json_t *data, const wanted *keys, size_t count, const char *what) {
    if (!json_is_object(data)) return status_new(TUSFM_BUNDLE, "%s is not written as a JSON object", what);
    for (size_t i = 0; i < count; i++) {
        const json_t *value = json_object_get(data, keys[i].key);
        if (!value) return status_new(TUSFM_BUNDLE, "%s lacks %s", what, keys[i].key);
        char kind = kind_of(value);
        int fits = strchr(keys[i].kinds, kind) || (kind == 'i' && strchr(keys[i].kinds, 'n'));
        if (!fits) return status_new(TUSFM_BUNDLE, "%s: %s is written as another kind of value", what, keys[i].key);
    }
    if (json_object_size(data) != count) return status_new(TUSFM_BUNDLE, "%s has unknown keys", what);
    return NULL;
}

const char *want_string(const json_t *object, const char *key) {
    return json_string_value(json_object_get(object, key));
}

double want_number(const json_t *object, const char *key) { return json_number_value(json_object_get(object, key)); }

int64_t want_integer(const json_t *object, const char *key) {
    return (int64_t)json_integer_value(json_object_get(object, key));
}

int want_true(const json_t *object, const char *key) { return json_is_true(json_object_get(object, key)); }

tusfm_status *want_numbers(const json_t *array, size_t count, double *out, const char *what) {
    if (!json_is_array(array) || json_array_size(array) != count)
        return status_new(TUSFM_BUNDLE, "%s must be %zu numbers", what, count);
    for (size_t i = 0; i < count; i++) {
        const json_t *value = json_array_get(array, i);
        if (!json_is_number(value)) return status_new(TUSFM_BUNDLE, "%s must be %zu numbers", what, count);
        out[i] = json_number_value(value);
    }
    return NULL;
}

tusfm_status *want_integers(const json_t *array, size_t count, int64_t *out, const char *what) {
    if (!json_is_array(array) || json_array_size(array) != count)
        return status_new(TUSFM_BUNDLE, "%s must be %zu whole numbers", what, count);
    for (size_t i = 0; i < count; i++) {
        const json_t *value = json_array_get(array, i);
        if (!json_is_integer(value)) return status_new(TUSFM_BUNDLE, "%s must be %zu whole numbers", what, count);
        out[i] = (int64_t)json_integer_value(value);
    }
    return NULL;
}
