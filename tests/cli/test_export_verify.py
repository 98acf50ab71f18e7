"""``export`` and ``verify`` on a small random student in a real engine: gate, data folder, verdict, exit codes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.conftest import SPLITS
from tests.tables import write_raw
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.data.folder import read_data
from tinyusfm_edge.export import bundle_place, make_plan, replaced
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.phantom import make_phantom


@pytest.fixture(scope="module")
def target() -> str:
    """A float32 target that can be built and run here (``integer``, for one, takes int8 only)."""
    for name in ("ort", "ov"):
        if plugins.available("targets", name).usable and plugins.available("engines", name).usable:
            return plugins.public_name(name)
    pytest.skip("no target works here: pip install 'tinyusfm-edge[export,onnxruntime]'")


@pytest.fixture(scope="module")
def bundle(student: Path, data: Path, target: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student exported in float32 with its gate."""
    out = tmp_path_factory.mktemp("bundles") / "small.bundle"
    assert main(["export", str(student), "--target", target, "--fp32", "--data", str(data), "--out", str(out)]) == 0
    return out


def test_data_folder_knows_its_splits_and_spacing(data: Path) -> None:
    found = read_data(data, calibrate=True)
    assert [named.id for named in found.validation] == [f"{seed}.png" for seed in SPLITS["val"]]
    assert {named.id for named in found.calibration} == {f"{seed}.png" for seed in SPLITS["train"]}
    assert found.test_sha256 == {hashlib.sha256((data / f"{s}.png").read_bytes()).hexdigest() for s in SPLITS["test"]}
    truth = make_phantom(320, height=120, width=160).frame.spacing_mm
    assert found.validation[0].frame.spacing_mm == pytest.approx(truth)
    assert read_data(data, calibrate=False).calibration == ()


