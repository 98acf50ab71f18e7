/* Another bundle takes over between two frames, and the old one comes back if it fails; as live/swap.py. */
#include "live.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct comparison {
    double sum, least, hc_max;
    int64_t frames, scores, heads;
} comparison;

/* ---- two answers to one frame ---- */

static tusfm_reading as_reading(const answer *made, const placement *place) {
    tusfm_reading reading;
    tusfm_reading_init(&reading, sizeof reading);
    reading.mask = made->mask, reading.mask_rows = made->mask_rows, reading.mask_columns = made->mask_columns;
    memcpy(reading.crop, place->crop, sizeof reading.crop);
    memcpy(reading.box, place->box, sizeof reading.box);
    reading.frame_rows = place->frame_rows, reading.frame_columns = place->frame_columns;
    return reading;
}

static void add_score(comparison *c, double score) {
    c->least = c->scores++ ? fmin(c->least, score) : score;
    c->sum += score;
}

static void add_dice(comparison *c, const uint8_t *a, const uint8_t *b, size_t count) {
    size_t in_a[256] = {0}, in_b[256] = {0}, both[256] = {0};
    for (size_t i = 0; i < count; i++) {
        in_a[a[i]]++, in_b[b[i]]++;
        if (a[i] == b[i]) both[a[i]]++;
    }
    double sum = 0;
    int labels = 0;
    for (int k = 1; k < 256; k++)
        if (in_a[k] + in_b[k]) sum += 2.0 * (double)both[k] / (double)(in_a[k] + in_b[k]), labels++;
    if (labels) add_score(c, sum / labels);
}

static tusfm_status *compare(comparison *c, const answer *one, const placement *one_place, const answer *other,
                             const placement *other_place) {
    if (one->has_mask && other->has_mask) {
        size_t count = (size_t)one_place->frame_rows * (size_t)one_place->frame_columns;
        uint8_t *masks = malloc(2 * count);
        if (!masks) return no_memory();
        tusfm_reading a = as_reading(one, one_place), b = as_reading(other, other_place);
        tusfm_status *failed = tusfm_mask_on_frame(&a, masks, 0);
        if (!failed) failed = tusfm_mask_on_frame(&b, masks + count, 0);
        if (!failed) add_dice(c, masks, masks + count, count);
        free(masks);
        if (failed) return failed;
    } else if (one->score_count && one->score_count == other->score_count) {
        double drift = 0;
        for (int32_t i = 0; i < one->score_count; i++)
            drift = fmax(drift, fabs((double)one->scores[i] - (double)other->scores[i]));
        add_score(c, 1.0 - drift);
    }
    double a = answer_hc_mm(one), b = answer_hc_mm(other);
    if (a > 0 && b > 0) c->hc_max = c->heads++ ? fmax(c->hc_max, fabs(a - b)) : fabs(a - b);
    return NULL;
}

/* ---- shadow and probation ---- */

static int wait_for_pair(live *l, int64_t end_ns, held_frame *frame, answer *made) {
    mutex_lock(&l->lock);
    l->watch.wants_pair = 1;
    while (!l->watch.has_pair && now_ns() < end_ns) condition_wait_until(&l->changed, &l->lock, end_ns);
    int found = l->watch.has_pair;
    if (found) { /* memory is exchanged, nothing copied */
        held_frame old_frame = *frame;
        answer old = *made;
        *frame = l->watch.frame, *made = l->watch.made;
        l->watch.frame = old_frame, l->watch.made = old;
        frame->frame.pixels = frame->pixels;
    }
    l->watch.has_pair = 0;
    mutex_unlock(&l->lock);
    return found;
}

static tusfm_status *shadow_frames(live *l, fallback *new, const tusfm_swap_options *options, comparison *c,
                                   held_frame *frame, answer *running, answer *shadow) {
    int64_t end = now_ns() + (int64_t)(options->patience_s * 1e9);
    call_limits limits = live_limits(&(tusfm_options){.grace_ms = 500}, 0);
    call_watcher quiet = {0};
    while (c->frames < options->shadow_frames) {
        placement place;
        answered said;
        if (!wait_for_pair(l, end, frame, running))
            return status_new(TUSFM_ENGINE, "only %lld of %d frames came for the shadow run", (long long)c->frames,
                              options->shadow_frames);
        call ask = {.frame = &frame->frame, .golden = -1, .made = shadow};
        TRY(fallback_answer(new, &ask, &limits, &quiet, 0, &said));
        if (said.error[0]) return status_new(TUSFM_ENGINE, "it failed in the shadow run: %.300s", said.error);
        TRY(frame_place(&frame->frame, fallback_runner(l->s->now)->spec, &place));
        TRY(compare(c, shadow, &ask.place, running, &place));
        c->frames++;
    }
    double mean = c->scores ? c->sum / (double)c->scores : 1.0;
    if (mean < options->min_dice) return status_new(TUSFM_ENGINE, "it differs: mean Dice %.3f in the shadow run", mean);
    return NULL;
}

static tusfm_status *shadow_run(live *l, fallback *new, const tusfm_swap_options *options, tusfm_swap_report *report) {
    comparison c = {.hc_max = NAN};
    held_frame frame = {0};
    answer running = {0}, shadow = {0};
    tusfm_status *failed = shadow_frames(l, new, options, &c, &frame, &running, &shadow);
    mutex_lock(&l->lock);
    l->watch.wants_pair = l->watch.has_pair = 0;
    mutex_unlock(&l->lock);
    report->shadow_frames = c.frames;
    report->dice_mean = c.scores ? c.sum / (double)c.scores : 1.0, report->dice_worst = c.scores ? c.least : 1.0;
    report->hc_max_mm = c.hc_max;
    free(frame.pixels);
    answer_free(&running);
    answer_free(&shadow);
    return failed;
}

