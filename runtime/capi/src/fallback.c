#include "fallback.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const int64_t RETRY_NS = 1000000000; /* with no level left, one is tried again at most so often */
static const double ROOM = 1.1; /* a gap that a golden frame fits into is so many times as long as they take */
static const double LATEST = 3; /* times recheck_s, after which no gap is waited for; until then a shorter and shorter one will do */

void fallback_tell(const fallback *l, int32_t level, const char *format, ...) {
    char line[700];
    if (!l->log) return;
    va_list words;
    va_start(words, format);
    vsnprintf(line, sizeof line, format, words);
    va_end(words);
    l->log(l->log_user, level, line);
}

/* ---- opening ---- */

static tusfm_status *add_level(fallback *l, const artefact *a, const tusfm_options *options, int32_t index) {
    runner *r = NULL;
    TRY(runner_open(l->bundle, a, options, &r));
    r->index = index;
    fallback_level *made = &l->levels[l->count];
    tusfm_status *failed = watchdog_new(r, &made->guard);
    if (failed) {
        runner_free(r);
        return failed;
    }
    made->last_check_ns = now_ns();
    l->count++;
    return NULL;
}

static tusfm_status *add_all(fallback *l, const tusfm_options *options) {
    const manifest *m = &l->bundle->m;
    const artefact *chosen = NULL;
    char unavailable[600] = "";
    TRY(choose_artefact(m, options->target, options->precision, &chosen));
    if (!options->fallback) return add_level(l, chosen, options, 0);
    int32_t index = 0;
    for (const artefact *a = chosen; a < m->artefacts + m->artefact_count; a++, index++) {
        tusfm_status *failed = add_level(l, a, options, index);
        if (!failed) continue;
        fallback_tell(l, TUSFM_WARNING, "fallback: artefact %d is not available: %s", index, tusfm_status_text(failed));
        size_t used = strlen(unavailable);
        snprintf(unavailable + used, sizeof unavailable - used, "%s%s", used ? "; " : "", tusfm_status_text(failed));
        tusfm_status_free(failed);
    }
    if (l->count) return NULL;
    return status_new(TUSFM_ENGINE, "no artefact of the bundle can be opened here (%s)", unavailable);
}

tusfm_status *fallback_open(shared_bundle *bundle, const tusfm_options *options, fallback **opened) {
    fallback *l = calloc(1, sizeof *l);
    if (!l) return no_memory();
    l->bundle = shared_bundle_use(bundle);
    l->misses_in_a_row = options->misses_in_a_row;
    l->recheck_s = options->recheck_s;
    l->log = options->log, l->log_user = options->log_user;
    l->levels = calloc(bundle->m.artefact_count, sizeof *l->levels);
    tusfm_status *failed = l->levels ? add_all(l, options) : no_memory();
    if (failed)
        fallback_free(l);
    else
        *opened = l;
    return failed;
}

void fallback_free(fallback *l) {
    if (!l) return;
    for (size_t i = 0; i < l->count; i++) watchdog_free(l->levels[i].guard);
    free(l->levels);
    shared_bundle_free(l->bundle);
    free(l);
}

runner *fallback_runner(const fallback *l) { return watchdog_runner(l->levels[l->current].guard); }

/* ---- one call ---- */

static tusfm_status *direct(fallback_level *g, call *c) {
    runner *r = watchdog_runner(g->guard);
    c->late = c->abandoned = 0;
    if (c->golden >= 0) return runner_check(r, c->golden);
    tusfm_status *failed = runner_predict(r, c->frame, c->settling, c->made, &c->place, &c->took);
    if (c->settling) c->late = atomic_load(&c->settling->late);
    c->exit_index = r->engine->exit_index;
    return failed;
}

static const char *name_of(const fallback_level *g) { return watchdog_runner(g->guard)->artefact->name; }

/* Asks about one golden frame; 0: the answer is not the one of the start, `why` says so. */
static int check(fallback_level *g, const call_limits *limits, const call_watcher *watcher, char *why, size_t size) {
    call c = {.golden = g->checked++};
    g->last_check_ns = now_ns();
    call_watcher quiet = {0};
    if (watcher) quiet = *watcher, quiet.missed = NULL;
    tusfm_status *failed = limits ? watchdog_call(g->guard, limits, &quiet, &c) : direct(g, &c);
    int64_t took = now_ns() - g->last_check_ns;
    g->check_took_ns = g->check_took_ns ? (3 * g->check_took_ns + took) / 4 : took;
    if (failed) copy_line(why, size, tusfm_status_text(failed));
    tusfm_status_free(failed);
    return !failed;
}

