/* tinyusfm.h: ultrasound models inside a scanner's own program.
 *
 *     #include <stdio.h>
 *     #include <tinyusfm.h>
 *
 *     int main(void) {
 *         static unsigned char pixels[600 * 800]; // the scanner's image: grey, row by row
 *         tusfm_session *session = NULL;
 *         tusfm_frame frame;
 *         tusfm_reading reading;
 *         tusfm_status *failed = tusfm_open("fetal-head.bundle", NULL, &session);
 *         tusfm_frame_init(&frame, sizeof frame);
 *         tusfm_reading_init(&reading, sizeof reading);
 *         frame.pixels = pixels, frame.rows = 600, frame.columns = 800, frame.row_stride = 800;
 *         frame.spacing_row_mm = frame.spacing_column_mm = 0.2;
 *         if (!failed) failed = tusfm_predict(session, &frame, &reading);
 *         if (failed) puts(tusfm_status_text(failed));
 *         else printf("found %d, HC %.1f mm\n", reading.found, reading.hc_mm);
 *         tusfm_status_free(failed);
 *         tusfm_close(session);
 *         return failed != NULL;
 *     }
 *
 *     cc program.c $(pkg-config --cflags --libs tinyusfm)
 *
 * The rules, which hold for every function:
 *   - A call that can fail returns NULL, or a status: read it, then free it with tusfm_status_free. The text belongs to
 *     the status. Out-parameters are untouched then, and nothing else has to be cleaned up.
 *   - Nothing throws, aborts, exits or prints. No global state: sessions know nothing of one another.
 *   - Handles are opaque; the function that frees one takes NULL as well.
 *   - A struct carries its size first; its _init function fills in every default. Structs grow at their end only.
 *   - Frames stay the caller's: pointer, rows, columns, stride, format and region, read in place.
 *   - Strings are UTF-8, ended by 0. Times are nanoseconds of the system's monotonic clock (tusfm_now_ns).
 *
 * A bundle is opened only if every byte is what its manifest says, and the artefact answers the bundle's golden frames
 * on this machine as it did when it was exported: the same checks, in the same order, as the Python runtime makes.
 * Research software; not a medical device.
 */
#ifndef TINYUSFM_H
#define TINYUSFM_H

#include <stddef.h>
#include <stdint.h>

#if defined(TUSFM_STATIC)
#define TUSFM_API
#elif defined(_WIN32)
#if defined(TUSFM_BUILDING)
#define TUSFM_API __declspec(dllexport)
#else
#define TUSFM_API __declspec(dllimport)
#endif
#elif defined(__GNUC__)
#define TUSFM_API __attribute__((visibility("default")))
#else
#define TUSFM_API
#endif

#if defined(__cplusplus) && __cplusplus >= 201703L
#define TUSFM_MUST_USE [[nodiscard]]
#elif defined(__GNUC__)
#define TUSFM_MUST_USE __attribute__((warn_unused_result))
#else
#define TUSFM_MUST_USE
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Of this header. tusfm_open refuses options that were filled in by another interface number. */
#define TUSFM_ABI 1
#define TUSFM_VERSION "0.1.0"

/* The interface number and the version of the library itself. */
TUSFM_API uint32_t tusfm_abi(void);
TUSFM_API const char *tusfm_version(void);

/* Now, on the clock that every time here is of. */
TUSFM_API int64_t tusfm_now_ns(void);

/* ---- status ---- */

typedef struct tusfm_status tusfm_status;

enum tusfm_code {
    TUSFM_OK = 0,
    TUSFM_INPUT = 1,       /* what was handed in is wrong: a path, a value, an option */
    TUSFM_FRAME = 2,       /* one frame cannot be used; the stream may go on */
    TUSFM_SOURCE = 3,      /* a source of frames cannot be opened, or broke off */
    TUSFM_MISSING = 4,     /* a library is not installed */
    TUSFM_UNSUPPORTED = 5, /* this machine or this library cannot do what was asked */
    TUSFM_BUNDLE = 6,      /* a bundle cannot be read */
    TUSFM_TAMPERED = 7,    /* its bytes are not the ones its manifest names: do not use it */
    TUSFM_UNVERIFIED = 8,  /* the artefact never passed its gate; options.allow_unverified takes it all the same */
    TUSFM_ENGINE = 9,      /* an engine failed, was cancelled, or is not the one that was asked for */
    TUSFM_OUTPUT = 10,     /* a result cannot be written */
    TUSFM_NO_MEMORY = 11,
    TUSFM_UNTRUSTED = 12   /* its signature, signer, device class or security version is not what options.trust demands */
};

