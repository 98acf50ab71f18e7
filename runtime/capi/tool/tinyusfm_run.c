/* tinyusfm-run: frames of a shared-memory ring through a bundle, readings as JSON lines or into a result ring.
 *
 *     tinyusfm-run BUNDLE shm:NAME [--sink jsonl:- | jsonl:FILE | shm-out:NAME]... [options]
 *
 * The library's own engine, without --fallback, answers frames from where they lie in the ring, in the thread that waits for
 * them, which looks without sleeping for a millisecond before and after the time at which one is expected (--no-spin: never).
 * Other engines have threads of their own.
 *
 * It ends with SIGINT or SIGTERM, or after --frames readings; --info says what runs and ends. */
#define _POSIX_C_SOURCE 200809L
#include "tinyusfm.h"
#include "tue_shm_result.h"

#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static const double SPIN_MS = 1;
enum { MAX_SINKS = 8, SCHEMA = 4, WAIT_MS = 10 };

static const char usage[] =
    "usage: tinyusfm-run BUNDLE shm:NAME [--sink jsonl:-|jsonl:FILE|shm-out:NAME]... [--budget MS] [--target NAME]\n"
    "       [--precision NAME] [--engines FOLDER] [--threads N] [--fallback] [--allow-unverified] [--allow-precision] [--exact-precision]\n"
    "       [--no-second-pass] [--no-drift] [--require-signed STORE] [--device-class NAME]\n"
    "       [--frames N] [--times FILE] [--no-spin] [--info] [--quiet]\n";

typedef struct sink {
    FILE *file; /* or a ring */
    const tusfm_session *session; /* knows the names of the classes */
    tue_shm_writer ring;
    int is_ring;
} sink;

typedef struct settings {
    const char *bundle, *source, *times;
    const char *sinks[MAX_SINKS];
    int sink_count, info, quiet, sleeps;
    long long frames;
    tusfm_options options;
    tusfm_trust_options trust;
} settings;

static atomic_int stop;

static void on_signal(int number) {
    (void)number;
    atomic_store(&stop, 1);
}

static void on_log(void *user, int32_t level, const char *text) {
    (void)user;
    fprintf(stderr, "tinyusfm-run: %s%s\n", level == TUSFM_WARNING ? "warning: " : "", text);
}

/* ---- words of the command ---- */

static int flag(settings *s, const char *word) {
    if (strcmp(word, "--fallback") == 0) s->options.fallback = 1;
    else if (strcmp(word, "--allow-unverified") == 0) s->options.allow_unverified = 1;
    else if (strcmp(word, "--allow-precision") == 0) s->options.allow_precision = 1;
    else if (strcmp(word, "--exact-precision") == 0) s->options.allow_precision = -1;
    else if (strcmp(word, "--no-second-pass") == 0) s->options.no_second_pass = 1;
    else if (strcmp(word, "--no-drift") == 0) s->options.no_drift = 1;
    else if (strcmp(word, "--info") == 0) s->info = 1;
    else if (strcmp(word, "--quiet") == 0) s->quiet = 1;
    else if (strcmp(word, "--no-spin") == 0) s->sleeps = 1;
    else return 0;
    return 1;
}

static int option(settings *s, const char *word, const char *value) {
    if (strcmp(word, "--budget") == 0) s->options.budget_ms = atof(value);
    else if (strcmp(word, "--target") == 0) s->options.target = value;
    else if (strcmp(word, "--precision") == 0) s->options.precision = value;
    else if (strcmp(word, "--engines") == 0) s->options.engine_folder = value;
    else if (strcmp(word, "--threads") == 0) s->options.threads = atoi(value);
    else if (strcmp(word, "--times") == 0) s->times = value;
    else if (strcmp(word, "--frames") == 0) s->frames = atoll(value);
    else if (strcmp(word, "--require-signed") == 0) s->trust.store = value, s->options.trust = &s->trust;
    else if (strcmp(word, "--device-class") == 0) s->trust.device_class = value;
    else if (strcmp(word, "--sink") == 0 && s->sink_count < MAX_SINKS) s->sinks[s->sink_count++] = value;
    else return 0;
    return 1;
}

