#include "runner.h"

#include "golden.h"
#include "judge.h"
#include "want.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static double since_ms(int64_t begin_ns) { return (double)(now_ns() - begin_ns) / 1e6; }

/* ---- a bundle that several runners share ---- */

tusfm_status *shared_bundle_open(const bundle_source *source, const trust_demands *trust, shared_bundle **opened) {
    shared_bundle *b = calloc(1, sizeof *b);
    if (!b) return no_memory();
    tusfm_status *failed = bundle_open(source, trust, &b->m);
    if (failed) {
        free(b);
        return failed;
    }
    mutex_init(&b->lock);
    b->users = 1;
    *opened = b;
    return NULL;
}

shared_bundle *shared_bundle_use(shared_bundle *b) {
    mutex_lock(&b->lock);
    b->users++;
    mutex_unlock(&b->lock);
    return b;
}

void shared_bundle_free(shared_bundle *b) {
    if (!b) return;
    mutex_lock(&b->lock);
    int64_t left = --b->users;
    mutex_unlock(&b->lock);
    if (left) return;
    manifest_free(&b->m);
    mutex_free(&b->lock);
    free(b);
}

/* ---- which artefact ---- */

static int same_word(const char *asked, const char *name) {
    for (; *asked && *name; asked++, name++) {
        char a = *asked, b = *name;
        if (a >= 'A' && a <= 'Z') a = (char)(a - 'A' + 'a');
        if (b >= 'A' && b <= 'Z') b = (char)(b - 'A' + 'a');
        if (a != b) return 0;
    }
    return *asked == *name;
}

/* The names that plugins.py knows for the same target. */
static const char *stem(const char *name) {
    static const char *const aliases[][2] = {{"openvino", "ov"}, {"onnx", "ort"}, {"onnxruntime", "ort"}, {"tensorrt", "trt"}};
    for (size_t i = 0; i < sizeof aliases / sizeof *aliases; i++)
        if (same_word(name, aliases[i][0])) return aliases[i][1];
    return name;
}

tusfm_status *choose_artefact(const manifest *m, const char *target, const char *precision, const artefact **chosen) {
    /* first by the exact variant: "int8" is the one that looks at all patches, "int8-sector" the pruned one */
    for (int exact = 1; exact >= 0; exact--)
        for (size_t i = 0; i < m->artefact_count; i++) {
            const artefact *a = &m->artefacts[i];
            if (target && !same_word(stem(target), stem(a->target)) && !same_word(stem(target), a->engine)) continue;
            if (precision && !same_word(precision, exact ? a->name + strlen(a->target) + 1 : a->precision)) continue;
            *chosen = a;
            return NULL;
        }
    char there[400] = "";
    for (size_t i = 0; i < m->artefact_count; i++) {
        size_t used = strlen(there);
        snprintf(there + used, sizeof there - used, "%s%s", used ? ", " : "", m->artefacts[i].name);
    }
    return status_new(TUSFM_INPUT, "the bundle has no artefact '%.60s %.60s'; it has: %s", target ? target : "",
                      precision ? precision : "", there);
}

/* ---- opening ---- */

static tusfm_status *check_trust(const artefact *a, int allow_unverified) {
    const char *pending = artefact_pending(a);
    if (artefact_trusted(a) || allow_unverified) return NULL;
    if (*pending) return status_new(TUSFM_UNVERIFIED, "artefact %s: %.300s", a->name, pending);
    return status_new(TUSFM_UNVERIFIED,
                      "artefact %s %s: export it again, or allow unverified artefacts to use it all the same", a->name,
                      a->gated ? "never passed its gate" : "was exported with its gate switched off");
}

static tusfm_status *fill_request(const runner *r, const tusfm_options *options, engine_request *request) {
    const manifest *m = &r->bundle->m;
    const json_t *layers = json_object_get(r->artefact->requirements, "int8_layers");
    *request = (engine_request){.spec = r->spec,
                                .threads = r->threads,
                                .precision = r->artefact->precision,
                                .rest_precision = r->artefact->rest_precision,
                                .folder = options->engine_folder,
                                .int8_layers = json_is_integer(layers) ? (int32_t)json_integer_value(layers) : 0,
                                .allow_precision = options->allow_precision};
    const char *path;
    json_t *unused;
    json_object_foreach((json_t *)r->artefact->files, path, unused) {
        const file_entry *entry = manifest_file(m, path);
        const char *slash = strrchr(path, '/');
        if (request->file_count == MAX_ENGINE_FILES)
            return status_new(TUSFM_UNSUPPORTED, "artefact %s has more files than any engine here takes", r->artefact->name);
        request->files[request->file_count++] =
            (engine_file){slash ? slash + 1 : path, entry->data, (size_t)entry->size};
    }
    return NULL;
}

