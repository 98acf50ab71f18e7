#include "live.h"

#include "drift_window.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const int64_t TICK_NS = 20000000, OLDEST_NS = 3600000000000, CLOSE_NS = 5000000000;
static const double WITHOUT_BUDGET_MS = 60000; /* an engine that takes a minute over a frame hangs */

/* ---- what was asked for ---- */

call_limits live_limits(const tusfm_options *o, double period_ms) {
    double deadline = o->deadline_ms > 0 ? o->deadline_ms : o->budget_ms > 0 ? o->budget_ms + period_ms : WITHOUT_BUDGET_MS;
    double usual = 8 * deadline > 500 ? 8 * deadline : 500;
    double give_up = o->give_up_ms <= 0 ? usual : o->give_up_ms > deadline ? o->give_up_ms : deadline;
    return (call_limits){deadline, give_up, o->grace_ms};
}

static double overlay_limit(const tusfm_options *o) {
    if (o->overlay_limit_ms > 0) return o->overlay_limit_ms;
    if (o->budget_ms <= 0) return WITHOUT_BUDGET_MS;
    return 3 * o->budget_ms > 250 ? 3 * o->budget_ms : 250;
}

/* ---- frames ---- */

static tusfm_status *held_room(held_frame *to, size_t need) {
    if (need <= to->room) return NULL;
    uint8_t *more = realloc(to->pixels, need);
    if (!more) return no_memory();
    to->pixels = more;
    to->room = need;
    return NULL;
}

tusfm_status *held_copy(held_frame *to, const tusfm_frame *from) {
    tue_picture image = frame_picture(from);
    size_t row = (size_t)image.columns * (size_t)image.column_stride;
    TRY(held_room(to, row * (size_t)image.rows));
    int here = image.pixels == to->pixels && (image.row_stride == (ptrdiff_t)row || image.rows == 1);
    for (int32_t y = 0; y < image.rows && !here; y++) /* a lent frame moves up inside its own memory */
        memmove(to->pixels + (size_t)y * row, image.pixels + y * image.row_stride, row);
    to->frame = *from;
    to->frame.pixels = to->pixels, to->frame.row_stride = (int64_t)row;
    to->frame.rows = image.rows, to->frame.columns = image.columns;
    to->frame.roi_row = to->frame.roi_column = to->frame.roi_rows = to->frame.roi_columns = 0;
    return NULL;
}

static int same_image(const held_frame *a, const held_frame *b) {
    const tusfm_frame *one = &a->frame, *other = &b->frame;
    return one->rows == other->rows && one->row_stride == other->row_stride && one->format == other->format &&
           same_pixels(a->pixels, b->pixels, (size_t)one->rows, (size_t)one->row_stride);
}

static void tell_state(live *l, int changed, int32_t before, int32_t after, const char *reason) {
    static const int rank[] = {0, 2, 3, 4, 1}; /* better to worse: live, degraded, stale, frozen, lost */
    if (changed)
        fallback_tell(l->s->now, rank[after] > rank[before] ? TUSFM_WARNING : TUSFM_INFO, "live state %s -> %s: %s",
                    state_name(before), state_name(after), reason);
}

void live_unlock_and_tell(live *l, int changed) {
    int32_t before = l->states.before, after = l->states.state;
    char reason[sizeof l->states.reason];
    if (changed) memcpy(reason, l->states.reason, sizeof reason);
    mutex_unlock(&l->lock);
    if (changed) tell_state(l, changed, before, after, reason);
}

int live_unused_place(const live *l) {
    int place = 0;
    while (place == l->last || place == l->in_engine || place == l->lent) place++;
    return place;
}

static int is_lent(const live *l, const tusfm_frame *frame) { return l->lent >= 0 && frame->pixels == l->frames[l->lent].pixels; }

/* Whether a frame that lies in lent memory lies there whole, and goes forwards. */
static tusfm_status *lent_check(const live *l, const tusfm_frame *frame) {
    if (!is_lent(l, frame)) return NULL;
    tusfm_frame whole = *frame;
    whole.roi_row = whole.roi_column = whole.roi_rows = whole.roi_columns = 0;
    tue_picture image = frame_picture(&whole);
    int64_t row = (int64_t)image.columns * image.column_stride;
    if (image.row_stride >= row && (int64_t)(image.rows - 1) * image.row_stride + row <= (int64_t)l->frames[l->lent].room) return NULL;
    return status_new(TUSFM_FRAME, "%dx%d pixels do not lie inside of the memory that tusfm_room gave", image.columns, image.rows);
}