static int parse(int count, char **words, settings *s) {
    tusfm_options_init(&s->options, sizeof s->options);
    tusfm_trust_options_init(&s->trust, sizeof s->trust);
    for (int i = 1; i < count; i++) {
        if (flag(s, words[i])) continue;
        if (strncmp(words[i], "--", 2) == 0) {
            if (i + 1 == count || !option(s, words[i], words[i + 1])) return 0;
            i++;
        } else if (!s->bundle) {
            s->bundle = words[i];
        } else if (!s->source) {
            s->source = words[i];
        } else {
            return 0;
        }
    }
    if (!s->quiet) s->options.log = on_log;
    return s->bundle && (s->info || s->source);
}

/* ---- sinks ---- */

static int open_sink(sink *to, const char *where, const tusfm_info *info) {
    if (strncmp(where, "jsonl:", 6) == 0) {
        to->file = strcmp(where + 6, "-") == 0 ? stdout : fopen(where + 6, "ae");
        return to->file != NULL;
    }
    if (strncmp(where, "shm-out:", 8) != 0) return 0;
    to->is_ring = 1;
    uint64_t room = (uint64_t)info->input_rows * (uint64_t)info->input_columns;
    return tue_res_open(&to->ring, where + 8, room < 64 ? 64 : room) == TUE_SHM_OK;
}

static void number(FILE *to, const char *name, double value) {
    if (isfinite(value)) fprintf(to, ", \"%s\": %.17g", name, value);
    else fprintf(to, ", \"%s\": null", name);
}

/* The text with the letters that JSON does not take as they are replaced; engine lines hold plain ASCII. */
static void words_of(FILE *to, const char *name, const char *value) {
    if (!value) {
        fprintf(to, ", \"%s\": null", name);
        return;
    }
    fprintf(to, ", \"%s\": \"", name);
    for (; *value; value++) fputc(*value < ' ' || *value == '"' || *value == '\\' || *value > '~' ? '?' : *value, to);
    fputc('"', to);
}

/* A label, which may hold any letters: UTF-8 as the manifest has it. */
static void label_of(FILE *to, const char *value) {
    fputs(", \"label\": \"", to);
    for (const char *at = value ? value : ""; *at; at++) {
        unsigned char letter = (unsigned char)*at;
        if (letter < ' ') fprintf(to, "\\u%04x", letter);
        else if (letter == '"' || letter == '\\') fprintf(to, "\\%c", letter);
        else fputc(letter, to);
    }
    fputc('"', to);
}

static const char *truth(int value) { return value ? "true" : "false"; }

/* What stands in front of " on " in the line of an engine: artefact, which is target and precision. */
static void names_of(FILE *to, const char *engine) {
    char name[256] = "";
    const char *end = engine ? strstr(engine, " on ") : NULL;
    if (end && (size_t)(end - engine) < sizeof name) memcpy(name, engine, (size_t)(end - engine));
    char *dash = strrchr(name, '-');
    if (dash) *dash = 0;
    words_of(to, "target", dash ? name : NULL);
    words_of(to, "precision", dash ? dash + 1 : NULL);
    words_of(to, "engine", engine);
}

static void pair(FILE *to, const char *name, double first, double second) {
    if (isfinite(first) && isfinite(second)) fprintf(to, ", \"%s\": [%.17g, %.17g]", name, first, second);
    else fprintf(to, ", \"%s\": null", name);
}

static const char *name_in(const char *const *names, int count, int32_t at) { return at >= 0 && at < count ? names[at] : ""; }

static void write_state(FILE *to, int32_t trust, int32_t reasons) {
    static const char *const states[] = {"unchecked", "good", "doubtful", "none"};
    static const char *const names[] = {"confidence", "agreement", "border", "sector", "size", "spacing", "drift"};
    int before = 0;
    fprintf(to, ", \"reading\": \"%s\", \"reasons\": [", name_in(states, 4, trust));
    for (int i = 0; i < 7; i++)
        if (reasons >> i & 1) fprintf(to, "%s\"%s\"", before++ ? ", " : "", names[i]);
    fputc(']', to);
}

