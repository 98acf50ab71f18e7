/* Drives everything that the header offers, for the sanitizers and valgrind:  exercise BUNDLE OTHER [ROUNDS]
 * Both bundles run in the stub engine. It prints one line and ends with 0, or says what was wrong and ends with 1. */
#define _POSIX_C_SOURCE 200809L
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <tinyusfm.h>

enum { ROWS = 120, COLUMNS = 160 };
static unsigned char pixels[ROWS * COLUMNS * 4];

static void stop(const char *what, tusfm_status *failed) {
    fprintf(stderr, "exercise: %s: %s\n", what, tusfm_status_text(failed));
    tusfm_status_free(failed);
    exit(1);
}

static void need(tusfm_status *failed, const char *what) {
    if (failed) stop(what, failed);
}

static void refused(tusfm_status *failed, int32_t code, const char *what) {
    if (tusfm_status_code(failed) != code) stop(what, failed);
    tusfm_status_free(failed);
}

static void nap(long ms) {
    struct timespec wait = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&wait, NULL);
}

static tusfm_frame frame_of(long number, int32_t format) {
    tusfm_frame frame;
    int step = format == TUSFM_GREY ? 1 : format == TUSFM_RGBA ? 4 : 3;
    for (int y = 0; y < ROWS; y++)
        for (int x = 0; x < COLUMNS * step; x++) {
            int dx = x / step - 60 - (int)(number % 30), dy = y - 60;
            pixels[y * COLUMNS * step + x] = dx * dx + dy * dy < 900 ? 220 : 15;
        }
    tusfm_frame_init(&frame, sizeof frame);
    frame.pixels = pixels, frame.rows = ROWS, frame.columns = COLUMNS, frame.format = format, frame.seq = number;
    frame.spacing_row_mm = frame.spacing_column_mm = 0.3;
    return frame;
}

static void measurements(const tusfm_reading *reading) {
    tusfm_measurement measured;
    tusfm_measurement_init(&measured, sizeof measured);
    for (int32_t i = 0; i < reading->label_count; i++) {
        need(tusfm_get_measurement(reading, i, &measured), "measurement");
        if (!measured.label || measured.contour_points < 0 || measured.contour_points > TUSFM_CONTOUR_POINTS)
            stop("a measurement without a label", NULL);
    }
    refused(tusfm_get_measurement(reading, reading->label_count, &measured), TUSFM_INPUT, "a label that is not there");
}

static void lone_frames(tusfm_session *session) {
    static unsigned char mask[ROWS * COLUMNS];
    tusfm_reading reading;
    tusfm_info info;
    tusfm_reading_init(&reading, sizeof reading);
    tusfm_info_init(&info, sizeof info);
    for (int32_t format = TUSFM_GREY; format <= TUSFM_RGBA; format++) {
        tusfm_frame frame = frame_of(format, format);
        need(tusfm_predict(session, &frame, &reading), "predict");
        need(tusfm_mask_on_frame(&reading, mask, 0), "mask on frame");
        measurements(&reading);
        frame.roi_row = 10, frame.roi_column = 20, frame.roi_rows = 80, frame.roi_columns = 100;
        need(tusfm_predict(session, &frame, &reading), "predict a region");
        frame.rows = 3;
        refused(tusfm_predict(session, &frame, &reading), TUSFM_FRAME, "a frame of three rows");
    }
    need(tusfm_get_info(session, &info), "info");
    if (!tusfm_label(session, 0) || tusfm_label(session, 99)) stop("labels", NULL);
}

/* Puts a frame into the session's own memory; rows lie apart in some, so that it has to be moved together. */
static void lend(tusfm_session *session, tusfm_frame *frame) {
    static const int32_t channels[] = {1, 3, 3, 4};
    uint8_t *place = NULL;
    int64_t row = (int64_t)frame->columns * channels[frame->format], stride = row + (frame->seq % 3) * 16;
    int64_t from = frame->row_stride ? frame->row_stride : row;
    need(tusfm_room(session, stride * frame->rows, &place), "room");
    for (int32_t y = 0; y < frame->rows; y++) memcpy(place + y * stride, frame->pixels + y * from, (size_t)row);
    frame->pixels = place, frame->row_stride = stride;
}