static int change(fallback *l, size_t to, const call_limits *limits, const call_watcher *watcher) {
    fallback_level *g = &l->levels[to];
    char why[300];
    if (!check(g, limits, watcher, why, sizeof why)) {
        copy_line(g->failed, sizeof g->failed, why);
        fallback_tell(l, TUSFM_WARNING, "engine %s cannot take over: %s", name_of(g), why);
        return 0;
    }
    g->failed[0] = 0, g->misses = 0;
    l->current = to;
    fallback_tell(l, TUSFM_WARNING, "%s answers from now on (the one before it failed)", name_of(g));
    return 1;
}

/* The next level that answers its golden frame: those below first, then those above, then those that failed before. */
static void next(fallback *l, const call_limits *limits, const call_watcher *watcher) {
    size_t here = l->current;
    for (size_t i = 1; i < l->count; i++) {
        size_t to = (here + i) % l->count;
        if (!l->levels[to].failed[0] && !watchdog_abandoned(l->levels[to].guard) && change(l, to, limits, watcher)) return;
    }
    if (now_ns() < l->retry_at_ns) return;
    /* not more often than once a second, or a level that fails at every frame would be tried at every frame */
    l->retry_at_ns = now_ns() + RETRY_NS;
    for (size_t i = 0; i < l->count; i++)
        if (l->levels[i].failed[0] && !watchdog_abandoned(l->levels[i].guard) && change(l, i, limits, watcher)) return;
}

static void after(fallback *l, fallback_level *g, const char *error, int late, const call_limits *limits, const call_watcher *watcher) {
    char misses[100];
    g->misses = late ? g->misses + 1 : 0;
    if (!*error && l->misses_in_a_row > 0 && g->misses >= l->misses_in_a_row && l->count > 1) {
        snprintf(misses, sizeof misses, "it passed its deadline %d times in a row", g->misses);
        error = misses;
    }
    if (!*error || g->failed[0]) return;
    copy_line(g->failed, sizeof g->failed, error);
    g->misses = 0;
    fallback_tell(l, TUSFM_WARNING, "engine %s failed: %s", name_of(g), g->failed);
    next(l, limits, watcher);
}

static tusfm_status *ask(fallback_level *g, call *c, const call_limits *limits, const call_watcher *watcher, answered *said) {
    said->there = 0, said->late = 0, said->error[0] = 0;
    said->by = watchdog_runner(g->guard);
    if (g->failed[0]) {
        snprintf(said->error, sizeof said->error, "no artefact is left that answers; %.100s: %.160s", name_of(g), g->failed);
        return NULL;
    }
    tusfm_status *failed = limits && !c->settling ? watchdog_call(g->guard, limits, watcher, c) : direct(g, c);
    int32_t code = tusfm_status_code(failed);
    if (code == TUSFM_FRAME || code == TUSFM_NO_MEMORY) return failed;
    said->late = c->late;
    said->there = !failed;
    if (failed)
        copy_line(said->error, sizeof said->error, tusfm_status_text(failed));
    else if (!c->made->valid)
        copy_line(said->error, sizeof said->error, "it gave an output that is not finite");
    tusfm_status_free(failed);
    return NULL;
}

tusfm_status *fallback_answer(fallback *l, call *c, const call_limits *limits, const call_watcher *watcher, int insist,
                            answered *said) {
    for (;;) {
        size_t here = l->current;
        c->golden = -1;
        TRY(ask(&l->levels[here], c, limits, watcher, said));
        if (l->count > 1 || limits) after(l, &l->levels[here], said->error, said->late, limits, watcher);
        if (!said->error[0] || !insist || l->current == here) return NULL;
    }
}

int fallback_due(const fallback *l) {
    const fallback_level *g = &l->levels[l->current];
    return l->recheck_s > 0 && (double)(now_ns() - g->last_check_ns) / 1e9 >= l->recheck_s;
}

void fallback_between(fallback *l, const call_limits *limits, const call_watcher *watcher, double spare_ms) {
    fallback_level *g = &l->levels[l->current];
    char why[300];
    if (g->failed[0]) {
        if (now_ns() >= l->retry_at_ns) next(l, limits, watcher);
        return;
    }
    if (!fallback_due(l)) return;
    double since = (double)(now_ns() - g->last_check_ns) / 1e9 / l->recheck_s;
    int fits = since >= LATEST || spare_ms >= ROOM * (double)g->check_took_ns / 1e6 * (LATEST - since) / (LATEST - 1);
    if (fits && !check(g, limits, watcher, why, sizeof why)) after(l, g, why, 0, limits, watcher);
}
