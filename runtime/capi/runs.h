/* Horizontal runs of non-zero pixels: what components.c and moments.c have in common. */
#ifndef TUE_RUNS_H
#define TUE_RUNS_H

#include "dispatch.h"
#include "tue_numerics.h"

/* Finds the next run at or after column `from`: columns *start <= x < *end. Returns 0 when the row has no more. */
TUE_INLINE int tue_next_run(const uint8_t *row, int32_t columns, int32_t from, int32_t *start, int32_t *end) {
    int32_t x = from;
    uint64_t eight;
    for (; x + 8 <= columns; x += 8) { /* most of a mask is empty: eight pixels a step */
        memcpy(&eight, row + x, 8);
        if (eight != 0) break;
    }
    while (x < columns && row[x] == 0) x++;
    if (x == columns) return 0;
    *start = x;
    const uint8_t *gap = memchr(row + x, 0, (size_t)(columns - x));
    *end = gap ? (int32_t)(gap - row) : columns;
    return 1;
}

#endif
