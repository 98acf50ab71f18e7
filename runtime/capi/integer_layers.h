/* Linears and convolutions on vectors, written once for every instruction set; a file of a set defines the v_* operations
 * and the following, and includes this one.
 *
 *     PANEL                outputs that are computed at once: two vectors of sums
 *     ROWS, NARROW_ROWS    rows of a tile, on words and on bytes
 *     STRIP                rows of a map that a convolution copies at once
 *     CODE_OFFSET          what v_broadcast_codes takes from every code; it goes into the bias, which keeps sums exact
 *     is_exact(w, count)   whether v_dot_bytes is exact for these weights, which lie side by side
 *     attention_bytes      scratch of the set's attention
 *
 * Tiles stay in registers; weights lie in panels in the order they are read. Layers that cannot multiply bytes, among
 * them all with 16-bit inputs, multiply words: weights are widened a panel at a time.
 */

/* In front of a panel's weights. */
typedef struct panel_head {
    int32_t bias[PANEL], shift[PANEL];
    int16_t factor[PANEL];
    int16_t unused[PANEL];
} panel_head;

/* In front of all panels. */
typedef struct packed_head {
    int32_t narrow;   /* 1: bytes, in groups of four along the inputs; 0: words, in groups of two */
    int32_t segments; /* 9 of a convolution, else 1 */
    int32_t groups;   /* of inputs in a segment */
    int32_t panels;
    size_t panel_bytes;
    uint8_t unused[40];
} packed_head;

/* Whether all weights of a layer are such that products of bytes are exact. */
static int32_t is_narrow(const tue_int_op *op, int32_t segments) {
    int32_t inputs = op->inputs / segments;
    for (int32_t i = 0; i < op->outputs * segments; i++)
        if (!is_exact(op->weight + (size_t)i * (size_t)inputs, inputs)) return 0;
    return 1;
}

static packed_head head_of(const tue_int_op *op) {
    packed_head h = {0};
    h.segments = op->kind == TUE_CONVOLUTION ? 9 : 1;
    h.narrow = op->source_type == TUE_INT_U8 && is_narrow(op, h.segments);
    int32_t group = h.narrow ? 4 : 2;
    h.groups = (op->inputs / h.segments + group - 1) / group;
    h.panels = (op->outputs + PANEL - 1) / PANEL;
    h.panel_bytes = sizeof(panel_head) + (size_t)h.segments * (size_t)h.groups * (size_t)group * PANEL;
    return h;
}

static size_t packed_bytes(const tue_int_op *op) {
    if (op->kind != TUE_LINEAR && op->kind != TUE_CONVOLUTION) return 0;
    packed_head h = head_of(op);
    return sizeof h + (size_t)h.panels * h.panel_bytes;
}

/* The bias of an output, with what codes lose by CODE_OFFSET; sums wrap and come out right. */
static int32_t whole_bias(const tue_int_op *op, int32_t o, int32_t is_bytes) {
    uint32_t sum = (uint32_t)op->bias[o];
    for (int32_t k = 0; is_bytes && CODE_OFFSET != 0 && k < op->inputs; k++)
        sum += (uint32_t)(CODE_OFFSET * op->weight[(size_t)o * (size_t)op->inputs + (size_t)k]);
    return (int32_t)sum;
}

