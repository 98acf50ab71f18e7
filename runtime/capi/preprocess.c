/* Frame to network input: brightness, then a triangle-filter resize in 22-bit fixed point, columns first, then rows.
 *
 * One picture row at a time: its brightness goes to a row buffer that stays in the first-level cache, the column pass
 * makes one 8-bit row of the result's width, and only as many such rows are kept as one output row needs.
 */
#include "dispatch.h"
#include "tue_numerics.h"

enum { PRECISION_BITS = 22, BLOCK = 8, ALIGNMENT = 64 };

/* 16..235 to 0..255, rounded; 235 gives 55 954 before the division, which fits 16 bits. */
TUE_INLINE uint16_t expand(uint8_t code, int limited) {
    if (!limited) return code;
    uint16_t v = code < 16 ? 16 : code > 235 ? 235 : code;
    return (uint16_t)((uint16_t)((v - 16) * 255 + 109) / 219);
}

/* The weights sum to 256, so the sum fits 16 bits. */
TUE_INLINE int32_t luma(uint16_t a, uint16_t b, uint16_t c, const uint16_t weight[3]) {
    return (uint16_t)(a * weight[0] + b * weight[1] + c * weight[2] + 128) >> 8;
}

TUE_INLINE void grey_row(const uint8_t *restrict p, int32_t n, int limited, int32_t *restrict out) {
    for (int32_t x = 0; x < n; x++) out[x] = expand(p[x], limited);
}

TUE_INLINE void packed_row(const uint8_t *restrict p, int32_t n, int step, int limited, const uint16_t weight[3],
                           int32_t *restrict out) {
    const uint16_t w[3] = {weight[0], weight[1], weight[2]};
    for (int32_t x = 0; x < n; x++) {
        const uint8_t *q = p + (ptrdiff_t)x * step;
        out[x] = luma(expand(q[0], limited), expand(q[1], limited), expand(q[2], limited), w);
    }
}

/* Any strides, both signs. */
static void strided_row(const tue_picture *picture, const uint8_t *row, const uint16_t weight[3],
                        int32_t *restrict out) {
    for (int32_t x = 0; x < picture->columns; x++) {
        const uint8_t *p = row + x * picture->column_stride;
        uint16_t a = expand(p[0], picture->limited);
        if (picture->format == TUE_GREY) {
            out[x] = a;
        } else {
            uint16_t b = expand(p[picture->channel_stride], picture->limited);
            uint16_t c = expand(p[2 * picture->channel_stride], picture->limited);
            out[x] = luma(a, b, c, weight);
        }
    }
}

/* `step`: bytes from pixel to pixel where they are packed (1, 3, 4). Constants make each call its own vector loop. */
TUE_CLONES
static void brightness_row(const uint8_t *row, int32_t n, int step, int limited, const uint16_t weight[3],
                           int32_t *out) {
    if (step == 1 && !limited) grey_row(row, n, 0, out);
    if (step == 1 && limited) grey_row(row, n, 1, out);
    if (step == 3 && !limited) packed_row(row, n, 3, 0, weight, out);
    if (step == 3 && limited) packed_row(row, n, 3, 1, weight, out);
    if (step == 4 && !limited) packed_row(row, n, 4, 0, weight, out);
    if (step == 4 && limited) packed_row(row, n, 4, 1, weight, out);
}

TUE_INLINE uint8_t rounded(int32_t sum) {
    sum >>= PRECISION_BITS;
    return (uint8_t)(sum < 0 ? 0 : sum > 255 ? 255 : sum);
}

/* Whole blocks of taps, so that the sum needs no scalar rest: `samples` may be read one filter stride past its end,
 * where zeros stand for zero weights. */
TUE_CLONES
static void column_pass(const int32_t *restrict samples, const tue_filter *filter, uint8_t *restrict out) {
    const int32_t *restrict first = filter->first, *restrict weights = filter->weights;
    int32_t taps = (filter->span + BLOCK - 1) / BLOCK * BLOCK, stride = filter->stride, n = filter->out_size;
    for (int32_t i = 0; i < n; i++) {
        const int32_t *s = samples + first[i], *w = weights + (ptrdiff_t)i * stride;
        int32_t sum = 1 << (PRECISION_BITS - 1);
        for (int32_t t = 0; t < taps / BLOCK * BLOCK; t++) sum += s[t] * w[t];
        out[i] = rounded(sum);
    }
}

TUE_INLINE void add_row(const uint8_t *restrict row, int32_t weight, int32_t n, int32_t *restrict sum) {
    for (int32_t x = 0; x < n; x++) sum[x] += row[x] * weight;
}

