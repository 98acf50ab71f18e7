/* Example: the least that reads a ring of frames and writes a ring of readings; every frame is copied and answered with
 * its number and the number of its bytes that are not 0. What it takes from ring to ring is what the rings, the copy and the machine take.
 *
 *     cc -std=c11 -O2 -I.. shm_echo.c ../shm_reader.c ../shm_guard.c ../shm_writer.c ../shm_result.c -o shm_echo
 *     ./shm_echo FRAMES-RING READINGS-RING > times
 *
 * A line a frame, as tinyusfm-run --times writes it: its number, when it was published, when it was copied, when its
 * reading was written (ns, CLOCK_MONOTONIC), and how long was worked on it. It goes on until it is stopped.
 */
#define _POSIX_C_SOURCE 200809L
#include "tue_shm_result.h"

#include <stdio.h>
#include <stdlib.h>
#include <time.h>

static long long now_ns(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (long long)now.tv_sec * 1000000000 + now.tv_nsec;
}

static int64_t work(const uint8_t *pixels, uint64_t count) {
    int64_t lit = 0;
    for (uint64_t i = 0; i < count; i++) lit += pixels[i] != 0;
    return lit;
}

int main(int count, char **words) {
    tue_shm_reader reader;
    tue_shm_writer writer;
    uint8_t *pixels = NULL;
    uint64_t room = 0;
    if (count != 3 || tue_shm_guard() != TUE_SHM_OK || tue_shm_attach(&reader, words[1]) != TUE_SHM_OK ||
        tue_res_open(&writer, words[2], 64) != TUE_SHM_OK) {
        fprintf(stderr, "usage: shm_echo FRAMES-RING READINGS-RING\n");
        return 2;
    }
    for (;;) {
        tue_shm_slot slot;
        (void)tue_shm_wait(&reader, 100);
        uint64_t needed = tue_shm_room(&reader);
        if (needed > room) {
            free(pixels);
            pixels = malloc((size_t)needed);
            room = pixels ? needed : 0;
        }
        if (!pixels || tue_shm_newest(&reader, &slot, pixels, room) != TUE_SHM_NEW) continue;
        long long there = now_ns();
        tue_res_slot answer = {.seq = (int64_t)slot.seq, .t_recv_ns = (int64_t)slot.t_publish_ns, .flags = TUE_RES_VALID | TUE_RES_ANSWERED};
        answer.area_px = work(pixels, (uint64_t)slot.rows * slot.row_stride);
        long long worked = now_ns();
        if (tue_res_write(&writer, &answer, NULL) != TUE_SHM_OK) return 1;
        printf("%llu %llu %lld %lld %lld\n", (unsigned long long)slot.seq, (unsigned long long)slot.t_publish_ns, there, now_ns(),
               worked - there);
        fflush(stdout);
    }
}
