"""Which frames judge: the rule, their names and hashes, and that nothing is fetched from anywhere."""

from __future__ import annotations

import json
import socket

import numpy as np
import pytest

from tinyusfm_calibration.sets import NamedFrame, phantom_frames, pixels_sha256
from tinyusfm_export.verify import gate_frames
from tinyusfm_export.verify.gate_frames import (
    GateFrames,
    choose_gate_frames,
    clip_frames,
    clip_path,
    shipped_gate_frames,
)
from tinyusfm_export.verify.golden import GOLDEN_SEEDS
from tinyusfm_runtime.errors import InputError, MissingExtra
from tinyusfm_runtime.frame import Frame

SOME = [NamedFrame(id="a.png", frame=Frame(pixels=np.arange(96, dtype=np.uint8).reshape(8, 12)))]


def test_data_comes_first_then_calibration_then_the_shipped_frames() -> None:
    calibration = phantom_frames([1, 2])
    assert choose_gate_frames(data=SOME, calibration=calibration, shipped=True).kind == "data"
    assert choose_gate_frames(calibration=calibration, shipped=True).kind == "calibration"


def test_a_foreign_student_without_frames_is_an_error() -> None:
    with pytest.raises(InputError, match="--data"):
        choose_gate_frames(shipped=False)
    with pytest.raises(InputError, match="--data"):
        choose_gate_frames(data=[], calibration=[], shipped=False)


def test_an_empty_gate_is_an_error() -> None:
    with pytest.raises(InputError, match="no frames"):
        GateFrames(kind="data", frames=())
    with pytest.raises(InputError, match="kind"):
        GateFrames(kind="web", frames=tuple(SOME))


def test_the_shipped_gate_is_phantoms_and_the_real_clip_of_30_frames() -> None:
    pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'tinyusfm-edge[dicom]'")
    frames = shipped_gate_frames(range(100, 103))
    assert [named.stratum for named in frames.frames] == ["phantom"] * 3 + ["clip"] * 30
    assert frames.frames[3].id == "examples_ybr_color.dcm#0"
    pixels = [named.frame.pixels for named in frames.frames[3:]]
    assert len({pixels_sha256(named.frame) for named in frames.frames[3:]}) > 1
    assert all(image.shape == (240, 320, 3) and image.std() > 5 for image in pixels)


def test_the_clip_is_read_inside_the_package_and_nothing_is_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    pydicom = pytest.importorskip("pydicom", reason="pydicom is not installed: pip install 'tinyusfm-edge[dicom]'")

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    assert clip_path().is_relative_to(next(iter(pydicom.__path__)))
    assert len(clip_frames()) == 30


def test_without_pydicom_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_frames.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"pip install .+\[dicom\]"):
        shipped_gate_frames(range(100, 101))


def test_gate_phantoms_are_neither_golden_nor_training_phantoms_and_enough() -> None:
    assert not set(gate_frames.PHANTOM_SEEDS) & set(GOLDEN_SEEDS)
    assert max(gate_frames.PHANTOM_SEEDS) < 1_000_000
    assert len(gate_frames.PHANTOM_SEEDS) >= 32


def test_the_provenance_names_and_hashes_every_frame_and_holds_no_pixels() -> None:
    frames = GateFrames(kind="phantom", frames=tuple(phantom_frames([100, 101])), source="two")
    told = frames.provenance()
    assert told["count"] == 2
    assert told["ids"] == ["phantom:100", "phantom:101"]
    assert told["pixels_sha256"] == [pixels_sha256(named.frame) for named in frames.frames]
    assert "not accuracy on patients" in told["about"]
    assert len(json.dumps(told)) < 1000
