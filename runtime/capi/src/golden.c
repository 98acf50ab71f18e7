#include "golden.h"

#include "want.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static const double MAX_LIMIT = 1e6; /* a larger number in a gate's report is no limit */

/* DEFAULT_LIMITS of golden.py, and the names that gates give some of them. */
enum limit { DICE_MEAN, DICE_WORST, HC_P95, DIFFERING, MIN_COVERAGE, TOP1, DRIFT_MEAN, DRIFT_WORST, COSINE_MEAN, COSINE_WORST, LIMITS };
static const struct {
    const char *name, *also;
    double value;
} defaults[LIMITS] = {{"dice_mean", NULL, 0.99},
                      {"dice_worst", NULL, 0.95},
                      {"hc_p95_mm", NULL, 1.0},
                      {"differing_pixels", NULL, 0.005},
                      {"min_coverage", NULL, 0.01},
                      {"top1", NULL, 0.99},
                      {"drift_mean", NULL, 0.02},
                      {"drift_worst", "probability_drift", 0.10},
                      {"cosine_mean", NULL, 0.99},
                      {"cosine_worst", "cosine", 0.97}};

/* ---- the files ---- */

static tusfm_status *open_arrays(const manifest *m, const char *path, tensors *t) {
    const file_entry *entry = manifest_file(m, path);
    if (!entry || !entry->data) return status_new(TUSFM_BUNDLE, "the bundle has no file %s", path);
    return tensors_open(entry->data, (size_t)entry->size, path, MAX_TENSORS, t);
}

static tusfm_status *find_logits(const tensors *t, const char *path, int32_t count, const tensor **logits) {
    *logits = tensors_find(t, "logits");
    if (!*logits || ((*logits)->dtype != F16 && (*logits)->dtype != F32 && (*logits)->dtype != F64) || (*logits)->axes < 2)
        return status_new(TUSFM_BUNDLE, "%s holds no logits", path);
    if ((*logits)->shape[0] != count)
        return status_new(TUSFM_BUNDLE, "the bundle has %d golden frames and %lld golden answers", count,
                          (long long)(*logits)->shape[0]);
    return NULL;
}

static tusfm_status *find_frames(golden_set *g) {
    const tensor *p = g->pixels = tensors_find(&g->frames, "pixels");
    const tensor *s = g->spacing = tensors_find(&g->frames, "spacing_mm");
    const tensor *n = g->seeds = tensors_find(&g->frames, "seeds");
    if (!p || !s || !n || p->dtype != U8 || s->dtype != F64 || n->dtype != I64 || p->axes != 3 || s->axes != 2 ||
        n->axes != 1 || p->shape[0] < 1 || p->shape[0] > 65536 || s->shape[0] != p->shape[0] || s->shape[1] != 2 ||
        n->shape[0] != p->shape[0] || p->shape[1] > TUE_MAX_SIDE || p->shape[2] > TUE_MAX_SIDE)
        return status_new(TUSFM_BUNDLE, "%s does not hold golden frames: its arrays do not fit together", GOLDEN_FRAMES);
    g->count = (int32_t)p->shape[0];
    for (int32_t i = 0; i < g->count; i++) {
        tusfm_frame frame = golden_frame(g, i);
        frame.seq = 0;
        if (frame.spacing_row_mm == 0 || frame.spacing_column_mm == 0) frame.spacing_row_mm = -1; /* has to be known */
        tusfm_status *failed = frame_check(&frame);
        if (failed) return status_as(status_within(failed, GOLDEN_FRAMES), TUSFM_BUNDLE);
    }
    return NULL;
}

static tusfm_status *open_all(const manifest *m, const artefact *a, golden_set *g) {
    TRY(open_arrays(m, GOLDEN_FRAMES, &g->frames));
    TRY(find_frames(g));
    TRY(open_arrays(m, GOLDEN_REFERENCE, &g->reference));
    TRY(find_logits(&g->reference, GOLDEN_REFERENCE, g->count, &g->reference_logits));
    TRY(open_arrays(m, a->golden, &g->own));
    return find_logits(&g->own, a->golden, g->count, &g->own_logits);
}

tusfm_status *golden_open(const manifest *m, const artefact *a, golden_set **opened) {
    golden_set *g = calloc(1, sizeof *g);
    if (!g) return no_memory();
    tusfm_status *failed = open_all(m, a, g);
    if (failed)
        golden_free(g);
    else
        *opened = g;
    return failed;
}

void golden_free(golden_set *g) {
    if (!g) return;
    tensors_close(&g->frames);
    tensors_close(&g->reference);
    tensors_close(&g->own);
    free(g);
}

