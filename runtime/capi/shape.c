/* Holes, contour, and where the field of view ends, in whole numbers: numerics/shape.py, line by line. */
#include "exact.h"
#include "runs.h"

enum { LIT_CODE = 2, CELL = 4, LIT_IN_CELL = 2, EDGE = 2, EDGE_PARTS = 12 };

typedef struct gap {
    int32_t start, end, parent, open; /* columns start <= x < end outside the mask; open: a way leads out */
} gap;

static int usable(int32_t rows, int32_t columns) {
    return rows > 0 && columns > 0 && rows <= TUE_MAX_SIDE && columns <= TUE_MAX_SIDE;
}

size_t tue_holes_scratch(int32_t rows, int32_t columns) {
    if (!usable(rows, columns)) return 0;
    return (size_t)rows * (size_t)(columns / 2 + 1) * sizeof(gap) + ((size_t)rows + 1) * sizeof(int32_t) + sizeof(gap);
}

static int32_t root_of(gap *gaps, int32_t i) {
    while (gaps[i].parent != i) {
        gaps[i].parent = gaps[gaps[i].parent].parent;
        i = gaps[i].parent;
    }
    return i;
}

/* Sides, not corners: a mask's corners are closed. */
static void unite(gap *gaps, int32_t above, int32_t above_end, int32_t here, int32_t here_end) {
    while (above < above_end && here < here_end) {
        if (gaps[above].start < gaps[here].end && gaps[here].start < gaps[above].end) {
            int32_t a = root_of(gaps, above), b = root_of(gaps, here);
            int32_t low = a < b ? a : b, high = a < b ? b : a;
            gaps[high].parent = low;
            gaps[low].open |= gaps[high].open;
        }
        if (gaps[above].end < gaps[here].end)
            above++;
        else
            here++;
    }
}

int32_t tue_fill_holes(const uint8_t *mask, int32_t rows, int32_t columns, uint8_t *out, void *scratch,
                       size_t scratch_bytes) {
    size_t need = tue_holes_scratch(rows, columns);
    if (!mask || !out || !scratch || need == 0) return TUE_BAD_ARGUMENT;
    if (scratch_bytes < need) return TUE_SMALL_SCRATCH;
    gap *gaps = (gap *)(((uintptr_t)scratch + sizeof(gap) - 1) / sizeof(gap) * sizeof(gap));
    int32_t *first_of_row = (int32_t *)(gaps + (size_t)rows * (size_t)(columns / 2 + 1)), count = 0;
    for (int32_t y = 0; y < rows; y++) {
        const uint8_t *row = mask + (ptrdiff_t)y * columns;
        first_of_row[y] = count;
        for (int32_t x = 0; x < columns;) {
            if (row[x]) {
                x++;
                continue;
            }
            const int32_t start = x;
            while (x < columns && !row[x]) x++;
            int32_t open = y == 0 || y == rows - 1 || start == 0 || x == columns;
            gaps[count] = (gap){start, x, count, open};
            count++;
        }
        if (y > 0) unite(gaps, first_of_row[y - 1], first_of_row[y], first_of_row[y], count);
    }
    first_of_row[rows] = count;
    for (int32_t y = 0; y < rows; y++) {
        uint8_t *row = out + (ptrdiff_t)y * columns;
        memset(row, 1, (size_t)columns);
        for (int32_t i = first_of_row[y]; i < first_of_row[y + 1]; i++)
            if (gaps[root_of(gaps, i)].open) memset(row + gaps[i].start, 0, (size_t)(gaps[i].end - gaps[i].start));
    }
    return TUE_OK;
}

static const int32_t step_row[8] = {0, 1, 1, 1, 0, -1, -1, -1}, step_col[8] = {1, 1, 0, -1, -1, -1, 0, 1};

static int is_in(const uint8_t *mask, int32_t rows, int32_t columns, int32_t row, int32_t col) {
    return row >= 0 && col >= 0 && row < rows && col < columns && mask[(ptrdiff_t)row * columns + col] != 0;
}

