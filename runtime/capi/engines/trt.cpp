// TensorRT on an NVIDIA GPU: an engine that was built ahead of time (`export --compute-capability`) and lies in the bundle,
// for exactly this library and GPU. Nothing is built here and no engine is taken from a cache. What TensorRT and CUDA
// are called for is what engines/trt does in Python: pinned buffers, one stream, one CUDA graph.
//
// Not run by its makers' machines: they have no GPU. It is compiled against TensorRT's headers where they are, else
// against tests/fakes/tensorrt (TUSFM_TENSORRT_INCLUDE).
extern "C" {
#include "engine.h"
}

#include <NvInferRuntime.h>
#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <memory>
#include <new>

namespace {

constexpr const char *suffix = ".engine";

struct quiet final : nvinfer1::ILogger {
    char said[200] = "";
    void log(Severity severity, const nvinfer1::AsciiChar *text) noexcept override {
        if (severity <= Severity::kERROR) copy_line(said, sizeof said, text);
    }
};

// One input or output: pinned on the host, and its place on the device.
struct port {
    const char *name = nullptr;
    void *host = nullptr, *device = nullptr;
    size_t bytes = 0;
    ~port() {
        cudaFreeHost(host);
        cudaFree(device);
    }
};

struct trt {
    quiet logger;
    std::unique_ptr<nvinfer1::IRuntime> runtime; // freed last
    std::unique_ptr<nvinfer1::ICudaEngine> engine;
    std::unique_ptr<nvinfer1::IExecutionContext> context;
    port ports[MAX_OUTPUTS + 1]; // the input first
    size_t count = 1;
    cudaStream_t stream = nullptr;
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t launch = nullptr;
    ~trt() {
        if (launch) cudaGraphExecDestroy(launch);
        if (graph) cudaGraphDestroy(graph);
        if (stream) cudaStreamDestroy(stream);
        context.reset();
        engine.reset();
        runtime.reset();
    }
};

tusfm_status *failed_with(cudaError_t error, const char *what) {
    if (error == cudaSuccess) return nullptr;
    return status_new(TUSFM_ENGINE, "CUDA cannot %s: %.200s", what, cudaGetErrorString(error));
}

tusfm_status *refused(const trt *t, const char *what) {
    return status_new(TUSFM_ENGINE, "TensorRT %s: %.160s", what, t->logger.said[0] ? t->logger.said : "no reason given");
}

// "tensorrt-rtx-1.7.1.116-sm86.engine": the library's name and version, and the GPU's compute capability.
tusfm_status *choose_engine(const engine_request *request, const char *version, const cudaDeviceProp &gpu,
                            const engine_file **chosen) {
    char ending[64];
    std::snprintf(ending, sizeof ending, "-%s-sm%d%d%s", version, gpu.major, gpu.minor, suffix);
    for (size_t i = 0; i < request->file_count; i++) {
        const engine_file *file = &request->files[i];
        size_t length = std::strlen(file->name), end = std::strlen(ending);
        if (length >= end && std::strcmp(file->name + length - end, ending) == 0) {
            *chosen = file;
            return nullptr;
        }
    }
    return status_new(TUSFM_UNSUPPORTED,
                      "the bundle has no engine for TensorRT %s and compute capability %d.%d: export it with "
                      "--compute-capability %d.%d and that version",
                      version, gpu.major, gpu.minor, gpu.major, gpu.minor);
}

tusfm_status *make_port(trt *t, const char *name, port *made, engine_output *described) {
    nvinfer1::Dims shape = t->engine->getTensorShape(name);
    nvinfer1::DataType type = t->engine->getTensorDataType(name);
    bool is_input = t->engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT;
    bool is_byte = type == nvinfer1::DataType::kUINT8;
    if (shape.nbDims < 0 || shape.nbDims > MAX_RANK || (!is_byte && type != nvinfer1::DataType::kFLOAT) || (is_byte && !is_input))
        return status_new(TUSFM_ENGINE, "the engine has an input or output of another type than uint8 and float32");
    size_t count = 1;
    described->axes = shape.nbDims;
    for (int i = 0; i < shape.nbDims; i++) {
        if (shape.d[i] < 1 || shape.d[i] > (1 << 28) / static_cast<int64_t>(count))
            return status_new(TUSFM_ENGINE, "the engine has an input or output without a fixed shape");
        described->shape[i] = shape.d[i];
        count *= static_cast<size_t>(shape.d[i]);
    }
    made->name = name;
    made->bytes = count * (is_byte ? 1 : sizeof(float));
    TRY(failed_with(cudaMallocHost(&made->host, made->bytes), "reserve pinned memory"));
    TRY(failed_with(cudaMalloc(&made->device, made->bytes), "reserve memory on the GPU"));
    copy_line(described->name, sizeof described->name, name);
    described->count = count;
    described->data = static_cast<const float *>(made->host);
    return t->context->setTensorAddress(name, made->device) ? nullptr : refused(t, "takes no buffer");
}

tusfm_status *make_ports(engine *e, trt *t, const engine_request *request) {
    const char *wanted = request->takes_name ? request->takes_name : INPUT_NAME;
    engine_output input = {};
    int found = 0;
    for (int32_t i = 0; i < t->engine->getNbIOTensors(); i++) {
        const char *name = t->engine->getIOTensorName(i);
        if (t->engine->getTensorIOMode(name) == nvinfer1::TensorIOMode::kINPUT) {
            if (std::strcmp(name, wanted) != 0 || found++) return status_new(TUSFM_ENGINE, "the engine takes something else than %s", wanted);
            TRY(make_port(t, name, &t->ports[0], &input));
            continue;
        }
        if (e->output_count == MAX_OUTPUTS) return status_new(TUSFM_ENGINE, "the engine has more than %d outputs", MAX_OUTPUTS);
        size_t place = std::strcmp(name, LOGITS_NAME) == 0 ? 0 : e->output_count; // logits stand first
        if (place == 0 && e->output_count) e->outputs[e->output_count] = e->outputs[0];
        TRY(make_port(t, name, &t->ports[t->count++], &e->outputs[place]));
        e->output_count++;
    }
    return found ? nullptr : status_new(TUSFM_ENGINE, "the engine takes no input");
}

tusfm_status *enqueue(trt *t) {
    TRY(failed_with(cudaMemcpyAsync(t->ports[0].device, t->ports[0].host, t->ports[0].bytes, cudaMemcpyHostToDevice, t->stream), "copy the input"));
    if (!t->context->enqueueV3(t->stream)) return refused(t, "cannot run");
    for (size_t i = 1; i < t->count; i++)
        TRY(failed_with(cudaMemcpyAsync(t->ports[i].host, t->ports[i].device, t->ports[i].bytes, cudaMemcpyDeviceToHost, t->stream), "copy an output"));
    return nullptr;
}

// One graph of copies and engine; where that cannot be captured, they are queued one by one.
tusfm_status *capture(trt *t) {
    TRY(enqueue(t)); // the first run sets up what a capture must not
    TRY(failed_with(cudaStreamSynchronize(t->stream), "run the engine"));
    if (cudaStreamBeginCapture(t->stream, cudaStreamCaptureModeThreadLocal) != cudaSuccess) return nullptr;
    tusfm_status *failed = enqueue(t);
    bool captured = cudaStreamEndCapture(t->stream, &t->graph) == cudaSuccess && !failed;
    tusfm_status_free(failed);
    if (!captured || cudaGraphInstantiate(&t->launch, t->graph, 0) != cudaSuccess) t->launch = nullptr;
    return nullptr;
}

tusfm_status *open_on_device(engine *e, trt *t, const engine_request *request) {
    const engine_file *file = nullptr;
    cudaDeviceProp gpu;
    TRY(failed_with(cudaGetDeviceProperties(&gpu, 0), "find a GPU"));
    std::snprintf(e->version, sizeof e->version, "%d.%d.%d.%d", getInferLibMajorVersion(), getInferLibMinorVersion(),
                  getInferLibPatchVersion(), getInferLibBuildVersion());
    TRY(choose_engine(request, e->version, gpu, &file));
    t->runtime.reset(nvinfer1::createInferRuntime(t->logger));
    if (!t->runtime) return refused(t, "does not start");
    t->engine.reset(t->runtime->deserializeCudaEngine(file->data, file->size));
    if (!t->engine) return refused(t, "does not take the engine");
    t->context.reset(t->engine->createExecutionContext());
    if (!t->context) return refused(t, "makes no context");
    TRY(failed_with(cudaStreamCreate(&t->stream), "make a stream"));
    TRY(make_ports(e, t, request));
    TRY(capture(t));
    std::snprintf(e->description, sizeof e->description, "TensorRT %s %.100s%s", e->version, gpu.name, t->launch ? ", CUDA graph" : "");
    std::snprintf(e->executed, sizeof e->executed, "%.30s as the engine was built", request->precision);
    return nullptr;
}

tusfm_status *trt_open(engine *e, const engine_request *request) {
    trt *t = new (std::nothrow) trt;
    if (!t) return no_memory();
    e->state = t;
    try {
        return open_on_device(e, t, request);
    } catch (...) {
        return status_new(TUSFM_ENGINE, "TensorRT threw an exception");
    }
}

tusfm_status *trt_run(engine *e, const void *input) {
    trt *t = static_cast<trt *>(e->state);
    std::memcpy(t->ports[0].host, input, t->ports[0].bytes);
    try {
        if (t->launch) TRY(failed_with(cudaGraphLaunch(t->launch, t->stream), "start the graph"));
        else TRY(enqueue(t));
    } catch (...) {
        return status_new(TUSFM_ENGINE, "TensorRT threw an exception");
    }
    return failed_with(cudaStreamSynchronize(t->stream), "run the engine");
}

void trt_cancel(engine *) {} // work on a GPU cannot be called back; it ends in milliseconds

void trt_close(engine *e) {
    delete static_cast<trt *>(e->state);
    e->state = nullptr;
}

} // namespace

extern "C" const engine_kind engine_trt = {"trt", "tensorrt-rtx", 0, 0, 0, trt_open, trt_run, trt_cancel, trt_close};
