"""Session: opens only what is verified and answers rightly, and says for every frame what answered."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import GOLDEN_SEEDS, SIDE, NumpyEngine, Parts, make_parts, tiny_logits, tiny_spec
from tinyusfm_runtime import session as session_module
from tinyusfm_runtime.bundle.arrays import pack_arrays
from tinyusfm_runtime.bundle.manifest import ArtefactState, gate_limits
from tinyusfm_runtime.bundle.reader import GOLDEN_REFERENCE, Bundle
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import (
    BundleError,
    EngineError,
    FrameError,
    InputError,
    MissingExtra,
    TamperedError,
    UnsupportedError,
    UnverifiedError,
)
from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.numerics.shape import fill_holes, largest_component
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import GOLDEN_FRAMES_AT_START, WARM_UP_RUNS, Session
from tinyusfm_runtime.spec import AspectPolicy, PreprocessSpec

PlugIn = type[NumpyEngine]
OPENING_RUNS = 1 + WARM_UP_RUNS


@pytest.fixture
def session(fake_bundle: Path, plug_in: PlugIn) -> Session:
    """A session on the numpy engine."""
    return Session.open(fake_bundle)


def refusal(error: type[Exception], bundle: Path, **options: Any) -> str:
    """The one line with which a session is refused."""
    with pytest.raises(error) as caught:
        Session.open(bundle, **options)
    assert type(caught.value) is error and "\n" not in str(caught.value)
    return str(caught.value)


def bent(change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """An engine fault: changes the logits."""
    return staticmethod(lambda outputs: {**outputs, "logits": change(outputs["logits"]).astype(np.float32)})


# ---- opening


def test_it_opens_checks_and_warms_up(fake_bundle: Path, fake_parts: Parts, plug_in: PlugIn) -> None:
    with Session.open(fake_bundle, threads=3) as session:
        (engine,) = plug_in.made
        assert engine.files == {"model.onnx": fake_parts.files["artefacts/fake-fp32/model.onnx"]}
        assert engine.config is not None and engine.config.threads == session.threads == 3
        assert engine.config.rest_precision == "f32"
        assert engine.runs == OPENING_RUNS + GOLDEN_FRAMES_AT_START
        assert set(session.startup) == {"verify_hashes", "load", "first_frame", "golden", "warm_up"}
        assert all(ms >= 0 for ms in session.startup.values())
        assert session.description == f"fake-fp32 on numpy {np.__version__}"
    assert engine.closed


def test_an_open_bundle_may_be_handed_in(fake_bundle: Path, plug_in: PlugIn) -> None:
    bundle = Bundle.open(fake_bundle)
    with Session.open(bundle) as session:
        assert session.manifest is bundle.manifest and session.path == fake_bundle


def test_threads_are_at_least_one_and_a_whole_number(fake_bundle: Path, plug_in: PlugIn) -> None:
    with Session.open(fake_bundle) as session:
        assert 1 <= session.threads <= 4
    for threads in (0, -1, 10**6, 1.5, True, "2"):
        refusal(InputError, fake_bundle, threads=threads)


def test_a_spoilt_bundle_is_not_opened(fresh_bundle: Path, plug_in: PlugIn) -> None:
    (fresh_bundle / "artefacts/fake-fp32/model.onnx").write_bytes(bytes(1024))
    refusal(TamperedError, fresh_bundle)
    refusal(InputError, fresh_bundle / "nothing")
    assert plug_in.made == [], "no engine sees bytes that were not verified"


@pytest.mark.parametrize("change", [{"state": ArtefactState.UNVERIFIED}, {"gated": False}])
def test_an_unverified_artefact_opens_on_request_only_and_marks_results(
    fake_parts: Parts, tmp_path: Path, plug_in: PlugIn, phantom_frame: Frame, change: dict[str, Any]
) -> None:
    path = fake_parts.with_artefact(**change).publish(tmp_path / "b")
    assert "unverified" in refusal(UnverifiedError, path)
    with Session.open(path, allow_unverified=True) as session:
        assert session.predict(phantom_frame).verified is False


def test_a_verified_artefact_says_so(session: Session, phantom_frame: Frame) -> None:
    prediction = session.predict(phantom_frame)
    assert prediction.verified and prediction.valid and not prediction.degraded


# ---- which artefact


@pytest.fixture
def two_levels(tiny_files: Callable[[str], dict[str, bytes]], tmp_path: Path) -> Path:
    """A bundle with an OpenVINO and an ONNX artefact, in this order."""
    parts = make_parts({"ov": tiny_files("ov"), "ort": tiny_files("ort")})
    return parts.publish(tmp_path / "two")


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({}, "openvino-fp32"),
        ({"target": "onnx"}, "onnx-fp32"),
        ({"target": "ort"}, "onnx-fp32"),
        ({"target": "ONNXRuntime"}, "onnx-fp32"),
        ({"target": "ov", "precision": "FP32"}, "openvino-fp32"),
    ],
)
def test_the_first_artefact_that_fits_is_taken(two_levels: Path, options: dict[str, str], chosen: str) -> None:
    with Session.open(two_levels, **options) as session:
        assert session.artefact.name == chosen
        assert ("OpenVINO" in session.description) == chosen.startswith("openvino")


@pytest.mark.parametrize("options", [{"target": "coreml"}, {"precision": "int8"}, {"target": "onnx", "precision": "x"}])
def test_what_the_bundle_does_not_have_is_named(two_levels: Path, options: dict[str, str]) -> None:
    message = refusal(InputError, two_levels, **options)
    assert "openvino-fp32" in message and "onnx-fp32" in message


def test_a_missing_library_never_falls_back_in_silence(two_levels: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    message = refusal(MissingExtra, two_levels)
    assert "[openvino]'" in message and "the bundle also has onnx-" in message
    with Session.open(two_levels, target="onnx") as session:
        assert "ONNX Runtime" in session.description


def test_an_engine_nobody_knows_is_unsupported(fake_parts: Parts, tmp_path: Path) -> None:
    path = fake_parts.with_artefact(engine="warp").publish(tmp_path / "b")
    assert "'warp'" in refusal(UnsupportedError, path)


def test_bf16_is_refused_on_a_cpu_without_it(
    engine_parts: Callable[[str], Parts], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = engine_parts("ov").with_artefact(rest_precision="bf16")
    path = parts.publish(tmp_path / "b")
    from tinyusfm_runtime.engines import ov

    monkeypatch.setattr(ov, "machine_card", lambda: replace(machine_card(), features=("avx2",)))
    assert "bf16" in refusal(UnsupportedError, path)


def test_an_engine_that_fails_to_load_is_closed(
    fake_bundle: Path, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: NumpyEngine, *args: object) -> None:
        raise EngineError("no")

    monkeypatch.setattr(plug_in, "load", fail)
    refusal(EngineError, fake_bundle)
    assert plug_in.made[0].closed


# ---- the golden gate


FAULTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "shifted": lambda logits: np.roll(logits, 3, axis=3),
    "mirrored": lambda logits: logits[..., ::-1],
    "negated": lambda logits: -logits,
    "scaled": lambda logits: logits * 1.2,
    "biased": lambda logits: logits + 0.1,
    "noisy": lambda logits: logits + np.random.default_rng(0).normal(0, 0.1, logits.shape),
    "empty": lambda logits: np.full_like(logits, -9),
    "one pixel": lambda logits: np.where(np.arange(logits.size).reshape(logits.shape) == 99, 30, logits),
    "nan": lambda logits: np.where(logits > 2, np.nan, logits),
    "inf": lambda logits: np.where(logits > 2, np.inf, logits),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_engine_that_answers_otherwise_is_refused(fake_bundle: Path, plug_in: PlugIn, fault: str) -> None:
    plug_in.bend = bent(FAULTS[fault])
    message = refusal(EngineError, fake_bundle)
    assert "golden" in message and "export it again" in message
    assert plug_in.made[0].closed


def test_small_roundings_are_not_refused(fake_bundle: Path, plug_in: PlugIn) -> None:
    plug_in.bend = bent(lambda logits: logits + 0.005)
    with Session.open(fake_bundle) as session:
        assert session.verified


def test_the_gate_is_what_refuses(fake_bundle: Path, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: without the comparison a mirrored answer is opened."""
    plug_in.bend = bent(FAULTS["mirrored"])
    monkeypatch.setattr(Session, "run_golden", lambda self, full=False: True)
    with Session.open(fake_bundle) as session:
        assert session.verified, "nothing else looks at what the engine answers"


