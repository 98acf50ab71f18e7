#include "passes.h"

#include <stdlib.h>
#include <string.h>

enum { SMALL_PARTS = 5, PARTS = 32, MARGIN_OVER = 29, MARGIN_UNDER = 20, LEAST_SIDE = 8 };

tusfm_status *passes_init(passes *p, const model_spec *spec) {
    size_t rows = (size_t)spec->rows, columns = (size_t)spec->columns;
    if (spec->second_pass == PASS_NEVER) return NULL;
    p->tensor = calloc(spec_input_bytes(spec), 1);
    p->at_rows = malloc(rows * sizeof *p->at_rows), p->at_columns = malloc(columns * sizeof *p->at_columns);
    p->row_places = malloc(rows * sizeof *p->row_places), p->column_places = malloc(columns * sizeof *p->column_places);
    return p->tensor && p->at_rows && p->at_columns && p->row_places && p->column_places ? NULL : no_memory();
}

void passes_free(passes *p) {
    free(p->tensor), free(p->kept), free(p->at_rows), free(p->at_columns), free(p->row_places), free(p->column_places);
    *p = (passes){0};
}

/* First row, first column, rows and columns of the smallest box around a mask, and its pixels; 0: it is empty. */
static int64_t box_of(const answer *made, int32_t box[4]) {
    int32_t top = made->mask_rows, bottom = -1, left = made->mask_columns, right = -1;
    int64_t count = 0;
    for (int32_t y = 0; y < made->mask_rows; y++) {
        const uint8_t *row = made->mask + (ptrdiff_t)y * made->mask_columns;
        for (int32_t x = 0; x < made->mask_columns; x++) {
            if (!row[x]) continue;
            count++;
            if (top > y) top = y;
            bottom = y;
            if (x < left) left = x;
            if (x > right) right = x;
        }
    }
    box[0] = top, box[1] = left, box[2] = bottom - top + 1, box[3] = right - left + 1;
    return count;
}

static int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t between(int64_t value, int64_t most) { return value < 0 ? 0 : value > most ? most : value; }
static int64_t halved(int64_t value) { return value >= 0 ? value / 2 : -((1 - value) / 2); } /* rounded down */

/* Side of the mask over side of the box with its margin, in parts, rounded up. */
static int64_t share(int32_t side, int32_t of) {
    int64_t whole = (int64_t)MARGIN_UNDER * of;
    return ((int64_t)PARTS * MARGIN_OVER * side + whole - 1) / whole;
}

/* 0: no second look. */
static int region_of(const answer *made, const model_spec *spec, const placement *place, int32_t region[4]) {
    int32_t around[4];
    if (!made->has_mask) return 0;
    int64_t count = box_of(made, around), filled = (int64_t)place->box[2] * place->box[3];
    if (!count || (spec->second_pass == PASS_SMALL && SMALL_PARTS * count >= filled)) return 0;
    int64_t parts = larger(share(around[2], place->box[2]), share(around[3], place->box[3]));
    if (parts >= PARTS) return 0;
    for (int i = 0; i < 2; i++) {
        int64_t extent = place->crop[2 + i];
        int64_t side = larger(LEAST_SIDE, (2 * extent * parts + PARTS) / (2 * PARTS));
        /* twice the centre of the box in pixels of the region, rounded down */
        int64_t middle = (2 * (int64_t)(around[i] - place->box[i]) + around[2 + i]) * extent / place->box[2 + i];
        region[i] = place->crop[i] + (int32_t)between(halved(middle - side), extent - side);
        region[2 + i] = (int32_t)side;
    }
    return 1;
}

/* Rows (axis 0) or columns of the first input whose centres lie in the second crop, and their places in it. */
static int32_t positions(const placement *first, const placement *second, int axis, int32_t *at, double *places) {
    int32_t begin = first->box[axis], size = first->box[axis + 2], count = 0;
    double extent = (double)first->crop[axis + 2], other_extent = (double)second->crop[axis + 2];
    double begins = (double)(first->crop[axis] - second->crop[axis]), other_size = (double)second->box[axis + 2];
    double other_begin = (double)second->box[axis] - 0.5;
    for (int32_t i = begin; i < begin + size; i++) {
        double place = ((double)(i - begin) + 0.5) * extent / (double)size + begins;
        if (!(place >= 0.0 && place <= other_extent)) continue;
        at[count] = i;
        places[count++] = place * other_size / other_extent + other_begin;
    }
    return count;
}

static tusfm_status *keep(passes *p, const engine_output *logits) {
    if (p->kept_count < logits->count) {
        float *more = realloc(p->kept, logits->count * sizeof *more);
        if (!more) return no_memory();
        p->kept = more;
        p->kept_count = logits->count;
    }
    memcpy(p->kept, logits->data, logits->count * sizeof *p->kept);
    return NULL;
}

static tusfm_status *look_again(passes *p, engine *e, answerer *a, preparer *prepares, const tusfm_frame *frame,
                                const uint8_t *tensor, const placement *place, const int32_t region[4], answer *made) {
    placement where;
    engine_output both = e->outputs[0];
    TRY(keep(p, &both));
    TRY(prepare_region(prepares, frame, region, p->tensor, &where));
    TRY(engine_run(e, p->tensor));
    const engine_output *again = &e->outputs[0];
    TRY(logits_check(again, a->spec));
    if (again->count != both.count) return status_new(TUSFM_ENGINE, "the engine gave logits of another shape the second time");
    int finite = all_finite(again, 1);
    int32_t rows = positions(place, &where, 0, p->at_rows, p->row_places);
    int32_t columns = positions(place, &where, 1, p->at_columns, p->column_places);
    if (finite && tue_blend(again->data, (int32_t)both.shape[1], a->spec->rows, a->spec->columns, p->at_rows, p->row_places,
                            rows, p->at_columns, p->column_places, columns, p->kept) != TUE_OK)
        return status_new(TUSFM_ENGINE, "the logits of two passes cannot be joined");
    both.data = finite ? p->kept : again->data;
    return answer_make(a, &both, 1, tensor, place, made); /* not valid where the second pass was not finite */
}

tusfm_status *passes_second(passes *p, engine *e, answerer *a, preparer *prepares, const tusfm_frame *frame,
                            const uint8_t *tensor, const placement *place, int switched_off, answer *made, double *ms) {
    int32_t region[4];
    *ms = 0.0;
    if (a->spec->task != TASK_SEGMENT || a->spec->second_pass == PASS_NEVER) return NULL;
    made->second_pass = switched_off ? TUSFM_PASS_OFF : TUSFM_PASS_NOT_NEEDED;
    if (switched_off || !region_of(made, a->spec, place, region)) return NULL;
    int64_t begin = now_ns();
    TRY(look_again(p, e, a, prepares, frame, tensor, place, region, made));
    made->second_pass = TUSFM_PASS_DONE;
    *ms = (double)(now_ns() - begin) / 1e6;
    return NULL;
}
