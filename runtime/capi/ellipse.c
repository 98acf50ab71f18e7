/* The ellipse of a mask, from its moments and from the logits around it: numerics/ellipse.py, line by line. */
#include "exact.h"

#define CLIP 3.0
#define LEAST 1.0

double tue_log(double x) {
    union {
        double value;
        uint64_t bits;
    } parts = {x};
    int32_t k = (int32_t)(parts.bits >> 52) - 1022;
    parts.bits = (parts.bits & 0x000fffffffffffffULL) | 0x3fe0000000000000ULL; /* 0.5 <= m < 1 */
    double m = parts.value;
    if (m < 0.7071067811865476) {
        m = m + m;
        k = k - 1;
    }
    double s = (m - 1.0) / (m + 1.0), square = s * s, total = 1.0 / 23.0;
    for (int n = 10; n >= 0; n--) total = total * square + 1.0 / (2.0 * n + 1.0);
    return k * TUE_LN2_HIGH + (2.0 * s * total + k * TUE_LN2_LOW);
}

float tue_logit(double probability) {
    if (!(probability > 0.0 && probability < 1.0)) return 0.0f;
    return (float)tue_log(probability / (1.0 - probability));
}

static double arc_tangent(double z) {
    int large = z > TUE_TAN_EIGHTH;
    double w = large ? (z - 1.0) / (z + 1.0) : z, square = w * w, total = 1.0 / 41.0;
    for (int n = 19; n >= 0; n--) total = 1.0 / (2.0 * n + 1.0) - total * square;
    return large ? TUE_QUARTER_PI + w * total : w * total;
}

double tue_direction_deg(double cosine, double sine) {
    double size = sine < 0.0 ? -sine : sine;
    int steep = size > cosine;
    double angle = arc_tangent(steep ? cosine / size : size / cosine);
    if (steep) angle = TUE_HALF_PI - angle;
    angle = angle * TUE_DEGREES;
    return sine < 0.0 && angle < 90.0 ? -angle : angle;
}

double tue_ramanujan(double a, double b) {
    if (a + b <= 0.0) return 0.0;
    double q = (a - b) / (a + b), h = q * q;
    return TUE_PI * (a + b) * (1.0 + 3.0 * h / (10.0 + TUE_SQRT(4.0 - 3.0 * h)));
}

#if defined(__SIZEOF_INT128__) && !defined(TUE_NO_INT128)

/* a b - c d of sums from 0 to below 2^57, exact up to the one rounding to a double. */
static double difference(int64_t a, int64_t b, int64_t c, int64_t d) {
    __extension__ typedef __int128 wide;
    return (double)((wide)a * b - (wide)c * d);
}

#else /* the same in two words of 64 bits, for compilers without wider ones */

typedef struct words {
    uint64_t high, low;
} words;

static words product(uint64_t a, uint64_t b) {
    uint64_t a_low = a & 0xffffffffu, a_high = a >> 32, b_low = b & 0xffffffffu, b_high = b >> 32;
    uint64_t lowest = a_low * b_low, middle = a_high * b_low + (lowest >> 32), other = a_low * b_high + (middle & 0xffffffffu);
    words out = {a_high * b_high + (middle >> 32) + (other >> 32), other << 32 | (lowest & 0xffffffffu)};
    return out;
}

/* Rounded once, to the nearest, ties to even: what is cut off below 64 bits leaves its mark in the last of them. */
static double nearest(words w) {
    double scale = 1.0;
    if (w.high == 0) return (double)w.low;
    for (int shift = 64; shift > 0; shift--) {
        if (w.high >> 63) break;
        w.high = w.high << 1 | w.low >> 63;
        w.low <<= 1;
        scale *= 0.5;
    }
    return (double)(w.high | (w.low != 0)) * (18446744073709551616.0 * scale);
}

static double difference(int64_t a, int64_t b, int64_t c, int64_t d) {
    words one = product((uint64_t)a, (uint64_t)b), other = product((uint64_t)c, (uint64_t)d);
    int negative = one.high < other.high || (one.high == other.high && one.low < other.low);
    words large = negative ? other : one, small = negative ? one : other;
    words left = {large.high - small.high - (large.low < small.low), large.low - small.low};
    return negative ? -nearest(left) : nearest(left);
}

#endif

tue_covariance tue_covariance_of(const int64_t sums[6]) {
    double n = (double)sums[0], area = n * n;
    tue_covariance out = {(double)sums[1] / n, (double)sums[2] / n, difference(sums[0], sums[3], sums[1], sums[1]) / area,
                          difference(sums[0], sums[4], sums[1], sums[2]) / area,
                          difference(sums[0], sums[5], sums[2], sums[2]) / area};
    return out;
}

