#!/usr/bin/env bash
# What the C runtime is built with, from Debian's packages: compilers and libraries into the system (root), ONNX
# Runtime's C header from a later Debian into build/capi-deps, unpacked only. Words: native (default), arm64, musl, windows,
# macos.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export DEBIAN_FRONTEND=noninteractive
deps=$PWD/build/capi-deps
header_suite=trixie

mirror() {  # the mirror that this system's own sources name
  sed -n 's/^URIs: *\([^ ]*\).*/\1/p' /etc/apt/sources.list.d/debian.sources 2>/dev/null | head -1 | grep . ||
    sed -n 's/^deb \(\[[^]]*\] \)\?\([^ ]*\) .*/\2/p' /etc/apt/sources.list | head -1
}

unpack() {  # unpack SUITE ARCHITECTURE PACKAGE...: into $deps/SUITE-ARCHITECTURE, nothing is installed
  local suite=$1 arch=$2 folder=$deps/apt-$1-$2
  shift 2
  mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial" "$deps/$suite-$arch"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) $suite main" >"$folder/sources.list"
  local options=(-o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$folder/lists"
    -o "Dir::Cache=$folder/cache" -o "APT::Architecture=$arch" -o "APT::Architectures::=$arch" -o APT::Sandbox::User=root
    -o APT::Update::Post-Invoke= -o APT::Update::Post-Invoke-Success=)
  apt-get "${options[@]}" update -qq
  (cd "$folder" && apt-get "${options[@]}" download -qq "$@" && for package in *.deb; do dpkg -x "$package" "$deps/$suite-$arch"; done)
  rm -rf "$folder"
}

install() { apt-get install -y -qq --no-install-recommends "$@" >/dev/null; }

native() {
  apt-get update -qq
  install cmake pkg-config gcc g++ clang libclang-rt-14-dev valgrind libjansson-dev libmbedtls-dev
  [ -d "$deps/include/onnxruntime" ] && return
  unpack "$header_suite" "$(dpkg --print-architecture)" libonnxruntime-dev
  mkdir -p "$deps/include"
  cp -r "$deps/$header_suite-$(dpkg --print-architecture)/usr/include/onnxruntime" "$deps/include/"
}

# Everything for an emulated 64-bit Arm: a root folder that no script of a package has run in, qemu 10 (7.2 crashes
# ONNX Runtime), the wheels of constraints.txt for aarch64. About 700 MB under build/capi-deps.
arm64() {
  install mmdebstrap arch-test gcc-aarch64-linux-gnu g++-aarch64-linux-gnu libc6-dev-arm64-cross \
    gcc-arm-linux-gnueabihf libc6-dev-armhf-cross cmake
  if [ ! -e "$deps/arm64/usr/bin/python3.11" ]; then
    rm -rf "$deps/arm64"
    mmdebstrap --quiet --architectures=arm64 --variant=extract --include=python3-minimal,python3,libpython3.11,libstdc++6,libgcc-s1,zlib1g,libjansson-dev,libmbedtls-dev \
      bookworm "$deps/arm64" "$(mirror)"
  fi
  # 32-bit Arm needs only its C library, which the cross compiler brings
  [ -x "$deps/bookworm-backports-amd64/usr/bin/qemu-aarch64" ] || unpack bookworm-backports amd64 qemu-user
  [ -d "$deps/arm64-site/openvino" ] && [ -d "$deps/arm64-site/ai_edge_litert" ] && return
  local tags=(--platform manylinux2014_aarch64)
  for glibc in 17 27 28 31 35; do tags+=(--platform "manylinux_2_${glibc}_aarch64"); done
  pip_for "$deps/arm64-site" "${tags[@]}" --abi cp311 --abi abi3 --abi none -- \
    numpy onnxruntime openvino openvino-telemetry packaging flatbuffers protobuf ai-edge-litert backports.strenum tqdm ml-dtypes \
    typer click shellingham rich pygments markdown-it-py mdurl annotated-doc pydantic pydantic-core annotated-types typing-extensions typing-inspection pytest iniconfig pluggy hypothesis sortedcontainers
}

