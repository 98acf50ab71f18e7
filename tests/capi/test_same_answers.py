"""A frame gives the same mask and reading in C as in Python: every size, format, stride, region and policy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.capi.binding import DRIFT, SECOND_PASS, TRUST, Library, Measurement, Reading, Session, reasons_of
from tests.capi.conftest import MakeStub, stub_module, stub_parts
from tests.conftest import tiny_spec
from tinyusfm_runtime.bundle.manifest import DRIFT_FILE
from tinyusfm_runtime.drift import DriftStatistic, Mixture
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.reading_rules import Anatomy, LabelThresholds, ReadingRates, ReadingRules
from tinyusfm_runtime.session import Prediction
from tinyusfm_runtime.session import Session as PythonSession
from tinyusfm_runtime.spec import AspectPolicy, ModelSpec, PostProcess, PreprocessSpec, SecondPass, Task

CHANNELS = {"grey": 1, "rgb": 3, "bgr": 3, "rgba": 4}


def assert_same(session: Session, reading: Reading, prediction: Prediction, *, placed: bool = False) -> None:
    """Everything but times is equal, to the bit."""
    assert (reading.valid, reading.verified) == (prediction.valid, prediction.verified)
    assert reading.seq == prediction.seq
    place = prediction.placement
    assert tuple(reading.crop) == place.crop and tuple(reading.box) == place.box
    assert (reading.frame_rows, reading.frame_columns) == place.frame_size
    _assert_numbers((reading.spacing_row_mm, reading.spacing_column_mm), place.spacing_mm or (None, None))
    _assert_array(reading.mask_HW(), prediction.mask_HW)
    _assert_array(reading.scores_K(), None if prediction.scores is None else prediction.scores.ravel())
    if placed and prediction.mask_HW is not None:
        _assert_array(session.mask_on_frame(reading), prediction.mask_on_frame())
    assert SECOND_PASS[reading.second_pass] == prediction.second_pass.value
    assert (TRUST[reading.trust], reasons_of(reading.reasons)) == (
        prediction.reading.value, tuple(reason.value for reason in prediction.reasons),
    )  # fmt: skip
    assert bool(reading.found) == prediction.found
    assert bool(reading.measured) == (prediction.measurement is not None)
    _assert_numbers((reading.confidence,), (prediction.confidence,))
    _assert_drift(reading, prediction)
    got = session.measurements(reading)
    assert len(got) == len(prediction.measurements)
    for one, want, judged in zip(got, prediction.measurements, prediction.judged, strict=len(got) > 0):
        _assert_measurement(one, want)
        assert (TRUST[one.trust], reasons_of(one.reasons)) == (
            judged.state.value, tuple(reason.value for reason in judged.reasons),
        )  # fmt: skip
    if got:
        for name in ("hc_mm", "hc_px", "major_mm", "centre_row", "angle_deg", "area_px", "agreement", "area_mm2"):
            _assert_numbers((getattr(reading, name),), (getattr(got[0], name),))


def _assert_drift(reading: Reading, prediction: Prediction) -> None:
    assert DRIFT[reading.drift] == prediction.drift_status.value
    drift = prediction.drift
    assert (drift is None) == (reading.drift != 1)
    if drift is not None:
        assert (reading.drift_score, reading.drift_threshold) == (drift.score, drift.threshold)
        assert bool(reading.strange) == drift.strange and reading.strangest.decode() == drift.strangest
        assert bool(reading.drift_kind) == (drift.kind == "features")
        window = (reading.drift_share, reading.drift_frames, reading.drift_window, bool(reading.drift_alarm))
        assert window == (drift.share, drift.frames, drift.window, drift.alarm)


def _assert_array(got: np.ndarray | None, want: np.ndarray | None) -> None:
    assert (got is None) == (want is None)
    if got is not None and want is not None:
        np.testing.assert_array_equal(got, want)


def _assert_numbers(got: Sequence[float], want: Sequence[float | None]) -> None:
    """Equal to the bit; None and NaN are one."""
    np.testing.assert_array_equal(np.array(got, float), np.array([math.nan if v is None else v for v in want], float))


def _assert_measurement(got: Measurement, want: Any) -> None:
    assert (bool(got.found), got.label.decode(), bool(got.has_ellipse)) == (want.found, want.label, want.has_ellipse)
    if not want.found:
        return
    walked = got.contour_px[: 2 * got.contour_points]
    assert tuple(zip(walked[::2], walked[1::2], strict=True)) == want.contour_px
    assert (bool(got.touches_border), bool(got.cut_by_sector)) == (want.touches_border, want.cut_by_sector)
    _assert_numbers((got.confidence, got.area_px, got.area_mm2), (want.confidence, want.area_px, want.area_mm2))
    _assert_numbers((*got.bounds_px, got.centroid_row, got.centroid_column), (*want.box_px, *want.centroid_px))
    if want.has_ellipse:
        _assert_numbers((got.hc_mm, got.major_mm, got.minor_mm), (want.hc_mm, *(want.axes_mm or (None, None))))
        _assert_numbers(
            (got.hc_px, got.major_px, got.minor_px, got.centre_row, got.centre_column, got.angle_deg, got.agreement),
            (want.hc_px, *want.axes_px, *want.centre_px, want.angle_deg, want.agreement),
        )


def picture(rng: np.random.Generator, rows: int, columns: int, channels: int) -> np.ndarray:
    """A bright ellipse in speckle: uint8 HW or HWC."""
    y, x = np.mgrid[:rows, :columns]
    centre = rng.uniform(0.2, 0.8, 2) * (rows, columns)
    radii = rng.uniform(0.1, 0.5, 2) * (rows, columns)
    inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 < 1
    grey = np.where(inside, 180, 30)[..., None] + rng.integers(-30, 30, (rows, columns, channels))
    pixels: np.ndarray = np.clip(grey, 0, 255).astype(np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Name -> bundle: stretched, letterboxed, cropped, three channels, several labels, without a measurement."""
    folder = tmp_path_factory.mktemp("bundles")
    specs = {
        "stretch": (tiny_spec(), ""),
        "letterbox": (tiny_spec(preprocess=PreprocessSpec(height=48, width=80, aspect=AspectPolicy.LETTERBOX)), ""),
        "crop": (tiny_spec(preprocess=PreprocessSpec(height=64, width=64, crop=(3, 5, 50, 55))), ""),
        "colour": (tiny_spec(preprocess=PreprocessSpec(height=64, width=96, grey=False)), ""),
        "threshold": (tiny_spec(threshold=0.93), ""),
        "labels": (tiny_spec(labels=("background", "head", "skull")), "classes=3"),
        "mask": (tiny_spec(postprocess=PostProcess.MASK), ""),
        "classify": (
            tiny_spec(task=Task.CLASSIFY, labels=("normal", "benign", "malignant"), postprocess=PostProcess.NONE),
            "classes=3",
        ),
        "features": (tiny_spec(task=Task.FEATURES, labels=(), postprocess=PostProcess.NONE), "classes=7"),
    }
    made = {
        name: stub_parts(bend, spec=spec).publish(folder / f"{name}.bundle") for name, (spec, bend) in specs.items()
    }
    for name, (spec, bend, statistic) in judged_specs().items():
        parts = stub_parts(bend, spec=spec)
        files = {**parts.files, DRIFT_FILE: statistic.to_bytes()} if statistic is not None else parts.files
        made[name] = replace(parts, files=files).publish(folder / f"{name}.bundle")
    return made


