/* Attention of the integer engine on NEON: fused per four queries, with probabilities of 16 bits. */
#include "integer_neon.h"

#ifdef TUE_INT_ARM

enum { KEYS = 8, PAIR = 1, QUERIES = 4 };

#include "integer_heads.h"

/* Scores of four queries with all keys, padded ones too. */
static void score(const head_places *p, const int16_t *queries) {
    for (int32_t block = 0; block < p->padded; block += KEYS) {
        const int16_t *keys = p->keys + (size_t)block * (size_t)p->depth;
        int32x4_t sums[QUERIES][2];
        for (int32_t m = 0; m < QUERIES; m++) sums[m][0] = sums[m][1] = vdupq_n_s32(0);
        for (int32_t d = 0; d < p->depth; d++, keys += KEYS) {
            int16x8_t k = vld1q_s16(keys);
#pragma GCC unroll 4
            for (int32_t m = 0; m < QUERIES; m++) {
                int16x8_t q = vdupq_n_s16(queries[m * p->depth + d]);
                sums[m][0] = vmlal_s16(sums[m][0], vget_low_s16(k), vget_low_s16(q));
                sums[m][1] = vmlal_high_s16(sums[m][1], k, q);
            }
        }
#pragma GCC unroll 4
        for (int32_t m = 0; m < QUERIES; m++) {
            int32_t *out = p->scores + (size_t)m * (size_t)p->padded + block;
            vst1q_s32(out, sums[m][0]);
            vst1q_s32(out + 4, sums[m][1]);
        }
    }
}

static int32_t largest(int32_t *scores, int32_t tokens, int32_t padded) {
    for (int32_t j = tokens; j < padded; j++) scores[j] = -(1 << 29);
    int32x4_t most = vld1q_s32(scores);
    for (int32_t j = 4; j < padded; j += 4) most = vmaxq_s32(most, vld1q_s32(scores + j));
    return vmaxvq_s32(most);
}

/* Weights of one query, 0 for padded keys; returns their sum. */
static int32_t soften(const head_places *p, int32_t query, int32_t left, int32_t right, int16_t factor, int32_t drop) {
    int32_t *scores = p->scores + (size_t)query * (size_t)p->padded;
    int16_t *weights = p->weights + (size_t)query * (size_t)p->padded;
    int32x4_t best = vdupq_n_s32(largest(scores, p->tokens, p->padded)), up = vdupq_n_s32(left);
    int16x8_t multiplier = vdupq_n_s16(factor), dropped = vdupq_n_s16((int16_t)drop);
    const int16x8_t last = vdupq_n_s16(TUE_LAST_EXPONENT), mask = vdupq_n_s16(1023), one = vdupq_n_s16(32767);
    const int16x8_t a = vdupq_n_s16(TUE_EXP2_A), b = vdupq_n_s16(TUE_EXP2_B), c = vdupq_n_s16(TUE_EXP2_C);
    for (int32_t j = 0; j < p->padded; j += 8) {
        int32x4_t far0 = shift_round(vshlq_s32(vsubq_s32(best, vld1q_s32(scores + j)), up), right);
        int32x4_t far1 = shift_round(vshlq_s32(vsubq_s32(best, vld1q_s32(scores + j + 4)), up), right);
        int16x8_t exponent = vminq_s16(multiply(narrow(far0, far1), multiplier), last);
        int16x8_t x = vshlq_n_s16(vandq_s16(exponent, mask), 5);
        int16x8_t inner = vsubq_s16(a, multiply(x, vsubq_s16(b, multiply(x, c))));
        int16x8_t value = vsubq_s16(one, multiply(x, inner));
        int16x8_t down = vaddq_s16(vshrq_n_s16(exponent, 10), dropped);
        vst1q_s16(weights + j, vshlq_s16(value, vnegq_s16(down)));
    }
    for (int32_t j = p->tokens; j < p->padded; j++) weights[j] = 0;
    int32x4_t total = vdupq_n_s32(0);
    for (int32_t j = 0; j < p->padded; j += 8) total = vpadalq_s16(total, vld1q_s16(weights + j));
    return vaddvq_s32(total);
}

/* Mixed values of eight channels, divided by the weights' sum, as codes. */
static uint8x8_t finish(int32x4_t low, int32x4_t high, int32_t sum, int16_t out, int32_t bits, int32_t zero) {
    int32_t shift, inverse = tue_softmax_inverse(sum, &shift);
    int16x8_t mean = narrow(shift_round(low, shift), shift_round(high, shift));
    mean = multiply(mean, vdupq_n_s16((int16_t)inverse));
    return to_codes(multiply(mean, vdupq_n_s16(out)), bits, zero);
}

/* Eight channels of four queries. */
static void mix(const head_places *p, int32_t channel, int32x4_t sums[QUERIES][2]) {
    const int16_t *values = p->values + channel;
    size_t step = (size_t)p->wide_depth, tokens = (size_t)p->tokens, padded = (size_t)p->padded;
    int32x4_t s[QUERIES][2];
    for (int32_t m = 0; m < QUERIES; m++) s[m][0] = s[m][1] = vdupq_n_s32(0);
    for (size_t j = 0; j < tokens; j++, values += step) {
        int16x8_t v = vld1q_s16(values);
#pragma GCC unroll 4
        for (size_t m = 0; m < QUERIES; m++) {
            int16x8_t w = vdupq_n_s16(p->weights[m * padded + j]);
            s[m][0] = vmlal_s16(s[m][0], vget_low_s16(v), vget_low_s16(w));
            s[m][1] = vmlal_high_s16(s[m][1], v, w);
        }
    }
    memcpy(sums, s, sizeof s);
}

void tue_int_neon_attention(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
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
            for (int32_t channel = 0; channel < size; channel += KEYS) {
                int32x4_t mixed[QUERIES][2];
                mix(&p, channel, mixed);
                int32_t count = size - channel < KEYS ? size - channel : KEYS;
                for (int32_t m = 0; m < rows; m++) {
                    uint8_t codes[KEYS];
                    uint8_t *out = (uint8_t *)target->data + (size_t)(row + m) * (size_t)width + head * size + channel;
                    vst1_u8(codes, finish(mixed[m][0], mixed[m][1], sums[m], op->out[head], bits, zero));
                    memcpy(out, codes, (size_t)count);
                }
            }
        }
    }
}

size_t tue_int_neon_attention_bytes(const tue_int_op *op, const tue_int_buffer *buffers) {
    head_places p;
    return place_head(&p, buffers[op->source].rows, buffers[op->target].columns / op->f[0], NULL);
}

#endif
