"""How the integer engine was compiled: tiles stay in registers, the library stays small."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

import tinyusfm_runtime

LIBRARY = Path(tinyusfm_runtime.__file__).with_name("_native.abi3.so")
PRODUCTS = re.compile(r"vpdpbusd|vpdpwssd|vpmaddubsw|vpmaddwd|sdot|smull")
STACK = re.compile(r"\(%[re][sb]p|\[sp")
TILES = ("tile_bytes", "tile_words")
"""The tiles that nearly all work is done in."""


def inner_loops(text: str) -> dict[str, list[tuple[int, int]]]:
    """Tile -> (products, accesses of the stack) of the smallest loop with products, once for each instruction set.

    Args:
        text: what ``objdump -d --no-show-raw-insn`` prints.
    """
    found: dict[str, list[tuple[int, int]]] = {}
    for name, body in re.findall(r"<(\w+)>:\n((?:\s+[0-9a-f]+:.*\n?)+)", text):
        lines = [(int(a, 16), rest) for a, rest in re.findall(r"\s*([0-9a-f]+):\s*(.*)", body)]
        loops = []
        for end, what in lines if name in TILES else ():
            back = re.match(r"(?:j\w+|b\.\w+)\s+([0-9a-f]+) <", what)
            if back and int(back[1], 16) < end:
                inside = [line for at, line in lines if int(back[1], 16) <= at <= end]
                products = sum(bool(PRODUCTS.search(line)) for line in inside)
                loops += [(len(inside), products, sum(bool(STACK.search(line)) for line in inside))] if products else []
        if loops:
            found.setdefault(name, []).append(min(loops)[1:])
    return found


@pytest.fixture(scope="module")
def disassembly() -> str:
    """Of the library that this Python loads."""
    if not LIBRARY.exists() or shutil.which("objdump") is None:
        pytest.skip("the kernels are not built here, or binutils is not installed")
    command = ["objdump", "-d", "--no-show-raw-insn", str(LIBRARY)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=900).stdout


def test_sums_stay_in_registers(disassembly: str) -> None:
    loops = inner_loops(disassembly)
    if not loops:
        pytest.skip("the library was stripped, or holds the portable form alone")
    assert loops.keys() == set(TILES)
    for tile, sets in loops.items():
        assert all(stack == 0 for _, stack in sets), f"{tile} keeps sums in memory: {sets}"


SPILLED = """
0000000000001000 <tile_bytes>:
    1000:\tvmovdqa 0x40(%rsp),%ymm1
    1004:\tvpdpbusd (%rax),%zmm0,%zmm1
    100a:\tvmovdqa %ymm1,0x40(%rsp)
    1010:\tjne    1000 <tile_bytes>
    1012:\tret
"""


def test_a_sum_in_memory_is_noticed() -> None:
    """The broken control: a loop that loads and stores its sum, as GCC made of an earlier form of the tile."""
    assert inner_loops(SPILLED) == {"tile_bytes": [(1, 2)]}


def test_the_library_is_small(tmp_path: Path) -> None:
    if not LIBRARY.exists() or shutil.which("strip") is None:
        pytest.skip("the kernels are not built here, or binutils is not installed")
    stripped = tmp_path / "stripped.so"
    subprocess.run(["strip", "-o", str(stripped), str(LIBRARY)], check=True, timeout=900)
    assert stripped.stat().st_size <= 600_000
