/* The integer engine in plain C: every operation as docs/reference/integer.md defines it, without intrinsics. */
#include <string.h>

#include "integer_internal.h"

#define TUE_PLAIN(name) static void name
#include "integer_plain.h"

static void patches(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source];
    int32_t size = op->f[0], across = source->columns / size;
    uint8_t *out = (uint8_t *)s->buffers[op->target].data + (size_t)begin * (size_t)(size * size);
    for (int32_t n = begin; n < end; n++)
        for (int32_t y = 0; y < size; y++, out += size) {
            size_t at = (size_t)(n / across * size + y) * (size_t)source->columns + (size_t)(n % across * size);
            memcpy(out, (const uint8_t *)source->data + at, (size_t)size);
        }
}

static void tokens(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source];
    double scale = (double)((int64_t)1 << op->f[0]);
    int16_t *out = s->buffers[op->target].data;
    const float *in = source->data;
    for (size_t i = (size_t)begin * (size_t)source->columns; i < (size_t)end * (size_t)source->columns; i++) {
        double v = (double)in[i] * scale + 0.5;
        if (!(v > -32768.0)) /* NaN becomes 0 */
            out[i] = v <= -32768.0 ? -32768 : 0;
        else if (v >= 32767.0)
            out[i] = 32767;
        else {
            int32_t whole = (int32_t)v;
            out[i] = (int16_t)(whole - ((double)whole > v));
        }
    }
}

static void fill(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *target = &s->buffers[op->target];
    size_t width = (size_t)target->columns;
    memcpy((int16_t *)target->data + (size_t)begin * width, op->words + (size_t)begin * width,
           (size_t)(end - begin) * width * sizeof(int16_t));
}

static int32_t scaled(const tue_int_op *op, int32_t sum, int32_t o) {
    return tue_multiply(tue_clamp16(sum >> op->shift[o]), op->factor[o]);
}

static int32_t dot_u8(const uint8_t *a, const int8_t *w, int32_t count) {
    int32_t sum = 0;
    for (int32_t k = 0; k < count; k++) sum += a[k] * w[k];
    return sum;
}

static int32_t dot_i16(const int16_t *a, const int8_t *w, int32_t count) {
    int32_t sum = 0;
    for (int32_t k = 0; k < count; k++) sum += a[k] * w[k];
    return sum;
}

static void linear(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    int32_t mode = op->f[3], bits = op->f[4], zero = op->f[5];
    for (int32_t row = begin; row < end; row++) {
        const void *a = row_of(source, op->f[0] + row);
        size_t at = (size_t)(op->f[1] + row) * (size_t)target->columns;
        for (int32_t o = 0; o < op->outputs; o++) {
            const int8_t *w = op->weight + (size_t)o * (size_t)op->inputs;
            int32_t sum = source->dtype == TUE_INT_U8 ? dot_u8(a, w, op->inputs) : dot_i16(a, w, op->inputs);
            int32_t v = scaled(op, sum + op->bias[o], o);
            if (mode == TUE_MODE_CODES) {
                uint8_t code = tue_code(v, bits, zero);
                ((uint8_t *)target->data)[at + (size_t)o] = op->table ? op->table[code] : code;
            } else {
                int16_t *out = (int16_t *)target->data + at + o;
                int32_t word = tue_word(v, bits);
                *out = (int16_t)(mode == TUE_MODE_ADD ? tue_clamp16(*out + word) : word);
            }
        }
    }
}

static void norm(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    int32_t width = source->columns, is_codes = op->f[2] == TUE_MODE_CODES;
    for (int32_t row = begin; row < end; row++) {
        const int16_t *x = row_of(source, op->f[0] + row);
        int64_t sum = 0, squares = 0;
        for (int32_t c = 0; c < width; c++) {
            sum += x[c];
            squares += (int64_t)x[c] * x[c];
        }
        tue_norm_row how = tue_norm_scale(sum, squares, width, op->constants);
        size_t at = (size_t)row * (size_t)width;
        for (int32_t c = 0; c < width; c++) {
            int32_t centred = width * x[c] - (int32_t)sum;
            int32_t t = tue_clamp16(how.up ? centred * (1 << how.up) : tue_shift_round(centred, how.down));
            int32_t y = tue_multiply(t, how.inverse);
            if (is_codes)
                ((uint8_t *)target->data)[at + (size_t)c] =
                    tue_code(tue_multiply(y, op->factor[c]), op->f[3], op->f[4]);
            else
                ((int16_t *)target->data)[at + (size_t)c] = (int16_t)y;
        }
    }
}

