/* Example: a scanner's process that hands its frames to a shared-memory ring; here they are a ramp that moves.
 *
 *     cc -std=c11 -O2 -I.. shm_probe.c ../shm_writer.c -o shm_probe
 *     ./shm_probe NAME ROWS COLUMNS FRAMES PERIOD_US
 *
 * Pixel (r, c) of frame n is (7 r + 3 c + 11 n) mod 251, seq is n from 0, spacing 0.2 x 0.3 mm. FRAMES 0 goes on until
 * it is stopped. It prints one line when the ring is there.
 */
#define _POSIX_C_SOURCE 200809L
#include "tue_shm_ring.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

int main(int count, char **words) {
    if (count != 6) {
        fprintf(stderr, "usage: shm_probe NAME ROWS COLUMNS FRAMES PERIOD_US\n");
        return 2;
    }
    uint32_t rows = (uint32_t)atoi(words[2]), columns = (uint32_t)atoi(words[3]);
    uint64_t frames = (uint64_t)atoll(words[4]);
    struct timespec period = {atol(words[5]) / 1000000, atol(words[5]) % 1000000 * 1000};
    tue_shm_writer writer;
    uint8_t *pixels = malloc((size_t)rows * columns);
    if (!pixels || tue_shm_open(&writer, words[1], (uint64_t)rows * columns) != TUE_SHM_OK) {
        perror("shm_probe: the ring cannot be made");
        return 1;
    }
    puts("ready");
    fflush(stdout);
    for (uint64_t n = 0; !frames || n < frames; n++) {
        for (uint32_t r = 0; r < rows; r++)
            for (uint32_t c = 0; c < columns; c++)
                pixels[(size_t)r * columns + c] = (uint8_t)((7 * r + 3 * c + 11 * n) % 251);
        tue_shm_frame frame = {.pixels = pixels,
                               .rows = rows,
                               .columns = columns,
                               .row_stride = columns,
                               .flags = TUE_SHM_SPACING | TUE_SHM_CHECKED,
                               .seq = n,
                               .t_source_ns = (int64_t)n * 1000,
                               .spacing_row_mm = 0.2,
                               .spacing_column_mm = 0.3,
                               .orientation = "MF"};
        if (tue_shm_write(&writer, &frame) != TUE_SHM_OK)
            return 1;
        nanosleep(&period, NULL);
    }
    tue_shm_close(&writer, 1);
    free(pixels);
    return 0;
}