JUDGED = ("always", "small", "letterbox twice", "labels twice", "grey drift", "features drift", "judged classes")


def rules(*labels: str, agreement: float | None = 0.97) -> ReadingRules:
    """Thresholds in the middle of what the stub's masks reach."""
    rates = ReadingRates(
        frames=10, groups=3, good=6, doubtful=3, none=1, wrong=2, good_but_wrong=1, doubtful_but_right=2,
        good_but_wrong_limit=0.4, wrong_means="more than 10 % off",
    )  # fmt: skip
    thresholds = tuple(LabelThresholds(label=label, confidence=0.97, agreement=agreement) for label in labels)
    return ReadingRules(thresholds=thresholds, rates=rates)


def statistic(tokens: int = 0) -> DriftStatistic:
    """A drift statistic with random numbers, over grey levels, and over that many tokens, in three directions."""
    rng = np.random.default_rng(5)

    def mixture(count: int, threshold: float) -> Mixture:
        return Mixture(
            centre_F=rng.normal(0.3, 0.1, count), scale_F=rng.uniform(0.2, 2.0, count), weights_K=np.array([0.3, 0.7]),
            means_KF=rng.normal(0, 1, (2, count)), spreads_KF=rng.uniform(0.5, 2, (2, count)), threshold=threshold,
        )  # fmt: skip

    if not tokens:
        return DriftStatistic(grey=mixture(9, 12.0), false_alarms=0.05)
    return DriftStatistic(
        grey=mixture(9, 12.0), features=mixture(3 + 1 + 1 + 9, 19.0), token_names=("tokens",), peak_names=("peak",),
        mean_T=rng.normal(0, 0.1, tokens).astype(np.float32), basis_TP=rng.normal(0, 1, (tokens, 3)).astype(np.float32),
        false_alarms=0.05,
    )  # fmt: skip


