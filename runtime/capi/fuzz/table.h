/* Tensors of an integer model without a JSON parser: a count, then for each tensor an entry and its bytes, as
 * scripts/ports.py writes them. For programs that test the engine. */
#ifndef TUSFM_FUZZ_TABLE_H
#define TUSFM_FUZZ_TABLE_H

#include <string.h>

#include "../integer_engine.h"

enum { MAX_TABLE = 4096 };

typedef struct table_entry {
    char name[64];
    int32_t dtype, dims;
    int64_t shape[TUE_INT_MAX_DIMS], bytes;
} table_entry;

/* Fills `table`, which points into `entries` and `data`; returns how many tensors there are, 0 for none or nonsense. */
static inline size_t read_table(const uint8_t *data, size_t size, table_entry *entries, tue_int_tensor *table) {
    int32_t count = 0;
    size_t at = sizeof count;
    if (size < at) return 0;
    memcpy(&count, data, sizeof count);
    if (count < 0 || count > MAX_TABLE) return 0;
    for (int32_t i = 0; i < count; i++) {
        table_entry *e = &entries[i];
        if (size - at < sizeof *e) return 0;
        memcpy(e, data + at, sizeof *e);
        at += sizeof *e;
        e->name[sizeof e->name - 1] = 0;
        if (e->bytes < 0 || (uint64_t)e->bytes > size - at) return 0;
        table[i] = (tue_int_tensor){
            .name = e->name, .data = data + at, .bytes = (size_t)e->bytes, .dims = e->dims, .dtype = e->dtype};
        memcpy(table[i].shape, e->shape, sizeof e->shape);
        at += (size_t)e->bytes;
    }
    return (size_t)count;
}

#endif