tusfm_frame golden_frame(const golden_set *g, int32_t index) {
    tusfm_frame frame;
    tusfm_frame_init(&frame, sizeof frame);
    frame.rows = (int32_t)g->pixels->shape[1], frame.columns = (int32_t)g->pixels->shape[2];
    frame.pixels = g->pixels->data + (size_t)index * (size_t)frame.rows * (size_t)frame.columns;
    frame.spacing_row_mm = tensor_number(g->spacing, 2 * (size_t)index);
    frame.spacing_column_mm = tensor_number(g->spacing, 2 * (size_t)index + 1);
    frame.seq = tensor_integer(g->seeds, (size_t)index);
    frame.phantom = 1;
    return frame;
}

/* ---- numbers ---- */

typedef struct numbers {
    int32_t frames, counted, small, heads, rows;
    double logit_abs, differing, hc; /* against the own answers */
    double lowest, highest;          /* of the own answers */
    int any_head;
    double dice_sum, dice_worst, small_differing, *hc_differences;
    double same, drift_sum, drift_worst, cosine_sum, cosine_worst;
} numbers;

/* The larger, and NaN if either is. */
static double worst(double a, double b) { return isnan(a) || isnan(b) ? NAN : a > b ? a : b; }
static double least(double a, double b) { return isnan(a) || isnan(b) ? NAN : a < b ? a : b; }

static double differing(const answer *got, const answer *want, size_t plane) {
    if (!got->has_mask || !want->has_mask) return got->has_mask == want->has_mask ? 0.0 : 1.0;
    size_t count = 0;
    for (size_t i = 0; i < plane; i++) count += got->mask[i] != want->mask[i];
    return (double)count / (double)plane;
}

/* Mean over the labels but the background of 2 |A and B| / (|A| + |B|). */
static double dice(const answer *got, const answer *want, size_t plane) {
    size_t a[256] = {0}, b[256] = {0}, both[256] = {0};
    if (!got->has_mask || !want->has_mask) return NAN;
    for (size_t i = 0; i < plane; i++) {
        a[got->mask[i]]++, b[want->mask[i]]++;
        if (got->mask[i] == want->mask[i]) both[got->mask[i]]++;
    }
    double sum = 0;
    int labels = 0;
    for (int k = 1; k < 256; k++)
        if (a[k] + b[k]) sum += 2.0 * (double)both[k] / (double)(a[k] + b[k]), labels++;
    return labels ? sum / labels : 1.0;
}

static double coverage(const answer *want, size_t plane) {
    size_t count = 0;
    for (size_t i = 0; want->has_mask && i < plane; i++) count += want->mask[i] != 0;
    return (double)count / (double)plane;
}

static void add_own(numbers *n, const answer *got, const answer *want, size_t plane) {
    n->differing = worst(n->differing, differing(got, want, plane));
    if (want->labels.count) n->any_head = 1;
    n->hc = worst(n->hc, fabs(answer_hc_mm(got) - answer_hc_mm(want)));
}

static void add_reference(numbers *n, const answer *got, const answer *want, size_t plane, double min_coverage) {
    if (coverage(want, plane) < min_coverage) {
        n->small++;
        n->small_differing = worst(n->small_differing, differing(got, want, plane));
        return;
    }
    double overlap = dice(got, want, plane);
    n->dice_worst = n->counted++ ? least(n->dice_worst, overlap) : overlap;
    n->dice_sum += overlap;
    if (want->labels.count) n->hc_differences[n->heads++] = fabs(answer_hc_mm(got) - answer_hc_mm(want));
}

static void add_classes(numbers *n, const float *got, const float *want, int32_t classes, float *p, float *q) {
    probabilities(got, classes, p);
    probabilities(want, classes, q);
    int32_t first = 0, second = 0;
    double drift = 0;
    for (int32_t k = 0; k < classes; k++) {
        if (p[k] > p[first]) first = k;
        if (q[k] > q[second]) second = k;
        drift = worst(drift, fabs((double)p[k] - (double)q[k]));
    }
    if (classes == 1) first = p[0] >= 0.5f, second = q[0] >= 0.5f;
    n->same += first == second;
    n->drift_sum += drift;
    n->drift_worst = worst(n->drift_worst, drift);
    n->rows++;
}

