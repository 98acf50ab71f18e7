/* Runner: one artefact of a verified bundle, ready to answer; what session.py calls a session. One thread at a time. */
#ifndef TUSFM_RUNNER_H
#define TUSFM_RUNNER_H

#include "answer.h"
#include "bundle.h"
#include "drift.h"
#include "machine.h"
#include "passes.h"

#include <stdatomic.h>

enum { GOLDEN_AT_START = 4, GOLDEN_AT_WORK = 4, WARM_UP_RUNS = 5 };

/* A bundle that several runners share; the last one frees it. */
typedef struct shared_bundle {
    manifest m;
    int64_t users;
    mutex lock;
} shared_bundle;

tusfm_status *shared_bundle_open(const bundle_source *source, const trust_demands *trust, shared_bundle **opened);
shared_bundle *shared_bundle_use(shared_bundle *b);
void shared_bundle_free(shared_bundle *b);

typedef struct timings {
    double preprocess_ms, infer_ms, postprocess_ms, total_ms, second_pass_ms, drift_ms;
} timings;

typedef struct golden_set golden_set; /* golden.h */

typedef struct runner {
    shared_bundle *bundle;
    const model_spec *spec;
    const artefact *artefact;
    engine *engine;
    preparer *preparer;
    answerer answerer;
    passes passes;
    drift *drift; /* NULL: the bundle has no statistic, or it is switched off */
    uint8_t *tensor;
    int no_second_pass;
    int verified;
    int32_t index; /* among the bundle's artefacts that were chosen, 0 is the first choice */
    int32_t threads;
    char description[520];
    golden_set *golden;
    answer golden_answers[GOLDEN_AT_WORK], scratch_answer;
    int32_t golden_answered;
    int32_t golden_compared;
    double load_ms, golden_ms, warm_up_ms;
} runner;

/* The first artefact of the bundle that fits what was asked for; TUSFM_INPUT: none does. */
tusfm_status *choose_artefact(const manifest *m, const char *target, const char *precision, const artefact **chosen);

/* Loads, compares golden frames, warms up. */
tusfm_status *runner_open(shared_bundle *bundle, const artefact *a, const tusfm_options *options, runner **opened);
void runner_free(runner *r);

/* Called once the input is prepared: gives the frame to go on with, such as a copy, or says why there is none. The time it
 * takes is in no timing. */
typedef struct settling {
    tusfm_status *(*settle)(void *user, const tusfm_frame **frame);
    void *user;
    atomic_int late; /* whoever watches the call: it passed its deadline */
} settling;

/* `settling` NULL: the frame stays good until the end. */
tusfm_status *runner_predict(runner *r, const tusfm_frame *frame, settling *settling, answer *made, placement *place,
                             timings *took);

/* Asks about one golden frame again; an error says why the answer is not the one of the start. */
tusfm_status *runner_check(runner *r, int32_t which);

/* The logits of a golden frame, without the leading 1: K H W, or K, or of a chain E K. Good until the next run; its input
 * stays in `tensor`. */
tusfm_status *runner_logits(runner *r, const tusfm_frame *frame, placement *place, engine_output *logits);

#endif
