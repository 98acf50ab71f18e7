/* Attention on 256-bit vectors, written once for every instruction set: fused per QUERIES queries, with probabilities of 16
 * bits. A file defines QUERIES, as many as its registers hold sums for, and v_dot_pairs(sums, pair, words), which adds the
 * products of two words to each sum, and includes this one. */

enum { KEYS = 16, PAIR = 2 };

#include "integer_heads.h"

/* Scores of QUERIES queries with all keys, padded ones too. */
static void score(const head_places *p, const int16_t *queries) {
    for (int32_t block = 0; block < p->padded; block += KEYS) {
        const int16_t *keys = p->keys + (size_t)block * (size_t)p->depth;
        __m256i sums[QUERIES][2];
        for (int32_t m = 0; m < QUERIES; m++) sums[m][0] = sums[m][1] = _mm256_setzero_si256();
        for (int32_t d = 0; d < p->depth; d += 2, keys += 2 * KEYS) {
            __m256i k0 = _mm256_loadu_si256((const __m256i *)keys);
            __m256i k1 = _mm256_loadu_si256((const __m256i *)(keys + KEYS));
#pragma GCC unroll 8
            for (int32_t m = 0; m < QUERIES; m++) {
                __m256i pair = broadcast4(queries + m * p->depth + d);
                sums[m][0] = v_dot_pairs(sums[m][0], pair, k0);
                sums[m][1] = v_dot_pairs(sums[m][1], pair, k1);
            }
        }
#pragma GCC unroll 8
        for (int32_t m = 0; m < QUERIES; m++) {
            int32_t *out = p->scores + (size_t)m * (size_t)p->padded + block;
            _mm256_storeu_si256((__m256i *)out, sums[m][0]);
            _mm256_storeu_si256((__m256i *)(out + 8), sums[m][1]);
        }
    }
}

static int32_t largest(int32_t *scores, int32_t tokens, int32_t padded) {
    for (int32_t j = tokens; j < padded; j++) scores[j] = -(1 << 29);
    __m256i most = _mm256_loadu_si256((const __m256i *)scores);
    for (int32_t j = 8; j < padded; j += 8)
        most = _mm256_max_epi32(most, _mm256_loadu_si256((const __m256i *)(scores + j)));
    __m128i half = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
    half = _mm_max_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_max_epi32(half, _mm_shuffle_epi32(half, 0xB1)));
}

/* Weights of one query, 0 for padded keys; returns their sum. */
static int32_t soften(const head_places *p, int32_t query, int32_t left, int32_t right, int16_t factor, int32_t drop) {
    int32_t *scores = p->scores + (size_t)query * (size_t)p->padded;
    int16_t *weights = p->weights + (size_t)query * (size_t)p->padded;
    __m256i best = _mm256_set1_epi32(largest(scores, p->tokens, p->padded));
    __m256i half = _mm256_set1_epi32((1 << right) >> 1), multiplier = _mm256_set1_epi16(factor);
    __m128i up = _mm_cvtsi32_si128(left), down = _mm_cvtsi32_si128(right), dropped = _mm_cvtsi32_si128(drop);
    const __m256i last = _mm256_set1_epi16(TUE_LAST_EXPONENT), fraction_mask = _mm256_set1_epi16(1023);
    const __m256i a = _mm256_set1_epi16(TUE_EXP2_A), b = _mm256_set1_epi16(TUE_EXP2_B), c = _mm256_set1_epi16(TUE_EXP2_C);
    const __m256i one = _mm256_set1_epi16(32767), to_index = _mm256_set1_epi16(0x78F8);
    /* byte n is 2^(7 - n mod 8): of 2^(15 - n) the low byte where n >= 8, the high byte below */
    const __m256i powers = _mm256_setr_epi8(-128, 64, 32, 16, 8, 4, 2, 1, -128, 64, 32, 16, 8, 4, 2, 1, -128, 64, 32,
                                            16, 8, 4, 2, 1, -128, 64, 32, 16, 8, 4, 2, 1);
    for (int32_t j = 0; j < p->padded; j += 16) {
        __m256i far0 = _mm256_sub_epi32(best, _mm256_loadu_si256((const __m256i *)(scores + j)));
        __m256i far1 = _mm256_sub_epi32(best, _mm256_loadu_si256((const __m256i *)(scores + j + 8)));
        far0 = _mm256_sra_epi32(_mm256_add_epi32(_mm256_sll_epi32(far0, up), half), down);
        far1 = _mm256_sra_epi32(_mm256_add_epi32(_mm256_sll_epi32(far1, up), half), down);
        __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(far0, far1), 0xD8);
        __m256i exponent = _mm256_min_epi16(_mm256_mulhrs_epi16(words, multiplier), last);
        __m256i whole = _mm256_srli_epi16(exponent, 10);
        __m256i x = _mm256_slli_epi16(_mm256_and_si256(exponent, fraction_mask), 5);
        __m256i inner = _mm256_sub_epi16(b, _mm256_mulhrs_epi16(x, c));
        inner = _mm256_sub_epi16(a, _mm256_mulhrs_epi16(x, inner));
        __m256i value = _mm256_sub_epi16(one, _mm256_mulhrs_epi16(x, inner));
        __m256i index = _mm256_add_epi8(_mm256_or_si256(whole, _mm256_slli_epi16(whole, 8)), to_index);
        value = _mm256_mulhi_epu16(_mm256_slli_epi16(value, 1), _mm256_shuffle_epi8(powers, index));
        _mm256_storeu_si256((__m256i *)(weights + j), _mm256_srl_epi16(value, dropped));
    }
    for (int32_t j = p->tokens; j < p->padded; j++) weights[j] = 0;
    __m256i total = _mm256_setzero_si256(), ones = _mm256_set1_epi16(1);
    for (int32_t j = 0; j < p->padded; j += 16)
        total = _mm256_add_epi32(total, _mm256_madd_epi16(_mm256_loadu_si256((const __m256i *)(weights + j)), ones));
    __m128i sum = _mm_add_epi32(_mm256_castsi256_si128(total), _mm256_extracti128_si256(total, 1));
    sum = _mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(sum, _mm_shuffle_epi32(sum, 0xB1)));
}

