"""The demo, whole: what it prints and what it leaves, on the shipped student and the engines that are installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tinyusfm_edge.cli.main import main
from tinyusfm_edge.cli.start.demo import ENGINES, KNOWN_SEEDS
from tinyusfm_export.verify.gate_frames import PHANTOM_SEEDS
from tinyusfm_export.verify.golden import GOLDEN_SEEDS
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.phantom import make_phantom, whole_heads

HERE = [target for target, _ in ENGINES if plugins.available("engines", target).usable]


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """What one run of the demo left behind and printed."""
    for name in ("torch", "safetensors", "onnx", "pydicom", "av"):
        pytest.importorskip(name, reason="install tinyusfm-edge[demo]")
    if not HERE:
        pytest.skip("no engine is installed")
    import contextlib
    import io

    folder, printed = tmp_path_factory.mktemp("demo") / "demo-out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(["demo", "--out", str(folder)]) == 0
    return folder, printed.getvalue()


@pytest.mark.slow
def test_demo_prints_one_table_with_every_engine(left: tuple[Path, str]) -> None:
    _, printed = left
    for target in HERE:
        row = next(line for line in printed.splitlines() if line.startswith(target))
        assert " int8 " in row and row.endswith("passed")
        assert f"verdict    {target}: " in printed and f"phantoms   {target}: known circumference" in printed
    assert "full gate against the live PyTorch reference" in printed


@pytest.mark.slow
def test_demo_leaves_a_bundle_an_image_a_video_numbers_and_a_report(left: tuple[Path, str]) -> None:
    folder, _ = left
    assert sorted(path.name for path in folder.iterdir()) == [
        "demo.json", "fetal-head-int8.bundle", "overlay.mp4", "overlay.png", "report.html",
    ]  # fmt: skip
    manifest = Bundle.open(folder / "fetal-head-int8.bundle").manifest
    assert [artefact.target for artefact in manifest.artefacts] == HERE
    assert all(artefact.trusted for artefact in manifest.artefacts)
    numbers = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert numbers["passed"] and len(numbers["truth_mm"]) == len(KNOWN_SEEDS)
    for replay in numbers["replays"]:
        errors = [
            abs(said - truth)
            for said, truth in zip(replay["phantom_hc_mm"], numbers["truth_mm"], strict=True)
            if said is not None
        ]
        assert len(errors) == len(KNOWN_SEEDS) and sorted(errors)[len(errors) // 2] < 5.0


@pytest.mark.slow
def test_demo_report_is_whole_and_fetches_nothing(left: tuple[Path, str]) -> None:
    folder, _ = left
    text = (folder / "report.html").read_text(encoding="utf-8")
    headings = (
        "Targets",
        "Was INT8 worth it here?",
        "Latency, frame to mask",
        "Accuracy on patients (model card)",
        "Phantoms of known head circumference",
        "What it looks like",
        "Provenance",
        "Frames of the gate",
    )
    for heading in headings:
        assert f"<h2>{heading}</h2>" in text
    assert "http://" not in text.replace("http://www.w3.org/2000/svg", "") and "https://" not in text
    assert "<script" not in text and text.count("<svg") == 3 and text.count("data:image/png;base64,") == 5
    weights = Bundle.open(folder / "fetal-head-int8.bundle").manifest.weights_sha256
    assert weights in text and "not a medical device" in text


@pytest.mark.slow
def test_demo_video_holds_phantoms_and_the_whole_clip(left: tuple[Path, str]) -> None:
    av = pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    with av.open(str(left[0] / "overlay.mp4")) as container:
        count = sum(1 for _ in container.decode(video=0))
    assert count == 15 * len(KNOWN_SEEDS) + 30


def test_heads_of_the_demo_lie_inside_the_field_of_view() -> None:
    """The first eight such phantoms from 200 on; none is picked by how well it is read."""
    assert tuple(phantom.frame.seq for phantom in whole_heads(200, len(KNOWN_SEEDS))) == KNOWN_SEEDS
    assert make_phantom(201).outside > 0


def test_phantoms_of_the_demo_are_seen_nowhere_else() -> None:
    assert not set(KNOWN_SEEDS) & (set(PHANTOM_SEEDS) | set(GOLDEN_SEEDS))


@pytest.mark.parametrize("place", ["file/demo-out", "file"])
def test_demo_into_a_place_that_cannot_be_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    for name in ("torch", "safetensors", "onnx", "pydicom", "av"):
        pytest.importorskip(name, reason="install tinyusfm-edge[demo]")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert main(["demo", "--out", str(tmp_path / place)]) in (2, 3)
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_demo_without_an_engine_names_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("torch", "safetensors", "onnx", "pydicom", "av"):
        pytest.importorskip(name, reason="install tinyusfm-edge[demo]")
    import sys

    for name in ("openvino", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 3
    captured = capsys.readouterr()
    assert captured.out.count("left out") == len(ENGINES)
    assert captured.err.count("\n") == 1 and "[demo]'" in captured.err
    assert list(tmp_path.iterdir()) == []
