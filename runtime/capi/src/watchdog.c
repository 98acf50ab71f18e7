#include "watchdog.h"

#include <stdlib.h>

struct watchdog {
    runner *r;
    thread worker;
    mutex lock;
    condition changed;
    const tusfm_frame *frame; /* of the job */
    int32_t golden;
    int has_job, done, stop, abandoned, orphan;
    answer made;
    placement place;
    timings took;
    int32_t exit_index;
    tusfm_status *failed;
};

tusfm_status *watchdog_new(runner *r, watchdog **made) {
    watchdog *w = calloc(1, sizeof *w);
    if (!w) return no_memory();
    mutex_init(&w->lock);
    condition_init(&w->changed);
    w->r = r;
    *made = w;
    return NULL;
}

static void destroy(watchdog *w) {
    runner_free(w->r);
    answer_free(&w->made);
    tusfm_status_free(w->failed);
    condition_free(&w->changed);
    mutex_free(&w->lock);
    free(w);
}

static void serve(void *given) {
    watchdog *w = given;
    mutex_lock(&w->lock);
    for (;;) {
        while (!w->has_job && !w->stop) condition_wait(&w->changed, &w->lock);
        if (!w->has_job) break;
        mutex_unlock(&w->lock);
        tusfm_status *failed = w->golden >= 0 ? runner_check(w->r, w->golden)
                                              : runner_predict(w->r, w->frame, NULL, &w->made, &w->place, &w->took);
        mutex_lock(&w->lock);
        w->exit_index = w->r->engine->exit_index;
        w->failed = failed;
        w->has_job = 0;
        w->done = 1;
        int orphan = w->orphan;
        mutex_unlock(&w->lock);
        if (orphan) { /* its owner has gone: this thread is the last to know it */
            destroy(w);
            return;
        }
        condition_wake_all(&w->changed); /* whoever wakes finds the lock free; who frees joins this thread first */
        mutex_lock(&w->lock);
    }
    mutex_unlock(&w->lock);
}

/* Waits until the job is done or a time has come; the lock is held. */
static void wait_until(watchdog *w, int64_t end_ns, const call_watcher *watcher) {
    while (!w->done) {
        if (watcher->no_later_than && atomic_load(watcher->no_later_than) < end_ns)
            end_ns = atomic_load(watcher->no_later_than);
        int64_t now = now_ns(), next = end_ns;
        if (now >= end_ns) return;
        if (watcher->tick && watcher->tick_ns && now + watcher->tick_ns < next) next = now + watcher->tick_ns;
        condition_wait_until(&w->changed, &w->lock, next);
        if (w->done || !watcher->tick) continue;
        mutex_unlock(&w->lock);
        watcher->tick(watcher->user);
        mutex_lock(&w->lock);
    }
}

static int64_t after_ms(int64_t begin, double ms) { return begin + (int64_t)(ms * 1e6); }

static tusfm_status *wait_for_answer(watchdog *w, const call_limits *limits, const call_watcher *watcher, call *c) {
    int64_t begin = now_ns();
    wait_until(w, after_ms(begin, limits->deadline_ms), watcher);
    if (w->done) return NULL;
    c->late = 1;
    mutex_unlock(&w->lock);
    if (watcher->missed) watcher->missed(watcher->user);
    mutex_lock(&w->lock);
    wait_until(w, after_ms(begin, limits->give_up_ms), watcher);
    if (w->done) return NULL;
    mutex_unlock(&w->lock);
    engine_cancel(w->r->engine);
    mutex_lock(&w->lock);
    wait_until(w, after_ms(now_ns(), limits->grace_ms), watcher);
    if (w->done) {
        if (!w->failed) return NULL;
        tusfm_status_free(w->failed);
        w->failed = status_new(TUSFM_ENGINE, "no answer within %.0f ms, cancelled", limits->give_up_ms);
        return NULL;
    }
    w->abandoned = c->abandoned = 1;
    return status_new(TUSFM_ENGINE, "no answer within %.0f ms, no reaction to cancelling: it was abandoned",
                      limits->give_up_ms);
}

tusfm_status *watchdog_call(watchdog *w, const call_limits *limits, const call_watcher *watcher, call *c) {
    mutex_lock(&w->lock);
    c->late = c->abandoned = 0;
    tusfm_status *failed = NULL;
    if (w->abandoned) failed = status_new(TUSFM_ENGINE, "the engine hangs in an earlier frame");
    if (!failed && !w->worker.started && !thread_start(&w->worker, serve, w))
        failed = status_new(TUSFM_NO_MEMORY, "the engine's thread cannot be started");
    if (failed) {
        mutex_unlock(&w->lock);
        return failed;
    }
    w->frame = c->frame, w->golden = c->golden;
    w->done = 0, w->has_job = 1;
    mutex_unlock(&w->lock);
    condition_wake_all(&w->changed);
    mutex_lock(&w->lock);
    failed = wait_for_answer(w, limits, watcher, c);
    if (!failed) {
        failed = w->failed;
        w->failed = NULL;
        if (!failed && c->golden < 0) {
            answer before = *c->made;
            *c->made = w->made;
            w->made = before;
            c->place = w->place, c->took = w->took, c->exit_index = w->exit_index;
        }
    }
    mutex_unlock(&w->lock);
    return failed;
}

int watchdog_abandoned(const watchdog *w) { return w->abandoned; }

runner *watchdog_runner(const watchdog *w) { return w->r; }

void watchdog_cancel(watchdog *w) { engine_cancel(w->r->engine); }

void watchdog_free(watchdog *w) {
    if (!w) return;
    mutex_lock(&w->lock);
    int hangs = w->abandoned && !w->done;
    w->stop = 1;
    condition_wake_all(&w->changed);
    w->orphan = hangs; /* then the thread frees everything whenever the engine comes back */
    if (hangs) thread_detach(&w->worker);
    mutex_unlock(&w->lock);
    if (hangs) return;
    thread_join(&w->worker);
    destroy(w);
}