/* Everything of a label but the ellipse; numbers of what was not found are 0. */
static void write_component(FILE *to, const tusfm_measurement *m) {
    const double *box = m->bounds_px;
    number(to, "confidence", m->confidence);
    number(to, "area_px", m->found ? m->area_px : 0.0);
    number(to, "area_mm2", m->area_mm2);
    if (m->found) fprintf(to, ", \"box_px\": [%.17g, %.17g, %.17g, %.17g]", box[0], box[1], box[2], box[3]);
    else fputs(", \"box_px\": [0.0, 0.0, 0.0, 0.0]", to);
    pair(to, "centroid_px", m->found ? m->centroid_row : 0.0, m->found ? m->centroid_column : 0.0);
    fputs(", \"contour_px\": [", to);
    for (int i = 0; i < m->contour_points; i++)
        fprintf(to, "%s[%.17g, %.17g]", i ? ", " : "", m->contour_px[2 * i], m->contour_px[2 * i + 1]);
    fprintf(to, "], \"touches_border\": %s, \"cut_by_sector\": %s", truth(m->touches_border), truth(m->cut_by_sector));
}

static void write_measurement(FILE *to, const tusfm_measurement *m) {
    int there = m->found && m->has_ellipse;
    fprintf(to, "{\"found\": %s", truth(m->found));
    label_of(to, m->label);
    fprintf(to, ", \"has_ellipse\": %s", truth(m->has_ellipse));
    write_component(to, m);
    number(to, "hc_mm", m->hc_mm);
    number(to, "hc_px", there ? m->hc_px : 0.0);
    pair(to, "axes_mm", m->major_mm, m->minor_mm);
    pair(to, "axes_px", there ? m->major_px : 0.0, there ? m->minor_px : 0.0);
    pair(to, "centre_px", there ? m->centre_row : 0.0, there ? m->centre_column : 0.0);
    number(to, "angle_deg", there ? m->angle_deg : 0.0);
    number(to, "agreement", m->agreement);
    write_state(to, m->trust, m->reasons);
    fputc('}', to);
}

static void write_measurements(FILE *to, const tusfm_reading *r) {
    tusfm_measurement m;
    int count = r->withheld ? 0 : r->label_count;
    tusfm_measurement_init(&m, sizeof m);
    fputs(", \"measurement\": ", to);
    if (!count) fputs("null", to);
    for (int part = 0; part < 2; part++) { /* the first label, then all where there are several */
        if (part) fputs(count > 1 ? ", \"measurements\": [" : ", \"measurements\": null", to);
        for (int i = 0; i < (part ? count > 1 ? count : 0 : count > 0); i++) {
            tusfm_status *failed = tusfm_get_measurement(r, i, &m);
            if (part && i) fputs(", ", to);
            write_measurement(to, &m);
            tusfm_status_free(failed);
        }
        if (part && count > 1) fputc(']', to);
    }
}

static void write_drift(FILE *to, const tusfm_reading *r) {
    if (r->drift != TUSFM_DRIFT_CHECKED) return;
    fprintf(to, ", \"drift\": {\"kind\": \"%s\"", r->drift_kind ? "features" : "grey levels");
    number(to, "score", r->drift_score);
    number(to, "threshold", r->drift_threshold);
    fprintf(to, ", \"strange\": %s, \"share\": %.17g, \"frames\": %d, \"window\": %d, \"alarm\": %s", truth(r->strange), r->drift_share,
            r->drift_frames, r->drift_window, truth(r->drift_alarm));
    words_of(to, "strangest", r->strangest);
    fputc('}', to);
}

static void write_judgement(FILE *to, const tusfm_reading *r) {
    static const char *const passes[] = {"never", "not needed", "done", "off"};
    static const char *const drifts[] = {"not checked", "checked", "not applied"};
    fprintf(to, ", \"second_pass\": \"%s\", \"drift_status\": \"%s\"", name_in(passes, 4, r->second_pass),
            name_in(drifts, 3, r->drift));
    if (r->withheld) {
        fputs(", \"found\": null, \"confidence\": null, \"reading\": null, \"reasons\": null", to);
        return;
    }
    fprintf(to, ", \"found\": %s", truth(r->found));
    number(to, "confidence", r->confidence);
    write_state(to, r->trust, r->reasons);
}

