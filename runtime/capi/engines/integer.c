/* Our own integer engine: the same bytes on every machine, no library besides. Its tensors come from model.safetensors;
 * model.json beside it is for people and tools. */
#include "engine.h"

#include "../integer_engine.h"
#include "../src/tensors.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct integer {
    tue_int_engine *engine;
    float *data[MAX_OUTPUTS];
} integer;

enum { MAX_MODEL_TENSORS = 4096 };

static int dtype_of(const tensor *t) {
    switch (t->dtype) {
    case U8: return TUE_INT_U8;
    case I8: return TUE_INT_I8;
    case I16: return TUE_INT_I16;
    case I32: return TUE_INT_I32;
    case I64: return TUE_INT_I64;
    default: return -1;
    }
}

static tusfm_status *fill_table(const tensors *file, tue_int_tensor *table) {
    for (size_t i = 0; i < file->count; i++) {
        const tensor *t = &file->all[i];
        if (dtype_of(t) < 0 || t->axes > TUE_INT_MAX_DIMS)
            return status_new(TUSFM_ENGINE, "the integer model holds an array of another type than whole numbers");
        table[i] = (tue_int_tensor){.name = t->name, .data = t->data, .bytes = t->count * tensor_item_bytes(t),
                                    .dims = t->axes, .dtype = dtype_of(t)};
        memcpy(table[i].shape, t->shape, (size_t)t->axes * sizeof *t->shape);
    }
    return NULL;
}

static tusfm_status *failed_with(int32_t status, const char *text) {
    if (status == TUE_INT_OK) return NULL;
    if (status == TUE_INT_NO_MEMORY) return no_memory();
    return status_new(status == TUE_INT_UNSUPPORTED ? TUSFM_UNSUPPORTED : TUSFM_ENGINE, "the integer engine: %.400s", text);
}

static tusfm_status *load(integer *n, const engine_file *file, int32_t threads) {
    tensors all;
    char text[400] = "it cannot be loaded";
    tue_int_options options = {.struct_size = sizeof options, .threads = threads};
    TRY(status_as(tensors_open(file->data, file->size, "model.safetensors", MAX_MODEL_TENSORS, &all), TUSFM_ENGINE));
    tue_int_tensor *table = calloc(all.count ? all.count : 1, sizeof *table);
    tusfm_status *failed = table ? fill_table(&all, table) : no_memory();
    if (!failed) failed = failed_with(tue_int_open(table, all.count, &options, &n->engine, text, sizeof text), text);
    free(table);
    tensors_close(&all);
    return failed;
}

static int same_input(const tue_int_port *port, const engine_request *request) {
    const model_spec *spec = request->spec;
    const int64_t image[4] = {1, spec->grey ? 1 : 3, spec->rows, spec->columns};
    const int64_t *shape = request->takes_name ? request->takes_shape : image;
    int axes = request->takes_name ? request->takes_axes : 4;
    if (port->dims != axes || port->dtype != (request->takes_name ? TUE_INT_F32 : TUE_INT_U8)) return 0;
    for (int i = 0; i < axes; i++)
        if (port->shape[i] != shape[i]) return 0;
    return strcmp(port->name, request->takes_name ? request->takes_name : INPUT_NAME) == 0;
}

static tusfm_status *describe_outputs(integer *n, engine *e) {
    size_t count = tue_int_output_count(n->engine);
    if (count > MAX_OUTPUTS) return status_new(TUSFM_ENGINE, "the model has %zu outputs; %d is the most", count, MAX_OUTPUTS);
    for (size_t i = 0; i < count; i++) {
        tue_int_port port;
        TRY(failed_with(tue_int_describe_output(n->engine, i, &port), "an output cannot be described"));
        n->data[i] = calloc(port.elements ? port.elements : 1, sizeof **n->data);
        if (!n->data[i]) return no_memory();
        engine_output *output = &e->outputs[i];
        *output = (engine_output){.data = n->data[i], .axes = port.dims, .count = port.elements};
        copy_line(output->name, sizeof output->name, port.name);
        memcpy(output->shape, port.shape, (size_t)port.dims * sizeof *port.shape);
    }
    e->output_count = count;
    return NULL;
}

static tusfm_status *integer_open(engine *e, const engine_request *request) {
    const engine_file *file = request_file(request, "model.safetensors");
    if (!file) return status_new(TUSFM_ENGINE, "the integer engine needs model.safetensors");
    integer *n = calloc(1, sizeof *n);
    if (!n) return no_memory();
    e->state = n;
    TRY(load(n, file, request->threads));
    tue_int_port port;
    TRY(failed_with(tue_int_describe_input(n->engine, &port), "its input cannot be described"));
    if (!same_input(&port, request)) return status_new(TUSFM_ENGINE, "the model's input is not the one that the manifest says");
    TRY(describe_outputs(n, e));
    snprintf(e->description, sizeof e->description, "integer engine %d, %.200s, bit-identical", tue_int_version(), tue_int_describe(n->engine));
    snprintf(e->executed, sizeof e->executed, "integers from pixels to logits");
    snprintf(e->version, sizeof e->version, "%d", tue_int_version());
    return NULL;
}

static tusfm_status *integer_run(engine *e, const void *input) {
    integer *n = e->state;
    int32_t status = tue_int_run(n->engine, input, n->data);
    return failed_with(status, status == TUE_INT_CANCELLED ? "the run was cancelled" : "the run failed");
}

static void integer_cancel(engine *e) {
    integer *n = e->state;
    if (n->engine) tue_int_cancel(n->engine);
}

static void integer_close(engine *e) {
    integer *n = e->state;
    if (!n) return;
    tue_int_close(n->engine);
    for (size_t i = 0; i < MAX_OUTPUTS; i++) free(n->data[i]);
    free(n);
}

const engine_kind engine_integer = {.name = "integer",
                                    .library = "tinyusfm-edge",
                                    .chains = 1,
                                    .exact = 1,
                                    .own = 1,
                                    .open = integer_open,
                                    .run = integer_run,
                                    .cancel = integer_cancel,
                                    .close = integer_close};
