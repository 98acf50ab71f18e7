/* LIVE, STALE, FROZEN, LOST or DEGRADED, out of arrivals, contact, pixels and results; as live/state.py. Times are
 * handed in; whoever calls holds the lock. */
#ifndef TUSFM_STATES_H
#define TUSFM_STATES_H

#include "status.h"

typedef struct states {
    int32_t state; /* enum tusfm_state */
    int64_t began_ns, frame_ns, contact_ns; /* 0: none yet */
    int64_t identical;
    int stale_left, degraded_left, late_in_engine;
    int32_t before; /* of the last change */
    char reason[300], why_degraded[200];
} states;

void states_init(states *s, int64_t now);
/* Each returns whether the state changed; then `before`, `state` and `reason` say how. */
int states_frame(states *s, int64_t now, int64_t identical, double period_ms);
int states_result(states *s, int64_t now, int stale, const char *degraded, double period_ms); /* degraded NULL: not */
int states_missed(states *s, int64_t now, double period_ms);
int states_tick(states *s, int64_t now, double period_ms);

const char *state_name(int32_t state);

#endif
