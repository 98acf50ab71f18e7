"""Frame to tensor: Pillow is the oracle, one axis at a time; both implementations must give its bytes."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import tinyusfm_runtime
from tinyusfm_runtime.errors import FrameError, InputError
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics import native, preprocess
from tinyusfm_runtime.spec import AspectPolicy, PreprocessSpec

Image = pytest.importorskip("PIL.Image")

SIDES = st.integers(8, 260)
# the fixture's patch is meant to last for all examples
EXAMPLES = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(params=["numpy", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(native, "available", lambda: False)
    elif not native.available():
        pytest.skip(f"compiled kernels: {native.reason()}")
    assert preprocess.backend() == request.param
    return str(request.param)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Noise with black and white patches, where rounding and clipping would show."""
    rng = np.random.default_rng([seed, *shape])
    pixels = rng.integers(0, 256, shape, dtype=np.uint8)
    pixels[: shape[0] // 3] //= 255
    pixels[: shape[0] // 3] *= 255
    return pixels


def pillow(image_HW: np.ndarray, out_h: int, out_w: int) -> np.ndarray:
    return np.asarray(Image.fromarray(image_HW).resize((out_w, out_h), Image.Resampling.BILINEAR))


class TestResizeEqualsPillow:
    @EXAMPLES
    @given(height=SIDES, width=SIDES, out=SIDES)
    def test_columns_alone(self, backend: str, height: int, width: int, out: int) -> None:
        image = noise(height, width)
        assert np.array_equal(preprocess.resize(image, height, out), pillow(image, height, out))

    @EXAMPLES
    @given(height=SIDES, width=SIDES, out=SIDES)
    def test_rows_alone(self, backend: str, height: int, width: int, out: int) -> None:
        image = noise(height, width)
        assert np.array_equal(preprocess.resize(image, out, width), pillow(image, out, width))

    @EXAMPLES
    @given(height=SIDES, width=SIDES, out_h=SIDES, out_w=SIDES)
    def test_columns_then_rows(self, backend: str, height: int, width: int, out_h: int, out_w: int) -> None:
        image = noise(height, width)
        chained = pillow(pillow(image, height, out_w), out_h, out_w)
        assert np.array_equal(preprocess.resize(image, out_h, out_w), chained)

    @EXAMPLES
    @given(height=SIDES, width=SIDES, out_h=SIDES, out_w=SIDES)
    def test_whole_resize_is_one_of_the_two_orders(
        self, backend: str, height: int, width: int, out_h: int, out_w: int
    ) -> None:
        image = noise(height, width)
        columns_first = preprocess.resize(image, out_h, out_w)
        rows_first = preprocess.resize(preprocess.resize(image, out_h, width), out_h, out_w)
        whole = pillow(image, out_h, out_w)
        assert np.array_equal(whole, columns_first) or np.array_equal(whole, rows_first)

    @pytest.mark.parametrize(
        "shape", [(270, 400), (540, 800), (480, 640), (768, 1024), (1024, 768), (1080, 1920), (224, 224)]
    )
    def test_whole_resize_of_usual_frames(self, backend: str, shape: tuple[int, int]) -> None:
        image = noise(*shape)
        assert np.array_equal(preprocess.resize(image, 224, 224), pillow(image, 224, 224))

    def test_the_order_matters_and_is_seen(self) -> None:
        image = noise(97, 131)
        rows_first = preprocess.resize(preprocess.resize(image, 40, 131), 40, 50)
        assert not np.array_equal(rows_first, pillow(pillow(image, 97, 50), 40, 50))

    def test_a_half_missing_in_the_rounding_is_seen(self) -> None:
        image = noise(97, 131)
        first, weights = preprocess.coefficients(131, 50)
        taps = np.minimum(first[:, None] + np.arange(weights.shape[1]), 130)
        cut_off = (image[:, taps].astype(np.int64) * weights).sum(axis=2) >> preprocess.PRECISION_BITS
        assert not np.array_equal(cut_off, pillow(image, 97, 50))

    @pytest.mark.parametrize(
        "sizes", [(8, 8), (8, 4096), (9, 224), (224, 224), (1920, 224), (16384, 16), (16384, 4096)]
    )
    def test_coefficients_keep_the_kernel_s_promises(self, sizes: tuple[int, int]) -> None:
        in_size, out_size = sizes
        first, weights = preprocess.coefficients(in_size, out_size)
        assert (weights >= 0).all() and (np.diff(first) >= 0).all() and first[0] == 0
        assert np.abs(weights.sum(axis=1) - (1 << preprocess.PRECISION_BITS)).max() <= 1 << 12
        reach = first[:, None] + np.arange(weights.shape[1])
        assert not weights[reach >= in_size].any()
        with pytest.raises(ValueError, match="read-only"):
            weights[0, 0] = 1


class TestBrightness:
    def test_luma_weights_and_rounding(self) -> None:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        got = preprocess.to_grey(pixels, PixelFormat.RGB, VideoRange.FULL)
        wide = pixels.astype(np.int64)
        assert np.array_equal(got, (77 * wide[..., 0] + 150 * wide[..., 1] + 29 * wide[..., 2] + 128) // 256)
        bt601 = 0.299 * wide[..., 0] + 0.587 * wide[..., 1] + 0.114 * wide[..., 2]
        assert np.abs(got - bt601).max() < 1.0

    @pytest.mark.parametrize("pixel_format", [PixelFormat.RGB, PixelFormat.BGR, PixelFormat.RGBA])
    def test_grey_in_several_channels_keeps_its_codes(self, backend: str, pixel_format: PixelFormat) -> None:
        grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
        pixels = np.repeat(grey[..., None], 4 if pixel_format is PixelFormat.RGBA else 3, axis=2)
        assert np.array_equal(preprocess.to_grey(pixels, pixel_format, VideoRange.FULL), grey)
        tensor = tensor_of(Frame(pixels=pixels, pixel_format=pixel_format), height=16, width=16)
        assert np.array_equal(tensor[0, 0], grey)

    def test_limited_range_is_expanded_to_the_nearest_code(self, backend: str) -> None:
        codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
        exact = [Fraction((min(max(v, 16), 235) - 16) * 255, 219) for v in range(256)]
        want = np.array([int(value + Fraction(1, 2)) for value in exact], np.uint8).reshape(16, 16)
        frame = Frame(pixels=codes, video_range=VideoRange.LIMITED)
        assert np.array_equal(tensor_of(frame, height=16, width=16)[0, 0], want)
        assert (want[0, 0], want[15, 15]) == (0, 255)

    def test_limited_range_goes_before_luma(self, backend: str) -> None:
        pixels = np.full((16, 16, 3), (235, 16, 16), np.uint8)
        frame = Frame(pixels=pixels, pixel_format=PixelFormat.RGB, video_range=VideoRange.LIMITED)
        assert (tensor_of(frame, height=16, width=16) == (77 * 255 + 128) >> 8).all()

    def test_bgr_is_rgb_read_backwards_and_alpha_is_ignored(self, backend: str) -> None:
        rgb = noise(40, 50, 3)
        want = tensor_of(Frame(pixels=rgb, pixel_format=PixelFormat.RGB))
        bgr = np.ascontiguousarray(rgb[..., ::-1])
        assert np.array_equal(tensor_of(Frame(pixels=bgr, pixel_format=PixelFormat.BGR)), want)
        assert not np.array_equal(tensor_of(Frame(pixels=bgr, pixel_format=PixelFormat.RGB)), want)
        for alpha in (0, 255):
            rgba = np.dstack([rgb, np.full((40, 50), alpha, np.uint8)])
            assert np.array_equal(tensor_of(Frame(pixels=rgba, pixel_format=PixelFormat.RGBA)), want)


VIEWS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "crop": lambda p: p[5:60, 7:81],
    "upside down": lambda p: p[::-1],
    "mirrored": lambda p: p[:, ::-1],
    "every second column": lambda p: p[:, ::2],
    "every third row": lambda p: p[::3],
    "transposed": lambda p: p.swapaxes(0, 1),
    "one row repeated": lambda p: np.broadcast_to(p[:1], p.shape),
    "Fortran order": np.asfortranarray,
}


class TestViews:
    @pytest.mark.parametrize("view", VIEWS)
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_strides_do_not_matter(self, backend: str, view: str, channels: int) -> None:
        base = noise(96, 120, channels)[..., 0] if channels == 1 else noise(96, 120, channels)
        pixel_format = {1: PixelFormat.GREY, 3: PixelFormat.RGB, 4: PixelFormat.RGBA}[channels]
        pixels = VIEWS[view](base)
        got = tensor_of(Frame(pixels=pixels, pixel_format=pixel_format))
        want = tensor_of(Frame(pixels=np.array(pixels, order="C"), pixel_format=pixel_format))
        assert np.array_equal(got, want)

    def test_channels_turned_round_or_cut_off(self, backend: str) -> None:
        rgba = noise(96, 120, 4)
        rgb = np.ascontiguousarray(rgba[..., :3])
        want = tensor_of(Frame(pixels=rgb, pixel_format=PixelFormat.RGB))
        for pixels, pixel_format in (
            (rgb[..., ::-1], PixelFormat.BGR),
            (rgba[..., :3], PixelFormat.RGB),
            (rgba[..., 2::-1], PixelFormat.BGR),
            (np.moveaxis(np.ascontiguousarray(np.moveaxis(rgb, 2, 0)), 0, 2), PixelFormat.RGB),
        ):
            assert np.array_equal(tensor_of(Frame(pixels=pixels, pixel_format=pixel_format)), want)

    def test_read_only_pixels_are_left_alone(self, backend: str) -> None:
        pixels = noise(40, 50)
        before = pixels.copy()
        pixels.flags.writeable = False
        tensor = tensor_of(Frame(pixels=pixels))
        assert np.array_equal(pixels, before) and tensor.flags.writeable and tensor.flags.c_contiguous

    def test_the_same_size_is_a_copy(self, backend: str) -> None:
        pixels = noise(224, 224)
        tensor = tensor_of(Frame(pixels=pixels))
        assert np.array_equal(tensor[0, 0], pixels) and not np.shares_memory(tensor, pixels)


class TestPlacement:
    def test_a_crop_is_the_same_as_a_smaller_frame(self, backend: str) -> None:
        pixels = noise(100, 140, 3)
        frame = Frame(pixels=pixels, pixel_format=PixelFormat.RGB, spacing_mm=(0.2, 0.3))
        spec = PreprocessSpec(height=64, width=48, crop=(11, 23, 80, 96))
        tensor, placement = preprocess.preprocess(frame, spec)
        part = Frame(pixels=pixels[11:91, 23:119].copy(), pixel_format=PixelFormat.RGB)
        assert np.array_equal(tensor, tensor_of(part, height=64, width=48))
        assert placement.spacing_mm == pytest.approx((0.2 * 80 / 64, 0.3 * 96 / 48))
        assert (placement.crop, placement.frame_size) == ((11, 23, 80, 96), (100, 140))

    @pytest.mark.parametrize("crop", [(0, 0, 101, 20), (90, 0, 20, 20), (0, 130, 20, 20), (0, 0, 7, 20)])
    def test_a_crop_outside_the_frame_is_refused(self, crop: tuple[int, int, int, int]) -> None:
        with pytest.raises(FrameError, match="does not lie inside a frame of 100x140"):
            preprocess.place(Frame(pixels=noise(100, 140)), PreprocessSpec(crop=crop))

    def test_a_negative_crop_is_no_specification(self) -> None:
        with pytest.raises(InputError, match="whole pixels"):
            PreprocessSpec(crop=(-1, 0, 20, 20))

    @pytest.mark.parametrize(
        ("shape", "box"),
        [((90, 160), (49, 0, 126, 224)), ((160, 90), (0, 49, 224, 126)), ((50, 50), (0, 0, 224, 224))],
    )
    def test_letterbox(self, backend: str, shape: tuple[int, int], box: tuple[int, int, int, int]) -> None:
        frame = Frame(pixels=np.maximum(noise(*shape), 1), spacing_mm=(0.5, 0.5))
        tensor, placement = preprocess.preprocess(frame, PreprocessSpec(aspect=AspectPolicy.LETTERBOX))
        row, col, height, width = placement.box
        assert placement.box == box
        inside = tensor[0, 0, row : row + height, col : col + width]
        assert np.array_equal(inside, preprocess.resize(frame.pixels, height, width))
        outside = tensor[0, 0].copy()
        outside[row : row + height, col : col + width] = 0
        assert not outside.any()
        assert placement.spacing_mm == pytest.approx((0.5 * shape[0] / height, 0.5 * shape[1] / width))

    @settings(max_examples=200, deadline=None, derandomize=True)
    @given(height=st.integers(8, 3000), width=st.integers(8, 3000))
    def test_a_letterbox_fills_one_side_and_keeps_the_aspect(self, height: int, width: int) -> None:
        frame = Frame(pixels=np.broadcast_to(np.uint8(0), (height, width)))
        spec = PreprocessSpec(height=224, width=192, aspect=AspectPolicy.LETTERBOX)
        top, left, box_h, box_w = preprocess.place(frame, spec).box
        assert (box_h == 224 or box_w == 192) and 1 <= box_h <= 224 and 1 <= box_w <= 192
        assert (top, left) == ((224 - box_h) // 2, (192 - box_w) // 2)
        scale = min(224 / height, 192 / width)
        assert abs(box_h - height * scale) <= 0.5 + 1e-9 or box_h == 1
        assert abs(box_w - width * scale) <= 0.5 + 1e-9 or box_w == 1

    def test_a_model_of_colour_images_gets_three_equal_planes(self, backend: str) -> None:
        tensor, _ = preprocess.preprocess(Frame(pixels=noise(60, 80)), PreprocessSpec(grey=False))
        assert tensor.shape == (1, 3, 224, 224) and tensor.dtype == np.uint8 and tensor.flags.c_contiguous
        assert np.array_equal(tensor[:, :1], tensor_of(Frame(pixels=noise(60, 80))))
        assert np.array_equal(tensor[0, 0], tensor[0, 1]) and np.array_equal(tensor[0, 0], tensor[0, 2])


PINNED = "fd3d2f1778cd0b68903de2688e21bd004ad2c0adba78b1509309d6967a54b4bc"


def test_the_definition_is_pinned(backend: str) -> None:
    """Bundles, ranges and students were made with these bytes: a change here invalidates them."""
    digest = hashlib.sha256()
    for pixel_format, video_range, aspect in (
        (PixelFormat.RGB, VideoRange.FULL, AspectPolicy.STRETCH),
        (PixelFormat.BGR, VideoRange.LIMITED, AspectPolicy.LETTERBOX),
        (PixelFormat.RGBA, VideoRange.LIMITED, AspectPolicy.STRETCH),
        (PixelFormat.GREY, VideoRange.FULL, AspectPolicy.LETTERBOX),
    ):
        shape = (301, 417) if pixel_format is PixelFormat.GREY else (301, 417, 4 if pixel_format.value == "rgba" else 3)
        codes = np.arange(np.prod(shape), dtype=np.uint64)
        pixels = ((codes * 2654435761 >> 13) & 255).astype(np.uint8).reshape(shape)
        frame = Frame(pixels=pixels, pixel_format=pixel_format, video_range=video_range)
        digest.update(preprocess.preprocess(frame, PreprocessSpec(aspect=aspect))[0].tobytes())
    assert digest.hexdigest() == PINNED


def test_the_kernel_can_be_switched_off() -> None:
    code = "from tinyusfm_runtime.numerics import native, preprocess; print(preprocess.backend(), '|', native.reason())"
    root = Path(tinyusfm_runtime.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), native.SWITCH: "0"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "numpy | switched off by TINYUSFM_NATIVE=0"


def tensor_of(frame: Frame, *, height: int = 224, width: int = 224) -> np.ndarray:
    return preprocess.preprocess(frame, PreprocessSpec(height=height, width=width))[0]


def test_a_tensor_that_is_filled_again_holds_nothing_of_before() -> None:
    spec = PreprocessSpec(height=64, width=64, aspect=AspectPolicy.LETTERBOX)
    tensor, rng = np.full((1, 1, 64, 64), 9, np.uint8), np.random.default_rng(8)
    for shape in ((40, 90), (90, 40), (50, 50), (30, 100)):
        frame = Frame(pixels=rng.integers(1, 256, shape, dtype=np.uint8))
        fresh, placement = preprocess.preprocess(frame, spec)
        filled, again = preprocess.preprocess(frame, spec, tensor)
        assert filled is tensor and again == placement
        np.testing.assert_array_equal(filled, fresh)
    for wrong in (tensor[..., :63], tensor.astype(np.int8), np.zeros((1, 3, 64, 64), np.uint8)):
        with pytest.raises(FrameError, match="tensor to fill"):
            preprocess.preprocess(frame, spec, wrong)
