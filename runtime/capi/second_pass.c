/* One field of logits out of those of two passes: numerics/second_pass.py, line by line. */
#include "exact.h"

TUE_INLINE void between(double place, int32_t size, int32_t *before, double *share) {
    double held = tue_min(tue_max(place, 0.0), (double)(size - 1));
    *before = (int32_t)held;
    if (*before > size - 2) *before = size - 2;
    *share = held - *before;
}

TUE_INLINE double mixed(double low, double high, double share) { return low + share * (high - low); }

int32_t tue_blend(const float *second, int32_t channels, int32_t rows, int32_t columns, const int32_t *at_rows,
                  const double *row_places, int32_t row_count, const int32_t *at_columns, const double *column_places,
                  int32_t column_count, float *out) {
    if (!second || !at_rows || !row_places || !at_columns || !column_places || !out) return TUE_BAD_ARGUMENT;
    if (channels < 1 || rows < 2 || columns < 2 || rows > TUE_MAX_SIDE || columns > TUE_MAX_SIDE) return TUE_BAD_ARGUMENT;
    for (int32_t i = 0; i < row_count; i++)
        if (at_rows[i] < 0 || at_rows[i] >= rows) return TUE_BAD_ARGUMENT;
    for (int32_t j = 0; j < column_count; j++)
        if (at_columns[j] < 0 || at_columns[j] >= columns) return TUE_BAD_ARGUMENT;
    for (int32_t k = 0; k < channels; k++) {
        const float *plane = second + (ptrdiff_t)k * rows * columns;
        float *result = out + (ptrdiff_t)k * rows * columns;
        for (int32_t i = 0; i < row_count; i++) {
            int32_t above, before;
            double down, right;
            between(row_places[i], rows, &above, &down);
            const float *upper = plane + (ptrdiff_t)above * columns, *lower = upper + columns;
            float *line = result + (ptrdiff_t)at_rows[i] * columns;
            for (int32_t j = 0; j < column_count; j++) {
                between(column_places[j], columns, &before, &right);
                double high = mixed((double)upper[before], (double)upper[before + 1], right);
                double low = mixed((double)lower[before], (double)lower[before + 1], right);
                double found = mixed(high, low, down);
                line[at_columns[j]] = (float)(0.5 * ((double)line[at_columns[j]] + found));
            }
        }
    }
    return TUE_OK;
}
