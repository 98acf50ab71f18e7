#include "prepare.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { KEPT = 72, BLOCK = 8, PRECISION_BITS = 22 };

typedef struct kept_filter {
    tue_filter filter;
    int32_t *memory; /* first, then weights */
    uint64_t used;
} kept_filter;

struct preparer {
    const model_spec *spec;
    kept_filter kept[KEPT];
    uint64_t uses;
    uint8_t *scratch;
    size_t scratch_bytes;
};

size_t spec_input_bytes(const model_spec *spec) {
    return (size_t)(spec->grey ? 1 : 3) * (size_t)spec->rows * (size_t)spec->columns;
}

tusfm_status *preparer_new(const model_spec *spec, preparer **made) {
    *made = calloc(1, sizeof **made);
    if (!*made) return no_memory();
    (*made)->spec = spec;
    return NULL;
}

void preparer_free(preparer *p) {
    if (!p) return;
    for (int i = 0; i < KEPT; i++) free(p->kept[i].memory);
    free(p->scratch);
    free(p);
}

/* ---- where the frame lies ---- */

static int32_t frame_rows(const tusfm_frame *f) { return f->roi_rows ? f->roi_rows : f->rows; }
static int32_t frame_columns(const tusfm_frame *f) { return f->roi_rows ? f->roi_columns : f->columns; }

static int64_t channels(int32_t format) { return format == TUSFM_GREY ? 1 : format == TUSFM_RGBA ? 4 : 3; }

static int plausible(double spacing) { return spacing > 1e-4 && spacing < 100; }

tusfm_status *frame_check(const tusfm_frame *frame) {
    if (!frame->pixels) return status_new(TUSFM_FRAME, "the frame has no pixels");
    if (frame->format < TUSFM_GREY || frame->format > TUSFM_RGBA)
        return status_new(TUSFM_FRAME, "the frame's format %d is not known", frame->format);
    if (frame->rows < 1 || frame->columns < 1)
        return status_new(TUSFM_FRAME, "an image of %dx%d pixels is none", frame->columns, frame->rows);
    if (frame->roi_rows &&
        (frame->roi_row < 0 || frame->roi_column < 0 || frame->roi_rows < 0 || frame->roi_columns < 0 ||
         frame->roi_rows > frame->rows - frame->roi_row || frame->roi_columns > frame->columns - frame->roi_column))
        return status_new(TUSFM_FRAME, "the region of interest does not lie inside the image");
    int32_t rows = frame_rows(frame), columns = frame_columns(frame);
    if (rows < 8 || columns < 8 || rows > TUE_MAX_SIDE || columns > TUE_MAX_SIDE)
        return status_new(TUSFM_FRAME, "frame of %dx%d pixels: sides must be 8 to 16384", columns, rows);
    int64_t used = (int64_t)frame->columns * channels(frame->format), stride = frame->row_stride;
    if (stride != 0 && stride < used && stride > -used)
        return status_new(TUSFM_FRAME, "rows of %lld bytes do not fit a stride of %lld", (long long)used,
                          (long long)stride);
    double row = frame->spacing_row_mm, column = frame->spacing_column_mm;
    if ((row != 0 || column != 0) && !(plausible(row) && plausible(column)))
        return status_new(TUSFM_FRAME, "spacing %g, %g mm is not plausible: give both in mm, or 0", row, column);
    if (frame->seq < 0) return status_new(TUSFM_FRAME, "a running number below 0");
    return NULL;
}

