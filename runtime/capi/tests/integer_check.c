/* Answers of the integer engine as text that two machines can compare:  integer_check MODEL FRAMES [COUNT [ISA]...]
 *
 * MODEL is a list of tensors as scripts/ports.py writes it (no JSON parser is needed here), FRAMES the tensors that the
 * model takes, one after the other. For each frame an FNV-1a hash of all outputs is printed; every instruction set that
 * is asked for (all of this CPU, if none is) has to give the same, or the program ends with 1. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../fuzz/table.h"

enum { MAX_OUTPUTS = 64 };

static uint8_t *read_all(const char *path, size_t *size) {
    FILE *file = fopen(path, "rb");
    uint8_t *data = NULL;
    if (!file) return NULL;
    if (fseek(file, 0, SEEK_END) == 0 && ftell(file) > 0) {
        *size = (size_t)ftell(file);
        rewind(file);
        data = malloc(*size);
        if (data && fread(data, 1, *size, file) != *size) {
            free(data);
            data = NULL;
        }
    }
    fclose(file);
    return data;
}

static uint64_t hash_of(uint64_t hash, const float *data, size_t count) {
    const uint8_t *bytes = (const uint8_t *)data;
    for (size_t i = 0; i < count * sizeof *data; i++) hash = (hash ^ bytes[i]) * 1099511628211u;
    return hash;
}

/* Hashes of the frames' answers; 0: it could not be done. */
static int run(const tue_int_tensor *table, size_t tensors, const char *isa, const uint8_t *frames, size_t size,
               size_t *count, uint64_t *hashes) {
    tue_int_options options = {.struct_size = sizeof options, .threads = 1, .isa = isa};
    tue_int_engine *engine = NULL;
    tue_int_port port;
    char text[256] = "";
    float *outputs[MAX_OUTPUTS] = {0};
    size_t elements[MAX_OUTPUTS];
    if (tue_int_open(table, tensors, &options, &engine, text, sizeof text) != TUE_INT_OK) {
        fprintf(stderr, "%s: %s\n", isa ? isa : "-", text);
        return 0;
    }
    size_t outs = tue_int_output_count(engine);
    int is_good = outs <= MAX_OUTPUTS;
    for (size_t i = 0; i < outs && is_good; i++) {
        is_good = tue_int_describe_output(engine, i, &port) == TUE_INT_OK;
        elements[i] = port.elements;
        outputs[i] = malloc(port.elements * sizeof(float));
        is_good = is_good && outputs[i];
    }
    is_good = is_good && tue_int_describe_input(engine, &port) == TUE_INT_OK && port.dtype == TUE_INT_U8;
    if (is_good && *count > size / port.elements) *count = size / port.elements;
    for (size_t f = 0; f < *count && is_good; f++) {
        is_good = tue_int_run(engine, frames + f * port.elements, outputs) == TUE_INT_OK;
        hashes[f] = 14695981039346656037u;
        for (size_t i = 0; i < outs && is_good; i++) hashes[f] = hash_of(hashes[f], outputs[i], elements[i]);
    }
    for (size_t i = 0; i < outs && i < MAX_OUTPUTS; i++) free(outputs[i]);
    tue_int_close(engine);
    return is_good;
}

static int compare(const tue_int_tensor *table, size_t tensors, const uint8_t *frames, size_t size, size_t count,
                   const char *const *sets, int set_count) {
    uint64_t *wanted = calloc(count, sizeof *wanted), *got = calloc(count, sizeof *got);
    int failed = !wanted || !got;
    for (int s = 0; s < set_count && !failed; s++) {
        failed = !run(table, tensors, sets[s], frames, size, &count, s ? got : wanted);
        fprintf(stderr, "%s\n", sets[s]);
        for (size_t f = 0; f < count && s && !failed; f++)
            if (got[f] != wanted[f]) {
                fprintf(stderr, "%s differs from %s on frame %zu\n", sets[s], sets[0], f);
                failed = 1;
            }
    }
    for (size_t f = 0; f < count && !failed; f++) printf("%016llx\n", (unsigned long long)wanted[f]);
    free(wanted);
    free(got);
    return failed;
}

int main(int words, char **word) {
    size_t size = 0, frame_bytes = 0;
    uint8_t *model = words > 2 ? read_all(word[1], &size) : NULL, *frames = words > 2 ? read_all(word[2], &frame_bytes) : NULL;
    table_entry *entries = calloc(MAX_TABLE, sizeof *entries);
    tue_int_tensor *table = calloc(MAX_TABLE, sizeof *table);
    if (!model || !frames || !entries || !table) {
        fprintf(stderr, "usage: %s MODEL FRAMES [COUNT [ISA]...]\n", word[0]);
        return 2;
    }
    size_t tensors = read_table(model, size, entries, table), count = words > 3 ? strtoul(word[3], NULL, 10) : 1000;
    char list[128];
    const char *sets[8];
    int set_count = 0;
    snprintf(list, sizeof list, "%s", tue_int_isas());
    for (char *at = strtok(list, ","); at && words <= 4; at = strtok(NULL, ",")) sets[set_count++] = at;
    for (int i = 4; i < words && set_count < 8; i++) sets[set_count++] = word[i];
    int failed = compare(table, tensors, frames, frame_bytes, count, sets, set_count);
    free(model);
    free(frames);
    free(entries);
    free(table);
    return failed;
}