/* One output row from `taps` rows of the ring, the first of which lies in slot `slot`. */
TUE_CLONES
static void row_pass(const uint8_t *ring, int32_t slots, int32_t slot, const int32_t *weights, int32_t taps, int32_t n,
                     int32_t *restrict sum, uint8_t *restrict out) {
    for (int32_t x = 0; x < n; x++) sum[x] = 1 << (PRECISION_BITS - 1);
    for (int32_t t = 0; t < taps; t++) {
        add_row(ring + (ptrdiff_t)slot * n, weights[t], n, sum);
        if (++slot == slots) slot = 0;
    }
    for (int32_t x = 0; x < n; x++) out[x] = rounded(sum[x]);
}

static int usable_filter(const tue_filter *f) {
    if (!f || !f->first || !f->weights || f->in_size < 1 || f->in_size > TUE_MAX_SIDE || f->out_size < 1 ||
        f->out_size > TUE_MAX_SIDE || f->span < 1 || f->span > f->stride || f->stride % BLOCK != 0 ||
        f->stride > 4 * TUE_MAX_SIDE)
        return 0;
    int32_t last = 0;
    for (int32_t i = 0; i < f->out_size; i++) { /* the ring relies on an order that never goes back */
        if (f->first[i] < last || f->first[i] >= f->in_size) return 0;
        last = f->first[i];
    }
    return 1;
}

static size_t rounded_up(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static size_t samples_bytes(const tue_filter *f) {
    return rounded_up(((size_t)f->in_size + (size_t)f->stride) * sizeof(int32_t));
}

size_t tue_preprocess_scratch(const tue_filter *along_columns, const tue_filter *along_rows) {
    if (!usable_filter(along_columns) || !usable_filter(along_rows)) return 0;
    size_t width = (size_t)along_columns->out_size;
    return ALIGNMENT + samples_bytes(along_columns) + rounded_up(width * sizeof(int32_t)) +
           width * (size_t)along_rows->span;
}

/* Says how the vector loops can read the picture: bytes from pixel to pixel, or 0. A channel order that runs backwards
 * (a BGR frame seen as pixels[..., ::-1]) is read forwards with the weights turned round. */
static int packed_step(const tue_picture *picture, uint16_t weight[3], ptrdiff_t *shift) {
    *shift = 0;
    if (picture->format == TUE_GREY) return picture->column_stride == 1 ? 1 : 0;
    if (picture->column_stride != 3 && picture->column_stride != 4) return 0;
    if (picture->channel_stride == 1) return (int)picture->column_stride;
    if (picture->channel_stride != -1) return 0;
    uint16_t swap = weight[0];
    weight[0] = weight[2];
    weight[2] = swap;
    *shift = -2;
    return (int)picture->column_stride;
}

int32_t tue_preprocess(const tue_picture *picture, const tue_filter *along_columns, const tue_filter *along_rows,
                       uint8_t *out, ptrdiff_t out_stride, void *scratch, size_t scratch_bytes) {
    size_t need = tue_preprocess_scratch(along_columns, along_rows);
    if (!picture || !picture->pixels || !out || !scratch || need == 0) return TUE_BAD_ARGUMENT;
    if (picture->columns != along_columns->in_size || picture->rows != along_rows->in_size) return TUE_BAD_ARGUMENT;
    if (picture->format < TUE_GREY || picture->format > TUE_RGBA) return TUE_BAD_ARGUMENT;
    if (scratch_bytes < need) return TUE_SMALL_SCRATCH;

    int32_t width = along_columns->out_size, slots = along_rows->span;
    uint8_t *bytes = (uint8_t *)(((uintptr_t)scratch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    int32_t *samples = (int32_t *)bytes;
    int32_t *sum = (int32_t *)(bytes + samples_bytes(along_columns));
    uint8_t *ring = (uint8_t *)sum + rounded_up((size_t)width * sizeof(int32_t));
    memset(samples + picture->columns, 0, (size_t)along_columns->stride * sizeof(int32_t));

    uint16_t weight[3] = {77, 150, 29};
    if (picture->format == TUE_BGR) weight[0] = 29, weight[2] = 77;
    ptrdiff_t shift;
    int step = packed_step(picture, weight, &shift);

    int32_t next = 0; /* first picture row that has not been through the column pass */
    for (int32_t i = 0; i < along_rows->out_size; i++) {
        int32_t first = along_rows->first[i];
        int32_t end = picture->rows - first < slots ? picture->rows : first + slots;
        if (next < first) next = first;
        for (; next < end; next++) {
            const uint8_t *row = picture->pixels + next * picture->row_stride;
            if (step)
                brightness_row(row + shift, picture->columns, step, picture->limited, weight, samples);
            else
                strided_row(picture, row, weight, samples);
            column_pass(samples, along_columns, ring + (ptrdiff_t)(next % slots) * width);
        }
        const int32_t *weights = along_rows->weights + (ptrdiff_t)i * along_rows->stride;
        row_pass(ring, slots, first % slots, weights, end - first, width, sum, out + i * out_stride);
    }
    return TUE_OK;
}
