// The part of TensorRT's C++ interface (version 10, NvInferRuntime.h) that engines/trt.cpp uses, as declarations alone, so that
// the file is compiled where TensorRT's headers cannot be had. Nothing of it can be linked or run.
#ifndef FAKE_NV_INFER_RUNTIME_H
#define FAKE_NV_INFER_RUNTIME_H

#include <cstddef>
#include <cstdint>
#include <cuda_runtime_api.h>

namespace nvinfer1 {

using AsciiChar = char;

struct Dims64 {
    static constexpr int32_t MAX_DIMS = 8;
    int32_t nbDims;
    int64_t d[MAX_DIMS];
};
using Dims = Dims64;

enum class DataType : int32_t { kFLOAT = 0, kHALF = 1, kINT8 = 2, kINT32 = 3, kBOOL = 4, kUINT8 = 5 };
enum class TensorIOMode : int32_t { kNONE = 0, kINPUT = 1, kOUTPUT = 2 };

class ILogger {
public:
    enum class Severity : int32_t { kINTERNAL_ERROR = 0, kERROR = 1, kWARNING = 2, kINFO = 3, kVERBOSE = 4 };
    virtual void log(Severity severity, const AsciiChar *msg) noexcept = 0;
    ILogger() = default;
    virtual ~ILogger() = default;
};

class IExecutionContext {
public:
    virtual ~IExecutionContext() noexcept = default;
    bool setTensorAddress(const char *tensorName, void *data) noexcept;
    bool enqueueV3(cudaStream_t stream) noexcept;
};

class ICudaEngine {
public:
    virtual ~ICudaEngine() noexcept = default;
    Dims getTensorShape(const char *tensorName) const noexcept;
    DataType getTensorDataType(const char *tensorName) const noexcept;
    TensorIOMode getTensorIOMode(const char *tensorName) const noexcept;
    int32_t getNbIOTensors() const noexcept;
    const char *getIOTensorName(int32_t index) const noexcept;
    IExecutionContext *createExecutionContext() noexcept;
};

class IRuntime {
public:
    virtual ~IRuntime() noexcept = default;
    ICudaEngine *deserializeCudaEngine(const void *blob, std::size_t size) noexcept;
};

IRuntime *createInferRuntime(ILogger &logger) noexcept;

} // namespace nvinfer1

extern "C" int32_t getInferLibMajorVersion() noexcept;
extern "C" int32_t getInferLibMinorVersion() noexcept;
extern "C" int32_t getInferLibPatchVersion() noexcept;
extern "C" int32_t getInferLibBuildVersion() noexcept;

#endif