static void write_scores(FILE *to, const tusfm_reading *r) {
    fputs(", \"scores\": [", to);
    for (int i = 0; i < r->score_count; i++) fprintf(to, "%s%.9g", i ? ", " : "", (double)r->scores[i]);
    fputc(']', to);
}

/* The likeliest of a classifier's classes, as its student names it. */
static void write_label(FILE *to, const tusfm_session *session, const tusfm_reading *r) {
    int32_t best = 0;
    if (r->withheld || r->score_count < 1 || !tusfm_label(session, r->score_count - 1) || tusfm_label(session, r->score_count)) return;
    for (int32_t i = 1; i < r->score_count; i++)
        if (r->scores[i] > r->scores[best]) best = i;
    label_of(to, tusfm_label(session, best));
}

/* The keys of the Python runtime's JSON lines for a result of a stream. */
static void write_line(FILE *to, const tusfm_session *session, const tusfm_reading *r) {
    static const char *const states[] = {"live", "stale", "frozen", "lost", "degraded"};
    fprintf(to, "{\"schema\": %d, \"kind\": \"result\", \"seq\": %lld, \"valid\": %s, \"verified\": %s, \"degraded\": %s", SCHEMA,
            (long long)r->seq, truth(r->valid), truth(r->verified), truth(r->degraded));
    names_of(to, r->engine);
    number(to, "age_ms", r->age_ms);
    fprintf(to, ", \"timings_ms\": {\"preprocess\": %.6f, \"infer\": %.6f, \"postprocess\": %.6f, \"total\": %.6f", r->preprocess_ms,
            r->infer_ms, r->postprocess_ms, r->total_ms);
    fprintf(to, ", \"second_pass\": %.6f, \"drift\": %.6f}", r->second_pass_ms, r->drift_ms);
    write_judgement(to, r);
    write_measurements(to, r);
    write_drift(to, r);
    if (r->scores && !r->withheld) write_scores(to, r);
    else fputs(", \"scores\": null", to);
    fprintf(to, ", \"live\": {\"index\": %lld, \"state\": \"%s\", \"stale\": %s, \"withheld\": %s, \"dropped_since_last\": %lld, \"level\": %d",
            (long long)r->index, states[r->state >= 0 && r->state < 5 ? r->state : 3], truth(r->stale), truth(r->withheld),
            (long long)r->dropped_since_last, r->level);
    words_of(to, "error", r->error);
    fputs("}, \"smoothed\": null", to);
    if (r->exit_index >= 0) fprintf(to, ", \"exit_index\": %d", r->exit_index);
    write_label(to, session, r);
    fputs("}\n", to);
    fflush(to);
}

static void fill_slot(tue_res_slot *s, const tusfm_reading *r) {
    memset(s, 0, sizeof *s);
    s->seq = r->seq, s->t_recv_ns = r->t_recv_ns, s->state = (uint32_t)r->state, s->trust = (uint32_t)r->trust;
    s->flags = (r->valid ? TUE_RES_VALID : 0u) | (r->verified ? TUE_RES_VERIFIED : 0u) | (r->degraded ? TUE_RES_DEGRADED : 0u) |
               (r->stale ? TUE_RES_STALE : 0u) | (r->withheld ? TUE_RES_WITHHELD : 0u) | (r->measured ? TUE_RES_MEASURED : 0u) |
               (r->found ? TUE_RES_FOUND : 0u) | (r->touches_border ? TUE_RES_TOUCHES : 0u) |
               (r->answered ? TUE_RES_ANSWERED : 0u);
    if (r->mask) s->mask_rows = (uint32_t)r->mask_rows, s->mask_columns = (uint32_t)r->mask_columns;
    memcpy(s->crop, r->crop, sizeof s->crop);
    memcpy(s->box, r->box, sizeof s->box);
    s->frame_rows = r->frame_rows, s->frame_columns = r->frame_columns;
    s->hc_mm = r->hc_mm, s->major_mm = r->major_mm, s->minor_mm = r->minor_mm;
    s->centre_row = r->centre_row, s->centre_column = r->centre_column;
    s->major_px = r->major_px, s->minor_px = r->minor_px, s->angle_deg = r->angle_deg, s->confidence = r->confidence;
    s->infer_ms = r->infer_ms, s->area_px = isfinite(r->area_px) ? (int64_t)(r->area_px + 0.5) : 0, s->dropped = r->dropped_since_last, s->level = r->level;
    s->score_count = r->score_count < 8 ? r->score_count : 8;
    for (int i = 0; i < s->score_count; i++) s->scores[i] = r->scores[i];
    s->exit_index = r->exit_index;
    s->reasons = (uint32_t)r->reasons, s->second_pass = (uint8_t)r->second_pass, s->drift = (uint8_t)r->drift;
    s->strange = r->strange != 0, s->cut_by_sector = r->cut_by_sector != 0;
}

