/* Logits to answer: mask and what is measured of its labels, or scores; as postprocess.py. */
#ifndef TUSFM_ANSWER_H
#define TUSFM_ANSWER_H

#include "../engines/engine.h"
#include "prepare.h"

/* One label of a mask, and what is thought of it. */
typedef struct label_reading {
    tue_measurement measured;
    const char *name;
    int has_ellipse, has_spacing;
    int32_t trust, reasons; /* enum tusfm_trust, bits of enum tusfm_reason */
} label_reading;

struct tusfm_labels {
    label_reading *all;
    int32_t count, room;
};

/* What the drift statistic says of a frame. */
typedef struct drift_reading {
    int32_t status; /* enum tusfm_drift */
    int strange, by_features;
    double score, threshold;
    const char *strangest;
} drift_reading;

/* What a model says about one frame; all zero before the first. The memory is the answer's own, grows where a model
 * needs more, and is used again. */
typedef struct answer {
    int valid, has_mask;
    uint8_t *mask; /* input rows x columns */
    size_t mask_room;
    int32_t mask_rows, mask_columns;
    float *scores;
    int32_t score_count, score_room;
    tusfm_labels labels;
    double confidence; /* NaN: not known */
    int32_t trust, reasons, second_pass;
    drift_reading drift;
} answer;

typedef struct answerer {
    const model_spec *spec;
    float cut;
    uint8_t *component;
    void *scratch;
    size_t scratch_bytes;
} answerer;

tusfm_status *answerer_init(answerer *a, const model_spec *spec);
void answerer_free(answerer *a);
void answer_free(answer *made);
tusfm_status *answer_copy(answer *to, const answer *from);

/* TUSFM_ENGINE: logits of another shape than the model's. `outputs[0]` are the logits. `codes`: the input's brightness,
 * by which a mask that the field of view cuts is known, or NULL to leave that out. Nothing is judged here (judge.h). */
tusfm_status *answer_make(answerer *a, const engine_output *outputs, size_t count, const uint8_t *codes,
                          const placement *place, answer *made);
tusfm_status *logits_check(const engine_output *logits, const model_spec *spec);
int all_finite(const engine_output *outputs, size_t count);

/* Of the first label in mm; 0 where there is none. */
double answer_hc_mm(const answer *made);

/* Softmax of K > 1 logits, sigmoid of one. */
void probabilities(const float *logits, int32_t count, float *out);

#endif