static void add_cosine(numbers *n, const float *got, const float *want, size_t count) {
    double a = 0, b = 0, both = 0, cosine;
    for (size_t i = 0; i < count; i++) {
        a += (double)got[i] * (double)got[i];
        b += (double)want[i] * (double)want[i];
        both += (double)got[i] * (double)want[i];
    }
    double size = sqrt(a) * sqrt(b);
    if (!isfinite(a) || !isfinite(b)) cosine = NAN;
    else cosine = size > 0 ? both / size : (double)(a == 0 && b == 0);
    n->cosine_worst = n->rows++ ? least(n->cosine_worst, cosine) : cosine;
    n->cosine_sum += cosine;
}

/* ---- one frame ---- */

typedef struct check {
    runner *r;
    int against_reference;
    const tensor *stored, *readings; /* readings NULL: there are none */
    int32_t golden_count;
    float *want; /* stored logits of one frame */
    float *p, *q;
    answer got_answer, want_answer;
    double limits[LIMITS];
    numbers n;
    int other_readings; /* the manifest reads the stored answers otherwise than they were read */
} check;

static tusfm_status *compare_masks(check *c, const engine_output *logits, size_t count, const placement *place) {
    size_t plane = (size_t)c->r->spec->rows * (size_t)c->r->spec->columns;
    engine_output got = *logits, want = *logits; /* K H W with the leading 1 again */
    memmove(got.shape + 1, logits->shape, sizeof got.shape - sizeof *got.shape);
    got.axes = logits->axes + 1, got.shape[0] = 1, got.count = count;
    memcpy(want.shape, got.shape, sizeof want.shape);
    want.axes = got.axes, want.data = c->want, want.count = count;
    TRY(answer_make(&c->r->answerer, &got, 1, NULL, place, &c->got_answer));
    TRY(answer_make(&c->r->answerer, &want, 1, NULL, place, &c->want_answer));
    if (c->against_reference)
        add_reference(&c->n, &c->got_answer, &c->want_answer, plane, c->limits[MIN_COVERAGE]);
    else
        add_own(&c->n, &c->got_answer, &c->want_answer, plane);
    return NULL;
}

/* What is read of one label, in the order of NUMBERS in golden.py; numbers that are not known are NaN. */
enum { READ_NUMBERS = 22 };

static void numbers_of(const label_reading *label, double out[READ_NUMBERS]) {
    const tue_measurement *m = &label->measured;
    int mm = m->found && label->has_spacing, ellipse_mm = mm && label->has_ellipse;
    const double values[READ_NUMBERS] = {
        m->found, m->touches_border, m->cut_by_sector, m->found ? m->confidence : NAN, m->area_px, mm ? m->area_mm2 : NAN,
        m->box_px[0], m->box_px[1], m->box_px[2], m->box_px[3], m->centroid_px[0], m->centroid_px[1],
        ellipse_mm ? m->hc_mm : NAN, m->hc_px, ellipse_mm ? m->axes_mm[0] : NAN, ellipse_mm ? m->axes_mm[1] : NAN,
        m->axes_px[0], m->axes_px[1], m->centre_px[0], m->centre_px[1], m->angle_deg,
        m->found && label->has_ellipse ? m->agreement : NAN};
    memcpy(out, values, sizeof values);
}

static int same_numbers(const tensor *stored, size_t at, const double *now, size_t count) {
    for (size_t i = 0; i < count; i++) {
        double then = tensor_number(stored, at + i);
        if (then != now[i] && !(isnan(then) && isnan(now[i]))) return 0;
    }
    return 1;
}

/* Reads a stored answer by the manifest's model; c->want holds it. The arithmetic is exact, so that any difference from
 * the reading that was stored is the manifest's. */
static tusfm_status *compare_readings(check *c, const engine_output *logits, int32_t index, const placement *place) {
    const model_spec *spec = c->r->spec;
    if (!c->readings) return NULL;
    size_t row = c->readings->count / (size_t)c->golden_count, at = (size_t)index * row, used = 0;
    size_t count = c->stored->count / (size_t)c->stored->shape[0];
    engine_output want = {.data = c->want, .count = count, .axes = logits->axes + 1, .shape = {1}};
    memcpy(want.shape + 1, logits->shape, (size_t)logits->axes * sizeof *want.shape);
    if (all_finite(&want, 1) && spec->task == TASK_CLASSIFY) {
        size_t classes = (size_t)logits->shape[logits->axes - 1];
        for (; used < count; used += classes) {
            double shares[1];
            probabilities(c->want + used, (int32_t)classes, c->p);
            for (size_t k = 0; k < classes && used + k < row; k++) {
                shares[0] = (double)c->p[k];
                if (!same_numbers(c->readings, at + used + k, shares, 1)) c->other_readings = 1;
            }
        }
    } else if (spec->task == TASK_SEGMENT) {
        TRY(answer_make(&c->r->answerer, &want, 1, c->r->tensor, place, &c->want_answer));
        for (int32_t i = 0; i < c->want_answer.labels.count; i++, used += READ_NUMBERS) {
            double now[READ_NUMBERS];
            numbers_of(&c->want_answer.labels.all[i], now);
            if (used + READ_NUMBERS > row || !same_numbers(c->readings, at + used, now, READ_NUMBERS)) c->other_readings = 1;
        }
    }
    if (used != row) c->other_readings = 1;
    return NULL;
}