int live_takes(live *l, const tusfm_frame *frame) {
    int order = order_judge(&l->order, frame->seq, frame->t_source_ns);
    l->counts.received++;
    if (order == ORDER_NEWER) return 1;
    if (order == ORDER_OUT) l->counts.out_of_order++;
    else l->counts.duplicate++;
    l->left_out++;
    return 0;
}

void live_received_at(tusfm_frame *frame, int64_t now) {
    if (frame->t_recv_ns < now - OLDEST_NS || frame->t_recv_ns < 0 || frame->t_recv_ns > now) frame->t_recv_ns = now;
}

int live_keep(live *l, int place, int64_t now) {
    l->identical = l->last >= 0 && same_image(&l->frames[place], &l->frames[l->last]) ? l->identical + 1 : 0;
    l->last = place;
    return states_frame(&l->states, now, l->identical, l->period.ms);
}

static tusfm_status *take_in(live *l, const tusfm_frame *frame, int *changed) {
    int64_t now = now_ns();
    if (!live_takes(l, frame)) return NULL;
    int free_place = is_lent(l, frame) ? l->lent : live_unused_place(l);
    held_frame *held = &l->frames[free_place];
    tusfm_status *failed = held_copy(held, frame);
    if (failed) {
        l->counts.rejected++;
        return failed;
    }
    if (l->pending >= 0) l->counts.overtaken++, l->left_out++;
    l->pending = free_place;
    if (free_place == l->lent) l->lent = -1;
    live_received_at(&held->frame, now);
    period_arrived(&l->period, now);
    *changed = live_keep(l, free_place, now);
    return NULL;
}

tusfm_status *live_ready(tusfm_session *s, live **l) {
    mutex_lock(&s->turn);
    *l = s->stream;
    mutex_unlock(&s->turn);
    if (*l) return NULL;
    TRY(session_take(s)); /* a prediction in progress ends first */
    tusfm_status *failed = live_new(s, l);
    mutex_lock(&s->turn);
    if (!failed) s->stream = *l;
    mutex_unlock(&s->turn);
    session_give(s);
    return failed;
}

tusfm_status *tusfm_submit(tusfm_session *s, const tusfm_frame *frame) {
    tusfm_frame taken;
    live *l = NULL;
    if (!s) return status_new(TUSFM_INPUT, "the session is NULL");
    TRY(live_ready(s, &l));
    tusfm_status *failed = frame_take(frame, &taken);
    if (!failed) failed = frame_check(&taken);
    int changed = 0;
    mutex_lock(&l->lock);
    if (!failed) failed = lent_check(l, &taken);
    if (failed)
        l->counts.received++, l->counts.rejected++, l->left_out++;
    else
        failed = take_in(l, &taken, &changed);
    int waiting = l->pending >= 0;
    live_unlock_and_tell(l, changed);
    if (waiting) condition_wake_all(&l->changed); /* after the lock was let go of: who wakes does not sleep again at once */
    return failed;
}

tusfm_status *tusfm_room(tusfm_session *s, int64_t bytes, uint8_t **pixels) {
    static const int64_t most = (int64_t)TUE_MAX_SIDE * TUE_MAX_SIDE * 4;
    live *l = NULL;
    if (!s || !pixels) return status_new(TUSFM_INPUT, "the session or the place for the answer is NULL");
    if (bytes < 1 || bytes > most) return status_new(TUSFM_INPUT, "a frame of %lld bytes is none", (long long)bytes);
    TRY(live_ready(s, &l));
    mutex_lock(&l->lock);
    if (l->lent < 0) l->lent = live_unused_place(l);
    held_frame *held = &l->frames[l->lent];
    size_t before = held->room;
    tusfm_status *failed = held_room(held, (size_t)bytes);
    if (!failed && held->room > before) memset(held->pixels, 0, held->room); /* its pages come now, not with a frame */
    if (!failed) *pixels = held->pixels;
    mutex_unlock(&l->lock);
    return failed;
}

void tusfm_contact(tusfm_session *s) {
    if (!s) return;
    mutex_lock(&s->turn);
    live *l = s->stream;
    mutex_unlock(&s->turn);
    if (!l) return;
    mutex_lock(&l->lock);
    l->states.contact_ns = now_ns();
    mutex_unlock(&l->lock);
}

