/* OpenVINO on the CPU by its C interface, reached by dlopen: model.xml and model.bin from memory, precision set and read
 * back. Left alone it computes in bfloat16 wherever the CPU can; and where its kernels lack 8-bit forms (as on some Arm
 * CPUs) it runs quantized layers in float without a word, so the layers that really ran in 8 bits are counted. Compiling
 * replaces the thread's stack for signal handlers by one that is freed with the model, so the thread's own is put back. */
#include "allowed.h"
#include "engine.h"

#include <openvino/c/openvino.h>

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define DEVICE "CPU"

/* Every function that is used, with the type that the header gives it. */
#define FUNCTIONS(f)                                                                                                   \
    f(ov_get_openvino_version) f(ov_version_free) f(ov_get_last_err_msg) f(ov_free) f(ov_core_create) f(ov_core_free)  \
    f(ov_core_get_property) f(ov_core_read_model_from_memory_buffer) f(ov_core_compile_model) f(ov_model_free)         \
    f(ov_shape_create) f(ov_shape_free) f(ov_tensor_create_from_host_ptr) f(ov_tensor_free) f(ov_tensor_data)          \
    f(ov_compiled_model_free) f(ov_compiled_model_get_property) f(ov_compiled_model_inputs_size)                       \
    f(ov_compiled_model_input_by_index) f(ov_compiled_model_outputs_size) f(ov_compiled_model_output_by_index)         \
    f(ov_compiled_model_create_infer_request) f(ov_output_const_port_free) f(ov_port_get_any_name)                     \
    f(ov_port_get_element_type) f(ov_const_port_get_shape) f(ov_infer_request_free) f(ov_infer_request_cancel)         \
    f(ov_infer_request_set_input_tensor_by_index) f(ov_infer_request_get_output_tensor_by_index)                       \
    f(ov_infer_request_start_async) f(ov_infer_request_wait) f(ov_infer_request_get_profiling_info)                    \
    f(ov_profiling_info_list_free)

typedef struct functions {
#define MEMBER(name) __typeof__(&(name)) name;
    FUNCTIONS(MEMBER)
} functions;

typedef struct ov {
    functions call;
    ov_core_t *core;
    ov_model_t *model;
    ov_compiled_model_t *compiled;
    ov_infer_request_t *request;
    ov_tensor_t *weights, *input, *outputs[MAX_OUTPUTS];
    uint8_t *weight_data, *input_data;
    size_t input_bytes;
    atomic_int running;
} ov;

static tusfm_status *failed_with(const ov *o, ov_status_e status, const char *what) {
    if (status == 0) return NULL;
    const char *said = o->call.ov_get_last_err_msg();
    return status_new(TUSFM_ENGINE, "OpenVINO %s: %.300s", what, said && *said ? said : "no reason given");
}

#define LOAD(function, ...) TRY(failed_with(o, o->call.function(__VA_ARGS__), "cannot load the model"))

