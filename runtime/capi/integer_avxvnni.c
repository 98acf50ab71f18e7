/* The integer engine on 256-bit vectors with dot products of bytes (AVX-VNNI: laptops and small cores). LayerNorm is
 * AVX2's. */
#include "integer_internal.h"

#if defined(TUE_INT_X86) && TUE_INT_HAS_AVXVNNI

#define TUE_AVX2_TARGET "avx2,avxvnni"
#include "integer_avx2.h"

enum { PANEL = 16, ROWS = 6, NARROW_ROWS = 6, STRIP = 4, CODE_OFFSET = 0 };
TUE_INLINE int32_t is_exact(const int8_t *w, int32_t count) { return w && count > 0; }
#include "integer_avx2_vectors.h"

TUE_INLINE v_sums v_dot_words(v_sums sums, v_four pair, v_sums weights) {
    return _mm256_dpwssd_avx_epi32(sums, pair, weights);
}

TUE_INLINE v_sums v_dot_bytes(v_sums sums, v_four four, v_sums weights) {
    return _mm256_dpbusd_avx_epi32(sums, four, weights);
}

enum { QUERIES = 4 };
TUE_INLINE __m256i v_dot_pairs(__m256i sums, __m256i pair, __m256i words) {
    return _mm256_dpwssd_avx_epi32(sums, pair, words);
}
#include "integer_avx2_attention.h"
#include "integer_layers.h"

static int usable(void) {
    return tue_int_avx2()->usable() && tue_int_cpu_has_avxvnni();
}

static const tue_int_set avxvnni = {
    .name = "avxvnni",
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

const tue_int_set *tue_int_avxvnni(void) { return &avxvnni; }

TUE_AVX2_END

#endif
