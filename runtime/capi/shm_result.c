/* The writer of tue_shm_result.h. */
#define _GNU_SOURCE
#include "tue_shm_result.h"

#include "shm_common.h"

int32_t tue_res_open(tue_shm_writer *writer, const char *name, uint64_t mask_bytes) {
    return shm_make(writer, name, mask_bytes, TUE_RES_MAGIC, TUE_RES_VERSION, TUE_RES_SLOTS, 256);
}

int32_t tue_res_write(tue_shm_writer *writer, const tue_res_slot *given, const uint8_t *mask) {
    if (!writer || !writer->ring || !given) return TUE_SHM_BAD_ARGUMENT;
    uint64_t size = (uint64_t)given->mask_rows * given->mask_columns;
    if (size > writer->ring->pixel_bytes || (size && !mask) || given->flags > 511) return TUE_SHM_BAD_ARGUMENT;
    uint64_t number = writer->published + 1;
    uint8_t *at = (uint8_t *)writer->ring + 128 + (size_t)((number - 1) % TUE_RES_SLOTS * writer->ring->slot_stride);
    tue_res_slot *slot = (tue_res_slot *)(void *)at, filled = *given;
    filled.generation = number;
    filled.mask_crc32 = size ? shm_crc32(mask, (size_t)size) : 0;
    shm_store(&slot->lock, 2 * number - 1);
    atomic_thread_fence(memory_order_release);
    if (size) memcpy(at + 256, mask, (size_t)size);
    filled.t_publish_ns = (int64_t)shm_now_ns(CLOCK_MONOTONIC);
    filled.header_crc32 = shm_crc32((const uint8_t *)&filled + 8, offsetof(tue_res_slot, header_crc32) - 8);
    memcpy(at + 8, (const uint8_t *)&filled + 8, sizeof filled - 8);
    shm_store(&slot->lock, 2 * number);
    return shm_publish(writer, number);
}
