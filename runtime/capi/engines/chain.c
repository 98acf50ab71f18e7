/* Chain: a classifier with early exits as several graphs, run one after another until an answer is sure enough; as
 * chain.py and early_exit.py. Files named stage1.model.onnx, stage2.model.onnx, ... make an artefact a chain. */
#include "engine.h"

#include "../src/answer.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_STAGES = 16 };

typedef struct chain {
    engine *stages[MAX_STAGES];
    int32_t count, classes;
    int full_depth;
    const model_spec *spec;
    float *logits, *answers; /* stages x classes */
    int32_t running; /* which stage; guarded by lock, -1: none */
    int cancelled;
    mutex lock;
} chain;

/* Number and rest of "stageN.NAME"; 0: no stage file. */
static int32_t stage_of(const char *name, const char **rest) {
    if (strncmp(name, "stage", 5) != 0 || name[5] < '1' || name[5] > '9') return 0;
    int32_t number = name[5] - '0';
    const char *at = name + 6;
    if (*at >= '0' && *at <= '9') number = 10 * number + (*at++ - '0');
    if (*at != '.' || !at[1]) return 0;
    *rest = at + 1;
    return number;
}

int request_is_chain(const engine_request *request) {
    const char *rest;
    for (size_t i = 0; i < request->file_count; i++)
        if (stage_of(request->files[i].name, &rest)) return 1;
    return 0;
}

static tusfm_status *stage_request(const engine_request *request, int32_t stage, engine_request *one) {
    *one = *request;
    one->file_count = 0;
    for (size_t i = 0; i < request->file_count; i++) {
        const char *rest;
        int32_t number = stage_of(request->files[i].name, &rest);
        if (!number || number > request->spec->exit_count + 1)
            return status_new(TUSFM_BUNDLE, "the chain holds a file that belongs to no stage: export the bundle again");
        if (number != stage) continue;
        one->files[one->file_count] = request->files[i];
        one->files[one->file_count++].name = rest;
    }
    if (!one->file_count) return status_new(TUSFM_BUNDLE, "the chain lacks stage %d: export the bundle again", stage);
    return NULL;
}

static tusfm_status *tokens_of(const engine *stage, const engine_output **tokens) {
    *tokens = engine_find(stage, TOKENS_OUT);
    if (*tokens && (*tokens)->axes == 3) return NULL;
    return status_new(TUSFM_ENGINE, "a stage that is not the last gives no %s: export the bundle again", TOKENS_OUT);
}

static tusfm_status *open_stages(chain *c, const engine_kind *kind, const engine_request *request) {
    const engine_output *tokens = NULL;
    for (int32_t i = 0; i <= c->spec->exit_count; i++) {
        engine_request one;
        TRY(stage_request(request, i + 1, &one));
        if (tokens) {
            one.takes_name = TOKENS_IN;
            one.takes_axes = 3;
            memcpy(one.takes_shape, tokens->shape, 3 * sizeof *tokens->shape);
        }
        TRY(engine_open(kind, &one, 0, &c->stages[i]));
        c->count = i + 1;
        TRY(logits_check(&c->stages[i]->outputs[0], c->spec));
        if (i < c->spec->exit_count) TRY(tokens_of(c->stages[i], &tokens));
    }
    return NULL;
}

tusfm_status *chain_open(engine *e, const engine_kind *kind, const engine_request *request, int full_depth) {
    const model_spec *spec = request->spec;
    if (!spec->exit_blocks)
        return status_new(TUSFM_BUNDLE, "the model has no early exits, yet its artefact is a chain: export it again");
    if (!kind->chains || spec->exit_count >= MAX_STAGES)
        return status_new(TUSFM_UNSUPPORTED, "this engine runs no chain of early exits: take an onnx or openvino artefact");
    chain *c = calloc(1, sizeof *c);
    if (!c) return no_memory();
    e->state = c;
    mutex_init(&c->lock);
    c->spec = spec, c->full_depth = full_depth, c->running = -1;
    TRY(open_stages(c, kind, request));
    c->classes = (int32_t)c->stages[0]->outputs[0].shape[1];
    c->logits = calloc((size_t)c->count * (size_t)c->classes, sizeof *c->logits);
    c->answers = calloc((size_t)c->count * (size_t)c->classes, sizeof *c->answers);
    if (!c->logits || !c->answers) return no_memory();
    snprintf(e->description, sizeof e->description, "%.180s, chain of %d stages %s", c->stages[0]->description, c->count,
             full_depth ? "run to its end" : "stopping early");
    copy_line(e->executed, sizeof e->executed, c->stages[0]->executed);
    copy_line(e->version, sizeof e->version, c->stages[0]->version);
    e->outputs[0] = c->stages[0]->outputs[0];
    e->output_count = 1;
    return NULL;
}

