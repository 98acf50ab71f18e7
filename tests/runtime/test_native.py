"""The compiled kernels: numpy's bytes for every input, no byte outside the result, no crash on nonsense."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyusfm_runtime.errors import UnsupportedError
from tinyusfm_runtime.frame import PixelFormat, VideoRange
from tinyusfm_runtime.numerics import measure, native, preprocess, shape

CAPI = Path(__file__).parents[2] / "runtime" / "capi"
SOURCES = (
    "preprocess.c", "components.c", "moments.c", "shape.c", "ellipse.c", "measure.c", "second_pass.c", "crc64.c",
)  # fmt: skip
CC = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
"""CC names a cross compiler where the tests run under emulation."""
EXAMPLES = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FORMATS = st.sampled_from(list(PixelFormat))
SIDES = st.integers(8, 200)


def compiled(folder: Path, *, flags: tuple[str, ...] = ("-O1",), change: tuple[str, str] | None = None) -> Path:
    """Builds the kernels, with one text of their sources replaced by another if asked."""
    if CC is None or sys.platform == "win32":
        pytest.skip("no C compiler of the GCC family here")
    for path in CAPI.glob("*.[ch]"):
        text = path.read_text(encoding="utf-8")
        (folder / path.name).write_text(text.replace(*change) if change else text, encoding="utf-8")
    target = folder / "kernels.so"
    sources = [str(folder / name) for name in SOURCES]
    strict = (
        "-std=c11",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Werror",
        "-fvisibility=hidden",
        "-fPIC",
        "-shared",
        "-ffp-contract=off",
    )
    subprocess.run([CC, *strict, *flags, *sources, "-o", str(target)], check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The kernels, in use: the installed ones, or built for the tests where none are installed."""
    with ExitStack() as stack:
        if not native.available():
            stack.enter_context(native.using(compiled(tmp_path_factory.mktemp("kernels"), flags=("-O3",))))
        found, reason = native.shared_object()
        assert found is not None, reason
        yield found


@lru_cache(maxsize=256)
def filter_of(in_size: int, out_size: int) -> native.ResampleFilter:
    return native.ResampleFilter(*preprocess.coefficients(in_size, out_size), in_size)


def by_kernel(pixels: np.ndarray, pixel_format: PixelFormat, limited: bool, out_h: int, out_w: int) -> np.ndarray:
    out = np.full((out_h, out_w), 77, np.uint8)
    columns, rows = filter_of(pixels.shape[1], out_w), filter_of(pixels.shape[0], out_h)
    native.luma_resize(pixels, pixel_format.value, limited, columns, rows, out)
    return out


def by_numpy(pixels: np.ndarray, pixel_format: PixelFormat, limited: bool, out_h: int, out_w: int) -> np.ndarray:
    grey = preprocess.to_grey(pixels, pixel_format, VideoRange.LIMITED if limited else VideoRange.FULL)
    return preprocess._resample_rows(preprocess._resample_columns(grey, out_w), out_h)