/* Of NULL: TUSFM_OK and "". The text is one line that says what was wrong and how to mend it. Any thread. */
TUSFM_API int32_t tusfm_status_code(const tusfm_status *status);
TUSFM_API const char *tusfm_status_text(const tusfm_status *status);
TUSFM_API void tusfm_status_free(tusfm_status *status);

/* ---- frames ---- */

enum tusfm_format { TUSFM_GREY = 0, TUSFM_RGB = 1, TUSFM_BGR = 2, TUSFM_RGBA = 3 };

#define TUSFM_NO_TIME INT64_MIN

typedef struct tusfm_frame {
    uint32_t struct_size;
    int32_t format;        /* enum tusfm_format, 8 bits a channel; the fourth channel is not read */
    const uint8_t *pixels; /* row 0, column 0 of the image */
    int64_t row_stride;    /* bytes from row to row, of either sign; 0: rows lie next to one another */
    int32_t rows;          /* of the image, 8 .. 16384 */
    int32_t columns;
    int32_t roi_row; /* the frame is this part of the image; roi_rows 0: all of it */
    int32_t roi_column;
    int32_t roi_rows;
    int32_t roi_columns;
    int32_t limited_range;    /* not 0: 16 is black and 235 is white */
    int32_t phantom;          /* not 0: drawn, not a patient; it is not compared with the calibration frames */
    double spacing_row_mm;    /* distance of neighbouring pixel centres; both 0: unknown */
    double spacing_column_mm;
    int64_t seq;              /* the source's running number, 0 .. 2^63 - 1 */
    int64_t t_source_ns;      /* the source's own clock, or TUSFM_NO_TIME */
    int64_t t_recv_ns;        /* tusfm_now_ns at reception, or TUSFM_NO_TIME */
} tusfm_frame;

TUSFM_API void tusfm_frame_init(tusfm_frame *frame, size_t size);

/* ---- readings ---- */

/* How far a reading may be trusted. */
enum tusfm_trust {
    TUSFM_UNCHECKED = 0, /* the bundle has no thresholds to tell by, or the answer is not valid */
    TUSFM_GOOD = 1,      /* above the thresholds, and nothing speaks against it */
    TUSFM_DOUBTFUL = 2,  /* something speaks against it: `reasons` */
    TUSFM_NONE = 3       /* nothing was found */
};

/* What speaks against a reading, as bits of `reasons`. */
enum tusfm_reason {
    TUSFM_LOW_CONFIDENCE = 1, /* mean probability inside the mask, or the top probability, below its threshold */
    TUSFM_LOW_AGREEMENT = 2,  /* mask and ellipse agree less than the threshold */
    TUSFM_AT_BORDER = 4,      /* the mask reaches the edge of the image */
    TUSFM_AT_SECTOR = 8,      /* the edge of the field of view cuts the mask */
    TUSFM_ODD_SIZE = 16,      /* the anatomy is never so small or so large */
    TUSFM_ODD_SPACING = 32,   /* no frame of this anatomy has pixels so small or so large */
    TUSFM_STRANGE = 64        /* the frame does not look like those the model was calibrated on */
};

/* What became of the second pass, a closer look around the first mask. Whether there is one depends on the model and on
 * the first mask, never on time or load. */
enum tusfm_second_pass {
    TUSFM_PASS_NEVER = 0,      /* the model has none */
    TUSFM_PASS_NOT_NEEDED = 1, /* the first mask is missing, large enough, or as large as the image */
    TUSFM_PASS_DONE = 2,       /* the reading is that of both passes */
    TUSFM_PASS_OFF = 3         /* options.no_second_pass */
};