static tusfm_status *load_engine(runner *r, const tusfm_options *options) {
    const engine_kind *kind = engine_kind_of(r->artefact->engine);
    engine_request request;
    char what[300];
    if (!kind)
        return status_new(TUSFM_UNSUPPORTED, "artefact %s needs an engine '%s', which this library does not have",
                          r->artefact->name, r->artefact->engine);
    TRY(fill_request(r, options, &request));
    snprintf(what, sizeof what, "artefact %s", r->artefact->name);
    TRY(status_within(engine_open(kind, &request, options->full_depth, &r->engine), what));
    snprintf(r->description, sizeof r->description, "%s on %s", r->artefact->name, r->engine->description);
    if (options->log && r->engine->int8_layers && r->engine->int8_layers < request.int8_layers) {
        char line[700];
        snprintf(line, sizeof line, "%s: %d layers run in int8 here, %d did where it was verified", r->description,
                 r->engine->int8_layers, request.int8_layers);
        options->log(options->log_user, TUSFM_WARNING, line);
    }
    return NULL;
}

/* Whether this is the class of machine, and the version of the library, that the artefact was verified on. */
static int on_verified_machine(const runner *r) {
    machine card = machine_card();
    const json_t *needs = r->artefact->requirements;
    const char *library = want_string(needs, "library"), *version = want_string(needs, "library_version");
    if (*artefact_pending(r->artefact)) return 0;
    if (r->engine->kind->exact) return 1; /* it answers with the same bytes on every machine */
    if (!machine_same_class(&card, json_object_get(needs, "cpu_features"))) return 0;
    if (!library || !version || strcmp(library, r->engine->kind->library) != 0) return 0;
    size_t length = strcspn(version, "-");
    return strlen(r->engine->version) == length && strncmp(version, r->engine->version, length) == 0;
}

static tusfm_status *start(runner *r, const tusfm_options *options) {
    placement place;
    timings took;
    int64_t begin = now_ns();
    tusfm_frame first = golden_frame(r->golden, 0);
    TRY(runner_predict(r, &first, NULL, &r->scratch_answer, &place, &took));
    if (r->drift) drift_bind(r->drift, r->engine->outputs, r->engine->output_count);
    TRY(golden_check(r, options->all_golden || !on_verified_machine(r), &r->golden_compared));
    r->golden_ms = since_ms(begin);
    begin = now_ns();
    for (int32_t i = 0; options->recheck_s > 0 && i < GOLDEN_AT_WORK && i < r->golden->count; i++) { /* they warm up as well */
        tusfm_frame frame = golden_frame(r->golden, i);
        TRY(runner_predict(r, &frame, NULL, &r->golden_answers[i], &place, &took));
        r->golden_answered = i + 1;
    }
    for (int32_t i = r->golden_answered; i < WARM_UP_RUNS; i++) TRY(runner_predict(r, &first, NULL, &r->scratch_answer, &place, &took));
    r->warm_up_ms = since_ms(begin);
    return NULL;
}

static tusfm_status *build(runner *r, const tusfm_options *options) {
    int64_t begin = now_ns();
    machine card = machine_card();
    if (r->artefact->sector)
        return status_new(TUSFM_UNSUPPORTED,
                          "artefact %s was pruned to sector '%.80s', and this library does not check the sector of frames: "
                          "open an artefact that looks at all patches by its precision, such as %.40s",
                          r->artefact->name, r->artefact->sector, r->artefact->precision);
    r->threads = options->threads ? options->threads : machine_threads(&card);
    r->verified = artefact_trusted(r->artefact);
    TRY(check_trust(r->artefact, options->allow_unverified));
    TRY(load_engine(r, options));
    TRY(golden_open(&r->bundle->m, r->artefact, &r->golden));
    TRY(preparer_new(r->spec, &r->preparer));
    TRY(answerer_init(&r->answerer, r->spec));
    TRY(passes_init(&r->passes, r->spec));
    r->no_second_pass = options->no_second_pass != 0;
    TRY(drift_open(&r->bundle->m, &r->drift));
    if (options->no_drift) drift_free(r->drift), r->drift = NULL;
    r->tensor = calloc(spec_input_bytes(r->spec), 1);
    if (!r->tensor) return no_memory();
    r->load_ms = since_ms(begin);
    return start(r, options);
}

tusfm_status *runner_open(shared_bundle *bundle, const artefact *a, const tusfm_options *options, runner **opened) {
    runner *r = calloc(1, sizeof *r);
    if (!r) return no_memory();
    r->bundle = shared_bundle_use(bundle);
    r->artefact = a;
    r->spec = &bundle->m.spec;
    tusfm_status *failed = build(r, options);
    if (failed)
        runner_free(r);
    else
        *opened = r;
    return failed;
}

