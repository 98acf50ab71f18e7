#include "answer.h"

#include "exact.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

tusfm_status *answerer_init(answerer *a, const model_spec *spec) {
    *a = (answerer){.spec = spec, .cut = tue_logit(spec->threshold)};
    a->component = malloc((size_t)spec->rows * (size_t)spec->columns);
    a->scratch_bytes = tue_measure_scratch(spec->rows, spec->columns);
    a->scratch = malloc(a->scratch_bytes);
    return a->component && a->scratch ? NULL : no_memory();
}

void answerer_free(answerer *a) {
    free(a->component);
    free(a->scratch);
    *a = (answerer){0};
}

void answer_free(answer *made) {
    free(made->mask);
    free(made->scores);
    free(made->labels.all);
    *made = (answer){0};
}

static tusfm_status *room_for_scores(answer *made, size_t count) {
    if (count > INT32_MAX) return status_new(TUSFM_ENGINE, "the engine gave too many scores");
    if ((int32_t)count > made->score_room) {
        float *more = realloc(made->scores, count * sizeof *more);
        if (!more) return no_memory();
        made->scores = more;
        made->score_room = (int32_t)count;
    }
    made->score_count = (int32_t)count;
    return NULL;
}

static tusfm_status *room_for_mask(answer *made, int32_t rows, int32_t columns) {
    size_t count = (size_t)rows * (size_t)columns;
    if (count > made->mask_room) {
        uint8_t *more = realloc(made->mask, count);
        if (!more) return no_memory();
        made->mask = more;
        made->mask_room = count;
    }
    made->mask_rows = rows, made->mask_columns = columns;
    return NULL;
}

static tusfm_status *room_for_labels(answer *made, int32_t count) {
    if (count > made->labels.room) {
        label_reading *more = realloc(made->labels.all, (size_t)count * sizeof *more);
        if (!more) return no_memory();
        made->labels.all = more;
        made->labels.room = count;
    }
    made->labels.count = count;
    return NULL;
}

static void clear(answer *made) {
    made->valid = made->has_mask = 0;
    made->score_count = made->labels.count = 0;
    made->confidence = NAN;
    made->trust = TUSFM_UNCHECKED, made->reasons = 0, made->second_pass = TUSFM_PASS_NEVER;
    made->drift = (drift_reading){.score = NAN, .threshold = NAN};
}

tusfm_status *answer_copy(answer *to, const answer *from) {
    clear(to);
    if (from->has_mask) {
        TRY(room_for_mask(to, from->mask_rows, from->mask_columns));
        memcpy(to->mask, from->mask, (size_t)from->mask_rows * (size_t)from->mask_columns);
    }
    if (from->score_count) {
        TRY(room_for_scores(to, (size_t)from->score_count));
        memcpy(to->scores, from->scores, (size_t)from->score_count * sizeof *to->scores);
    }
    if (from->labels.count) {
        TRY(room_for_labels(to, from->labels.count));
        memcpy(to->labels.all, from->labels.all, (size_t)from->labels.count * sizeof *to->labels.all);
    }
    to->valid = from->valid, to->has_mask = from->has_mask, to->confidence = from->confidence;
    to->trust = from->trust, to->reasons = from->reasons, to->second_pass = from->second_pass, to->drift = from->drift;
    return NULL;
}

double answer_hc_mm(const answer *made) {
    return made->labels.count && made->labels.all[0].has_spacing ? made->labels.all[0].measured.hc_mm : 0.0;
}

tusfm_status *logits_check(const engine_output *logits, const model_spec *spec) {
    const int64_t *shape = logits->shape;
    int fits = logits->axes >= 2 && shape[0] == 1;
    if (spec->task == TASK_SEGMENT)
        fits = fits && logits->axes == 4 && shape[2] == spec->rows && shape[3] == spec->columns &&
               (shape[1] == 1 || shape[1] == spec->label_count) && shape[1] <= 256;
    if (spec->task == TASK_CLASSIFY)
        fits = fits && logits->axes == 2 && (shape[1] == 1 || shape[1] == spec->label_count);
    if (fits) return NULL;
    return status_new(TUSFM_ENGINE, "the engine gave logits of a shape which no %s model gives", task_name(spec->task));
}

void probabilities(const float *logits, int32_t count, float *out) {
    if (count == 1) {
        out[0] = (float)(1.0 / (1.0 + tue_exp(-(double)logits[0])));
        return;
    }
    double top = (double)logits[0], sum = 0.0;
    for (int32_t i = 1; i < count; i++) top = tue_max(top, (double)logits[i]);
    for (int32_t i = 0; i < count; i++) sum += tue_exp((double)logits[i] - top);
    for (int32_t i = 0; i < count; i++) out[i] = (float)(tue_exp((double)logits[i] - top) / sum);
}

int all_finite(const engine_output *outputs, size_t count) {
    for (size_t i = 0; i < count; i++) {
        uint32_t worst = 0;
        for (size_t j = 0; j < outputs[i].count; j++) { /* the exponent of infinities and NaN is all ones */
            uint32_t bits;
            memcpy(&bits, &outputs[i].data[j], sizeof bits);
            bits &= 0x7f800000u;
            worst = bits > worst ? bits : worst;
        }
        if (worst == 0x7f800000u) return 0;
    }
    return 1;
}

