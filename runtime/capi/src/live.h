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

/* A frame that is answered in its caller's thread (here.c). */
typedef struct frame_here {
    int active, running; /* running: in the engine, against the clock */
    int64_t begin_ns;
    int place;        /* in frames, where it is kept */
    int kept;         /* it lies there */
    int early;        /* keep frames before they are answered: one was overwritten before the end */
    int torn;         /* this one was */
    tusfm_frame view; /* its pixels are the caller's */
    const tusfm_lease *lease;
    settling settling;
} frame_here;

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
    int between;                /* the supervisor asks a golden frame, or tries an artefact again */
    int waits_here;             /* a caller wants to answer a frame itself, and waits for the supervisor */
    frame_here here;
};

tusfm_status *live_new(tusfm_session *s, live **made);
void live_free(live *l);

/* As reading_fill, for a result: pointers, and age, staleness and validity as of now. */
void live_hand_out(const live *l, live_result *result, tusfm_reading *reading);

call_limits live_limits(const tusfm_options *options, double period_ms);

tusfm_status *held_copy(held_frame *to, const tusfm_frame *from);

/* Releases the lock and reports a change of state. */
void live_unlock_and_tell(live *l, int changed);
/* Whether the frame is to be answered, by its place in the order; the lock is held. */
int live_takes(live *l, const tusfm_frame *frame);
/* When it arrived, as far as that can be. */
void live_received_at(tusfm_frame *frame, int64_t now);
/* Keeps the frame in a place for the next one, and compares it with the one before. Returns whether the state changed; the
 * lock is held. */
int live_keep(live *l, int place, int64_t now);
int live_unused_place(const live *l);
/* Makes the result of a call; the lock is held, and the caller wakes who waits for it. Returns whether the state changed. */
int live_publish(live *l, const tusfm_frame *frame, const call *c, const answered *said);
/* Keeps a result for the overlay, if it may be shown; the lock is held. */
void live_show(live *l, const live_result *result);
/* Hands the newest result out, if there is one; the lock is held. */
int live_take_result(live *l, tusfm_reading *reading);
void live_on_tick(void *live);
void live_on_miss(void *live);
tusfm_status *live_ready(tusfm_session *s, live **l);

/* here.c. Whether this session answers in its caller's thread. */
int live_in_place(const tusfm_session *s);
/* Watches a frame that is answered in its caller's thread until it has its answer; the lock is held. */
void live_attend(live *l);

/* swap.c */
tusfm_status *live_swap(live *l, fallback *new, const tusfm_swap_options *options, tusfm_swap_report *report);

#endif
