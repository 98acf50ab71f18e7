/* The integer engine on 512-bit vectors with dot products of bytes (AVX-512 VNNI). Attention has its products
 * of words, 256 bits wide; LayerNorm is AVX2's. */
#include "integer_internal.h"

#if defined(TUE_INT_X86) && TUE_INT_HAS_AVX512VNNI

#define TUE_AVX2_TARGET "avx2,avx512f,avx512bw,avx512vl,avx512dq,avx512vnni"
#include "integer_avx2.h"

enum { PANEL = 32, ROWS = 6, NARROW_ROWS = 6, STRIP = 4, CODE_OFFSET = 0 };
TUE_INLINE int32_t is_exact(const int8_t *w, int32_t count) { return w && count > 0; }

typedef __m512i v_sums;  /* sixteen sums of 32 bits */
typedef __m512i v_words; /* 32 words */
typedef __m512i v_four;  /* four bytes or two words, repeated */

TUE_INLINE v_sums v_load_sums(const void *at) { return _mm512_loadu_si512(at); }

TUE_INLINE v_four v_broadcast(const void *at) {
    int32_t four;
    memcpy(&four, at, sizeof four);
    return _mm512_set1_epi32(four);
}
#define v_broadcast_codes v_broadcast

TUE_INLINE v_words v_requantise(v_sums low, v_sums high, const int32_t *shift, const int16_t *factor) {
    const __m512i order = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    low = _mm512_srav_epi32(low, v_load_sums(shift));
    high = _mm512_srav_epi32(high, v_load_sums(shift + 16));
    __m512i words = _mm512_permutexvar_epi64(order, _mm512_packs_epi32(low, high));
    return _mm512_mulhrs_epi16(words, v_load_sums(factor));
}

TUE_INLINE void v_store_codes(uint8_t *out, v_words v, int32_t bits, int32_t zero) {
    __m512i offset = _mm512_set1_epi16((int16_t)((zero << bits) + ((1 << bits) >> 1)));
    v = _mm512_sra_epi16(_mm512_adds_epi16(v, offset), _mm_cvtsi32_si128(bits));
    v = _mm512_max_epi16(v, _mm512_setzero_si512());
    _mm256_storeu_si256((__m256i *)(void *)out, _mm512_cvtusepi16_epi8(v));
}

TUE_INLINE v_words v_to_words(v_words v, int32_t bits) {
    v = _mm512_adds_epi16(v, _mm512_set1_epi16((int16_t)((1 << bits) >> 1)));
    return _mm512_sra_epi16(v, _mm_cvtsi32_si128(bits));
}

TUE_INLINE v_words v_add_words(v_words a, v_words b) { return _mm512_adds_epi16(a, b); }

TUE_INLINE v_words v_load_words(const int16_t *at) { return _mm512_loadu_si512(at); }

TUE_INLINE void v_store_words(int16_t *at, v_words v) { _mm512_storeu_si512(at, v); }

TUE_INLINE v_sums v_dot_words(v_sums sums, v_four pair, v_sums weights) {
    return _mm512_dpwssd_epi32(sums, pair, weights);
}

TUE_INLINE v_sums v_dot_bytes(v_sums sums, v_four four, v_sums weights) {
    return _mm512_dpbusd_epi32(sums, four, weights);
}

/* 64 codes at a time where the CPU can choose among 128 bytes (VBMI); the rest, and other CPUs, one by one. */
__attribute__((target("avx512f,avx512bw,avx512vbmi"))) static void look_up_wide(uint8_t *codes, size_t count,
                                                                               const uint8_t *table) {
    __m512i t0 = _mm512_loadu_si512(table), t1 = _mm512_loadu_si512(table + 64);
    __m512i t2 = _mm512_loadu_si512(table + 128), t3 = _mm512_loadu_si512(table + 192);
    for (size_t i = 0; i < count; i += 64) {
        __m512i v = _mm512_loadu_si512(codes + i);
        __m512i low = _mm512_permutex2var_epi8(t0, v, t1), high = _mm512_permutex2var_epi8(t2, v, t3);
        _mm512_storeu_si512(codes + i, _mm512_mask_blend_epi8(_mm512_movepi8_mask(v), low, high));
    }
}

static void look_up(uint8_t *codes, size_t count, const uint8_t *table);
static void look_up_best(uint8_t *codes, size_t count, const uint8_t *table) {
    size_t wide = __builtin_cpu_supports("avx512vbmi") ? count & ~(size_t)63 : 0;
    look_up_wide(codes, wide, table);
    look_up(codes + wide, count - wide, table);
}
#define LOOK_UP look_up_best

enum { QUERIES = 8 };
TUE_INLINE __m256i v_dot_pairs(__m256i sums, __m256i pair, __m256i words) {
    return _mm256_dpwssd_epi32(sums, pair, words);
}
#include "integer_avx2_attention.h"
#include "integer_layers.h"

static int usable(void) {
    __builtin_cpu_init();
    return tue_int_avx2()->usable() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vnni");
}

static const tue_int_set avx512vnni = {
    .name = "avx512vnni",
    .usable = usable,
    .kernels =
        {
            [TUE_LINEAR] = linear,
            [TUE_NORM] = tue_int_avx2_norm,
            [TUE_ATTENTION] = attention,
            [TUE_CONVOLUTION] = convolution,
            TUE_AVX2_PLAIN,
        },
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
};

const tue_int_set *tue_int_avx512vnni(void) { return &avx512vnni; }

TUE_AVX2_END

#endif
