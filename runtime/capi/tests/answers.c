/* What a bundle says about images, as text that two machines can compare:  answers BUNDLE TARGET ENGINE_FOLDER|- LIST
 * LIST has a line for each binary PGM: PATH ROW_MM COLUMN_MM. Numbers are printed to the last bit. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tinyusfm.h>

static unsigned char *read_pgm(const char *path, int *rows, int *columns) {
    int most = 0;
    FILE *file = fopen(path, "rb");
    if (!file) return NULL;
    unsigned char *pixels = NULL;
    if (fscanf(file, "P5 %d %d %d", columns, rows, &most) == 3 && most == 255 && fgetc(file) != EOF && *rows > 0 &&
        *columns > 0 && *rows <= 16384 && *columns <= 16384) {
        size_t count = (size_t)*rows * (size_t)*columns;
        pixels = malloc(count);
        if (pixels && fread(pixels, 1, count, file) != count) {
            free(pixels);
            pixels = NULL;
        }
    }
    fclose(file);
    return pixels;
}

/* FNV-1a of the mask at the frame's own size, and how many pixels it marks. */
static tusfm_status *sum_up(const tusfm_reading *reading, uint64_t *hash, long *marked) {
    size_t count = (size_t)reading->frame_rows * (size_t)reading->frame_columns;
    unsigned char *mask = malloc(count);
    *hash = 14695981039346656037u;
    *marked = 0;
    if (!mask) return NULL;
    tusfm_status *failed = tusfm_mask_on_frame(reading, mask, reading->frame_columns);
    for (size_t i = 0; i < count && !failed; i++) {
        *hash = (*hash ^ mask[i]) * 1099511628211u;
        *marked += mask[i] != 0;
    }
    free(mask);
    return failed;
}

static tusfm_status *answer(tusfm_session *session, const char *path, double row_mm, double column_mm) {
    tusfm_frame frame;
    tusfm_reading reading;
    uint64_t hash;
    long marked;
    tusfm_frame_init(&frame, sizeof frame);
    tusfm_reading_init(&reading, sizeof reading);
    unsigned char *pixels = read_pgm(path, &frame.rows, &frame.columns);
    if (!pixels) {
        printf("no image\n");
        return NULL;
    }
    frame.pixels = pixels;
    frame.spacing_row_mm = row_mm;
    frame.spacing_column_mm = column_mm;
    tusfm_status *failed = tusfm_predict(session, &frame, &reading);
    if (!failed) failed = sum_up(&reading, &hash, &marked);
    if (!failed)
        printf("answer valid %d found %d hc %.17g area %lld marked %ld mask %016llx\n", reading.valid, reading.found,
               reading.hc_mm, (long long)reading.area_px, marked, (unsigned long long)hash);
    free(pixels);
    return failed;
}

int main(int count, char **words) {
    tusfm_session *session = NULL;
    tusfm_options options;
    tusfm_info info;
    FILE *list = count == 5 ? fopen(words[4], "r") : NULL;
    if (!list) {
        fprintf(stderr, "usage: %s BUNDLE TARGET ENGINE_FOLDER|- LIST\n", words[0]);
        return 2;
    }
    tusfm_options_init(&options, sizeof options);
    tusfm_info_init(&info, sizeof info);
    options.target = words[2];
    options.threads = 1;
    options.allow_precision = 1;
    options.no_second_pass = 1; /* emulated, a pass takes seconds */
    options.recheck_s = 0;
    if (strcmp(words[3], "-") != 0) options.engine_folder = words[3];
    tusfm_status *failed = tusfm_open(words[1], &options, &session);
    if (!failed) failed = tusfm_get_info(session, &info);
    if (!failed) printf("engine %s; %s; golden frames %d\n", info.engine, info.executed, info.golden_frames);
    char path[512];
    double row_mm, column_mm;
    while (!failed && fscanf(list, "%511s %lf %lf", path, &row_mm, &column_mm) == 3) {
        failed = answer(session, path, row_mm, column_mm);
        fflush(stdout);
    }
    fclose(list);
    if (failed) fprintf(stderr, "%s\n", tusfm_status_text(failed));
    int code = failed != NULL;
    tusfm_status_free(failed);
    tusfm_close(session);
    return code;
}
