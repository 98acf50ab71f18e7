#include "session.h"

#include "golden.h"
#include "live.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

/* How long closing waits for a prediction in progress before it is cancelled, and after that before it is given up. */
static const int64_t CLOSE_WAIT_NS = 5000000000, CLOSE_GRACE_NS = 2000000000;

int64_t tusfm_now_ns(void) { return now_ns(); }

/* ---- whose turn it is ---- */

tusfm_status *session_take(tusfm_session *s) {
    mutex_lock(&s->turn);
    while (s->busy && !s->closed) condition_wait(&s->turned, &s->turn);
    tusfm_status *failed = s->closed ? status_new(TUSFM_ENGINE, "the session is closed") : NULL;
    if (!failed) s->busy = 1;
    mutex_unlock(&s->turn);
    return failed;
}

static void destroy(tusfm_session *s) {
    live_free(s->stream);
    fallback_free(s->now);
    trust_free(s->demands);
    answer_free(&s->made);
    for (size_t i = 0; i < sizeof s->texts / sizeof *s->texts; i++) free(s->texts[i]);
    condition_free(&s->turned);
    mutex_free(&s->turn);
    free(s);
}

void session_give(tusfm_session *s) {
    mutex_lock(&s->turn);
    s->busy = 0;
    int orphan = s->orphan; /* it was given up meanwhile, and nobody else comes to free it */
    condition_wake_all(&s->turned);
    mutex_unlock(&s->turn);
    if (orphan) destroy(s);
}

/* ---- opening ---- */

static tusfm_status *keep_text(tusfm_session *s, int at, const char **text) {
    if (!*text) return NULL;
    size_t length = strlen(*text) + 1;
    s->texts[at] = malloc(length);
    if (!s->texts[at]) return no_memory();
    memcpy(s->texts[at], *text, length);
    *text = s->texts[at];
    return NULL;
}

static tusfm_status *keep_trust(tusfm_session *s) {
    if (s->options.trust) {
        TRY(trust_options_take(s->options.trust, &s->trust));
        TRY(keep_text(s, 3, &s->trust.store));
        TRY(keep_text(s, 4, &s->trust.device_class));
        TRY(keep_text(s, 5, &s->trust.role));
        TRY(keep_text(s, 6, &s->trust.floor_file));
        s->options.trust = &s->trust;
    }
    return trust_open(s->options.trust, &s->demands);
}

static tusfm_status *build(tusfm_session *s, const bundle_source *source, const tusfm_options *options) {
    TRY(options_take(options, &s->options));
    TRY(keep_text(s, 0, &s->options.target));
    TRY(keep_text(s, 1, &s->options.precision));
    TRY(keep_text(s, 2, &s->options.engine_folder));
    TRY(keep_trust(s));
    shared_bundle *bundle = NULL;
    int64_t begin = now_ns();
    TRY(shared_bundle_open(source, s->demands, &bundle));
    s->verify_ms = (double)(now_ns() - begin) / 1e6;
    tusfm_status *failed = fallback_open(bundle, &s->options, &s->now);
    shared_bundle_free(bundle);
    return failed;
}

static tusfm_status *open_session(const bundle_source *source, const tusfm_options *options, tusfm_session **session) {
    if (!session) return status_new(TUSFM_INPUT, "there is no place for the session");
    tusfm_session *s = calloc(1, sizeof *s);
    if (!s) return no_memory();
    mutex_init(&s->turn);
    condition_init(&s->turned);
    tusfm_status *failed = build(s, source, options);
    if (failed)
        destroy(s);
    else
        *session = s;
    return failed;
}

tusfm_status *tusfm_open(const char *folder, const tusfm_options *options, tusfm_session **session) {
    if (!folder) return status_new(TUSFM_INPUT, "there is no name of a bundle");
    return open_session(&(bundle_source){.folder = folder}, options, session);
}

tusfm_status *tusfm_open_memory(const tusfm_file *files, size_t count, const tusfm_options *options,
                                tusfm_session **session) {
    if (!files && count) return status_new(TUSFM_INPUT, "there are no files");
    return open_session(&(bundle_source){.files = files, .file_count = count}, options, session);
}

tusfm_status *tusfm_open_reader(const tusfm_reader *reader, const tusfm_options *options, tusfm_session **session) {
    if (!reader || reader->struct_size < sizeof *reader || !reader->size || !reader->read)
        return status_new(TUSFM_INPUT, "the reader has no size or read function, or no struct_size");
    return open_session(&(bundle_source){.reader = reader}, options, session);
}

static tusfm_status *describe(const manifest *m, int32_t index, tusfm_artefact *found) {
    if (index < 0 || (size_t)index >= m->artefact_count)
        return status_new(TUSFM_INPUT, "the bundle has %zu artefacts, none at place %d", m->artefact_count, index);
    const artefact *a = &m->artefacts[index];
    tusfm_artefact_init(found, sizeof *found);
    found->count = (int32_t)m->artefact_count, found->verified = artefact_trusted(a);
    found->built_in = engine_kind_of(a->engine) != NULL;
    copy_line(found->name, sizeof found->name, a->name);
    copy_line(found->target, sizeof found->target, a->target);
    copy_line(found->precision, sizeof found->precision, a->precision);
    copy_line(found->engine, sizeof found->engine, a->engine);
    return NULL;
}

