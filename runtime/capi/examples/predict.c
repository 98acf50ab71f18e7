/* One image, one reading:  example_c BUNDLE IMAGE.pgm ROW_MM COLUMN_MM [ENGINE_FOLDER]
 * The image is a binary PGM of 8 bits (P5), as `convert` and many scanners write it. */
#include <stdio.h>
#include <stdlib.h>
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

int main(int count, char **words) {
    if (count < 5) {
        fprintf(stderr, "usage: %s BUNDLE IMAGE.pgm ROW_MM COLUMN_MM [ENGINE_FOLDER]\n", words[0]);
        return 2;
    }
    tusfm_session *session = NULL;
    tusfm_options options;
    tusfm_frame frame;
    tusfm_reading reading;
    tusfm_info info;
    tusfm_options_init(&options, sizeof options);
    tusfm_frame_init(&frame, sizeof frame);
    tusfm_reading_init(&reading, sizeof reading);
    tusfm_info_init(&info, sizeof info);
    unsigned char *pixels = read_pgm(words[2], &frame.rows, &frame.columns);
    if (!pixels) {
        fprintf(stderr, "%s is no 8-bit binary PGM\n", words[2]);
        return 2;
    }
    frame.pixels = pixels;
    frame.spacing_row_mm = atof(words[3]);
    frame.spacing_column_mm = atof(words[4]);
    if (count > 5) options.engine_folder = words[5];

    tusfm_status *failed = tusfm_open(words[1], &options, &session);
    if (!failed) failed = tusfm_get_info(session, &info);
    if (!failed) failed = tusfm_predict(session, &frame, &reading);
    if (failed)
        fprintf(stderr, "%s\n", tusfm_status_text(failed));
    else
        printf("%s on %s: found %d, HC %.2f mm, %.1f ms\n", info.artefact, info.engine, reading.found, reading.hc_mm,
               reading.total_ms);
    int code = failed != NULL;
    tusfm_status_free(failed);
    tusfm_close(session);
    free(pixels);
    return code;
}
