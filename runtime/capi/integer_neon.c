/* The integer engine on 64-bit Arm without dot-product instructions (Cortex-A53, A72).
 *
 * Codes lose 128 and become signed, so that a product with a weight above -128 is at most 128 * 127 and two of them fit
 * 16 bits. A layer with a weight of -128, and one with 16-bit inputs, multiplies words. Both give the definition's sums.
 */
#include "integer_neon.h"

#ifdef TUE_INT_ARM

enum { PANEL = 16, ROWS = 4, NARROW_ROWS = 4, STRIP = 4, CODE_OFFSET = 128 };

static int32_t is_exact(const int8_t *w, int32_t count) {
    for (int32_t k = 0; k < count; k++)
        if (w[k] == -128) return 0;
    return 1;
}

/* Four bytes of a row with four bytes of four outputs each: neighbours are added in 16 bits, and those in 32. */
TUE_INLINE int32x4_t dot_bytes(int32x4_t sums, int8x16_t x, int8x16_t w) {
    int16x8_t pairs = vpaddq_s16(vmull_s8(vget_low_s8(x), vget_low_s8(w)), vmull_high_s8(x, w));
    return vpadalq_s16(sums, pairs);
}

TUE_INLINE v_sums v_dot_bytes(v_sums sums, v_four four, v_sums weights) {
    int8x16_t x = vreinterpretq_s8_s32(four);
    v_sums more = {dot_bytes(sums.a, x, vreinterpretq_s8_s32(weights.a)),
                   dot_bytes(sums.b, x, vreinterpretq_s8_s32(weights.b))};
    return more;
}

#include "integer_layers.h"

/* LayerNorm of rows whose width is a multiple of eight; the plain form does the others. */
static void norm_row(const tue_int_op *op, const int16_t *x, int32_t width, void *out) {
    int32x4_t sums = vdupq_n_s32(0);
    uint64x2_t squares = vdupq_n_u64(0);
    for (int32_t c = 0; c < width; c += 8) {
        int16x8_t v = vld1q_s16(x + c);
        sums = vpadalq_s16(sums, v);
        squares = vpadalq_u32(squares, vreinterpretq_u32_s32(vmull_s16(vget_low_s16(v), vget_low_s16(v))));
        squares = vpadalq_u32(squares, vreinterpretq_u32_s32(vmull_high_s16(v, v)));
    }
    int64_t sum = vaddlvq_s32(sums), square = (int64_t)vaddvq_u64(squares);
    tue_norm_row how = tue_norm_scale(sum, square, width, op->constants);
    int32x4_t middle = vdupq_n_s32((int32_t)sum), up = vdupq_n_s32(how.up);
    int16x8_t inverse = vdupq_n_s16((int16_t)how.inverse);
    for (int32_t c = 0; c < width; c += 8) {
        int16x8_t v = vld1q_s16(x + c);
        int32x4_t low = vsubq_s32(vmulq_n_s32(vmovl_s16(vget_low_s16(v)), width), middle);
        int32x4_t high = vsubq_s32(vmulq_n_s32(vmovl_high_s16(v), width), middle);
        low = shift_round(vshlq_s32(low, up), how.down);
        high = shift_round(vshlq_s32(high, up), how.down);
        int16x8_t y = multiply(narrow(low, high), inverse);
        if (op->f[2] == TUE_MODE_WORDS)
            vst1q_s16((int16_t *)out + c, y);
        else
            vst1_u8((uint8_t *)out + c, to_codes(multiply(y, vld1q_s16(op->factor + c)), op->f[3], op->f[4]));
    }
}

void tue_int_neon_norm(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    int32_t width = source->columns;
    if (width % 8) {
        tue_int_portable()->kernels[TUE_NORM](s, op, begin, end, scratch);
        return;
    }
    size_t size = op->f[2] == TUE_MODE_WORDS ? 2 : 1;
    for (int32_t row = begin; row < end; row++)
        norm_row(op, (const int16_t *)source->data + (size_t)(op->f[0] + row) * (size_t)width, width,
                 (uint8_t *)target->data + (size_t)row * (size_t)width * size);
}

static int usable(void) { return 1; } /* every 64-bit Arm has it */

static const tue_int_set neon = {
    .name = "neon",
    .usable = usable,
    .kernels =
        {
            [TUE_LINEAR] = linear,
            [TUE_NORM] = tue_int_neon_norm,
            [TUE_ATTENTION] = tue_int_neon_attention,
            [TUE_CONVOLUTION] = convolution,
        },
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
};

const tue_int_set *tue_int_neon(void) { return &neon; }

#endif
