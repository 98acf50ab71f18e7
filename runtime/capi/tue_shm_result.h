/* A ring of readings in POSIX shared memory, `shm-out:NAME`: what a model says, for the program that shows it.
 *
 * One writer, any number of readers, nobody waits. The object holds a ring header of 128 bytes and `slots` slots, each a
 * slot header of 256 bytes followed by room for a mask of `mask_bytes`. All numbers are little-endian; numbers that are
 * not known are NaN. Locking, numbering, heartbeat and renewal are those of tue_shm_ring.h: reading n lies in slot
 * (n - 1) % slots, its lock is odd while it is written and 2 n after, and both headers carry the CRC-32 of zlib.
 */
#ifndef TUE_SHM_RESULT_H
#define TUE_SHM_RESULT_H

#include "tue_shm_ring.h"

#ifdef __cplusplus
extern "C" {
#endif

#define TUE_RES_MAGIC UINT64_C(0x3130534552455554) /* "TUERES01" read as bytes */
#define TUE_RES_VERSION 1u
#define TUE_RES_SLOTS 4u

enum tue_res_flags {
    TUE_RES_VALID = 1u,         /* the answer is finite and in time */
    TUE_RES_VERIFIED = 2u,      /* the artefact passed its gate */
    TUE_RES_DEGRADED = 4u,      /* another artefact than the chosen one answered, or a deadline was missed */
    TUE_RES_STALE = 8u,         /* older than the budget */
    TUE_RES_WITHHELD = 16u,     /* stale and not to be shown */
    TUE_RES_MEASURED = 32u,     /* the answer is a mask of which labels are measured */
    TUE_RES_FOUND = 64u,        /* a label's component, or scores */
    TUE_RES_TOUCHES = 128u,     /* it reaches the edge of the image, or of the field of view */
    TUE_RES_ANSWERED = 256u     /* there is an answer at all */
};

typedef struct tue_res_slot {
    uint64_t lock;             /*   0: odd while written, 2 generation after */
    uint64_t generation;       /*   8: number of this reading, from 1 */
    int64_t seq;               /*  16: of the frame */
    int64_t t_recv_ns;         /*  24: CLOCK_MONOTONIC at the frame's reception, or TUE_SHM_NO_TIME */
    int64_t t_publish_ns;      /*  32: CLOCK_MONOTONIC when this was written */
    uint32_t flags;            /*  40: tue_res_flags */
    uint32_t state;            /*  44: enum tusfm_state */
    uint32_t mask_rows;        /*  48: of the input; 0: no mask */
    uint32_t mask_columns;     /*  52 */
    int32_t crop[4];           /*  56: row, column, rows, columns of the frame that the model saw */
    int32_t box[4];            /*  72: where that lies in the mask */
    int32_t frame_rows;        /*  88 */
    int32_t frame_columns;     /*  92 */
    double hc_mm;              /*  96 */
    double major_mm, minor_mm; /* 104 */
    double centre_row;         /* 120: pixels of the frame, as all lengths; centres at whole numbers */
    double centre_column;      /* 128 */
    double major_px, minor_px; /* 136 */
    double angle_deg;          /* 152 */
    double confidence;         /* 160 */
    double infer_ms;           /* 168 */
    int64_t area_px;           /* 176 */
    int64_t dropped;           /* 184: frames left out since the last reading */
    uint32_t trust;            /* 192: enum tusfm_trust */
    int32_t level;             /* 196: place of the artefact among the bundle's */
    int32_t score_count;       /* 200: of a classifier; at most 8 */
    float scores[8];           /* 204 */
    int32_t exit_index;        /* 236 */
    uint32_t reasons;          /* 240: bits of enum tusfm_reason */
    uint8_t second_pass;       /* 244: enum tusfm_second_pass */
    uint8_t drift;             /* 245: enum tusfm_drift */
    uint8_t strange;           /* 246: 1: the frame is strange to the drift statistic */
    uint8_t cut_by_sector;     /* 247: 1: the edge of the field of view cuts the mask */
    uint32_t mask_crc32;       /* 248: of the mask's bytes */
    uint32_t header_crc32;     /* 252: of bytes 8 .. 251 */
} tue_res_slot;

/* As tue_shm_open; tue_shm_beat and tue_shm_close go on as there. `slot` needs no lock, generation, times or CRCs: they are filled in;
 * `mask` has mask_rows x mask_columns bytes. */
TUE_SHM_API int32_t tue_res_open(tue_shm_writer *writer, const char *name, uint64_t mask_bytes);
TUE_SHM_API int32_t tue_res_write(tue_shm_writer *writer, const tue_res_slot *slot, const uint8_t *mask);

/* Copies the newest reading and its mask, if there is one that was not taken yet: enum tue_shm_found. Trusts no field.
 * `mask` has room for mask_room bytes, or is NULL. The reader is that of tue_shm_ring.h, attached by tue_shm_attach. */
TUE_SHM_API int32_t tue_res_newest(tue_shm_reader *reader, tue_res_slot *slot, uint8_t *mask, uint64_t mask_room);

#ifdef __cplusplus
}
#endif
#endif
