"""``bundle trace`` and ``export --twice``: the chain is recorded, and what does not match is found."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Parts
from tests.needs import needs
from tinyusfm_edge import students
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.data.fingerprint import images_sha256
from tinyusfm_export.assemble import made_at
from tinyusfm_export.trace import Match, trace_bundle
from tinyusfm_export.twice import _explained, compare_builds
from tinyusfm_runtime.bundle.manifest import file_entry
from tinyusfm_runtime.bundle.reader import MANIFEST_NAME, Bundle
from tinyusfm_runtime.bundle.writer import publish_folder
from tinyusfm_runtime.errors import InputError

needs("torch", reason="install tinyusfm-edge[export]")
needs("openvino", reason="install tinyusfm-edge[openvino]")


@pytest.fixture(scope="module")
def traced(student: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a student that says what it was made of, and its int8 bundle, built twice."""
    import torch

    from tinyusfm_edge.models.checkpoint import load_student_file, save_student
    from tinyusfm_edge.models.upstream import joined

    folder = tmp_path_factory.mktemp("traced")
    loaded = load_student_file(student)
    own = {"images": images_sha256([data]), "teacher": "1" * 64}
    stages = joined(own, {"images": "2" * 64, "coreset": "3" * 64}, "4" * 64)
    save_student(folder / "told.safetensors", loaded.module, loaded.spec, torch.float32, stages)
    words = ["export", str(folder / "told.safetensors"), "--target", "openvino", "--int8", "--data", str(data)]
    out = ["--out", str(folder / "told.bundle"), "--no-gate", "--no-compare", "--twice", "--postprocess", "mask"]
    assert main([*words, *out]) == 0
    return folder


def rebuilt(bundle: Path, out: Path, **changes: bytes) -> Path:
    """A bundle with other bytes in some files and a manifest that was hashed again, its trace left as it was."""
    opened = Bundle.open(bundle)
    files = {path: opened.read(path) for path in opened.manifest.files} | changes
    entries = {path: file_entry(content) for path, content in files.items()}
    artefacts = tuple(
        replace(artefact, files={path: entries[path] for path in artefact.files})
        for artefact in opened.manifest.artefacts
    )
    manifest = replace(opened.manifest, files=entries, artefacts=artefacts).sealed()
    text = json.dumps(manifest.to_json(), sort_keys=True, indent=1) + "\n"
    return publish_folder(out, {**files, MANIFEST_NAME: text.encode()})