tue_covariance tue_scaled(tue_covariance m, double per_col, double per_row) {
    m.xx = m.xx * per_col * per_col;
    m.xy = m.xy * per_col * per_row;
    m.yy = m.yy * per_row * per_row;
    return m;
}

tue_axes tue_axes_of(tue_covariance m) {
    double middle = 0.5 * (m.xx + m.yy), half = 0.5 * (m.xx - m.yy);
    double spread = TUE_SQRT(half * half + m.xy * m.xy);
    tue_axes out = {2.0 * TUE_SQRT(middle + spread), 2.0 * TUE_SQRT(tue_max(0.0, middle - spread)), 1.0, 0.0};
    if (spread == 0.0) return out;
    if (half >= 0.0) {
        out.cosine = TUE_SQRT(0.5 * (1.0 + half / spread));
        out.sine = 0.5 * m.xy / (spread * out.cosine);
        return out;
    }
    out.sine = TUE_SQRT(0.5 * (1.0 - half / spread));
    out.cosine = 0.5 * m.xy / (spread * out.sine);
    if (out.cosine < 0.0) {
        out.cosine = -out.cosine;
        out.sine = -out.sine;
    }
    return out;
}

tue_covariance tue_moments_of(tue_ellipse e) {
    double along = 0.25 * e.a * e.a, across = 0.25 * e.b * e.b;
    tue_covariance out = {e.col, e.row, along * e.c * e.c + across * e.s * e.s, (along - across) * e.c * e.s,
                          along * e.s * e.s + across * e.c * e.c};
    return out;
}

/* What all rows of one ellipse share. */
typedef struct shape {
    double col, row, along, thin, slope, fall;
} shape;

TUE_INLINE shape shape_of(tue_ellipse e) {
    double inverse_a = 1.0 / (e.a * e.a), inverse_b = 1.0 / (e.b * e.b);
    double along = e.c * e.c * inverse_a + e.s * e.s * inverse_b;
    double mixed = e.c * e.s * (inverse_a - inverse_b);
    shape out = {e.col, e.row, along, 1.0 / along, mixed / along, inverse_a * inverse_b};
    return out;
}

TUE_INLINE void cut(shape e, double row, double *low, double *high) {
    double down = row - e.row, under = e.along - e.fall * (down * down);
    double root = TUE_SQRT(tue_max(under, 0.0)) * e.thin;
    double half = under > 0.0 ? root : -1.0;
    double middle = e.col - e.slope * down;
    *low = middle - half;
    *high = middle + half;
}

TUE_INLINE double up_to(const double *prefix, int32_t width, double col) {
    double place = tue_min(tue_max(col + 0.5, 0.0), (double)width);
    int32_t whole = (int32_t)place;
    if (whole > width - 1) whole = width - 1;
    double left = prefix[whole];
    return left + (place - whole) * (prefix[whole + 1] - left);
}

enum { ROWS = 64 };

/* Square roots of many rows at once. */
TUE_CLONES
static void cut_rows(const shape *e, int32_t first, int32_t count, double *low, double *high) {
    shape known = *e;
    for (int32_t i = 0; i < count; i++) cut(known, (double)(first + i), low + i, high + i);
}

static double inside(const double *prefix, int32_t rows, int32_t width, tue_ellipse e) {
    shape known = shape_of(e);
    double sum = 0.0, low[ROWS], high[ROWS];
    /* rows that the ellipse cannot reach add nothing; one to each side for what rounding may say */
    double reach = TUE_SQRT(known.along / known.fall);
    int32_t first = (int32_t)tue_min(tue_max(known.row - reach - 1.0, 0.0), (double)rows);
    int32_t last = (int32_t)tue_min(tue_max(known.row + reach + 2.0, 0.0), (double)rows);
    for (int32_t begin = first; begin < last; begin += ROWS) {
        int32_t count = last - begin < ROWS ? last - begin : ROWS;
        cut_rows(&known, begin, count, low, high);
        for (int32_t i = 0; i < count; i++) {
            if (!(high[i] > low[i])) continue;
            const double *line = prefix + (ptrdiff_t)(begin + i) * (width + 1);
            sum += up_to(line, width, high[i]) - up_to(line, width, low[i]);
        }
    }
    return sum;
}

