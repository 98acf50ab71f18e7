#include "machine.h"

#include "platform.h"

#include <stdlib.h>
#include <string.h>

/* WATCHED_FEATURES of machine.py */
static const char *const watched[] = {
    "fma",           "avx2",           "avx512f",  "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni_int8", "avx_ne_convert", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",    "asimd",       "asimdhp",
    "asimddp",       "i8mm",           "bf16",     "sve",      "sve2",     "svei8mm",     "svebf16",     "sme"};
enum { WATCHED = sizeof watched / sizeof *watched, MAX_PLACES = 1024 };

static uint64_t bit_of(const char *name, size_t length) {
    for (int i = 0; i < WATCHED; i++)
        if (strlen(watched[i]) == length && memcmp(watched[i], name, length) == 0) return (uint64_t)1 << i;
    return 0;
}

static uint64_t bits_of(const char *words, const char *end) {
    uint64_t bits = 0;
    while (words < end) {
        while (words < end && (*words == ' ' || *words == '\t')) words++;
        const char *from = words;
        while (words < end && *words != ' ' && *words != '\t') words++;
        bits |= bit_of(from, (size_t)(words - from));
    }
    return bits;
}

/* The value of a "key : value" line, or NULL; *end is behind it. */
static const char *value_of(const char *line, const char *line_end, const char *key, const char **end) {
    const char *colon = memchr(line, ':', (size_t)(line_end - line));
    if (!colon) return NULL;
    const char *key_end = colon;
    while (key_end > line && (key_end[-1] == ' ' || key_end[-1] == '\t')) key_end--;
    if ((size_t)(key_end - line) != strlen(key) || memcmp(line, key, strlen(key)) != 0) return NULL;
    *end = line_end;
    return colon + 1;
}

typedef struct block {
    int is_cpu, has_core, has_flags;
    long package, core;
    uint64_t features;
} block;

static void read_line(const char *line, const char *end, block *b) {
    const char *stop, *value;
    if (value_of(line, end, "processor", &stop)) b->is_cpu = 1;
    if ((value = value_of(line, end, "physical id", &stop))) b->package = strtol(value, NULL, 10);
    if ((value = value_of(line, end, "core id", &stop))) b->core = strtol(value, NULL, 10), b->has_core = 1;
    if (!b->has_flags && ((value = value_of(line, end, "flags", &stop)) || (value = value_of(line, end, "Features", &stop))))
        b->features = bits_of(value, stop), b->has_flags = 1;
}

machine machine_from_text(const char *text, int32_t usable) {
    machine card = {0};
    struct {
        long package, core;
    } places[MAX_PLACES];
    int32_t cpus = 0, seen = 0;
    int known = 0;
    while (text && *text) {
        block b = {.package = -1};
        while (*text && *text != '\n') { /* a block of lines */
            const char *end = strchr(text, '\n');
            if (!end) end = text + strlen(text);
            read_line(text, end, &b);
            text = *end ? end + 1 : end;
        }
        while (*text == '\n') text++;
        if (!b.is_cpu) continue;
        cpus++;
        if (b.has_flags && !known) card.features = b.features, known = 1;
        int32_t i = 0;
        while (i < seen && (places[i].package != b.package || places[i].core != b.core)) i++;
        if (b.has_core && i == seen && seen < MAX_PLACES) places[seen].package = b.package, places[seen++].core = b.core;
    }
    int32_t cores = seen ? seen : cpus ? cpus : usable;
    card.cores = cores < usable ? cores : usable;
    return card;
}

machine machine_card(void) {
    char *text = cpu_description();
    machine card = machine_from_text(text, usable_cpus());
    free(text);
    return card;
}

int machine_same_class(const machine *card, const json_t *features) {
    uint64_t listed = 0;
    if (!json_is_array(features) || !card->features) return 0;
    for (size_t i = 0; i < json_array_size(features); i++) {
        const char *name = json_string_value(json_array_get(features, i));
        if (name) listed |= bit_of(name, strlen(name));
    }
    return listed == card->features;
}

int32_t machine_threads(const machine *card) {
    int32_t half = card->cores / 2;
    return half < 1 ? 1 : half > 4 ? 4 : half;
}
