/* Fuzzes the readers of rings. The first byte says which checksums are set right, so that what lies behind them is
 * reached too, and whether the object is cut short after the reader came to it: to one page before the first frame is
 * read (its header may lie in front of the cut and its content behind it), or to a part of a slot afterwards.
 *
 * With TUSFM_FUZZ_GUARDED rings are mapped under tue_shm_guard.
 *
 * With TUSFM_FUZZ_BROKEN the reader copies whatever a slot claims, which the fuzzer has to find. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "../shm_common.h"
#include "../tue_shm_result.h"
#include "../tue_shm_ring.h"

enum { ROOM = 100, OBJECT = 8192, PAGE = 4096 };
enum mode { RING_CRC = 1, SLOT_CRC = 2, RESULTS = 4, CUT_AFTER = 8, CUT_BEFORE = 16 }; /* bits of the first byte */
static size_t slot_at;

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

#define IN_RING(field) {1 + offsetof(tue_shm_ring, field), sizeof((tue_shm_ring *)0)->field}
#define IN_FRAME(field) {1 + sizeof(tue_shm_ring) + offsetof(tue_shm_slot, field), sizeof((tue_shm_slot *)0)->field}
#define IN_RESULT(field) {1 + sizeof(tue_shm_ring) + offsetof(tue_res_slot, field), sizeof((tue_res_slot *)0)->field}

/* Half of the mutations stay within a number that says where something lies or how large it is: of hundreds of bytes
 * changes at random seldom hit one of these, and the checksum would be wrong. */
size_t LLVMFuzzerMutate(uint8_t *data, size_t size, size_t most);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed);
size_t LLVMFuzzerCustomMutator(uint8_t *data, size_t size, size_t most, unsigned seed) {
    static const struct {
        size_t at, bytes;
    } places[2][11] = {{IN_RING(slots), IN_RING(slot_stride), IN_RING(pixel_bytes), IN_RING(published), IN_FRAME(lock),
                        IN_FRAME(generation), IN_FRAME(rows), IN_FRAME(columns), IN_FRAME(row_stride), IN_FRAME(format),
                        IN_FRAME(flags)},
                       {IN_RING(slots), IN_RING(slot_stride), IN_RING(pixel_bytes), IN_RING(published), IN_RESULT(lock),
                        IN_RESULT(generation), IN_RESULT(mask_rows), IN_RESULT(mask_columns), IN_RESULT(box), IN_RESULT(crop),
                        IN_RESULT(score_count)}};
    size_t kind = size && (data[0] & RESULTS), least = 1 + sizeof(tue_shm_ring) + (kind ? sizeof(tue_res_slot) : sizeof(tue_shm_slot));
    if (seed & 1 || size < least) return LLVMFuzzerMutate(data, size, most);
    size_t place = (seed >> 1) % (sizeof places[0] / sizeof places[0][0]);
    (void)LLVMFuzzerMutate(data + places[kind][place].at, places[kind][place].bytes, places[kind][place].bytes);
    data[0] |= RING_CRC | SLOT_CRC;
    return size;
}

static void fill(int file, const uint8_t *data, size_t size) {
    if (ftruncate(file, (off_t)size) != 0 || pwrite(file, data, size, 0) != (ssize_t)size) abort();
}

/* Looks at a frame where it lies, cut short meanwhile or not. */
static void borrow(const char *name, int file, const uint8_t *object, int cut) {
    tue_shm_reader reader;
    tue_shm_slot frame;
    const uint8_t *pixels = NULL;
    if (tue_shm_attach(&reader, name) != TUE_SHM_OK) return;
    if (tue_shm_borrow(&reader, &frame, &pixels) == TUE_SHM_NEW) {
        if (cut) fill(file, object, PAGE);
        tue_shm_look(&reader, 1);
        uint64_t sum = 0;
        for (uint64_t i = 0; i < (uint64_t)frame.rows * frame.row_stride; i += 61) sum += pixels[i];
        if (sum > 255 * (uint64_t)frame.rows * frame.row_stride) abort();  /* never: but each byte is read */
        tue_shm_look(&reader, 0);
        if (tue_shm_holds(&reader) && (frame.rows < 8 || frame.columns < 8)) abort();
        (void)tue_shm_borrow(&reader, &frame, &pixels);
    }
    tue_shm_detach(&reader);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);
int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    char name[64];
#if defined(TUSFM_FUZZ_GUARDED)
    if (tue_shm_guard() != TUE_SHM_OK) abort();
#endif
    if (size < 1 || size > 1 << 16) return 0;
    int is_result = data[0] & RESULTS;
    uint8_t object[OBJECT], *pixels = malloc(ROOM);
    if (!pixels) abort();
    lay_out(object, data + 1, size - 1);
    if (data[0] & RING_CRC) repair(object, is_result ? sizeof(tue_res_slot) : sizeof(tue_shm_slot), data[0] & SLOT_CRC);
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
            if (data[0] & CUT_BEFORE && !turn) fill(file, object, PAGE);
            (void)tue_shm_wait(&reader, 0);
            if (is_result) (void)tue_res_newest(&reader, &result, pixels, ROOM);
            else if (tue_shm_newest(&reader, &frame, pixels, ROOM) == TUE_SHM_NEW &&
                     (frame.rows < 8 || frame.columns < 8 || (uint64_t)frame.rows * frame.row_stride > ROOM))
                abort();
            if (data[0] & CUT_AFTER) fill(file, object, 300);
        }
        tue_shm_detach(&reader);
    }
    if (!is_result) {
        fill(file, object, OBJECT);
        borrow(name + 1, file, object, data[0] & CUT_BEFORE);
    }
    close(file);
    shm_unlink(name);
    free(pixels);
    return 0;
}
