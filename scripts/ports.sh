#!/usr/bin/env bash
# The checks on CPUs and systems that this machine is not: ports.sh arm64 | musl | windows | macos | identity. Each builds
# under build/, says what it did and what it could not do, and ends with 1 if an answer differs that must not. What passed of
# arm64 is not done again: the command goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$PWD/${VENV:-.venv}/bin/python
deps=$PWD/build/capi-deps
ports=$PWD/build/ports
arm_tree=$PWD/build/arm64/tree
failed=0

say() { printf '\n== %s\n' "$*"; }
check() { "$@" || { echo "FAILED: $*"; failed=1; }; }

wheel() { "$python" -c "from importlib.util import find_spec as f; print(f('$1').submodule_search_locations[0])"; }

configure() {  # configure FOLDER OPTIONS...: the C runtime with every engine whose header is there, and its test programs
  local folder=$1
  shift
  cmake -S runtime/capi -B "$folder" -DTUSFM_WERROR=ON -DTUSFM_STUB=ON -DTUSFM_ORT_INCLUDE="$deps/include/onnxruntime" "$@" >"$folder.log" 2>&1 &&
    cmake --build "$folder" --parallel 2 >>"$folder.log" 2>&1 || { tail -30 "$folder.log"; exit 1; }
}

bundles() {  # a bundle of all targets, smaller copies, images, and what this machine answers
  mkdir -p "$ports"
  if [ ! -d "$ports/fetal-head.bundle" ]; then
    say "a bundle of four targets (minutes)"
    "$python" scripts/ports.py export "$ports/fetal-head.bundle" >/dev/null
  fi
  [ -d "$ports/four.bundle" ] || "$python" scripts/ports.py prepare "$ports/fetal-head.bundle" "$ports"
  configure "$PWD/build/ports-here" -DTUSFM_OPENVINO_INCLUDE="$(wheel openvino)/include"
  cd "$ports"
  ../ports-here/tests/answers four.bundle integer - list.txt >here-integer.txt
  ../ports-here/tests/answers four.bundle onnx "$(wheel onnxruntime)/capi" list.txt >here-onnx.txt
  ../ports-here/tests/answers four.bundle openvino "$(wheel openvino)/libs" list.txt >here-openvino.txt
  cd - >/dev/null
}

emulated() {  # emulated CPU PROGRAM ARGUMENTS...: by qemu 10, on Debian's libraries for aarch64
  local cpu=$1
  shift
  QEMU_LD_PREFIX=$deps/arm64 QEMU_CPU=$cpu "$deps/bookworm-backports-amd64/usr/bin/qemu-aarch64" "$@"
}

emulated_python() {  # emulated_python CPU ARGUMENTS...
  local cpu=$1
  shift
  # qemu's openvino warns about a file of /sys that it has not
  PYTHONHOME=$deps/arm64/usr PYTHONPATH=$arm_tree:$deps/arm64-site PYTHONDONTWRITEBYTECODE=1 ORT_DISABLE_TELEMETRY=1 \
    CC="aarch64-linux-gnu-gcc" emulated "$cpu" "$deps/arm64/usr/bin/python3.11" "$@"
}

# ---- make arm64: steps that are done once, each within its time; a step whose inputs changed is done again ----

steps=$ports/steps

step() {  # step NAME SECONDS INPUTS FUNCTION...: INPUTS is a digest of what the answer depends on
  local name=$1 limit=$2 inputs=$3 code=0 cpu
  shift 3
  case " ${ARM64_STEPS:-$name} " in *" $name "*) ;; *) return 0 ;; esac
  mkdir -p "$steps"
  if [ "$(head -1 "$steps/$name.passed" 2>/dev/null)" = "$inputs" ]; then
    say "$name: passed before"
    tail -n 4 "$steps/$name.txt"
    return
  fi
  limit=$((limit * ${PATIENCE:-1}))
  say "$name (at most $limit s)"
  rm -f "$steps/$name.passed"
  { TIMEFORMAT='%U %S'; time timeout --kill-after=20 "$limit" bash scripts/ports.sh arm64-step "$@" >"$steps/$name.txt" 2>&1 || code=$?; } 2>"$steps/$name.time"
  cpu=$(awk '{ print int($1 + $2 + 0.5) }' "$steps/$name.time")
  cat "$steps/$name.txt"
  case $code in
  0) printf '%s\n%s\n' "$inputs" "$cpu" >"$steps/$name.passed"; echo "-- $name: passed, $cpu s of CPU time" ;;
  124 | 137) echo "-- $name: no answer within $limit s ($cpu s of CPU time): PATIENCE=4 make arm64 gives four times as long"; failed=1 ;;
  *) echo "-- $name: FAILED, $cpu s of CPU time"; failed=1 ;;
  esac
}

