/* ONNX Runtime on the CPU, reached by dlopen: model.onnx from memory, one provider, float32 outside of INT8.
 *
 * Official builds since 1.29 report sessions to a collector of their maker; the library reads ORT_DISABLE_TELEMETRY
 * when it is loaded, so it is set before. External weight files are looked up where nothing is. */
#include "allowed.h"
#include "engine.h"

#if defined(__MINGW32__) /* words of Microsoft's compiler that MinGW lacks */
#define _stdcall __stdcall /* not known without GNU's extensions */
#define _Return_type_success_(expression)
#define _Frees_ptr_opt_
#define _Outptr_result_maybenull_
#define _Outptr_result_buffer_maybenull_(count)
#endif
#include <onnxruntime_c_api.h>

#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct ort {
    const OrtApi *api;
    OrtEnv *env;
    OrtSession *session;
    OrtRunOptions *options;
    OrtIoBinding *binding;
    OrtMemoryInfo *memory;
    OrtValue *input, *outputs[MAX_OUTPUTS];
    void *input_data, *output_data[MAX_OUTPUTS];
    size_t input_bytes, bound;
    atomic_int running;
} ort;

static tusfm_status *failed_with(const ort *o, OrtStatus *status, const char *what) {
    if (!status) return NULL;
    tusfm_status *made = status_new(TUSFM_ENGINE, "ONNX Runtime %s: %.300s", what, o->api->GetErrorMessage(status));
    o->api->ReleaseStatus(status);
    return made;
}

#define LOAD(call) TRY(failed_with(o, o->api->call, "cannot load the model"))

static tusfm_status *load_library(ort *o, const char *folder, char version[64]) {
    static const char *const names[] = {
#if defined(_WIN32)
        "onnxruntime.dll",
#elif defined(__APPLE__)
        "libonnxruntime.dylib",
#else
        "libonnxruntime.so.1", "libonnxruntime.so", "libonnxruntime.so.*",
#endif
        NULL};
    void *library = NULL; /* stays loaded: it cannot be unloaded safely */
    environment_default("ORT_DISABLE_TELEMETRY", "1");
    TRY(engine_library(folder, names, "ONNX Runtime", &library));
    const OrtApiBase *(ORT_API_CALL * base)(void);
    *(void **)&base = library_symbol(library, "OrtGetApiBase");
    if (!base) return status_new(TUSFM_MISSING, "the ONNX Runtime that was found has no C interface");
    const OrtApiBase *found = base();
    snprintf(version, 64, "%s", found->GetVersionString());
    o->api = found->GetApi(ORT_API_VERSION);
    if (!o->api) return status_new(TUSFM_UNSUPPORTED, "ONNX Runtime %s is too old: 1.%d or newer is needed", version, ORT_API_VERSION);
    return NULL;
}

static tusfm_status *make_session(ort *o, const engine_file *file, int32_t threads) {
    LOAD(CreateEnv(ORT_LOGGING_LEVEL_FATAL, "tinyusfm", &o->env));
    LOAD(DisableTelemetryEvents(o->env));
    TRY(check_onnx(file));
    OrtSessionOptions *with = NULL;
    LOAD(CreateSessionOptions(&with));
    static const char *const entries[][2] = {
        {"session.intra_op.allow_spinning", "0"},
        {"session.inter_op.allow_spinning", "0"},
        {"session.model_external_initializers_file_folder_path", "/nonexistent/no-external-data"}};
    OrtStatus *status = o->api->SetIntraOpNumThreads(with, threads);
    if (!status) status = o->api->SetInterOpNumThreads(with, 1);
    if (!status) status = o->api->SetSessionExecutionMode(with, ORT_SEQUENTIAL);
    if (!status) status = o->api->SetSessionGraphOptimizationLevel(with, ORT_ENABLE_ALL);
    if (!status) status = o->api->SetSessionLogSeverityLevel(with, ORT_LOGGING_LEVEL_FATAL);
    for (size_t i = 0; i < 3 && !status; i++) status = o->api->AddSessionConfigEntry(with, entries[i][0], entries[i][1]);
    if (!status) status = o->api->CreateSessionFromArray(o->env, file->data, file->size, with, &o->session);
    o->api->ReleaseSessionOptions(with);
    return failed_with(o, status, "cannot load the model");
}

