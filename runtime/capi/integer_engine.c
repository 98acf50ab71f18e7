/* Opens a model for an instruction set, packs its weights, and runs it. */
#include "integer_engine.h"

#include <stdio.h>
#include <stdlib.h>

#include "integer_model.h"
#include "integer_threads.h"

enum { MAX_THREADS = 64, ALIGNMENT = 64 };

struct tue_int_engine {
    tue_int_model model;
    const tue_int_set *set;
    uint8_t *memory; /* buffers, packed weights and scratch, one block */
    size_t memory_bytes, scratch_bytes;
    uint8_t *scratch;
    tue_int_threads *threads;
    int32_t thread_count;
    tue_int_flag cancelled;
    char description[128];
};

/* All that were compiled, fastest first. */
static size_t list_sets(const tue_int_set *sets[8]) {
    size_t count = 0;
#ifdef TUE_INT_X86
#if TUE_INT_HAS_AVX512VNNI
    sets[count++] = tue_int_avx512vnni();
#endif
#if TUE_INT_HAS_AVXVNNI
    sets[count++] = tue_int_avxvnni();
#endif
    sets[count++] = tue_int_avx2();
#endif
#ifdef TUE_INT_ARM
#if TUE_INT_HAS_NEONDOT
    sets[count++] = tue_int_neondot();
#endif
    sets[count++] = tue_int_neon();
#endif
    sets[count++] = tue_int_portable();
    return count;
}

static const tue_int_set *choose(const char *name) {
    const tue_int_set *sets[8];
    size_t count = list_sets(sets);
    for (size_t i = 0; i < count; i++)
        if (sets[i]->usable() && (!name || strcmp(name, sets[i]->name) == 0)) return sets[i];
    return NULL;
}

int32_t tue_int_version(void) { return TUE_INT_VERSION; }

const char *tue_int_isas(void) {
    static char text[96]; /* written with the same bytes every time */
    char found[96] = "";
    const tue_int_set *sets[8];
    size_t count = list_sets(sets), at = 0;
    for (size_t i = 0; i < count; i++)
        if (sets[i]->usable() && at < sizeof found)
            at += (size_t)snprintf(found + at, sizeof found - at, "%s%s", at ? "," : "", sets[i]->name);
    memcpy(text, found, sizeof text);
    return text;
}

static int32_t fail(int32_t status, char *text, size_t bytes, const char *what) {
    if (text && bytes) snprintf(text, bytes, "%s", what);
    return status;
}

static size_t aligned(size_t bytes) { return (bytes + ALIGNMENT - 1) & ~(size_t)(ALIGNMENT - 1); }

static size_t buffer_bytes(const tue_int_buffer *b) {
    static const size_t sizes[] = {1, 1, 2, 4, 8, 4};
    /* kernels may read or write up to a vector beyond the end */
    return aligned((size_t)b->rows * (size_t)b->columns * sizes[b->dtype] + ALIGNMENT);
}

/* Rows, heads or map rows that threads may share; 1 where an operation is small or has one result. */
static int32_t count_items(const tue_int_op *op, const tue_int_model *m) {
    switch (op->kind) {
        case TUE_LINEAR: return op->f[2];
        case TUE_NORM: return op->f[1];
        case TUE_ATTENTION: return op->f[0];
        case TUE_CONVOLUTION:
        case TUE_DEPTHWISE: return op->f[0];
        case TUE_RESIZE: return op->f[2];
        case TUE_HALVE: return op->f[0] / 2;
        case TUE_MEAN:
        case TUE_PEAK:
        case TUE_SUM: return 1;
        case TUE_FILL:
        case TUE_GATHER:
        case TUE_PATCHES: return m->buffers[op->target].rows;
        default: return m->buffers[op->source].rows;
    }
}

static tue_int_kernel kernel_of(const tue_int_set *set, int32_t kind) {
    return set->kernels[kind] ? set->kernels[kind] : tue_int_portable()->kernels[kind];
}

static size_t scratch_of(const tue_int_engine *e, const tue_int_op *op) {
    const tue_int_set *set = e->set->kernels[op->kind] ? e->set : tue_int_portable();
    return aligned(set->scratch_bytes(op, e->model.buffers));
}

/* Weights that an instruction set does not pack are kept as they are, since the caller's table goes away. */
static size_t kept_bytes(const tue_int_engine *e, const tue_int_op *op) {
    if (!op->weight) return 0;
    size_t packed = e->set->packed_bytes(op);
    return aligned(packed ? packed : (size_t)op->outputs * (size_t)op->inputs);
}

static int32_t place_all(tue_int_engine *e) {
    tue_int_model *m = &e->model;
    size_t bytes = ALIGNMENT;
    for (int32_t i = 0; i < m->buffer_count; i++) bytes += buffer_bytes(&m->buffers[i]);
    for (int32_t i = 0; i < m->op_count; i++) {
        bytes += m->ops[i].kept = kept_bytes(e, &m->ops[i]);
        size_t scratch = scratch_of(e, &m->ops[i]);
        e->scratch_bytes = scratch > e->scratch_bytes ? scratch : e->scratch_bytes;
    }
    bytes += e->scratch_bytes * (size_t)e->thread_count;
    e->memory = calloc(1, bytes);
    if (!e->memory) return TUE_INT_NO_MEMORY;
    e->memory_bytes = bytes;
    uint8_t *at = e->memory + (ALIGNMENT - (uintptr_t)e->memory % ALIGNMENT) % ALIGNMENT;
    for (int32_t i = 0; i < m->buffer_count; i++) {
        m->buffers[i].data = at;
        at += buffer_bytes(&m->buffers[i]);
    }
    for (int32_t i = 0; i < m->op_count; i++) {
        tue_int_op *op = &m->ops[i];
        op->items = count_items(op, m);
        if (!op->kept) continue;
        if (e->set->packed_bytes(op)) {
            op->packed = at;
            e->set->pack(op, at);
            op->weight = NULL;
        } else {
            memcpy(at, op->weight, (size_t)op->outputs * (size_t)op->inputs);
            op->weight = (const int8_t *)at;
        }
        at += op->kept;
    }
    e->scratch = at;
    return TUE_INT_OK;
}

