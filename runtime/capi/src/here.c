/* tusfm_answer: a frame of a stream is answered in its caller's thread, from where it lies: no copy and no change of thread
 * on its way. Its reading is given away first; then the frame is compared with the one before it and kept, for the freeze
 * rule. The supervisor watches the time meanwhile. Order, states, results and golden frames are those of submitted frames
 * (live.c). */
#include "live.h"

static const int64_t WATCH_NS = 20000000;

/* Our own engine hangs by a fault of its own alone: a cancelled call ends at its next layer. */
int live_in_place(const tusfm_session *s) {
    return s->now->count == 1 && !s->options.fallback && fallback_runner(s->now)->engine->kind->own;
}

static void look(const tusfm_lease *lease, int32_t begins) {
    if (lease->look) lease->look(lease->user, begins);
}

static int holds(const tusfm_lease *lease) { return !lease->holds || lease->holds(lease->user); }

/* Keeps a copy of the frame in its place. */
static tusfm_status *keep(frame_here *h, held_frame *held) {
    h->kept = 1;
    return held_copy(held, &h->view);
}

/* After the input was prepared: whether it was one whole frame. What looks at the pixels later takes them from where they
 * lie, unless they were once overwritten before the end, or a swap wants them. */
static tusfm_status *settle(void *user, const tusfm_frame **frame) {
    live *l = user;
    frame_here *h = &l->here;
    held_frame *held = &l->frames[h->place];
    mutex_lock(&l->lock);
    int early = h->early || l->watch.wants_pair;
    mutex_unlock(&l->lock);
    if (early) {
        TRY(keep(h, held));
        *frame = &held->frame;
    }
    h->torn = !holds(h->lease);
    return h->torn ? status_new(TUSFM_FRAME, "the frame was overwritten while it was looked at") : NULL;
}

/* Watches a call until it has ended; the lock is held. */
void live_attend(live *l) {
    frame_here *h = &l->here;
    int cancelled = 0;
    while (h->active) {
        call_limits limits = live_limits(&l->s->options, l->period.ms);
        int late = atomic_load(&h->settling.late);
        double since_ms = (double)(now_ns() - h->begin_ns) / 1e6;
        live_unlock_and_tell(l, states_tick(&l->states, now_ns(), l->period.ms));
        if (h->running && !late && since_ms >= limits.deadline_ms) {
            atomic_store(&h->settling.late, 1);
            live_on_miss(l);
        }
        mutex_lock(&l->lock);
        if (h->running && !cancelled && since_ms >= limits.give_up_ms) {
            cancelled = 1;
            engine_cancel(fallback_runner(l->s->now)->engine);
        }
        double left_ms = (late ? limits.give_up_ms : limits.deadline_ms) - since_ms;
        int64_t wait = left_ms > 0 && left_ms * 1e6 < (double)WATCH_NS ? (int64_t)(left_ms * 1e6) + 1 : WATCH_NS;
        if (h->active) condition_wait_until(&l->changed, &l->lock, now_ns() + wait);
    }
}

/* Waits until nobody else answers; the lock is held. */
static void wait_for_turn(live *l) {
    l->waits_here = 1;
    while ((l->between || l->in_engine >= 0 || l->pending >= 0) && !l->closing) condition_wait(&l->changed, &l->lock);
    l->waits_here = 0;
}

static void begin(live *l, const tusfm_frame *frame, const tusfm_lease *lease) {
    frame_here *h = &l->here;
    h->begin_ns = now_ns();
    h->place = l->in_engine = live_unused_place(l);
    l->before_this = l->left_out, l->left_out = 0;
    h->view = *frame, h->lease = lease;
    live_received_at(&h->view, h->begin_ns);
    h->active = h->running = 1, h->torn = h->kept = 0;
    h->settling.settle = settle, h->settling.user = l;
    atomic_store(&h->settling.late, 0);
}