tusfm_status *frame_place(const tusfm_frame *frame, const model_spec *spec, placement *place) {
    int32_t rows = frame_rows(frame), columns = frame_columns(frame);
    int64_t row = 0, column = 0, height = rows, width = columns;
    if (spec->has_crop) row = spec->crop[0], column = spec->crop[1], height = spec->crop[2], width = spec->crop[3];
    if (row < 0 || column < 0 || height < 8 || width < 8 || row + height > rows || column + width > columns)
        return status_new(TUSFM_FRAME, "the model's crop does not lie inside a frame of %dx%d rows x columns", rows,
                          columns);
    int64_t box_h = spec->rows, box_w = spec->columns;
    if (spec->letterbox && box_h * width <= box_w * height)
        box_w = (2 * width * spec->rows + height) / (2 * height);
    else if (spec->letterbox)
        box_h = (2 * height * spec->columns + width) / (2 * width);
    box_h = box_h < 1 ? 1 : box_h > spec->rows ? spec->rows : box_h;
    box_w = box_w < 1 ? 1 : box_w > spec->columns ? spec->columns : box_w;
    *place = (placement){.crop = {(int32_t)row, (int32_t)column, (int32_t)height, (int32_t)width},
                         .box = {(int32_t)((spec->rows - box_h) / 2), (int32_t)((spec->columns - box_w) / 2),
                                 (int32_t)box_h, (int32_t)box_w},
                         .has_spacing = frame->spacing_row_mm != 0,
                         .frame_rows = rows,
                         .frame_columns = columns};
    if (place->has_spacing) {
        place->spacing_mm[0] = frame->spacing_row_mm * (double)height / (double)box_h;
        place->spacing_mm[1] = frame->spacing_column_mm * (double)width / (double)box_w;
    }
    return NULL;
}

tue_picture frame_picture(const tusfm_frame *frame) {
    int64_t step = channels(frame->format);
    int64_t stride = frame->row_stride ? frame->row_stride : step * frame->columns;
    int64_t row = frame->roi_rows ? frame->roi_row : 0, column = frame->roi_rows ? frame->roi_column : 0;
    return (tue_picture){.pixels = frame->pixels + row * stride + column * step,
                         .row_stride = (ptrdiff_t)stride,
                         .column_stride = (ptrdiff_t)step,
                         .channel_stride = 1,
                         .rows = frame_rows(frame),
                         .columns = frame_columns(frame),
                         .format = frame->format,
                         .limited = frame->limited_range != 0};
}

/* ---- resampling weights ---- */

/* As coefficients() in preprocess.py, after Pillow's precompute_coeffs: doubles in a fixed order, then 22-bit integers.
 * Returns how many of `taps` weights of any output are not zero. */
static int32_t fill(int32_t in_size, int32_t out_size, int32_t taps, int32_t *first, int32_t *weights, int32_t stride,
                    double *raw) {
    double scale = (double)in_size / (double)out_size, filter_scale = scale > 1.0 ? scale : 1.0;
    double support = filter_scale, inverse = 1.0 / filter_scale;
    int32_t span = 1;
    for (int32_t i = 0; i < out_size; i++) {
        double center = ((double)i + 0.5) * scale, total = 0.0;
        double from = center - support + 0.5, to = center + support + 0.5;
        int32_t low = from > 0 ? (int32_t)from : 0, high = to < (double)in_size ? (int32_t)to : in_size;
        for (int32_t x = 0; x < high - low && x < taps; x++) {
            double value = 1.0 - fabs(((double)(x + low) - center + 0.5) * inverse);
            raw[x] = value > 0.0 ? value : 0.0;
            total += raw[x];
        }
        double recip = total != 0.0 ? 1.0 / total : 0.0;
        first[i] = low;
        for (int32_t x = 0; x < high - low && x < taps; x++) {
            int32_t weight = (int32_t)(0.5 + raw[x] * recip * (double)(1 << PRECISION_BITS));
            if (stride) weights[(ptrdiff_t)i * stride + x] = weight;
            if (weight && x + 1 > span) span = x + 1;
        }
    }
    return span;
}

static tusfm_status *make_filter(kept_filter *kept, int32_t in_size, int32_t out_size) {
    double scale = (double)in_size / (double)out_size;
    int32_t taps = (int32_t)ceil(scale > 1.0 ? scale : 1.0) * 2 + 1;
    int32_t room = (taps + BLOCK - 1) / BLOCK * BLOCK;
    size_t count = (size_t)out_size * ((size_t)room + 1);
    double *raw = calloc((size_t)taps, sizeof *raw);
    int32_t *memory = calloc(count, sizeof *memory);
    if (!raw || !memory) {
        free(raw);
        free(memory);
        return no_memory();
    }
    int32_t span = fill(in_size, out_size, taps, memory, NULL, 0, raw);
    int32_t stride = (span + BLOCK - 1) / BLOCK * BLOCK;
    fill(in_size, out_size, taps < stride ? taps : stride, memory, memory + out_size, stride, raw);
    free(raw);
    free(kept->memory);
    kept->memory = memory;
    kept->filter = (tue_filter){memory, memory + out_size, in_size, out_size, span, stride};
    return NULL;
}

