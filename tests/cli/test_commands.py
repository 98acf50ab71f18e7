"""The commands that need no workshop: run, profile, doctor, on a tiny bundle in real engines."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from tests.cli.conftest import ENGINES
from tests.runtime.test_sinks import predicted
from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.cli.streams.run_counts import RunCounts
from tinyusfm_runtime import plugins
from tinyusfm_runtime.installation import pip_line
from tinyusfm_runtime.numerics.order import wide


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"tinyusfm-edge {console.version()}\n"
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in ("export", "verify", "run", "profile", "doctor", "demo"))


def test_run_prints_what_it_found(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), "phantom:0-3"]) == 0
    out = capsys.readouterr().out
    assert "4, 0 invalid" in out and "frame to mask" in out and "HC median" in out and " mm" in out


def test_run_writes_overlay_and_lines_that_belong_together(bundle: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    overlay, lines = tmp_path / "out.mp4", tmp_path / "out.jsonl"
    assert (
        main(["run", str(bundle), "phantom:0-9", "--overlay", str(overlay), "--jsonl", str(lines), "--limit", "3"]) == 0
    )
    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    assert [record["seq"] for record in records] == [0, 1, 2]
    assert all(record["verified"] and record["valid"] for record in records)
    with av.open(str(overlay)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3
        assert float(container.streams.video[0].average_rate) == pytest.approx(30, rel=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "out.mp4"]


def test_run_jsonl_on_standard_output_is_nothing_but_lines(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(bundle), "phantom:0-2", "--jsonl", "-"]) == 0
    captured = capsys.readouterr()
    assert [json.loads(line)["seq"] for line in captured.out.splitlines()] == [0, 1, 2]
    assert "frame to mask" in captured.err


def test_run_crops_before_anything_is_stored(bundle: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="install tinyusfm-edge[video]")
    place = tmp_path / "out.mp4"
    assert main(["run", str(bundle), "phantom:3", "--crop", "40,60,180,200", "--overlay", str(place)]) == 0
    from tinyusfm_runtime.phantom import make_phantom

    with av.open(str(place)) as container:
        image = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert image.shape == (180, 200, 3)
    inside = make_phantom(3).frame.pixels[40:220, 60:260]
    assert np.median(wide(np.abs(image[..., 1].astype(int) - inside))) < 6


def test_run_takes_the_artefact_it_is_told(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    public = plugins.public_name(ENGINES[0])
    assert main(["run", str(bundle), "phantom:0", "--target", public, "--precision", "fp32", "--threads", "1"]) == 0
    assert f"{public}-fp32" in capsys.readouterr().out
    assert main(["run", str(bundle), "phantom:0", "--precision", "int8"]) == 2
    assert "it has" in capsys.readouterr().err


def test_profile_reports_every_stage_and_keeps_the_samples(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "latency.json"
    assert main(["profile", str(bundle), "--source", "phantom:0-1", "--rounds", "3", "--json", str(place)]) == 0
    out = capsys.readouterr().out
    for stage in ("cold load", "first frame", "preprocess", "infer", "postprocess", "total", "p50", "p90", "p99"):
        assert stage in out
    report = json.loads(place.read_text(encoding="utf-8"))
    assert report["n"] == 6 and {len(samples) for samples in report["samples_ms"].values()} == {6}
    assert report["cold"]["first_frame_ms"] > 0 and report["machine"]["usable_cpus"] >= 1


def test_profile_json_on_standard_output(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["profile", str(bundle), "--source", "phantom:0", "--rounds", "1", "--no-cold", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["cold"] is None


def test_doctor_lists_every_plug_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    listed = {(row["kind"], row["name"]) for row in report["plugins"]}
    wanted = {(kind[:-1], plugins.public_name(name)) for kind in plugins.KINDS for name in plugins.names(kind)}
    assert listed == wanted
    assert report["machine"]["cpu"] and report["preprocessing"]["backend"] in ("native", "numpy")
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert "preprocessing" in table and all(name in table for _, name in wanted)


def test_doctor_gives_the_pip_line_for_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    for name in ("cv2", "PIL", "av", "pydicom", "onnxruntime"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["doctor", "--json", "-"]) == 0
    rows = {(row["kind"], row["name"]): row for row in json.loads(capsys.readouterr().out)["plugins"]}
    for kind, name, extra in (
        ("source", "folder", "images"),
        ("source", "video", "video"),
        ("source", "dicom", "dicom"),
        ("engine", "onnx", "onnxruntime"),
    ):
        row = rows[kind, name]
        assert not row["works"] and row["reason"]
        assert row["install"] == pip_line(extra)
    assert rows["source", "phantom"]["works"]


def test_table_aligns_numbers_to_the_right() -> None:
    text = console.table(("name", "ms"), [("a", "1.5"), ("longer", "12.25")])
    assert text.splitlines() == ["name       ms", "------  -----", "a         1.5", "longer  12.25"]


def test_a_summary_tells_how_probable_the_classes_were() -> None:
    counts = RunCounts()
    for share in (0.9, 0.8, 0.4):
        scores = np.array([1.0 - share, share], np.float32)
        counts.add(predicted(mask_HW=None, measurements=(), scores=scores)[1])
    (line,) = [line for line in counts.lines("engine", ("benign", "malignant")) if line.startswith("labels")]
    assert line.endswith("malignant 2 (mean probability 0.85), benign 1 (mean probability 0.60)")
