/* Loops that a compiler turns into vectors by itself, written once for every instruction set. A file defines TUE_PLAIN(name),
 * the beginning of a function's definition, and includes this one; their scratch is that of the portable set. */

TUE_INLINE const void *row_of(const tue_int_buffer *b, int32_t row) {
    static const int32_t sizes[] = {1, 1, 2, 4, 8, 4};
    return (const uint8_t *)b->data + (size_t)row * (size_t)b->columns * (size_t)sizes[b->dtype];
}

TUE_PLAIN(resize)(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    int32_t below = op->f[0] - 1, right = op->f[1] - 1, width = op->f[3], bits = op->f[4], flags = op->f[5];
    int32_t channels = source->columns, one = 1 << bits, *line = scratch;
    for (int32_t y = begin; y < end; y++) {
        int32_t up = op->first[0][y], share = op->share[0][y];
        const int16_t *a = row_of(source, up * op->f[1]), *b = row_of(source, (up < below ? up + 1 : up) * op->f[1]);
        for (int32_t i = 0; i < op->f[1] * channels; i++) line[i] = (one - share) * a[i] + share * b[i];
        for (int32_t x = 0; x < width; x++) {
            int32_t left = op->first[1][x], part = op->share[1][x];
            const int32_t *p = line + left * channels, *q = line + (left < right ? left + 1 : left) * channels;
            size_t at = (size_t)(y * width + x) * (size_t)channels;
            if (flags == TUE_FLAG_EXACT) {
                int32_t *out = (int32_t *)target->data + at;
                for (int32_t c = 0; c < channels; c++) out[c] = (one - part) * p[c] + part * q[c];
                continue;
            }
            int16_t *out = (int16_t *)target->data + at;
            int32_t floor = flags & TUE_FLAG_RELU ? 0 : INT32_MIN, keep = flags & TUE_FLAG_ADDED ? 1 : 0;
            for (int32_t c = 0; c < channels; c++) {
                int32_t v = tue_shift_round((one - part) * p[c] + part * q[c], 2 * bits);
                v = v > floor ? v : floor;
                out[c] = (int16_t)tue_clamp16(v + keep * out[c]);
            }
        }
    }
}

TUE_PLAIN(halve)(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source];
    int32_t width = op->f[1], channels = source->columns;
    int16_t *out = (int16_t *)s->buffers[op->target].data + (size_t)begin * (size_t)(width / 2 * channels);
    for (int32_t y = begin; y < end; y++)
        for (int32_t x = 0; x < width / 2; x++, out += channels) {
            const int16_t *a = row_of(source, 2 * y * width + 2 * x), *b = row_of(source, (2 * y + 1) * width + 2 * x);
            for (int32_t c = 0; c < channels; c++) {
                int32_t v = tue_shift_round(a[c] + a[c + channels] + b[c] + b[c + channels], 2);
                out[c] = (int16_t)(op->f[2] && v < 0 ? 0 : v);
            }
        }
}

TUE_PLAIN(codes)(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source];
    const int16_t *in = source->data;
    uint8_t *out = s->buffers[op->target].data;
    size_t first = (size_t)begin * (size_t)source->columns, last = (size_t)end * (size_t)source->columns;
    int32_t factor = op->f[0], bits = op->f[1], zero = op->f[2]; /* not read again: bytes that are written may be any */
    for (size_t i = first; i < last; i++) out[i] = tue_code(tue_multiply(in[i], factor), bits, zero);
}

TUE_PLAIN(sum)(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch, (void)begin, (void)end;
    const tue_int_buffer *source = &s->buffers[op->source];
    int32_t *out = s->buffers[op->target].data;
    memset(out, 0, (size_t)source->columns * sizeof *out);
    for (int32_t row = op->f[0]; row < op->f[0] + op->f[1]; row++) {
        const int16_t *in = row_of(source, row);
        for (int32_t c = 0; c < source->columns; c++) out[c] += in[c];
    }
}

TUE_PLAIN(affine)(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source];
    int32_t width = source->columns;
    for (int32_t row = begin; row < end; row++) {
        const int16_t *in = row_of(source, row);
        int32_t *out = (int32_t *)s->buffers[op->target].data + (size_t)row * (size_t)width;
        for (int32_t c = 0; c < width; c++) out[c] = in[c] * op->factor32[c] + op->bias[c];
    }
}