/* Type and shape of an input or output. */
static tusfm_status *describe(ort *o, OrtTypeInfo *info, ONNXTensorElementDataType *type, engine_output *found) {
    const OrtTensorTypeAndShapeInfo *shape = NULL;
    size_t axes = 0;
    OrtStatus *status = o->api->CastTypeInfoToTensorInfo(info, &shape);
    *type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
    if (!status && shape) {
        status = o->api->GetTensorElementType(shape, type);
        if (!status) status = o->api->GetDimensionsCount(shape, &axes);
        if (!status && axes <= MAX_RANK) status = o->api->GetDimensions(shape, found->shape, axes);
    }
    o->api->ReleaseTypeInfo(info);
    TRY(failed_with(o, status, "cannot describe the model"));
    found->axes = axes <= MAX_RANK ? (int)axes : -1;
    found->count = 1;
    for (int i = 0; i < found->axes; i++) {
        if (found->shape[i] < 1 || found->shape[i] > (1 << 28) / (int64_t)found->count)
            return status_new(TUSFM_ENGINE, "the model has an input or output without a fixed shape");
        found->count *= (size_t)found->shape[i];
    }
    return NULL;
}

static tusfm_status *name_of(ort *o, size_t index, int is_input, char name[64]) {
    OrtAllocator *allocator = NULL;
    char *text = NULL;
    LOAD(GetAllocatorWithDefaultOptions(&allocator));
    if (is_input)
        LOAD(SessionGetInputName(o->session, index, allocator, &text));
    else
        LOAD(SessionGetOutputName(o->session, index, allocator, &text));
    copy_line(name, 64, text);
    return failed_with(o, o->api->AllocatorFree(allocator, text), "cannot load the model");
}

static tusfm_status *make_value(ort *o, const engine_output *shape, size_t item, ONNXTensorElementDataType type,
                                void **data, OrtValue **value) {
    *data = calloc(shape->count, item);
    if (!*data) return no_memory();
    LOAD(CreateTensorWithDataAsOrtValue(o->memory, *data, shape->count * item, shape->shape, (size_t)shape->axes, type,
                                        value));
    return NULL;
}

static tusfm_status *bind_input(ort *o, const engine_request *request) {
    size_t count = 0;
    engine_output found = {0};
    OrtTypeInfo *info = NULL;
    ONNXTensorElementDataType type;
    const model_spec *spec = request->spec;
    int64_t image[4] = {1, spec->grey ? 1 : 3, spec->rows, spec->columns};
    const int64_t *shape = request->takes_name ? request->takes_shape : image;
    const char *name = request->takes_name ? request->takes_name : INPUT_NAME;
    int axes = request->takes_name ? request->takes_axes : 4;
    ONNXTensorElementDataType wanted =
        request->takes_name ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    LOAD(SessionGetInputCount(o->session, &count));
    if (count != 1) return status_new(TUSFM_ENGINE, "the model has %zu inputs; the manifest says 1", count);
    TRY(name_of(o, 0, 1, found.name));
    LOAD(SessionGetInputTypeInfo(o->session, 0, &info));
    TRY(describe(o, info, &type, &found));
    int same = type == wanted && strcmp(found.name, name) == 0 && found.axes == axes;
    for (int i = 0; same && i < axes; i++) same = found.shape[i] == shape[i];
    if (!same) return status_new(TUSFM_ENGINE, "the model's input is not the one that the manifest says");
    size_t item = request->takes_name ? sizeof(float) : 1;
    o->input_bytes = found.count * item;
    TRY(make_value(o, &found, item, type, &o->input_data, &o->input));
    LOAD(BindInput(o->binding, name, o->input));
    return NULL;
}

static tusfm_status *bind_outputs(ort *o, engine *e) {
    size_t count = 0;
    LOAD(SessionGetOutputCount(o->session, &count));
    if (count > MAX_OUTPUTS) return status_new(TUSFM_ENGINE, "the model has %zu outputs; %d is the most", count, MAX_OUTPUTS);
    for (size_t i = 0; i < count; i++) {
        engine_output *output = &e->outputs[i];
        OrtTypeInfo *info = NULL;
        ONNXTensorElementDataType type;
        TRY(name_of(o, i, 0, output->name));
        LOAD(SessionGetOutputTypeInfo(o->session, i, &info));
        TRY(describe(o, info, &type, output));
        if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT || output->axes < 0)
            return status_new(TUSFM_ENGINE, "the model's output %s is not float32", output->name);
        TRY(make_value(o, output, sizeof(float), type, &o->output_data[i], &o->outputs[i]));
        LOAD(BindOutput(o->binding, output->name, o->outputs[i]));
        output->data = o->output_data[i];
        o->bound = i + 1;
    }
    e->output_count = count;
    return NULL;
}