static int deliver(sink *to, int count, const tusfm_reading *reading) {
    for (int i = 0; i < count; i++) {
        if (to[i].is_ring) {
            tue_res_slot slot;
            fill_slot(&slot, reading);
            if (tue_res_write(&to[i].ring, &slot, reading->mask) != TUE_SHM_OK) return 0;
        } else {
            write_line(to[i].file, to[i].session, reading);
            if (ferror(to[i].file)) return 0;
        }
    }
    return 1;
}

/* ---- the loop: one thread waits for frames, the other for readings ---- */

static void pause_ms(double ms) {
    struct timespec wait = {0, (long)(ms * 1e6)};
    nanosleep(&wait, NULL);
}

static tusfm_frame as_frame(const tue_shm_slot *slot, const uint8_t *pixels) {
    tusfm_frame frame;
    tusfm_frame_init(&frame, sizeof frame);
    frame.pixels = pixels, frame.format = (int32_t)slot->format, frame.row_stride = slot->row_stride;
    frame.rows = (int32_t)slot->rows, frame.columns = (int32_t)slot->columns;
    frame.limited_range = (slot->flags & TUE_SHM_LIMITED) != 0;
    if (slot->flags & TUE_SHM_SPACING)
        frame.spacing_row_mm = slot->spacing_row_mm, frame.spacing_column_mm = slot->spacing_column_mm;
    frame.seq = (int64_t)slot->seq, frame.t_source_ns = slot->t_source_ns, frame.t_recv_ns = (int64_t)slot->t_publish_ns;
    return frame;
}

typedef struct source {
    tue_shm_reader ring;
    uint64_t heartbeat_ns;
    tusfm_session *session;
    tusfm_status *failed; /* read after its thread has ended */
    atomic_int begun, ended;
} source;

/* Takes the newest frame into the session's own memory: copied once. *found 0: there is none. */
static tusfm_status *copy_newest(source *from, tue_shm_slot *slot, const uint8_t **pixels, int32_t *found) {
    uint8_t *own;
    uint64_t room = tue_shm_room(&from->ring);
    *found = TUE_SHM_NOTHING;
    if (!room) return NULL;
    tusfm_status *failed = tusfm_room(from->session, (int64_t)room, &own);
    if (failed) return failed;
    *found = tue_shm_newest(&from->ring, slot, own, room);
    *pixels = own;
    return NULL;
}

/* Tells the session of a new heartbeat. */
static void hear(source *from) {
    if (from->ring.heartbeat_ns != from->heartbeat_ns) from->heartbeat_ns = from->ring.heartbeat_ns, tusfm_contact(from->session);
}

/* Submits the newest frame, if there is a new one. */
static tusfm_status *feed(source *from) {
    tue_shm_slot slot;
    const uint8_t *pixels;
    int32_t found;
    tusfm_status *failed = copy_newest(from, &slot, &pixels, &found);
    if (failed) return failed;
    hear(from);
    if (found != TUE_SHM_NEW) return NULL;
    tusfm_frame frame = as_frame(&slot, pixels);
    failed = tusfm_submit(from->session, &frame);
    atomic_store(&from->begun, 1);
    return failed;
}

/* One frame that cannot be used is told, and the stream goes on. */
static tusfm_status *without_bad_frame(tusfm_status *failed) {
    if (tusfm_status_code(failed) != TUSFM_FRAME) return failed;
    on_log(NULL, TUSFM_WARNING, tusfm_status_text(failed));
    tusfm_status_free(failed);
    return NULL;
}

