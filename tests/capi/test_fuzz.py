"""The readers under libFuzzer for a few seconds each; ``make fuzz`` gives each ten minutes."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from tests.capi.conftest import NEEDS, SOURCE, run
from tests.capi.conftest import _has_libraries as has_libraries

SECONDS = 20
CONTROL_RUNS = 1_000_000
"""The control was found within 24,000 inputs in each of 30 tries."""
READERS = ("manifest", "signature", "model", "ring", "ring_guarded")
REACHED = {
    "manifest": {"parse_files", "parse_artefacts", "spec_parse", "check_identity"},
    "signature": {"from_base64", "check_resources", "read_binding", "public_key_read"},
    "model": {"tue_int_run", "attention", "convolution", "depthwise", "gather", "resize"},
    "ring": {"frame_of", "result_of", "copy_content"},
    "ring_guarded": {"frame_in_place", "tue_shm_holds", "frame_of", "result_of", "copy_content", "shm_copy", "on_bus"},
}
"""By reader, functions that lie behind its first checks."""
TARGETS = ("fuzz_manifest", "fuzz_signature", "fuzz_model", "fuzz_ring", "fuzz_ring_guarded", "fuzz_ring_broken")


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fuzz targets; skips without clang and its runtime libraries."""
    if shutil.which("clang") is None or shutil.which("cmake") is None or not has_libraries():
        pytest.skip(NEEDS)
    folder = tmp_path_factory.mktemp("fuzz")
    probe = folder / "probe.c"
    probe.write_text("int LLVMFuzzerTestOneInput(const char *d, long n) { return d && n < 0; }\n", encoding="ascii")
    if subprocess.run(["clang", "-fsanitize=fuzzer", str(probe), "-o", str(folder / "probe")], check=False).returncode:
        pytest.skip("clang has no libFuzzer here: sudo make capi-deps brings libclang-rt")
    run(
        "cmake",
        "-S",
        SOURCE,
        "-B",
        folder,
        "-DTUSFM_FUZZ=ON",
        "-DTUSFM_WERROR=ON",
        "-DCMAKE_C_COMPILER=clang",
        "-DCMAKE_CXX_COMPILER=clang++",
    )
    run("cmake", "--build", folder, "--parallel", "2", "--target", *TARGETS)
    return folder / "fuzz"


def seeds_of(reader: str) -> Path:
    """The folder of a reader's seeds."""
    return SOURCE / "fuzz" / "seeds" / reader.removesuffix("_guarded")


def fuzz(program: Path, place: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Runs a target with these words; what it finds goes to a folder."""
    limits = "allocator_may_return_null=1:max_allocation_size_mb=1024"
    options = ["-timeout=20", "-rss_limit_mb=3000", "-max_len=65536", f"-artifact_prefix={place}/"]
    process = subprocess.Popen(
        [str(program), *options, *(str(word) for word in words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**os.environ, "ASAN_OPTIONS": limits},
    )
    try:
        said, errors = process.communicate(timeout=900)
    finally:
        process.kill()
        Path(f"/dev/shm/tusfm-fuzz-{process.pid}").unlink(missing_ok=True)  # left by one that ended in a defect
    return subprocess.CompletedProcess(process.args, process.returncode, said, errors)


def reached(program: Path, place: Path, seeds: Path) -> set[str]:
    """The functions that these seeds come to, without a change of them."""
    done = fuzz(program, place, "-runs=0", "-print_coverage=1", seeds)
    assert done.returncode == 0, done.stderr[-3000:]
    return set(re.findall(r"^COVERED_FUNC: hits: \d+ edges: \S+ (\S+)", done.stderr, re.MULTILINE))


@pytest.mark.parametrize("reader", READERS)
def test_no_input_harms_a_reader(reader: str, programs: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    done = fuzz(programs / f"fuzz_{reader}", tmp_path, f"-max_total_time={SECONDS}", corpus, seeds_of(reader))
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None and int(runs[1]) > 100


@pytest.mark.parametrize("reader", READERS)
def test_seeds_get_past_the_first_checks(reader: str, programs: Path, tmp_path: Path) -> None:
    assert REACHED[reader] <= reached(programs / f"fuzz_{reader}", tmp_path, seeds_of(reader))


def test_a_frame_of_a_time_to_come_gets_no_further(programs: Path, tmp_path: Path) -> None:
    """Seeds of a machine that was up for longer than this one are such frames."""
    seed = bytearray((seeds_of("ring") / "frames3").read_bytes())
    struct.pack_into("<Q", seed, 1 + 128 + 32, 1 << 62)
    struct.pack_into("<I", seed, 1 + 128 + 124, zlib.crc32(seed[1 + 128 + 8 : 1 + 128 + 124]))
    folder = tmp_path / "seeds"
    folder.mkdir()
    (folder / "late").write_bytes(seed)
    found = reached(programs / "fuzz_ring", tmp_path, folder)
    assert "frame_of" in found and "copy_content" not in found


def test_the_fuzzer_finds_a_reader_without_the_check_of_room(programs: Path, tmp_path: Path) -> None:
    """The broken control. No seed gives it away, and the reader with its check bears what was found."""
    corpus, found = tmp_path / "corpus", tmp_path / "found"
    corpus.mkdir()
    found.mkdir()
    broken = programs / "fuzz_ring_broken"
    assert fuzz(broken, found, "-runs=0", seeds_of("ring")).returncode == 0
    done = fuzz(broken, found, f"-runs={CONTROL_RUNS}", corpus, seeds_of("ring"))
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr, done.stderr[-3000:]
    (crash,) = found.glob("crash-*")
    assert fuzz(programs / "fuzz_ring", found, crash).returncode == 0
