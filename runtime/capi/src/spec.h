/* What a model takes and answers: the manifest's "spec", checked as spec.py checks it. */
#ifndef TUSFM_SPEC_H
#define TUSFM_SPEC_H

#include "status.h"

#include <jansson.h>

enum task { TASK_SEGMENT, TASK_CLASSIFY, TASK_FEATURES };
enum postprocess { POST_NONE, POST_MASK, POST_ELLIPSE_HC };
enum second_pass { PASS_NEVER, PASS_SMALL, PASS_ALWAYS };

/* Strings and arrays point into the manifest's JSON and live as long as it. */
typedef struct model_spec {
    const char *name, *intended_use;
    int task, postprocess, second_pass;
    const json_t *labels;
    int32_t label_count;
    int32_t rows, columns; /* of the input */
    int grey, letterbox, has_crop;
    int32_t crop[4];
    double threshold, min_area;
    const json_t *exit_blocks, *exit_entropy; /* NULL: no early exits */
    int32_t exit_count, exit_patience;
    const json_t *reading, *anatomy, *probe; /* NULL: none; checked */
    const char *sector;                      /* NULL: no artefact was pruned to one */
    const json_t *whole;
} model_spec;

const char *task_name(int task);

/* TUSFM_BUNDLE: a key is missing or unknown, or a value out of range. */
tusfm_status *spec_parse(const json_t *data, model_spec *spec);

/* SHA-256 over every field, hex: what golden answers and signatures are bound to. */
tusfm_status *spec_digest(const model_spec *spec, char sha256[65]);

#endif