static tue_ellipse moved(tue_ellipse e, int which, double way) {
    if (which == 0) {
        e.col = e.col + way * e.c;
        e.row = e.row + way * e.s;
    } else if (which == 1) {
        e.col = e.col - way * e.s;
        e.row = e.row + way * e.c;
    } else if (which == 2) {
        e.a = tue_max(e.a + way, LEAST);
    } else if (which == 3) {
        e.b = tue_max(e.b + way, LEAST);
    } else {
        double half = way / (2.0 * tue_max(e.a, e.b)), norm = 1.0 + half * half;
        double cosine = (1.0 - half * half) / norm, sine = (half + half) / norm, c = e.c, s = e.s;
        e.c = c * cosine - s * sine;
        e.s = s * cosine + c * sine;
    }
    return e;
}

/* Four rows at a time: each sum waits for the one before, the rows do not wait for each other. */
static void fill_prefix(const double *margin, int32_t rows, int32_t columns, double *prefix) {
    int32_t r = 0;
    for (; r + 4 <= rows; r += 4) {
        const double *m[4];
        double *p[4], sum[4] = {0.0, 0.0, 0.0, 0.0};
        for (int i = 0; i < 4; i++) {
            m[i] = margin + (ptrdiff_t)(r + i) * columns;
            p[i] = prefix + (ptrdiff_t)(r + i) * (columns + 1);
            p[i][0] = 0.0;
        }
        for (int32_t x = 0; x < columns; x++) {
            for (int i = 0; i < 4; i++) {
                sum[i] += tue_min(tue_max(m[i][x], -CLIP), CLIP);
                p[i][x + 1] = sum[i];
            }
        }
    }
    for (; r < rows; r++) {
        double sum = 0.0, *p = prefix + (ptrdiff_t)r * (columns + 1);
        p[0] = 0.0;
        for (int32_t x = 0; x < columns; x++) {
            sum += tue_min(tue_max(margin[(ptrdiff_t)r * columns + x], -CLIP), CLIP);
            p[x + 1] = sum;
        }
    }
}

tue_ellipse tue_fit_logits(const double *margin, int32_t rows, int32_t columns, tue_covariance start, double *prefix) {
    static const double steps[4] = {4.0, 2.0, 1.0, 0.5};
    fill_prefix(margin, rows, columns, prefix);
    tue_axes axes = tue_axes_of(start);
    tue_ellipse best = {start.col,   start.row, tue_max(axes.major, LEAST), tue_max(axes.minor, LEAST), axes.cosine,
                        axes.sine};
    double most = inside(prefix, rows, columns, best);
    for (int i = 0; i < 4; i++) {
        for (int which = 0; which < 5; which++) {
            double step = steps[i], way;
            tue_ellipse low = moved(best, which, -step), high = moved(best, which, step);
            double below = inside(prefix, rows, columns, low), above = inside(prefix, rows, columns, high);
            double bend = 2.0 * most - below - above;
            if (bend > 0.0) {
                way = step * (above - below) / (2.0 * bend);
                way = tue_min(tue_max(way, -2.0 * step), 2.0 * step);
            } else {
                way = above > below ? 2.0 * step : -2.0 * step;
            }
            tue_ellipse peak = moved(best, which, way);
            double top = inside(prefix, rows, columns, peak);
            if (top > most) most = top, best = peak;
            if (above > most) most = above, best = high;
            if (below > most) most = below, best = low;
        }
    }
    return best;
}

double tue_agreement(const uint8_t *mask, int32_t rows, int32_t columns, tue_ellipse ellipse) {
    shape known = shape_of(ellipse);
    int64_t both = 0, total = 0;
    for (int32_t r = 0; r < rows; r++) {
        const uint8_t *line = mask + (ptrdiff_t)r * columns;
        double low, high;
        cut(known, (double)r, &low, &high);
        /* the first centre at or behind `low`, the last one at or before `high` */
        low = tue_min(tue_max(low, -1.0), (double)columns);
        high = tue_min(tue_max(high, -1.0), (double)columns);
        double floor_low = tue_floor(low);
        int32_t first = (int32_t)(floor_low < low ? floor_low + 1.0 : floor_low), last = (int32_t)tue_floor(high);
        if (first < 0) first = 0;
        if (last > columns - 1) last = columns - 1;
        if (last >= first) total += last - first + 1;
        for (int32_t x = 0; x < columns; x++) {
            total += line[x];
            both += line[x] && x >= first && x <= last;
        }
    }
    return total ? 2.0 * (double)both / (double)total : 0.0;
}