def image(seed: int, height: int, width: int, pixel_format: PixelFormat) -> np.ndarray:
    channels = {"grey": (), "rgba": (4,)}.get(pixel_format.value, (3,))
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, *channels), dtype=np.uint8)
    pixels[: height // 4] = 255 * (seed % 2)
    return pixels


class TestResize:
    @EXAMPLES
    @given(
        seed=st.integers(0, 99),
        sizes=st.tuples(SIDES, SIDES, SIDES, SIDES),
        pixel_format=FORMATS,
        limited=st.booleans(),
    )
    def test_equals_numpy(
        self,
        library: ctypes.CDLL,
        seed: int,
        sizes: tuple[int, int, int, int],
        pixel_format: PixelFormat,
        limited: bool,
    ) -> None:
        height, width, out_h, out_w = sizes
        pixels = image(seed, height, width, pixel_format)
        got = by_kernel(pixels, pixel_format, limited, out_h, out_w)
        assert np.array_equal(got, by_numpy(pixels, pixel_format, limited, out_h, out_w))

    @EXAMPLES
    @given(
        seed=st.integers(0, 99),
        steps=st.tuples(*[st.sampled_from([-3, -2, -1, 1, 2, 3])] * 2),
        starts=st.tuples(*[st.integers(0, 20)] * 2),
        turned=st.booleans(),
        pixel_format=FORMATS,
        limited=st.booleans(),
    )
    def test_equals_numpy_through_any_strides(
        self,
        library: ctypes.CDLL,
        seed: int,
        steps: tuple[int, int],
        starts: tuple[int, int],
        turned: bool,
        pixel_format: PixelFormat,
        limited: bool,
    ) -> None:
        pixels = image(seed, 80, 90, pixel_format)[starts[0] :, starts[1] :][:: steps[0], :: steps[1]]
        if turned and pixels.ndim == 3:
            pixels = pixels[..., ::-1]
        got = by_kernel(pixels, pixel_format, limited, 24, 40)
        assert np.array_equal(got, by_numpy(pixels, pixel_format, limited, 24, 40))

    @pytest.mark.parametrize(
        "sizes", [(1080, 1920, 224, 224), (8, 16384, 16, 16), (16384, 8, 16, 16), (8, 8, 700, 900), (8, 8, 16, 4096)]
    )
    def test_equals_numpy_at_the_ends(self, library: ctypes.CDLL, sizes: tuple[int, int, int, int]) -> None:
        height, width, out_h, out_w = sizes
        pixels = image(1, height, width, PixelFormat.RGB)
        got = by_kernel(pixels, PixelFormat.RGB, False, out_h, out_w)
        assert np.array_equal(got, by_numpy(pixels, PixelFormat.RGB, False, out_h, out_w))

    @pytest.mark.parametrize("code", [0, 1, 127, 254, 255])
    def test_a_flat_image_stays_flat(self, library: ctypes.CDLL, code: int) -> None:
        for sizes in ((8, 300, 90, 16), (1080, 1920, 224, 224), (16, 16, 400, 17)):
            pixels = np.full(sizes[:2], code, np.uint8)
            assert (by_kernel(pixels, PixelFormat.GREY, False, *sizes[2:]) == code).all()

    def test_nothing_outside_the_result_is_written(self, library: ctypes.CDLL) -> None:
        canvas = np.full((60, 70), 77, np.uint8)
        box = canvas[10:50, 20:61]
        native.luma_resize(image(0, 90, 100, PixelFormat.RGB), "rgb", False, filter_of(100, 41), filter_of(90, 40), box)
        assert np.array_equal(box, by_numpy(image(0, 90, 100, PixelFormat.RGB), PixelFormat.RGB, False, 40, 41))
        canvas[10:50, 20:61] = 77
        assert (canvas == 77).all()

    def test_nothing_outside_the_scratch_is_written(self, library: ctypes.CDLL) -> None:
        pixels, out = image(0, 90, 100, PixelFormat.GREY), np.empty((40, 41), np.uint8)
        columns, rows = ctypes.byref(filter_of(100, 41).struct), ctypes.byref(filter_of(90, 40).struct)
        need = library.tue_preprocess_scratch(columns, rows)
        view = native._Image(native._address(pixels), 100, 1, 0, 90, 100, 0, 0)
        for shift in (0, 1, 63):
            arena = np.full(need + 256, 77, np.uint8)
            address = native._address(arena) + 64 + shift
            where = ctypes.byref(view), columns, rows, native._address(out), 41, address
            assert library.tue_preprocess(*where, need) == 0
            assert (arena[: 64 + shift] == 77).all() and (arena[64 + shift + need :] == 77).all()
            assert library.tue_preprocess(*where, need - 1) == 2

    @pytest.mark.parametrize("fault", ["points past the end", "points before the start", "goes back"])
    def test_tables_that_would_read_elsewhere_are_refused(self, library: ctypes.CDLL, fault: str) -> None:
        first, weights = (table.copy() for table in preprocess.coefficients(100, 40))
        where, what = {"points past the end": (39, 100), "points before the start": (0, -1)}.get(fault, (20, 3))
        first[where] = what
        bad = native.ResampleFilter(first, weights, 100)
        pixels, out = image(0, 100, 100, PixelFormat.GREY), np.empty((40, 40), np.uint8)
        for tables in ((bad, filter_of(100, 40)), (filter_of(100, 40), bad)):
            with pytest.raises(UnsupportedError, match="status 1"):
                native.luma_resize(pixels, "grey", False, *tables, out)

    def test_sizes_that_do_not_fit_are_refused(self, library: ctypes.CDLL) -> None:
        pixels = image(0, 100, 100, PixelFormat.GREY)
        tables = filter_of(100, 40), filter_of(100, 40)
        with pytest.raises(UnsupportedError, match="status 1"):
            native.luma_resize(pixels[:-1], "grey", False, *tables, np.empty((40, 40), np.uint8))
        read_only = np.empty((40, 40), np.uint8)
        read_only.flags.writeable = False
        wrong_size, wrong_type = np.empty((40, 41), np.uint8), np.empty((40, 40), np.int8)
        for out in (wrong_size, wrong_type, np.empty((40, 80), np.uint8)[:, ::2], read_only):
            with pytest.raises(UnsupportedError, match="cannot write"):
                native.luma_resize(pixels, "grey", False, *tables, out)

    def test_threads_do_not_disturb_each_other(self, library: ctypes.CDLL) -> None:
        images = [image(seed, 300, 400, PixelFormat.RGB) for seed in range(4)]
        wanted = [by_numpy(pixels, PixelFormat.RGB, False, 64, 64) for pixels in images]
        wrong: list[int] = []

        def work(index: int) -> None:
            for _ in range(40):
                if not np.array_equal(by_kernel(images[index], PixelFormat.RGB, False, 64, 64), wanted[index]):
                    wrong.append(index)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong


MASKS = st.builds(
    lambda seed, rows, cols, density: (
        (np.random.default_rng(seed).uniform(size=(rows, cols)) < density).astype(np.uint8) * np.uint8(1 + seed % 255)
    ),
    st.integers(0, 999),
    st.integers(1, 40),
    st.integers(1, 70),
    st.floats(0, 1),
)


class TestMasks:
    @EXAMPLES
    @given(mask=MASKS)
    def test_component_and_moments_equal_numpy(self, library: ctypes.CDLL, mask: np.ndarray) -> None:
        assert np.array_equal(native.largest_component(mask), shape._largest_component_numpy(mask))
        assert native.moments(mask) == shape._moments_numpy(mask)

    @pytest.mark.parametrize("name", ["empty", "full", "columns", "chequered", "dots", "comb", "big"])
    def test_worst_cases_equal_numpy(self, library: ctypes.CDLL, name: str) -> None:
        rows, cols = (700, 900) if name == "big" else (63, 65)
        y, x = np.mgrid[:rows, :cols]
        masks = {
            "empty": x < 0,
            "full": x >= 0,
            "columns": x % 2 == 0,
            "chequered": (x + y) % 2 == 0,
            "dots": (x % 2 == 0) & (y % 2 == 0),
            "comb": (x % 2 == 0) | (y == rows - 1),
            "big": (x - 450) ** 2 + 2 * (y - 350) ** 2 < 200_000,
        }
        mask = masks[name].astype(np.uint8)
        assert np.array_equal(native.largest_component(mask), shape._largest_component_numpy(mask))
        assert native.moments(mask) == shape._moments_numpy(mask)

    def test_moments_of_the_largest_image_do_not_overflow(self, library: ctypes.CDLL) -> None:
        n = 16384
        mask = np.ones((n, n), np.uint8)
        line, squares = n * (n - 1) // 2, n * (n - 1) * (2 * n - 1) // 6
        assert native.moments(mask) == (n * n, n * line, n * line, n * squares, line * line, n * squares)

    def test_components_stay_inside_their_scratch(self, library: ctypes.CDLL) -> None:
        mask = np.zeros((31, 33), np.uint8)
        mask[:, ::2] = 1
        need, area, out = library.tue_components_scratch(31, 33), ctypes.c_int64(), np.empty_like(mask)
        for shift in (0, 1, 15):
            arena = np.full(need + 128, 77, np.uint8)
            where = native._address(mask), 31, 33, native._address(out), ctypes.byref(area), native._address(arena)
            assert library.tue_largest_component(*where[:-1], where[-1] + 32 + shift, need) == 0
            assert area.value == 31
            assert (arena[: 32 + shift] == 77).all() and (arena[32 + shift + need :] == 77).all()
            assert library.tue_largest_component(*where, need - 1) == 2

    def test_a_component_may_overwrite_its_mask(self, library: ctypes.CDLL) -> None:
        mask = (np.random.default_rng(0).uniform(size=(50, 60)) < 0.4).astype(np.uint8)
        want, area = shape._largest_component_numpy(mask), ctypes.c_int64()
        scratch = np.empty(library.tue_components_scratch(50, 60), np.uint8)
        address = native._address(mask)
        library.tue_largest_component(
            address, 50, 60, address, ctypes.byref(area), native._address(scratch), scratch.size
        )
        assert np.array_equal(mask, want) and area.value == want.sum()

    @EXAMPLES
    @given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=200), cut=st.floats(width=32, allow_nan=False))
    def test_threshold_equals_numpy_for_any_float(self, library: ctypes.CDLL, bits: list[int], cut: float) -> None:
        logits = np.array(bits, np.uint32).view(np.float32)
        out = np.full(logits.shape, 77, np.uint8)
        native.threshold(logits, cut, out)
        assert np.array_equal(out, logits > np.float32(cut))

    def test_arrays_that_do_not_fit_are_refused(self, library: ctypes.CDLL) -> None:
        logits = np.zeros((8, 8), np.float32)
        for bad, out in (
            (logits.astype(np.float64), np.empty((8, 8), np.uint8)),
            (logits[:, ::2], np.empty((8, 4), np.uint8)),
            (logits, np.empty((8, 7), np.uint8)),
        ):
            with pytest.raises(UnsupportedError, match="cannot take"):
                native.threshold(bad, 0.0, out)
        with pytest.raises(UnsupportedError, match="uint8 image"):
            native.moments(logits)

    def test_null_and_silly_sizes_are_refused(self, library: ctypes.CDLL) -> None:
        sums = (ctypes.c_int64 * 6)()
        assert library.tue_threshold(None, 4, 0.0, None) == 1
        assert library.tue_moments(None, 4, 4, sums) == 1
        assert library.tue_moments(sums, 0, 4, sums) == 1
        assert library.tue_crc64(None, 4, sums) == 1 and library.tue_crc64(sums, 4, None) == 1
        assert library.tue_moments(sums, 4, 16385, sums) == 1
        assert library.tue_largest_component(None, 4, 4, None, None, None, 0) == 1
        assert library.tue_preprocess(None, None, None, None, 0, None, 0) == 1
        assert library.tue_components_scratch(-1, 4) == 0 and library.tue_preprocess_scratch(None, None) == 0


