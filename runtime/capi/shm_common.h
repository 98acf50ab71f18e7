/* What the writers and readers of both kinds of ring share. */
#ifndef TUE_SHM_COMMON_H
#define TUE_SHM_COMMON_H

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

#define SHM_FOLDER "/dev/shm/"

static inline uint64_t shm_now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

/* CRC-32 of zlib, eight bytes a step. The tables are made on the stack of each call: no state is kept. */
static inline uint32_t shm_crc32(const uint8_t *data, size_t count) {
    uint32_t table[8][256], crc = 0xffffffffu;
    for (uint32_t byte = 0; byte < 256; byte++) {
        uint32_t value = byte;
        for (int bit = 0; bit < 8; bit++)
            value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
        table[0][byte] = value;
    }
    for (int more = 1; more < 8 && count >= 64; more++)
        for (uint32_t byte = 0; byte < 256; byte++)
            table[more][byte] = table[more - 1][byte] >> 8 ^ table[0][table[more - 1][byte] & 255];
    for (int wide = count >= 64; wide && count >= 8; data += 8, count -= 8) {
        uint32_t low = crc ^ ((uint32_t)data[0] | (uint32_t)data[1] << 8 | (uint32_t)data[2] << 16 | (uint32_t)data[3] << 24);
        crc = table[7][low & 255] ^ table[6][low >> 8 & 255] ^ table[5][low >> 16 & 255] ^ table[4][low >> 24] ^
              table[3][data[4]] ^ table[2][data[5]] ^ table[1][data[6]] ^ table[0][data[7]];
    }
    while (count--)
        crc = crc >> 8 ^ table[0][(crc ^ *data++) & 255];
    return ~crc;
}

static inline void shm_store(uint64_t *where, uint64_t value) {
    atomic_store_explicit((_Atomic uint64_t *)where, value, memory_order_release);
}

static inline int shm_good_name(const char *name) {
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    size_t length = name ? strlen(name) : 0;
    return length >= 1 && length <= 200 && name[0] != '.' && strspn(name, allowed) == length;
}

/* Makes a ring of `slots` slots of a header and `room` bytes each, whole or not at all. */
static inline int32_t shm_make(tue_shm_writer *writer, const char *name, uint64_t room, uint64_t magic, uint32_t version,
                               uint32_t slots, uint64_t header) {
    if (!writer || !shm_good_name(name) || room < 64 || room > (uint64_t)1 << 30)
        return TUE_SHM_BAD_ARGUMENT;
    memset(writer, 0, sizeof *writer);
    uint64_t stride = (header + room + 63) / 64 * 64;
    size_t bytes = 128 + slots * stride;
    char temporary[256];
    snprintf(temporary, sizeof temporary, SHM_FOLDER ".%s.%ld", name, (long)getpid());
    snprintf(writer->name, sizeof writer->name, SHM_FOLDER "%s", name);
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
    tue_shm_ring filled = {.magic = magic,
                           .version = version,
                           .slots = slots,
                           .slot_stride = stride,
                           .pixel_bytes = room,
                           .created_ns = shm_now_ns(CLOCK_REALTIME),
                           .writer_pid = (uint32_t)getpid(),
                           .heartbeat_ns = shm_now_ns(CLOCK_MONOTONIC)};
    filled.header_crc32 = shm_crc32((const uint8_t *)&filled, offsetof(tue_shm_ring, header_crc32));
    filled.magic = 0;
    memcpy(memory, &filled, sizeof filled);
    writer->ring = memory;
    writer->bytes = bytes;
    shm_store(&writer->ring->magic, magic);
    if (rename(temporary, writer->name) != 0) {
        int why = errno;
        unlink(temporary);
        tue_shm_close(writer, 0);
        errno = why;
        return TUE_SHM_SYSTEM;
    }
    return TUE_SHM_OK;
}


#endif
