#include "drift.h"

#include "exact.h"
#include "tensors.h"
#include "want.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { GREY_SIDE = 256, BLACK = 8, COLOURED = 24, DRIFT_VERSION = 1, MAX_NAMES = 200, MAX_LEVELS = 766 };
#define MAX_STATISTIC_BYTES ((int64_t)16 << 20)
static const double LOG_TWO_PI = 1.8378770664093453, OFFSET = 1e-6, LEAST = 1e-300;
static const char *const grey_names[GREY_NUMBERS] = {"grey mean", "grey p10",    "grey p50",  "grey p90",     "grey p99",
                                                     "black share", "row steps", "column steps", "colour"};

typedef struct mixture {
    size_t features, components;
    double *centre, *scale, *means, *spreads, *base; /* base: logarithm of a component's weight over its spreads */
    double threshold;
} mixture;

struct drift {
    mixture grey, whole;
    int has_whole, by_features;
    char *names[MAX_NAMES]; /* outputs: tokens, then peaks */
    size_t token_names, peak_names, tokens, directions;
    double *mean, *basis;
    double *unit, *features; /* of one frame */
    char strangest[96];
};

/* ---- grey levels ---- */

typedef struct levels {
    int64_t counts[MAX_LEVELS], total, coloured, row_steps, column_steps, row_count, column_count;
    int parts; /* a colour pixel's brightness is the sum of three channels */
} levels;

static int level_of(const tue_picture *image, int64_t row, int64_t column, int64_t *coloured) {
    const uint8_t *at = image->pixels + row * image->row_stride + column * image->column_stride;
    if (image->format == TUE_GREY) return at[0];
    int low = at[0], high = at[0];
    for (int k = 1; k < 3; k++) low = at[k] < low ? at[k] : low, high = at[k] > high ? at[k] : high;
    *coloured += high - low > COLOURED;
    return at[0] + at[1] + at[2];
}

static void count_levels(const tue_picture *image, levels *found) {
    int32_t longer = image->rows > image->columns ? image->rows : image->columns;
    int64_t stride = longer / GREY_SIDE > 1 ? longer / GREY_SIDE : 1, unused = 0;
    for (int64_t y = 0; y < image->rows; y += stride) {
        int before = 0;
        for (int64_t x = 0; x < image->columns; x += stride) {
            int level = level_of(image, y, x, &found->coloured);
            found->counts[level]++, found->total++;
            if (x) found->row_steps += abs(level - before), found->row_count++;
            if (y) found->column_steps += abs(level - level_of(image, y - stride, x, &unused)), found->column_count++;
            before = level;
        }
    }
}

/* Linear between neighbouring samples. */
static double percentile(const levels *found, int64_t share) {
    int64_t place = (found->total - 1) * share, first = place / 100, rest = place % 100, below = 0;
    int64_t next = first + 1 < found->total ? first + 1 : found->total - 1;
    int low = -1, high = -1;
    for (int v = 0; v < MAX_LEVELS && high < 0; v++) {
        below += found->counts[v];
        if (low < 0 && below > first) low = v;
        if (below > next) high = v;
    }
    return (double)low + (double)(high - low) * ((double)rest / 100.0);
}

static double mean_step(int64_t sum, int64_t count) { return count ? (double)sum / (double)count : 0.0; }

void drift_grey(const tusfm_frame *frame, double out[GREY_NUMBERS]) {
    static const int64_t shares[] = {10, 50, 90, 99};
    tue_picture image = frame_picture(frame);
    levels found = {.parts = image.format == TUE_GREY ? 1 : 3};
    count_levels(&image, &found);
    double whole = 255.0 * found.parts;
    int64_t sum = 0, black = 0;
    for (int v = 0; v < MAX_LEVELS; v++) sum += found.counts[v] * v;
    for (int v = 0; v < BLACK * found.parts; v++) black += found.counts[v];
    out[0] = (double)sum / (double)found.total / whole;
    for (int i = 0; i < 4; i++) out[1 + i] = percentile(&found, shares[i]) / whole;
    out[5] = (double)black / (double)found.total;
    out[6] = mean_step(found.row_steps, found.row_count) / whole;
    out[7] = mean_step(found.column_steps, found.column_count) / whole;
    out[8] = (double)found.coloured / (double)found.total;
}

/* ---- the file ---- */

static tusfm_status *unusable(const char *why) {
    return status_new(TUSFM_BUNDLE, "the drift statistic cannot be read: %s: export the bundle again", why);
}