/* Whether a frame was compared with the calibration frames. */
enum tusfm_drift {
    TUSFM_DRIFT_NOT_CHECKED = 0, /* the bundle has no statistic, or options.no_drift */
    TUSFM_DRIFT_CHECKED = 1,
    TUSFM_DRIFT_NOT_APPLIED = 2 /* the frame is a phantom, which is strange to any statistic of patients */
};

typedef struct tusfm_labels tusfm_labels; /* what was measured of every label; see tusfm_get_measurement */

/* What is said about one frame. Numbers that are not known are NaN. Pointers belong to the session: after tusfm_predict
 * they are good until its next tusfm_predict, after tusfm_newest or tusfm_overlay until the next of that same function. */
typedef struct tusfm_reading {
    uint32_t struct_size;
    int32_t valid;    /* 0: an output was not finite; there is no mask, score or measurement then */
    int32_t verified; /* 0: the artefact never passed its gate */
    int32_t degraded; /* another artefact than the chosen one answered, or the engine missed its deadline */
    int64_t seq;      /* the frame's */
    int64_t t_recv_ns;
    double age_ms; /* from reception to this reading */
    double preprocess_ms, infer_ms, postprocess_ms, total_ms;

    const uint8_t *mask; /* labels at the input's size, rows next to one another; NULL: none */
    int32_t mask_rows, mask_columns;
    const float *scores; /* probabilities of a classifier, raw values of a feature model; NULL: none */
    int32_t score_count;
    int32_t exit_index;     /* of a model with early exits, which one answered, from 0; else -1 */
    int32_t crop[4];        /* row, column, rows, columns of the frame that the model saw */
    int32_t box[4];         /* where that lies in the input: row, column, rows, columns */
    int32_t frame_rows, frame_columns;
    double spacing_row_mm, spacing_column_mm; /* of the input's pixels */

    int32_t measured;       /* whether the answer is a mask of which labels are measured; the first one's: */
    int32_t found;          /* a label's component, or scores */
    double hc_mm, hc_px;    /* circumference of the ellipse */
    double major_mm, minor_mm, major_px, minor_px; /* its full axes */
    double centre_row, centre_column;              /* its centre */
    double angle_deg;       /* major axis from the columns towards growing rows, (-90, 90] */
    double area_px;         /* pixels and lengths are the frame's, pixel centres at whole numbers */
    int32_t touches_border; /* the edge of the image, or of the field of view: part of it may lie outside */
    int32_t trust;          /* enum tusfm_trust, of the whole answer */
    double confidence;      /* mean probability inside the mask, or a classifier's top probability, 0 .. 1 */

    /* of the stream, after tusfm_newest and tusfm_overlay; else as for a lone frame */
    int64_t index;              /* running number of results, from 0 */
    int64_t dropped_since_last; /* frames that were not answered between the last result and this one */
    int32_t stale;              /* older than the budget */
    int32_t withheld;           /* stale and not to be shown */
    int32_t level;               /* place of the artefact among the bundle's, 0 is the chosen one */
    int32_t state;              /* enum tusfm_state when it was made */
    int32_t answered;           /* 0: no answer, `error` says why */
    int32_t reserved;
    const char *error;          /* one line, or NULL */
    const char *engine;         /* artefact and engine that really answered; of a lone prediction good until a swap */

    int32_t reasons;       /* bits of enum tusfm_reason */
    int32_t cut_by_sector; /* of the first label */
    int32_t second_pass;   /* enum tusfm_second_pass */
    int32_t drift;         /* enum tusfm_drift; where it was checked: */
    int32_t strange;       /* the score lies above the threshold */
    int32_t drift_kind;    /* 1: by features of the model; 0: by grey levels alone */
    double drift_score, drift_threshold; /* nats; infinite where an output was not finite */
    const char *strangest; /* the feature that lies farthest from the calibration frames; good as `engine` */
    double area_mm2, agreement;          /* of the first label; agreement: Dice of mask and ellipse */
    double bounds_px[4];                 /* the box around it: row, column, rows, columns */
    double centroid_row, centroid_column;
    double second_pass_ms, drift_ms; /* parts of total_ms, of no other time */
    const tusfm_labels *labels;      /* of this mask */
    int32_t label_count;             /* measured labels */
    int32_t reserved_end;

    /* of a window of frames, where drift was checked; of a lone frame that frame alone, which never alarms */
    double drift_share;               /* of strange frames among them, 0 .. 1 */
    int32_t drift_frames;             /* in the window so far */
    int32_t drift_window;             /* that a full window has */
    int32_t drift_alarm;              /* the window is full, and at least half of it strange: do not trust the stream */
    int32_t reserved_drift;
} tusfm_reading;