digest() { find "$@" -type f ! -path "*/__pycache__/*" -print0 | LC_ALL=C sort -z | xargs -0 cat | sha256sum | cut -c1-16; }

arm64() {  # ARM64_STEPS="c-onnx session" takes these alone
  step packages 1800 "$(digest scripts/capi_deps.sh)" packages_here
  step bundles 1800 "$(digest scripts/ports.py runtime)" bundles
  step cross 900 "$(digest runtime tests/runtime scripts/ports.sh)" cross
  [ -e build/arm64/tests/answers ] && [ -d build/arm64/tree ] || { echo "the steps before must pass first"; exit 1; }
  local c python
  c=$(digest build/arm64/libtinyusfm.so build/arm64/tests/answers "$ports/four.bundle/manifest.json" "$ports/one.bundle/manifest.json" scripts/ports.py)
  python=$(digest build/arm64/tree/tinyusfm_{runtime,edge} build/arm64/tree/tests/runtime/{test_native,test_integer_engine,integer_models}.py "$ports/four.bundle/manifest.json" "$ports/one.bundle/manifest.json")
  step doctor 600 "$python" doctor
  step c-integer 600 "$c" c_answers integer cortex-a76 four.bundle list.txt
  step c-onnx 1500 "$c" c_answers onnx cortex-a76 four.bundle list.txt
  step c-openvino 1500 "$c" c_answers openvino cortex-a76 four.bundle list.txt
  step c-integer-a72 600 "$c" c_answers integer cortex-a72 four.bundle list.txt
  step c-onnx-a72 900 "$c" c_answers onnx cortex-a72 one.bundle one.txt
  step c-openvino-a72 900 "$c" c_answers openvino cortex-a72 one.bundle one.txt
  step network 600 "$c" network
  step native 900 "$python" native
  step definition 900 "$python" definition
  step session 900 "$python" sessions onnx cortex-a76 four.bundle
  step litert 900 "$python" sessions litert cortex-a76 four.bundle
  step litert-a72 900 "$python" sessions litert cortex-a72 one.bundle
  summary
}

summary() {
  say "emulated 64-bit Arm"
  local name total=0 cpu
  for name in doctor c-integer c-onnx c-openvino c-integer-a72 c-onnx-a72 c-openvino-a72 network native definition session litert litert-a72; do
    cpu=$(sed -n 2p "$steps/$name.passed" 2>/dev/null || true)
    printf '%-16s %s\n' "$name" "${cpu:+passed, $cpu s of CPU time}${cpu:-not passed}" | sed 's/\(CPU time\).*/\1/'
    total=$((total + ${cpu:-0}))
  done
  awk -v s="$total" 'BEGIN { printf "%-16s %.1f CPU-minutes of what passed; 10 is the aim\n", "together", s / 60 }'
}

packages_here() { bash scripts/capi_deps.sh arm64; }

cross() {
  configure "$PWD/build/arm64" -DCMAKE_TOOLCHAIN_FILE="$PWD/runtime/capi/cmake/aarch64-linux-gnu.cmake" \
    -DCMAKE_FIND_ROOT_PATH="$deps/arm64" -DTUSFM_OPENVINO_INCLUDE="$deps/arm64-site/openvino/include" \
    -DTHREADS_PREFER_PTHREAD_FLAG=ON -DCMAKE_EXE_LINKER_FLAGS="-Wl,-rpath-link,$deps/arm64/usr/lib/aarch64-linux-gnu"
  tree
}

doctor() { cd build/arm64/tree && emulated_python cortex-a76 -m tinyusfm_edge doctor; }

native() {
  cd build/arm64/tree
  emulated_python cortex-a76 -m pytest -q -p no:cacheprovider tests/runtime/test_native.py
}

definition() {  # random models: NEON with and without dot products and the portable form against the numpy definition
  cd build/arm64/tree
  emulated_python cortex-a76 -m pytest -q -p no:cacheprovider tests/runtime/test_integer_engine.py
}

tree() {  # the Python packages with kernels for aarch64
  local tree=$PWD/build/arm64/tree include
  include=$("$python" -c "import sysconfig; print(sysconfig.get_paths()['include'])")
  rm -rf "$tree"
  mkdir -p "$tree"
  cp -r runtime/tinyusfm_runtime export/tinyusfm_export calibration/tinyusfm_calibration tinyusfm_edge tests "$tree"
  mkdir -p "$tree/runtime" && cp -r runtime/capi "$tree/runtime/"
  find "$tree" -name __pycache__ -prune -exec rm -rf {} +
  printf '[pytest]\n' >"$tree/pytest.ini"
  aarch64-linux-gnu-gcc -std=c11 -O3 -fPIC -shared -fvisibility=hidden -ffp-contract=off -fno-math-errno -I"$include" \
    -DPy_LIMITED_API=0x030A0000 -Iruntime/capi runtime/capi/{native_module,preprocess,components,moments,shape,ellipse,measure,second_pass,crc64}.c \
    runtime/capi/integer_*.c -lpthread -lm -o "$tree/tinyusfm_runtime/_native.abi3.so"
}