static tusfm_status *numbers(const tensors *t, const char *kind, const char *name, size_t rows, size_t columns,
                             double least, double **out) {
    char full[64];
    snprintf(full, sizeof full, "%s%s%s", kind, *kind ? "." : "", name);
    const tensor *found = tensors_find(t, full);
    size_t count = rows * (columns ? columns : 1);
    if (!found || found->axes != (columns ? 2 : 1) || found->count != count || (size_t)found->shape[0] != rows ||
        (columns && (size_t)found->shape[1] != columns))
        return unusable("its parts do not fit");
    *out = malloc((count ? count : 1) * sizeof **out);
    if (!*out) return no_memory();
    for (size_t i = 0; i < count; i++) {
        (*out)[i] = tensor_number(found, i);
        if (!isfinite((*out)[i])) return unusable("a number is not finite");
        if ((*out)[i] < least) return unusable("a spread or a weight is not positive");
    }
    return NULL;
}

static tusfm_status *read_mixture(const tensors *t, const json_t *thresholds, const char *kind, mixture *m) {
    char name[32];
    double *weights = NULL;
    const json_t *threshold = json_object_get(thresholds, kind);
    snprintf(name, sizeof name, "%s.centre", kind);
    const tensor *centre = tensors_find(t, name);
    snprintf(name, sizeof name, "%s.weights", kind);
    const tensor *shares = tensors_find(t, name);
    if (!centre || !shares || !centre->count || !shares->count || !json_is_number(threshold))
        return unusable("its mixture is not whole");
    m->features = centre->count, m->components = shares->count, m->threshold = json_number_value(threshold);
    TRY(numbers(t, kind, "centre", m->features, 0, -HUGE_VAL, &m->centre));
    TRY(numbers(t, kind, "scale", m->features, 0, LEAST, &m->scale));
    TRY(numbers(t, kind, "means", m->components, m->features, -HUGE_VAL, &m->means));
    TRY(numbers(t, kind, "spreads", m->components, m->features, LEAST, &m->spreads));
    m->base = malloc(m->components * sizeof *m->base);
    if (!m->base) return no_memory();
    tusfm_status *failed = numbers(t, kind, "weights", m->components, 0, LEAST, &weights);
    for (size_t k = 0; !failed && k < m->components; k++) {
        double sum = 0.0;
        for (size_t f = 0; f < m->features; f++) sum = f ? sum + tue_log(m->spreads[k * m->features + f]) : tue_log(m->spreads[k * m->features]);
        m->base[k] = tue_log(weights[k]) - sum;
    }
    free(weights);
    return failed;
}

static tusfm_status *read_names(drift *d, const json_t *list, size_t *count) {
    if (!json_is_array(list)) return unusable("it names no outputs");
    for (size_t i = 0; i < json_array_size(list); i++) {
        const char *name = json_string_value(json_array_get(list, i));
        size_t at = d->token_names + d->peak_names, length = name ? strlen(name) + 1 : 0;
        if (!name || at >= MAX_NAMES) return unusable("it names outputs that cannot be");
        d->names[at] = malloc(length);
        if (!d->names[at]) return no_memory();
        memcpy(d->names[at], name, length);
        ++*count;
    }
    return NULL;
}

static tusfm_status *read_projection(drift *d, const tensors *t, const json_t *thresholds) {
    const tensor *mean = tensors_find(t, "mean"), *basis = tensors_find(t, "basis");
    if (!mean || !basis || mean->axes != 1 || basis->axes != 2 || !d->token_names)
        return unusable("its projection is not usable");
    d->tokens = mean->count, d->directions = (size_t)basis->shape[1];
    TRY(numbers(t, "", "mean", d->tokens, 0, -HUGE_VAL, &d->mean));
    if (!d->directions || (size_t)basis->shape[0] != d->tokens) return unusable("its projection does not fit");
    TRY(numbers(t, "", "basis", d->tokens, d->directions, -HUGE_VAL, &d->basis));
    TRY(read_mixture(t, thresholds, "features", &d->whole));
    if (d->whole.features != d->directions + 1 + d->peak_names + GREY_NUMBERS)
        return unusable("its projection and mixture do not fit");
    d->unit = malloc((d->tokens ? d->tokens : 1) * sizeof *d->unit);
    if (!d->unit) return no_memory();
    d->has_whole = 1;
    return NULL;
}