static void *feed_on(void *given) {
    source *from = given;
    while (!atomic_load(&stop) && !from->failed) {
        (void)tue_shm_wait(&from->ring, WAIT_MS);
        from->failed = without_bad_frame(feed(from));
    }
    atomic_store(&from->ended, 1);
    return NULL;
}

/* One line a reading, nanoseconds of CLOCK_MONOTONIC: its number, the frame's publication in the ring, when the reading was
 * there, when it was in every sink, and how long the prediction itself worked. */
static void write_times(FILE *to, const tusfm_reading *r, int64_t there_ns) {
    fprintf(to, "%lld %lld %lld %lld %lld\n", (long long)r->seq, (long long)r->t_recv_ns, (long long)there_ns,
            (long long)tusfm_now_ns(), (long long)(r->total_ms * 1e6));
    fflush(to);
}

/* Where readings go, and what became of them. */
typedef struct taker {
    const settings *s;
    sink *sinks;
    FILE *times;
    long long answered;
    int alarmed, broken; /* broken: a reading could not be written */
} taker;

static void take(void *given, const tusfm_reading *reading) {
    taker *to = given;
    int64_t there_ns = tusfm_now_ns();
    to->answered++;
    if (reading->drift_alarm && !to->alarmed && to->s->options.log) {
        to->alarmed = 1;
        fprintf(stderr, "tinyusfm-run: warning: drift: frames no longer look like the calibration set, by %s\n", reading->strangest);
    }
    to->broken = !deliver(to->sinks, to->s->sink_count, reading);
    if (to->times && !to->broken) write_times(to->times, reading, there_ns);
}

static int wanted(const taker *to) { return !to->broken && !atomic_load(&stop) && (!to->s->frames || to->answered < to->s->frames); }

static tusfm_status *loop(source *from, taker *to) {
    tusfm_reading reading;
    tusfm_reading_init(&reading, sizeof reading);
    while (wanted(to) && !atomic_load(&from->ended)) {
        int32_t there = 0;
        if (!atomic_load(&from->begun)) {
            pause_ms(2);
            continue;
        }
        tusfm_status *failed = tusfm_newest(from->session, WAIT_MS, &reading, &there);
        if (failed) return failed;
        if (there) take(to, &reading);
    }
    return NULL;
}

/* ---- or one thread for all, where the session answers in it ---- */

static void look_at(void *ring, int32_t begins) { tue_shm_look(ring, begins); }

static int32_t still_holds(void *ring) { return tue_shm_holds(ring); }

/* Answers the newest frame of the ring, if there is a new one, from where it lies. */
static tusfm_status *answer_next(source *from, tusfm_lease *lease, taker *to) {
    tue_shm_slot slot;
    const uint8_t *pixels;
    (void)tue_shm_wait(&from->ring, WAIT_MS);
    int32_t found = tue_shm_borrow(&from->ring, &slot, &pixels);
    int copied = found == TUE_SHM_UNMAPPED; /* an object with holes */
    if (copied) {
        tusfm_status *failed = copy_newest(from, &slot, &pixels, &found);
        if (failed) return failed;
    }
    hear(from);
    if (found != TUE_SHM_NEW) return NULL;
    tusfm_frame frame = as_frame(&slot, pixels);
    return tusfm_answer(from->session, &frame, copied ? NULL : lease, take, to);
}

static tusfm_status *alone(source *from, taker *to) {
    tusfm_lease lease;
    tusfm_status *failed = NULL;
    tusfm_lease_init(&lease, sizeof lease);
    lease.user = &from->ring, lease.look = look_at, lease.holds = still_holds;
    if (!to->s->sleeps) tue_shm_expect(&from->ring, SPIN_MS);
    while (!failed && wanted(to)) failed = without_bad_frame(answer_next(from, &lease, to));
    return failed;
}

static tusfm_status *both(source *from, taker *to) {
    pthread_t feeder;
    if (pthread_create(&feeder, NULL, feed_on, from) != 0) {
        to->broken = 1;
        return NULL;
    }
    tusfm_status *failed = loop(from, to);
    atomic_store(&stop, 1);
    pthread_join(feeder, NULL);
    if (!failed) return from->failed;
    tusfm_status_free(from->failed);
    return failed;
}