# MinGW-w64, Wine, ONNX Runtime's Windows wheel, and jansson and mbedTLS built from Debian's source packages.
windows() {
  install gcc-mingw-w64-x86-64-posix g++-mingw-w64-x86-64-posix cmake dpkg-dev
  install wine wine64 || echo "Wine cannot be had: what is built for Windows is not run" >&2
  [ -d "$deps/windows-site/onnxruntime" ] ||
    pip_for "$deps/windows-site" --platform win_amd64 --abi cp311 --abi abi3 --abi none -- onnxruntime
  [ -e "$deps/windows/lib/libmbedcrypto.a" ] && return
  from_source windows "$PWD/runtime/capi/cmake/mingw-w64.cmake"
}

# zig as a cross compiler for static 64-bit Arm programs, jansson and mbedTLS built by it, and qemu to run them.
musl() {
  install cmake dpkg-dev
  [ -x "$deps/bookworm-backports-amd64/usr/bin/qemu-aarch64" ] || unpack bookworm-backports amd64 qemu-user
  [ -d "$deps/zig/ziglang" ] || python3 -m pip install -q --target "$deps/zig" ziglang
  mkdir -p "$deps/zig/wrapped"
  local word
  for word in cc c++ ar ranlib; do
    printf '#!/bin/sh\nPYTHONPATH=%s exec python3 -m ziglang %s%s "$@"\n' "$deps/zig" "$word" \
      "$([[ $word = c* ]] && echo ' -target aarch64-linux-musl')" >"$deps/zig/wrapped/$word"
    chmod +x "$deps/zig/wrapped/$word"
  done
  [ -e "$deps/musl/lib/libmbedcrypto.a" ] || from_source musl "$PWD/runtime/capi/cmake/aarch64-musl.cmake" -DZIG_BIN="$deps/zig/wrapped" \
    -DJANSSON_BUILD_SHARED_LIBS=OFF -DUSE_SHARED_MBEDTLS_LIBRARY=OFF
}

from_source() {  # from_source NAME TOOLCHAIN CMAKE-OPTIONS...: jansson and mbedTLS of Debian's source packages, into $deps/NAME
  local place=$1 toolchain=$2 name
  shift 2
  for name in jansson mbedtls; do
    source_of "$name"
    cmake -S "$deps/source/$name" -B "$deps/source/$name-$place" -DCMAKE_TOOLCHAIN_FILE="$toolchain" \
      -DCMAKE_INSTALL_PREFIX="$deps/$place" -DCMAKE_BUILD_TYPE=Release -DJANSSON_BUILD_DOCS=OFF -DJANSSON_WITHOUT_TESTS=ON \
      -DJANSSON_EXAMPLES=OFF -DENABLE_PROGRAMS=OFF -DENABLE_TESTING=OFF "$@" >/dev/null
    cmake --build "$deps/source/$name-$place" --parallel 2 --target install >/dev/null
  done
}

source_of() {  # source_of NAME: Debian's source package, unpacked and patched into $deps/source/NAME
  local folder=$deps/source/apt
  rm -rf "$folder" "$deps/source/$1"
  mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
  echo "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $(mirror) bookworm main" >"$folder/sources.list"
  local options=(-o "Dir::Etc::SourceList=$folder/sources.list" -o Dir::Etc::SourceParts=- -o "Dir::State::Lists=$folder/lists"
    -o "Dir::Cache=$folder/cache" -o APT::Sandbox::User=root -o APT::Update::Post-Invoke= -o APT::Update::Post-Invoke-Success=)
  apt-get "${options[@]}" update -qq
  (cd "$folder" && apt-get "${options[@]}" source -qq "$1" >/dev/null)
  mv "$folder/$1"-*/ "$deps/source/$1"
  rm -rf "$folder"
}

pip_for() {  # pip_for FOLDER PIP-OPTIONS... -- PACKAGES...: wheels for another machine, the versions of constraints.txt
  local folder=$1 options=()
  shift
  while [ "$1" != -- ]; do options+=("$1"); shift; done
  shift
  local names=()
  for package in "$@"; do names+=("$(sed -n "s/^\($package==[^;]*\).*/\1/p" constraints.txt | grep . || echo "$package")"); done
  rm -rf "$folder"
  python3 -m pip install -q --no-cache-dir --no-deps --only-binary=:all: --target "$folder" --python-version 3.11 \
    --implementation cp "${options[@]}" "${names[@]}"
}

for word in "${@:-native}"; do
  case $word in
  native) native ;;
  arm64) native && arm64 ;;
  musl) native && musl ;;
  windows) native && windows ;;
  macos) native && python3 -m pip install -q --target "$deps/zig" ziglang ;;
  *) echo "words are: native, arm64, musl, windows, macos" >&2; exit 2 ;;
  esac
done
