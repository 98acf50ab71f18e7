/* Fuzzes the reader of integer models. What it accepts is small enough to run is run, in the portable form and in the
 * fastest one, which have to answer alike. */
#include <stdio.h>
#include <stdlib.h>

#include "table.h"

enum { MAX_OUTS = 64, MOST_MB = 2 };

static float *answer(tue_int_engine *engine, const uint8_t *input, size_t *total) {
    float *outputs[MAX_OUTS], *all;
    size_t count = tue_int_output_count(engine);
    tue_int_port port;
    *total = 0;
    if (count > MAX_OUTS) return NULL;
    for (size_t i = 0; i < count; i++) {
        if (tue_int_describe_output(engine, i, &port) != TUE_INT_OK) abort();
        *total += port.elements;
    }
    all = malloc(*total * sizeof *all + 1);
    if (!all) return NULL;
    float *at = all;
    for (size_t i = 0; i < count; i++) {
        tue_int_describe_output(engine, i, &port);
        outputs[i] = at;
        at += port.elements;
    }
    if (tue_int_run(engine, input, outputs) != TUE_INT_OK) abort();
    return all;
}

static double megabytes(const tue_int_engine *engine) {
    const char *comma = strrchr(tue_int_describe(engine), ',');
    return comma ? atof(comma + 1) : 1e9;
}

static void run_both(const tue_int_tensor *table, size_t count) {
    tue_int_options plain = {.struct_size = sizeof plain, .threads = 1, .isa = "portable"};
    tue_int_engine *slow = NULL, *fast = NULL;
    char text[256] = "";
    tue_int_port port;
    int32_t status = tue_int_open(table, count, &plain, &slow, text, sizeof text);
    if (status != TUE_INT_OK) {
        if (!text[0] || strchr(text, '\n') || slow) abort();
        return;
    }
    tue_int_describe_input(slow, &port);
    if (megabytes(slow) < MOST_MB && tue_int_open(table, count, NULL, &fast, text, sizeof text) == TUE_INT_OK) {
        size_t bytes = port.elements * (port.dtype == TUE_INT_U8 ? 1 : sizeof(float)), here, there;
        uint8_t *input = malloc(bytes + 1);
        for (size_t i = 0; input && i < bytes; i++) input[i] = (uint8_t)(i * 37 + 11);
        float *a = input ? answer(slow, input, &here) : NULL, *b = input ? answer(fast, input, &there) : NULL;
        if (a && b && (here != there || memcmp(a, b, here * sizeof *a) != 0)) abort();
        free(a);
        free(b);
        free(input);
    }
    tue_int_close(fast);
    tue_int_close(slow);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    table_entry *entries = calloc(MAX_TABLE, sizeof *entries);
    tue_int_tensor *table = calloc(MAX_TABLE, sizeof *table);
    size_t count = entries && table ? read_table(data, size, entries, table) : 0;
    if (count) run_both(table, count);
    free(entries);
    free(table);
    return 0;
}
