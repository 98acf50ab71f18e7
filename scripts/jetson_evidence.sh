#!/usr/bin/env bash
# What a board says, in one file: jetson_evidence.sh BUNDLE [FOLDER]. The ten minutes of docs/tutorials/jetson.md.
# Every command's output and exit code is kept; a failing one does not stop the others. No image and no file name of
# a patient goes in: the frames are phantoms. PYTHON=... and MINUTES=... (limit of one command) change the defaults.
set -u
bundle=${1:?usage: jetson_evidence.sh BUNDLE [FOLDER]}
out=${2:-jetson-evidence}
python=${PYTHON:-python3}
limit=$((${MINUTES:-10} * 60))
mkdir -p "$out" || exit 73
: >"$out/summary.txt"
failed=0

keep() {  # keep NAME COMMAND...: output into NAME.txt, one line into the summary
  local name=$1 code begun=$SECONDS
  shift
  timeout "$limit" "$@" >"$out/$name.txt" 2>&1 </dev/null
  code=$?
  printf '%s exit %s, %s s: %s\n' "$name" "$code" "$((SECONDS - begun))" "$(tail -n 1 "$out/$name.txt" | cut -c1-160)" |
    tee -a "$out/summary.txt"
  [ "$code" -eq 0 ] || failed=$((failed + 1))
}

optional() {  # optional NAME COMMAND...: only where the board has the command; it does not count as a failure
  if command -v "$2" >/dev/null 2>&1; then
    local before=$failed
    keep "$@"
    failed=$before
  else
    printf '%s not here: %s\n' "$1" "$2" | tee -a "$out/summary.txt"
  fi
}

edge() { "$python" -m tinyusfm_edge "$@"; }
export -f edge
export python

optional release cat /etc/nv_tegra_release
optional power nvpmodel -q
optional clocks jetson_clocks --show
optional packages "$python" -m pip freeze
keep system uname -srm
keep doctor bash -c 'edge doctor --json "$1/doctor.json"' - "$out"
keep build bash -c 'edge build "$2" --json "$1/build.json"' - "$out" "$bundle"
keep verify bash -c 'edge verify "$2" --json "$1/verify.json"' - "$out" "$bundle"
keep run bash -c 'edge run "$2" phantom:0-49 --jsonl "$1/run.jsonl"' - "$out" "$bundle"
keep profile bash -c 'edge profile "$2" --fps 30 --duration 60 --json "$1/profile.json"' - "$out" "$bundle"
keep tune bash -c 'edge tune "$2" --budget-ms 16 --out "$1/tune"' - "$out" "$bundle"
rm -rf "$out/tune/variants"

tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")" || exit 73
printf '%s commands failed; send %s\n' "$failed" "$out.tar.gz"
[ "$failed" -eq 0 ]
