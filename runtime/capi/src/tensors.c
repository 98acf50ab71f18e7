#include "tensors.h"

#include <stdlib.h>
#include <string.h>

static const struct {
    const char *name;
    size_t bytes;
} types[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"U16", 2}, {"I16", 2}, {"F16", 2},
             {"U32", 4},  {"I32", 4}, {"F32", 4}, {"U64", 8}, {"I64", 8}, {"F64", 8}};

enum { TYPES = sizeof types / sizeof *types };

size_t tensor_item_bytes(const tensor *t) { return types[t->dtype].bytes; }

static tusfm_status *parse_header(const uint8_t *raw, size_t size, const char *what, json_t **header, size_t *start) {
    uint64_t length = 0;
    for (int i = 7; i >= 0 && size >= 8; i--) length = length << 8 | raw[i];
    if (size < 8 || length < 2 || length > MAX_HEADER_BYTES || length > size - 8)
        return status_new(TUSFM_BUNDLE, "%s is not a readable .safetensors file: its header is missing or too long", what);
    json_error_t where;
    *header = json_loadb((const char *)raw + 8, (size_t)length, JSON_REJECT_DUPLICATES | JSON_DECODE_ANY, &where);
    if (!*header && json_error_code(&where) == json_error_out_of_memory) return no_memory();
    if (!json_is_object(*header))
        return status_new(TUSFM_BUNDLE, "%s is not a readable .safetensors file: its header is no JSON object", what);
    *start = 8 + (size_t)length;
    return NULL;
}

static int parse_shape(const json_t *shape, size_t limit, tensor *t) {
    if (!json_is_array(shape) || json_array_size(shape) > MAX_AXES) return 0;
    t->axes = (int)json_array_size(shape);
    t->count = 1;
    int empty = 0;
    for (int i = 0; i < t->axes; i++) {
        const json_t *side = json_array_get(shape, (size_t)i);
        if (!json_is_integer(side) || json_integer_value(side) < 0) return 0;
        t->shape[i] = (int64_t)json_integer_value(side);
        if (t->shape[i] == 0) empty = 1;
    }
    if (empty) t->count = 0;
    for (int i = 0; i < t->axes && !empty; i++) {
        if ((uint64_t)t->shape[i] > limit / t->count) return 0;
        t->count *= (size_t)t->shape[i];
    }
    return 1;
}

static tusfm_status *parse_entry(const char *name, const json_t *entry, const char *what, size_t size, tensor *t,
                                 size_t *begin) {
    const char *kind = json_string_value(json_object_get(entry, "dtype"));
    const json_t *offsets = json_object_get(entry, "data_offsets");
    const json_t *first = json_array_get(offsets, 0), *second = json_array_get(offsets, 1);
    t->name = name;
    for (t->dtype = 0; t->dtype < TYPES && (!kind || strcmp(types[t->dtype].name, kind) != 0); t->dtype++) {}
    if (t->dtype == TYPES || json_object_size(entry) != 3)
        return status_new(TUSFM_BUNDLE, "%s: an array of another type than numbers is not read", what);
    if (json_array_size(offsets) != 2 || !json_is_integer(first) || !json_is_integer(second) ||
        json_integer_value(first) < 0 || json_integer_value(second) < json_integer_value(first) ||
        (uint64_t)json_integer_value(second) > size || !parse_shape(json_object_get(entry, "shape"), size, t))
        return status_new(TUSFM_BUNDLE, "%s: an array has no usable shape or place", what);
    *begin = (size_t)json_integer_value(first);
    if ((size_t)json_integer_value(second) - *begin != t->count * tensor_item_bytes(t))
        return status_new(TUSFM_BUNDLE, "%s: an array is not as long as its header says", what);
    return NULL;
}

static int by_place(const void *a, const void *b) {
    const tensor *one = a, *other = b;
    if (one->data != other->data) return one->data < other->data ? -1 : 1;
    size_t left = one->count * tensor_item_bytes(one), right = other->count * tensor_item_bytes(other);
    return left < right ? -1 : left > right;
}

