/* What every operation of a model has to fulfil: ranges, shapes, and proofs that no accumulator leaves 32 bits.
 *
 * The proofs take the stored weights and the widest values of a buffer's type, so they hold for any input. The same
 * checks stand in runtime/tinyusfm_runtime/engines/integer/bounds.py; tests compare what the two refuse. */
#include <math.h>

#include "integer_model.h"

#define NEED(holds, what) \
    do {                  \
        if (!(holds)) return what; \
    } while (0)

static const char shape_text[] = "its buffers do not fit";
static const char range_text[] = "a number is out of range";
static const char overflow_text[] = "its sums could overflow";

static int32_t within_i16(const int16_t *v, int64_t count, int32_t low, int32_t high) {
    for (int64_t i = 0; i < count; i++)
        if (v[i] < low || v[i] > high) return 0;
    return 1;
}

static int32_t within_i8(const int8_t *v, int64_t count, int32_t low, int32_t high) {
    for (int64_t i = 0; i < count; i++)
        if (v[i] < low || v[i] > high) return 0;
    return 1;
}

static int32_t is_shape(const tue_int_buffer *b, int64_t rows, int64_t columns) {
    return b->rows == rows && b->columns == columns;
}

static int32_t has_rows(int32_t first, int32_t rows, int32_t all) {
    return first >= 0 && rows >= 1 && (int64_t)first + rows <= all;
}

/* Sums of the positive and of the negative weights of a row. */
static void sum_sides(const int8_t *w, int32_t count, int64_t *above, int64_t *below) {
    enum { BLOCK = 256 }; /* its sums fit 16 bits, so that a compiler may use short vectors */
    *above = *below = 0;
    for (int32_t k = 0; k < count; k += BLOCK) {
        int32_t size = count - k < BLOCK ? count - k : BLOCK;
        int16_t high = 0, low = 0;
        for (int32_t i = 0; i < size; i++) {
            int16_t v = w[k + i];
            high = (int16_t)(high + (v > 0 ? v : 0));
            low = (int16_t)(low + (v < 0 ? v : 0));
        }
        *above += high;
        *below += low;
    }
}

static const char *check_sums(const tue_int_op *op, int32_t dtype) {
    int64_t low = dtype == TUE_INT_U8 ? 0 : -32768, high = dtype == TUE_INT_U8 ? 255 : 32767;
    NEED(within_i8(op->shift, op->outputs, 0, 31) && within_i16(op->factor, op->outputs, 0, 32767), range_text);
    for (int32_t o = 0; o < op->outputs; o++) {
        const int8_t *w = op->weight + (size_t)o * (size_t)op->inputs;
        int64_t above, below, bias = op->bias[o];
        sum_sides(w, op->inputs, &above, &below);
        int64_t most = (bias > 0 ? bias : 0) + above * high + below * low;
        int64_t least = (bias < 0 ? bias : 0) + below * high + above * low;
        NEED(most <= INT32_MAX && least >= INT32_MIN, overflow_text);
    }
    return NULL;
}

static const char *check_linear(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    int32_t mode = op->f[3], is_codes = mode == TUE_MODE_CODES;
    NEED(mode >= 0 && mode <= TUE_MODE_ADD && op->f[6] >= 0 && op->f[6] <= is_codes, range_text);
    NEED(source->dtype == TUE_INT_U8 || source->dtype == TUE_INT_I16, shape_text);
    NEED(target->dtype == (is_codes ? TUE_INT_U8 : TUE_INT_I16), shape_text);
    NEED(op->f[4] >= 0 && op->f[4] <= (is_codes ? 7 : 14) && op->f[5] >= 0 && op->f[5] <= 255, range_text);
    NEED(has_rows(op->f[0], op->f[2], source->rows) && has_rows(op->f[1], op->f[2], target->rows), shape_text);
    NEED(op->source != op->target, shape_text);
    return check_sums(op, source->dtype);
}

static const char *check_norm(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    int32_t is_codes = op->f[2] == TUE_MODE_CODES;
    NEED(is_codes || op->f[2] == TUE_MODE_WORDS, range_text);
    NEED(source->dtype == TUE_INT_I16 && target->dtype == (is_codes ? TUE_INT_U8 : TUE_INT_I16), shape_text);
    NEED(op->f[3] >= 0 && op->f[3] <= 7 && op->f[4] >= 0 && op->f[4] <= 255, range_text);
    NEED(op->constants[0] >= 1 && op->constants[0] < (int64_t)1 << 60 && op->constants[1] >= 1 &&
             op->constants[1] < 1 << 29 && source->columns <= 1024,
         range_text);
    NEED(!is_codes || within_i16(op->factor, source->columns, 0, 32767), range_text);
    NEED(has_rows(op->f[0], op->f[1], source->rows) && is_shape(target, op->f[1], source->columns), shape_text);
    NEED(op->source != op->target, shape_text);
    return NULL;
}

