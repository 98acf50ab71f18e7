/* What the files of the integer engine share: a checked model in memory, and the table of kernels of an instruction set.
 *
 * docs/reference/integer.md defines what each operation computes. The kernels of integer_portable.c are the plain form
 * of that; the other files replace the ones that matter, with equal bytes.
 */
#ifndef TUE_INTEGER_INTERNAL_H
#define TUE_INTEGER_INTERNAL_H

#include <string.h>

#include "dispatch.h" /* TUE_INLINE */
#include "integer_engine.h"

/* Kinds of operations, as in the file. */
enum tue_int_kind {
    TUE_PATCHES = 1,
    TUE_TOKENS,
    TUE_FILL,
    TUE_LINEAR,
    TUE_NORM,
    TUE_ATTENTION,
    TUE_CONVOLUTION,
    TUE_DEPTHWISE,
    TUE_RESIZE,
    TUE_HALVE,
    TUE_CODES,
    TUE_MEAN,
    TUE_PEAK,
    TUE_SUM,
    TUE_AFFINE,
    TUE_OUTPUT,
    TUE_GATHER,
    TUE_KINDS
};

enum { TUE_MODE_CODES = 0, TUE_MODE_WORDS = 1, TUE_MODE_ADD = 2 };
enum { TUE_FLAG_RELU = 1, TUE_FLAG_ADDED = 2, TUE_FLAG_EXACT = 4 };
enum { TUE_TILE_ROWS = 6 }; /* threads share the rows of a linear in multiples of this */

/* 2^-x = 1 - x (A - x (B - x C)), in units of 2^-15. */
enum { TUE_EXP2_A = 22657, TUE_EXP2_B = 7555, TUE_EXP2_C = 1282, TUE_LAST_EXPONENT = 16383 };

typedef struct tue_int_buffer {
    void *data;
    int32_t dtype, rows, columns;
} tue_int_buffer;

/* One operation. Pointers that its kind has no use for are NULL. `f` holds the kind's fields in the file's order. */
typedef struct tue_int_op {
    int32_t kind, source, target;
    int32_t f[9];
    int32_t inputs, outputs; /* of a layer: entries of a weight's row, and rows */
    int32_t source_type;     /* element type of the source buffer */
    int32_t items;           /* rows or heads that may be shared among threads */
    size_t kept;             /* bytes of the weights while the engine lives */
    const int8_t *weight;    /* outputs x inputs; valid while packing, and later where packed is NULL */
    void *packed;            /* as the instruction set likes it */
    const int32_t *bias;
    const int8_t *shift;
    const int16_t *factor;
    const uint8_t *table;
    const int16_t *words;       /* of TUE_FILL */
    const int64_t *constants;   /* of TUE_NORM: epsilon, root */
    const int8_t *left, *right; /* of TUE_ATTENTION */
    const int16_t *out;
    const int32_t *first[2]; /* of TUE_RESIZE: rows, columns */
    const int16_t *share[2];
    const int32_t *factor32; /* of TUE_AFFINE */
    const int32_t *index, *blank; /* of TUE_GATHER: a row's number or -1, and the row that -1 is */
} tue_int_op;

/* What kernels read of an engine. */
typedef struct tue_int_state {
    tue_int_buffer *buffers;
    const void *input;
    float *const *outputs;
} tue_int_state;

/* Computes items begin .. end - 1 of an operation. `scratch` is the thread's own, of as many bytes as `scratch_bytes`
 * of the same set says, aligned to 64. */
typedef void (*tue_int_kernel)(const tue_int_state *state, const tue_int_op *op, int32_t begin, int32_t end,
                               void *scratch);

/* The kernels of an instruction set. */
typedef struct tue_int_set {
    const char *name;
    int (*usable)(void); /* whether this CPU has it */
    tue_int_kernel kernels[TUE_KINDS];
    size_t (*packed_bytes)(const tue_int_op *op); /* 0: this operation keeps its weight as it is */
    void (*pack)(const tue_int_op *op, void *packed);
    size_t (*scratch_bytes)(const tue_int_op *op, const tue_int_buffer *buffers);
} tue_int_set;

/* One function a file, so that a missing file is a missing symbol only where its macro says it is there. */
const tue_int_set *tue_int_portable(void);
const tue_int_set *tue_int_avx2(void);
const tue_int_set *tue_int_avxvnni(void);
const tue_int_set *tue_int_avx512vnni(void);
const tue_int_set *tue_int_neon(void);
const tue_int_set *tue_int_neondot(void);