static void largest_label(const float *logits, int32_t labels, size_t plane, uint8_t *mask) {
    for (size_t i = 0; i < plane; i++) {
        float best = logits[i];
        uint8_t label = 0;
        for (int32_t k = 1; k < labels; k++)
            if (logits[(size_t)k * plane + i] > best) best = logits[(size_t)k * plane + i], label = (uint8_t)k;
        mask[i] = label;
    }
}

/* Clears what a model says about the black bars of a letterbox: no frame is there. */
static void keep_inside(uint8_t *mask, const model_spec *spec, const int32_t box[4]) {
    size_t columns = (size_t)spec->columns;
    for (int32_t y = 0; y < spec->rows; y++) {
        uint8_t *row = mask + (size_t)y * columns;
        if (y < box[0] || y >= box[0] + box[2]) {
            memset(row, 0, columns);
            continue;
        }
        memset(row, 0, (size_t)box[1]);
        memset(row + box[1] + box[3], 0, columns - (size_t)box[1] - (size_t)box[3]);
    }
}

/* Labels of a mask that get a reading each, the first of them at `*first` in the model's list. */
static int32_t read_labels(const model_spec *spec, int32_t channels, int32_t *first) {
    *first = spec->label_count > 1;
    int32_t named = spec->label_count - *first, most = channels > 1 ? channels - 1 : 1;
    if (spec->postprocess == POST_ELLIPSE_HC) most = 1; /* label 1 is the head, should there be more */
    return named < most ? named : most;
}

static tusfm_status *measure(answerer *a, const engine_output *logits, const uint8_t *codes, const placement *place,
                             answer *made) {
    const model_spec *spec = a->spec;
    int32_t channels = (int32_t)logits->shape[1], first, count = read_labels(spec, channels, &first);
    int ellipse = spec->postprocess == POST_ELLIPSE_HC;
    size_t plane = (size_t)spec->rows * (size_t)spec->columns;
    tue_view view = {.has_spacing = place->has_spacing, .spacing_mm = {place->spacing_mm[0], place->spacing_mm[1]}};
    memcpy(view.crop, place->crop, sizeof view.crop);
    memcpy(view.box, place->box, sizeof view.box);
    TRY(room_for_labels(made, count));
    for (int32_t i = 0; i < count; i++) {
        label_reading *label = &made->labels.all[i];
        tue_asked asked = {spec->rows, spec->columns, channels, i + 1, ellipse, a->cut, spec->min_area};
        if (tue_measure(made->mask, logits->data, codes, &view, &asked, a->component, &label->measured, a->scratch,
                        a->scratch_bytes) != TUE_OK)
            return status_new(TUSFM_ENGINE, "a mask of %dx%d cannot be measured", spec->columns, spec->rows);
        label->name = json_string_value(json_array_get(spec->labels, (size_t)(first + i)));
        label->has_ellipse = ellipse, label->has_spacing = place->has_spacing;
        label->trust = TUSFM_UNCHECKED, label->reasons = 0;
        if (ellipse && label->measured.found) memcpy(made->mask, a->component, plane);
        if (ellipse && !label->measured.found) memset(made->mask, 0, plane);
    }
    if (count && made->labels.all[0].measured.found) made->confidence = made->labels.all[0].measured.confidence;
    return NULL;
}

static double top_probability(const answer *made) {
    float top = made->scores[0];
    for (int32_t i = 1; i < made->score_count; i++) top = made->scores[i] > top ? made->scores[i] : top;
    return made->score_count == 1 ? tue_max((double)top, 1.0 - (double)top) : (double)top;
}

tusfm_status *answer_make(answerer *a, const engine_output *outputs, size_t count, const uint8_t *codes,
                          const placement *place, answer *made) {
    const model_spec *spec = a->spec;
    const engine_output *logits = &outputs[0];
    TRY(logits_check(logits, spec));
    clear(made);
    if (!all_finite(outputs, count)) return NULL;
    made->valid = 1;
    if (spec->task != TASK_SEGMENT) {
        TRY(room_for_scores(made, logits->count));
        if (spec->task == TASK_CLASSIFY) {
            probabilities(logits->data, made->score_count, made->scores);
            made->confidence = top_probability(made);
        } else {
            memcpy(made->scores, logits->data, logits->count * sizeof *made->scores);
        }
        return NULL;
    }
    size_t plane = (size_t)spec->rows * (size_t)spec->columns;
    int32_t labels = (int32_t)logits->shape[1];
    TRY(room_for_mask(made, spec->rows, spec->columns));
    if (labels == 1)
        (void)tue_threshold(logits->data, plane, a->cut, made->mask);
    else
        largest_label(logits->data, labels, plane, made->mask);
    keep_inside(made->mask, spec, place->box);
    made->has_mask = 1;
    return measure(a, logits, codes, place, made);
}
