/* Frames of a stream as they arrive: their order, how far apart they come, and whether they still move; as
 * live/order.py and live/freeze.py. Nothing here decides anything. */
#ifndef TUSFM_ARRIVALS_H
#define TUSFM_ARRIVALS_H

#include "status.h"

enum order { ORDER_NEWER, ORDER_OUT, ORDER_DUPLICATE };

typedef struct order_guard {
    int64_t last_seq, last_time, older_seq, older_time;
    int has_last, has_older, run;
    int64_t restarts;
} order_guard;

/* Sequence numbers are compared as serial numbers modulo 2^32 (RFC 1982). */
int order_judge(order_guard *g, int64_t seq, int64_t t_source_ns);

enum { PERIOD_WINDOW = 32 };

/* The time between frames: the mean of the last intervals without the longest. */
typedef struct frame_period {
    double ms, intervals[PERIOD_WINDOW];
    int count, next, stalls;
    int64_t last_ns;
} frame_period;

void period_init(frame_period *p);
void period_arrived(frame_period *p, int64_t now_ns);

/* Time until the next frame is expected; below zero: it is late; infinite: none is expected, as there is no estimate yet or
 * no frame came for two periods. */
double period_spare_ms(const frame_period *p, int64_t now_ns);

/* Whether two images of `rows` rows of `row_bytes` are the same, pixel by pixel. */
int same_pixels(const uint8_t *a, const uint8_t *b, size_t rows, size_t row_bytes);

#endif