/* ---- the thread that answers ---- */

void live_on_tick(void *user) {
    live *l = user;
    mutex_lock(&l->lock);
    live_unlock_and_tell(l, states_tick(&l->states, now_ns(), l->period.ms));
}

void live_on_miss(void *user) {
    live *l = user;
    fallback_tell(l->s->now, TUSFM_WARNING, "the engine passed its deadline");
    mutex_lock(&l->lock);
    live_unlock_and_tell(l, states_missed(&l->states, now_ns(), l->period.ms));
}

static const char *why_degraded(const answered *said, char *text, size_t size) {
    if (said->error[0])
        snprintf(text, size, "no usable answer: %.180s", said->error);
    else if (said->by->index > 0)
        snprintf(text, size, "artefact %d answers instead of the chosen one: %.120s", said->by->index, said->by->description);
    else if (said->late)
        snprintf(text, size, "the engine missed its deadline");
    else
        return NULL;
    return text;
}

void live_show(live *l, const live_result *result) {
    if (!result->reading.valid) return;
    tusfm_status *failed = answer_copy(&l->shown->made, &result->made);
    if (!failed) {
        l->shown->reading = result->reading;
        memcpy(l->shown->engine, result->engine, sizeof l->shown->engine);
        l->has_shown = 1;
    }
    tusfm_status_free(failed);
}

static void tell_watch(live *l, const tusfm_frame *frame, const answered *said) {
    live_watch *p = &l->watch;
    if (p->watched == l->s->now) {
        p->answers++;
        const fallback_level *first = &p->watched->levels[0];
        if (said->error[0] && !p->error[0]) snprintf(p->error, sizeof p->error, "it failed at a live frame: %.240s", said->error);
        if (first->failed[0] && !p->error[0]) snprintf(p->error, sizeof p->error, "its first artefact failed: %.240s", first->failed);
    }
    if (p->wants_pair && !p->has_pair && said->there && l->work->made.valid) {
        tusfm_status *failed = held_copy(&p->frame, frame);
        if (!failed) failed = answer_copy(&p->made, &l->work->made);
        p->has_pair = !failed;
        tusfm_status_free(failed);
    }
}

int live_publish(live *l, const tusfm_frame *frame, const call *c, const answered *said) {
    char text[300];
    const char *degraded = why_degraded(said, text, sizeof text);
    tusfm_reading *reading = &l->work->reading;
    int64_t now = now_ns();
    if (said->there) {
        reading_fill(reading, said->by, frame, &l->work->made, &c->place, &c->took, c->exit_index);
        if (l->drift) drift_window_observe(l->drift, reading);
    } else {
        tusfm_reading_init(reading, sizeof *reading);
        reading->seq = frame->seq, reading->t_recv_ns = frame->t_recv_ns;
        reading->engine = said->by->description, reading->level = said->by->index;
        l->work->made.valid = l->work->made.has_mask = 0;
        l->work->made.score_count = l->work->made.labels.count = 0;
    }
    double age = (double)(now - frame->t_recv_ns) / 1e6;
    reading->stale = l->s->options.budget_ms > 0 && age > l->s->options.budget_ms;
    int changed = states_result(&l->states, now, reading->stale, degraded, l->period.ms);
    reading->age_ms = age, reading->withheld = reading->stale, reading->degraded = degraded != NULL;
    reading->valid = said->there && reading->valid && reading->verified && !reading->withheld;
    reading->index = l->index++, reading->state = l->states.state;
    reading->dropped_since_last = l->before_this;
    copy_line(l->work->error, sizeof l->work->error, said->error);
    copy_line(l->work->engine, sizeof l->work->engine, reading->engine);
    l->counts.processed++;
    tell_watch(l, frame, said);
    live_result *before = l->ready;
    l->ready = l->work, l->work = before;
    l->counts.unseen += l->has_ready;
    l->has_ready = 1;
    return changed;
}

