"""Moments need products of 114 bits: compilers without such integers get the same bits from two words of 64."""

from __future__ import annotations

import ctypes as c
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.capi.conftest import SOURCE
from tinyusfm_runtime.numerics.ellipse import covariance


class Moments(c.Structure):
    """tue_covariance."""

    _fields_ = tuple((name, c.c_double) for name in ("col", "row", "xx", "xy", "yy"))


@pytest.mark.parametrize("flags", [(), ("-DTUE_NO_INT128",)], ids=["128 bits", "two words"])
def test_covariances_are_those_of_whole_numbers(flags: tuple[str, ...], tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler here")
    strict = ("-std=c11", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-shared", "-fPIC")
    built = tmp_path / "ellipse.so"
    subprocess.run([compiler, *strict, *flags, SOURCE / "ellipse.c", "-o", built], check=True)
    library = c.CDLL(str(built))
    library.tue_covariance_of.restype = Moments
    rng = random.Random(3)
    for number in range(4000):
        top = 1 << rng.choice((8, 20, 40, 57))
        sums = [rng.randrange(1, top), *[rng.randrange(top) for _ in range(5)]]
        if number % 3 == 0:  # nearly equal products, of which little is left
            sums[3], sums[1] = sums[1] + rng.randrange(3), sums[0] + rng.randrange(3)
        got = library.tue_covariance_of((c.c_int64 * 6)(*sums))
        want = covariance((sums[0], sums[1], sums[2], sums[3], sums[4], sums[5]))
        assert (got.col, got.row, got.xx, got.xy, got.yy) == (want.col, want.row, want.xx, want.xy, want.yy)
