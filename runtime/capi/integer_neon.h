/* What the NEON files share: the vectors that integer_layers.h is written over, all but the products of bytes. A vector of
 * sums is two registers, so that a tile of six rows and sixteen outputs has 24 of them in registers. */
#ifndef TUE_INTEGER_NEON_H
#define TUE_INTEGER_NEON_H

#include "integer_internal.h"

#ifdef TUE_INT_ARM

#include <arm_neon.h>

void tue_int_neon_attention(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end,
                            void *scratch);
void tue_int_neon_norm(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end, void *scratch);
size_t tue_int_neon_attention_bytes(const tue_int_op *op, const tue_int_buffer *buffers);

#define attention_bytes tue_int_neon_attention_bytes

typedef struct v_sums { /* eight sums of 32 bits */
    int32x4_t a, b;
} v_sums;
typedef struct v_words { /* sixteen words */
    int16x8_t a, b;
} v_words;
typedef int32x4_t v_four; /* four bytes or two words, repeated */

/* mul of docs/reference/integer.md; SQRDMULH is that where one side is not negative. */
TUE_INLINE int16x8_t multiply(int16x8_t v, int16x8_t m) { return vqrdmulhq_s16(v, m); }

TUE_INLINE int32x4_t shift_round(int32x4_t v, int32_t bits) {
    return vshlq_s32(vaddq_s32(v, vdupq_n_s32((1 << bits) >> 1)), vdupq_n_s32(-bits));
}

TUE_INLINE int16x8_t narrow(int32x4_t low, int32x4_t high) { return vcombine_s16(vqmovn_s32(low), vqmovn_s32(high)); }

/* Eight 16-bit values to codes. */
TUE_INLINE uint8x8_t to_codes(int16x8_t v, int32_t bits, int32_t zero) {
    v = vqaddq_s16(v, vdupq_n_s16((int16_t)((zero << bits) + ((1 << bits) >> 1))));
    return vqmovun_s16(vshlq_s16(v, vdupq_n_s16((int16_t)-bits)));
}

TUE_INLINE v_sums v_load_sums(const void *at) {
    const uint8_t *bytes = at;
    v_sums sums = {vreinterpretq_s32_u8(vld1q_u8(bytes)), vreinterpretq_s32_u8(vld1q_u8(bytes + 16))};
    return sums;
}

TUE_INLINE v_four v_broadcast(const void *at) {
    int32_t four;
    memcpy(&four, at, sizeof four);
    return vdupq_n_s32(four);
}

/* Codes minus 128: NEON multiplies signed bytes. */
TUE_INLINE v_four v_broadcast_codes(const void *at) {
    return veorq_s32(v_broadcast(at), vreinterpretq_s32_u8(vdupq_n_u8(128)));
}

TUE_INLINE v_words v_requantise(v_sums low, v_sums high, const int32_t *shift, const int16_t *factor) {
    int16x8_t a = narrow(vshlq_s32(low.a, vnegq_s32(vld1q_s32(shift))), vshlq_s32(low.b, vnegq_s32(vld1q_s32(shift + 4))));
    int16x8_t b =
        narrow(vshlq_s32(high.a, vnegq_s32(vld1q_s32(shift + 8))), vshlq_s32(high.b, vnegq_s32(vld1q_s32(shift + 12))));
    v_words words = {multiply(a, vld1q_s16(factor)), multiply(b, vld1q_s16(factor + 8))};
    return words;
}

TUE_INLINE void v_store_codes(uint8_t *out, v_words v, int32_t bits, int32_t zero) {
    vst1q_u8(out, vcombine_u8(to_codes(v.a, bits, zero), to_codes(v.b, bits, zero)));
}

TUE_INLINE v_words v_to_words(v_words v, int32_t bits) {
    int16x8_t half = vdupq_n_s16((int16_t)((1 << bits) >> 1)), down = vdupq_n_s16((int16_t)-bits);
    v_words words = {vshlq_s16(vqaddq_s16(v.a, half), down), vshlq_s16(vqaddq_s16(v.b, half), down)};
    return words;
}

TUE_INLINE v_words v_add_words(v_words x, v_words y) {
    v_words words = {vqaddq_s16(x.a, y.a), vqaddq_s16(x.b, y.b)};
    return words;
}

TUE_INLINE v_words v_load_words(const int16_t *at) {
    v_words words = {vld1q_s16(at), vld1q_s16(at + 8)};
    return words;
}

TUE_INLINE void v_store_words(int16_t *at, v_words v) {
    vst1q_s16(at, v.a);
    vst1q_s16(at + 8, v.b);
}

/* Two words of a row with two words of four outputs each. */
TUE_INLINE int32x4_t dot_words(int32x4_t sums, int32x4_t pair, int32x4_t weights) {
    int16x8_t x = vreinterpretq_s16_s32(pair), w = vreinterpretq_s16_s32(weights);
    return vaddq_s32(sums, vpaddq_s32(vmull_s16(vget_low_s16(x), vget_low_s16(w)), vmull_high_s16(x, w)));
}

TUE_INLINE v_sums v_dot_words(v_sums sums, v_four pair, v_sums weights) {
    v_sums more = {dot_words(sums.a, pair, weights.a), dot_words(sums.b, pair, weights.b)};
    return more;
}

TUE_INLINE void v_widen_weights(const int8_t *w, int16_t *out) {
    int8x16_t v = vld1q_s8(w);
    vst1q_s16(out, vmovl_s8(vget_low_s8(v)));
    vst1q_s16(out + 8, vmovl_high_s8(v));
}

TUE_INLINE void v_widen_codes(const uint8_t *in, int16_t *out) {
    uint8x16_t v = vld1q_u8(in);
    vst1q_s16(out, vreinterpretq_s16_u16(vmovl_u8(vget_low_u8(v))));
    vst1q_s16(out + 8, vreinterpretq_s16_u16(vmovl_high_u8(v)));
}

#endif

#endif
