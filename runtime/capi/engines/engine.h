/* What the runtime asks of an inference library, and nothing more: verified bytes to a loaded model, a tensor to
 * outputs. An engine knows neither frames nor golden vectors nor post-processing. */
#ifndef TUSFM_ENGINE_H
#define TUSFM_ENGINE_H

#include "../src/platform.h"
#include "../src/spec.h"

#define LOGITS_NAME "logits"
#define INPUT_NAME "image"
#define TOKENS_IN "tokens_in"
#define TOKENS_OUT "tokens_out"

enum { MAX_OUTPUTS = 32, MAX_RANK = 8, MAX_ENGINE_FILES = 32 };

typedef struct engine_file {
    const char *name; /* without its folder */
    const uint8_t *data;
    size_t size;
} engine_file;

/* Float32, C order; good until the engine's next run. */
typedef struct engine_output {
    char name[64];
    const float *data;
    int64_t shape[MAX_RANK];
    int axes;
    size_t count;
} engine_output;

typedef struct engine_request {
    const model_spec *spec;
    engine_file files[MAX_ENGINE_FILES];
    size_t file_count;
    int32_t threads;
    const char *precision, *rest_precision;
    const char *folder;     /* where libraries lie, or NULL */
    int32_t int8_layers;    /* layers that ran in 8 bits where the artefact was verified; 0: not known */
    int allow_precision;    /* 1: go on where none of them does here; -1: not where fewer do; 0: where some do */
    const char *takes_name; /* a later stage of a chain: what it takes, float32; NULL: the image, uint8 */
    int64_t takes_shape[4];
    int takes_axes;
} engine_request;

typedef struct engine engine;

typedef struct engine_kind {
    const char *name;    /* as manifests write it */
    const char *library; /* distribution whose version a manifest's requirements name */
    int chains;          /* runs the later stages of a chain as well */
    int exact;           /* the same bytes on every machine */
    int own;             /* no driver and no foreign library that might hang: it may run in the caller's thread */
    /* Reads the request only while it runs. Fills in description, executed, version, outputs. */
    tusfm_status *(*open)(engine *e, const engine_request *request);
    tusfm_status *(*run)(engine *e, const void *input);
    /* From any thread while a run is in progress. */
    void (*cancel)(engine *e);
    /* Of whatever `open` left, finished or not. */
    void (*close)(engine *e);
} engine_kind;

struct engine {
    const engine_kind *kind;
    void *state;
    char description[256]; /* library, version, device, precision and threads in use */
    char executed[160];    /* what it says it computes in, or "" */
    char version[64];
    engine_output outputs[MAX_OUTPUTS];
    size_t output_count;
    int32_t exit_index; /* of a chain; else -1 */
    int32_t int8_layers; /* that run in 8 bits; 0: none, or the engine does not tell */
};

/* The engine of a name, or NULL where this library was built without it. */
const engine_kind *engine_kind_of(const char *name);

/* Loads; on failure nothing is left. A request with stage files becomes a chain of engines (chain.c). */
tusfm_status *engine_open(const engine_kind *kind, const engine_request *request, int full_depth, engine **opened);
tusfm_status *engine_run(engine *e, const void *input);
void engine_cancel(engine *e);
void engine_close(engine *e);

const engine_output *engine_find(const engine *e, const char *name);
const engine_file *request_file(const engine_request *request, const char *name);

/* The text of the threads at the end of a description. */
const char *threads_word(int32_t count);

/* Opens the first library of these names (the last may end with '*'): in the folder that is named, else beside this
 * library or where the system looks. */
tusfm_status *engine_library(const char *folder, const char *const *names, const char *what, void **library);

extern const engine_kind engine_ort, engine_ov, engine_integer, engine_stub, engine_trt;

/* chain.c */
int request_is_chain(const engine_request *request);
extern const engine_kind engine_chain;
tusfm_status *chain_open(engine *e, const engine_kind *kind, const engine_request *request, int full_depth);
/* Runs every stage, whatever the policy says: logits of all exits, exits x classes, good until the next run. */
tusfm_status *chain_run_all(engine *e, const void *input, const float **logits, int32_t *exits, int32_t *classes);

#endif
