"""A student of one's own: ranges from a file or from the data, counts before work, a missed gate's report, the gate."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.needs import needs
from tests.one_thread import one_thread
from tests.tables import read_rows, write_rows
from tinyusfm_edge.cli.main import main
from tinyusfm_export.verify.gate import GATE_KEYS, Gate

torch = pytest.importorskip("torch", reason="install tinyusfm-edge[export]")
needs("onnx", reason="install tinyusfm-edge[export]")
needs("onnxruntime", reason="install tinyusfm-edge[onnxruntime]")

QUICK = ["--no-plot", "--frames", "2"]

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student file of two blocks, without activation ranges."""
    from tinyusfm_edge.models.checkpoint import save_student
    from tinyusfm_edge.models.student import StudentConfig, build_student
    from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

    torch.manual_seed(7)
    config = StudentConfig(task="classify", num_classes=2, image_size=32, width=24, heads=3, depth=2, drop_path=0.0)
    spec = ModelSpec(
        name="own", task=Task.CLASSIFY, labels=("head", "none"), preprocess=PreprocessSpec(height=32, width=32),
        architecture=config.to_json(),
    )  # fmt: skip
    path = tmp_path_factory.mktemp("student") / "own.safetensors"
    save_student(path, build_student(config).eval(), spec)
    return path


@pytest.fixture(scope="module")
def set_file(student: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ``calibrate`` wrote for the student."""
    pytest.importorskip("sklearn", reason="install tinyusfm-edge[calibration]")
    out = tmp_path_factory.mktemp("set") / "set.json"
    assert main(["calibrate", str(student), str(data), "--out", str(out), "--count", "16", "--method", "minmax"]) == 0
    return out


def test_sensitivity_measures_a_student_without_ranges_on_its_data(
    student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cost.json"
    assert main(["sensitivity", str(student), *QUICK, "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "--data" in said or "--calibration" in said
    assert main(["sensitivity", str(student), "--data", str(data), *QUICK, "--out", str(out)]) == 0
    shown = capsys.readouterr()
    assert f"tinyusfm-edge export {student} --int8 --data {data} --mixed {out}" in shown.out
    assert "calibrate" in shown.err
    page = out.with_suffix(".html").read_text(encoding="utf-8")
    layer = json.loads(out.read_text(encoding="utf-8"))["layers"][0]["layer"]
    assert f">{layer}</text>" in page, "each bar stands beside its layer"
    assert len(json.loads(out.read_text(encoding="utf-8"))["layers"]) >= 6


def test_sensitivity_takes_a_calibration_file_and_export_its_answer(
    student: Path, data: Path, set_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "cost.json"
    given = ["--data", str(data), "--calibration", str(set_file)]
    assert main(["sensitivity", str(student), *given, *QUICK, "--out", str(out)]) == 0
    assert f"--calibration {set_file}" in capsys.readouterr().out
    bundle = tmp_path / "mixed.bundle"
    export = ["export", str(student), "--target", "onnx", "--int8", "--no-compare", "--mixed", str(out), *given]
    assert main([*export, "--out", str(bundle)]) == 0
    assert (bundle / "manifest.json").is_file()


def test_calibration_and_ranges_exclude_each_other(student: Path, data: Path, set_file: Path, tmp_path: Path) -> None:
    both = ["--data", str(data), "--calibration", str(set_file), "--ranges", str(set_file)]
    for command in (["sensitivity"], ["export", "--int8"], ["qat", "--steps", "1"]):
        assert main([command[0], str(student), *command[1:], *both]) == 2
    assert main(["sensitivity", str(student), "--data", str(data), "--ranges", str(tmp_path / "none.json")]) == 2


def test_qat_starts_from_a_calibration_file_and_its_ranges_go_on(
    student: Path, data: Path, set_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "taught.safetensors"
    short = ["--steps", "2", "--batch", "2", "--frames", "4", "--out", str(out)]
    assert main(["qat", str(student), "--data", str(data), "--calibration", str(set_file), *short]) == 0
    found = json.loads(out.with_suffix(".ranges.json").read_text(encoding="utf-8"))
    assert found["method"].startswith("minmax")
    cost = tmp_path / "cost.json"
    ranges = ["--ranges", str(out.with_suffix(".ranges.json"))]
    assert main(["sensitivity", str(out), "--data", str(data), *ranges, *QUICK, "--out", str(cost)]) == 0
    assert main(["qat", str(student), "--data", str(data), *ranges, "--range-method", "mse", *short]) == 2
    assert "--range-method" in capsys.readouterr().err


def test_too_few_frames_are_said_before_a_student_is_read(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_rows(
        tmp_path / "few", [row for row in read_rows(data) if row["split"] != "val" or int(row["group"]) < 330]
    )
    # neither the student nor an image is there: the count comes first
    command = ["export", str(tmp_path / "none.safetensors"), "--target", "onnx", "--int8", "--data", str(folder)]
    assert main(command) == 1
    assert (
        "nothing was published: needs 32 validation frames, few has 10; add frames, or --gate with "
        "min_frames = 10, recorded in the bundle"
    ) in capsys.readouterr().err


def test_a_missed_gate_leaves_its_report_and_a_pass_removes_it(
    student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict, out = tmp_path / "gate.toml", tmp_path / "small.bundle"
    strict.write_text("float_logits = 0.0\n", encoding="utf-8")
    export = ["export", str(student), "--target", "onnx", "--fp32", "--data", str(data), "--out", str(out)]
    assert main([*export, "--gate", str(strict)]) == 1
    page, report = tmp_path / "small.failed.html", tmp_path / "small.failed.json"
    assert f"report: {page}" in capsys.readouterr().err and not out.exists()
    found = json.loads(report.read_text(encoding="utf-8"))
    assert found["reports"]["onnx-fp32"]["failures"] and found["reports"]["onnx-fp32"]["limits"]["float_logits"] == 0
    html = page.read_text(encoding="utf-8")
    assert "missed" in html and "float_logits" in html and ".png" not in html
    assert main(export) == 0
    assert out.is_dir() and not page.exists() and not report.exists()


def test_gate_show_explains_every_key_and_is_a_gate_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(GATE_KEYS) == set(Gate().to_json())
    assert main(["gate", "show"]) == 0
    text = capsys.readouterr().out
    file = tmp_path / "gate.toml"
    file.write_text(text.replace("min_frames = 32", "min_frames = 10"), encoding="utf-8")
    assert Gate.from_file(file) == Gate(min_frames=10)
    assert main(["gate", "show", str(file)]) == 0
    assert "(default 32)" in capsys.readouterr().out
    assert main(["gate", "show", "--json", "-"]) == 0
    keys = json.loads(capsys.readouterr().out)["keys"]
    assert keys["dice_mean"]["default"] == 0.99 and all(key["meaning"] for key in keys.values())
    assert main(["gate", "show", str(tmp_path / "none.toml")]) == 2
