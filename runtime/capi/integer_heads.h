/* The places of attention and the gathering of one head, written once for every instruction set. A file defines KEYS, the
 * keys of a block, PAIR, the values of 16 bits that its product takes together, and QUERIES, as many as its registers hold
 * sums for, and includes this one. */

/* Keys lie in blocks of KEYS with PAIR channels together, values key by key with PAIR keys together. */
typedef struct head_places {
    int16_t *keys, *values, *queries, *weights;
    int32_t *scores;
    int32_t tokens, padded, depth, wide_depth; /* padded: tokens; depth: a multiple of PAIR; wide_depth: one of KEYS */
} head_places;

static size_t place_head(head_places *p, int32_t tokens, int32_t size, uint8_t *scratch) {
    p->tokens = tokens;
    p->padded = (tokens + KEYS - 1) / KEYS * KEYS;
    p->depth = (size + PAIR - 1) / PAIR * PAIR;
    p->wide_depth = (size + KEYS - 1) / KEYS * KEYS;
    size_t padded = (size_t)p->padded, at = 0, sizes[5];
    sizes[0] = padded * (size_t)p->depth * 2;
    sizes[1] = padded * (size_t)p->wide_depth * 2;
    sizes[2] = ((size_t)tokens + QUERIES) * (size_t)p->depth * 2;
    sizes[3] = QUERIES * padded * 2;
    sizes[4] = QUERIES * padded * 4;
    uint8_t *places[5];
    for (int32_t i = 0; i < 5; i++) {
        places[i] = scratch ? scratch + at : NULL;
        at += tue_round_up(sizes[i], 64) + 64;
    }
    p->keys = (int16_t *)(void *)places[0], p->values = (int16_t *)(void *)places[1];
    p->queries = (int16_t *)(void *)places[2], p->weights = (int16_t *)(void *)places[3];
    p->scores = (int32_t *)(void *)places[4];
    return at;
}

static void gather_head(const head_places *p, const uint8_t *packed, int32_t width, int32_t size, int32_t head) {
    size_t stride = (size_t)width * 3;
    memset(p->keys, 0, (size_t)p->padded * (size_t)p->depth * 2);
    memset(p->values, 0, (size_t)p->padded * (size_t)p->wide_depth * 2);
    for (int32_t j = 0; j < p->tokens; j++) {
        const uint8_t *q = packed + (size_t)j * stride + (size_t)(head * size), *k = q + width, *v = k + width;
        int16_t *queries = p->queries + (size_t)j * (size_t)p->depth;
        int16_t *keys = p->keys + (size_t)(j / KEYS * KEYS) * (size_t)p->depth + (size_t)(j % KEYS) * PAIR;
        int16_t *values = p->values + (size_t)(j / PAIR * PAIR) * (size_t)p->wide_depth + (size_t)(j % PAIR);
        if (p->depth > size) queries[size] = 0;
        for (int32_t d = 0; d < size; d++) {
            queries[d] = (int16_t)(q[d] - 128);
            keys[d / PAIR * PAIR * KEYS + d % PAIR] = (int16_t)(k[d] - 128);
            values[d * PAIR] = (int16_t)(v[d] - 128);
        }
    }
}