static void give(void *user, const tusfm_reading *reading) {
    measurements(reading);
    ++*(int *)user;
}

static void looked(void *user, int32_t begins) { *(int *)user += begins; }

static int32_t every_fifth_is_overwritten(void *user) { return *(const int *)user % 5 != 0; }

/* In this thread, from where the pixels lie. */
static void answer(tusfm_session *session, int number) {
    int given = 0, looks = number;
    tusfm_frame frame = frame_of(number, number % 4);
    tusfm_lease lease;
    tusfm_lease_init(&lease, sizeof lease);
    lease.user = &looks, lease.look = looked, lease.holds = every_fifth_is_overwritten;
    need(tusfm_answer(session, &frame, number % 2 ? &lease : NULL, give, &given), "answer");
}

static void stream(tusfm_session *session, const char *other, int rounds) {
    tusfm_info info;
    tusfm_info_init(&info, sizeof info);
    need(tusfm_get_info(session, &info), "info");
    tusfm_reading reading;
    tusfm_counters counters;
    tusfm_swap_report report;
    int32_t there = 0;
    tusfm_reading_init(&reading, sizeof reading);
    tusfm_counters_init(&counters, sizeof counters);
    tusfm_swap_report_init(&report, sizeof report);
    for (int number = 0; number < rounds; number++) {
        if (info.in_place && number % 3 == 2) {
            answer(session, number);
            continue;
        }
        tusfm_frame frame = frame_of(number, number % 4);
        if (number % 2) lend(session, &frame);
        need(tusfm_submit(session, &frame), "submit");
        need(tusfm_newest(session, number % 3, &reading, &there), "newest");
        if (there) measurements(&reading);
        need(tusfm_overlay(session, &reading, &there), "overlay");
        if (there) measurements(&reading);
        if (number % 7 == 0) tusfm_contact(session);
        if (number % 11 == 0) tusfm_cancel(session);
        need(tusfm_get_counters(session, &counters), "counters");
    }
    need(tusfm_swap(session, "/nonexistent", NULL, &report), "a swap that is refused");
    if (report.outcome != TUSFM_REFUSED) stop("a bundle that is not there was not refused", NULL);
    tusfm_swap_options options;
    tusfm_swap_options_init(&options, sizeof options);
    options.probation_frames = 0; /* nobody submits meanwhile */
    need(tusfm_swap(session, other, &options, &report), "swap");
    if (report.outcome != TUSFM_SWITCHED) stop(report.reason, NULL);
    for (int tries = 0; tries < 500; tries++) {
        need(tusfm_get_counters(session, &counters), "counters");
        if (!counters.waiting) break;
        nap(10);
    }
    long long sum = counters.processed + counters.overtaken + counters.out_of_order + counters.duplicate + counters.closing +
                    counters.rejected + counters.waiting;
    if (sum != counters.received) stop("the counters do not add up", NULL);
}

int main(int count, char **words) {
    if (count < 3) return 2;
    int rounds = count > 3 ? atoi(words[3]) : 60;
    for (int open = 0; open < 3; open++) {
        tusfm_session *session = NULL;
        tusfm_options options;
        tusfm_options_init(&options, sizeof options);
        options.fallback = open, options.budget_ms = 500, options.recheck_s = 0.01;
        options.no_second_pass = options.no_drift = open == 2;
        need(tusfm_open(words[1], &options, &session), "open");
        lone_frames(session);
        stream(session, words[2], rounds);
        tusfm_close(session);
    }
    tusfm_session *none = NULL;
    refused(tusfm_open("/nonexistent", NULL, &none), TUSFM_INPUT, "a bundle that is not there");
    puts("exercised");
    return 0;
}