/* Mixed values of sixteen channels, divided by the weights' sum, as codes. */
static __m128i finish(__m256i low, __m256i high, int32_t sum, int16_t out, int32_t bits, int32_t zero) {
    int32_t shift, inverse = tue_softmax_inverse(sum, &shift);
    __m256i half = _mm256_set1_epi32((1 << shift) >> 1);
    __m128i by = _mm_cvtsi32_si128(shift);
    low = _mm256_sra_epi32(_mm256_add_epi32(low, half), by);
    high = _mm256_sra_epi32(_mm256_add_epi32(high, half), by);
    __m256i mean = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
    mean = _mm256_mulhrs_epi16(mean, _mm256_set1_epi16((int16_t)inverse));
    return to_codes(_mm256_mulhrs_epi16(mean, _mm256_set1_epi16(out)), bits, zero);
}

/* Sixteen channels of QUERIES queries. */
static void mix(const head_places *p, int32_t channel, __m256i sums[QUERIES][2]) {
    const int16_t *values = p->values + (size_t)channel * 2;
    size_t step = (size_t)p->wide_depth * 2, padded = (size_t)p->padded;
    __m256i s[QUERIES][2];
    for (int32_t m = 0; m < QUERIES; m++) s[m][0] = s[m][1] = _mm256_setzero_si256();
    for (size_t j = 0; j < padded; j += 2, values += step) {
        __m256i v0 = _mm256_loadu_si256((const __m256i *)values);
        __m256i v1 = _mm256_loadu_si256((const __m256i *)(values + 16));
#pragma GCC unroll 8
        for (size_t m = 0; m < QUERIES; m++) {
            __m256i pair = broadcast4(p->weights + m * padded + j);
            s[m][0] = v_dot_pairs(s[m][0], pair, v0);
            s[m][1] = v_dot_pairs(s[m][1], pair, v1);
        }
    }
    memcpy(sums, s, sizeof s);
}

static void attention(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    int32_t width = target->columns, size = width / op->f[0], bits = op->f[2], zero = op->f[3];
    head_places p;
    place_head(&p, source->rows, size, scratch);
    for (int32_t head = begin; head < end; head++) {
        gather_head(&p, source->data, width, size, head);
        for (int32_t row = 0; row < target->rows; row += QUERIES) {
            int32_t rows = target->rows - row < QUERIES ? target->rows - row : QUERIES, sums[QUERIES];
            score(&p, p.queries + (size_t)(op->f[1] + row) * (size_t)p.depth);
            for (int32_t m = 0; m < QUERIES; m++)
                sums[m] = soften(&p, m, op->left[head], op->right[head], op->factor[head], op->f[4]);
            for (int32_t channel = 0; channel < size; channel += 16) {
                __m256i mixed[QUERIES][2];
                mix(&p, channel, mixed);
                int32_t count = size - channel < 16 ? size - channel : 16;
                for (int32_t m = 0; m < rows; m++) {
                    uint8_t codes[16];
                    uint8_t *out = (uint8_t *)target->data + (size_t)(row + m) * (size_t)width + head * size + channel;
                    _mm_storeu_si128((__m128i *)codes,
                                     finish(mixed[m][0], mixed[m][1], sums[m], op->out[head], bits, zero));
                    memcpy(out, codes, (size_t)count);
                }
            }
        }
    }
}

static size_t attention_bytes(const tue_int_op *op, const tue_int_buffer *buffers) {
    head_places p;
    return place_head(&p, buffers[op->source].rows, buffers[op->target].columns / op->f[0], NULL);
}
