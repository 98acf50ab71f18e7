/* Golden frames: does this engine, on this machine, answer as it did when the artefact was exported? As golden.py. */
#ifndef TUSFM_GOLDEN_H
#define TUSFM_GOLDEN_H

#include "runner.h"
#include "tensors.h"

struct golden_set {
    tensors frames, reference, own;
    const tensor *pixels, *spacing, *seeds, *reference_logits, *own_logits;
    int32_t count;
};

/* TUSFM_BUNDLE: the golden files are not what the layout says. */
tusfm_status *golden_open(const manifest *m, const artefact *a, golden_set **opened);
void golden_free(golden_set *g);

tusfm_frame golden_frame(const golden_set *g, int32_t index);

/* Compares; TUSFM_ENGINE: the answers are not as they should be, with the numbers. `full`: all frames, with the
 * reference where the artefact passed a gate. *compared: how many. */
tusfm_status *golden_check(runner *r, int full, int32_t *compared);

#endif
