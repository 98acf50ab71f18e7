#include "drift_window.h"

#include "structs.h"

#include <math.h>
#include <stddef.h>
#include <stdlib.h>

struct tusfm_drift_monitor {
    int32_t frames, seen, next, sum;
    uint8_t strange[]; /* a ring of the last frames */
};

tusfm_status *drift_window_new(int32_t frames, tusfm_drift_monitor **made) {
    tusfm_drift_monitor *w = calloc(1, sizeof *w + (size_t)frames);
    if (!w) return no_memory();
    w->frames = frames;
    *made = w;
    return NULL;
}

void drift_window_alone(tusfm_reading *reading) {
    int checked = reading->drift == TUSFM_DRIFT_CHECKED;
    reading->drift_share = checked ? (double)(reading->strange != 0) : NAN;
    reading->drift_frames = checked, reading->drift_window = checked ? WINDOW_FRAMES : 0, reading->drift_alarm = 0;
}

void drift_window_observe(tusfm_drift_monitor *w, tusfm_reading *reading) {
    if (reading->drift != TUSFM_DRIFT_CHECKED) return;
    uint8_t strange = reading->strange != 0;
    w->sum += strange - (w->seen == w->frames ? w->strange[w->next] : 0);
    w->seen += w->seen < w->frames;
    w->strange[w->next] = strange;
    w->next = (w->next + 1) % w->frames;
    reading->drift_share = (double)w->sum / (double)w->seen;
    reading->drift_frames = w->seen, reading->drift_window = w->frames;
    reading->drift_alarm = w->seen == w->frames && reading->drift_share >= 0.5;
}

tusfm_status *tusfm_drift_monitor_new(int32_t window, tusfm_drift_monitor **monitor) {
    if (!monitor) return status_new(TUSFM_INPUT, "there is no place for the drift monitor");
    if (window < 0 || window > MAX_WINDOW_FRAMES)
        return status_new(TUSFM_INPUT, "a drift window has 1 to %d frames, or 0 for the usual ones, not %d", MAX_WINDOW_FRAMES, window);
    return drift_window_new(window ? window : WINDOW_FRAMES, monitor);
}

tusfm_status *tusfm_drift_observe(tusfm_drift_monitor *monitor, tusfm_reading *reading) {
    if (!monitor) return status_new(TUSFM_INPUT, "the drift monitor is NULL");
    TRY(struct_check(reading, "the reading"));
    if (reading->struct_size < offsetof(tusfm_reading, reserved_drift))
        return status_new(TUSFM_INPUT, "the program's readings have no window of drift: build it with this header");
    drift_window_observe(monitor, reading);
    return NULL;
}

void tusfm_drift_monitor_free(tusfm_drift_monitor *monitor) { free(monitor); }
