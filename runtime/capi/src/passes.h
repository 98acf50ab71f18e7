/* Second pass: where to look again, and one field of logits out of two; as passes.py and numerics/second_pass.py. */
#ifndef TUSFM_PASSES_H
#define TUSFM_PASSES_H

#include "answer.h"

/* Memory of a second pass; one thread at a time. */
typedef struct passes {
    uint8_t *tensor;
    float *kept; /* the first pass's logits */
    size_t kept_count;
    int32_t *at_rows, *at_columns;
    double *row_places, *column_places;
} passes;

tusfm_status *passes_init(passes *p, const model_spec *spec);
void passes_free(passes *p);

/* Looks again where the model and the first answer say so: `made` is then that of both passes, and says what became of
 * it. `*ms`: how long that took. The engine's outputs are those of the first pass. */
tusfm_status *passes_second(passes *p, engine *e, answerer *a, preparer *prepares, const tusfm_frame *frame,
                            const uint8_t *tensor, const placement *place, int switched_off, answer *made, double *ms);

#endif