def test_the_chain_is_complete_and_matches(traced: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bundle", "trace", str(traced / "told.bundle"), "--images", str(data), "--json", str(traced / "t.json")]
    assert main([*words, "--student", str(traced / "told.safetensors")]) == 0
    found = {link["stage"]: link for link in json.loads((traced / "t.json").read_text())["links"]}
    expected = {
        "start.images": "not at hand",
        "start.coreset": "not at hand",
        "images": "matches",
        "coreset": "not recorded",
        "teacher": "not at hand",
        "start": "not at hand",
        "student": "matches",
        "calibration": "matches",
        "golden": "matches",
        "gate-frames": "matches",
        "artefact.openvino-int8": "matches",
        "report.openvino-int8": "matches",
    }
    told = {stage: found[stage]["match"] for stage in expected if stage in found}
    assert told == expected | {"calibration": "not at hand"}
    assert found["quant.json -> calibration"]["match"] == "matches"
    assert list(found)[:3] == ["start.images", "start.coreset", "images"]
    assert "artefact.openvino-int8" in capsys.readouterr().out


def test_another_image_or_student_is_found(
    traced: Path, data: Path, student: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "data"
    shutil.copytree(data, other)
    shutil.copy(other / "301.png", other / "300.png")
    words = ["bundle", "trace", str(traced / "told.bundle")]
    assert main([*words, "--images", str(other)]) == 1
    assert "not made of what is there: images" in capsys.readouterr().err
    assert main([*words, "--student", str(student)]) == 1
    assert "not made of what is there: student" in capsys.readouterr().err


def test_a_bundle_that_was_put_together_anew_is_found(traced: Path, tmp_path: Path) -> None:
    bundle = traced / "told.bundle"
    model = "artefacts/openvino-int8/model.bin"
    swapped = rebuilt(bundle, tmp_path / "swapped.bundle", **{model: Bundle.open(bundle).read(model) + b"\0"})
    assert [link.stage for link in trace_bundle(Bundle.open(swapped)).broken] == ["artefact.openvino-int8"]
    quant = json.loads(Bundle.open(bundle).read("quant.json"))
    quant["ranges"]["set_id"] = "5" * 64
    report = json.loads(Bundle.open(bundle).read("reports/openvino-int8.json"))
    report["frames"]["pixels_sha256"][0] = "6" * 64
    changes = {"quant.json": json.dumps(quant).encode(), "reports/openvino-int8.json": json.dumps(report).encode()}
    swapped = rebuilt(bundle, tmp_path / "other.bundle", **changes)
    assert {link.stage for link in trace_bundle(Bundle.open(swapped)).broken} == {
        "quant.json -> calibration",
        "report.openvino-int8",
        "reports/openvino-int8.json -> gate-frames",
    }


def test_a_bundle_without_a_trace_says_so(fake_bundle: Path) -> None:
    links = {link.stage: link for link in trace_bundle(Bundle.open(fake_bundle)).links}
    assert links["images"].match is Match.NOT_RECORDED and links["student"].match is Match.NOT_AT_HAND


def test_a_shipped_student_says_what_was_lost(tmp_path: Path, fake_parts: Parts) -> None:
    weights = students.card("fetal-head")["weights"]["sha256"]
    bundle = fake_parts.publish(tmp_path / "head.bundle", weights_sha256=weights)
    assert main(["bundle", "trace", str(bundle), "--json", str(tmp_path / "t.json")]) == 0
    links = {link["stage"]: link for link in json.loads((tmp_path / "t.json").read_text())["links"]}
    assert links["images"]["match"] == "not recorded" and links["images"]["recorded"] == ""
    assert "made before it was recorded; by its card the training split of HC18, 654 frames" in links["images"]["note"]
    assert "by its card" in links["teacher"]["note"]


def test_two_builds_differ_in_time_and_latency_alone(traced: Path, tmp_path: Path) -> None:
    """The fixture built twice and ended with 0; here a change without a reason is one."""
    bundle = Bundle.open(traced / "told.bundle")
    assert not compare_builds(bundle, bundle).differences
    golden = next(path for path in bundle.manifest.files if path == "golden/openvino-int8.safetensors")
    verdict = json.loads(bundle.read("reports/verdict-openvino.json"))
    verdict["sides"][0]["p50_ms"] += 1.0
    changed = rebuilt(
        traced / "told.bundle", tmp_path / "a.bundle", **{"reports/verdict-openvino.json": json.dumps(verdict).encode()}
    )
    found = compare_builds(bundle, Bundle.open(changed))
    assert found and [d.place for d in found.differences] == ["sides/0/p50_ms"]
    changed = rebuilt(traced / "told.bundle", tmp_path / "b.bundle", **{golden: bundle.read(golden)[:-1] + b"\1"})
    found = compare_builds(bundle, Bundle.open(changed))
    assert not found and found.unexplained[0].file == golden and "no known reason" in found.headline


def test_only_an_engine_of_tensorrt_may_differ() -> None:
    folder = "artefacts/tensorrt-int8"
    assert _explained(f"{folder}/tensorrt-rtx-1-sm86.engine", "").reason
    assert not _explained(f"{folder}/model.onnx", "").reason and not _explained(f"{folder}/a.timing", "").reason


def test_the_time_of_making_can_be_fixed() -> None:
    assert made_at({"SOURCE_DATE_EPOCH": "1700000000"}) == "2023-11-14T22:13:20Z"
    with pytest.raises(InputError, match="SOURCE_DATE_EPOCH"):
        made_at({"SOURCE_DATE_EPOCH": "yesterday"})