static const char *check_attention(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    int32_t heads = op->f[0], row = op->f[1], drop = op->f[4], width = target->columns;
    NEED(heads >= 1 && heads <= 256 && width % heads == 0 && width / heads <= 128, range_text);
    NEED(source->dtype == TUE_INT_U8 && target->dtype == TUE_INT_U8, shape_text);
    NEED((int64_t)width * 3 == source->columns && row >= 0 && row < source->rows && target->rows == source->rows - row,
         shape_text);
    NEED(op->f[2] >= 0 && op->f[2] <= 7 && op->f[3] >= 0 && op->f[3] <= 255, range_text);
    NEED(within_i8(op->left, heads, 0, 15) && within_i8(op->right, heads, 0, 20), range_text);
    for (int32_t h = 0; h < heads; h++) {
        NEED(op->left[h] == 0 || op->right[h] == 0, range_text);
        NEED(((int64_t)32768 * (width / heads)) << op->left[h] < 1 << 30, overflow_text);
    }
    NEED(within_i16(op->factor, heads, 0, 32767) && within_i16(op->out, heads, 0, 32767), range_text);
    NEED(drop >= 0 && drop <= 6 && (int64_t)source->rows * (32767 >> drop) * 128 + (1 << 20) <= INT32_MAX,
         overflow_text);
    NEED(op->source != op->target, shape_text);
    return NULL;
}

static const char *check_window(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    int64_t area = (int64_t)op->f[0] * op->f[1];
    NEED(op->f[0] >= 1 && op->f[1] >= 1 && source->rows == area && target->rows == area, shape_text);
    NEED(source->dtype == TUE_INT_U8 && target->dtype == TUE_INT_U8 && op->source != op->target, shape_text);
    NEED(op->f[2] >= 0 && op->f[2] <= 7 && op->f[3] >= 0 && op->f[3] <= 255, range_text);
    NEED(op->kind == TUE_CONVOLUTION || source->columns == target->columns, shape_text);
    return check_sums(op, TUE_INT_U8);
}

static const char *check_resize(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    int32_t bits = op->f[4], flags = op->f[5];
    NEED(flags >= 0 && flags <= TUE_FLAG_EXACT && bits >= 0 && bits <= 7, range_text);
    NEED(source->dtype == TUE_INT_I16 && target->dtype == (flags == TUE_FLAG_EXACT ? TUE_INT_I32 : TUE_INT_I16),
         shape_text);
    for (int32_t i = 0; i < 4; i++) NEED(op->f[i] >= 1, shape_text);
    NEED((int64_t)op->f[0] * op->f[1] == source->rows && (int64_t)op->f[2] * op->f[3] == target->rows, shape_text);
    NEED(source->columns == target->columns && op->source != op->target, shape_text);
    for (int32_t axis = 0; axis < 2; axis++) {
        for (int32_t i = 0; i < op->f[2 + axis]; i++)
            NEED(op->first[axis][i] >= 0 && op->first[axis][i] < op->f[axis], range_text);
        NEED(within_i16(op->share[axis], op->f[2 + axis], 0, 1 << bits), range_text);
    }
    return NULL;
}

static const char *check_patches(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    int32_t size = op->f[0];
    NEED(size >= 1 && size <= 64 && source->rows % size == 0 && source->columns % size == 0, shape_text);
    NEED(source->dtype == TUE_INT_U8 && target->dtype == TUE_INT_U8 && op->source == 0 && op->target != 0, shape_text);
    NEED(is_shape(target, (int64_t)(source->rows / size) * (source->columns / size), size * size), shape_text);
    return NULL;
}

static const char *check_halve(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    NEED(source->dtype == TUE_INT_I16 && target->dtype == TUE_INT_I16 && op->source != op->target, shape_text);
    NEED(op->f[0] >= 2 && op->f[1] >= 2 && (int64_t)op->f[0] * op->f[1] == source->rows, shape_text);
    NEED(is_shape(target, (int64_t)(op->f[0] / 2) * (op->f[1] / 2), source->columns), shape_text);
    NEED(op->f[2] == 0 || op->f[2] == 1, range_text);
    return NULL;
}

static const char *check_mean(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    NEED(source->dtype == TUE_INT_U8 || source->dtype == TUE_INT_I16, shape_text);
    NEED(target->dtype == TUE_INT_I16 && is_shape(target, 1, source->columns), shape_text);
    NEED(has_rows(op->f[0], op->f[1], source->rows) && op->source != op->target, shape_text);
    NEED(op->f[3] >= 0 && op->f[3] <= 31 && op->f[4] >= 0 && op->f[4] <= 32767, range_text);
    NEED(op->f[5] >= 0 && op->f[5] <= 14, range_text);
    int64_t largest = source->dtype == TUE_INT_U8 ? 255 : 32768, bias = op->f[2];
    NEED(op->f[1] * largest + (bias < 0 ? -bias : bias) <= INT32_MAX, overflow_text);
    return NULL;
}