c_answers() {  # c_answers TARGET CPU BUNDLE LIST: opening compares the golden frames; then the images of the list, one pass each
  local folder=- out=arm64-$1-$2.txt
  [ "$1" = onnx ] && folder=$deps/arm64-site/onnxruntime/capi
  [ "$1" = openvino ] && folder=$deps/arm64-site/openvino/libs
  cd "$ports"
  head -1 list.txt >one.txt
  head -4 list.txt >golden.txt
  head -$((1 + $(wc -l <"$4"))) "here-$1.txt" >"here-part-$1-$2.txt"
  emulated "$2" ../arm64/tests/answers "$3" "$1" "$folder" "$4" >"$out"
  head -1 "$out"
  "$python" ../../scripts/ports.py compare "here-part-$1-$2.txt" "$out" "$1"
}

sessions() {  # sessions TARGET CPU BUNDLE: opening compares the golden frames; LiteRT has no C engine, this is its check
  emulated_python "$2" - "$ports/$3" "$1" <<'PYTHON'
import sys
from tinyusfm_runtime.session import Session

with Session.open(sys.argv[1], target=sys.argv[2], threads=1, second_pass=False) as session:
    report = session.run_golden()
    print(f"{session.description}; {len(session.golden_frames)} golden frames, {bool(report)}")
    sys.exit(0 if report else 1)
PYTHON
}

network() {  # the network alone, byte by byte: every CPU model and the portable form on 32-bit Arm
  local flags=(-std=c11 -O3 -static -ffp-contract=off -Iruntime/capi -DTUE_API= runtime/capi/tests/integer_check.c runtime/capi/integer_*.c -lpthread)
  local table=$ports/model.table frames=$ports/frames.bin qemu=$deps/bookworm-backports-amd64/usr/bin
  "$python" scripts/ports.py frames "$ports/four.bundle" "$ports" 8
  aarch64-linux-gnu-gcc "${flags[@]}" -o build/arm64/check_aarch64
  arm-linux-gnueabihf-gcc "${flags[@]}" -o build/arm64/check_armhf
  build/ports-here/tests/integer_check "$table" "$frames" >"$ports/here-network.txt" 2>/dev/null
  QEMU_CPU=cortex-a76 "$qemu/qemu-aarch64" build/arm64/check_aarch64 "$table" "$frames" 2 neondot >"$ports/arm64-a76.txt"
  QEMU_CPU=cortex-a72 "$qemu/qemu-aarch64" build/arm64/check_aarch64 "$table" "$frames" 2 neon >"$ports/arm64-a72.txt"
  "$qemu/qemu-arm" build/arm64/check_armhf "$table" "$frames" 1 >"$ports/armhf.txt"
  for name in arm64-a76 arm64-a72 armhf; do
    head -"$(wc -l <"$ports/$name.txt")" "$ports/here-network.txt" >"$ports/here-head.txt"
    check test -s "$ports/$name.txt"
    check cmp "$ports/here-head.txt" "$ports/$name.txt" && echo "$name: $(wc -l <"$ports/$name.txt") frames, the same bytes"
  done
}

windows() {
  say "packages: MinGW-w64, Wine, ONNX Runtime for Windows, jansson and mbedTLS from source"
  bash scripts/capi_deps.sh windows
  bundles
  configure "$PWD/build/windows" -DCMAKE_TOOLCHAIN_FILE="$PWD/runtime/capi/cmake/mingw-w64.cmake" \
    -DCMAKE_FIND_ROOT_PATH="$deps/windows" -DTUSFM_STATIC_DEPS=ON
  ls -l build/windows/libtinyusfm.dll build/windows/example_c.exe
  if ! command -v wine >/dev/null; then
    echo "Wine is not here: compiled and linked, not run"
    return
  fi
  cp build/windows/libtinyusfm.dll build/windows/tests/
  # not below the checkout: it links to /, and setuptools follows links
  WINEPREFIX=$(mktemp -d)/wine
  export WINEPREFIX WINEDEBUG=-all
  # Linux wants to be asked before a program uses AMX. ONNX Runtime for Windows uses it where the CPU has it, and Wine 8 does not ask
  if grep -q amx_tile /proc/cpuinfo; then
    printf '%s\n' '#include <sys/syscall.h>' '#include <unistd.h>' \
      '__attribute__((constructor)) static void ask(void) { syscall(SYS_arch_prctl, 0x1023, 18); }' >"$ports/amx.c"
    cc -shared -fPIC "$ports/amx.c" -o "$ports/amx.so"
    export LD_PRELOAD=$ports/amx.so
  fi
  cd "$ports"
  for target in integer onnx; do
    say "Wine: $target"
    wine ../windows/tests/answers.exe four.bundle $target "Z:${deps//\//\\}\\windows-site\\onnxruntime\\capi" list.txt 2>windows.err | tr -d '\r' >windows-$target.txt || true
    head -1 windows-$target.txt
    check "$python" ../../scripts/ports.py compare here-$target.txt windows-$target.txt $target
  done
  say "Wine: tusfm-check"
  check wine ../windows/tusfm-check.exe four.bundle --engine integer 2>/dev/null
  cd - >/dev/null
}

