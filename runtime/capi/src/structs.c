#include "structs.h"

#include <math.h>
#include <string.h>

enum { SMALLEST = 8, LARGEST = 4096 };

static uint32_t size_of(const void *given) {
    uint32_t size;
    memcpy(&size, given, sizeof size);
    return size;
}

tusfm_status *struct_check(const void *to, const char *what) {
    if (!to) return status_new(TUSFM_INPUT, "%s is NULL", what);
    uint32_t size = size_of(to);
    if (size < SMALLEST || size > LARGEST) return status_new(TUSFM_INPUT, "%s was not filled in by its _init function", what);
    return NULL;
}

void struct_give(void *to, const void *from, size_t size) {
    uint32_t room = size_of(to);
    memcpy((char *)to + sizeof room, (const char *)from + sizeof room, (room < size ? room : size) - sizeof room);
}

static void take(void *taken, const void *given, size_t size) {
    uint32_t theirs = size_of(given);
    memcpy((char *)taken + sizeof theirs, (const char *)given + sizeof theirs, (theirs < size ? theirs : size) - sizeof theirs);
}

/* Fills a caller's struct: what lies behind this library's knowledge becomes 0. */
static void init(void *to, size_t room, const void *defaults, size_t size) {
    if (!to || room < SMALLEST) return;
    if (room > LARGEST) room = LARGEST;
    memset(to, 0, room);
    memcpy(to, defaults, room < size ? room : size);
    uint32_t stated = (uint32_t)room;
    memcpy(to, &stated, sizeof stated);
}

void tusfm_frame_init(tusfm_frame *frame, size_t size) {
    tusfm_frame defaults = {.t_source_ns = TUSFM_NO_TIME, .t_recv_ns = TUSFM_NO_TIME};
    init(frame, size, &defaults, sizeof defaults);
}

void tusfm_reading_init(tusfm_reading *reading, size_t size) {
    tusfm_reading none = {.exit_index = -1, .t_recv_ns = TUSFM_NO_TIME, .hc_mm = NAN, .hc_px = NAN, .major_mm = NAN,
                          .minor_mm = NAN, .major_px = NAN, .minor_px = NAN, .centre_row = NAN, .centre_column = NAN,
                          .angle_deg = NAN, .confidence = NAN, .age_ms = NAN, .spacing_row_mm = NAN,
                          .spacing_column_mm = NAN, .area_px = NAN, .drift_score = NAN, .drift_threshold = NAN,
                          .area_mm2 = NAN, .agreement = NAN, .bounds_px = {NAN, NAN, NAN, NAN}, .centroid_row = NAN,
                          .centroid_column = NAN, .drift_share = NAN};
    init(reading, size, &none, sizeof none);
}

void tusfm_measurement_init(tusfm_measurement *measurement, size_t size) {
    tusfm_measurement none = {.confidence = NAN, .area_px = NAN, .area_mm2 = NAN, .bounds_px = {NAN, NAN, NAN, NAN},
                              .centroid_row = NAN, .centroid_column = NAN, .hc_mm = NAN, .hc_px = NAN, .major_mm = NAN,
                              .minor_mm = NAN, .major_px = NAN, .minor_px = NAN, .centre_row = NAN, .centre_column = NAN,
                              .angle_deg = NAN, .agreement = NAN};
    init(measurement, size, &none, sizeof none);
}

void tusfm_options_init(tusfm_options *options, size_t size) {
    tusfm_options defaults = {.abi = TUSFM_ABI, .misses_in_a_row = 5, .grace_ms = 500, .recheck_s = 1};
    init(options, size, &defaults, sizeof defaults);
}

void tusfm_trust_options_init(tusfm_trust_options *options, size_t size) {
    tusfm_trust_options defaults = {.require_signed = 1};
    init(options, size, &defaults, sizeof defaults);
}

void tusfm_info_init(tusfm_info *info, size_t size) {
    tusfm_info none = {.struct_size = 0};
    init(info, size, &none, sizeof none);
}

void tusfm_artefact_init(tusfm_artefact *artefact, size_t size) {
    tusfm_artefact none = {.struct_size = 0};
    init(artefact, size, &none, sizeof none);
}