class TestLoading:
    def test_it_says_why_not(self, tmp_path: Path) -> None:
        (tmp_path / "garbage.so").write_bytes(b"not a library")
        before = native.shared_object()
        with native.using(tmp_path / "garbage.so"):
            assert not native.available() and "cannot be loaded" in native.reason()
        old = compiled(tmp_path, change=(f"TUE_NUMERICS_VERSION {native.VERSION}", "TUE_NUMERICS_VERSION 0"))
        with native.using(old):
            assert not native.available()
            assert native.reason() == f"built from version 0 of the kernels, not {native.VERSION}: build it again"
        assert native.shared_object() == before

    def test_without_kernels_a_call_says_so_and_results_stay(self) -> None:
        with native.using(None):
            assert not native.available() and native.reason() == "switched off for a while"
            assert preprocess.backend() == "numpy"
            with pytest.raises(UnsupportedError, match="not available: switched off"):
                native.moments(np.ones((4, 4), np.uint8))
            assert measure.measure_head(np.ones((40, 40), np.uint8), None).area_px == 1600

    def test_header_and_wrapper_agree_on_the_version(self) -> None:
        header = (CAPI / "tue_numerics.h").read_text(encoding="utf-8")
        assert f"#define TUE_NUMERICS_VERSION {native.VERSION}\n" in header


