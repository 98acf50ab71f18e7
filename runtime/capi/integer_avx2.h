/* What the AVX2 files share. Everything behind TUE_TARGET_ON and before TUE_AVX2_END is
 * compiled for AVX2, or for the larger set that a file names. */
#ifndef TUE_INTEGER_AVX2_H
#define TUE_INTEGER_AVX2_H

#include "integer_internal.h"

#ifdef TUE_INT_X86

#include <immintrin.h>

/* A file for a larger set names it before it includes this one. */
#ifndef TUE_AVX2_TARGET
#define TUE_AVX2_TARGET "avx2"
#endif
#define TUE_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define TUE_TARGET_ON(text) TUE_PRAGMA(clang attribute push(__attribute__((target(text))), apply_to = function))
#define TUE_AVX2_END _Pragma("clang attribute pop")
#else
#define TUE_TARGET_ON(text) TUE_PRAGMA(GCC push_options) TUE_PRAGMA(GCC target(text))
#define TUE_AVX2_END _Pragma("GCC pop_options")
#endif
TUE_TARGET_ON(TUE_AVX2_TARGET)

void tue_int_avx2_attention(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end,
                            void *scratch);
int tue_int_cpu_has_avxvnni(void);
void tue_int_avx2_norm(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end, void *scratch);
void tue_int_avx2_resize(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end, void *scratch);
void tue_int_avx2_halve(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end, void *scratch);
void tue_int_avx2_codes(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end, void *scratch);
void tue_int_avx2_sum(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end, void *scratch);
void tue_int_avx2_affine(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end, void *scratch);
size_t tue_int_avx2_attention_bytes(const tue_int_op *op, const tue_int_buffer *buffers);

/* What every set on AVX2 takes from there. */
#define TUE_AVX2_PLAIN                                                                                          \
    [TUE_RESIZE] = tue_int_avx2_resize, [TUE_HALVE] = tue_int_avx2_halve, [TUE_CODES] = tue_int_avx2_codes,     \
    [TUE_SUM] = tue_int_avx2_sum, [TUE_AFFINE] = tue_int_avx2_affine

/* Sixteen 16-bit values to codes. */
TUE_INLINE __m128i to_codes(__m256i v, int32_t bits, int32_t zero) {
    __m256i offset = _mm256_set1_epi16((int16_t)((zero << bits) + ((1 << bits) >> 1)));
    v = _mm256_sra_epi16(_mm256_adds_epi16(v, offset), _mm_cvtsi32_si128(bits));
    return _mm_packus_epi16(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
}

TUE_INLINE __m256i broadcast4(const void *at) {
    int32_t four;
    memcpy(&four, at, sizeof four);
    return _mm256_set1_epi32(four);
}

TUE_INLINE void v_widen_weights(const int8_t *w, int16_t *out) {
    _mm256_storeu_si256((__m256i *)(void *)out, _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(const void *)w)));
}

TUE_INLINE void v_widen_codes(const uint8_t *in, int16_t *out) {
    _mm256_storeu_si256((__m256i *)(void *)out, _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(const void *)in)));
}

#endif

#endif