static void pack(const tue_int_op *op, void *packed) {
    packed_head h = head_of(op);
    memcpy(packed, &h, sizeof h);
    int32_t group = h.narrow ? 4 : 2, inputs = op->inputs / h.segments;
    for (int32_t p = 0; p < h.panels; p++) {
        uint8_t *at = (uint8_t *)packed + sizeof h + (size_t)p * h.panel_bytes;
        panel_head head = {{0}, {0}, {0}, {0}};
        int8_t *w = (int8_t *)at + sizeof head;
        for (int32_t j = 0; j < PANEL; j++) {
            int32_t o = p * PANEL + j;
            if (o >= op->outputs) continue;
            head.bias[j] = whole_bias(op, o, h.narrow), head.shift[j] = op->shift[o], head.factor[j] = op->factor[o];
        }
        memcpy(at, &head, sizeof head);
        for (int32_t s = 0; s < h.segments; s++)
            for (int32_t g = 0; g < h.groups; g++)
                for (int32_t j = 0; j < PANEL; j++, w += group) {
                    int32_t o = p * PANEL + j, left = o < op->outputs ? inputs - g * group : 0;
                    if (left <= 0) { /* w is 0 already */
                        continue;
                    }
                    size_t from = ((size_t)o * (size_t)h.segments + (size_t)s) * (size_t)inputs + (size_t)(g * group);
                    if (left >= 4 && group == 4)
                        memcpy(w, op->weight + from, 4);
                    else
                        memcpy(w, op->weight + from, (size_t)(left < group ? left : group));
                }
    }
}

/* Where results go. */
typedef struct tile_target {
    int32_t mode, bits, zero, outputs; /* outputs: of the whole layer */
    void *data;    /* first row */
    size_t stride; /* elements of a row */
} tile_target;

/* Codes through a table, when a layer's are all there. A set may define LOOK_UP. */
#ifndef LOOK_UP
#define LOOK_UP look_up
#endif
static void look_up(uint8_t *codes, size_t count, const uint8_t *table) {
    for (size_t i = 0; i < count; i++) codes[i] = table[codes[i]];
}

/* Stores one row of a panel's results, of which the layer has `count`. */
TUE_INLINE void store_row(v_words v, const tile_target *t, void *row, int32_t count) {
    if (t->mode == TUE_MODE_CODES) {
        uint8_t *out = row, bytes[PANEL];
        if (count == PANEL) {
            v_store_codes(out, v, t->bits, t->zero);
            return;
        }
        v_store_codes(bytes, v, t->bits, t->zero);
        memcpy(out, bytes, (size_t)count);
        return;
    }
    int16_t *out = row, words[PANEL];
    v = v_to_words(v, t->bits);
    if (count == PANEL) {
        v_store_words(out, t->mode == TUE_MODE_ADD ? v_add_words(v, v_load_words(out)) : v);
        return;
    }
    v_store_words(words, v);
    for (int32_t i = 0; i < count; i++)
        out[i] = (int16_t)(t->mode == TUE_MODE_ADD ? tue_clamp16(out[i] + words[i]) : words[i]);
}

/* A tile: `a` are the rows, whose segments lie `jumps` bytes on; `w` are the panel's weights, as words or as bytes. Four
 * bytes of a row meet the weights of two panel halves at a time. `out` are the rows' results, `count` their number in a row. */
#define TUE_TILE(name, type, most, load, dot)                                                                         \
    TUE_APART void name(const uint8_t *const *a, const ptrdiff_t *jumps, const packed_head *h, const panel_head *head,\
                        const type *w, const tile_target *t, void *const *out, int32_t count) {                       \
        v_sums sums[most][2];                                                                                         \
        for (int32_t m = 0; m < most; m++) {                                                                          \
            sums[m][0] = v_load_sums(head->bias);                                                                     \
            sums[m][1] = v_load_sums(head->bias + PANEL / 2);                                                         \
        }                                                                                                             \
        for (int32_t s = 0; s < h->segments; s++) {                                                                   \
            ptrdiff_t at = jumps[s];                                                                                  \
            for (int32_t g = 0; g < h->groups; g++, at += 4, w += 4 * PANEL / (int32_t)sizeof(type)) {                \
                v_sums w0 = v_load_sums(w), w1 = v_load_sums(w + 2 * PANEL / (int32_t)sizeof(type));                  \
                _Pragma("GCC unroll 8") for (int32_t m = 0; m < most; m++) {                                          \
                    v_four four = load(a[m] + at);                                                                    \
                    sums[m][0] = dot(sums[m][0], four, w0);                                                           \
                    sums[m][1] = dot(sums[m][1], four, w1);                                                           \
                }                                                                                                     \
            }                                                                                                         \
        }                                                                                                             \
        _Pragma("GCC unroll 8") for (int32_t m = 0; m < most; m++)                                                    \
            store_row(v_requantise(sums[m][0], sums[m][1], head->shift, head->factor), t, out[m], count);             \
    }