static tusfm_status *compare_frame(check *c, int32_t index) {
    placement place;
    engine_output logits;
    tusfm_frame frame = golden_frame(c->r->golden, index);
    TRY(runner_logits(c->r, &frame, &place, &logits));
    size_t count = c->stored->count / (size_t)c->stored->shape[0];
    int same = logits.axes == c->stored->axes - 1 && logits.count == count;
    for (int i = 0; same && i < logits.axes; i++) same = logits.shape[i] == c->stored->shape[i + 1];
    if (!same) return status_new(TUSFM_ENGINE, "the golden logits have another shape than the engine's");
    for (size_t i = 0; i < count; i++) {
        c->want[i] = (float)tensor_number(c->stored, (size_t)index * count + i);
        if (!c->against_reference) c->n.logit_abs = worst(c->n.logit_abs, fabs((double)logits.data[i] - (double)c->want[i]));
        int first = c->n.frames == 0 && i == 0;
        c->n.lowest = first ? c->want[i] : least(c->n.lowest, c->want[i]);
        c->n.highest = first ? c->want[i] : worst(c->n.highest, c->want[i]);
    }
    c->n.frames++;
    TRY(compare_readings(c, &logits, index, &place));
    if (c->r->spec->task == TASK_SEGMENT) return compare_masks(c, &logits, count, &place);
    if (!c->against_reference) return NULL;
    int32_t classes = (int32_t)logits.shape[logits.axes - 1];
    if (c->r->spec->task == TASK_FEATURES)
        add_cosine(&c->n, logits.data, c->want, count);
    else
        for (size_t at = 0; at < count; at += (size_t)classes)
            add_classes(&c->n, logits.data + at, c->want + at, classes, c->p, c->q);
    return NULL;
}

/* ---- verdicts ---- */

static void miss(char *text, size_t size, const char *name, double value, double limit, int at_most) {
    if (at_most ? value <= limit : value >= limit) return; /* written so that NaN misses */
    size_t used = strlen(text);
    snprintf(text + used, size - used, "%s%s %.4g %c %.4g", used ? "; " : "", name, value, at_most ? '>' : '<', limit);
}

static double tolerance(const check *c, const char *name) {
    return json_number_value(json_object_get(c->r->artefact->tolerance, name)); /* 0 where it is not named */
}

static int ascending(const void *a, const void *b) {
    double one = *(const double *)a, other = *(const double *)b;
    return one < other ? -1 : one > other;
}

static void judge_own(const check *c, char *text, size_t size) {
    double limit = tolerance(c, "logit_abs");
    if (c->r->spec->task != TASK_SEGMENT) { /* where no mask decides, no wider than half of what the answers span */
        double half = (c->n.highest - c->n.lowest) / 2, most = half > 0.05 ? half : 0.05;
        limit = limit < most ? limit : most;
    }
    miss(text, size, "logit_abs", c->n.logit_abs, limit, 1);
    if (c->r->spec->task != TASK_SEGMENT) return;
    miss(text, size, "differing_pixels", c->n.differing, tolerance(c, "differing_pixels"), 1);
    if (c->n.any_head) miss(text, size, "hc_mm", c->n.hc, tolerance(c, "hc_mm"), 1);
}

static void judge_reference(check *c, char *text, size_t size) {
    numbers *n = &c->n;
    const double *limits = c->limits;
    if (c->r->spec->task == TASK_CLASSIFY) {
        miss(text, size, "top1", n->same / n->rows, limits[TOP1], 0);
        miss(text, size, "drift_mean", n->drift_sum / n->rows, limits[DRIFT_MEAN], 1);
        miss(text, size, "drift_worst", n->drift_worst, limits[DRIFT_WORST], 1);
    } else if (c->r->spec->task == TASK_FEATURES) {
        miss(text, size, "cosine_mean", n->cosine_sum / n->rows, limits[COSINE_MEAN], 0);
        miss(text, size, "cosine_worst", n->cosine_worst, limits[COSINE_WORST], 0);
    } else {
        if (n->counted) {
            miss(text, size, "dice_mean", n->dice_sum / n->counted, limits[DICE_MEAN], 0);
            miss(text, size, "dice_worst", n->dice_worst, limits[DICE_WORST], 0);
        }
        if (n->heads) { /* 95th percentile, the next larger sample */
            qsort(n->hc_differences, (size_t)n->heads, sizeof *n->hc_differences, ascending);
            miss(text, size, "hc_p95_mm", n->hc_differences[(int32_t)ceil(0.95 * (n->heads - 1))], limits[HC_P95], 1);
        }
        if (n->small) miss(text, size, "differing_pixels", n->small_differing, limits[DIFFERING], 1);
    }
}

