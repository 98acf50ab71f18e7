/* exp, log, atan and square roots of which every machine gives the same bits: numerics/exact.py, line by line.
 *
 * Compile with -ffp-contract=off: a fused multiply-add rounds once where the definition rounds twice. */
#ifndef TUE_EXACT_H
#define TUE_EXACT_H

#include "dispatch.h"
#include "tue_numerics.h"

#if defined(__GNUC__)
#define TUE_SQRT(x) __builtin_sqrt(x)
#else
#include <math.h>
#define TUE_SQRT(x) sqrt(x)
#endif

#define TUE_LOG2_E 1.4426950408889634
#define TUE_LN2_HIGH 0.6931471803691238
#define TUE_LN2_LOW 1.9082149292705877e-10
#define TUE_EXP_LIMIT 700.0
#define TUE_DEGREES 57.29577951308232
#define TUE_PI 3.141592653589793
#define TUE_HALF_PI 1.5707963267948966
#define TUE_QUARTER_PI 0.7853981633974483
#define TUE_TAN_EIGHTH 0.4142135623730950

TUE_INLINE double tue_max(double a, double b) { return a > b ? a : b; }
TUE_INLINE double tue_min(double a, double b) { return a < b ? a : b; }

/* The largest whole number that is not above x, |x| < 2^31. */
TUE_INLINE double tue_floor(double x) {
    double whole = (double)(int32_t)x;
    return whole > x ? whole - 1.0 : whole;
}

/* Written out, so that a loop over it becomes vector code. */
TUE_INLINE double tue_exp(double x) {
    x = tue_min(tue_max(x, -TUE_EXP_LIMIT), TUE_EXP_LIMIT);
    double k = tue_floor(x * TUE_LOG2_E + 0.5);
    double r = (x - k * TUE_LN2_HIGH) - k * TUE_LN2_LOW;
    double total = (1.0 / 6227020800.0) * r + 1.0 / 479001600.0;
    total = total * r + 1.0 / 39916800.0;
    total = total * r + 1.0 / 3628800.0;
    total = total * r + 1.0 / 362880.0;
    total = total * r + 1.0 / 40320.0;
    total = total * r + 1.0 / 5040.0;
    total = total * r + 1.0 / 720.0;
    total = total * r + 1.0 / 120.0;
    total = total * r + 1.0 / 24.0;
    total = total * r + 1.0 / 6.0;
    total = total * r + 1.0 / 2.0;
    total = total * r + 1.0;
    total = total * r + 1.0;
    /* 2^k from its exponent: -1010 <= k <= 1010, so it is neither 0 nor infinite */
    union {
        int64_t bits;
        double value;
    } power;
    power.bits = (int64_t)((uint64_t)(int64_t)((int32_t)k + 1023) << 52);
    return total * power.value;
}

/* Natural logarithm of a positive, finite number that is not subnormal. */
double tue_log(double x);
double tue_direction_deg(double cosine, double sine);
double tue_ramanujan(double a, double b);

/* Centre and second central moments of a filled ellipse or mask. */
typedef struct tue_covariance {
    double col, row, xx, xy, yy;
} tue_covariance;

/* Column and row of the centre, semi-axes, cosine and sine of the direction of the first one. */
typedef struct tue_ellipse {
    double col, row, a, b, c, s;
} tue_ellipse;

/* Semi-axes and the direction of the major one. */
typedef struct tue_axes {
    double major, minor, cosine, sine;
} tue_axes;

tue_covariance tue_covariance_of(const int64_t sums[6]);
tue_covariance tue_scaled(tue_covariance moments, double per_col, double per_row);
tue_axes tue_axes_of(tue_covariance moments);
tue_covariance tue_moments_of(tue_ellipse ellipse);

/* The ellipse that holds the largest sum of clipped margins; `prefix` has room for rows x (columns + 1) doubles. */
tue_ellipse tue_fit_logits(const double *margin, int32_t rows, int32_t columns, tue_covariance start, double *prefix);

/* Dice of a contiguous mask of 0 and 1 and the pixels whose centres lie in an ellipse. */
double tue_agreement(const uint8_t *mask, int32_t rows, int32_t columns, tue_ellipse ellipse);

#endif
