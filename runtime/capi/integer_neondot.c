/* The integer engine on 64-bit Arm with dot products of bytes (SDOT: Cortex-A55, A76 and later, Apple). Attention and
 * LayerNorm are those of integer_neon.c. */
#include "integer_internal.h"

#if TUE_INT_HAS_NEONDOT

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#define TUE_NEONDOT_END _Pragma("clang attribute pop")
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#define TUE_NEONDOT_END _Pragma("GCC pop_options")
#endif
#include "integer_neon.h"

enum { PANEL = 16, ROWS = 4, NARROW_ROWS = 6, STRIP = 4, CODE_OFFSET = 128 };

TUE_INLINE int32_t is_exact(const int8_t *w, int32_t count) { return w && count > 0; }

TUE_INLINE v_sums v_dot_bytes(v_sums sums, v_four four, v_sums weights) {
    int8x16_t x = vreinterpretq_s8_s32(four);
    v_sums more = {vdotq_s32(sums.a, vreinterpretq_s8_s32(weights.a), x),
                   vdotq_s32(sums.b, vreinterpretq_s8_s32(weights.b), x)};
    return more;
}

#include "integer_layers.h"

static int usable(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) >> 20 & 1) != 0; /* HWCAP_ASIMDDP */
#elif defined(__APPLE__)
    return 1;
#else
    return 0;
#endif
}

static const tue_int_set neondot = {
    .name = "neondot",
    .usable = usable,
    .kernels =
        {
            [TUE_LINEAR] = linear,
            [TUE_NORM] = tue_int_neon_norm,
            [TUE_ATTENTION] = tue_int_neon_attention,
            [TUE_CONVOLUTION] = convolution,
        },
    .packed_bytes = packed_bytes,
    .pack = pack,
    .scratch_bytes = scratch_bytes,
};

const tue_int_set *tue_int_neondot(void) { return &neondot; }

TUE_NEONDOT_END

#endif
