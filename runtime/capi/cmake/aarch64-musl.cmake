# Static 64-bit Arm programs from Linux by zig, for Android's and other Linux kernels: needs ZIG_BIN, a folder with the
# compilers (scripts/capi_deps.sh musl makes it):
#   -DCMAKE_TOOLCHAIN_FILE=runtime/capi/cmake/aarch64-musl.cmake -DZIG_BIN=build/capi-deps/zig/wrapped
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG_BIN)
set(CMAKE_C_COMPILER ${ZIG_BIN}/cc)
set(CMAKE_CXX_COMPILER ${ZIG_BIN}/c++)
set(CMAKE_AR ${ZIG_BIN}/ar CACHE FILEPATH "")
set(CMAKE_RANLIB ${ZIG_BIN}/ranlib CACHE FILEPATH "")
set(CMAKE_EXE_LINKER_FLAGS_INIT -static)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
set(CMAKE_FIND_ROOT_PATH_MODE_LIBRARY ONLY)
set(CMAKE_FIND_ROOT_PATH_MODE_INCLUDE ONLY)
