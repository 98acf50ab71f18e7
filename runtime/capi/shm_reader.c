/* The readers of tue_shm_ring.h and tue_shm_result.h: copies by pread, so that a writer that shrinks the object cannot
 * kill them, or from a guarded mapping (shm_guard.c), and trust in nothing that was not checked. */
#define _GNU_SOURCE
#include "shm_common.h"
#include "shm_guard.h"
#include "tue_shm_result.h"

_Static_assert(sizeof(tue_res_slot) == 256, "the layout is fixed");

enum { MAX_SLOTS = 64 };
static const uint64_t RENEWED_NS = 50000000, DEAD_NS = 1000000000, SECOND_NS = 1000000000;

static int read_at(int file, void *into, size_t count, uint64_t at) {
    uint8_t *to = into;
    while (count) {
        ssize_t got = pread(file, to, count, (off_t)at);
        if (got < 0 && errno == EINTR) continue;
        if (got <= 0) return 0;
        to += got, count -= (size_t)got, at += (uint64_t)got;
    }
    return 1;
}

/* The same, from the mapping where that is guarded and reaches so far. What was taken away from it stays zeros: it has to be
 * made again. */
static int look_at(tue_shm_reader *r, void *into, size_t count, uint64_t at) {
    if (!r->map || r->map_bytes < at + count || !shm_guarded()) return read_at(r->file, into, count, at);
    if (shm_copy(into, r->map, (size_t)r->map_bytes, (size_t)at, count)) return 1;
    r->gone = 1;
    return 0;
}

int32_t tue_shm_attach(tue_shm_reader *reader, const char *name) {
    if (!reader || !shm_good_name(name)) return TUE_SHM_BAD_ARGUMENT;
    memset(reader, 0, sizeof *reader);
    reader->file = -1;
    snprintf(reader->name, sizeof reader->name, SHM_FOLDER "%s", name);
    return TUE_SHM_OK;
}

static void let_go(tue_shm_reader *r) {
    if (r->map) munmap((void *)(uintptr_t)r->map, (size_t)r->map_bytes);
    r->map = NULL, r->map_bytes = 0;
    if (r->file >= 0) close(r->file);
    r->file = -1, r->lent = 0, r->gone = 0;
}

void tue_shm_detach(tue_shm_reader *reader) {
    if (reader) let_go(reader);
}

static int good_ring(const tue_shm_ring *ring, uint64_t magic, uint32_t version, uint64_t header, uint64_t object_bytes) {
    if (ring->magic != magic || ring->version != version) return 0;
    if (ring->header_crc32 != shm_crc32((const uint8_t *)ring, offsetof(tue_shm_ring, header_crc32))) return 0;
    for (size_t i = 0; i < sizeof ring->reserved; i++)
        if (ring->reserved[i]) return 0;
    if (ring->slots < 2 || ring->slots > MAX_SLOTS || ring->slot_stride % 64 || ring->slot_stride > (uint64_t)1 << 32) return 0;
    if (ring->pixel_bytes < 64 || ring->pixel_bytes > (uint64_t)1 << 30 || ring->pixel_bytes + header > ring->slot_stride) return 0;
    return 128 + ring->slots * ring->slot_stride <= object_bytes;
}

/* Maps the ring's header for the kernel to wait at or, under the guard, the whole ring, its pages touched before a frame
 * needs them. An object with holes is not mapped whole: to read a hole there would take memory. */
static void map_ring(tue_shm_reader *r, const tue_shm_ring *ring, const struct stat *facts) {
    uint64_t whole = 128 + ring->slots * ring->slot_stride;
    int all = shm_guarded() && whole <= SIZE_MAX && (uint64_t)facts->st_blocks * 512 >= whole;
    r->map_bytes = all ? whole : sizeof *ring;
    void *map = mmap(NULL, (size_t)r->map_bytes, PROT_READ, MAP_SHARED, r->file, 0);
    r->map = map == MAP_FAILED ? NULL : map;
    if (!r->map) r->map_bytes = 0;
    if (r->map && all) shm_touch(r->map, (size_t)whole);
}