@pytest.mark.parametrize("engine", ["ort", "ov"])
def test_perturbed_weights_are_refused(engine: str, engine_parts: Callable[[str], Parts], tmp_path: Path) -> None:
    """Weights changed before hashing, so that only the golden frames can tell."""
    parts = engine_parts(engine)
    Session.open(parts.publish(tmp_path / "good")).close()
    from tests.conftest import tiny_kernel
    from tinyusfm_runtime.bundle.manifest import file_entry

    before = tiny_kernel().tobytes()
    after = (tiny_kernel() * np.float32(1.1)).tobytes()
    artefact = parts.artefacts[0]
    files = {path: parts.files[path].replace(before, after) for path in artefact.files}
    assert any(files[path] != parts.files[path] for path in files)
    changed = replace(parts, files={**parts.files, **files})
    changed = changed.with_artefact(files={path: file_entry(content) for path, content in files.items()})
    assert "logit_abs" in refusal(EngineError, changed.publish(tmp_path / "bad"))


def runs_at_opening(bundle: Path, plug_in: PlugIn) -> int:
    """Golden frames an opening runs."""
    Session.open(bundle).close()
    return plug_in.made[-1].runs - OPENING_RUNS


def test_on_another_class_of_cpu_all_frames_run_against_the_reference(
    fake_bundle: Path, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runs_at_opening(fake_bundle, plug_in) == GOLDEN_FRAMES_AT_START
    monkeypatch.setattr(session_module, "machine_card", lambda: replace(machine_card(), features=("avx2",)))
    assert runs_at_opening(fake_bundle, plug_in) == len(GOLDEN_SEEDS)
    # other roundings are what another class of CPU has: the masks decide there
    plug_in.bend = bent(lambda logits: logits * 1.05)
    Session.open(fake_bundle).close()
    plug_in.bend = bent(FAULTS["shifted"])
    assert "against reference" in refusal(EngineError, fake_bundle)
    plug_in.bend = bent(FAULTS["nan"])
    assert "dice" in refusal(EngineError, fake_bundle)


def test_a_machine_that_cannot_be_known_runs_all_frames(
    fake_bundle: Path, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "machine_card", lambda: replace(machine_card(), features=()))
    assert runs_at_opening(fake_bundle, plug_in) == len(GOLDEN_SEEDS)


@pytest.mark.parametrize(
    "needs", [{"library_version": "0.1"}, {"library": "nothing-of-that-name"}, {"cpu_features": None}]
)
def test_another_library_version_runs_all_frames(
    fake_parts: Parts, tmp_path: Path, plug_in: PlugIn, needs: dict[str, Any]
) -> None:
    requirements = {**fake_parts.artefacts[0].requirements, **needs}
    path = fake_parts.with_artefact(requirements=requirements).publish(tmp_path / "b")
    assert runs_at_opening(path, plug_in) == len(GOLDEN_SEEDS)


def test_the_artefacts_own_gate_is_the_limit_on_another_class_of_cpu(
    fake_parts: Parts, tmp_path: Path, plug_in: PlugIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "machine_card", lambda: replace(machine_card(), features=("avx2",)))
    plug_in.bend = bent(lambda logits: np.roll(logits, 1, axis=3))
    refusal(EngineError, fake_parts.publish(tmp_path / "strict"))
    gate = {"gate": {"dice_mean": 0.5, "dice_worst": 0.5, "hc_p95_mm": 50, "differing_pixels": 1, "unknown": 3}}
    Session.open(fake_parts.with_artefact(gate=gate).publish(tmp_path / "wide")).close()


def test_run_golden_reports_numbers(session: Session, plug_in: PlugIn) -> None:
    own, full = session.run_golden(), session.run_golden(full=True)
    assert own and own.against == "own outputs" and own.frames == GOLDEN_FRAMES_AT_START
    assert set(own.numbers) == {"logit_abs", "differing_pixels", "hc_mm"}
    assert full and full.against == "reference" and full.frames == len(GOLDEN_SEEDS)
    assert full.numbers["dice_mean"] == 1.0 and full.numbers["hc_p95_mm"] == 0.0
    plug_in.bend = bent(FAULTS["biased"])
    report = session.run_golden()
    assert not report and report.to_json()["passed"] is False and report.reasons


def test_golden_answers_of_another_number_are_a_broken_bundle(
    fake_parts: Parts, tmp_path: Path, plug_in: PlugIn
) -> None:
    for name, logits in (
        (fake_parts.artefacts[0].golden, np.zeros((3, 1, SIDE, SIDE), np.float16)),
        (GOLDEN_REFERENCE, np.zeros((3, 1, SIDE, SIDE), np.float32)),
    ):
        files = {**fake_parts.files, name: pack_arrays({"logits": logits})}
        path = fake_parts.publish(tmp_path / "b", files=files)
        with pytest.raises(BundleError):
            Session.open(path).run_golden(full=True)


# ---- predicting


def test_a_prediction_says_everything(session: Session) -> None:
    frame = replace(make_phantom(3).frame, seq=41, t_recv_ns=1)
    prediction = session.predict(frame)
    assert prediction.seq == 41 and prediction.t_recv_ns == 1
    assert prediction.age_ms is not None and prediction.age_ms > 0
    assert (prediction.target, prediction.precision) == ("fake", "fp32")
    assert prediction.engine == session.engine_description
    mask = prediction.mask_HW
    assert (
        mask is not None
        and mask.dtype == np.uint8
        and mask.shape == (SIDE, SIDE)
        and set(np.unique(wide(mask))) == {0, 1}
    )
    assert prediction.measurement is not None and prediction.measurement.hc_mm is not None
    times = prediction.timings
    parts = times.preprocess_ms + times.infer_ms + times.postprocess_ms
    assert 0 < parts <= times.total_ms + 1e-6, "the parts do not overlap (sums of floats round)"
    assert session.predict(replace(frame, t_recv_ns=None)).age_ms is None


def test_mask_is_the_largest_component_of_the_threshold(session: Session, phantom_frame: Frame) -> None:
    prediction = session.predict(phantom_frame)
    plain = tiny_logits(preprocess(phantom_frame, session.spec.preprocess)[0])[0, 0] > 0
    mask = prediction.mask_HW
    assert mask is not None and mask.sum() > 0
    np.testing.assert_array_equal(mask, fill_holes(largest_component(plain.astype(np.uint8))))
    # pixels of the frame, not of the input
    per_pixel = phantom_frame.pixels.size / mask.size
    assert prediction.measurement is not None
    assert prediction.measurement.area_px == pytest.approx(int(mask.sum()) * per_pixel)


def test_without_spacing_mm_is_none(session: Session, phantom_frame: Frame) -> None:
    measurement = session.predict(replace(phantom_frame, spacing_mm=None)).measurement
    assert measurement is not None and measurement.hc_mm is None and measurement.hc_px > 0


def test_spacing_follows_the_frame(session: Session, phantom_frame: Frame) -> None:
    one = session.predict(replace(phantom_frame, spacing_mm=(0.2, 0.3))).measurement
    two = session.predict(replace(phantom_frame, spacing_mm=(0.4, 0.6))).measurement
    assert one is not None and two is not None and one.hc_mm is not None and two.hc_mm is not None
    assert two.hc_mm == pytest.approx(2 * one.hc_mm, rel=1e-12)


def test_every_pixel_format_answers_alike(session: Session, phantom_frame: Frame) -> None:
    grey = phantom_frame.pixels
    colour = np.repeat(grey[..., None], 3, axis=2)
    alpha = np.concatenate([colour, np.full_like(grey, 9)[..., None]], axis=2)
    want = session.predict(phantom_frame).mask_HW
    for pixels, pixel_format in ((colour, PixelFormat.RGB), (colour, PixelFormat.BGR), (alpha, PixelFormat.RGBA)):
        got = session.predict(replace(phantom_frame, pixels=pixels, pixel_format=pixel_format)).mask_HW
        np.testing.assert_array_equal(got, want)
    limited = replace(phantom_frame, video_range=VideoRange.LIMITED)
    assert not np.array_equal(session.predict(limited).mask_HW, want)


def test_a_prediction_owns_its_mask(session: Session) -> None:
    one = session.predict(make_phantom(1).frame).mask_HW
    assert one is not None
    kept = one.copy()
    for seed in range(2, 6):
        session.predict(make_phantom(seed).frame)
    np.testing.assert_array_equal(one, kept)
    assert one.flags.writeable


def test_frames_of_changing_size_are_answered(session: Session) -> None:
    for height, width in ((96, 128), (270, 400), (65, 300), (97, 64)):
        assert session.predict(make_phantom(1, height=height, width=width).frame).valid


@pytest.mark.parametrize("thing", [None, 3, "frame", np.zeros((9, 9)), object()])
def test_what_is_no_frame_is_refused(session: Session, thing: Any) -> None:
    with pytest.raises(FrameError):
        session.predict(thing)


def test_pixels_that_are_no_codes_never_become_a_frame() -> None:
    for dtype in ("float32", "float64", "int16", "bool", "complex64"):
        with pytest.raises(FrameError):
            Frame(pixels=np.zeros((SIDE, SIDE), dtype))


def test_a_crop_outside_the_frame_is_refused_and_the_session_lives_on(
    tiny_files: Callable[[str], dict[str, bytes]], tmp_path: Path, plug_in: PlugIn
) -> None:
    spec = tiny_spec(preprocess=PreprocessSpec(height=SIDE, width=SIDE, crop=(10, 10, 80, 100)))
    session = Session.open(make_parts({"fake": tiny_files("fake")}, spec).publish(tmp_path / "b"))
    with pytest.raises(FrameError):
        session.predict(Frame(pixels=np.zeros((64, 64), np.uint8)))
    assert session.predict(make_phantom(1).frame).valid


def test_predict_tensor_is_predict_without_preprocessing(session: Session, phantom_frame: Frame) -> None:
    tensor, placement = preprocess(phantom_frame, session.spec.preprocess)
    got, want = session.predict_tensor(tensor, spacing_mm=placement.spacing_mm), session.predict(phantom_frame)
    np.testing.assert_array_equal(got.mask_HW, want.mask_HW)
    assert got.measurement is not None and want.measurement is not None
    assert got.measurement.hc_mm == want.measurement.hc_mm and got.measurement.confidence == want.measurement.confidence
    assert got.mask_on_frame().shape == (SIDE, SIDE)


BAD_OUTPUTS: dict[str, Callable[[dict[str, np.ndarray]], Any]] = {
    "none": lambda outputs: {},
    "double": lambda outputs: {"logits": outputs["logits"].astype(np.float64)},
    "small": lambda outputs: {"logits": outputs["logits"][:, :, ::2, ::2]},
    "flat": lambda outputs: {"logits": outputs["logits"][0]},
    "batch": lambda outputs: {"logits": np.repeat(outputs["logits"], 2, axis=0)},
    "channels": lambda outputs: {"logits": np.repeat(outputs["logits"], 3, axis=1)},
}


@pytest.mark.parametrize("bad", BAD_OUTPUTS)
def test_outputs_of_another_shape_or_type_are_an_engine_error(session: Session, plug_in: PlugIn, bad: str) -> None:
    plug_in.bend = staticmethod(BAD_OUTPUTS[bad])
    with pytest.raises(EngineError):
        session.predict(make_phantom(1).frame)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["logits", "auxiliary"])
