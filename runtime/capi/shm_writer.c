/* The writer of tue_shm_ring.h: POSIX shared memory, C11 atomics, and on Linux a futex. */
#define _GNU_SOURCE
#include "shm_common.h"

int32_t tue_shm_open(tue_shm_writer *writer, const char *name, uint64_t pixel_bytes) {
    return shm_make(writer, name, pixel_bytes, TUE_SHM_MAGIC, TUE_SHM_VERSION, TUE_SHM_SLOTS, 128);
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
        filled.pixels_crc32 = shm_crc32(frame->pixels, (size_t)size);
    shm_store(&slot->lock, 2 * number - 1);
    atomic_thread_fence(memory_order_release);
    memcpy((uint8_t *)slot + 128, frame->pixels, (size_t)size);
    filled.t_publish_ns = shm_now_ns(CLOCK_MONOTONIC);
    filled.header_crc32 = shm_crc32((const uint8_t *)&filled + 8, offsetof(tue_shm_slot, header_crc32) - 8);
    memcpy((uint8_t *)slot + 8, (const uint8_t *)&filled + 8, sizeof filled - 8);
    shm_store(&slot->lock, 2 * number);
    return shm_publish(writer, number);
}

int32_t tue_shm_beat(tue_shm_writer *writer) {
    if (!writer || !writer->ring)
        return TUE_SHM_BAD_ARGUMENT;
    shm_store(&writer->ring->heartbeat_ns, shm_now_ns(CLOCK_MONOTONIC));
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