static void gate_limits(const artefact *a, double limits[LIMITS]) {
    const json_t *found = json_object_get(a->gate, "limits");
    if (!found) found = json_object_get(a->gate, "gate");
    for (int i = 0; i < LIMITS; i++) {
        const json_t *value = json_object_get(found, defaults[i].name);
        if (!json_is_number(value) && defaults[i].also) value = json_object_get(found, defaults[i].also);
        int stated = json_is_number(value) && fabs(json_number_value(value)) <= MAX_LIMIT;
        limits[i] = stated ? json_number_value(value) : defaults[i].value;
    }
}

static void fault(char *text, size_t size, const char *what) {
    size_t used = strlen(text);
    snprintf(text + used, size - used, "%s%s", used ? "; " : "", what);
}

/* Whether the golden answers were read by this very model; as spec_faults in golden.py. */
static tusfm_status *judge_readings(const check *c, const char *stored_digest, char *text, size_t size) {
    char digest[65];
    TRY(spec_digest(c->r->spec, digest));
    if (!stored_digest || strcmp(stored_digest, digest) != 0)
        fault(text, size, "the manifest's model is not the one that the golden answers were read with");
    if (!c->readings)
        fault(text, size, "the golden answers hold no readings");
    else if (c->other_readings)
        fault(text, size, "the manifest's threshold, labels, spacing or post-processing give other readings of the golden "
                          "answers than those that were stored");
    return NULL;
}

static tusfm_status *compare_all(check *c, int full) {
    int32_t count = c->r->golden->count, before = -1;
    for (int32_t i = 0; i < (full ? count : GOLDEN_AT_START); i++) {
        int32_t index = full ? i : (int32_t)((int64_t)i * count / GOLDEN_AT_START);
        if (index != before) TRY(compare_frame(c, index));
        before = index;
    }
    return NULL;
}

tusfm_status *golden_check(runner *r, int full, int32_t *compared) {
    int pending = *artefact_pending(r->artefact) != 0;
    check c = {.r = r, .against_reference = full && (artefact_trusted(r->artefact) || pending)};
    if (r->engine->kind->exact && !pending) c.against_reference = 0; /* its own answers are the same everywhere */
    const tensors *file = c.against_reference ? &r->golden->reference : &r->golden->own;
    c.stored = c.against_reference ? r->golden->reference_logits : r->golden->own_logits;
    c.golden_count = r->golden->count;
    c.readings = tensors_find(file, "readings");
    if (c.readings && (c.readings->axes != 2 || c.readings->shape[0] != c.golden_count)) c.readings = NULL;
    size_t count = c.stored->count / (size_t)c.stored->shape[0];
    gate_limits(r->artefact, c.limits);
    c.want = malloc((count ? count : 1) * sizeof *c.want);
    c.p = malloc((count ? count : 1) * sizeof *c.p);
    c.q = malloc((count ? count : 1) * sizeof *c.q);
    c.n.hc_differences = malloc((size_t)r->golden->count * sizeof *c.n.hc_differences);
    tusfm_status *failed = c.want && c.p && c.q && c.n.hc_differences ? NULL : no_memory();
    if (!failed) failed = compare_all(&c, full);
    char reasons[600] = "";
    if (!failed) {
        if (c.against_reference)
            judge_reference(&c, reasons, sizeof reasons);
        else
            judge_own(&c, reasons, sizeof reasons);
        failed = judge_readings(&c, tensors_text(file, "spec_sha256"), reasons, sizeof reasons);
        if (!failed && *reasons)
            failed = status_new(TUSFM_ENGINE,
                                "%s does not answer as the artefact should (%d golden frames against %s: %s): export it "
                                "again on this machine",
                                r->description, c.n.frames, c.against_reference ? "reference" : "own outputs", reasons);
    }
    *compared = c.n.frames;
    free(c.want), free(c.p), free(c.q), free(c.n.hc_differences);
    answer_free(&c.got_answer);
    answer_free(&c.want_answer);
    return failed;
}
