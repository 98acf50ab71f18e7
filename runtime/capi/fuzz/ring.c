/* Fuzzes the readers of rings. The first byte says which checksums are set right, so that what lies behind them is
 * reached too, and whether the object is cut short after the reader came to it.
 *
 * With TUSFM_FUZZ_GUARDED rings are mapped under tue_shm_guard.
 *
 * With TUSFM_FUZZ_BROKEN the reader is given more room than there is, which the fuzzer has to find. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../shm_common.h"
#include "../tue_shm_result.h"
#include "../tue_shm_ring.h"

enum { ROOM = 100, OBJECT = 8192 };
static size_t slot_at;
#if defined(TUSFM_FUZZ_BROKEN)
enum { CLAIMED = ROOM * 4 };
#else
enum { CLAIMED = ROOM };
#endif

static uint64_t number_at(const uint8_t *data, size_t at) {
    uint64_t value;
    memcpy(&value, data + at, sizeof value);
    return value;
}

/* The input is a ring header, one slot header and content; the slot is put where the ring says that it lies. */
static void lay_out(uint8_t object[OBJECT], const uint8_t *data, size_t size) {
    size_t head = size < sizeof(tue_shm_ring) ? size : sizeof(tue_shm_ring);
    memset(object, 0, OBJECT);
    memcpy(object, data, head);
    uint64_t now = shm_now_ns(CLOCK_MONOTONIC); /* a writer that lives: nothing is read of a dead one */
    memcpy(object + offsetof(tue_shm_ring, heartbeat_ns), &now, sizeof now);
    uint64_t slots = number_at(object, offsetof(tue_shm_ring, slots)) & 0xffffffffu;
    uint64_t published = number_at(object, offsetof(tue_shm_ring, published));
    uint64_t at = slots ? (published - 1) % slots * number_at(object, offsetof(tue_shm_ring, slot_stride)) : 0;
    if (at > OBJECT - 1024) at = 0;
    memcpy(object + sizeof(tue_shm_ring) + at, data + head, size - head < 768 ? size - head : 768);
    slot_at = sizeof(tue_shm_ring) + at;
}

/* Sets the checksums right, of the ring and if `slot_too` of the slot, and the slot's number. */
static void repair(uint8_t object[OBJECT], size_t header, int slot_too) {
    uint32_t sum = shm_crc32(object, offsetof(tue_shm_ring, header_crc32));
    memcpy(object + offsetof(tue_shm_ring, header_crc32), &sum, sizeof sum);
    if (!slot_too) return;
    uint64_t published = number_at(object, offsetof(tue_shm_ring, published)), lock = 2 * published;
    memcpy(object + slot_at, &lock, sizeof lock);
    memcpy(object + slot_at + 8, &published, sizeof published);
    sum = shm_crc32(object + slot_at + 8, header - 12);
    memcpy(object + slot_at + header - 4, &sum, sizeof sum);
}

static void fill(int file, const uint8_t *data, size_t size) {
    if (ftruncate(file, (off_t)size) != 0 || pwrite(file, data, size, 0) != (ssize_t)size) abort();
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char name[64];
#if defined(TUSFM_FUZZ_GUARDED)
    if (tue_shm_guard() != TUE_SHM_OK) abort();
#endif
    if (size < 1 || size > 1 << 16) return 0;
    int is_result = data[0] & 4;
    uint8_t object[OBJECT], *pixels = malloc(ROOM);
    if (!pixels) abort();
    lay_out(object, data + 1, size - 1);
    if (data[0] & 1) repair(object, is_result ? sizeof(tue_res_slot) : sizeof(tue_shm_slot), data[0] & 2);
    snprintf(name, sizeof name, "/tusfm-fuzz-%ld", (long)getpid());
    int file = shm_open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
    if (file < 0) abort();
    fill(file, object, OBJECT);
    tue_shm_reader reader;
    if (tue_shm_attach(&reader, name + 1) == TUE_SHM_OK) {
        for (int turn = 0; turn < 3; turn++) {
            tue_shm_slot frame;
            tue_res_slot result;
            (void)tue_shm_room(&reader);
            (void)tue_shm_wait(&reader, 0);
            if (is_result) (void)tue_res_newest(&reader, &result, pixels, CLAIMED);
            else if (tue_shm_newest(&reader, &frame, pixels, CLAIMED) == TUE_SHM_NEW &&
                     (frame.rows < 8 || frame.columns < 8 || (uint64_t)frame.rows * frame.row_stride > CLAIMED))
                abort();
            if (data[0] & 8) fill(file, object, 300);
        }
        tue_shm_detach(&reader);
    }
    close(file);
    shm_unlink(name);
    free(pixels);
    return 0;
}