/* Walks round once; writes the points whose places are picked, or only counts where `points` is null. */
static int64_t walk(const uint8_t *mask, int32_t rows, int32_t columns, int32_t row, int32_t col, int64_t length,
                    int32_t most, int32_t *points) {
    int32_t at_row = row, at_col = col, back = 4, first_way = -1, kept = 0;
    int64_t count = 0, bound = 8 * (int64_t)rows * columns + 8;
    while (count < bound) {
        int32_t way = -1;
        for (int32_t k = 1; k < 9 && way < 0; k++) {
            int32_t w = (back + k) % 8;
            if (is_in(mask, rows, columns, at_row + step_row[w], at_col + step_col[w])) way = w;
        }
        if (count > 0 && at_row == row && at_col == col && way == first_way) break;
        if (points && kept < most && kept * length / most == count) {
            points[2 * kept] = at_row;
            points[2 * kept + 1] = at_col;
            kept++;
        }
        count++;
        if (way < 0) break;
        if (first_way < 0) first_way = way;
        at_row += step_row[way];
        at_col += step_col[way];
        back = way % 2 == 0 ? (way + 6) % 8 : (way + 5) % 8;
    }
    return count;
}

int32_t tue_contour(const uint8_t *mask, int32_t rows, int32_t columns, int32_t most, int32_t *points,
                    int32_t *count) {
    if (!mask || !points || !count || most < 1 || !usable(rows, columns)) return TUE_BAD_ARGUMENT;
    *count = 0;
    for (int32_t y = 0; y < rows; y++) {
        int32_t start, end;
        if (!tue_next_run(mask + (ptrdiff_t)y * columns, columns, 0, &start, &end)) continue;
        int64_t length = walk(mask, rows, columns, y, start, 0, 0, NULL);
        *count = length < most ? (int32_t)length : most;
        walk(mask, rows, columns, y, start, length, *count, points);
        return TUE_OK;
    }
    return TUE_OK;
}

static int32_t cells(int32_t side) { return (side + CELL - 1) / CELL; }

size_t tue_view_scratch(int32_t rows, int32_t columns) {
    if (!usable(rows, columns)) return 0;
    size_t grid = (size_t)cells(rows) * (size_t)cells(columns);
    return tue_components_scratch(cells(rows), cells(columns)) + 2 * grid + 2 * (size_t)rows * (size_t)columns +
           2 * (size_t)columns;
}

/* Lit pixels to the left and right, above and below; `above`: one row of room. */
TUE_CLONES
static void mark_view(const uint8_t *lit, int32_t rows, int32_t columns, uint8_t *view, uint8_t *above) {
    memset(above, 0, (size_t)columns);
    for (int32_t y = 0; y < rows; y++) {
        const uint8_t *line = lit + (ptrdiff_t)y * columns;
        uint8_t *out = view + (ptrdiff_t)y * columns;
        int32_t first = 0, last = columns - 1;
        while (first < columns && !line[first]) first++;
        while (last > first && !line[last]) last--;
        for (int32_t x = 0; x < columns; x++) {
            above[x] |= line[x];
            out[x] = (uint8_t)((x >= first && x <= last) & above[x]);
        }
    }
    memset(above, 0, (size_t)columns);
    for (int32_t y = rows - 1; y >= 0; y--) {
        const uint8_t *line = lit + (ptrdiff_t)y * columns;
        uint8_t *out = view + (ptrdiff_t)y * columns;
        for (int32_t x = 0; x < columns; x++) {
            above[x] |= line[x];
            out[x] &= above[x];
        }
    }
}

/* Lit codes of each column over some rows. */
TUE_CLONES
static void count_lit(const uint8_t *restrict codes, int32_t rows, int32_t columns, uint8_t *restrict counts) {
    memset(counts, 0, (size_t)columns);
    for (int32_t y = 0; y < rows; y++)
        for (int32_t x = 0; x < columns; x++)
            counts[x] = (uint8_t)(counts[x] + (codes[(ptrdiff_t)y * columns + x] > LIT_CODE));
}

