/* What is measured of one label: component, confidence, field of view, ellipse: numerics/measure.py, line by line. */
#include "exact.h"
#include "runs.h"

enum { ALIGNMENT = 64 };

static size_t rounded_up(size_t bytes) { return (bytes + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT; }

static size_t larger(size_t a, size_t b) { return a > b ? a : b; }

static size_t kernels_scratch(int32_t rows, int32_t columns) {
    size_t most = larger(tue_components_scratch(rows, columns), tue_holes_scratch(rows, columns));
    return larger(most, tue_view_scratch(rows, columns));
}

/* two masks, codes, margins, prefix sums, one row of chances, and what the kernels need one after another */
size_t tue_measure_scratch(int32_t rows, int32_t columns) {
    size_t kernels = kernels_scratch(rows, columns), pixels = (size_t)rows * (size_t)columns;
    if (kernels == 0) return 0;
    return ALIGNMENT + 3 * rounded_up(pixels) + rounded_up(pixels * sizeof(double)) +
           rounded_up((pixels + (size_t)rows) * sizeof(double)) + rounded_up((size_t)columns * sizeof(double)) + kernels;
}

/* Parts of the scratch, and the box of the frame in it. */
typedef struct room {
    uint8_t *inner, *part, *codes;
    double *margin, *prefix, *chances;
    void *kernels;
    size_t kernel_bytes;
    int32_t top, left, rows, columns;
} room;

static room rooms(void *scratch, size_t scratch_bytes, const tue_view *view) {
    room r;
    size_t pixels = (size_t)view->box[2] * (size_t)view->box[3];
    uint8_t *at = (uint8_t *)(((uintptr_t)scratch + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    r.top = view->box[0], r.left = view->box[1], r.rows = view->box[2], r.columns = view->box[3];
    r.inner = at, at += rounded_up(pixels);
    r.part = at, at += rounded_up(pixels);
    r.codes = at, at += rounded_up(pixels);
    r.margin = (double *)at, at += rounded_up(pixels * sizeof(double));
    r.prefix = (double *)at, at += rounded_up((pixels + (size_t)r.rows) * sizeof(double));
    r.chances = (double *)at, at += rounded_up((size_t)r.columns * sizeof(double));
    r.kernels = at;
    r.kernel_bytes = scratch_bytes - (size_t)(at - (uint8_t *)scratch);
    return r;
}

/* Probability of the only label at n neighbouring pixels. */
TUE_CLONES
static void sigmoids(const float *restrict logits, int32_t n, double *restrict out) {
    for (int32_t x = 0; x < n; x++) out[x] = 1.0 / (1.0 + tue_exp(-(double)logits[x]));
}

/* Probability of one of several labels, `plane` floats apart from channel to channel. */
static void chances_of(const float *logits, ptrdiff_t plane, int32_t channels, int32_t index, int32_t n, double *out) {
    if (channels == 1) {
        sigmoids(logits, n, out);
        return;
    }
    for (int32_t x = 0; x < n; x++) {
        double most = (double)logits[x], sum = 0.0, mine = 0.0;
        for (int32_t k = 1; k < channels; k++) most = tue_max(most, (double)logits[k * plane + x]);
        for (int32_t k = 0; k < channels; k++) {
            double power = tue_exp((double)logits[k * plane + x] - most);
            sum = k ? sum + power : power;
            if (k == index) mine = power;
        }
        out[x] = mine / sum;
    }
}

static double confidence(const room *r, const float *logits, const tue_asked *asked, int64_t count) {
    ptrdiff_t plane = (ptrdiff_t)asked->rows * asked->columns;
    double total = 0.0;
    for (int32_t y = 0; y < r->rows; y++) {
        const uint8_t *row = r->part + (ptrdiff_t)y * r->columns;
        const float *line = logits + (ptrdiff_t)(r->top + y) * asked->columns + r->left;
        int32_t start, end = 0;
        double sum = 0.0;
        while (tue_next_run(row, r->columns, end, &start, &end)) {
            chances_of(line + start, plane, asked->channels, asked->index, end - start, r->chances);
            for (int32_t x = 0; x < end - start; x++) sum += r->chances[x];
        }
        total += sum;
    }
    return total / (double)count;
}

static void margins(const room *r, const float *logits, const tue_asked *asked) {
    ptrdiff_t plane = (ptrdiff_t)asked->rows * asked->columns;
    for (int32_t y = 0; y < r->rows; y++) {
        const float *line = logits + (ptrdiff_t)(r->top + y) * asked->columns + r->left;
        double *out = r->margin + (ptrdiff_t)y * r->columns;
        if (asked->channels == 1) {
            for (int32_t x = 0; x < r->columns; x++) out[x] = (double)line[x] - (double)asked->cut;
            continue;
        }
        for (int32_t x = 0; x < r->columns; x++) {
            int32_t first = asked->index == 0 ? 1 : 0;
            float other = line[first * plane + x];
            for (int32_t k = first + 1; k < asked->channels; k++)
                if (k != asked->index && line[k * plane + x] > other) other = line[k * plane + x];
            out[x] = (double)line[asked->index * plane + x] - (double)other;
        }
    }
}

static int touches(const room *r) {
    size_t last = (size_t)(r->rows - 1) * (size_t)r->columns;
    for (int32_t x = 0; x < r->columns; x++)
        if (r->part[x] || r->part[last + (size_t)x]) return 1;
    for (int32_t y = 0; y < r->rows; y++) {
        const uint8_t *row = r->part + (ptrdiff_t)y * r->columns;
        if (row[0] || row[r->columns - 1]) return 1;
    }
    return 0;
}

static void box_of(const room *r, int32_t box[4]) {
    int32_t top = r->rows, bottom = -1, left = r->columns, right = -1;
    for (int32_t y = 0; y < r->rows; y++) {
        int32_t start, end = 0;
        while (tue_next_run(r->part + (ptrdiff_t)y * r->columns, r->columns, end, &start, &end)) {
            if (top > y) top = y;
            bottom = y;
            if (start < left) left = start;
            if (end - 1 > right) right = end - 1;
        }
    }
    box[0] = top, box[1] = left, box[2] = bottom - top + 1, box[3] = right - left + 1;
}

static void on_frame(const tue_view *v, double per_row, double per_col, double row, double col, double out[2]) {
    out[0] = (row + 0.5) * per_row + (double)v->crop[0] - 0.5;
    out[1] = (col + 0.5) * per_col + (double)v->crop[1] - 0.5;
}

static void read_ellipse(const room *r, const float *logits, const tue_view *v, const tue_asked *asked,
                         tue_covariance start, double per_row, double per_col, tue_measurement *out) {
    margins(r, logits, asked);
    tue_ellipse ellipse = tue_fit_logits(r->margin, r->rows, r->columns, start, r->prefix);
    tue_covariance found = tue_moments_of(ellipse);
    tue_axes axes = tue_axes_of(tue_scaled(found, per_col, per_row));
    out->hc_px = tue_ramanujan(axes.major, axes.minor);
    out->axes_px[0] = 2.0 * axes.major;
    out->axes_px[1] = 2.0 * axes.minor;
    out->angle_deg = tue_direction_deg(axes.cosine, axes.sine);
    on_frame(v, per_row, per_col, found.row, found.col, out->centre_px);
    out->agreement = tue_agreement(r->part, r->rows, r->columns, ellipse);
    if (!v->has_spacing) return;
    tue_axes in_mm = tue_axes_of(tue_scaled(found, v->spacing_mm[1], v->spacing_mm[0]));
    out->hc_mm = tue_ramanujan(in_mm.major, in_mm.minor);
    out->axes_mm[0] = 2.0 * in_mm.major;
    out->axes_mm[1] = 2.0 * in_mm.minor;
}

/* The largest component of the label inside the frame's box, to room and to `component`. */
static int32_t take_component(const room *r, const uint8_t *mask, const tue_asked *asked, uint8_t *component) {
    int64_t area;
    for (int32_t y = 0; y < r->rows; y++) {
        const uint8_t *line = mask + (ptrdiff_t)(r->top + y) * asked->columns + r->left;
        uint8_t *inner = r->inner + (ptrdiff_t)y * r->columns;
        for (int32_t x = 0; x < r->columns; x++) inner[x] = line[x] == asked->index;
    }
    int32_t status = tue_largest_component(r->inner, r->rows, r->columns, r->part, &area, r->kernels, r->kernel_bytes);
    if (status == TUE_OK && asked->ellipse) {
        memcpy(r->inner, r->part, (size_t)r->rows * (size_t)r->columns);
        status = tue_fill_holes(r->inner, r->rows, r->columns, r->part, r->kernels, r->kernel_bytes);
    }
    memset(component, 0, (size_t)asked->rows * (size_t)asked->columns);
    for (int32_t y = 0; y < r->rows; y++)
        memcpy(component + (ptrdiff_t)(r->top + y) * asked->columns + r->left, r->part + (ptrdiff_t)y * r->columns,
               (size_t)r->columns);
    return status;
}

static int32_t read_part(const room *r, const float *logits, const uint8_t *codes, const tue_view *v,
                         const tue_asked *asked, const int64_t sums[6], tue_measurement *out) {
    double per_row = (double)v->crop[2] / (double)r->rows, per_col = (double)v->crop[3] / (double)r->columns;
    tue_covariance middle = tue_covariance_of(sums);
    int32_t box[4], points[2 * TUE_CONTOUR_POINTS], status;
    box_of(r, box);
    out->confidence = confidence(r, logits, asked, sums[0]);
    out->area_px = (double)sums[0] * (per_row * per_col);
    if (v->has_spacing) out->area_mm2 = (double)sums[0] * (v->spacing_mm[0] * v->spacing_mm[1]);
    out->box_px[0] = (double)box[0] * per_row + (double)v->crop[0];
    out->box_px[1] = (double)box[1] * per_col + (double)v->crop[1];
    out->box_px[2] = (double)box[2] * per_row;
    out->box_px[3] = (double)box[3] * per_col;
    on_frame(v, per_row, per_col, middle.row, middle.col, out->centroid_px);
    status = tue_contour(r->part, r->rows, r->columns, TUE_CONTOUR_POINTS, points, &out->contour_points);
    for (int32_t i = 0; status == TUE_OK && i < out->contour_points; i++)
        on_frame(v, per_row, per_col, (double)points[2 * i], (double)points[2 * i + 1], out->contour_px + 2 * i);
    if (status == TUE_OK && codes) {
        for (int32_t y = 0; y < r->rows; y++)
            memcpy(r->codes + (ptrdiff_t)y * r->columns, codes + (ptrdiff_t)(r->top + y) * asked->columns + r->left,
                   (size_t)r->columns);
        status = tue_cut_by_sector(r->part, r->codes, r->rows, r->columns, &out->cut_by_sector, r->kernels,
                                   r->kernel_bytes);
    }
    out->touches_border = touches(r) || out->cut_by_sector;
    if (status == TUE_OK && asked->ellipse) read_ellipse(r, logits, v, asked, middle, per_row, per_col, out);
    return status;
}

static int usable(const tue_view *v, const tue_asked *a) {
    if (a->rows < 1 || a->columns < 1 || a->rows > TUE_MAX_SIDE || a->columns > TUE_MAX_SIDE) return 0;
    if (a->channels < 1 || a->index < 0 || (a->channels > 1 && a->index >= a->channels)) return 0;
    if (v->box[0] < 0 || v->box[1] < 0 || v->box[2] < 1 || v->box[3] < 1 || v->crop[2] < 1 || v->crop[3] < 1) return 0;
    return v->box[2] <= a->rows - v->box[0] && v->box[3] <= a->columns - v->box[1];
}

int32_t tue_measure(const uint8_t *mask, const float *logits, const uint8_t *codes, const tue_view *view,
                    const tue_asked *asked, uint8_t *component, tue_measurement *out, void *scratch,
                    size_t scratch_bytes) {
    if (!mask || !logits || !view || !asked || !component || !out || !scratch || !usable(view, asked))
        return TUE_BAD_ARGUMENT;
    size_t need = tue_measure_scratch(view->box[2], view->box[3]);
    if (need == 0) return TUE_BAD_ARGUMENT;
    if (scratch_bytes < need) return TUE_SMALL_SCRATCH;
    int64_t sums[6];
    memset(out, 0, sizeof(*out));
    room r = rooms(scratch, scratch_bytes, view);
    int32_t status = take_component(&r, mask, asked, component);
    if (status != TUE_OK) return status;
    status = tue_moments(r.part, r.rows, r.columns, sums);
    double least = asked->min_area * (double)((int64_t)r.rows * r.columns);
    if (status != TUE_OK || sums[0] == 0 || (double)sums[0] < least) return status;
    out->found = 1;
    out->pixels = sums[0];
    return read_part(&r, logits, codes, view, asked, sums, out);
}