static tusfm_status *demands_of(const tusfm_options *options, trust_demands **demands) {
    tusfm_options taken;
    tusfm_trust_options trust;
    TRY(options_take(options, &taken));
    if (taken.trust) TRY(trust_options_take(taken.trust, &trust));
    return trust_open(taken.trust ? &trust : NULL, demands);
}

tusfm_status *tusfm_get_artefact(const char *folder, const tusfm_options *options, int32_t index, tusfm_artefact *artefact) {
    tusfm_artefact full;
    trust_demands *demands = NULL;
    shared_bundle *bundle = NULL;
    if (!folder) return status_new(TUSFM_INPUT, "there is no name of a bundle");
    TRY(struct_check(artefact, "the artefact"));
    TRY(demands_of(options, &demands));
    tusfm_status *failed = shared_bundle_open(&(bundle_source){.folder = folder}, demands, &bundle);
    if (!failed) failed = describe(&bundle->m, index, &full);
    shared_bundle_free(bundle);
    trust_free(demands);
    if (!failed) struct_give(artefact, &full, sizeof full);
    return failed;
}

/* ---- predicting ---- */

static tusfm_status *answer_frame(tusfm_session *s, const tusfm_frame *frame, tusfm_reading *reading) {
    call c = {.frame = frame, .golden = -1, .made = &s->made};
    answered said;
    tusfm_reading full;
    TRY(fallback_answer(s->now, &c, NULL, NULL, 1, &said));
    if (!said.there) return status_new(TUSFM_ENGINE, "%s", said.error);
    reading_fill(&full, said.by, frame, &s->made, &c.place, &c.took, c.exit_index);
    struct_give(reading, &full, sizeof full);
    return NULL;
}

tusfm_status *tusfm_predict(tusfm_session *s, const tusfm_frame *frame, tusfm_reading *reading) {
    tusfm_frame taken;
    if (!s) return status_new(TUSFM_INPUT, "the session is NULL");
    TRY(struct_check(reading, "the reading"));
    TRY(frame_take(frame, &taken));
    TRY(session_take(s));
    tusfm_status *failed = s->stream ? status_new(TUSFM_INPUT, "the session answers a stream: frames are submitted to it")
                                     : answer_frame(s, &taken, reading);
    session_give(s);
    return failed;
}

void tusfm_cancel(tusfm_session *s) {
    if (!s) return;
    mutex_lock(&s->turn);
    if (s->busy || s->stream) engine_cancel(fallback_runner(s->now)->engine);
    mutex_unlock(&s->turn);
}

/* ---- what runs ---- */

tusfm_status *tusfm_get_info(tusfm_session *s, tusfm_info *info) {
    if (!s) return status_new(TUSFM_INPUT, "the session is NULL");
    TRY(struct_check(info, "the info"));
    mutex_lock(&s->turn);
    const runner *r = fallback_runner(s->now);
    const manifest *m = &r->bundle->m;
    tusfm_info full = {.verified = r->verified,
                       .model = r->spec->name,
                       .task = task_name(r->spec->task),
                       .artefact = r->artefact->name,
                       .engine = r->engine->description,
                       .precision = r->artefact->precision,
                       .executed = r->engine->executed,
                       .bundle_sha256 = m->sha256,
                       .intended_use = r->spec->intended_use,
                       .threads = r->threads,
                       .input_rows = r->spec->rows,
                       .input_columns = r->spec->columns,
                       .label_count = r->spec->label_count,
                       .artefacts = (int32_t)s->now->count,
                       .golden_frames = r->golden_compared,
                       .verify_ms = s->verify_ms,
                       .load_ms = r->load_ms,
                       .golden_ms = r->golden_ms,
                       .warm_up_ms = r->warm_up_ms,
                       .in_place = live_in_place(s)};
    mutex_unlock(&s->turn);
    struct_give(info, &full, sizeof full);
    return NULL;
}

const char *tusfm_label(const tusfm_session *s, int32_t index) {
    if (!s || index < 0) return NULL;
    return json_string_value(json_array_get(s->now->bundle->m.spec.labels, (size_t)index));
}

/* ---- closing ---- */

/* Waits until nobody uses the session; 0: somebody still does. */
static int wait_idle(tusfm_session *s, int64_t end_ns) {
    while (s->busy && now_ns() < end_ns) condition_wait_until(&s->turned, &s->turn, end_ns);
    return !s->busy;
}

void tusfm_close(tusfm_session *s) {
    if (!s) return;
    mutex_lock(&s->turn);
    s->closed = 1;
    condition_wake_all(&s->turned);
    if (!wait_idle(s, now_ns() + CLOSE_WAIT_NS)) {
        engine_cancel(fallback_runner(s->now)->engine);
        if (!wait_idle(s, now_ns() + CLOSE_GRACE_NS)) {
            fallback_tell(s->now, TUSFM_WARNING, "the engine hangs and was given up unclosed");
            s->orphan = 1;
        }
    }
    int orphan = s->orphan;
    mutex_unlock(&s->turn);
    if (!orphan) destroy(s);
}