TUSFM_API void tusfm_reading_init(tusfm_reading *reading, size_t size);

#define TUSFM_CONTOUR_POINTS 64

/* One label of a mask, in pixels of the frame and mm. Numbers that are not known are NaN. */
typedef struct tusfm_measurement {
    uint32_t struct_size;
    int32_t found;     /* 0: its component is missing, or smaller than the model's least area */
    const char *label; /* good until the session is swapped or closed */
    int32_t trust;     /* enum tusfm_trust */
    int32_t reasons;   /* bits of enum tusfm_reason */
    int32_t has_ellipse, touches_border, cut_by_sector, contour_points;
    double confidence, area_px, area_mm2, bounds_px[4], centroid_row, centroid_column;
    double hc_mm, hc_px, major_mm, minor_mm, major_px, minor_px, centre_row, centre_column, angle_deg, agreement;
    double contour_px[2 * TUSFM_CONTOUR_POINTS]; /* row, column, ..: border pixels of the input, clockwise */
} tusfm_measurement;

TUSFM_API void tusfm_measurement_init(tusfm_measurement *measurement, size_t size);

/* One measured label of a reading whose pointers are still good, 0 .. label_count - 1. TUSFM_INPUT: there is none. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_get_measurement(const tusfm_reading *reading, int32_t index,
                                                             tusfm_measurement *measurement);

/* Whether frames together still look like the calibration frames. A stream (tusfm_submit) has a window of its own; of
 * frames that tusfm_predict answers, such as those of a clip, make one and hand it every reading in order. */
typedef struct tusfm_drift_monitor tusfm_drift_monitor;

/* `window`: frames that decide together, 1 .. 100000; 0: 25, as in a stream. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_drift_monitor_new(int32_t window, tusfm_drift_monitor **monitor);
/* Takes one more reading into account and fills in its drift_share, drift_frames, drift_window and drift_alarm. One that
 * was not compared is left as it is and does not count. One thread. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_drift_observe(tusfm_drift_monitor *monitor, tusfm_reading *reading);
TUSFM_API void tusfm_drift_monitor_free(tusfm_drift_monitor *monitor);

/* ---- a session ---- */

typedef struct tusfm_session tusfm_session;

enum tusfm_level { TUSFM_INFO = 0, TUSFM_WARNING = 1 };

/* Called with what happens, in the thread in which it happens; be quick, and do not call the session from it. Neither
 * pixels nor names of patients are in a text. */
typedef void (*tusfm_log)(void *user, int32_t level, const char *text);

/* What is demanded of a bundle's signature (model.sig, OpenSSF model signing with ECDSA P-256 or P-384), before an engine
 * sees a byte. The machine's policy file (policy.json in the folder that TINYUSFM_EDGE_POLICY names, else in
 * /etc/tinyusfm-edge) holds beside it, as in the Python runtime. */