/* One row of one head. `weights` has room for a number a token. */
static void attend_row(const tue_int_op *op, const uint8_t *packed, int32_t tokens, int32_t width, int32_t size,
                       int32_t head, const uint8_t *query, uint8_t *out, int32_t *weights) {
    const uint8_t *keys = packed + width + head * size, *values = keys + width;
    size_t stride = (size_t)width * 3;
    int32_t best = INT32_MIN, sum = 0, shift;
    for (int32_t j = 0; j < tokens; j++) {
        const uint8_t *key = keys + (size_t)j * stride;
        int32_t score = 0;
        for (int32_t d = 0; d < size; d++) score += (query[d] - 128) * (key[d] - 128);
        weights[j] = score;
        best = score > best ? score : best;
    }
    for (int32_t j = 0; j < tokens; j++) {
        int32_t far = tue_shift_round((best - weights[j]) << op->left[head], op->right[head]);
        int32_t exponent = tue_multiply(far > 32767 ? 32767 : far, op->factor[head]);
        weights[j] = tue_exp2(exponent > TUE_LAST_EXPONENT ? TUE_LAST_EXPONENT : exponent, op->f[4]);
        sum += weights[j];
    }
    int32_t inverse = tue_softmax_inverse(sum, &shift);
    for (int32_t d = 0; d < size; d++) {
        int32_t mixed = 0;
        for (int32_t j = 0; j < tokens; j++) mixed += weights[j] * (values[(size_t)j * stride + (size_t)d] - 128);
        int32_t mean = tue_multiply(tue_clamp16(tue_shift_round(mixed, shift)), inverse);
        out[d] = tue_code(tue_multiply(mean, op->out[head]), op->f[2], op->f[3]);
    }
}

static void attention(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    int32_t width = target->columns, size = width / op->f[0];
    for (int32_t head = begin; head < end; head++)
        for (int32_t row = 0; row < target->rows; row++) {
            const uint8_t *query = (const uint8_t *)row_of(source, op->f[1] + row) + head * size;
            uint8_t *out = (uint8_t *)target->data + (size_t)row * (size_t)width + head * size;
            attend_row(op, source->data, source->rows, width, size, head, query, out, scratch);
        }
}

/* Neighbours of 3 x 3 positions beyond the border are codes of zero, which is 0. */
static void convolution(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    int32_t height = op->f[0], width = op->f[1], channels = source->columns;
    for (int32_t y = begin; y < end; y++)
        for (int32_t x = 0; x < width; x++)
            for (int32_t o = 0; o < op->outputs; o++) {
                int32_t sum = op->bias[o];
                for (int32_t tap = 0; tap < 9; tap++) {
                    int32_t row = y + tap / 3 - 1, column = x + tap % 3 - 1;
                    if (row < 0 || row >= height || column < 0 || column >= width) continue;
                    const uint8_t *a = row_of(source, row * width + column);
                    sum += dot_u8(a, op->weight + ((size_t)o * 9 + (size_t)tap) * (size_t)channels, channels);
                }
                size_t at = (size_t)(y * width + x) * (size_t)target->columns + (size_t)o;
                ((uint8_t *)target->data)[at] = tue_code(scaled(op, sum, o), op->f[2], op->f[3]);
            }
}

enum { DEPTHWISE_CHANNELS = 32 }; /* of a block: a compiler keeps their sums in registers */

/* One pixel's sums of a block of channels; taps outside the image count nothing. */
static void depthwise_sums(const tue_int_buffer *source, const int16_t *weight, const int32_t at[2], const int32_t size[2],
                           int32_t first, int32_t count, int32_t *sums) {
    for (int32_t tap = 0; tap < 9; tap++) {
        int32_t row = at[0] + tap / 3 - 1, column = at[1] + tap % 3 - 1;
        if (row < 0 || row >= size[0] || column < 0 || column >= size[1]) continue;
        const uint8_t *in = (const uint8_t *)row_of(source, row * size[1] + column) + first;
        const int16_t *w = weight + tap * DEPTHWISE_CHANNELS;
        for (int32_t k = 0; k < count; k++) sums[k] += in[k] * w[k];
    }
}

static void depthwise(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    const int32_t size[2] = {op->f[0], op->f[1]}, channels = source->columns;
    for (int32_t first = 0; first < channels; first += DEPTHWISE_CHANNELS) {
        int32_t count = channels - first < DEPTHWISE_CHANNELS ? channels - first : DEPTHWISE_CHANNELS;
        int16_t weight[9 * DEPTHWISE_CHANNELS];
        for (int32_t k = 0; k < count; k++)
            for (int32_t tap = 0; tap < 9; tap++) weight[tap * DEPTHWISE_CHANNELS + k] = op->weight[(first + k) * 9 + tap];
        for (int32_t y = begin; y < end; y++)
            for (int32_t x = 0; x < size[1]; x++) {
                int32_t sums[DEPTHWISE_CHANNELS];
                const int32_t at[2] = {y, x};
                memcpy(sums, op->bias + first, sizeof sums[0] * (size_t)count);
                depthwise_sums(source, weight, at, size, first, count, sums);
                uint8_t *out = (uint8_t *)target->data + (size_t)(y * size[1] + x) * (size_t)channels + (size_t)first;
                for (int32_t k = 0; k < count; k++) out[k] = tue_code(scaled(op, sums[k], first + k), op->f[2], op->f[3]);
            }
    }
}

