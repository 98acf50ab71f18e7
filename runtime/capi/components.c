/* Logits to mask, and the largest 8-connected component of a mask by union-find over horizontal runs. */
#include "runs.h"

typedef struct run {
    int32_t start, end; /* columns start <= x < end */
    int32_t parent;     /* index of a run of the same component, never larger than its own: the root is the first */
    int32_t area;       /* pixels of the component, kept at the root */
} run;

int32_t tue_numerics_version(void) { return TUE_NUMERICS_VERSION; }

TUE_CLONES
int32_t tue_threshold(const float *logits, size_t count, float cut, uint8_t *out) {
    if (!logits || !out) return TUE_BAD_ARGUMENT;
    for (size_t i = 0; i < count; i++) out[i] = logits[i] > cut;
    return TUE_OK;
}

/* Worst case: every second pixel of every row starts a run. */
size_t tue_components_scratch(int32_t rows, int32_t columns) {
    if (rows < 1 || columns < 1 || rows > TUE_MAX_SIDE || columns > TUE_MAX_SIDE) return 0;
    size_t runs = (size_t)rows * (size_t)(columns / 2 + 1);
    return runs * sizeof(run) + ((size_t)rows + 1) * sizeof(int32_t) + sizeof(run);
}

static int32_t root_of(run *runs, int32_t i) {
    while (runs[i].parent != i) {
        runs[i].parent = runs[runs[i].parent].parent;
        i = runs[i].parent;
    }
    return i;
}

/* Unites each run of one row with the runs of the row above that it touches, corners included. */
static void unite_rows(run *runs, int32_t above, int32_t above_end, int32_t here, int32_t here_end) {
    while (above < above_end && here < here_end) {
        if (runs[above].start <= runs[here].end && runs[here].start <= runs[above].end) {
            int32_t a = root_of(runs, above), b = root_of(runs, here);
            if (a < b) runs[b].parent = a;
            if (b < a) runs[a].parent = b;
        }
        if (runs[above].end < runs[here].end)
            above++;
        else
            here++;
    }
}

static void find_runs(const uint8_t *mask, int32_t rows, int32_t columns, run *runs, int32_t *first_of_row) {
    int32_t count = 0;
    for (int32_t y = 0; y < rows; y++) {
        const uint8_t *row = mask + (ptrdiff_t)y * columns;
        int32_t start, end = 0;
        first_of_row[y] = count;
        while (tue_next_run(row, columns, end, &start, &end)) {
            runs[count] = (run){.start = start, .end = end, .parent = count, .area = 0};
            count++;
        }
        if (y > 0) unite_rows(runs, first_of_row[y - 1], first_of_row[y], first_of_row[y], count);
    }
    first_of_row[rows] = count;
}

/* Points every run at its root and adds up the areas; returns the root of the largest component, the first of equals.
 * A parent has a smaller index than its child, so going upwards it is flat already. */
static int32_t largest_root(run *runs, int32_t count) {
    for (int32_t i = 0; i < count; i++) {
        runs[i].parent = runs[runs[i].parent].parent;
        runs[runs[i].parent].area += runs[i].end - runs[i].start;
    }
    int32_t best = 0;
    for (int32_t i = 1; i < count; i++)
        if (runs[i].parent == i && runs[i].area > runs[best].area) best = i;
    return best;
}

int32_t tue_largest_component(const uint8_t *mask, int32_t rows, int32_t columns, uint8_t *out, int64_t *area,
                              void *scratch, size_t scratch_bytes) {
    size_t need = tue_components_scratch(rows, columns);
    if (!mask || !out || !area || !scratch || need == 0) return TUE_BAD_ARGUMENT;
    if (scratch_bytes < need) return TUE_SMALL_SCRATCH;
    uintptr_t aligned = ((uintptr_t)scratch + sizeof(run) - 1) / sizeof(run) * sizeof(run);
    run *runs = (run *)aligned;
    int32_t *first_of_row = (int32_t *)(runs + (size_t)rows * (size_t)(columns / 2 + 1));
    find_runs(mask, rows, columns, runs, first_of_row);
    int32_t count = first_of_row[rows];
    memset(out, 0, (size_t)rows * (size_t)columns);
    *area = 0;
    if (count == 0) return TUE_OK;
    int32_t best = largest_root(runs, count);
    *area = runs[best].area;
    for (int32_t y = 0; y < rows; y++) {
        uint8_t *row = out + (ptrdiff_t)y * columns;
        for (int32_t i = first_of_row[y]; i < first_of_row[y + 1]; i++)
            if (runs[i].parent == best) memset(row + runs[i].start, 1, (size_t)(runs[i].end - runs[i].start));
    }
    return TUE_OK;
}
