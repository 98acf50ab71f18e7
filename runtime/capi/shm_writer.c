/* The writer of tue_shm_ring.h: POSIX shared memory, C11 atomics, nothing else. */
#define _POSIX_C_SOURCE 200809L
#include "tue_shm_ring.h"

#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

_Static_assert(sizeof(tue_shm_ring) == 128 && sizeof(tue_shm_slot) == 128, "the layout is fixed");

#define FOLDER "/dev/shm/"

static uint64_t now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint32_t crc32(const uint8_t *data, size_t count) {
    uint32_t table[256], crc = 0xffffffffu;
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
        table[byte] = value;
    }
    while (count--)
        crc = crc >> 8 ^ table[(crc ^ *data++) & 255];
    return ~crc;
}

static void store(uint64_t *where, uint64_t value) {
    atomic_store_explicit((_Atomic uint64_t *)where, value, memory_order_release);
}

static int good_name(const char *name) {
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    size_t length = name ? strlen(name) : 0;
    return length >= 1 && length <= 200 && name[0] != '.' && strspn(name, allowed) == length;
}

int32_t tue_shm_open(tue_shm_writer *writer, const char *name, uint64_t pixel_bytes) {
    if (!writer || !good_name(name) || pixel_bytes < 64 || pixel_bytes > (uint64_t)1 << 30)
        return TUE_SHM_BAD_ARGUMENT;
    memset(writer, 0, sizeof *writer);
    uint64_t stride = (128 + pixel_bytes + 63) / 64 * 64;
    size_t bytes = 128 + TUE_SHM_SLOTS * stride;
    char temporary[256];
    snprintf(temporary, sizeof temporary, FOLDER ".%s.%ld", name, (long)getpid());
    snprintf(writer->name, sizeof writer->name, FOLDER "%s", name);
    unlink(temporary); /* left by a process of the same number that died here */
    int file = open(temporary, O_RDWR | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
    if (file < 0)
        return TUE_SHM_SYSTEM;
    void *memory = MAP_FAILED;
    /* posix_fallocate: a full memory file system is an error here, not a SIGBUS later */
    int refused = posix_fallocate(file, 0, (off_t)bytes);
    if (!refused)
        memory = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (memory == MAP_FAILED) {
        unlink(temporary);
        if (refused)
            errno = refused;
        return TUE_SHM_SYSTEM;
    }
    tue_shm_ring filled = {.magic = TUE_SHM_MAGIC,
                           .version = TUE_SHM_VERSION,
                           .slots = TUE_SHM_SLOTS,
                           .slot_stride = stride,
                           .pixel_bytes = pixel_bytes,
                           .created_ns = now_ns(CLOCK_REALTIME),
                           .writer_pid = (uint32_t)getpid(),
                           .heartbeat_ns = now_ns(CLOCK_MONOTONIC)};
    filled.header_crc32 = crc32((const uint8_t *)&filled, offsetof(tue_shm_ring, header_crc32));
    filled.magic = 0;
    memcpy(memory, &filled, sizeof filled);
    writer->ring = memory;
    writer->bytes = bytes;
    store(&writer->ring->magic, TUE_SHM_MAGIC);
    if (rename(temporary, writer->name) != 0) {
        int why = errno;
        unlink(temporary);
        tue_shm_close(writer, 0);
        errno = why;
        return TUE_SHM_SYSTEM;
    }
    return TUE_SHM_OK;
}

int32_t tue_shm_write(tue_shm_writer *writer, const tue_shm_frame *frame) {
    static const uint32_t channels[] = {1, 3, 3, 4};
    if (!writer || !writer->ring || !frame || !frame->pixels || frame->format > 3 || frame->flags > 15)
        return TUE_SHM_BAD_ARGUMENT;
    uint64_t size = (uint64_t)frame->rows * frame->row_stride;
    if (frame->rows < 8 || frame->columns < 8 || frame->rows > 16384 || frame->columns > 16384 ||
        frame->row_stride < frame->columns * channels[frame->format] || size > writer->ring->pixel_bytes ||
        frame->seq >> 63)
        return TUE_SHM_BAD_ARGUMENT;
    uint64_t number = writer->published + 1;
    size_t at = 128 + (size_t)((number - 1) % TUE_SHM_SLOTS * writer->ring->slot_stride);
    tue_shm_slot *slot = (tue_shm_slot *)((uint8_t *)writer->ring + at);
    tue_shm_slot filled = {.lock = 2 * number - 1,
                           .generation = number,
                           .seq = frame->seq,
                           .t_source_ns = frame->t_source_ns,
                           .t_publish_ns = now_ns(CLOCK_MONOTONIC),
                           .rows = frame->rows,
                           .columns = frame->columns,
                           .format = frame->format,
                           .row_stride = frame->row_stride,
                           .flags = frame->flags,
                           .spacing_row_mm = frame->spacing_row_mm,
                           .spacing_column_mm = frame->spacing_column_mm};
    memcpy(filled.crop, frame->crop, sizeof filled.crop);
    memcpy(filled.orientation, frame->orientation, sizeof filled.orientation);
    if (frame->flags & TUE_SHM_CHECKED)
        filled.pixels_crc32 = crc32(frame->pixels, (size_t)size);
    filled.header_crc32 = crc32((const uint8_t *)&filled + 8, offsetof(tue_shm_slot, header_crc32) - 8);
    store(&slot->lock, 2 * number - 1);
    atomic_thread_fence(memory_order_release);
    memcpy((uint8_t *)slot + 8, (const uint8_t *)&filled + 8, sizeof filled - 8);
    memcpy((uint8_t *)slot + 128, frame->pixels, (size_t)size);
    store(&slot->lock, 2 * number);
    writer->published = number;
    store(&writer->ring->published, number);
    return tue_shm_beat(writer);
}

int32_t tue_shm_beat(tue_shm_writer *writer) {
    if (!writer || !writer->ring)
        return TUE_SHM_BAD_ARGUMENT;
    store(&writer->ring->heartbeat_ns, now_ns(CLOCK_MONOTONIC));
    return TUE_SHM_OK;
}

void tue_shm_close(tue_shm_writer *writer, int32_t remove) {
    if (!writer || !writer->ring)
        return;
    if (remove) {
        /* the name may mean the ring of a successor by now */
        tue_shm_ring now = {0};
        int file = open(writer->name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW);
        if (file >= 0) {
            if (read(file, &now, sizeof now) == (ssize_t)sizeof now && now.created_ns == writer->ring->created_ns &&
                now.writer_pid == writer->ring->writer_pid)
                unlink(writer->name);
            close(file);
        }
    }
    munmap(writer->ring, writer->bytes);
    memset(writer, 0, sizeof *writer);
}