def test_an_output_that_is_not_finite_is_never_shown(
    session: Session, plug_in: PlugIn, phantom_frame: Frame, value: float, where: str
) -> None:
    def spoil(outputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs["auxiliary"] = np.zeros(9, np.float32)
        outputs[where].flat[7] = value
        return outputs

    plug_in.bend = staticmethod(spoil)
    prediction = session.predict(phantom_frame)
    assert prediction.valid is False
    assert prediction.mask_HW is None and prediction.measurement is None and prediction.scores is None
    assert not prediction.auxiliary
    with pytest.raises(InputError):
        prediction.mask_on_frame()
    plug_in.bend = staticmethod(lambda outputs: outputs)
    assert session.predict(phantom_frame).valid


def test_auxiliary_outputs_are_handed_on(session: Session, plug_in: PlugIn, phantom_frame: Frame) -> None:
    plug_in.bend = staticmethod(lambda outputs: {**outputs, "doubt": np.ones((1, 4), np.float32)})
    auxiliary = session.predict(phantom_frame).auxiliary
    assert list(auxiliary) == ["doubt"]


# ---- the mask on the frame


def brute_force_mask(prediction: Any) -> np.ndarray:
    """Pixel by pixel, in fractions."""
    from fractions import Fraction

    row, col, height, width = prediction.placement.crop
    top, left, box_h, box_w = prediction.placement.box
    out = np.zeros(prediction.placement.frame_size, np.uint8)
    for i in range(height):
        for j in range(width):
            y = top + int(Fraction(2 * i + 1, 2) * box_h / height)
            x = left + int(Fraction(2 * j + 1, 2) * box_w / width)
            out[row + i, col + j] = prediction.mask_HW[y, x]
    return out


@pytest.mark.parametrize("aspect", AspectPolicy)
@pytest.mark.parametrize("crop", [None, (8, 5, 60, 90)])
@pytest.mark.parametrize("size", [(96, 128), (70, 300), (140, 97)])
def test_mask_on_frame_lies_where_the_head_is(
    session: Session, aspect: AspectPolicy, crop: tuple[int, int, int, int] | None, size: tuple[int, int]
) -> None:
    session.spec = tiny_spec(preprocess=PreprocessSpec(height=SIDE, width=SIDE, aspect=aspect, crop=crop))
    prediction = session.predict(make_phantom(2, height=size[0], width=size[1]).frame)
    on_frame = prediction.mask_on_frame()
    assert on_frame.shape == size
    np.testing.assert_array_equal(on_frame, brute_force_mask(prediction))


# ---- life and threads


def test_a_closed_session_says_so(session: Session, plug_in: PlugIn, phantom_frame: Frame) -> None:
    session.close()
    session.close()
    session.cancel()
    assert plug_in.made[0].closed
    with pytest.raises(EngineError, match="closed"):
        session.predict(phantom_frame)


def test_cancel_reaches_the_engine(session: Session, plug_in: PlugIn) -> None:
    session.cancel()
    assert plug_in.made[0].cancelled


def test_predictions_from_many_threads_do_not_mix(engine_parts: Callable[[str], Parts], tmp_path: Path) -> None:
    frames = [make_phantom(seed, height=96, width=128).frame for seed in range(4)]
    wrong: list[int] = []
    with Session.open(engine_parts("ov").publish(tmp_path / "b"), threads=1) as session:
        want = [session.predict(frame).mask_HW for frame in frames]

        def work(i: int) -> None:
            for _ in range(40):
                if not np.array_equal(session.predict(frames[i]).mask_HW, want[i]):
                    wrong.append(i)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_engines_agree_on_the_masks(two_levels: Path, phantom_frame: Frame) -> None:
    with Session.open(two_levels, target="ov") as one, Session.open(two_levels, target="ort") as two:
        a, b = one.predict(phantom_frame), two.predict(phantom_frame)
    assert np.mean(np.asarray(a.mask_HW) != np.asarray(b.mask_HW)) < 0.001
    assert list(a.auxiliary) == list(b.auxiliary) == ["pooled"]


def test_a_real_gate_reports_limits_are_found_under_their_names_here(fake_parts: Parts) -> None:
    limits = {"dice_mean": 0.9, "cosine": 0.5, "probability_drift": 0.3, "min_frames": 32, "hc_p95_mm": True}
    artefact = fake_parts.with_artefact(gate={"passed": True, "limits": limits}).artefacts[0]
    assert gate_limits(artefact) == {"dice_mean": 0.9, "cosine_worst": 0.5, "drift_worst": 0.3}