int32_t tue_int_open(const tue_int_tensor *tensors, size_t count, const tue_int_options *options,
                     tue_int_engine **engine, char *text, size_t text_bytes) {
    int32_t threads = options ? options->threads : 1;
    if (!tensors || !engine || threads < 1 || threads > MAX_THREADS)
        return fail(TUE_INT_BAD_ARGUMENT, text, text_bytes, "tensors, engine or the number of threads is not usable");
    if (options && options->struct_size != sizeof *options)
        return fail(TUE_INT_BAD_ARGUMENT, text, text_bytes, "the options are of another version");
    const tue_int_set *set = choose(options ? options->isa : NULL);
    if (!set) return fail(TUE_INT_UNSUPPORTED, text, text_bytes, "no such instruction set in this library or this CPU");
    tue_int_engine *e = calloc(1, sizeof *e);
    if (!e) return fail(TUE_INT_NO_MEMORY, text, text_bytes, "no memory");
    e->set = set;
    int32_t status = tue_int_read_model(tensors, count, &e->model, text, text_bytes);
    if (!status) {
        e->threads = tue_int_start_threads(threads);
        e->thread_count = tue_int_count_threads(e->threads);
        status = place_all(e);
    }
    if (status == TUE_INT_NO_MEMORY) fail(status, text, text_bytes, "no memory");
    if (status) {
        tue_int_close(e);
        return status;
    }
    snprintf(e->description, sizeof e->description, "%s, %d thread%s, %.1f MB", set->name, (int)e->thread_count,
             e->thread_count == 1 ? "" : "s", (double)e->memory_bytes / 1e6);
    *engine = e;
    return TUE_INT_OK;
}

const char *tue_int_describe(const tue_int_engine *engine) { return engine ? engine->description : ""; }

int32_t tue_int_describe_input(const tue_int_engine *engine, tue_int_port *port) {
    if (!engine || !port) return TUE_INT_BAD_ARGUMENT;
    *port = engine->model.ports[0].port;
    return TUE_INT_OK;
}

size_t tue_int_output_count(const tue_int_engine *engine) {
    return engine ? (size_t)engine->model.port_count - 1 : 0;
}

int32_t tue_int_describe_output(const tue_int_engine *engine, size_t index, tue_int_port *port) {
    if (!engine || !port || index >= tue_int_output_count(engine)) return TUE_INT_BAD_ARGUMENT;
    *port = engine->model.ports[index + 1].port;
    return TUE_INT_OK;
}

/* One operation's items, shared among the threads in blocks of whole tiles. */
typedef struct shared_work {
    const tue_int_engine *engine;
    const tue_int_state *state;
    const tue_int_op *op;
    tue_int_kernel kernel;
} shared_work;

static void work(void *argument, int32_t thread, int32_t threads) {
    const shared_work *w = argument;
    int32_t unit = w->op->kind == TUE_LINEAR ? TUE_TILE_ROWS : 1, items = w->op->items;
    int32_t units = (items + unit - 1) / unit;
    int32_t begin = (int32_t)((int64_t)units * thread / threads) * unit;
    int32_t end = (int32_t)((int64_t)units * (thread + 1) / threads) * unit;
    end = end < items ? end : items;
    if (begin < end)
        w->kernel(w->state, w->op, begin, end, w->engine->scratch + (size_t)thread * w->engine->scratch_bytes);
}

int32_t tue_int_run(tue_int_engine *engine, const void *input, float *const *outputs) {
    if (!engine || !input || !outputs) return TUE_INT_BAD_ARGUMENT;
    for (int32_t i = 1; i < engine->model.port_count; i++)
        if (!outputs[i - 1]) return TUE_INT_BAD_ARGUMENT;
    tue_int_clear_flag(&engine->cancelled);
    /* a copy, since kernels may read a little beyond a buffer's end */
    const tue_int_port *port = &engine->model.ports[0].port;
    memcpy(engine->model.buffers[0].data, input, port->elements * (port->dtype == TUE_INT_U8 ? 1 : sizeof(float)));
    tue_int_state state = {engine->model.buffers, input, outputs};
    for (int32_t i = 0; i < engine->model.op_count; i++) {
        if (tue_int_read_flag(&engine->cancelled)) return TUE_INT_CANCELLED;
        const tue_int_op *op = &engine->model.ops[i];
        shared_work shared = {engine, &state, op, kernel_of(engine->set, op->kind)};
        tue_int_share(engine->threads, work, &shared);
    }
    return TUE_INT_OK;
}

void tue_int_cancel(tue_int_engine *engine) {
    if (engine) tue_int_set_flag(&engine->cancelled);
}

void tue_int_close(tue_int_engine *engine) {
    if (!engine) return;
    tue_int_stop_threads(engine->threads);
    tue_int_free_model(&engine->model);
    free(engine->memory);
    free(engine);
}