def judged_specs() -> dict[str, tuple[ModelSpec, str, DriftStatistic | None]]:
    """Models that look twice, that are judged, and that are watched for drift."""
    anatomy = Anatomy(name="fetal head", size_mm=(20.0, 60.0), spacing_mm=(0.05, 0.3))
    box = PreprocessSpec(height=48, width=80, aspect=AspectPolicy.LETTERBOX)
    head, names = rules("head"), ("background", "head", "skull")
    classes = rules("benign", "malignant", agreement=None)
    always, small = SecondPass.ALWAYS, SecondPass.SMALL
    return {
        "always": (tiny_spec(second_pass=always, reading=head, anatomy=anatomy, min_area=0.02), "", None),
        "small": (tiny_spec(second_pass=small, reading=head), "", None),
        "letterbox twice": (tiny_spec(second_pass=always, preprocess=box, anatomy=anatomy), "", statistic()),
        "labels twice": (
            tiny_spec(
                labels=names, second_pass=always, postprocess=PostProcess.MASK, anatomy=anatomy, min_area=0.01,
                reading=rules("head", "skull", agreement=None),
            ),
            "classes=3", None,
        ),
        "grey drift": (tiny_spec(reading=head), "", statistic(7)),
        "features drift": (tiny_spec(second_pass=always, reading=head), "tokens=7", statistic(7)),
        "judged classes": (
            tiny_spec(
                task=Task.CLASSIFY, labels=("normal", "benign", "malignant"), postprocess=PostProcess.NONE,
                reading=classes,
            ),
            "classes=3", statistic(),
        ),
    }  # fmt: skip


@pytest.mark.usefixtures("stub_plug_in")
@pytest.mark.parametrize("name", JUDGED)
def test_second_passes_drift_and_judgements_are_alike(name: str, bundles: dict[str, Path], library: Library) -> None:
    rng, seen = np.random.default_rng(11), []
    with Session(library, bundles[name]) as here, PythonSession.open(bundles[name]) as there:
        for seed in range(60):
            kind = sorted(CHANNELS)[seed % 4]
            rows, columns = int(rng.integers(8, 300)), int(rng.integers(8, 300))
            pixels = np.ascontiguousarray(picture(rng, rows, columns, CHANNELS[kind]))
            if seed % 10 == 9:
                pixels[:] = pixels.flat[0]
            spacing = None if seed % 7 == 0 else (float(rng.uniform(0.03, 0.4)), float(rng.uniform(0.05, 0.3)))
            phantom = seed % 5 == 0
            fields = {} if spacing is None else {"spacing_row_mm": spacing[0], "spacing_column_mm": spacing[1]}
            want = there.predict(
                Frame(pixels=pixels, pixel_format=PixelFormat(kind), spacing_mm=spacing, seq=seed, phantom=phantom)
            )
            assert_same(
                here, here.predict(library.frame(pixels, kind, seq=seed, phantom=phantom, **fields)), want, placed=True
            )
            seen.append((want.second_pass.value, want.reading.value, want.drift_status.value, *want.reasons))
    said = {word for words in seen for word in words}
    if "drift" in name:
        assert {"checked", "not applied", "drift"} <= said
    if name in ("always", "small", "labels twice", "features drift"):
        assert "done" in said
    if name in ("always", "labels twice", "judged classes"):
        assert "doubtful" in said


@pytest.mark.usefixtures("stub_plug_in")
def test_what_is_switched_off_stands_in_every_reading(bundles: dict[str, Path], library: Library) -> None:
    pixels = picture(np.random.default_rng(2), 120, 150, 1)
    frame = Frame(pixels=pixels, spacing_mm=(0.2, 0.2))
    given = library.frame(pixels, spacing_row_mm=0.2, spacing_column_mm=0.2)
    bundle = bundles["features drift"]
    with (
        Session(library, bundle, no_second_pass=1, no_drift=1) as here,
        PythonSession.open(bundle, second_pass=False, drift=False) as there,
    ):
        reading = here.predict(given)
        assert_same(here, reading, there.predict(frame))
        assert (SECOND_PASS[reading.second_pass], DRIFT[reading.drift]) == ("off", "not checked")


def test_a_frame_beyond_all_numbers_is_infinitely_strange() -> None:
    far = replace(statistic().grey, centre_F=np.full(9, 1e200), scale_F=np.full(9, 1e-200))
    assert math.isinf(far.score(np.zeros(9)))