static tusfm_status *load_library(ov *o, const char *folder) {
    static const char *const names[] = {
#if defined(_WIN32)
        "openvino_c.dll",
#elif defined(__APPLE__)
        "libopenvino_c.dylib", "libopenvino_c.*",
#else
        "libopenvino_c.so", "libopenvino_c.so.*",
#endif
        NULL};
    void *library = NULL; /* stays loaded: its threads and plug-ins cannot be unloaded safely */
    TRY(engine_library(folder, names, "OpenVINO", &library));
#define FETCH(name)                                                                                                    \
    *(void **)&o->call.name = library_symbol(library, #name);                                                          \
    if (!o->call.name) return status_new(TUSFM_UNSUPPORTED, "the OpenVINO that was found has no " #name);
    FUNCTIONS(FETCH)
    return NULL;
}

static tusfm_status *read_version(ov *o, char version[64]) {
    ov_version_t found = {0};
    LOAD(ov_get_openvino_version, &found);
    copy_line(version, 64, found.buildNumber ? found.buildNumber : "");
    o->call.ov_version_free(&found);
    version[strcspn(version, "-")] = 0;
    return NULL;
}

static tusfm_status *require_bf16(ov *o) {
    char *listed = NULL;
    LOAD(ov_core_get_property, o->core, DEVICE, "OPTIMIZATION_CAPABILITIES", &listed);
    int has = listed && strstr(listed, "BF16") != NULL;
    o->call.ov_free(listed);
    return has ? NULL : status_new(TUSFM_UNSUPPORTED, "this CPU does not compute bf16: use an artefact whose rest is f32");
}

static tusfm_status *read_model(ov *o, const engine_file *xml, const engine_file *bin) {
    TRY(check_ir(xml));
    o->weight_data = malloc(bin->size ? bin->size : 1); /* the model goes on pointing at it */
    if (!o->weight_data) return no_memory();
    memcpy(o->weight_data, bin->data, bin->size);
    int64_t side = (int64_t)bin->size;
    ov_shape_t shape = {0};
    LOAD(ov_shape_create, 1, &side, &shape);
    ov_status_e status = o->call.ov_tensor_create_from_host_ptr(U8, shape, o->weight_data, &o->weights);
    o->call.ov_shape_free(&shape);
    TRY(failed_with(o, status, "cannot load the model"));
    LOAD(ov_core_read_model_from_memory_buffer, o->core, (const char *)xml->data, xml->size, o->weights, &o->model);
    return NULL;
}

static tusfm_status *compile(ov *o, const engine_request *request, int counted) {
    char threads[16];
    snprintf(threads, sizeof threads, "%d", request->threads);
    /* pinned threads of two programs meet on core 0; the operating system places them better */
    LOAD(ov_core_compile_model, o->core, o->model, DEVICE, 16, &o->compiled, "INFERENCE_PRECISION_HINT",
         request->rest_precision, "EXECUTION_MODE_HINT", "PERFORMANCE", "PERFORMANCE_HINT", "LATENCY", "NUM_STREAMS", "1",
         "INFERENCE_NUM_THREADS", threads, "ENABLE_CPU_PINNING", "NO", "CACHE_DIR", "", "PERF_COUNT",
         counted ? "YES" : "NO");
    return NULL;
}

static tusfm_status *check_property(ov *o, const char *key, const char *wanted, int whole) {
    char *got = NULL;
    LOAD(ov_compiled_model_get_property, o->compiled, key, &got);
    int same = got && (whole ? strcmp(got, wanted) == 0 : atoi(got) <= atoi(wanted) && atoi(got) > 0);
    tusfm_status *failed =
        same ? NULL : status_new(TUSFM_ENGINE, "asked OpenVINO for %s %s, got %.60s", key, wanted, got ? got : "nothing");
    o->call.ov_free(got);
    return failed;
}

static tusfm_status *describe(ov *o, ov_output_const_port_t *port, ov_element_type_e *type, engine_output *found) {
    char *name = NULL;
    ov_shape_t shape = {0};
    ov_status_e status = o->call.ov_port_get_any_name(port, &name);
    if (status == 0) status = o->call.ov_port_get_element_type(port, type);
    if (status == 0) status = o->call.ov_const_port_get_shape(port, &shape);
    o->call.ov_output_const_port_free(port);
    if (status == 0) copy_line(found->name, sizeof found->name, name);
    found->axes = status == 0 && shape.rank <= MAX_RANK ? (int)shape.rank : -1;
    found->count = 1;
    for (int i = 0; i < found->axes; i++) {
        found->shape[i] = shape.dims[i];
        if (found->shape[i] < 1 || found->shape[i] > (1 << 28) / (int64_t)found->count) found->axes = -1;
        else found->count *= (size_t)found->shape[i];
    }
    if (name) o->call.ov_free(name);
    if (shape.dims) o->call.ov_shape_free(&shape);
    TRY(failed_with(o, status, "cannot describe the model"));
    if (found->axes < 0) return status_new(TUSFM_ENGINE, "the model has an input or output without a fixed shape");
    return NULL;
}

static tusfm_status *bind_input(ov *o, const engine_request *request) {
    size_t count = 0;
    ov_output_const_port_t *port = NULL;
    ov_element_type_e type = DYNAMIC;
    engine_output found = {0};
    const model_spec *spec = request->spec;
    int64_t image[4] = {1, spec->grey ? 1 : 3, spec->rows, spec->columns};
    const int64_t *shape = request->takes_name ? request->takes_shape : image;
    int axes = request->takes_name ? request->takes_axes : 4;
    LOAD(ov_compiled_model_inputs_size, o->compiled, &count);
    if (count != 1) return status_new(TUSFM_ENGINE, "the model has %zu inputs; the manifest says 1", count);
    LOAD(ov_compiled_model_input_by_index, o->compiled, 0, &port);
    TRY(describe(o, port, &type, &found));
    int same = type == (request->takes_name ? F32 : U8) && found.axes == axes &&
               strcmp(found.name, request->takes_name ? request->takes_name : INPUT_NAME) == 0;
    for (int i = 0; same && i < axes; i++) same = found.shape[i] == shape[i];
    if (!same) return status_new(TUSFM_ENGINE, "the model's input is not the one that the manifest says");
    o->input_bytes = found.count * (request->takes_name ? sizeof(float) : 1);
    o->input_data = calloc(o->input_bytes, 1);
    if (!o->input_data) return no_memory();
    ov_shape_t sides = {0};
    LOAD(ov_shape_create, axes, shape, &sides);
    ov_status_e status = o->call.ov_tensor_create_from_host_ptr(type, sides, o->input_data, &o->input);
    o->call.ov_shape_free(&sides);
    TRY(failed_with(o, status, "cannot load the model"));
    LOAD(ov_infer_request_set_input_tensor_by_index, o->request, 0, o->input);
    return NULL;
}

static tusfm_status *bind_outputs(ov *o, engine *e) {
    size_t count = 0;
    LOAD(ov_compiled_model_outputs_size, o->compiled, &count);
    if (count > MAX_OUTPUTS) return status_new(TUSFM_ENGINE, "the model has %zu outputs; %d is the most", count, MAX_OUTPUTS);
    for (size_t i = 0; i < count; i++) {
        ov_output_const_port_t *port = NULL;
        ov_element_type_e type = DYNAMIC;
        void *data = NULL;
        LOAD(ov_compiled_model_output_by_index, o->compiled, i, &port);
        TRY(describe(o, port, &type, &e->outputs[i]));
        if (type != F32) return status_new(TUSFM_ENGINE, "the model's output %s is not float32", e->outputs[i].name);
        LOAD(ov_infer_request_get_output_tensor_by_index, o->request, i, &o->outputs[i]);
        LOAD(ov_tensor_data, o->outputs[i], &data);
        e->outputs[i].data = data;
    }
    e->output_count = count;
    return NULL;
}

static tusfm_status *ov_run(engine *e, const void *input);

/* Layers with weights that ran, and how many of them in 8 bits; the type of a kernel ends with its precision. */
static tusfm_status *count_layers(engine *e, int *layers, int *in_8_bits) {
    ov *o = e->state;
    ov_profiling_info_list_t list = {0};
    TRY(ov_run(e, o->input_data));
    LOAD(ov_infer_request_get_profiling_info, o->request, &list);
    for (size_t i = 0; i < list.size; i++) {
        const ov_profiling_info_t *node = &list.profiling_infos[i];
        if (node->status != EXECUTED || !node->node_type || !node->exec_type) continue;
        if (strncmp(node->node_type, "Convolution", 11) != 0 && strncmp(node->node_type, "FullyConnected", 14) != 0) continue;
        const char *ending = strrchr(node->exec_type, '_');
        ++*layers;
        *in_8_bits += ending && (strcmp(ending, "_I8") == 0 || strcmp(ending, "_i8") == 0 || strcmp(ending, "_u8") == 0);
    }
    o->call.ov_profiling_info_list_free(&list);
    return NULL;
}

/* Whether a graph holds quantised tensors: a later stage of a chain may hold none. */
static int is_quantised(const engine_file *xml) {
    static const char word[] = "\"FakeQuantize\"";
    size_t length = sizeof word - 1;
    for (size_t i = 0; i + length <= xml->size; i++)
        if (memcmp(xml->data + i, word, length) == 0) return 1;
    return 0;
}

static tusfm_status *check_executed(engine *e, const engine_request *request, int quantised) {
    int layers = 0, in_8_bits = 0, wanted = request->allow_precision < 0 && request->int8_layers > 0 ? request->int8_layers : 1;
    if (!quantised) {
        snprintf(e->executed, sizeof e->executed, "%s", request->rest_precision);
        return NULL;
    }
    TRY(count_layers(e, &layers, &in_8_bits));
    snprintf(e->executed, sizeof e->executed, "int8 in %d of %d layers with weights, the rest %s", in_8_bits, layers,
             request->rest_precision);
    size_t used = strlen(e->description);
    snprintf(e->description + used, sizeof e->description - used, ", int8 in %d of %d layers", in_8_bits, layers);
    e->int8_layers = in_8_bits;
    if (in_8_bits >= wanted || request->allow_precision > 0 || strcmp(request->precision, "int8") != 0) return NULL;
    return status_new(TUSFM_ENGINE,
                      "OpenVINO runs %d of %d layers in int8 here, at least %d are demanded: take another artefact, or set "
                      "options.allow_precision",
                      in_8_bits, layers, wanted);
}

static tusfm_status *open_model(engine *e, const engine_request *request) {
    const engine_file *xml = request_file(request, "model.xml"), *bin = request_file(request, "model.bin");
    if (!xml || !bin || request->file_count != 2)
        return status_new(TUSFM_ENGINE, "OpenVINO needs exactly model.xml and model.bin");
    if (strcmp(request->rest_precision, "f16") == 0)
        return status_new(TUSFM_UNSUPPORTED, "OpenVINO's CPU plug-in computes in f32 or bf16, not in f16: take another artefact");
    ov *o = calloc(1, sizeof *o);
    if (!o) return no_memory();
    e->state = o;
    TRY(load_library(o, request->folder));
    TRY(read_version(o, e->version));
    LOAD(ov_core_create, &o->core);
    if (strcmp(request->rest_precision, "bf16") == 0) TRY(require_bf16(o));
    TRY(read_model(o, xml, bin));
    int quantised = is_quantised(xml);
    TRY(compile(o, request, quantised));
    char threads[16];
    snprintf(threads, sizeof threads, "%d", request->threads);
    TRY(check_property(o, "EXECUTION_DEVICES", DEVICE, 1));
    TRY(check_property(o, "INFERENCE_PRECISION_HINT", request->rest_precision, 1));
    TRY(check_property(o, "INFERENCE_NUM_THREADS", threads, 0));
    LOAD(ov_compiled_model_create_infer_request, o->compiled, &o->request);
    TRY(bind_input(o, request));
    TRY(bind_outputs(o, e));
    snprintf(e->description, sizeof e->description, "OpenVINO %s, %s, %s%s%s, %d %s", e->version, DEVICE, quantised ? "INT8 (rest in " : "",
             strcmp(request->rest_precision, "bf16") == 0 ? "bfloat16" : "float32", quantised ? ")" : "", request->threads,
             threads_word(request->threads));
    return check_executed(e, request, quantised);
}

static tusfm_status *ov_open(engine *e, const engine_request *request) {
    signal_stack before = signal_stack_now();
    tusfm_status *failed = open_model(e, request);
    signal_stack_put_back(&before);
    return failed;
}

static tusfm_status *ov_run(engine *e, const void *input) {
    ov *o = e->state;
    if (input != o->input_data) memcpy(o->input_data, input, o->input_bytes);
    atomic_store(&o->running, 1);
    ov_status_e status = o->call.ov_infer_request_start_async(o->request);
    if (status == 0) status = o->call.ov_infer_request_wait(o->request);
    atomic_store(&o->running, 0);
    return failed_with(o, status, "failed");
}

static void ov_cancel(engine *e) {
    ov *o = e->state;
    if (atomic_load(&o->running)) (void)o->call.ov_infer_request_cancel(o->request);
}

static void ov_close(engine *e) {
    ov *o = e->state;
    if (!o) return;
    signal_stack before = signal_stack_now();
    for (size_t i = 0; i < MAX_OUTPUTS; i++)
        if (o->outputs[i]) o->call.ov_tensor_free(o->outputs[i]);
    if (o->input) o->call.ov_tensor_free(o->input);
    if (o->request) o->call.ov_infer_request_free(o->request);
    if (o->compiled) o->call.ov_compiled_model_free(o->compiled);
    if (o->model) o->call.ov_model_free(o->model);
    if (o->weights) o->call.ov_tensor_free(o->weights);
    if (o->core) o->call.ov_core_free(o->core);
    signal_stack_put_back(&before);
    free(o->weight_data);
    free(o->input_data);
    free(o);
}

const engine_kind engine_ov = {.name = "ov",
                               .library = "openvino",
                               .chains = 1,
                               .open = ov_open,
                               .run = ov_run,
                               .cancel = ov_cancel,
                               .close = ov_close};