typedef struct tusfm_trust_options {
    uint32_t struct_size;
    int32_t require_signed;   /* 1, the default; 0: a signature is checked where there is one, none is demanded */
    const char *store;        /* folder with trust.json and the public keys that it names */
    const char *device_class; /* of this device; NULL: only bundles for any device open */
    const char *role;         /* what the signer must be trusted for; NULL: "release" */
    /* Anti-rollback: the floor of security versions, kept where it is safest, such as in a TPM. `floor_read` gives the
     * lowest version of a model that opens, or a negative number where that cannot be told; `floor_raise` returns 0 when
     * it has kept it, and never lowers it. Both NULL: a file of the user's own. */
    int64_t (*floor_read)(void *user, const char *model);
    int32_t (*floor_raise)(void *user, const char *model, int64_t version);
    void *floor_user;
    const char *floor_file; /* that file; NULL: trust/floor.json in the toolkit's cache folder */
    int32_t today;          /* the day on which keys must be valid, such as 20261231; 0: the clock's */
    int32_t reserved;
} tusfm_trust_options;

TUSFM_API void tusfm_trust_options_init(tusfm_trust_options *options, size_t size);

typedef struct tusfm_options {
    uint32_t struct_size;
    uint32_t abi;              /* TUSFM_ABI, filled in by tusfm_options_init */
    const char *target;        /* take the first artefact of this target, such as "onnx"; NULL: of any */
    const char *precision;     /* take the first artefact of this precision, such as "int8"; NULL: of any */
    const char *engine_folder; /* where the engines' libraries lie; NULL: where the system looks */
    int32_t threads;           /* inside the engine; 0: half of the cores, 1 .. 4 */
    int32_t allow_unverified;  /* also open an artefact that never passed its gate, and mark its readings */
    int32_t allow_precision;   /* layers of an int8 artefact that must really run in 8 bits, where the engine tells; 0: some;
                                * 1: none, and tusfm_info.executed says so; -1: all that did where it was verified */
    int32_t fallback;          /* open the bundle's further artefacts too: the next one answers after a failure, flagged */
    int32_t full_depth;        /* never stop at an early exit */
    int32_t misses_in_a_row;   /* calls past their deadline before the next artefact takes over; 0: never */
    double budget_ms;          /* age above which a submitted frame's reading is stale; 0: none */
    double deadline_ms;        /* of one engine call; 0: the budget and a frame period */
    double give_up_ms;         /* when a call is cancelled; 0: eight deadlines, at least 500 ms */
    double grace_ms;           /* how long a cancelled call may take to stop before it counts as hanging */
    double overlay_limit_ms;   /* age at which the overlay is withdrawn; 0: three budgets, at least 250 ms */
    double recheck_s;          /* time between two golden frames, asked in gaps between submitted ones; 0: never */
    tusfm_log log;             /* or NULL */
    void *log_user;
    int32_t no_second_pass;    /* never look twice, whatever the model says; every reading says so */
    int32_t no_drift;          /* compare no frame with the calibration frames; every reading says so */
    const tusfm_trust_options *trust; /* NULL: no signature is demanded but by the machine's policy file; copied by open */
    int32_t all_golden;        /* compare every golden frame at opening, also on the kind of machine that was verified */
    int32_t reserved;
} tusfm_options;

TUSFM_API void tusfm_options_init(tusfm_options *options, size_t size);

/* Verifies a bundle and readies one of its artefacts: hashes, golden frames, warm-up. `options` NULL: the defaults. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_open(const char *folder, const tusfm_options *options,
                                                  tusfm_session **session);

/* One artefact of a bundle: what tusfm_open may be asked for. */
typedef struct tusfm_artefact {
    uint32_t struct_size;
    int32_t count;    /* artefacts that the bundle has */
    int32_t verified; /* it passed its gate */
    int32_t built_in; /* this library was built with its engine; whether the engine's own library is there, opening tells */
    char name[128];   /* such as onnx-int8 */
    char target[64];  /* such as onnx: options.target */
    char precision[32];
    char engine[32];  /* such as ort */
} tusfm_artefact;

TUSFM_API void tusfm_artefact_init(tusfm_artefact *artefact, size_t size);

/* Verifies a bundle, and says which artefact stands at a place, 0 .. count - 1; nothing is loaded. Of `options` only the
 * demands on a signature hold; NULL: the defaults. TUSFM_INPUT: there is none. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_get_artefact(const char *folder, const tusfm_options *options, int32_t index,
                                                          tusfm_artefact *artefact);

/* As tusfm_open, for files that are already in memory (paths inside the bundle, "manifest.json" among them), or that the
 * caller reads: `size` gives a file's bytes or a negative number, `read` fills them in and returns 0. */