/* Whether a graph holds quantised layers: the operator's name stands in its bytes. */
static int is_quantised(const engine_file *file) {
    static const char word[] = "QuantizeLinear";
    const char *at = (const char *)file->data, *end = at + file->size;
    size_t length = sizeof word - 1;
    while ((size_t)(end - at) >= length) {
        at = memchr(at, word[0], (size_t)(end - at) - length + 1);
        if (!at) return 0;
        if (memcmp(at, word, length) == 0) return 1;
        at++;
    }
    return 0;
}

static tusfm_status *ort_open(engine *e, const engine_request *request) {
    const engine_file *file = request_file(request, "model.onnx");
    if (!file || request->file_count != 1) return status_new(TUSFM_ENGINE, "ONNX Runtime needs exactly model.onnx");
    if (strcmp(request->rest_precision, "f32") != 0)
        return status_new(TUSFM_UNSUPPORTED, "ONNX Runtime's CPU provider computes in float32, not in %s: take another artefact",
                          request->rest_precision);
    ort *o = calloc(1, sizeof *o);
    if (!o) return no_memory();
    e->state = o;
    TRY(load_library(o, request->folder, e->version));
    TRY(make_session(o, file, request->threads));
    LOAD(CreateRunOptions(&o->options));
    LOAD(RunOptionsSetRunLogSeverityLevel(o->options, ORT_LOGGING_LEVEL_FATAL));
    LOAD(CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &o->memory));
    LOAD(CreateIoBinding(o->session, &o->binding));
    TRY(bind_input(o, request));
    TRY(bind_outputs(o, e));
    snprintf(e->description, sizeof e->description, "ONNX Runtime %s, CPUExecutionProvider, %s, %d %s", e->version,
             is_quantised(file) ? "INT8 (rest in float32)" : "float32", request->threads, threads_word(request->threads));
    snprintf(e->executed, sizeof e->executed, "each operator as the graph says, the rest f32");
    return NULL;
}

static tusfm_status *ort_run(engine *e, const void *input) {
    ort *o = e->state;
    memcpy(o->input_data, input, o->input_bytes);
    TRY(failed_with(o, o->api->RunOptionsUnsetTerminate(o->options), "failed"));
    atomic_store(&o->running, 1);
    OrtStatus *status = o->api->RunWithBinding(o->session, o->options, o->binding);
    atomic_store(&o->running, 0);
    return failed_with(o, status, "failed");
}

static void ort_cancel(engine *e) {
    ort *o = e->state;
    if (!atomic_load(&o->running)) return;
    OrtStatus *status = o->api->RunOptionsSetTerminate(o->options);
    if (status) o->api->ReleaseStatus(status);
}

static void ort_close(engine *e) {
    ort *o = e->state;
    if (!o) return;
    if (o->api) {
        if (o->binding) o->api->ReleaseIoBinding(o->binding);
        if (o->input) o->api->ReleaseValue(o->input);
        for (size_t i = 0; i < MAX_OUTPUTS; i++)
            if (o->outputs[i]) o->api->ReleaseValue(o->outputs[i]);
        if (o->memory) o->api->ReleaseMemoryInfo(o->memory);
        if (o->options) o->api->ReleaseRunOptions(o->options);
        if (o->session) o->api->ReleaseSession(o->session);
        if (o->env) o->api->ReleaseEnv(o->env);
    }
    free(o->input_data);
    for (size_t i = 0; i < MAX_OUTPUTS; i++) free(o->output_data[i]);
    free(o);
}

const engine_kind engine_ort = {.name = "ort",
                                .library = "onnxruntime",
                                .chains = 1,
                                .open = ort_open,
                                .run = ort_run,
                                .cancel = ort_cancel,
                                .close = ort_close};
