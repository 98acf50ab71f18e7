/* The stream of a session: frames are copied into a slot of one, a thread answers the newest under a watchdog, readers
 * take the newest result; ages, states and drops as in live/loop.py. */
#ifndef TUSFM_LIVE_H
#define TUSFM_LIVE_H

#include "arrivals.h"
#include "session.h"
#include "states.h"

/* A frame with pixels of its own. */
typedef struct held_frame {
    tusfm_frame frame;
    uint8_t *pixels;
    size_t room;
} held_frame;

typedef struct live_result {
    tusfm_reading reading; /* its pointers are filled in when it is handed out */
    answer made;
    char error[300], engine[520];
} live_result;

typedef struct live_counts {
    int64_t received, processed, overtaken, out_of_order, duplicate, closing, rejected, unseen;
} live_counts;

/* What a swap looks at while it goes on. */
typedef struct live_watch {
    int wants_pair, has_pair; /* a frame and its running answer */
    held_frame frame;
    answer made;
    fallback *watched;    /* whose answers are counted */
    int64_t answers;
    char error[300]; /* the first that failed */
} live_watch;

struct live {
    tusfm_session *s;
    thread supervisor;
    mutex lock;
    condition changed, answered; /* answered: those who wait for a result alone */
    int closing;
    atomic_llong no_later_than;
    held_frame frames[4];
    int pending, in_engine, last, lent; /* places in frames, -1: none */
    live_counts counts;
    int64_t left_out, before_this, index;
    order_guard order;
    frame_period period;
    states states;
    int64_t identical;
    live_result *work, *ready, *taken, *shown, *shown_taken, all[5];
    int has_ready, has_shown;
    fallback *incoming; /* answers from the next frame on */
    int incoming_taken;
    live_watch watch;
    tusfm_drift_monitor *drift; /* NULL: each frame is judged by itself */
};

tusfm_status *live_new(tusfm_session *s, live **made);
void live_free(live *l);

/* As reading_fill, for a result: pointers, and age, staleness and validity as of now. */
void live_hand_out(const live *l, live_result *result, tusfm_reading *reading);

call_limits live_limits(const tusfm_options *options, double period_ms);

tusfm_status *held_copy(held_frame *to, const tusfm_frame *from);

/* swap.c */
tusfm_status *live_swap(live *l, fallback *new, const tusfm_swap_options *options, tusfm_swap_report *report);

#endif
