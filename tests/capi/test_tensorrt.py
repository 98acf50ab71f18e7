"""The TensorRT engine of the C runtime: it compiles, and it calls what the installed libraries really have."""

from __future__ import annotations

import re
import shutil
import sysconfig
from pathlib import Path

import pytest

from tests.capi.conftest import ROOT, SOURCE, run

FAKE = ROOT / "tests" / "fakes" / "tensorrt"


def site_packages() -> list[Path]:
    """Where wheels are unpacked."""
    import site

    return [Path(folder) for folder in {*site.getsitepackages(), sysconfig.get_paths()["purelib"], *_more()}]


def _more() -> list[str]:
    import sys

    return [path for path in sys.path if path.endswith("site-packages")]


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_it_compiles_without_a_warning(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed: sudo make capi-deps")
    words = ["-std=c++17", "-Wall", "-Wextra", "-Wconversion", "-Werror", f"-I{FAKE}", f"-I{SOURCE / 'include'}"]
    run(compiler, *words, "-c", SOURCE / "engines" / "trt.cpp", "-o", tmp_path / "trt.o")


def declarations(text: str) -> dict[str, tuple[str, ...]]:
    """Function of CUDA -> its types, without names of arguments and defaults."""
    found = {}
    text = re.sub(r"__dv\([^)]*\)", "", text)  # defaults
    for name, arguments in re.findall(r"\b(cuda[A-Z]\w+)\s*\(([^()]*)\);", text):
        parts = (re.sub(r"\s*=.*", "", part).strip() for part in arguments.split(","))
        types = tuple(re.sub(r"\s+", "", re.sub(r"\b(enum|struct)\b|\w+$", "", part)) for part in parts)
        found.setdefault(name, types)
    return found


def test_cudas_functions_are_declared_as_in_its_header() -> None:
    header = next((p for f in site_packages() for p in f.glob("nvidia/cu*/include/cuda_runtime_api.h")), None)
    if header is None:
        pytest.skip("nvidia-cuda-runtime is not installed: pip install 'tinyusfm-edge[tensorrt]'")
    real = declarations(header.read_text(encoding="utf-8"))
    fake = declarations((FAKE / "cuda_runtime_api.h").read_text(encoding="utf-8"))
    assert len(fake) == 16 and {name: real.get(name) for name in fake} == fake


def test_the_library_exports_what_is_called() -> None:
    library = next((p for f in site_packages() for p in f.glob("tensorrt_rtx_libs/libtensorrt_rtx.so.1")), None)
    if library is None or shutil.which("nm") is None:
        pytest.skip("tensorrt-rtx is not installed: pip install 'tinyusfm-edge[tensorrt]'")
    listed = {line.split()[-1] for line in run("nm", "-D", "--defined-only", library).splitlines()}
    called = set(re.findall(r"getInferLib\w+(?=\(\))", (SOURCE / "engines" / "trt.cpp").read_text(encoding="utf-8")))
    assert len(called) == 4 and called | {"createInferRuntime_INTERNAL"} <= listed


@pytest.mark.needs_gpu
def test_on_a_real_gpu() -> None:
    pytest.skip(
        "needs: gpu. Build with -DTUSFM_TENSORRT=ON and open a bundle that was exported with --compute-capability"
    )