TUE_TILE(tile_words, int16_t, ROWS, v_broadcast, v_dot_words)
TUE_TILE(tile_bytes, int8_t, NARROW_ROWS, v_broadcast_codes, v_dot_bytes)
#undef TUE_TILE

static void widen_weights(const int8_t *w, int16_t *out, size_t count) {
    for (size_t i = 0; i < count; i += 16) v_widen_weights(w + i, out + i);
}

static void widen_codes(const uint8_t *in, int16_t *out, size_t count) {
    size_t i = 0;
    for (; i + 16 <= count; i += 16) v_widen_codes(in + i, out + i);
    for (; i < count; i++) out[i] = in[i];
}

/* All panels over `count` rows that lie where `place` says. */
typedef struct row_places {
    const uint8_t *base;
    ptrdiff_t row_bytes;         /* from one row to the next */
    int32_t line;                /* rows that lie next to each other; 0: all of them */
    ptrdiff_t line_bytes;        /* from one line to the next */
    const ptrdiff_t *jumps;
} row_places;

static const uint8_t *place(const row_places *p, int32_t row) {
    if (!p->line) return p->base + row * p->row_bytes;
    return p->base + (row / p->line) * p->line_bytes + (row % p->line) * p->row_bytes;
}

static void multiply_panels(const tue_int_op *op, const row_places *from, int32_t count, const tile_target *t,
                            int16_t *wide) {
    packed_head h;
    memcpy(&h, op->packed, sizeof h);
    size_t weights = h.panel_bytes - sizeof(panel_head), size = t->mode == TUE_MODE_CODES ? 1 : 2;
    int16_t spare[PANEL] = {0}; /* for the results of rows that the last tile has too many */
    for (int32_t p = 0; p < h.panels; p++) {
        const uint8_t *panel = (const uint8_t *)op->packed + sizeof h + (size_t)p * h.panel_bytes;
        const panel_head *head = (const panel_head *)panel;
        const int8_t *w = (const int8_t *)panel + sizeof *head;
        int32_t most = h.narrow ? NARROW_ROWS : ROWS, first = p * PANEL;
        int32_t columns = t->outputs - first < PANEL ? t->outputs - first : PANEL;
        if (!h.narrow) widen_weights(w, wide, weights);
        for (int32_t row = 0; row < count; row += most) {
            const uint8_t *a[ROWS > NARROW_ROWS ? ROWS : NARROW_ROWS];
            void *out[ROWS > NARROW_ROWS ? ROWS : NARROW_ROWS];
            for (int32_t m = 0; m < most; m++) {
                int32_t is_there = row + m < count;
                a[m] = place(from, is_there ? row + m : row);
                out[m] = is_there ? (void *)((uint8_t *)t->data + ((size_t)(row + m) * t->stride + (size_t)first) * size) : (void *)spare;
            }
            if (h.narrow)
                tile_bytes(a, from->jumps, &h, head, w, t, out, columns);
            else
                tile_words(a, from->jumps, &h, head, wide, t, out, columns);
        }
    }
}

static size_t panel_words(const tue_int_op *op) { /* of 16-bit weights of one panel, in bytes */
    size_t inputs = op->kind == TUE_CONVOLUTION ? 9 * (((size_t)op->inputs / 9 + 3) & ~(size_t)3)
                                                : ((size_t)op->inputs + 3) & ~(size_t)3;
    return tue_round_up(inputs * PANEL * sizeof(int16_t), 64);
}

