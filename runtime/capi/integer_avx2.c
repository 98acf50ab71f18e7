/* The integer engine on AVX2 without dot-product instructions: exact products of 16 bits.
 *
 * A layer whose weights allow it multiplies bytes (vpmaddubsw), which is exact where two neighbouring weights' magnitudes
 * sum to at most 128: 255 * 128 < 2^15. That is proven from the weights when they are packed; any other layer, and one
 * with 16-bit inputs, multiplies words (vpmaddwd). Both give the definition's sums.
 *
 * Tiles of rows x 16 outputs stay in registers; weights lie in panels of 16 outputs in the order they are read.
 */
#include "integer_avx2.h"

#ifdef TUE_INT_X86

#include <cpuid.h>

enum { PANEL = 16, ROWS = 6, NARROW_ROWS = 4, STRIP = 4, CODE_OFFSET = 0 };
#include "integer_avx2_vectors.h"

TUE_INLINE v_sums v_dot_words(v_sums sums, v_four pair, v_sums weights) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(pair, weights));
}

TUE_INLINE v_sums v_dot_bytes(v_sums sums, v_four four, v_sums weights) {
    return _mm256_add_epi32(sums, _mm256_madd_epi16(_mm256_maddubs_epi16(four, weights), _mm256_set1_epi16(1)));
}

/* Neighbours' products fit 16 bits. */
static int32_t is_exact(const int8_t *w, int32_t count) {
    for (int32_t k = 0; k < count; k += 2) {
        int32_t a = w[k] < 0 ? -w[k] : w[k], b = k + 1 < count ? w[k + 1] : 0;
        if (a + (b < 0 ? -b : b) > 128) return 0;
    }
    return 1;
}

#define attention_bytes tue_int_avx2_attention_bytes
#include "integer_layers.h"

/* LayerNorm of rows whose width is a multiple of sixteen; the plain form does the others. */
static void norm_row(const tue_int_op *op, const int16_t *x, int32_t width, void *out) {
    __m256i sums = _mm256_setzero_si256(), ones = _mm256_set1_epi16(1), squares = _mm256_setzero_si256();
    const __m256i none = _mm256_setzero_si256();
    for (int32_t c = 0; c < width; c += 16) {
        __m256i v = _mm256_loadu_si256((const __m256i *)(x + c)), two = _mm256_madd_epi16(v, v);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(v, ones));
        /* a pair of squares is at most 2^31: unsigned, and widened before it is added */
        squares = _mm256_add_epi64(squares, _mm256_unpacklo_epi32(two, none));
        squares = _mm256_add_epi64(squares, _mm256_unpackhi_epi32(two, none));
    }
    int32_t part[8];
    int64_t square[4], sum = 0;
    _mm256_storeu_si256((__m256i *)part, sums);
    _mm256_storeu_si256((__m256i *)square, squares);
    for (int32_t i = 0; i < 8; i++) sum += part[i];
    tue_norm_row how = tue_norm_scale(sum, square[0] + square[1] + square[2] + square[3], width, op->constants);
    __m256i scale = _mm256_set1_epi32(width), middle = _mm256_set1_epi32((int32_t)sum);
    __m256i half = _mm256_set1_epi32((1 << how.down) >> 1), inverse = _mm256_set1_epi16((int16_t)how.inverse);
    __m128i up = _mm_cvtsi32_si128(how.up), down = _mm_cvtsi32_si128(how.down);
    for (int32_t c = 0; c < width; c += 16) {
        __m256i low = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(x + c)));
        __m256i high = _mm256_cvtepi16_epi32(_mm_loadu_si128((const __m128i *)(x + c + 8)));
        low = _mm256_sll_epi32(_mm256_sub_epi32(_mm256_mullo_epi32(low, scale), middle), up);
        high = _mm256_sll_epi32(_mm256_sub_epi32(_mm256_mullo_epi32(high, scale), middle), up);
        low = _mm256_sra_epi32(_mm256_add_epi32(low, half), down);
        high = _mm256_sra_epi32(_mm256_add_epi32(high, half), down);
        __m256i y = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xD8);
        y = _mm256_mulhrs_epi16(y, inverse);
        if (op->f[2] == TUE_MODE_WORDS) {
            _mm256_storeu_si256((__m256i *)((int16_t *)out + c), y);
            continue;
        }
        y = _mm256_mulhrs_epi16(y, _mm256_loadu_si256((const __m256i *)(op->factor + c)));
        _mm_storeu_si128((__m128i *)((uint8_t *)out + c), to_codes(y, op->f[3], op->f[4]));
    }
}

void tue_int_avx2_norm(const tue_int_state *s, const tue_int_op *op, int32_t begin, int32_t end, void *scratch) {
    const tue_int_buffer *source = &s->buffers[op->source], *target = &s->buffers[op->target];
    int32_t width = source->columns;
    if (width % 16) {
        tue_int_portable()->kernels[TUE_NORM](s, op, begin, end, scratch);
        return;
    }
    size_t size = op->f[2] == TUE_MODE_WORDS ? 2 : 1;
    for (int32_t row = begin; row < end; row++)
        norm_row(op, (const int16_t *)source->data + (size_t)(op->f[0] + row) * (size_t)width, width,
                 (uint8_t *)target->data + (size_t)row * (size_t)width * size);
}

#define TUE_PLAIN(name) void tue_int_avx2_##name
#include "integer_plain.h"

static int usable(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2");
}

/* CPUID leaf 7, subleaf 1, EAX bit 4; older compilers' __builtin_cpu_supports do not know the name. The operating system
 * saves 256-bit registers, since AVX2 is usable. */
int tue_int_cpu_has_avxvnni(void) {
    unsigned int a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static const tue_int_set avx2 = {
    .name = "avx2",
    .usable = usable,
    .kernels =
        {
            [TUE_LINEAR] = linear,
            [TUE_NORM] = tue_int_avx2_norm,
            [TUE_ATTENTION] = tue_int_avx2_attention,
            [TUE_CONVOLUTION] = convolution,
            TUE_AVX2_PLAIN,
        },
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
};

const tue_int_set *tue_int_avx2(void) { return &avx2; }

TUE_AVX2_END

#endif