macos() {
  say "cross-compiling with zig; nothing runs"
  bash scripts/capi_deps.sh macos
  local target file name
  export PYTHONPATH=$deps/zig
  for target in aarch64-macos x86_64-macos; do
    mkdir -p "build/macos/$target"
    # one by one: zig 0.17 has crashed over all of them in one command
    for file in runtime/capi/{preprocess,components,moments,shape,ellipse,measure,second_pass,crc64}.c runtime/capi/integer_*.c; do
      name=$(basename "${file%.c}")
      "$python" -m ziglang cc -target $target -std=c11 -O2 -fvisibility=hidden -ffp-contract=off -Iruntime/capi -DTUE_API= -c "$file" \
        -o "build/macos/$target/$name.o"
    done
    "$python" -m ziglang cc -target $target -shared "build/macos/$target"/*.o -o "build/macos/libtue-$target.dylib"
    ls -l "build/macos/libtue-$target.dylib"
  done
}

musl() {  # tusfm-check as one static program for 64-bit Arm, run emulated on both kinds of CPU; tinyusfm-run has to build
  say "packages: zig, jansson and mbedTLS from source, qemu 10"
  bash scripts/capi_deps.sh musl
  local qemu=$deps/bookworm-backports-amd64/usr/bin/qemu-aarch64 program=$PWD/build/musl/tusfm-check bundle broken code=0
  say "cross-compiling with zig"
  mkdir -p build
  cmake -S runtime/capi -B build/musl -DCMAKE_TOOLCHAIN_FILE="$PWD/runtime/capi/cmake/aarch64-musl.cmake" -DZIG_BIN="$deps/zig/wrapped" \
    -DCMAKE_FIND_ROOT_PATH="$deps/musl" -DBUILD_SHARED_LIBS=OFF -DTUSFM_STATIC_DEPS=ON -DTUSFM_CXX=OFF >build/musl.log 2>&1 &&
    cmake --build build/musl --parallel 2 --target tusfm-check tinyusfm-run >>build/musl.log 2>&1 || { tail -30 build/musl.log; exit 1; }
  ls -l "$program"
  file "$program" 2>/dev/null || true
  bundle=$PWD/tests/data/bundles/schema2
  [ -d "$ports/four.bundle" ] && bundle=$ports/four.bundle
  say "emulated: $(basename "$bundle"), the integer engine on Cortex-A76 and A72"
  check env QEMU_CPU=cortex-a76 "$qemu" "$program" "$bundle" --engine integer
  check env QEMU_CPU=cortex-a72 "$qemu" "$program" "$PWD/tests/data/bundles/schema2" --engine integer --json
  broken=$(mktemp -d)/broken.bundle # a byte of the model is another one
  cp -r "$PWD/tests/data/bundles/schema2" "$broken"
  printf '\1' | dd of="$(find "$broken/artefacts" -type f | head -1)" bs=1 seek=400 conv=notrunc status=none
  QEMU_CPU=cortex-a76 "$qemu" "$program" "$broken" || code=$?
  [ "$code" = 2 ] && echo "a bundle with another byte: refused" || { echo "FAILED: it ended with $code"; failed=1; }
  rm -rf "$(dirname "$broken")"
}

identity() {  # on x86: all golden frames and 100 real ones, in every instruction set here
  bundles
  "$python" scripts/ports.py frames "$ports/fetal-head.bundle" build/identity 100
  check build/ports-here/tests/integer_check build/identity/model.table build/identity/frames.bin >build/identity/answers.txt
  echo "$(wc -l <build/identity/answers.txt) frames: the same bytes in each of these sets"
}

case ${1:-} in
arm64-step) shift; "$@"; exit $failed ;;
arm64 | musl | windows | macos | identity) "$1" ;;
*) echo "usage: ports.sh arm64 | musl | windows | macos | identity" >&2; exit 2 ;;
esac
times
exit $failed