#if defined(__x86_64__) && defined(__GNUC__)
#define TUE_INT_X86 1
#endif
/* Compilers that know the instructions; older ones leave these files empty. */
#if defined(TUE_INT_X86) && ((defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11))
#define TUE_INT_HAS_AVXVNNI 1
#define TUE_INT_HAS_AVX512VNNI 1
#else
#define TUE_INT_HAS_AVXVNNI 0
#define TUE_INT_HAS_AVX512VNNI 0
#endif

#if defined(__aarch64__) && defined(__ARM_NEON) && defined(__GNUC__)
#define TUE_INT_ARM 1
#endif
#if defined(TUE_INT_ARM) && (!defined(__clang__) || __clang_major__ >= 16 || defined(__ARM_FEATURE_DOTPROD))
#define TUE_INT_HAS_NEONDOT 1
#else
#define TUE_INT_HAS_NEONDOT 0
#endif

TUE_INLINE size_t tue_round_up(size_t value, size_t unit) { return (value + unit - 1) / unit * unit; }

TUE_INLINE int32_t tue_clamp16(int32_t v) { return v < -32768 ? -32768 : v > 32767 ? 32767 : v; }

/* (v m + 2^14) >> 15; v of 16 bits, m 0 .. 32767. Shifts of negative numbers are arithmetic in every compiler we know;
 * a test compares with the definition. */
TUE_INLINE int32_t tue_multiply(int32_t v, int32_t m) { return (v * m + (1 << 14)) >> 15; }

TUE_INLINE int32_t tue_shift_round(int32_t v, int32_t bits) { return (v + ((1 << bits) >> 1)) >> bits; }

TUE_INLINE uint8_t tue_code(int32_t v, int32_t bits, int32_t zero) {
    v = tue_clamp16(v + (zero << bits) + ((1 << bits) >> 1)) >> bits;
    return (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
}

TUE_INLINE int32_t tue_word(int32_t v, int32_t bits) { return tue_clamp16(v + ((1 << bits) >> 1)) >> bits; }

TUE_INLINE int32_t tue_bits64(uint64_t v) { /* position of the highest bit that is set, from 1; 0 for 0 */
#if defined(__GNUC__)
    return v ? 64 - __builtin_clzll(v) : 0;
#else
    int32_t found = 0;
    for (; v; v >>= 1) found++;
    return found;
#endif
}

/* Largest integer whose square is at most v; v < 2^30. */
TUE_INLINE int32_t tue_isqrt30(uint32_t v) {
    uint32_t found = 0;
    for (int32_t bit = 14; bit >= 0; bit--) {
        uint32_t tried = found | (1u << bit);
        if (tried * tried <= v) found = tried;
    }
    return (int32_t)found;
}

/* How a row of a LayerNorm is scaled: `up` and `down` are shifts, of which one is 0, and `inverse` the multiplier. */
typedef struct tue_norm_row {
    int32_t up, down, inverse;
} tue_norm_row;

TUE_INLINE tue_norm_row tue_norm_scale(int64_t sum, int64_t squares, int32_t width, const int64_t constants[2]) {
    uint64_t v = (uint64_t)(width * (width * squares - sum * sum) + constants[0]);
    int32_t shift = (tue_bits64(v) - 29) >> 1; /* leaves 29 or 30 bits */
    uint32_t length = (uint32_t)(shift >= 0 ? v >> (2 * shift) : v << (-2 * shift));
    tue_norm_row row = {shift < 0 ? -shift : 0, shift > 0 ? shift : 0, (int32_t)(constants[1] / tue_isqrt30(length))};
    return row;
}

TUE_INLINE int32_t tue_exp2(int32_t exponent, int32_t drop) {
    int32_t fraction = (exponent & 1023) << 5;
    int32_t inner = TUE_EXP2_A - tue_multiply(fraction, TUE_EXP2_B - tue_multiply(fraction, TUE_EXP2_C));
    return (32767 - tue_multiply(fraction, inner)) >> ((exponent >> 10) + drop);
}

/* A row's division by the sum of its weights: `shift` for the mixed values, then `inverse` as a multiplier. */
TUE_INLINE int32_t tue_softmax_inverse(int32_t sum, int32_t *shift) {
    *shift = tue_bits64((uint64_t)sum) - 8;
    int64_t inverse = ((int64_t)1 << (*shift + 22)) / sum;
    return inverse > 32767 ? 32767 : (int32_t)inverse;
}

#endif