void runner_free(runner *r) {
    if (!r) return;
    engine_close(r->engine);
    golden_free(r->golden);
    preparer_free(r->preparer);
    answerer_free(&r->answerer);
    passes_free(&r->passes);
    drift_free(r->drift);
    answer_free(&r->scratch_answer);
    for (int i = 0; i < GOLDEN_AT_WORK; i++) answer_free(&r->golden_answers[i]);
    free(r->tensor);
    shared_bundle_free(r->bundle);
    free(r);
}

/* ---- answering ---- */

static tusfm_status *look_for_drift(runner *r, const tusfm_frame *frame, const answer *made, drift_reading *found) {
    *found = (drift_reading){.score = NAN, .threshold = NAN};
    if (!r->drift) return NULL;
    if (frame->phantom) {
        found->status = TUSFM_DRIFT_NOT_APPLIED;
        return NULL;
    }
    *found = drift_infinite(r->drift);
    return made->valid ? drift_look(r->drift, r->engine->outputs, r->engine->output_count, frame, found) : NULL;
}

tusfm_status *runner_predict(runner *r, const tusfm_frame *frame, settling *settling, answer *made, placement *place,
                             timings *took) {
    drift_reading strange;
    double again_ms;
    int64_t begin = now_ns();
    TRY(prepare(r->preparer, frame, r->tensor, place));
    double prepared_ms = since_ms(begin);
    if (settling) TRY(settling->settle(settling->user, &frame));
    int64_t before = now_ns();
    TRY(engine_run(r->engine, r->tensor));
    int64_t after = now_ns();
    TRY(answer_make(&r->answerer, r->engine->outputs, r->engine->output_count, r->tensor, place, made));
    int64_t read = now_ns(); /* the outputs of the first pass are gone after the second one */
    TRY(look_for_drift(r, frame, made, &strange));
    int64_t looked = now_ns();
    TRY(passes_second(&r->passes, r->engine, &r->answerer, r->preparer, frame, r->tensor, place, r->no_second_pass, made,
                      &again_ms));
    made->drift = strange.status == TUSFM_DRIFT_CHECKED && !made->valid ? drift_infinite(r->drift) : strange;
    judge(made, r->spec, place);
    int64_t end = now_ns();
    *took = (timings){prepared_ms, (double)(after - before) / 1e6,
                      (double)(read - after) / 1e6 + ((double)(end - looked) / 1e6 - again_ms),
                      prepared_ms + (double)(end - before) / 1e6,
                      again_ms, (double)(looked - read) / 1e6};
    return NULL;
}

tusfm_status *runner_logits(runner *r, const tusfm_frame *frame, placement *place, engine_output *logits) {
    TRY(prepare(r->preparer, frame, r->tensor, place));
    *logits = (engine_output){0};
    if (r->engine->kind == &engine_chain) {
        int32_t exits, classes;
        TRY(chain_run_all(r->engine, r->tensor, &logits->data, &exits, &classes));
        logits->axes = 2, logits->shape[0] = exits, logits->shape[1] = classes;
        logits->count = (size_t)exits * (size_t)classes;
        return NULL;
    }
    TRY(engine_run(r->engine, r->tensor));
    const engine_output *found = &r->engine->outputs[0];
    TRY(logits_check(found, r->spec));
    logits->data = found->data, logits->count = found->count, logits->axes = found->axes - 1;
    memcpy(logits->shape, found->shape + 1, (size_t)logits->axes * sizeof *logits->shape);
    return NULL;
}

tusfm_status *runner_check(runner *r, int32_t which) {
    static const double most_pixels = 0.005, most_drift = 0.02;
    placement place;
    timings took;
    if (!r->golden_answered) return NULL;
    which %= r->golden_answered;
    tusfm_frame frame = golden_frame(r->golden, which);
    answer *got = &r->scratch_answer, *want = &r->golden_answers[which];
    TRY(status_within(runner_predict(r, &frame, NULL, got, &place, &took), "a golden frame failed"));
    if (!got->valid) return status_new(TUSFM_ENGINE, "a golden frame gave an output that is not finite");
    if (got->has_mask != want->has_mask || got->score_count != want->score_count)
        return status_new(TUSFM_ENGINE, "a golden frame gave another kind of answer than at the start");
    size_t plane = (size_t)r->spec->rows * (size_t)r->spec->columns, count = 0;
    for (size_t i = 0; got->has_mask && i < plane; i++) count += got->mask[i] != want->mask[i];
    double share = (double)count / (double)plane, drift = 0;
    for (int32_t i = 0; i < got->score_count; i++) drift = fmax(drift, fabs((double)got->scores[i] - (double)want->scores[i]));
    if (share > most_pixels)
        return status_new(TUSFM_ENGINE, "a golden frame's mask differs in %.1f %% of the pixels from the one at the start",
                          100 * share);
    if (!(drift <= most_drift))
        return status_new(TUSFM_ENGINE, "a golden frame's scores differ by %.3f from those at the start", drift);
    return NULL;
}