static tusfm_status *run_stage(chain *c, int32_t index, const void **input) {
    engine *stage = c->stages[index];
    mutex_lock(&c->lock);
    c->running = index;
    mutex_unlock(&c->lock);
    tusfm_status *failed = engine_run(stage, *input);
    mutex_lock(&c->lock);
    c->running = -1;
    int cancelled = c->cancelled;
    mutex_unlock(&c->lock);
    if (failed) return failed;
    if (cancelled) return status_new(TUSFM_ENGINE, "the run was cancelled between two stages");
    memcpy(c->logits + (size_t)index * (size_t)c->classes, stage->outputs[0].data, (size_t)c->classes * sizeof(float));
    const engine_output *tokens = NULL;
    if (index + 1 < c->count) TRY(tokens_of(stage, &tokens));
    *input = tokens ? (const void *)tokens->data : NULL;
    return NULL;
}

static void begin(chain *c) {
    mutex_lock(&c->lock);
    c->cancelled = 0;
    mutex_unlock(&c->lock);
}

static double normalised_entropy(const float *p, int32_t count) {
    double sum = 0;
    for (int32_t i = 0; i < count; i++)
        if (p[i] > 0) sum += (double)p[i] * log((double)p[i]);
    double value = -sum / log((double)count);
    return value > 0 ? value : 0;
}

static int32_t largest(const float *p, int32_t count) {
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (p[i] > p[best]) best = i;
    return best;
}

/* Whether the answer of stage `index` can be taken; the answers up to it are there. */
static int may_stop(const chain *c, int32_t index) {
    const model_spec *spec = c->spec;
    size_t classes = (size_t)c->classes;
    if (index >= spec->exit_count) return 1;
    const float *here = c->answers + (size_t)index * classes;
    if (c->classes < 2) return 0;
    if (normalised_entropy(here, c->classes) < json_number_value(json_array_get(spec->exit_entropy, (size_t)index))) return 1;
    if (!spec->exit_patience || index + 1 < spec->exit_patience) return 0;
    for (int32_t i = 1; i < spec->exit_patience; i++)
        if (largest(here - (size_t)i * classes, c->classes) != largest(here, c->classes)) return 0;
    return 1;
}

static int finite(const float *values, int32_t count) {
    for (int32_t i = 0; i < count; i++)
        if (!isfinite(values[i])) return 0;
    return 1;
}

static tusfm_status *chain_run(engine *e, const void *input) {
    chain *c = e->state;
    begin(c);
    for (int32_t i = 0; i < c->count; i++) {
        TRY(run_stage(c, i, &input));
        const float *logits = c->logits + (size_t)i * (size_t)c->classes;
        e->outputs[0].data = logits;
        e->exit_index = i;
        if (!finite(logits, c->classes)) break; /* what lies behind is computed from the same tokens */
        probabilities(logits, c->classes, c->answers + (size_t)i * (size_t)c->classes);
        if (!c->full_depth && may_stop(c, i)) break;
    }
    return NULL;
}

tusfm_status *chain_run_all(engine *e, const void *input, const float **logits, int32_t *exits, int32_t *classes) {
    chain *c = e->state;
    const void *image = input;
    int32_t right = 0;
    TRY(chain_run(e, image)); /* both have to tell the same */
    int32_t stopped = e->exit_index;
    begin(c);
    for (int32_t i = 0; i < c->count; i++) {
        TRY(run_stage(c, i, &input));
        probabilities(c->logits + (size_t)i * (size_t)c->classes, c->classes, c->answers + (size_t)i * (size_t)c->classes);
    }
    if (c->full_depth) right = c->count - 1;
    while (!c->full_depth && !may_stop(c, right)) right++;
    if (finite(c->logits, c->count * c->classes) && right != stopped)
        return status_new(TUSFM_ENGINE, "the chain stopped at exit %d instead of %d", stopped, right);
    *logits = c->logits, *exits = c->count, *classes = c->classes;
    return NULL;
}

static void chain_cancel(engine *e) {
    chain *c = e->state;
    mutex_lock(&c->lock);
    c->cancelled = 1;
    if (c->running >= 0) engine_cancel(c->stages[c->running]);
    mutex_unlock(&c->lock);
}

static void chain_close(engine *e) {
    chain *c = e->state;
    if (!c) return;
    for (int32_t i = 0; i < c->count; i++) engine_close(c->stages[i]);
    mutex_free(&c->lock);
    free(c->logits);
    free(c->answers);
    free(c);
}

const engine_kind engine_chain = {.name = "chain",
                                  .library = "",
                                  .chains = 0,
                                  .open = NULL,
                                  .run = chain_run,
                                  .cancel = chain_cancel,
                                  .close = chain_close};
