/* Attention of the integer engine on AVX2. */
#include "integer_avx2.h"

#ifdef TUE_INT_X86

enum { QUERIES = 4 };
TUE_INLINE __m256i v_dot_pairs(__m256i sums, __m256i pair, __m256i words) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pair, words));
}

#include "integer_avx2_attention.h"

void tue_int_avx2_attention(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    attention(s, op, begin, end, scratch);
}

size_t tue_int_avx2_attention_bytes(const tue_int_op *op, const tue_int_buffer *buffers) {
    return attention_bytes(op, buffers);
}

TUE_AVX2_END

#endif
