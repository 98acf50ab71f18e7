#!/usr/bin/env bash
# The readers under libFuzzer with AddressSanitizer and UBSan: fuzz.sh [SECONDS], for each of manifest, signature, model,
# ring and ring under tue_shm_guard, or of those that READERS names. What is found new goes to build/fuzz/corpus, a crash
# to build/fuzz/crash-*. The broken control, the ring's reader without one of its checks, has to crash within a million runs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
seconds=${1:-600}
readers=${READERS:-manifest signature model ring ring_guarded}
control_runs=1000000
export ASAN_OPTIONS=allocator_may_return_null=1:max_allocation_size_mb=1024:detect_leaks=1
cmake -S runtime/capi -B build/fuzz -DTUSFM_FUZZ=ON -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ >/dev/null
cmake --build build/fuzz --parallel 2 --target fuzz_manifest fuzz_signature fuzz_model fuzz_ring fuzz_ring_guarded fuzz_ring_broken >/dev/null
for reader in $readers; do
  mkdir -p "build/fuzz/corpus/$reader"
  build/fuzz/fuzz/fuzz_$reader -max_total_time="$seconds" -timeout=20 -rss_limit_mb=3000 -max_len=65536 -print_final_stats=1 \
    -artifact_prefix="build/fuzz/crash-$reader-" "build/fuzz/corpus/$reader" "runtime/capi/fuzz/seeds/${reader%_guarded}" 2>"build/fuzz/$reader.log" ||
    { tail -40 "build/fuzz/$reader.log"; exit 1; }
  echo "$reader: $(grep -o 'Done [0-9]* runs' "build/fuzz/$reader.log"), $(grep -o 'cov: [0-9]*' "build/fuzz/$reader.log" | tail -1)"
done
rm -rf build/fuzz/control # what is found new goes to the first folder: the control starts anew each time
mkdir build/fuzz/control
build/fuzz/fuzz/fuzz_ring_broken -runs=$control_runs -artifact_prefix=build/fuzz/control- build/fuzz/control runtime/capi/fuzz/seeds/ring 2>build/fuzz/control.log &
if wait $!; then
  echo "the broken control was not found"
  exit 1
fi
rm -f "/dev/shm/tusfm-fuzz-$!" # it ended before it could
grep -m1 -o 'heap-buffer-overflow' build/fuzz/control.log