void tusfm_counters_init(tusfm_counters *counters, size_t size) {
    tusfm_counters none = {.struct_size = 0};
    init(counters, size, &none, sizeof none);
}

void tusfm_swap_options_init(tusfm_swap_options *options, size_t size) {
    tusfm_swap_options defaults = {.probation_frames = 10, .min_dice = 0.8, .patience_s = 30};
    init(options, size, &defaults, sizeof defaults);
}

void tusfm_swap_report_init(tusfm_swap_report *report, size_t size) {
    tusfm_swap_report none = {.outcome = TUSFM_REFUSED, .dice_mean = NAN, .dice_worst = NAN, .hc_max_mm = NAN};
    init(report, size, &none, sizeof none);
}

static int not_below_0(double value) { return value >= 0 && isfinite(value); }

tusfm_status *options_take(const tusfm_options *given, tusfm_options *taken) {
    tusfm_options_init(taken, sizeof *taken);
    if (!given) return NULL;
    TRY(struct_check(given, "options"));
    take(taken, given, sizeof *taken);
    if (taken->abi != TUSFM_ABI)
        return status_new(TUSFM_INPUT, "the program was built for interface %u, this library has %u: build it again",
                          taken->abi, TUSFM_ABI);
    if (taken->threads < 0 || taken->threads > 1024)
        return status_new(TUSFM_INPUT, "threads must be 0 to 1024, not %d", taken->threads);
    const double times[] = {taken->budget_ms,  taken->deadline_ms,      taken->give_up_ms,
                            taken->grace_ms,   taken->overlay_limit_ms, taken->recheck_s};
    for (size_t i = 0; i < sizeof times / sizeof *times; i++)
        if (!not_below_0(times[i])) return status_new(TUSFM_INPUT, "times in the options must not be below 0");
    if (taken->misses_in_a_row < 0) return status_new(TUSFM_INPUT, "misses_in_a_row must not be below 0");
    if (taken->grace_ms == 0) taken->grace_ms = 500;
    return NULL;
}

tusfm_status *trust_options_take(const tusfm_trust_options *given, tusfm_trust_options *taken) {
    tusfm_trust_options_init(taken, sizeof *taken);
    TRY(struct_check(given, "options.trust"));
    take(taken, given, sizeof *taken);
    if (!taken->store || !*taken->store)
        return status_new(TUSFM_INPUT, "options.trust names no store: a folder with trust.json and keys");
    if (!taken->floor_read != !taken->floor_raise)
        return status_new(TUSFM_INPUT, "options.trust: set both floor_read and floor_raise, or neither");
    return NULL;
}

tusfm_status *frame_take(const tusfm_frame *given, tusfm_frame *taken) {
    tusfm_frame_init(taken, sizeof *taken);
    tusfm_status *failed = struct_check(given, "the frame");
    if (failed) return status_as(failed, TUSFM_FRAME);
    take(taken, given, sizeof *taken);
    return NULL;
}

void tusfm_lease_init(tusfm_lease *lease, size_t size) {
    tusfm_lease defaults = {0};
    init(lease, size, &defaults, sizeof defaults);
}

tusfm_status *lease_take(const tusfm_lease *given, tusfm_lease *taken) {
    tusfm_lease_init(taken, sizeof *taken);
    if (!given) return NULL;
    TRY(struct_check(given, "the lease"));
    take(taken, given, sizeof *taken);
    return NULL;
}

tusfm_status *swap_options_take(const tusfm_swap_options *given, tusfm_swap_options *taken) {
    tusfm_swap_options_init(taken, sizeof *taken);
    if (!given) return NULL;
    TRY(struct_check(given, "swap options"));
    take(taken, given, sizeof *taken);
    if (taken->shadow_frames < 0 || taken->probation_frames < 0 || !(taken->min_dice >= 0 && taken->min_dice <= 1) ||
        !(taken->patience_s > 0))
        return status_new(TUSFM_INPUT, "swap options: counts not negative, min_dice 0 to 1, patience_s above 0");
    return NULL;
}
