#include "arrivals.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { RESTART_AFTER = 3, HICCUPS = 16, LEAST = 4, STALL_PERIODS = 10, COARSE = 8 };
static const int64_t CLOCK_STEP_NS = 1000000000;
static const double STALL_MS = 250.0, ASSUMED_MS = 1000.0 / 15;

/* How far a number lies ahead, -2^31 to 2^31 - 1. */
static int64_t ahead(int64_t seq, int64_t last) {
    return (int64_t)(int32_t)(uint32_t)((uint64_t)seq - (uint64_t)last);
}

static int same(int64_t seq, int64_t time, int64_t last_seq, int64_t last_time) {
    return ahead(seq, last_seq) == 0 || (time != TUSFM_NO_TIME && time == last_time);
}

static int before(int64_t seq, int64_t time, int64_t last_seq, int64_t last_time) {
    if (ahead(seq, last_seq) < 0) return 1;
    if (time == TUSFM_NO_TIME || last_time == TUSFM_NO_TIME) return 0;
    int stepped = time < last_time && (uint64_t)last_time - (uint64_t)time > (uint64_t)CLOCK_STEP_NS;
    return time < last_time && !stepped;
}

static int began_anew(order_guard *g, int64_t seq, int64_t time) {
    int rising = g->has_older && !same(seq, time, g->older_seq, g->older_time) &&
                 !before(seq, time, g->older_seq, g->older_time);
    g->run = rising ? g->run + 1 : 1;
    g->older_seq = seq, g->older_time = time, g->has_older = 1;
    if (g->run < RESTART_AFTER) return 0;
    g->restarts++;
    return 1;
}

int order_judge(order_guard *g, int64_t seq, int64_t time) {
    if (g->has_last) {
        if (same(seq, time, g->last_seq, g->last_time)) return ORDER_DUPLICATE;
        if (before(seq, time, g->last_seq, g->last_time) && !began_anew(g, seq, time)) return ORDER_OUT;
    }
    g->last_seq = seq, g->last_time = time, g->has_last = 1;
    g->has_older = 0, g->run = 0;
    return ORDER_NEWER;
}

void period_init(frame_period *p) { *p = (frame_period){.ms = ASSUMED_MS}; }

static int ascending(const void *a, const void *b) {
    double one = *(const double *)a, other = *(const double *)b;
    return one < other ? -1 : one > other;
}

void period_arrived(frame_period *p, int64_t now) {
    int64_t last = p->last_ns;
    p->last_ns = now;
    if (!last) return;
    double interval = (double)(now - last) / 1e6;
    int known = p->count >= LEAST;
    if (known && interval > (STALL_PERIODS * p->ms > STALL_MS ? STALL_PERIODS * p->ms : STALL_MS)) {
        if (++p->stalls < LEAST) return;
        p->count = p->next = 0; /* not a stall: the source has become slow */
    }
    p->stalls = 0;
    p->intervals[p->next] = interval;
    p->next = (p->next + 1) % PERIOD_WINDOW;
    if (p->count < PERIOD_WINDOW) p->count++;
    if (p->count < LEAST) return;
    double sorted[PERIOD_WINDOW], sum = 0;
    int kept = p->count - p->count / HICCUPS;
    memcpy(sorted, p->intervals, (size_t)p->count * sizeof *sorted);
    qsort(sorted, (size_t)p->count, sizeof *sorted, ascending);
    for (int i = 0; i < kept; i++) sum += sorted[i];
    p->ms = sum / kept > 0.1 ? sum / kept : 0.1;
}

double period_spare_ms(const frame_period *p, int64_t now) {
    double since = (double)(now - p->last_ns) / 1e6;
    return p->count < LEAST || since > 2 * p->ms ? INFINITY : p->ms - since;
}

int same_pixels(const uint8_t *a, const uint8_t *b, size_t rows, size_t row_bytes) {
    for (size_t y = 0; y < rows; y += COARSE) /* ultrasound is noisy: an image that moves differs there already */
        if (memcmp(a + y * row_bytes, b + y * row_bytes, row_bytes) != 0) return 0;
    return memcmp(a, b, rows * row_bytes) == 0;
}