typedef struct tusfm_file {
    const char *path;
    const uint8_t *data;
    uint64_t size;
} tusfm_file;
typedef struct tusfm_reader {
    uint32_t struct_size;
    uint32_t reserved;
    void *user;
    int64_t (*size)(void *user, const char *path);
    int32_t (*read)(void *user, const char *path, uint8_t *into, uint64_t size);
} tusfm_reader;

TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_open_memory(const tusfm_file *files, size_t count,
                                                         const tusfm_options *options, tusfm_session **session);
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_open_reader(const tusfm_reader *reader, const tusfm_options *options,
                                                         tusfm_session **session);

/* What really runs. Strings are good until the session is swapped or closed. */
typedef struct tusfm_info {
    uint32_t struct_size;
    int32_t verified;
    const char *model;         /* name */
    const char *task;          /* segment, classify, features */
    const char *artefact;      /* such as onnx-int8 */
    const char *engine;        /* library, version, device, precision and threads in use, one line */
    const char *precision;     /* the artefact's, such as int8 */
    const char *executed;      /* what the engine says it computes in, one line; "" where it does not tell */
    const char *bundle_sha256; /* of the manifest, which names every file's hash */
    const char *intended_use;
    int32_t threads;
    int32_t input_rows, input_columns;
    int32_t label_count;
    int32_t artefacts;     /* ready to answer: 1, or more with options.fallback */
    int32_t golden_frames; /* compared at opening */
    double verify_ms, load_ms, golden_ms, warm_up_ms;
    int32_t in_place; /* tusfm_answer answers frames in its caller's thread */
    int32_t reserved_end;
} tusfm_info;

TUSFM_API void tusfm_info_init(tusfm_info *info, size_t size);
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_get_info(tusfm_session *session, tusfm_info *info);
/* Name of an output, or NULL; good until the session is swapped or closed. */
TUSFM_API const char *tusfm_label(const tusfm_session *session, int32_t index);

/* Answers one frame in the calling thread. Any thread; calls queue up. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_predict(tusfm_session *session, const tusfm_frame *frame,
                                                     tusfm_reading *reading);

/* The mask at the frame's own size, 0 outside the region the model saw: `out` takes frame_rows rows of `stride` bytes. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_mask_on_frame(const tusfm_reading *reading, uint8_t *out, int64_t stride);

/* Asks a prediction in progress to stop; it then fails with TUSFM_ENGINE. Any thread, at any time before close. */
TUSFM_API void tusfm_cancel(tusfm_session *session);

/* ---- a stream: the newest frame wins ---- */

enum tusfm_state { TUSFM_LIVE = 0, TUSFM_STALE = 1, TUSFM_FROZEN = 2, TUSFM_LOST = 3, TUSFM_DEGRADED = 4 };

/* Copies a frame into a slot of one and returns; the session's own threads answer it. A frame that a newer one
 * overtakes there is dropped and counted. One thread. Not together with tusfm_predict. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_submit(tusfm_session *session, const tusfm_frame *frame);

/* Memory of the session's own for the pixels of the next frame, at least so many bytes: a frame submitted whose pixels
 * begin there is taken over without a copy, and the memory is the session's again. Until then the same memory comes back
 * at each call, its content lost if more bytes are asked for. The thread that submits. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_room(tusfm_session *session, int64_t bytes, uint8_t **pixels);

/* Waits up to wait_ms for a result that was not handed out yet: *there is 1 and the reading is filled in, or 0. One
 * thread. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_newest(tusfm_session *session, double wait_ms, tusfm_reading *reading,
                                                    int32_t *there);

/* Pixels that somebody else may overwrite, such as a slot of a ring that is not copied out of it. */
typedef struct tusfm_lease {
    uint32_t struct_size;
    uint32_t reserved;
    void *user;
    /* Called with 1 before and with 0 after a thread looks at the pixels, in that thread; NULL: nothing has to be done. */
    void (*look)(void *user, int32_t begins);
    /* Whether the pixels are still those of this frame, asked once they were looked at; NULL: they always are. */
    int32_t (*holds)(void *user);
} tusfm_lease;