@pytest.mark.parametrize(
    "change",
    [
        ("* weight[2] + 128)", "* weight[2] + 127)"),
        ("- 16) * 255 + 109)", "- 16) * 255 + 107)"),
        ("uint16_t weight[3] = {77, 150, 29}", "uint16_t weight[3] = {76, 150, 30}"),
        ("int32_t sum = 1 << (PRECISION_BITS - 1)", "int32_t sum = 0"),
        ("if (++slot == slots) slot = 0", "if (++slot == slots) slot = 1"),
        ("i++) out[i] = logits[i] > cut", "i++) out[i] = logits[i] >= cut"),
        ("runs[here].start <= runs[above].end", "runs[here].start < runs[above].end"),
        ("runs[i].area > runs[best].area", "runs[i].area >= runs[best].area"),
        ("m11 += y * sum_x", "m11 += y * count"),
    ],
    ids=["luma", "range", "weights", "rounding", "ring", "threshold", "corners", "ties", "moments"],
)
def test_a_kernel_that_differs_is_noticed(tmp_path: Path, change: tuple[str, str]) -> None:
    """The comparisons of this file would be worthless if a slightly wrong kernel passed them."""
    assert sum(change[0] in path.read_text(encoding="utf-8") for path in CAPI.glob("*.[ch]")) == 1
    with native.using(compiled(tmp_path, flags=("-O0",), change=change)):
        differs = differences()
    assert any(differs)


def differences() -> list[bool]:
    """What the kernels in use compute otherwise than numpy: True for each that differs."""
    differs = []
    for pixel_format, limited in ((PixelFormat.GREY, True), (PixelFormat.RGB, False)):
        pixels = image(2, 60, 70, pixel_format)
        got = by_kernel(pixels, pixel_format, limited, 24, 40)
        differs.append(not np.array_equal(got, by_numpy(pixels, pixel_format, limited, 24, 40)))
    grid = np.arange(-50, 50, dtype=np.float32)
    out = np.empty(100, np.uint8)
    native.threshold(grid, 3.0, out)
    differs.append(not np.array_equal(out, grid > 3.0))
    for mask in (np.eye(9, dtype=np.uint8), np.diag([1, 0, 1, 0, 1]).astype(np.uint8)):
        differs.append(not np.array_equal(native.largest_component(mask), shape._largest_component_numpy(mask)))
        differs.append(native.moments(mask) != shape._moments_numpy(mask))
    return differs