/* Lets a fallback answer from the next frame on; gives back how long that took, ms. */
static double hand_over(live *l, fallback *to) {
    int64_t begin = now_ns();
    mutex_lock(&l->lock);
    l->incoming = to;
    l->incoming_taken = 0;
    l->watch.watched = to;
    l->watch.answers = 0;
    l->watch.error[0] = 0;
    condition_wake_all(&l->changed);
    while (!l->incoming_taken && !l->closing) condition_wait_until(&l->changed, &l->lock, now_ns() + 20000000);
    mutex_unlock(&l->lock);
    return (double)(now_ns() - begin) / 1e6;
}

static void probation(live *l, const tusfm_swap_options *options, char *fault, size_t size) {
    int64_t end = now_ns() + (int64_t)(options->patience_s * 1e9);
    fault[0] = 0;
    mutex_lock(&l->lock);
    live_watch *p = &l->watch;
    while (!p->error[0] && p->answers < options->probation_frames && now_ns() < end)
        condition_wait_until(&l->changed, &l->lock, end);
    if (p->error[0])
        copy_line(fault, size, p->error);
    else if (p->answers < options->probation_frames)
        snprintf(fault, size, "only %lld of %d frames came after the switch", (long long)p->answers, options->probation_frames);
    p->watched = NULL;
    mutex_unlock(&l->lock);
}

tusfm_status *live_swap(live *l, fallback *new, const tusfm_swap_options *options, tusfm_swap_report *report) {
    fallback *old = l->s->now;
    char fault[300];
    if (options->shadow_frames) TRY(shadow_run(l, new, options, report));
    report->switch_ms = hand_over(l, new);
    probation(l, options, fault, sizeof fault);
    if (!fault[0]) {
        report->outcome = TUSFM_SWITCHED;
        fallback_free(old);
        return NULL;
    }
    (void)hand_over(l, old);
    mutex_lock(&l->lock);
    l->watch.watched = NULL;
    mutex_unlock(&l->lock);
    report->outcome = TUSFM_ROLLED_BACK;
    copy_line(report->reason, sizeof report->reason, fault);
    fallback_free(new);
    return NULL;
}

/* ---- the call ---- */

static tusfm_status *same_task(const model_spec *here, const model_spec *there) {
    int same = here->task == there->task && here->label_count == there->label_count && json_equal(here->labels, there->labels);
    if (same) return NULL;
    return status_new(TUSFM_INPUT, "the other bundle does %s of %d labels, not %s of %d as the running one: open another session for it",
                      task_name(there->task), there->label_count, task_name(here->task), here->label_count);
}

static tusfm_status *open_other(tusfm_session *s, const char *path, tusfm_swap_report *report, fallback **new) {
    shared_bundle *bundle = NULL;
    int64_t begin = now_ns();
    TRY(shared_bundle_open(&(bundle_source){.folder = path}, s->demands, &bundle));
    copy_line(report->bundle_sha256, sizeof report->bundle_sha256, bundle->m.sha256);
    tusfm_status *failed = same_task(&s->now->bundle->m.spec, &bundle->m.spec);
    if (!failed) failed = fallback_open(bundle, &s->options, new);
    shared_bundle_free(bundle);
    report->load_ms = (double)(now_ns() - begin) / 1e6;
    return failed;
}

/* Nobody submits: the next prediction is the new one's. */
static tusfm_status *swap_between_calls(tusfm_session *s, fallback *new, tusfm_swap_report *report) {
    int64_t begin = now_ns();
    TRY(session_take(s));
    fallback *old = s->now;
    mutex_lock(&s->turn);
    s->now = new;
    mutex_unlock(&s->turn);
    session_give(s);
    report->switch_ms = (double)(now_ns() - begin) / 1e6;
    report->outcome = TUSFM_SWITCHED;
    fallback_free(old);
    return NULL;
}

tusfm_status *tusfm_swap(tusfm_session *s, const char *path, const tusfm_swap_options *options, tusfm_swap_report *report) {
    tusfm_swap_options taken;
    tusfm_swap_report full;
    fallback *new = NULL;
    if (!s || !path) return status_new(TUSFM_INPUT, "the session or the bundle's name is NULL");
    TRY(struct_check(report, "the report"));
    TRY(swap_options_take(options, &taken));
    tusfm_swap_report_init(&full, sizeof full);
    mutex_lock(&s->turn);
    live *l = s->stream;
    int other = s->swapping || (l && thread_is_me(&l->supervisor));
    if (!other) s->swapping = 1;
    mutex_unlock(&s->turn);
    if (other) return status_new(TUSFM_INPUT, "swap bundles one at a time, and not from one of the session's own callbacks");
    tusfm_status *failed = open_other(s, path, &full, &new);
    if (!failed) failed = l ? live_swap(l, new, &taken, &full) : swap_between_calls(s, new, &full);
    if (failed) { /* it never answered a frame */
        full.outcome = TUSFM_REFUSED;
        copy_line(full.reason, sizeof full.reason, tusfm_status_text(failed));
        fallback_free(new);
        tusfm_status_free(failed);
    } else if (full.outcome == TUSFM_SWITCHED) {
        snprintf(full.reason, sizeof full.reason, "%.240s answers", fallback_runner(s->now)->description);
    }
    static const char *const outcomes[] = {"switched", "refused", "rolled back"};
    fallback_tell(s->now, TUSFM_WARNING, "bundle swap %s: %s", outcomes[full.outcome], full.reason);
    mutex_lock(&s->turn);
    s->swapping = 0;
    mutex_unlock(&s->turn);
    struct_give(report, &full, sizeof full);
    return NULL;
}
