"""How fast this machine multiplies matrices: the floor under every latency of the benchmark.

``python benchmarks/gemm_floor.py --threads 1`` prints a table and one JSON line. Each precision is measured with the
fastest routine that torch carries: float32 by oneDNN on a packed weight and by MKL (what eager uses), bfloat16 by
oneDNN, int8 by ``torch._int_mm``. The best over the shapes counts, since a floor must not be too high.

It does not know the model beyond the shape of its widest linear.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch

SHAPES = ((197, 192, 768), (197, 768, 192), (784, 1152, 128), (512, 512, 512), (1024, 1024, 1024))
"""Rows, inner, columns: the MLP's two linears, a 3x3 convolution as a product, and two that suit any library."""
SECONDS = 0.15
"""Time spent on one shape and precision."""


def gemm_floor(threads: int, only: str = "") -> dict[str, dict[str, float]]:
    """Measures billions of operations a second (one multiplication and one addition are two).

    Args:
        threads: threads of torch.
        only: beginning of the precisions' names that are measured; all by default.

    Returns:
        precision -> shape as text -> GOP/s, with the best under ``"best"``.
    """
    torch.set_num_threads(threads)
    found: dict[str, dict[str, float]] = {}
    for name, make in ROUTINES.items():
        if not name.startswith(only):
            continue
        speeds = {}
        for rows, inner, columns in SHAPES:
            operations = 2.0 * rows * inner * columns
            speeds[f"{rows}x{inner}x{columns}"] = operations / _best_seconds(make(rows, inner, columns)) / 1e9
        found[name] = {**speeds, "best": max(speeds.values())}
    return found


def _best_seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    best, stop = float("inf"), time.perf_counter() + SECONDS
    while time.perf_counter() < stop:
        started = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - started)
    return best


def _fp32_mkl(rows: int, inner: int, columns: int) -> Callable[[], object]:
    a, b = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    return lambda: torch.mm(a, b, out=out)


def _packed(rows: int, inner: int, columns: int, dtype: torch.dtype) -> Callable[[], object]:
    a, weight = torch.randn(rows, inner).to(dtype), torch.randn(columns, inner).to(dtype)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda: torch.ops.mkldnn._linear_pointwise(a, packed, None, "none", [], "")


def _fp32_onednn(rows: int, inner: int, columns: int) -> Callable[[], object]:
    return _packed(rows, inner, columns, torch.float32)


def _bf16_onednn(rows: int, inner: int, columns: int) -> Callable[[], object]:
    return _packed(rows, inner, columns, torch.bfloat16)


def _int8(rows: int, inner: int, columns: int) -> Callable[[], object]:
    a = torch.randint(-127, 127, (rows, inner), dtype=torch.int8)
    b = torch.randint(-127, 127, (inner, columns), dtype=torch.int8)
    return lambda: torch._int_mm(a, b)


ROUTINES = {"fp32": _fp32_onednn, "fp32 (MKL)": _fp32_mkl, "bf16": _bf16_onednn, "int8": _int8}
"""Precision -> maker of one product."""


def main() -> None:
    """Command line of the measurement."""
    parser = argparse.ArgumentParser(description="matrix products a second")
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    floor = gemm_floor(threads)
    print(f"{'precision':12} {'best GOP/s':>10}   by shape (rows x inner x columns), {threads} thread(s)")
    for name, speeds in floor.items():
        shapes = "  ".join(f"{shape} {speed:.0f}" for shape, speed in speeds.items() if shape != "best")
        print(f"{name:12} {speeds['best']:10.0f}   {shapes}")
    print(json.dumps({"threads": threads, "gops": floor}))


if __name__ == "__main__":
    main()