/* Answers the frame in the engine; the lock is held, and let go of meanwhile. */
static void answer_one(live *l, const call_watcher *watcher) {
    held_frame *held = &l->frames[l->in_engine];
    call_limits limits = live_limits(&l->s->options, l->period.ms);
    call c = {.frame = &held->frame, .golden = -1, .made = &l->work->made, .exit_index = -1};
    answered said;
    mutex_unlock(&l->lock);
    tusfm_status *failed = fallback_answer(l->s->now, &c, &limits, watcher, 0, &said);
    mutex_lock(&l->lock);
    int changed = 0;
    if (failed)
        l->counts.rejected++, l->left_out += l->before_this + 1;
    else
        changed = live_publish(l, &held->frame, &c, &said), live_show(l, l->ready);
    if (c.abandoned) { /* the thread that hangs may still look at these pixels: they stay its own */
        if (l->last == l->in_engine) l->last = -1;
        held->pixels = NULL, held->room = 0;
    }
    l->in_engine = -1;
    tusfm_status_free(failed);
    live_unlock_and_tell(l, changed);
    condition_wake_all(&l->answered);
    condition_wake_all(&l->changed);
    mutex_lock(&l->lock);
}

static void take_over(live *l) {
    if (!l->incoming) return;
    mutex_lock(&l->s->turn);
    l->s->now = l->incoming;
    mutex_unlock(&l->s->turn);
    l->incoming = NULL;
    l->incoming_taken = 1;
    condition_wake_all(&l->changed);
}

static void supervise(void *given) {
    live *l = given;
    call_watcher watcher = {live_on_miss, live_on_tick, l, TICK_NS, &l->no_later_than};
    mutex_lock(&l->lock);
    while (!l->closing) {
        if (l->here.active) {
            live_attend(l);
            continue;
        }
        take_over(l);
        call_limits limits = live_limits(&l->s->options, l->period.ms);
        double spare_ms = period_spare_ms(&l->period, now_ns());
        l->between = 1;
        live_unlock_and_tell(l, states_tick(&l->states, now_ns(), l->period.ms));
        fallback_between(l->s->now, &limits, &watcher, spare_ms);
        mutex_lock(&l->lock);
        l->between = 0;
        if (l->waits_here) condition_wake_all(&l->changed);
        if (l->pending < 0 && !l->closing && !l->incoming) condition_wait_until(&l->changed, &l->lock, now_ns() + TICK_NS);
        if (l->pending < 0 || l->closing) continue;
        l->in_engine = l->pending, l->pending = -1;
        l->before_this = l->left_out, l->left_out = 0;
        answer_one(l, &watcher);
    }
    if (l->pending >= 0) l->counts.closing++;
    l->pending = -1;
    condition_wake_all(&l->changed);
    condition_wake_all(&l->answered);
    mutex_unlock(&l->lock);
}

/* ---- beginning and end ---- */

tusfm_status *live_new(tusfm_session *s, live **made) {
    live *l = calloc(1, sizeof *l);
    if (!l) return no_memory();
    l->s = s;
    /* artefacts that take turns may see different features */
    tusfm_status *failed = s->options.fallback ? NULL : drift_window_new(WINDOW_FRAMES, &l->drift);
    if (failed) {
        free(l);
        return failed;
    }
    mutex_init(&l->lock);
    condition_init(&l->changed);
    condition_init(&l->answered);
    atomic_init(&l->no_later_than, INT64_MAX);
    l->pending = l->in_engine = l->last = l->lent = -1;
    period_init(&l->period);
    states_init(&l->states, now_ns());
    l->work = &l->all[0], l->ready = &l->all[1], l->taken = &l->all[2], l->shown = &l->all[3], l->shown_taken = &l->all[4];
    if (!thread_start(&l->supervisor, supervise, l)) {
        live_free(l);
        return status_new(TUSFM_NO_MEMORY, "the stream's thread cannot be started");
    }
    *made = l;
    return NULL;
}

void live_free(live *l) {
    if (!l) return;
    atomic_store(&l->no_later_than, now_ns() + CLOSE_NS);
    mutex_lock(&l->lock);
    l->closing = 1;
    condition_wake_all(&l->changed);
    mutex_unlock(&l->lock);
    thread_join(&l->supervisor);
    for (int i = 0; i < 4; i++) free(l->frames[i].pixels);
    for (int i = 0; i < 5; i++) answer_free(&l->all[i].made);
    free(l->watch.frame.pixels);
    answer_free(&l->watch.made);
    tusfm_drift_monitor_free(l->drift);
    condition_free(&l->changed);
    condition_free(&l->answered);
    mutex_free(&l->lock);
    free(l);
}

/* ---- readers ---- */

