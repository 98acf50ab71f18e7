"""The readers under libFuzzer for a few seconds each; ``make fuzz`` gives each ten minutes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.capi.conftest import NEEDS, SOURCE, run
from tests.capi.conftest import _has_libraries as has_libraries

SECONDS = 20
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


def fuzz(program: Path, seeds: Path, place: Path, seconds: int = SECONDS) -> subprocess.CompletedProcess[str]:
    """Runs a target on a copy of its seeds."""
    corpus = place / "corpus"
    corpus.mkdir()
    words = [
        f"-max_total_time={seconds}",
        "-timeout=20",
        "-rss_limit_mb=3000",
        "-max_len=65536",
        f"-artifact_prefix={place}/",
    ]
    limits = "allocator_may_return_null=1:max_allocation_size_mb=1024"
    return subprocess.run(
        [str(program), *words, str(corpus), str(seeds)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        timeout=900,
        env={**os.environ, "ASAN_OPTIONS": limits},
    )


@pytest.mark.parametrize("reader", ["manifest", "signature", "model", "ring", "ring_guarded"])
def test_no_input_harms_a_reader(reader: str, programs: Path, tmp_path: Path) -> None:
    done = fuzz(programs / f"fuzz_{reader}", SOURCE / "fuzz" / "seeds" / reader.removesuffix("_guarded"), tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = re.search(r"Done (\d+) runs", done.stderr)
    assert runs is not None and int(runs[1]) > 100


def test_the_fuzzer_finds_a_reader_that_is_told_of_too_much_room(programs: Path, tmp_path: Path) -> None:
    """The broken control."""
    done = fuzz(programs / "fuzz_ring_broken", SOURCE / "fuzz" / "seeds" / "ring", tmp_path, 120)
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr
