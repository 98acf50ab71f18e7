/* A watchdog around one runner: a call has a deadline, is cancelled when it takes too long, given up when it hangs; as
 * live/watchdog.py. The call runs in a thread of the watchdog's own while the caller waits with a clock. */
#ifndef TUSFM_WATCHDOG_H
#define TUSFM_WATCHDOG_H

#include "runner.h"

#include <stdatomic.h>

typedef struct call_limits {
    double deadline_ms, give_up_ms, grace_ms; /* from the beginning of the call */
} call_limits;

typedef struct watchdog watchdog;

/* What a call needs and gives. The answer's memory is swapped with the watchdog's: nothing is copied. */
typedef struct call {
    const tusfm_frame *frame;  /* its pixels must live until the call has ended, or for ever if it is abandoned */
    settling *settling;        /* not NULL: it runs in the calling thread, and somebody else watches it */
    int32_t golden;            /* not -1: ask about this golden frame instead, and compare */
    answer *made;
    placement place;
    timings took;
    int32_t exit_index;
    int late;      /* it passed its deadline */
    int abandoned; /* it hangs: neither runner nor frame may be freed or used again */
} call;

/* Called in the caller's thread while it waits: once when the deadline has passed, and at every tick. */
typedef struct call_watcher {
    void (*missed)(void *user);
    void (*tick)(void *user);
    void *user;
    int64_t tick_ns;
    atomic_llong *no_later_than; /* a time at which every wait ends, or NULL */
} call_watcher;

tusfm_status *watchdog_new(runner *r, watchdog **made); /* from now on it owns the runner */
tusfm_status *watchdog_call(watchdog *w, const call_limits *limits, const call_watcher *watcher, call *c);
/* Whether a call hangs: the watchdog refuses every further one. */
int watchdog_abandoned(const watchdog *w);
runner *watchdog_runner(const watchdog *w);
void watchdog_cancel(watchdog *w);
/* After a call in progress has ended; an abandoned one frees itself whenever the engine comes back. */
void watchdog_free(watchdog *w);

#endif