/* The result of the call, or why there is none; the lock is held. Returns whether the state changed. */
static int book(live *l, const call *c, const answered *said, const tusfm_status *failed) {
    frame_here *h = &l->here;
    h->running = 0;
    if (!failed) return live_publish(l, h->kept ? &l->frames[h->place].frame : &h->view, c, said);
    if (h->torn) l->counts.overtaken++;
    else l->counts.rejected++;
    l->left_out += l->before_this + 1;
    return 0;
}

/* What follows once the reading was given away: the frame is kept for the one after it, if it is still there. */
static void note(live *l, int found, int whole) {
    frame_here *h = &l->here;
    held_frame *held = &l->frames[h->place];
    if (whole && !h->kept) {
        look(h->lease, 1);
        tusfm_status *failed = keep(h, held);
        look(h->lease, 0);
        whole = !failed && holds(h->lease);
        h->early = h->early || !whole;
        tusfm_status_free(failed);
    }
    mutex_lock(&l->lock);
    if (found) live_show(l, l->taken);
    int changed = whole ? live_keep(l, h->place, h->begin_ns) : 0;
    h->active = 0;
    l->in_engine = -1;
    int wake = l->watch.has_pair || l->incoming || l->closing || l->s->now->levels[0].failed[0] || fallback_due(l->s->now);
    live_unlock_and_tell(l, changed);
    if (wake) condition_wake_all(&l->changed);
}

static tusfm_status *answer_here(live *l, const tusfm_frame *frame, const tusfm_lease *lease, tusfm_give give, void *user) {
    answered said = {0};
    tusfm_reading reading;
    call_watcher watcher = {live_on_miss, live_on_tick, l, WATCH_NS, &l->no_later_than};
    frame_here *h = &l->here;
    mutex_lock(&l->lock);
    wait_for_turn(l);
    if (l->closing || !live_takes(l, frame)) {
        mutex_unlock(&l->lock);
        return NULL;
    }
    begin(l, frame, lease);
    period_arrived(&l->period, h->begin_ns);
    int changed = states_frame(&l->states, h->begin_ns, l->identical, l->period.ms);
    call_limits limits = live_limits(&l->s->options, l->period.ms);
    live_unlock_and_tell(l, changed);
    call c = {.frame = &h->view, .settling = &h->settling, .golden = -1, .made = &l->work->made, .exit_index = -1};
    look(lease, 1);
    tusfm_status *failed = fallback_answer(l->s->now, &c, &limits, &watcher, 0, &said);
    look(lease, 0);
    if (!failed && !h->kept && !holds(lease)) { /* a second look, or one for drift, was at a newer frame */
        h->torn = h->early = 1;
        failed = status_new(TUSFM_FRAME, "the frame was overwritten before it was answered");
    }
    int torn = h->torn;
    mutex_lock(&l->lock);
    changed = book(l, &c, &said, failed);
    int found = live_take_result(l, &reading);
    live_unlock_and_tell(l, changed);
    if (found) give(user, &reading);
    note(l, found, !failed);
    if (!torn) return failed;
    tusfm_status_free(failed);
    return NULL;
}

tusfm_status *tusfm_answer(tusfm_session *s, const tusfm_frame *frame, const tusfm_lease *lease, tusfm_give give, void *user) {
    tusfm_frame taken;
    tusfm_lease lent;
    live *l = NULL;
    if (!s || !give) return status_new(TUSFM_INPUT, "the session or the function that takes the reading is NULL");
    TRY(lease_take(lease, &lent));
    TRY(live_ready(s, &l));
    TRY(session_take(s));
    tusfm_status *failed = frame_take(frame, &taken);
    if (!failed) failed = frame_check(&taken);
    if (failed) {
        mutex_lock(&l->lock);
        l->counts.received++, l->counts.rejected++, l->left_out++;
        mutex_unlock(&l->lock);
    } else if (!live_in_place(s)) {
        failed = status_new(TUSFM_UNSUPPORTED, "only the library's own engine, without a fallback, answers in the caller's thread: "
                                               "submit frames to this session instead");
    } else {
        failed = answer_here(l, &taken, &lent, give, user);
    }
    session_give(s);
    return failed;
}