static tusfm_status *parse_all(const uint8_t *body, size_t size, const char *what, size_t limit, tensors *t) {
    const char *key;
    json_t *word;
    t->texts = json_incref(json_object_get(t->header, "__metadata__"));
    if (t->texts && !json_is_object(t->texts))
        return status_new(TUSFM_BUNDLE, "%s has metadata that are not texts", what);
    json_object_foreach(t->texts, key, word) if (!json_is_string(word))
        return status_new(TUSFM_BUNDLE, "%s has metadata that are not texts", what);
    json_object_del(t->header, "__metadata__");
    size_t count = json_object_size(t->header), end = 0;
    if (count > limit) return status_new(TUSFM_BUNDLE, "%s holds more than %zu arrays", what, limit);
    t->all = calloc(count ? count : 1, sizeof *t->all);
    if (!t->all) return no_memory();
    const char *name;
    json_t *entry;
    json_object_foreach(t->header, name, entry) {
        size_t begin = 0;
        TRY(parse_entry(name, entry, what, size, &t->all[t->count], &begin));
        t->all[t->count++].data = body + begin;
    }
    qsort(t->all, t->count, sizeof *t->all, by_place);
    for (size_t i = 0; i < t->count; i++) {
        if (t->all[i].data != body + end)
            return status_new(TUSFM_BUNDLE, "%s: the arrays do not lie one behind another", what);
        end += t->all[i].count * tensor_item_bytes(&t->all[i]);
    }
    if (end != size) return status_new(TUSFM_BUNDLE, "%s holds bytes that belong to no array", what);
    return NULL;
}

tusfm_status *tensors_open(const uint8_t *raw, size_t size, const char *what, size_t limit, tensors *t) {
    size_t start = 0;
    memset(t, 0, sizeof *t);
    tusfm_status *failed = parse_header(raw, size, what, &t->header, &start);
    if (!failed) failed = parse_all(raw + start, size - start, what, limit, t);
    if (failed) tensors_close(t);
    return failed;
}

void tensors_close(tensors *t) {
    free(t->all);
    json_decref(t->header);
    json_decref(t->texts);
    memset(t, 0, sizeof *t);
}

const char *tensors_text(const tensors *t, const char *name) {
    return json_string_value(json_object_get(t->texts, name));
}

const tensor *tensors_find(const tensors *t, const char *name) {
    for (size_t i = 0; i < t->count; i++)
        if (strcmp(t->all[i].name, name) == 0) return &t->all[i];
    return NULL;
}

/* IEEE 754 binary16: 1 sign, 5 exponent and 10 fraction bits. */
float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = (half >> 10) & 31, fraction = half & 0x3ff, bits;
    if (exponent == 31) {
        bits = 0x7f800000u | fraction << 13;
    } else if (exponent) {
        bits = (exponent + 112) << 23 | fraction << 13;
    } else if (!fraction) {
        bits = 0;
    } else {
        uint32_t shift = 0;
        while (!(fraction & 0x400)) fraction <<= 1, shift++;
        bits = (113 - shift) << 23 | (fraction & 0x3ff) << 13;
    }
    bits |= sign;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static uint64_t little(const uint8_t *bytes, size_t count) {
    uint64_t value = 0;
    while (count--) value = value << 8 | bytes[count];
    return value;
}

int64_t tensor_integer(const tensor *t, size_t at) {
    uint64_t raw = little(t->data + 8 * at, 8);
    int64_t value;
    memcpy(&value, &raw, sizeof value);
    return value;
}

double tensor_number(const tensor *t, size_t at) {
    size_t bytes = tensor_item_bytes(t);
    uint64_t raw = little(t->data + bytes * at, bytes);
    uint32_t small = (uint32_t)raw;
    float single;
    double wide;
    switch (t->dtype) {
    case F16: return (double)half_to_float((uint16_t)raw);
    case F32: memcpy(&single, &small, sizeof single); return (double)single;
    case F64: memcpy(&wide, &raw, sizeof wide); return wide;
    case I8: return (int8_t)raw;
    case I16: return (int16_t)raw;
    case I32: return (int32_t)small;
    case I64: return (double)tensor_integer(t, at);
    default: return (double)raw;
    }
}