static tusfm_status *read_head(drift *d, const tensors *t, const json_t *head) {
    const json_t *version = json_object_get(head, "version"), *alarms = json_object_get(head, "false_alarms");
    const json_t *thresholds = json_object_get(head, "thresholds");
    if (!json_is_integer(version) || json_integer_value(version) != DRIFT_VERSION)
        return unusable("it is of another version");
    if (!json_is_number(alarms) || !(json_number_value(alarms) > 0 && json_number_value(alarms) < 1) ||
        !json_is_object(thresholds) || !json_is_object(json_object_get(head, "about")))
        return unusable("its head is not whole");
    TRY(read_names(d, json_object_get(head, "token_names"), &d->token_names));
    TRY(read_names(d, json_object_get(head, "peak_names"), &d->peak_names));
    TRY(read_mixture(t, thresholds, "grey", &d->grey));
    if (d->grey.features != GREY_NUMBERS) return unusable("its grey levels are not these");
    if (json_object_get(thresholds, "features")) TRY(read_projection(d, t, thresholds));
    size_t most = d->has_whole && d->whole.features > GREY_NUMBERS ? d->whole.features : GREY_NUMBERS;
    d->features = malloc(most * sizeof *d->features);
    return d->features ? NULL : no_memory();
}

static tusfm_status *read_all(drift *d, const file_entry *entry) {
    tensors t;
    json_t *head = NULL;
    TRY(tensors_open(entry->data, (size_t)entry->size, DRIFT_FILE, MAX_TENSORS, &t));
    const tensor *text = tensors_find(&t, "head");
    tusfm_status *failed = text && text->dtype == U8 ? NULL : unusable("it has no head");
    if (!failed) {
        json_error_t where;
        head = json_loadb((const char *)text->data, text->count, JSON_REJECT_DUPLICATES, &where);
        failed = json_is_object(head) ? read_head(d, &t, head) : unusable("its head is not JSON");
    }
    json_decref(head);
    tensors_close(&t);
    return failed;
}

tusfm_status *drift_open(const manifest *m, drift **opened) {
    const file_entry *entry = manifest_file(m, DRIFT_FILE);
    *opened = NULL;
    if (!entry || !entry->data) return NULL;
    if (entry->size > MAX_STATISTIC_BYTES) return unusable("it is too large");
    drift *d = calloc(1, sizeof *d);
    if (!d) return no_memory();
    tusfm_status *failed = read_all(d, entry);
    if (failed)
        drift_free(d);
    else
        *opened = d;
    return failed;
}

static void free_mixture(mixture *m) { free(m->centre), free(m->scale), free(m->means), free(m->spreads), free(m->base); }

void drift_free(drift *d) {
    if (!d) return;
    free_mixture(&d->grey), free_mixture(&d->whole);
    for (size_t i = 0; i < MAX_NAMES; i++) free(d->names[i]);
    free(d->mean), free(d->basis), free(d->unit), free(d->features);
    free(d);
}

/* ---- one frame ---- */

static const engine_output *find(const engine_output *outputs, size_t count, const char *name) {
    for (size_t i = 0; i < count; i++)
        if (strcmp(outputs[i].name, name) == 0) return &outputs[i];
    return NULL;
}

void drift_bind(drift *d, const engine_output *outputs, size_t count) {
    d->by_features = d->has_whole;
    for (size_t i = 0; i < d->token_names + d->peak_names; i++)
        if (!find(outputs, count, d->names[i]) || strcmp(d->names[i], LOGITS_NAME) == 0) d->by_features = 0;
}

/* Mean tokens of several blocks as one vector of length one. */
static tusfm_status *join_tokens(drift *d, const engine_output *outputs, size_t count) {
    size_t used = 0;
    double square = 0.0;
    for (size_t i = 0; i < d->token_names; i++) {
        const engine_output *tokens = find(outputs, count, d->names[i]);
        if (!tokens || tokens->count > d->tokens - used)
            return status_new(TUSFM_BUNDLE, "the drift statistic was made of other tokens than the artefact gives");
        for (size_t j = 0; j < tokens->count; j++) d->unit[used++] = (double)tokens->data[j];
    }
    if (used != d->tokens)
        return status_new(TUSFM_BUNDLE, "the drift statistic was made of other tokens than the artefact gives");
    for (size_t i = 0; i < used; i++) square = square + d->unit[i] * d->unit[i];
    double length = TUE_SQRT(square);
    for (size_t i = 0; i < used; i++) d->unit[i] = d->unit[i] / (length == 0.0 ? 1.0 : length) - d->mean[i];
    return NULL;
}