static void mean(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch, (void)begin, (void)end;
    const tue_int_buffer *source = &s->buffers[op->source];
    int16_t *out = s->buffers[op->target].data;
    for (int32_t c = 0; c < source->columns; c++) {
        int32_t sum = op->f[2];
        for (int32_t row = op->f[0]; row < op->f[0] + op->f[1]; row++) {
            const void *in = row_of(source, row);
            sum += source->dtype == TUE_INT_U8 ? ((const uint8_t *)in)[c] : ((const int16_t *)in)[c];
        }
        out[c] = (int16_t)tue_word(tue_multiply(tue_clamp16(sum >> op->f[3]), op->f[4]), op->f[5]);
    }
}

static void peak(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch, (void)begin, (void)end;
    const tue_int_buffer *source = &s->buffers[op->source];
    const uint8_t *in = source->data;
    int32_t most = 0;
    for (size_t i = 0; i < (size_t)source->rows * (size_t)source->columns; i++) {
        int32_t v = in[i] - op->f[0];
        v = v < 0 ? -v : v;
        most = v > most ? v : most;
    }
    *(int32_t *)s->buffers[op->target].data = most;
}

/* Leaves the integers: float of the integer, times the scale. Both roundings are to nearest even. */
static void output(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source];
    float scale, *out = s->outputs[op->f[0] - 1];
    memcpy(&scale, &op->f[1], sizeof scale);
    int32_t width = source->columns;
    for (int32_t row = begin; row < end; row++) {
        const void *in = row_of(source, row);
        for (int32_t c = 0; c < width; c++) {
            int32_t v = source->dtype == TUE_INT_I16 ? ((const int16_t *)in)[c] : ((const int32_t *)in)[c];
            size_t at = op->f[2] ? (size_t)c * (size_t)source->rows + (size_t)row : (size_t)row * (size_t)width + (size_t)c;
            out[at] = (float)v * scale;
        }
    }
}

static void blank_row(const tue_int_op *op, const tue_int_buffer *target, void *out) {
    for (int32_t c = 0; c < target->columns; c++) switch (target->dtype) {
            case TUE_INT_U8: ((uint8_t *)out)[c] = (uint8_t)op->blank[c]; break;
            case TUE_INT_I16: ((int16_t *)out)[c] = (int16_t)op->blank[c]; break;
            default: ((int32_t *)out)[c] = op->blank[c];
        }
}

/* Rows by their numbers: copies alone, so that no set has a form of its own. */
static void gather(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    (void)scratch;
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    size_t bytes = (size_t)target->columns * (target->dtype == TUE_INT_U8 ? 1 : target->dtype == TUE_INT_I16 ? 2 : 4);
    for (int32_t row = begin; row < end; row++) {
        uint8_t *out = (uint8_t *)target->data + (size_t)row * bytes;
        if (op->index[row] < 0)
            blank_row(op, target, out);
        else
            memcpy(out, (const uint8_t *)source->data + (size_t)op->index[row] * bytes, bytes);
    }
}

static int usable(void) { return 1; }

static size_t packed_bytes(const tue_int_op *op) {
    (void)op;
    return 0;
}

static void pack(const tue_int_op *op, void *packed) { (void)op, (void)packed; }

static size_t scratch_bytes(const tue_int_op *op, const tue_int_buffer *buffers) {
    const tue_int_buffer *source = &buffers[op->source];
    if (op->kind == TUE_ATTENTION) return (size_t)source->rows * sizeof(int32_t);
    if (op->kind == TUE_RESIZE) return (size_t)op->f[1] * (size_t)source->columns * sizeof(int32_t);
    return 0;
}

static const tue_int_set portable = {
    .name = "portable",
    .usable = usable,
    .kernels =
        {
            [TUE_PATCHES] = patches,
            [TUE_TOKENS] = tokens,
            [TUE_FILL] = fill,
            [TUE_LINEAR] = linear,
            [TUE_NORM] = norm,
            [TUE_ATTENTION] = attention,
            [TUE_CONVOLUTION] = convolution,
            [TUE_DEPTHWISE] = depthwise,
            [TUE_RESIZE] = resize,
            [TUE_HALVE] = halve,
            [TUE_CODES] = codes,
            [TUE_MEAN] = mean,
            [TUE_PEAK] = peak,
            [TUE_SUM] = sum,
            [TUE_AFFINE] = affine,
            [TUE_OUTPUT] = output,
            [TUE_GATHER] = gather,
        },
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
};

const tue_int_set *tue_int_portable(void) { return &portable; }