/* Whether content fits into the caller's memory. fuzz_ring_broken is built without this check, which fuzzing has to find. */
static int fits(uint64_t size, uint64_t room) {
#if defined(TUSFM_FUZZ_BROKEN)
    (void)size, (void)room;
    return 1;
#else
    return size <= room;
#endif
}

/* Copies content of a slot; *crc, if asked for, goes on meanwhile over what is still in the cache. 0: cut short. */
static int copy_content(tue_shm_reader *r, uint8_t *into, uint64_t count, uint64_t at, uint32_t *crc) {
    enum { PART = 1 << 17 };
    for (uint64_t done = 0; done < count;) {
        size_t part = (size_t)(count - done < PART && crc ? count - done : crc ? PART : count - done);
        if (!look_at(r, into + done, part, at + done)) {
            if (r->gone) let_go(r);
            return 0;
        }
        if (crc) *crc = shm_crc32_go_on(*crc, into + done, part);
        done += part;
    }
    return 1;
}

/* Opens the ring of the name, if there is a good one. */
static int open_ring(tue_shm_reader *r, uint64_t magic, uint32_t version, uint64_t header) {
    struct stat facts;
    tue_shm_ring ring;
    int file = open(r->name, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file < 0) return 0;
    if (fstat(file, &facts) != 0 || !S_ISREG(facts.st_mode) || !read_at(file, &ring, sizeof ring, 0) ||
        !good_ring(&ring, magic, version, header, (uint64_t)facts.st_size)) {
        close(file);
        return 0;
    }
    r->file = file;
    r->device = (uint64_t)facts.st_dev, r->inode = (uint64_t)facts.st_ino;
    r->slots = ring.slots, r->slot_stride = ring.slot_stride, r->room = ring.pixel_bytes;
    r->taken = 0, r->heartbeat_ns = 0;
    r->frame_ns = r->looked_ns = shm_now_ns(CLOCK_MONOTONIC);
    r->wakes = ring.wakes == 1, r->again = 0;
    map_ring(r, &ring, &facts);
    r->attached++;
    return 1;
}

static void come_over(tue_shm_reader *r, uint64_t now) {
    struct stat facts;
    if (now - r->looked_ns < RENEWED_NS || now - r->frame_ns < RENEWED_NS) return;
    r->looked_ns = now;
    if (lstat(r->name, &facts) != 0 || (uint64_t)facts.st_dev != r->device || (uint64_t)facts.st_ino != r->inode) let_go(r);
}

/* How far apart frames come, measured from the start again after a pause. */
static void learn_rate(tue_shm_reader *r, uint64_t number, uint64_t now) {
    uint64_t apart = r->taken ? (now - r->frame_ns) / (number - r->taken) : SECOND_NS;
    if (apart >= SECOND_NS) r->every_ns = 0;
    else r->every_ns = r->every_ns ? (7 * r->every_ns + apart) / 8 : apart;
}

/* Reads the slot of a reading: its header, then its content by `content`. */
typedef int32_t (*reading_of)(tue_shm_reader *r, uint64_t number, uint64_t at, void *slot, uint8_t *into, uint64_t room);