static void project(drift *d) {
    double *inside = d->features, left = 0.0;
    for (size_t p = 0; p < d->directions; p++) inside[p] = 0.0;
    for (size_t t = 0; t < d->tokens; t++)
        for (size_t p = 0; p < d->directions; p++) inside[p] = inside[p] + d->unit[t] * d->basis[t * d->directions + p];
    for (size_t t = 0; t < d->tokens; t++) {
        double sum = 0.0;
        for (size_t p = 0; p < d->directions; p++) sum = sum + d->basis[t * d->directions + p] * inside[p];
        double rest = d->unit[t] - sum;
        left = left + rest * rest;
    }
    d->features[d->directions] = tue_log(TUE_SQRT(left) + OFFSET);
}

static tusfm_status *join_peaks(drift *d, const engine_output *outputs, size_t count) {
    for (size_t i = 0; i < d->peak_names; i++) {
        const engine_output *values = find(outputs, count, d->names[d->token_names + i]);
        if (!values || !values->count)
            return status_new(TUSFM_BUNDLE, "the drift statistic was made of other peaks than the artefact gives");
        double peak = (double)values->data[0];
        for (size_t j = 1; j < values->count; j++) peak = tue_max(peak, (double)values->data[j]);
        d->features[d->directions + 1 + i] = tue_log(tue_max(peak, 0.0) + OFFSET);
    }
    return NULL;
}

/* Negative log-likelihood in nats; infinite where the frame lies farther off than numbers go. */
static double score(const mixture *m, const double *features) {
    double top = -HUGE_VAL, total = 0.0;
    for (int again = 0; again < 2; again++) {
        for (size_t k = 0; k < m->components; k++) {
            const double *means = m->means + k * m->features, *spreads = m->spreads + k * m->features;
            double sum = 0.0;
            for (size_t f = 0; f < m->features; f++) {
                double gap = ((features[f] - m->centre[f]) / m->scale[f] - means[f]) / spreads[f];
                sum = sum + gap * gap;
            }
            double chance = m->base[k] - 0.5 * sum;
            if (!again) top = chance > top ? chance : top;
            else total = total + tue_exp(chance - top);
        }
        if (top == -HUGE_VAL) return HUGE_VAL;
    }
    return 0.5 * (double)m->features * LOG_TWO_PI - top - tue_log(total);
}

static void name_strangest(drift *d, const mixture *m) {
    size_t most = 0, directions = d->by_features ? d->directions : 0;
    double worst = -1.0;
    for (size_t f = 0; f < m->features; f++) {
        double gap = fabs((d->features[f] - m->centre[f]) / m->scale[f]);
        if (gap > worst) worst = gap, most = f;
    }
    if (!d->by_features) {
        copy_line(d->strangest, sizeof d->strangest, grey_names[most]);
    } else if (most < directions) {
        snprintf(d->strangest, sizeof d->strangest, "token direction %zu", most + 1);
    } else if (most == directions) {
        copy_line(d->strangest, sizeof d->strangest, "token remainder");
    } else if (most < directions + 1 + d->peak_names) {
        copy_line(d->strangest, sizeof d->strangest, d->names[d->token_names + most - directions - 1]);
    } else {
        copy_line(d->strangest, sizeof d->strangest, grey_names[most - directions - 1 - d->peak_names]);
    }
}

static drift_reading reading_of(const drift *d, double value, const char *strangest) {
    const mixture *m = d->by_features ? &d->whole : &d->grey;
    return (drift_reading){TUSFM_DRIFT_CHECKED, value > m->threshold, d->by_features, value, m->threshold, strangest};
}

tusfm_status *drift_look(drift *d, const engine_output *outputs, size_t count, const tusfm_frame *frame,
                         drift_reading *reading) {
    const mixture *m = d->by_features ? &d->whole : &d->grey;
    if (d->by_features) {
        TRY(join_tokens(d, outputs, count));
        project(d);
        TRY(join_peaks(d, outputs, count));
    }
    drift_grey(frame, d->features + (m->features - GREY_NUMBERS));
    double value = score(m, d->features);
    name_strangest(d, m);
    *reading = reading_of(d, value, d->strangest);
    return NULL;
}

drift_reading drift_infinite(const drift *d) { return reading_of(d, HUGE_VAL, "the model's output is not finite"); }
