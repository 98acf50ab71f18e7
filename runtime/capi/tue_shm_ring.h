/* A ring of frames in POSIX shared memory: the layout, and a writer in portable C11.
 *
 * One writer, any number of readers, nobody waits. The object is named /NAME and holds a ring header of 128 bytes and
 * `slots` slots, each a slot header of 128 bytes followed by pixels. All numbers are little-endian.
 *
 *     offset 0      tue_shm_ring
 *     offset 128    slot 0: tue_shm_slot, pixels
 *     offset 128 + slot_stride   slot 1, and so on
 *
 * Frame n (counted from 1) goes into slot (n - 1) % slots. Writing it:
 *   1. lock = 2 n - 1 (odd: being written), release fence
 *   2. slot header and pixels
 *   3. lock = 2 n, then ring.published = n and ring.heartbeat_ns = now, each a release store
 *   4. where ring.wakes is 1, a shared FUTEX_WAKE of everybody at the low half of ring.published
 * Reading the newest: n = published; the slot's lock must be 2 n before and after copying, and its generation must be
 * n; otherwise read again.
 *
 * Both headers carry the CRC-32 of zlib and PNG over what precedes it, so a stray write is seen. lock, published and
 * heartbeat_ns change while others read and lie outside it; a lock or a count that is wrong contradicts the
 * generation, which lies inside. The heartbeat tells a probe that stands still from a writer that died.
 *
 * A new writer never touches the memory of an old one: it fills a new object under another name, magic last, and
 * renames it to NAME. A reader that hears no heartbeat looks whether the name means another object by now.
 */
#ifndef TUE_SHM_RING_H
#define TUE_SHM_RING_H

#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__) && !defined(TUE_SHM_API)
#define TUE_SHM_API __attribute__((visibility("default")))
#elif !defined(TUE_SHM_API)
#define TUE_SHM_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define TUE_SHM_MAGIC UINT64_C(0x3130474e49524554) /* "TERING01" read as bytes */
#define TUE_SHM_VERSION 1u
#define TUE_SHM_SLOTS 4u
#define TUE_SHM_NO_TIME INT64_MIN

enum tue_shm_flags {
    TUE_SHM_SPACING = 1u, /* spacing_row_mm and spacing_column_mm are known */
    TUE_SHM_CROP = 2u,    /* crop says where these pixels lay in the whole picture */
    TUE_SHM_LIMITED = 4u, /* 16 is black and 235 is white; else 0 and 255 */
    TUE_SHM_CHECKED = 8u  /* pixels_crc32 is there */
};

typedef struct tue_shm_ring {
    uint64_t magic;        /*   0: TUE_SHM_MAGIC, written last */
    uint32_t version;      /*   8: TUE_SHM_VERSION */
    uint32_t slots;        /*  12: 2 .. 64 */
    uint64_t slot_stride;  /*  16: bytes from slot to slot, a multiple of 64 */
    uint64_t pixel_bytes;  /*  24: room for pixels in each slot, at most slot_stride - 128 */
    uint64_t created_ns;   /*  32: CLOCK_REALTIME when the ring was made */
    uint32_t writer_pid;   /*  40 */
    uint32_t header_crc32; /*  44: of bytes 0 .. 43, magic included */
    uint8_t reserved[16];  /*  48: zero */
    uint64_t published;    /*  64: number of the newest whole frame, 0 before the first */
    uint64_t heartbeat_ns; /*  72: CLOCK_MONOTONIC of the writer's last sign of life */
    uint32_t wakes;        /*  80: 1: each frame wakes whoever waits; 0: they have to look. Outside the CRC: it harms nobody */
    uint8_t padding[44];   /*  84: zero */
} tue_shm_ring;

typedef struct tue_shm_slot {
    uint64_t lock;            /*   0: odd while written, 2 generation after */
    uint64_t generation;      /*   8: number of this frame, from 1 */
    uint64_t seq;             /*  16: the source's own running number, below 2^63 */
    int64_t t_source_ns;      /*  24: the source's own clock, or TUE_SHM_NO_TIME */
    uint64_t t_publish_ns;    /*  32: CLOCK_MONOTONIC when its pixels were written */
    uint32_t rows;            /*  40: 8 .. 16384 */
    uint32_t columns;         /*  44: 8 .. 16384 */
    uint32_t format;          /*  48: 0 grey, 1 RGB, 2 BGR, 3 RGBA, 8 bits a channel */
    uint32_t row_stride;      /*  52: bytes from row to row, at least columns times channels */
    uint32_t flags;           /*  56: tue_shm_flags */
    uint32_t pixels_crc32;    /*  60: of rows times row_stride bytes, if TUE_SHM_CHECKED */
    double spacing_row_mm;    /*  64: distance of neighbouring pixel centres */
    double spacing_column_mm; /*  72 */
    uint32_t crop[4];         /*  80: row, column, rows, columns in the whole picture */
    char orientation[8];      /*  96: PLUS letters such as MF, rest zero */
    uint8_t reserved[20];     /* 104: zero */
    uint32_t header_crc32;    /* 124: of bytes 8 .. 123 */
} tue_shm_slot;

/* What a frame is, for tue_shm_write. Fill unknown fields with zero, t_source_ns with TUE_SHM_NO_TIME. */
typedef struct tue_shm_frame {
    const uint8_t *pixels;
    uint32_t rows, columns, format, row_stride, flags; /* as in tue_shm_slot; TUE_SHM_CHECKED asks for the pixels' CRC */
    uint64_t seq;
    int64_t t_source_ns;
    double spacing_row_mm, spacing_column_mm;
    uint32_t crop[4];
    char orientation[8];
} tue_shm_frame;