static int32_t newest(tue_shm_reader *r, uint64_t magic, uint32_t version, uint64_t header, reading_of content, void *slot,
                      uint8_t *into, uint64_t room) {
    uint64_t state[2];
    if (r->gone) let_go(r);
    if (r->file < 0 && !open_ring(r, magic, version, header)) return TUE_SHM_NOTHING;
    if (!look_at(r, state, sizeof state, offsetof(tue_shm_ring, published))) {
        r->damaged++;
        let_go(r);
        return TUE_SHM_DAMAGED;
    }
    uint64_t now = shm_now_ns(CLOCK_MONOTONIC), number = state[0];
    if (state[1] <= now + SECOND_NS && state[1] > r->heartbeat_ns) r->heartbeat_ns = state[1];
    if (!r->taken && now > state[1] && now - state[1] > DEAD_NS) r->taken = number; /* of a writer that died */
    if (number <= r->taken || number >> 62) {
        come_over(r, now);
        return TUE_SHM_NOTHING;
    }
    uint64_t at = 128 + (number - 1) % r->slots * r->slot_stride, lock;
    int32_t found = content(r, number, at, slot, into, room);
    atomic_thread_fence(memory_order_acquire); /* what was copied from the mapping is older than the lock read now */
    if (found == TUE_SHM_NEW && (!look_at(r, &lock, sizeof lock, at) || lock != 2 * number)) found = TUE_SHM_NOTHING;
    if (found == TUE_SHM_NOTHING) {
        r->torn++;
        r->again = 1;
        return found;
    }
    r->again = 0;
    if (found == TUE_SHM_DAMAGED) r->damaged++;
    if (r->taken && number > r->taken + 1) r->overtaken += number - r->taken - 1;
    learn_rate(r, number, now);
    r->taken = number;
    r->frame_ns = now;
    return found;
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void tue_shm_expect(tue_shm_reader *reader, double ms) {
    if (reader) reader->spin_ns = ms > 0 ? (uint64_t)((ms < 10 ? ms : 10) * 1e6) : 0;
}

static void relax(void) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

/* How long to sleep before the time at which the next frame is expected; at that time it looks without sleeping, and then
 * gives back `left`, or 0 where there is something. */
static int64_t expect(tue_shm_reader *r, uint64_t seen, int64_t left) {
    if (!r->spin_ns || !r->every_ns || !r->map || !shm_guarded()) return left;
    uint64_t now = shm_now_ns(CLOCK_MONOTONIC), due = r->frame_ns + r->every_ns, end = now + (uint64_t)left;
    if (now + r->spin_ns < due) return least(left, (int64_t)(due - r->spin_ns - now));
    if (due + r->spin_ns < end) end = due + r->spin_ns;
    uint64_t number = seen;
    shm_begin(r->map, (size_t)r->map_bytes);
    while (number == seen && (now = shm_now_ns(CLOCK_MONOTONIC)) < end) {
        for (int i = 0; i < 16 && number == seen; i++, relax())
            number = atomic_load_explicit((const _Atomic uint64_t *)(const void *)(r->map + offsetof(tue_shm_ring, published)), memory_order_acquire);
    }
    if (shm_end()) r->gone = 1;
    return number == seen && !r->gone ? left : 0;
}

int32_t tue_shm_wait(tue_shm_reader *reader, double ms) {
    static const int64_t LOOK_NS = 500000, ABSENT_NS = 2000000, TORN_NS = 100000;
    if (!reader) return 0;
    int64_t left = !(ms > 0) ? 0 : ms < 1e6 ? (int64_t)(ms * 1e6) : 1000000000000;
    int64_t end = (int64_t)shm_now_ns(CLOCK_MONOTONIC) + left;
    for (;; left = end - (int64_t)shm_now_ns(CLOCK_MONOTONIC)) {
        uint64_t number;
        if (reader->gone) return 0; /* the next look unmaps it */
        if (reader->file < 0 || !look_at(reader, &number, sizeof number, offsetof(tue_shm_ring, published))) {
            shm_sleep(least(left, ABSENT_NS));
            return 0; /* the next look attaches, or sees the damage */
        }
        if (number > reader->taken && !(number >> 62)) {
            if (reader->again) shm_sleep(least(left, TORN_NS)); /* a writer that never gets done costs no core */
            return 1;
        }
        if (left <= 0) return 0;
        int64_t sleep = expect(reader, number, left);
        if (sleep > 0) shm_wait_word(reader->map, number, reader->wakes ? sleep : least(sleep, LOOK_NS));
    }
}

/* 1: the slot holds this reading; 0: the writer is at it; -1: damage. */
static int32_t holds(uint64_t lock, uint64_t number) {
    if (lock == 2 * number) return 1;
    return lock & 1 || lock > 2 * number ? 0 : -1;
}

static int zero(const uint8_t *bytes, size_t count) {
    for (size_t i = 0; i < count; i++)
        if (bytes[i]) return 0;
    return 1;
}

static int good_side(double mm) { return mm > 1e-4 && mm < 100; }

static int good_frame(const tue_shm_slot *s, uint64_t number, uint64_t slot_room) {
    static const uint32_t channels[] = {1, 3, 3, 4};
    if (s->header_crc32 != shm_crc32((const uint8_t *)s + 8, offsetof(tue_shm_slot, header_crc32) - 8)) return 0;
    if (s->generation != number || s->seq >> 63 || s->flags > 15 || !zero(s->reserved, sizeof s->reserved)) return 0;
    if (s->t_publish_ns > shm_now_ns(CLOCK_MONOTONIC) + SECOND_NS || s->format > 3) return 0;
    if (s->rows < 8 || s->columns < 8 || s->rows > 16384 || s->columns > 16384) return 0;
    if (s->row_stride < s->columns * channels[s->format] || (uint64_t)s->rows * s->row_stride > slot_room) return 0;
    if (s->flags & TUE_SHM_SPACING && !(good_side(s->spacing_row_mm) && good_side(s->spacing_column_mm))) return 0;
    if (s->flags & TUE_SHM_CROP && (s->crop[2] != s->rows || s->crop[3] != s->columns)) return 0;
    size_t letters = 0;
    while (letters < sizeof s->orientation && s->orientation[letters]) {
        char c = s->orientation[letters++];
        if (!((c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z'))) return 0;
    }
    return zero((const uint8_t *)s->orientation + letters, sizeof s->orientation - letters);
}

static int32_t frame_of(tue_shm_reader *r, uint64_t number, uint64_t at, void *slot, uint8_t *into, uint64_t room) {
    tue_shm_slot *s = slot;
    if (!look_at(r, s, sizeof *s, at)) return TUE_SHM_DAMAGED;
    int32_t here = holds(s->lock, number);
    if (here <= 0) return here ? TUE_SHM_DAMAGED : TUE_SHM_NOTHING;
    if (!good_frame(s, number, r->room)) return TUE_SHM_DAMAGED;
    uint64_t size = (uint64_t)s->rows * s->row_stride;
    uint32_t crc = 0xffffffffu;
    int checked = (s->flags & TUE_SHM_CHECKED) != 0;
    atomic_thread_fence(memory_order_acquire);
    if (!fits(size, room) || !copy_content(r, into, size, at + 128, checked ? &crc : NULL)) return TUE_SHM_DAMAGED;
    return !checked || s->pixels_crc32 == ~crc ? TUE_SHM_NEW : TUE_SHM_DAMAGED;
}

static _Atomic int32_t *gone_of(tue_shm_reader *r) { return (_Atomic int32_t *)&r->gone; }

static int32_t frame_in_place(tue_shm_reader *r, uint64_t number, uint64_t at, void *slot, uint8_t *into, uint64_t room) {
    tue_shm_slot *s = slot;
    (void)into, (void)room;
    if (!look_at(r, s, sizeof *s, at)) return TUE_SHM_DAMAGED;
    int32_t here = holds(s->lock, number);
    if (here <= 0) return here ? TUE_SHM_DAMAGED : TUE_SHM_NOTHING;
    if (!good_frame(s, number, r->room)) return TUE_SHM_DAMAGED;
    r->lent = at;
    if (!(s->flags & TUE_SHM_CHECKED)) return TUE_SHM_NEW;
    atomic_thread_fence(memory_order_acquire);
    tue_shm_look(r, 1);
    uint32_t crc = shm_crc32(r->map + at + 128, (size_t)s->rows * s->row_stride);
    tue_shm_look(r, 0);
    return !r->gone && crc == s->pixels_crc32 ? TUE_SHM_NEW : TUE_SHM_DAMAGED;
}

int32_t tue_shm_borrow(tue_shm_reader *reader, tue_shm_slot *slot, const uint8_t **pixels) {
    if (!reader || !slot || !pixels) return TUE_SHM_DAMAGED;
    if (reader->gone) let_go(reader); /* a ring that is opened in its place may have no mapping */
    if (!tue_shm_room(reader)) return TUE_SHM_NOTHING;
    if (!reader->map || reader->map_bytes < 128 + reader->slots * reader->slot_stride) return TUE_SHM_UNMAPPED;
    int32_t found = newest(reader, TUE_SHM_MAGIC, TUE_SHM_VERSION, 128, frame_in_place, slot, NULL, 0);
    if (found == TUE_SHM_NEW) *pixels = reader->map + reader->lent + 128;
    return found;
}

void tue_shm_look(tue_shm_reader *reader, int32_t begins) {
    if (begins) shm_begin(reader->map, (size_t)reader->map_bytes);
    else if (shm_end()) atomic_store(gone_of(reader), 1);
}

int32_t tue_shm_holds(tue_shm_reader *reader) {
    uint64_t lock;
    atomic_thread_fence(memory_order_acquire); /* what was read of the pixels is older than the lock read now */
    if (!reader || !reader->lent || atomic_load(gone_of(reader))) return 0;
    return look_at(reader, &lock, sizeof lock, reader->lent) && lock == 2 * reader->taken;
}

uint64_t tue_shm_room(tue_shm_reader *reader) {
    if (!reader || (reader->file < 0 && !open_ring(reader, TUE_SHM_MAGIC, TUE_SHM_VERSION, 128))) return 0;
    return reader->room;
}

int32_t tue_shm_newest(tue_shm_reader *reader, tue_shm_slot *slot, uint8_t *pixels, uint64_t room) {
    if (!reader || !slot || !pixels) return TUE_SHM_DAMAGED;
    return newest(reader, TUE_SHM_MAGIC, TUE_SHM_VERSION, 128, frame_of, slot, pixels, room);
}

static int good_result(const tue_res_slot *s, uint64_t number, uint64_t slot_room) {
    if (s->header_crc32 != shm_crc32((const uint8_t *)s + 8, offsetof(tue_res_slot, header_crc32) - 8)) return 0;
    if (s->generation != number || s->flags > 511 || s->reasons > 127 || s->second_pass > 3 || s->drift > 2) return 0;
    if (s->strange > 1 || s->cut_by_sector > 1) return 0;
    if (s->mask_rows > 4096 || s->mask_columns > 4096 || (uint64_t)s->mask_rows * s->mask_columns > slot_room) return 0;
    if (s->score_count < 0 || s->score_count > 8 || s->state > 4 || s->trust > 3) return 0;
    for (int i = 0; i < 4; i++)
        if (s->crop[i] < 0 || s->box[i] < 0) return 0;
    if (!s->mask_rows) return 1;
    return s->box[0] + (int64_t)s->box[2] <= s->mask_rows && s->box[1] + (int64_t)s->box[3] <= s->mask_columns &&
           s->crop[0] + (int64_t)s->crop[2] <= s->frame_rows && s->crop[1] + (int64_t)s->crop[3] <= s->frame_columns;
}

static int32_t result_of(tue_shm_reader *r, uint64_t number, uint64_t at, void *slot, uint8_t *into, uint64_t room) {
    tue_res_slot *s = slot;
    if (!look_at(r, s, sizeof *s, at)) return TUE_SHM_DAMAGED;
    int32_t here = holds(s->lock, number);
    if (here <= 0) return here ? TUE_SHM_DAMAGED : TUE_SHM_NOTHING;
    if (!good_result(s, number, r->room)) return TUE_SHM_DAMAGED;
    uint64_t size = (uint64_t)s->mask_rows * s->mask_columns;
    if (!into || !size) return TUE_SHM_NEW;
    uint32_t crc = 0xffffffffu;
    atomic_thread_fence(memory_order_acquire);
    if (!fits(size, room) || !copy_content(r, into, size, at + 256, &crc)) return TUE_SHM_DAMAGED;
    return s->mask_crc32 == ~crc ? TUE_SHM_NEW : TUE_SHM_DAMAGED;
}

int32_t tue_res_newest(tue_shm_reader *reader, tue_res_slot *slot, uint8_t *mask, uint64_t mask_room) {
    if (!reader || !slot) return TUE_SHM_DAMAGED;
    return newest(reader, TUE_RES_MAGIC, TUE_RES_VERSION, 256, result_of, slot, mask, mask_room);
}