static tusfm_status *answer_all(const settings *s, source *from, sink *sinks, int in_place, int *broken) {
    taker to = {.s = s, .sinks = sinks, .times = s->times ? fopen(s->times, "ae") : NULL};
    tusfm_status *failed = NULL;
    to.broken = s->times && !to.times;
    if (!to.broken) failed = in_place ? alone(from, &to) : both(from, &to);
    *broken = to.broken;
    if (to.times && fclose(to.times) != 0) *broken = 1;
    return failed;
}

static void show_info(const tusfm_info *info) {
    printf("model      %s (%s, %d labels), %s\n", info->model, info->task, info->label_count, info->intended_use);
    printf("artefact   %s, %s\n", info->artefact, info->verified ? "verified" : "NOT VERIFIED");
    printf("engine     %s\n", info->engine);
    printf("executed   %s\n", *info->executed ? info->executed : "not told");
    printf("bundle     %s\n", info->bundle_sha256);
    printf("opened     hashes %.0f ms, engine %.0f ms, %d golden frames %.0f ms, warm-up %.0f ms\n", info->verify_ms,
           info->load_ms, info->golden_frames, info->golden_ms, info->warm_up_ms);
}

static int finish(tusfm_status *failed, const char *what) {
    if (failed) fprintf(stderr, "tinyusfm-run: %s\n", tusfm_status_text(failed));
    else if (what) fprintf(stderr, "tinyusfm-run: %s\n", what);
    static const int codes[] = {0, 2, 2, 2, 3, 3, 2, 2, 2, 3, 2, 3, 2};
    int code = failed ? codes[tusfm_status_code(failed)] : what ? 2 : 0;
    tusfm_status_free(failed);
    return code;
}

static int run(const settings *s, tusfm_session *session) {
    tusfm_info info;
    sink sinks[MAX_SINKS];
    source from;
    int broken = 0, opened = 0;
    memset(sinks, 0, sizeof sinks);
    memset(&from, 0, sizeof from);
    from.session = session;
    tusfm_info_init(&info, sizeof info);
    tusfm_status *failed = tusfm_get_info(session, &info);
    if (failed) return finish(failed, NULL);
    if (s->info) {
        show_info(&info);
        return 0;
    }
    if (strncmp(s->source, "shm:", 4) != 0 || tue_shm_attach(&from.ring, s->source + 4) != TUE_SHM_OK)
        return finish(NULL, "a source is written shm:NAME with letters, digits, . _ and -");
    const char *what = NULL;
    for (; opened < s->sink_count && !what; opened++) {
        sinks[opened].session = session;
        if (!open_sink(&sinks[opened], s->sinks[opened], &info))
            what = "a sink is written jsonl:FILE, jsonl:- or shm-out:NAME, and must be writable";
    }
    if (!what) failed = answer_all(s, &from, sinks, info.in_place, &broken);
    for (int i = 0; i < opened; i++) {
        if (sinks[i].is_ring) tue_shm_close(&sinks[i].ring, 1);
        else if (sinks[i].file && sinks[i].file != stdout && fclose(sinks[i].file) != 0) broken = 1;
    }
    tue_shm_detach(&from.ring);
    return finish(failed, what ? what : broken ? "a reading cannot be written" : NULL);
}

int main(int count, char **words) {
    settings s;
    memset(&s, 0, sizeof s);
    if (!parse(count, words, &s)) {
        fputs(usage, stderr);
        return 2;
    }
    struct sigaction act;
    memset(&act, 0, sizeof act);
    act.sa_handler = on_signal;
    sigaction(SIGINT, &act, NULL);
    sigaction(SIGTERM, &act, NULL);
    (void)tue_shm_guard(); /* without it rings are read rather than mapped */
    tusfm_session *session = NULL;
    tusfm_status *failed = tusfm_open(s.bundle, &s.options, &session);
    if (failed) return finish(failed, NULL);
    int code = run(&s, session);
    tusfm_close(session);
    return code;
}