/* `counts`: one row of room. */
static void mark_lit(const uint8_t *codes, int32_t rows, int32_t columns, uint8_t *grid, uint8_t *kept, uint8_t *lit,
                     uint8_t *counts, void *scratch, size_t scratch_bytes) {
    int32_t down = cells(rows), right = cells(columns);
    int64_t area;
    for (int32_t i = 0; i < down; i++) {
        int32_t left = rows - i * CELL < CELL ? rows - i * CELL : CELL;
        count_lit(codes + (ptrdiff_t)i * CELL * columns, left, columns, counts);
        for (int32_t j = 0; j < right; j++) {
            int32_t found = 0;
            for (int32_t x = j * CELL; x < columns && x < (j + 1) * CELL; x++) found += counts[x];
            grid[(ptrdiff_t)i * right + j] = found >= LIT_IN_CELL;
        }
    }
    tue_largest_component(grid, down, right, kept, &area, scratch, scratch_bytes);
    memset(lit, 0, (size_t)rows * (size_t)columns);
    for (int32_t y = 0; y < rows; y++)
        for (int32_t j = 0; j < right; j++) {
            if (!kept[(ptrdiff_t)(y / CELL) * right + j]) continue;
            ptrdiff_t line = (ptrdiff_t)y * columns;
            for (int32_t x = j * CELL; x < columns && x < (j + 1) * CELL; x++) lit[line + x] = codes[line + x] > LIT_CODE;
        }
}

static int is_border(const uint8_t *mask, int32_t rows, int32_t columns, int32_t y, int32_t x) {
    const uint8_t *m = mask + (ptrdiff_t)y * columns + x;
    return y == 0 || y == rows - 1 || x == 0 || x == columns - 1 || !m[-1] || !m[1] || !m[-columns] || !m[columns];
}

static int at_edge(const uint8_t *view, int32_t rows, int32_t columns, int32_t y, int32_t x) {
    const uint8_t *v = view + (ptrdiff_t)y * columns + x;
    const ptrdiff_t step = (ptrdiff_t)EDGE * columns;
    return (y >= EDGE && !v[-step]) || (y < rows - EDGE && !v[step]) || (x >= EDGE && !v[-EDGE]) ||
           (x < columns - EDGE && !v[EDGE]);
}

int32_t tue_cut_by_sector(const uint8_t *mask, const uint8_t *codes, int32_t rows, int32_t columns, int32_t *cut,
                          void *scratch, size_t scratch_bytes) {
    size_t need = tue_view_scratch(rows, columns);
    if (!mask || !codes || !cut || !scratch || need == 0) return TUE_BAD_ARGUMENT;
    if (scratch_bytes < need) return TUE_SMALL_SCRATCH;
    size_t part = tue_components_scratch(cells(rows), cells(columns));
    size_t pixels = (size_t)rows * (size_t)columns, grid_size = (size_t)cells(rows) * (size_t)cells(columns);
    uint8_t *grid = (uint8_t *)scratch + part, *kept = grid + grid_size, *lit = kept + grid_size, *view = lit + pixels;
    mark_lit(codes, rows, columns, grid, kept, lit, view + pixels, scratch, part);
    mark_view(lit, rows, columns, view, view + pixels);
    int64_t border = 0, edge = 0;
    for (int32_t y = 0; y < rows; y++) {
        int32_t start, end = 0;
        while (tue_next_run(mask + (ptrdiff_t)y * columns, columns, end, &start, &end)) {
            for (int32_t x = start; x < end; x++) {
                if (!is_border(mask, rows, columns, y, x)) continue;
                border++;
                edge += at_edge(view, rows, columns, y, x);
            }
        }
    }
    *cut = border > 0 && EDGE_PARTS * edge >= border;
    return TUE_OK;
}
