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

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define SHM_FOLDS 1
#endif

_Static_assert(sizeof(tue_shm_ring) == 128 && sizeof(tue_shm_slot) == 128, "the layout is fixed");

#define SHM_FOLDER "/dev/shm/"

static inline uint64_t shm_now_ns(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#if defined(SHM_FOLDS)
#define SHM_FOLD(x, keys) _mm_xor_si128(_mm_clmulepi64_si128(x, keys, 0x00), _mm_clmulepi64_si128(x, keys, 0x11))

/* Carry-less products fold 64 bytes a step ("Fast CRC computation for generic polynomials using PCLMULQDQ", Intel 2009);
 * `count` is a multiple of 16 and at least 64. */
__attribute__((target("pclmul,sse4.1"))) static inline uint32_t shm_fold(const uint8_t *data, size_t count, uint32_t crc) {
    const __m128i far = _mm_set_epi64x(0x01c6e41596, 0x0154442bd4), near = _mm_set_epi64x(0x00ccaa009e, 0x01751997d0);
    const __m128i last = _mm_set_epi64x(0, 0x0163cd6124), barrett = _mm_set_epi64x(0x01f7011641, 0x01db710641);
    const __m128i low = _mm_setr_epi32(-1, 0, -1, 0);
    __m128i x[4];
    for (int i = 0; i < 4; i++) x[i] = _mm_loadu_si128((const __m128i *)(const void *)(data + 16 * i));
    x[0] = _mm_xor_si128(x[0], _mm_cvtsi32_si128((int)crc));
    for (data += 64, count -= 64; count >= 64; data += 64, count -= 64)
        for (int i = 0; i < 4; i++)
            x[i] = _mm_xor_si128(SHM_FOLD(x[i], far), _mm_loadu_si128((const __m128i *)(const void *)(data + 16 * i)));
    __m128i sum = x[0];
    for (int i = 1; i < 4; i++) sum = _mm_xor_si128(SHM_FOLD(sum, near), x[i]);
    for (; count >= 16; data += 16, count -= 16)
        sum = _mm_xor_si128(SHM_FOLD(sum, near), _mm_loadu_si128((const __m128i *)(const void *)data));
    sum = _mm_xor_si128(_mm_srli_si128(sum, 8), _mm_clmulepi64_si128(sum, near, 0x10));
    sum = _mm_xor_si128(_mm_clmulepi64_si128(_mm_and_si128(sum, low), last, 0x00), _mm_srli_si128(sum, 4));
    __m128i part = _mm_and_si128(_mm_clmulepi64_si128(_mm_and_si128(sum, low), barrett, 0x10), low);
    return (uint32_t)_mm_extract_epi32(_mm_xor_si128(sum, _mm_clmulepi64_si128(part, barrett, 0x00)), 1);
}
#endif

/* Goes on with a CRC-32 of zlib that is kept inverted, eight bytes a step or in folds. The tables are made on the stack of
 * each call: no state is kept. */
static inline uint32_t shm_crc32_go_on(uint32_t crc, const uint8_t *data, size_t count) {
    uint32_t table[8][256];
#if defined(SHM_FOLDS)
    if (count >= 64 && __builtin_cpu_supports("pclmul") && __builtin_cpu_supports("sse4.1")) {
        size_t most = count / 16 * 16;
        crc = shm_fold(data, most, crc);
        data += most, count -= most;
    }
    if (!count) return crc;
#endif
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
    return crc;
}

/* CRC-32 of zlib. */
static inline uint32_t shm_crc32(const uint8_t *data, size_t count) { return ~shm_crc32_go_on(0xffffffffu, data, count); }

/* ---- waiting for a number in shared memory ---- */

/* Whether this system can wait for it. */
static inline int shm_can_wait(void) {
#if defined(__linux__)
    return 1;
#else
    return 0;
#endif
}

#if defined(__linux__)
/* The low half of ring.published: numbers are little-endian. */
static inline const uint32_t *shm_word(const void *ring) {
    return (const uint32_t *)(const void *)((const uint8_t *)ring + offsetof(tue_shm_ring, published));
}

static inline long shm_futex(const uint32_t *word, int operation, uint32_t value, int64_t ns) {
    struct timespec wait = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
#if defined(SYS_futex_time64)
    if (sizeof(time_t) > sizeof(long)) return syscall(SYS_futex_time64, word, operation, value, ns ? &wait : NULL, NULL, 0);
#endif
    return syscall(SYS_futex, word, operation, value, ns ? &wait : NULL, NULL, 0);
}
#endif

/* Wakes everybody who waits at this ring. */
static inline void shm_wake(const tue_shm_ring *ring) {
#if defined(__linux__)
    (void)shm_futex(shm_word(ring), FUTEX_WAKE, INT32_MAX, 0);
#else
    (void)ring;
#endif
}

static inline void shm_sleep(int64_t ns) {
    struct timespec wait = {(time_t)(ns / 1000000000), (long)(ns % 1000000000)};
    if (ns > 0) nanosleep(&wait, NULL);
}

/* Sleeps until `published` is no longer `seen`, or so long. The mapping is looked at by the kernel alone: where the object
 * was cut short it says EFAULT, and there is no signal. */
static inline void shm_wait_word(const uint8_t *map, uint64_t seen, int64_t ns) {
#if defined(__linux__)
    if (map && ns > 0) {
        if (shm_futex(shm_word(map), FUTEX_WAIT, (uint32_t)seen, ns) == 0 || errno == EAGAIN || errno == EINTR || errno == ETIMEDOUT)
            return;
    }
#else
    (void)map, (void)seen;
#endif
    shm_sleep(ns < 500000 ? ns : 500000);
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
                           .heartbeat_ns = shm_now_ns(CLOCK_MONOTONIC),
                           .wakes = (uint32_t)shm_can_wait()};
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

/* Says that a slot is whole: the number, a sign of life, and whoever waits. */
static inline int32_t shm_publish(tue_shm_writer *writer, uint64_t number) {
    writer->published = number;
    shm_store(&writer->ring->published, number);
    int32_t said = tue_shm_beat(writer);
    shm_wake(writer->ring);
    return said;
}

#endif