void live_hand_out(const live *l, live_result *result, tusfm_reading *reading) {
    *reading = result->reading;
    const answer *made = &result->made;
    reading->mask = made->has_mask ? made->mask : NULL;
    reading->scores = made->score_count ? made->scores : NULL;
    reading->labels = &made->labels;
    reading->error = result->error[0] ? result->error : NULL;
    reading->engine = result->engine;
    reading->age_ms = (double)(now_ns() - reading->t_recv_ns) / 1e6;
    reading->stale = reading->stale || (l->s->options.budget_ms > 0 && reading->age_ms > l->s->options.budget_ms);
    reading->withheld = reading->stale;
    reading->valid = reading->valid && !reading->withheld;
}

int live_take_result(live *l, tusfm_reading *reading) {
    if (!l->has_ready) return 0;
    live_result *before = l->taken;
    l->taken = l->ready, l->ready = before;
    l->has_ready = 0;
    live_hand_out(l, l->taken, reading);
    return 1;
}

static tusfm_status *stream_of(tusfm_session *s, const void *reading, const int32_t *there, live **l) {
    if (!s || !there) return status_new(TUSFM_INPUT, "the session or the place for the answer is NULL");
    TRY(struct_check(reading, "the reading"));
    mutex_lock(&s->turn);
    *l = s->stream;
    mutex_unlock(&s->turn);
    return *l ? NULL : status_new(TUSFM_INPUT, "nothing was submitted to this session yet");
}

tusfm_status *tusfm_newest(tusfm_session *s, double wait_ms, tusfm_reading *reading, int32_t *there) {
    live *l;
    tusfm_reading full;
    TRY(stream_of(s, reading, there, &l));
    int64_t end = now_ns() + (int64_t)(wait_ms > 0 ? fmin(wait_ms, 1e9) * 1e6 : 0);
    mutex_lock(&l->lock);
    while (!l->has_ready && !l->closing && now_ns() < end) condition_wait_until(&l->answered, &l->lock, end);
    int found = live_take_result(l, &full);
    mutex_unlock(&l->lock);
    if (found) struct_give(reading, &full, sizeof full);
    *there = found;
    return NULL;
}

tusfm_status *tusfm_overlay(tusfm_session *s, tusfm_reading *reading, int32_t *there) {
    live *l;
    tusfm_reading full;
    TRY(stream_of(s, reading, there, &l));
    tusfm_status *failed = NULL;
    int expired = 0;
    mutex_lock(&l->lock);
    double age = (double)(now_ns() - l->shown->reading.t_recv_ns) / 1e6;
    if (l->has_shown && age > overlay_limit(&s->options)) l->has_shown = 0, expired = 1;
    int found = l->has_shown;
    if (found) {
        failed = answer_copy(&l->shown_taken->made, &l->shown->made);
        l->shown_taken->reading = l->shown->reading;
        memcpy(l->shown_taken->engine, l->shown->engine, sizeof l->shown_taken->engine);
        live_hand_out(l, l->shown_taken, &full);
        full.stale = l->shown->reading.stale, full.withheld = 0, full.valid = 1; /* it may be shown until it expires */
    }
    mutex_unlock(&l->lock);
    if (expired) fallback_tell(s->now, TUSFM_WARNING, "the last result that could be shown is %.0f ms old", age);
    if (failed) return failed;
    if (found) struct_give(reading, &full, sizeof full);
    *there = found;
    return NULL;
}

tusfm_status *tusfm_get_counters(tusfm_session *s, tusfm_counters *counters) {
    if (!s) return status_new(TUSFM_INPUT, "the session is NULL");
    TRY(struct_check(counters, "the counters"));
    tusfm_counters full = {.state = TUSFM_LOST};
    mutex_lock(&s->turn);
    live *l = s->stream;
    mutex_unlock(&s->turn);
    if (l) {
        mutex_lock(&l->lock);
        const live_counts *n = &l->counts;
        full = (tusfm_counters){.state = l->states.state,
                                .received = n->received,
                                .processed = n->processed,
                                .overtaken = n->overtaken,
                                .out_of_order = n->out_of_order,
                                .duplicate = n->duplicate,
                                .closing = n->closing,
                                .rejected = n->rejected,
                                .waiting = (l->pending >= 0) + (l->in_engine >= 0),
                                .unseen = n->unseen,
                                .restarts = l->order.restarts};
        mutex_unlock(&l->lock);
    }
    struct_give(counters, &full, sizeof full);
    return NULL;
}
