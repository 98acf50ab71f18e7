/* The vectors of 256 bits that integer_layers.h is written over, all but the products. */

typedef __m256i v_sums;  /* eight sums of 32 bits */
typedef __m256i v_words; /* sixteen words */
typedef __m256i v_four;  /* four bytes or two words, repeated */

TUE_INLINE v_sums v_load_sums(const void *at) { return _mm256_loadu_si256((const __m256i *)at); }

TUE_INLINE v_four v_broadcast(const void *at) { return broadcast4(at); }
#define v_broadcast_codes v_broadcast

TUE_INLINE v_words v_requantise(v_sums low, v_sums high, const int32_t *shift, const int16_t *factor) {
    low = _mm256_srav_epi32(low, v_load_sums(shift));
    high = _mm256_srav_epi32(high, v_load_sums(shift + 8));
    return _mm256_mulhrs_epi16(_mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8), v_load_sums(factor));
}

TUE_INLINE void v_store_codes(uint8_t *out, v_words v, int32_t bits, int32_t zero) {
    _mm_storeu_si128((__m128i *)(void *)out, to_codes(v, bits, zero));
}

TUE_INLINE v_words v_to_words(v_words v, int32_t bits) {
    v = _mm256_adds_epi16(v, _mm256_set1_epi16((int16_t)((1 << bits) >> 1)));
    return _mm256_sra_epi16(v, _mm_cvtsi32_si128(bits));
}

TUE_INLINE v_words v_add_words(v_words a, v_words b) { return _mm256_adds_epi16(a, b); }

TUE_INLINE v_words v_load_words(const int16_t *at) { return v_load_sums(at); }

TUE_INLINE void v_store_words(int16_t *at, v_words v) { _mm256_storeu_si256((__m256i *)(void *)at, v); }