def test_data_folder_without_a_table_is_dealt_out(data: Path, tmp_path: Path) -> None:
    for seed in range(300, 306):
        (tmp_path / f"{seed}.png").write_bytes((data / f"{seed}.png").read_bytes())
    found = read_data(tmp_path, calibrate=True)
    assert len(found.calibration) == len(found.validation) == 3
    names = [{named.id for named in side} for side in (found.calibration, found.validation)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("row", ["../out.png,val", "/etc/passwd,val", "gone.png,val"])
def test_table_that_points_elsewhere_is_refused(tmp_path: Path, row: str) -> None:
    write_raw(tmp_path, f"file,split\n{row}\n")
    with pytest.raises(InputError, match="outside its folder|absolute path|does not exist"):
        read_data(tmp_path, calibrate=False)


@pytest.mark.parametrize("text", ["", "file,kind\na,b\n", "file,split\na.png\n", "\xff\n"])
def test_table_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    write_raw(tmp_path, text.encode("latin-1"))
    with pytest.raises(InputError, match=r"split\.csv"):
        read_data(tmp_path, calibrate=False)


def test_names_of_bundles_and_the_order_of_precisions() -> None:
    plan = make_plan(None, None, [], None, None)
    assert (plan.targets, plan.precisions, plan.threads) == (["openvino"], ["int8"], 1)
    plan = make_plan("jetson_agx_orin", None, [], None, None)
    assert (plan.targets, plan.precisions) == (["tensorrt"], ["int8", "fp16"])
    plan = make_plan("jetson_agx_orin", "onnx,openvino", ["fp32"], 3, None)
    assert (plan.targets, plan.precisions, plan.threads) == (["onnx", "openvino"], ["fp32"], 3), "options win"
    assert bundle_place(None, "fetal-head", ["openvino"], ["int8"]) == Path("fetal-head-openvino-int8.bundle")
    assert bundle_place(Path("build"), "a", ["x", "y"], ["fp16"]) == Path("build/a-x-y-fp16.bundle")
    assert bundle_place(Path("b/my.bundle"), "a", ["x"], ["fp16"]) == Path("b/my.bundle")
    assert bundle_place(None, "qat", ["onnx"], ["int8", "fp16"], 4) == Path("qat-onnx-int8w4-fp16.bundle")


def test_a_bundle_that_is_replaced_is_said(fake_bundle: Path, tmp_path: Path) -> None:
    said = replaced(fake_bundle)
    assert said is not None and fake_bundle.name in said and " UTC is replaced when the new one has passed" in said
    assert replaced(tmp_path / "none.bundle") is None
    (tmp_path / "odd.bundle").mkdir()
    (tmp_path / "odd.bundle" / "manifest.json").write_bytes(b"[]")
    assert "is there already: the bundle is replaced" in str(replaced(tmp_path / "odd.bundle"))


def test_export_publishes_a_verified_bundle_of_these_frames(bundle: Path, data: Path, student: Path) -> None:
    opened = Bundle.open(bundle)
    artefact = opened.manifest.artefacts[0]
    assert artefact.trusted and artefact.precision == "fp32"
    assert opened.manifest.weights_sha256 == hashlib.sha256(student.read_bytes()).hexdigest()
    assert artefact.gate is not None
    frames = artefact.gate["frames"]
    assert (frames["kind"], frames["count"], frames["source"]) == ("data", len(SPLITS["val"]), data.name)
    assert "320.png" not in json.dumps(artefact.gate), "file names stay at home"


def test_verify_runs_the_live_reference_with_the_student_and_says_otherwise_without(
    bundle: Path, data: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.json"
    assert main(["verify", str(bundle), "--student", str(student), "--data", str(data), "--json", str(report)]) == 0
    said = json.loads(report.read_text(encoding="utf-8"))
    assert said["live"] and said["passed"]
    assert "full gate against the live PyTorch reference" in capsys.readouterr().out
    exit_code = main(["verify", str(bundle), "--json", str(report)])
    captured = capsys.readouterr()
    said = json.loads(report.read_text(encoding="utf-8"))
    assert exit_code == (0 if said["passed"] else 1), "the exit code is the verdict"
    assert not said["live"] and "not the full gate" in captured.out and "stored in the bundle" in captured.err


def test_verify_misses_a_gate_that_is_out_of_reach(
    bundle: Path, data: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate.json"
    gate.write_text(json.dumps({"min_frames": 1000}), encoding="utf-8")
    arguments = ["verify", str(bundle), "--student", str(student), "--data", str(data), "--gate", str(gate)]
    assert main(arguments) == 1
    captured = capsys.readouterr()
    assert "MISSED" in captured.out and captured.err.startswith("error: ")


def test_verify_refuses_another_student(bundle: Path, student: Path, data: Path, tmp_path: Path, capsys: Any) -> None:
    from tinyusfm_edge.models.checkpoint import load_student_file, save_student

    other = load_student_file(student)
    with __import__("torch").no_grad():
        next(other.module.parameters()).add_(0.01)
    save_student(tmp_path / "other.safetensors", other.module, other.spec)
    assert main(["verify", str(bundle), "--student", str(tmp_path / "other.safetensors"), "--data", str(data)]) == 2
    assert "not the one this bundle was made of" in capsys.readouterr().err


def test_missed_gate_publishes_nothing_and_exits_1(
    student: Path, data: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = tmp_path / "gate.json"
    gate.write_text(json.dumps({"min_frames": 1000}), encoding="utf-8")
    out = tmp_path / "out" / "small.bundle"
    arguments = ["export", str(student), "--target", target, "--fp32", "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--gate", str(gate)]) == 1
    assert "nothing was published" in capsys.readouterr().err
    assert not out.parent.exists()


def test_no_gate_is_written_into_the_bundle_and_every_result(
    student: Path, data: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "small.bundle"
    arguments = ["export", str(student), "--target", target, "--fp32", "--data", str(data), "--out", str(out)]
    assert main([*arguments, "--no-gate", "--name", "renamed"]) == 0
    assert "UNVERIFIED" in capsys.readouterr().out
    opened = Bundle.open(out)
    assert not opened.manifest.artefacts[0].trusted and opened.manifest.spec.name == "renamed"
    assert main(["run", str(out), "phantom:0"]) == 2
    assert "gate switched off" in capsys.readouterr().err
    lines = tmp_path / "out.jsonl"
    assert main(["run", str(out), "phantom:0", "--allow-unverified", "--jsonl", str(lines)]) == 0
    assert "UNVERIFIED" in capsys.readouterr().out
    assert json.loads(lines.read_text(encoding="utf-8"))["verified"] is False


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "{data}", "--out", "{data}/300.png/o"], "not a folder"),
        ([], "give --data DIR"),
        (["--data", "gone"], "does not exist"),
        (["--int8", "--data", "{data}", "--method", "magic"], "magic"),
    ],
)
def test_export_says_what_it_lacks(
    student: Path,
    data: Path,
    target: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    more: list[str],
    words: str,
) -> None:
    arguments = [part.replace("{data}", str(data)) for part in more]
    precision = [] if "--int8" in arguments else ["--fp32"]
    place = [] if "--out" in arguments else ["--out", str(tmp_path / "o")]
    code = main(["export", str(student), "--target", target, *precision, *arguments, *place])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if not line.startswith("note: ")]
    assert code == InputError.exit_code == CalibrationError.exit_code and len(lines) == 1 and words in lines[0]
    assert list(tmp_path.iterdir()) == []


def test_an_export_says_why_its_readings_stay_unchecked() -> None:
    from tinyusfm_edge.cli.export import describe

    judged = SimpleNamespace(comparison=SimpleNamespace(provenance={"count": 3, "about": "phantoms"}))
    made = SimpleNamespace(
        verdicts=(), artefacts=(), reports={"onnx-fp32": judged}, path=Path("own.bundle"),
        notes=("a layer was kept float", "readings stay unchecked: no labelled frames were given"),
    )  # fmt: skip
    lines = describe(made, "")  # type: ignore[arg-type]
    assert "readings     stay unchecked: no labelled frames were given" in lines