static void linear(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    static const ptrdiff_t none[1] = {0};
    packed_head h;
    memcpy(&h, op->packed, sizeof h);
    int16_t *wide = scratch, *rows = (int16_t *)((uint8_t *)scratch + panel_words(op));
    size_t inputs = (size_t)op->inputs, at = (size_t)(op->f[0] + begin) * inputs;
    row_places from = {(const uint8_t *)source->data + at, (ptrdiff_t)inputs, 0, 0, none};
    if (source->dtype == TUE_INT_I16) {
        from.base = (const uint8_t *)((const int16_t *)source->data + at);
        from.row_bytes = (ptrdiff_t)(2 * inputs);
    } else if (!h.narrow) {
        size_t padded = (inputs + 1) & ~(size_t)1;
        for (int32_t r = begin; r < end; r++)
            widen_codes((const uint8_t *)source->data + (size_t)(op->f[0] + r) * inputs,
                        rows + (size_t)(r - begin) * padded, inputs);
        from.base = (const uint8_t *)rows;
        from.row_bytes = (ptrdiff_t)(2 * padded);
    }
    size_t width = (size_t)target->columns, out = (size_t)(op->f[1] + begin) * width;
    tile_target t = {op->f[3], op->f[4], op->f[5], op->outputs, NULL, width};
    t.data = t.mode == TUE_MODE_CODES ? (void *)((uint8_t *)target->data + out)
                                      : (void *)((int16_t *)target->data + out);
    multiply_panels(op, &from, end - begin, &t, wide);
    if (op->table) LOOK_UP(t.data, (size_t)(end - begin) * width, op->table);
}

/* A strip of a map with a border of zeros: (rows + 2) x (width + 2) positions, as bytes or as words. */
static void copy_strip(const tue_int_buffer *source, int32_t height, int32_t width, int32_t top, int32_t rows,
                       int32_t is_wide, uint8_t *out) {
    size_t channels = (size_t)source->columns, size = is_wide ? 2 : 1, line = ((size_t)width + 2) * channels * size;
    for (int32_t y = top - 1; y < top + rows + 1; y++, out += line) {
        if (y < 0 || y >= height) {
            memset(out, 0, line);
            continue;
        }
        const uint8_t *in = (const uint8_t *)source->data + (size_t)y * (size_t)width * channels;
        memset(out, 0, channels * size);
        memset(out + line - channels * size, 0, channels * size);
        if (is_wide)
            widen_codes(in, (int16_t *)(void *)(out + channels * size), (size_t)width * channels);
        else
            memcpy(out + channels, in, (size_t)width * channels);
    }
}

static void convolution(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    packed_head h;
    memcpy(&h, op->packed, sizeof h);
    int32_t height = op->f[0], width = op->f[1], size = h.narrow ? 1 : 2;
    ptrdiff_t step = (ptrdiff_t)source->columns * size, line = step * (width + 2), jumps[9];
    for (int32_t tap = 0; tap < 9; tap++) jumps[tap] = tap / 3 * line + tap % 3 * step;
    int16_t *wide = scratch;
    uint8_t *strip = (uint8_t *)scratch + panel_words(op);
    for (int32_t top = begin; top < end; top += STRIP) {
        int32_t rows = end - top < STRIP ? end - top : STRIP;
        copy_strip(source, height, width, top, rows, !h.narrow, strip);
        row_places from = {strip, step, width, line, jumps};
        tile_target t = {TUE_MODE_CODES, op->f[2], op->f[3], op->outputs, NULL, (size_t)target->columns};
        t.data = (uint8_t *)target->data + (size_t)top * (size_t)width * t.stride;
        multiply_panels(op, &from, rows * width, &t, wide);
    }
}

static size_t scratch_bytes(const tue_int_op *op, const tue_int_buffer *buffers) {
    const tue_int_buffer *source = &buffers[op->source];
    switch (op->kind) {
        case TUE_LINEAR:
            return panel_words(op) + tue_round_up((size_t)op->f[2] * (((size_t)op->inputs + 1) & ~(size_t)1) * 2, 64) + 64;
        case TUE_CONVOLUTION:
            return panel_words(op) + (STRIP + 2) * ((size_t)op->f[1] + 2) * (size_t)source->columns * 2 + 128;
        case TUE_ATTENTION: return attention_bytes(op, buffers);
        case TUE_RESIZE: return tue_int_portable()->scratch_bytes(op, buffers);
        default: return 0;
    }
}