@pytest.mark.usefixtures("stub_plug_in")
@pytest.mark.parametrize(
    "name", ["stretch", "letterbox", "crop", "colour", "threshold", "labels", "mask", "classify", "features"]
)
def test_phantoms_of_every_format_read_alike(name: str, bundles: dict[str, Path], library: Library) -> None:
    rng = np.random.default_rng(3)
    sizes = [(96, 128), (64, 64), (270, 400), (63, 77), (480, 640), (65, 300), (300, 75), (768, 1024)]
    with Session(library, bundles[name]) as here, PythonSession.open(bundles[name]) as there:
        for seed, (rows, columns) in enumerate(sizes):
            phantom = make_phantom(seed, height=max(rows, 96), width=max(columns, 96)).frame.pixels[:rows, :columns]
            for kind, channels in CHANNELS.items():
                pixels = phantom if channels == 1 else rng.integers(0, 9, (rows, columns, channels), np.uint8)
                if channels > 1:
                    pixels = np.minimum(pixels.astype(np.uint16) + phantom[..., None], 255).astype(np.uint8)
                limited = bool((seed + channels) % 2)
                frame = Frame(
                    pixels=pixels, pixel_format=PixelFormat(kind), seq=seed, spacing_mm=(0.2 + 0.01 * seed, 0.3),
                    video_range=VideoRange.LIMITED if limited else VideoRange.FULL,
                )  # fmt: skip
                given = library.frame(
                    np.ascontiguousarray(pixels), kind, seq=seed, limited_range=limited,
                    spacing_row_mm=0.2 + 0.01 * seed, spacing_column_mm=0.3,
                )  # fmt: skip
                reading = here.predict(given)
                want = there.predict(frame)
                assert_same(here, reading, want, placed=True)


@given(data=st.data())
@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@pytest.mark.usefixtures("stub_plug_in")
def test_any_size_stride_and_region_reads_alike(
    data: st.DataObject, bundles: dict[str, Path], library: Library, sessions: dict[str, tuple[Session, PythonSession]]
) -> None:
    name = data.draw(st.sampled_from(["stretch", "letterbox", "labels"]))
    here, there = sessions[name]
    rng = np.random.default_rng(data.draw(st.integers(0, 1 << 20)))
    kind = data.draw(st.sampled_from(sorted(CHANNELS)))
    rows, columns = data.draw(st.integers(8, 220)), data.draw(st.integers(8, 220))
    pad = data.draw(st.integers(0, 13))
    whole = picture(rng, rows, columns + pad, CHANNELS[kind])
    pixels = whole[:, :columns]
    if data.draw(st.booleans()):
        pixels = pixels[::-1]  # the last row first: a stride below 0
    roi = None
    if data.draw(st.booleans()):
        top, left = data.draw(st.integers(0, rows - 8)), data.draw(st.integers(0, columns - 8))
        roi = (top, left, data.draw(st.integers(8, rows - top)), data.draw(st.integers(8, columns - left)))
    with_spacing = data.draw(st.booleans())
    spacing = (0.07, 0.31) if with_spacing else None
    part = pixels if roi is None else pixels[roi[0] : roi[0] + roi[2], roi[1] : roi[1] + roi[3]]
    want = there.predict(Frame(pixels=part, pixel_format=PixelFormat(kind), spacing_mm=spacing, seq=5))
    fields = {} if roi is None else dict(zip(("roi_row", "roi_column", "roi_rows", "roi_columns"), roi, strict=True))
    if spacing:
        fields |= {"spacing_row_mm": spacing[0], "spacing_column_mm": spacing[1]}
    reading = here.predict(library.frame(pixels, kind, seq=5, **fields))
    assert_same(here, reading, want, placed=True)


@pytest.fixture(scope="module")
def sessions(bundles: dict[str, Path], library: Library) -> Any:
    """Open sessions of both runtimes for three bundles."""
    from unittest import mock

    from tinyusfm_runtime import session

    real_load, real_names = session.load, session.names
    with (
        mock.patch.object(
            session, "load", lambda kind, name: stub_module() if name == "stub" else real_load(kind, name)
        ),
        mock.patch.object(session, "names", lambda kind: (*real_names(kind), "stub")),
    ):
        opened = {
            name: (Session(library, bundles[name]), PythonSession.open(bundles[name]))
            for name in ("stretch", "letterbox", "labels")
        }
        yield opened
    for here, there in opened.values():
        here.close()
        there.close()


def test_an_output_that_is_not_finite_makes_no_mask(library: Library, make_stub: MakeStub) -> None:
    bundle = make_stub("nan_from=40")
    with Session(library, bundle) as session:
        frame = library.frame(picture(np.random.default_rng(0), 90, 90, 1))
        valid = [session.predict(frame) for _ in range(60)]
        bad = [reading for reading in valid if not reading.valid]
        assert bad and all(reading.mask_HW() is None and not reading.measured and not reading.found for reading in bad)
