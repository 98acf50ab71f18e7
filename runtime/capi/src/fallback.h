/* The artefacts of a bundle in their order, each checked, and the next one takes over when one fails; as
 * live/fallback.py. What answers then is flagged degraded and told; nothing climbs back by itself. */
#ifndef TUSFM_FALLBACK_H
#define TUSFM_FALLBACK_H

#include "watchdog.h"

typedef struct fallback_level {
    watchdog *guard;
    char failed[300]; /* why it is not used, or "" */
    int32_t misses, checked;
    int64_t last_check_ns, check_took_ns;
} fallback_level;

typedef struct fallback {
    fallback_level *levels;
    size_t count;
    atomic_size_t current; /* whoever answers changes it, others look */
    shared_bundle *bundle;
    int32_t misses_in_a_row;
    double recheck_s;
    int64_t retry_at_ns;
    tusfm_log log;
    void *log_user;
    double verify_ms;
} fallback;

/* What was said about one frame. */
typedef struct answered {
    int there;       /* the call holds an answer */
    char error[300]; /* why there is none that can be used, or "" */
    int late;
    const runner *by;
} answered;

/* Opens the artefact that fits, and with options.fallback every further one of the bundle that runs here. */
tusfm_status *fallback_open(shared_bundle *bundle, const tusfm_options *options, fallback **opened);
void fallback_free(fallback *l);

runner *fallback_runner(const fallback *l); /* in use */

/* Answers a frame with the level in use and moves on when that fails. `limits` NULL: in this thread, without a clock.
 * `insist`: ask the next level about the same frame. Only TUSFM_FRAME and TUSFM_NO_MEMORY are failures. */
tusfm_status *fallback_answer(fallback *l, call *c, const call_limits *limits, const call_watcher *watcher, int insist,
                            answered *said);

/* Whether a golden frame is due. */
int fallback_due(const fallback *l);

/* What is due between two frames: a golden frame, a second try where no level is left. A golden frame that would not be
 * done in `spare_ms`, when the next live one is expected, is put off, for three times recheck_s at most. */
void fallback_between(fallback *l, const call_limits *limits, const call_watcher *watcher, double spare_ms);

void fallback_tell(const fallback *l, int32_t level, const char *format, ...) TUSFM_PRINTF(3, 4);

#endif
