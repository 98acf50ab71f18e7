/* Exact raw moments of a mask up to second order, run by run. */
#include "runs.h"

/* Sum of x and of x squared over 0 <= x < n. n <= 16384, so the cube stays below 2^44. */
static int64_t sum_1(int64_t n) { return n * (n - 1) / 2; }
static int64_t sum_2(int64_t n) { return n * (n - 1) * (2 * n - 1) / 6; }

int32_t tue_moments(const uint8_t *mask, int32_t rows, int32_t columns, int64_t out[6]) {
    if (!mask || !out || rows < 1 || columns < 1 || rows > TUE_MAX_SIDE || columns > TUE_MAX_SIDE)
        return TUE_BAD_ARGUMENT;
    int64_t m00 = 0, m10 = 0, m01 = 0, m20 = 0, m11 = 0, m02 = 0;
    for (int64_t y = 0; y < rows; y++) {
        const uint8_t *row = mask + y * columns;
        int64_t count = 0, sum_x = 0;
        int32_t start, end = 0;
        while (tue_next_run(row, columns, end, &start, &end)) {
            count += end - start;
            sum_x += sum_1(end) - sum_1(start);
            m20 += sum_2(end) - sum_2(start);
        }
        m00 += count;
        m10 += sum_x;
        m01 += y * count;
        m11 += y * sum_x;
        m02 += y * y * count;
    }
    out[0] = m00;
    out[1] = m10;
    out[2] = m01;
    out[3] = m20;
    out[4] = m11;
    out[5] = m02;
    return TUE_OK;
}