TUSFM_API void tusfm_lease_init(tusfm_lease *lease, size_t size);

/* Takes a reading, in the thread that asked for it; its pointers are good until the next call. Do not call the session. */
typedef void (*tusfm_give)(void *user, const tusfm_reading *reading);

/* tusfm_submit and tusfm_newest in one, in the calling thread: the shortest way from a frame to its reading, by the same
 * rules. The frame is answered from where it lies, `give` is called with its reading, and then it is copied, for the
 * freeze rule. The pixels must stay readable until tusfm_answer returns; under a lease they may change, and a frame that
 * did is dropped and counted as overtaken. `give` is not called for it, nor for a duplicate. `lease` NULL: they do not
 * change. For the library's own engine without options.fallback (tusfm_info.in_place), else TUSFM_UNSUPPORTED: a foreign
 * engine that hangs would hold the caller. One thread. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_answer(tusfm_session *session, const tusfm_frame *frame, const tusfm_lease *lease,
                                                    tusfm_give give, void *user);

/* The last reading that may be shown now: *there is 0 if there is none yet, all are withheld, or it is too old. One
 * thread. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_overlay(tusfm_session *session, tusfm_reading *reading, int32_t *there);

/* Says that the source lives though it has no frame. Any thread. */
TUSFM_API void tusfm_contact(tusfm_session *session);

/* received = processed + overtaken + out_of_order + duplicate + closing + rejected + waiting */
typedef struct tusfm_counters {
    uint32_t struct_size;
    int32_t state; /* enum tusfm_state now */
    int64_t received, processed, overtaken, out_of_order, duplicate, closing, rejected, waiting;
    int64_t unseen;   /* results that a newer one replaced before tusfm_newest took them */
    int64_t restarts; /* how often the source began to count again */
} tusfm_counters;

TUSFM_API void tusfm_counters_init(tusfm_counters *counters, size_t size);
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_get_counters(tusfm_session *session, tusfm_counters *counters);

/* ---- another bundle, between two frames ---- */

enum tusfm_outcome { TUSFM_SWITCHED = 0, TUSFM_REFUSED = 1, TUSFM_ROLLED_BACK = 2 };

typedef struct tusfm_swap_options {
    uint32_t struct_size;
    int32_t shadow_frames;    /* submitted frames that both bundles answer before the switch; 0: none */
    int32_t probation_frames; /* answers after the switch of which none may fail */
    int32_t reserved;
    double min_dice;   /* mean Dice of both over the shadow frames, below which there is no switch */
    double patience_s; /* how long to wait for so many frames */
} tusfm_swap_options;

typedef struct tusfm_swap_report {
    uint32_t struct_size;
    int32_t outcome; /* enum tusfm_outcome */
    double load_ms, switch_ms, dice_mean, dice_worst, hc_max_mm;
    int64_t shadow_frames;
    char bundle_sha256[65];
    char reason[255]; /* one line */
} tusfm_swap_report;

TUSFM_API void tusfm_swap_options_init(tusfm_swap_options *options, size_t size);
TUSFM_API void tusfm_swap_report_init(tusfm_swap_report *report, size_t size);

/* Opens another bundle beside the running one, compares, switches, watches the first answers, and takes the old one
 * back if one fails. While nothing is submitted there is neither shadow nor probation. A bundle that cannot be opened
 * is an outcome, not a failure. Any thread but the session's own. */
TUSFM_MUST_USE TUSFM_API tusfm_status *tusfm_swap(tusfm_session *session, const char *folder,
                                                  const tusfm_swap_options *options, tusfm_swap_report *report);

/* Frees the session after a call in progress has ended; one that goes on for 5 s is cancelled. NULL is allowed. */
TUSFM_API void tusfm_close(tusfm_session *session);

#ifdef __cplusplus
}
#endif
#endif