static const char *check_output(const tue_int_op *op, const tue_int_buffer *source, const tue_int_model *model) {
    float scale;
    memcpy(&scale, &op->f[1], sizeof scale);
    NEED(source->dtype == TUE_INT_I16 || source->dtype == TUE_INT_I32, shape_text);
    NEED(op->f[0] >= 1 && op->f[0] < model->port_count && (op->f[2] == 0 || op->f[2] == 1), range_text);
    NEED(model->ports[op->f[0]].port.elements == (size_t)source->rows * (size_t)source->columns, shape_text);
    NEED(isfinite(scale) && scale > 0, range_text);
    return NULL;
}

static const char *check_affine(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    NEED(source->dtype == TUE_INT_I16 && target->dtype == TUE_INT_I32, shape_text);
    NEED(is_shape(target, source->rows, source->columns), shape_text);
    for (int32_t c = 0; c < source->columns; c++) {
        int64_t factor = op->factor32[c], bias = op->bias[c];
        NEED((factor < 0 ? -factor : factor) * 32768 + (bias < 0 ? -bias : bias) <= INT32_MAX, overflow_text);
    }
    return NULL;
}

static const char *check_gather(const tue_int_op *op, const tue_int_buffer *source, const tue_int_buffer *target) {
    static const int32_t lows[] = {0, 0, -32768, INT32_MIN}, highs[] = {255, 0, 32767, INT32_MAX};
    NEED(op->f[0] == 0 || op->f[0] == 1, range_text);
    NEED(source->dtype == TUE_INT_U8 || source->dtype == TUE_INT_I16 || source->dtype == TUE_INT_I32, shape_text);
    NEED(target->dtype == source->dtype && target->columns == source->columns && op->source != op->target, shape_text);
    for (int32_t i = 0; i < target->rows; i++)
        NEED(op->index[i] >= -op->f[0] && op->index[i] < source->rows, range_text);
    for (int32_t c = 0; op->f[0] && c < target->columns; c++)
        NEED(op->blank[c] >= lows[source->dtype] && op->blank[c] <= highs[source->dtype], range_text);
    return NULL;
}

const char *tue_int_check(const tue_int_op *op, const tue_int_model *model) {
    const tue_int_buffer *source = &model->buffers[op->source], *target = &model->buffers[op->target];
    NEED(op->target != 0 || op->kind == TUE_OUTPUT, "it writes to the input");
    switch (op->kind) {
        case TUE_PATCHES: return check_patches(op, source, target);
        case TUE_TOKENS:
            NEED(op->source == 0 && source->dtype == TUE_INT_F32 && target->dtype == TUE_INT_I16, shape_text);
            NEED(is_shape(target, source->rows, source->columns), shape_text);
            NEED(op->f[0] >= 0 && op->f[0] <= 30, range_text);
            return NULL;
        case TUE_FILL: NEED(target->dtype == TUE_INT_I16, shape_text); return NULL;
        case TUE_LINEAR: return check_linear(op, source, target);
        case TUE_NORM: return check_norm(op, source, target);
        case TUE_ATTENTION: return check_attention(op, source, target);
        case TUE_CONVOLUTION:
        case TUE_DEPTHWISE: return check_window(op, source, target);
        case TUE_RESIZE: return check_resize(op, source, target);
        case TUE_HALVE: return check_halve(op, source, target);
        case TUE_CODES:
            NEED(source->dtype == TUE_INT_I16 && target->dtype == TUE_INT_U8, shape_text);
            NEED(is_shape(target, source->rows, source->columns), shape_text);
            NEED(op->f[0] >= 0 && op->f[0] <= 32767 && op->f[1] >= 0 && op->f[1] <= 7, range_text);
            NEED(op->f[2] >= 0 && op->f[2] <= 255, range_text);
            return NULL;
        case TUE_MEAN: return check_mean(op, source, target);
        case TUE_PEAK:
            NEED(source->dtype == TUE_INT_U8 && target->dtype == TUE_INT_I32 && is_shape(target, 1, 1), shape_text);
            NEED(op->f[0] >= 0 && op->f[0] <= 255, range_text);
            return NULL;
        case TUE_SUM:
            NEED(source->dtype == TUE_INT_I16 && target->dtype == TUE_INT_I32, shape_text);
            NEED(has_rows(op->f[0], op->f[1], source->rows) && is_shape(target, 1, source->columns), shape_text);
            NEED(op->f[1] <= 32768, overflow_text);
            return NULL;
        case TUE_AFFINE: return check_affine(op, source, target);
        case TUE_OUTPUT: return check_output(op, source, model);
        case TUE_GATHER: return check_gather(op, source, target);
        default: return range_text;
    }
}
