#include "states.h"

#include <stdio.h>

static const double STALE_PERIODS = 2, SLACK_MS = 50, FROZEN_PERIODS = 10, CONTACT_MS = 625;
enum { IDENTICAL_FRAMES = 10, FRESH_RESULTS = 3 };

const char *state_name(int32_t state) {
    static const char *const names[] = {"live", "stale", "frozen", "lost", "degraded"};
    return state >= 0 && state < 5 ? names[state] : "";
}

void states_init(states *s, int64_t now) { *s = (states){.state = TUSFM_LOST, .began_ns = now}; }

/* -1: nothing to say about arrivals. */
static int32_t arrivals(states *s, int64_t now, double period) {
    int64_t last = s->frame_ns ? s->frame_ns : s->began_ns;
    double gap = (double)(now - last) / 1e6;
    int since = s->contact_ns > last;
    double silent = (double)(now - (since ? s->contact_ns : last)) / 1e6;
    double stale_ms = STALE_PERIODS * period + SLACK_MS, long_ms = FROZEN_PERIODS * period + SLACK_MS;
    if (silent > (CONTACT_MS > stale_ms ? CONTACT_MS : stale_ms)) {
        snprintf(s->reason, sizeof s->reason, "no sign of life for %.0f ms", silent);
        return TUSFM_LOST;
    }
    if (gap > long_ms && since) {
        snprintf(s->reason, sizeof s->reason, "signs of life but no frame for %.0f ms", gap);
        return TUSFM_FROZEN;
    }
    if (!s->frame_ns) {
        snprintf(s->reason, sizeof s->reason, "waiting for the first frame");
        return s->state;
    }
    if (gap > stale_ms) {
        snprintf(s->reason, sizeof s->reason, "no frame for %.0f ms, %.1f periods", gap, gap / period);
        return TUSFM_STALE;
    }
    return -1;
}

static int32_t judge(states *s, int64_t now, double period) {
    int32_t found = arrivals(s, now, period);
    if (found >= 0) return found;
    if (s->identical >= IDENTICAL_FRAMES) {
        snprintf(s->reason, sizeof s->reason, "the same pixels in %lld frames", (long long)s->identical + 1);
        return TUSFM_FROZEN;
    }
    if (s->stale_left) {
        snprintf(s->reason, sizeof s->reason, "results are older than the budget");
        return TUSFM_STALE;
    }
    if (s->late_in_engine) {
        snprintf(s->reason, sizeof s->reason, "the engine passed its deadline");
        return TUSFM_DEGRADED;
    }
    if (s->degraded_left) {
        copy_line(s->reason, sizeof s->reason, s->why_degraded);
        return TUSFM_DEGRADED;
    }
    snprintf(s->reason, sizeof s->reason, "frames arrive and results are in time");
    return TUSFM_LIVE;
}

static int settle(states *s, int64_t now, double period) {
    int32_t after = judge(s, now, period);
    s->before = s->state;
    s->state = after;
    return s->before != after;
}

int states_frame(states *s, int64_t now, int64_t identical, double period_ms) {
    s->frame_ns = now, s->identical = identical;
    return settle(s, now, period_ms);
}

static int left_after(int left, int again) { return again ? FRESH_RESULTS : left > 0 ? left - 1 : 0; }

int states_result(states *s, int64_t now, int stale, const char *degraded, double period_ms) {
    s->late_in_engine = 0;
    s->stale_left = left_after(s->stale_left, stale);
    s->degraded_left = left_after(s->degraded_left, degraded != NULL);
    if (degraded) copy_line(s->why_degraded, sizeof s->why_degraded, degraded);
    return settle(s, now, period_ms);
}

int states_missed(states *s, int64_t now, double period_ms) {
    s->late_in_engine = 1;
    return settle(s, now, period_ms);
}

int states_tick(states *s, int64_t now, double period_ms) { return settle(s, now, period_ms); }