static tusfm_status *find_filter(preparer *p, int32_t in_size, int32_t out_size, const tue_filter **found) {
    kept_filter *oldest = &p->kept[0];
    for (int i = 0; i < KEPT; i++) {
        kept_filter *kept = &p->kept[i];
        if (kept->memory && kept->filter.in_size == in_size && kept->filter.out_size == out_size) {
            kept->used = ++p->uses;
            *found = &kept->filter;
            return NULL;
        }
        if (kept->used < oldest->used) oldest = kept;
    }
    TRY(make_filter(oldest, in_size, out_size));
    oldest->used = ++p->uses;
    *found = &oldest->filter;
    return NULL;
}

/* ---- the tensor ---- */

static tusfm_status *fill_tensor(preparer *p, const model_spec *spec, const tusfm_frame *frame, uint8_t *tensor,
                                 placement *place) {
    const tue_filter *along_columns, *along_rows;
    TRY(frame_check(frame));
    TRY(frame_place(frame, spec, place));
    TRY(find_filter(p, place->crop[3], place->box[3], &along_columns));
    TRY(find_filter(p, place->crop[2], place->box[2], &along_rows));
    size_t need = tue_preprocess_scratch(along_columns, along_rows);
    if (need > p->scratch_bytes) {
        uint8_t *more = realloc(p->scratch, need);
        if (!more) return no_memory();
        p->scratch = more;
        p->scratch_bytes = need;
    }
    tue_picture image = frame_picture(frame);
    image.pixels += place->crop[0] * image.row_stride + place->crop[1] * image.column_stride;
    image.rows = place->crop[2], image.columns = place->crop[3];
    size_t plane = (size_t)spec->rows * (size_t)spec->columns;
    if (place->box[2] != spec->rows || place->box[3] != spec->columns) memset(tensor, 0, plane);
    uint8_t *at = tensor + (ptrdiff_t)place->box[0] * spec->columns + place->box[1];
    int32_t status = tue_preprocess(&image, along_columns, along_rows, at, spec->columns, p->scratch, p->scratch_bytes);
    if (status != TUE_OK) return status_new(TUSFM_FRAME, "the frame cannot be resized (status %d)", status);
    for (int channel = 1; channel < (spec->grey ? 1 : 3); channel++)
        memcpy(tensor + (size_t)channel * plane, tensor, plane);
    return NULL;
}

tusfm_status *tusfm_mask_on_frame(const tusfm_reading *reading, uint8_t *out, int64_t stride) {
    if (!reading || !out || !reading->mask) return status_new(TUSFM_INPUT, "this reading has no mask to be placed");
    int32_t row = reading->crop[0], column = reading->crop[1], height = reading->crop[2], width = reading->crop[3];
    int64_t step = stride ? stride : reading->frame_columns;
    if (step < reading->frame_columns) return status_new(TUSFM_INPUT, "the stride is shorter than a row of the frame");
    for (int32_t y = 0; y < reading->frame_rows; y++) memset(out + y * step, 0, (size_t)reading->frame_columns);
    for (int64_t y = 0; y < height; y++) { /* the input pixel in which the centre of a frame pixel falls */
        int64_t from = reading->box[0] + (2 * y + 1) * reading->box[2] / (2 * (int64_t)height);
        const uint8_t *labels = reading->mask + from * reading->mask_columns;
        uint8_t *line = out + (row + y) * step + column;
        for (int64_t x = 0; x < width; x++)
            line[x] = labels[reading->box[1] + (2 * x + 1) * reading->box[3] / (2 * (int64_t)width)];
    }
    return NULL;
}

tusfm_status *prepare(preparer *p, const tusfm_frame *frame, uint8_t *tensor, placement *place) {
    return fill_tensor(p, p->spec, frame, tensor, place);
}

tusfm_status *prepare_region(preparer *p, const tusfm_frame *frame, const int32_t region[4], uint8_t *tensor,
                             placement *place) {
    model_spec closer = *p->spec;
    closer.has_crop = 1;
    memcpy(closer.crop, region, sizeof closer.crop);
    return fill_tensor(p, &closer, frame, tensor, place);
}