/* A writer; its fields are its own business. */
typedef struct tue_shm_writer {
    tue_shm_ring *ring;
    size_t bytes;
    uint64_t published;
    char name[232];
} tue_shm_writer;

enum tue_shm_status {
    TUE_SHM_OK = 0,
    TUE_SHM_BAD_ARGUMENT = 1, /* a null pointer, a name or a size out of range, a frame that does not fit its slot */
    TUE_SHM_SYSTEM = 2        /* the operating system refused; errno says why */
};

/* Makes a ring of TUE_SHM_SLOTS slots under `name` (letters, digits, . _ -, no leading slash or dot, 200 at most), each
 * with room for pixel_bytes. Replaces a ring of that name; its readers come over by themselves. */
TUE_SHM_API int32_t tue_shm_open(tue_shm_writer *writer, const char *name, uint64_t pixel_bytes);

/* Publishes a frame. One thread at a time. */
TUE_SHM_API int32_t tue_shm_write(tue_shm_writer *writer, const tue_shm_frame *frame);

/* Says that the writer lives though it has no frame; ten times a second is plenty. */
TUE_SHM_API int32_t tue_shm_beat(tue_shm_writer *writer);

/* Unmaps the memory; unlink != 0 also removes the name, if it still means this ring. Zeroes the writer. */
TUE_SHM_API void tue_shm_close(tue_shm_writer *writer, int32_t unlink);

/* A reader of either kind of ring; its fields are its own business, but for the counts. */
typedef struct tue_shm_reader {
    int32_t file, attached; /* attached: how often a ring was found */
    uint32_t slots;
    uint64_t slot_stride, room, taken, device, inode;
    uint64_t heartbeat_ns, frame_ns, looked_ns;
    uint64_t overtaken, torn, damaged; /* readings or frames it was too late for; reads to be tried again; refused */
    const uint8_t *map;                /* the ring's header, or with tue_shm_guard all of it; NULL: not mapped */
    uint64_t map_bytes;
    int32_t wakes, again; /* the writer wakes; the last read was torn */
    uint64_t lent;        /* place of the slot that tue_shm_borrow gave */
    uint64_t every_ns;    /* from frame to frame; 0: not known yet */
    uint64_t spin_ns;     /* as tue_shm_expect says */
    int32_t gone;         /* the memory of a borrowed frame was taken away */
    int32_t reserved;
    char name[232];
} tue_shm_reader;

enum tue_shm_found {
    TUE_SHM_NOTHING = 0, /* nothing new, or the writer was at it, or there is no ring: look again */
    TUE_SHM_NEW = 1,
    TUE_SHM_DAMAGED = 2, /* a header or a content does not match its CRC, or a size is out of range; it was refused */
    TUE_SHM_UNMAPPED = 3 /* of tue_shm_borrow: this ring is not mapped, take its frames with tue_shm_newest */
};

/* Names the ring to be read; it need not be there yet. Content is read, not mapped, unless tue_shm_guard was called: a
 * writer that shrinks the object under a mapping kills its readers, while a read merely comes back short. */
TUE_SHM_API int32_t tue_shm_attach(tue_shm_reader *reader, const char *name);

/* Waits until there is something that tue_shm_newest or tue_res_newest did not take yet, `ms` at most: 1, or 0. A writer
 * that wakes is heard at once (Linux); for others it looks every 0.5 ms, and for a ring that is away every 2 ms. It may
 * come back early. The calling thread sleeps, but for tue_shm_expect. */
TUE_SHM_API int32_t tue_shm_wait(tue_shm_reader *reader, double ms);

/* From now on tue_shm_wait looks without sleeping for so many ms, 10 at most, before and after the time at which the next
 * frame is expected: it is seen in a few microseconds where waking a thread takes 50 and more. Costs up to twice that time
 * of a core for each frame, nothing while none is expected. 0: never, the default. After tue_shm_guard alone. */
TUE_SHM_API void tue_shm_expect(tue_shm_reader *reader, double ms);

/* For a program that owns its signals, once, before its readers attach: from now on they copy from a mapping, in half
 * the time, and a handler of SIGBUS puts zeros where a writer took the memory away, so that the frame is refused. A
 * SIGBUS from elsewhere goes to the handler that was there. TUE_SHM_SYSTEM: it cannot be installed. */
TUE_SHM_API int32_t tue_shm_guard(void);

/* Bytes that the ring has room for in each slot, 0 while there is none: what `pixels` has to hold. */
TUE_SHM_API uint64_t tue_shm_room(tue_shm_reader *reader);

/* Copies the newest frame that was not taken yet. Trusts no field, attaches by itself, again after a writer that came
 * back, and skips the last frame of a writer that died. */
TUE_SHM_API int32_t tue_shm_newest(tue_shm_reader *reader, tue_shm_slot *slot, uint8_t *pixels, uint64_t room);

/* As tue_shm_newest, without a copy: the pixels stay in the ring, from where the writer takes them back when it has
 * written as many frames as there are slots. After tue_shm_guard alone. Whoever reads them calls tue_shm_look with 1
 * before and 0 after, in each thread that does, and then tue_shm_holds: 0 says that what was read is no whole frame.
 * Good until the next call with this reader that is none of these two. */
TUE_SHM_API int32_t tue_shm_borrow(tue_shm_reader *reader, tue_shm_slot *slot, const uint8_t **pixels);
TUE_SHM_API void tue_shm_look(tue_shm_reader *reader, int32_t begins);
TUE_SHM_API int32_t tue_shm_holds(tue_shm_reader *reader);

TUE_SHM_API void tue_shm_detach(tue_shm_reader *reader);

#ifdef __cplusplus
}
#endif
#endif
