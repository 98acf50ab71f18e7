"""tusfm-check: golden frames of a bundle on every engine, or on one, and what it says of those that miss."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import conftest as shared
from tests.capi.binding import Failed, Library, Session
from tests.capi.conftest import MakeStub, stub_parts

PASSED, REFUSED, UNUSABLE, NOT_HERE = 0, 1, 2, 3


@pytest.fixture
def check(build_folder: Path) -> Any:
    """Runs the program: exit code, standard output, standard error."""

    def run(*words: object) -> tuple[int, str, str]:
        command = [str(build_folder / "tusfm-check"), *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        return done.returncode, done.stdout, done.stderr

    return run


def test_every_artefact_has_a_line(check: Any, make_stub: MakeStub) -> None:
    bundle = make_stub("", "")
    code, said, wrong = check(bundle)
    assert (code, wrong) == (PASSED, "")
    assert [line.split()[:3] for line in said.splitlines()] == [
        ["stub-fp32", "passed", "8"], ["stub2-fp32", "passed", "8"],
    ]  # fmt: skip
    code, said, _ = check(bundle, "--engine", "STUB2")
    assert code == PASSED and len(said.splitlines()) == 1


@pytest.mark.parametrize("bend", ["shift_from=3", "fail_from=2", "nan_from=4"])
def test_an_engine_that_misses_is_refused_beside_one_that_does_not(bend: str, check: Any, make_stub: MakeStub) -> None:
    bundle = make_stub("", bend)
    code, said, _ = check(bundle)
    first, second = said.splitlines()
    assert code == REFUSED
    assert first.startswith("stub-fp32        passed") and second.startswith("stub2-fp32       refused")
    assert check(bundle, "--engine", "stub2")[0] == REFUSED
    code, said, _ = check(bundle, "--json")
    report = json.loads(said)
    assert code == REFUSED and report["schema"] == 1 and report["passed"] is False
    good, bad = report["engines"]
    assert (good["state"], good["golden_frames"], good["text"]) == ("passed", 8, "")
    assert good["engine"].startswith("stub f32")
    assert (bad["state"], bad["artefact"], bad["target"], bad["precision"]) == (
        "refused",
        "stub2-fp32",
        "stub2",
        "fp32",
    )
    assert bad["text"] and "\n" not in bad["text"]


def test_all_golden_frames_are_compared_however_many(
    check: Any, library: Library, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening compares some of them on the kind of machine that was verified; this compares the last one too."""
    monkeypatch.setattr(shared, "GOLDEN_SEEDS", tuple(range(20, 27)))
    good = stub_parts().publish(tmp_path / "good.bundle")
    assert check(good)[1].split()[2] == "7"
    last = stub_parts("fail_from=7 fail_to=8").publish(tmp_path / "last.bundle")
    assert check(last)[0] == REFUSED
    with pytest.raises(Failed, match="ENGINE"):
        Session(library, last, all_golden=1, recheck_s=0.0)
    with Session(library, good, all_golden=1) as session:
        assert session.info().golden_frames == 7


def test_a_bundle_that_cannot_be_used_is_one_line(check: Any, make_stub: MakeStub, tmp_path: Path) -> None:
    bundle = make_stub()
    for words in ((tmp_path / "none",), (bundle, "--engine", "onnx"), (), (bundle, "--what"), (bundle, "--engine")):
        code, said, wrong = check(*words)
        assert code == UNUSABLE and not said and len(wrong.splitlines()) <= 3 and wrong
    path = next(bundle.rglob("model.stub"))
    path.write_bytes(path.read_bytes() + b" ")
    code, said, wrong = check(bundle, "--json")
    report = json.loads(said)
    assert (
        code == UNUSABLE
        and report["passed"] is False
        and "model.stub" in report["error"]
        and len(wrong.splitlines()) == 1
    )


def test_an_engine_whose_library_is_missing_is_not_here(check: Any, tiny_files: Any, tmp_path: Path) -> None:
    bundle = shared.make_parts({"ort": tiny_files("ort")}).publish(tmp_path / "tiny.bundle")
    code, said, wrong = check(bundle, "--engines", tmp_path, "--engine", "onnxruntime")
    assert code == NOT_HERE and said.startswith("onnx-fp32        not here") and "no engine" in wrong


def test_real_engines_pass(check: Any, opened: tuple[str, Path, Path]) -> None:
    name, bundle, folder = opened
    code, said, wrong = check(bundle, "--engines", folder, "--engine", name, "--threads", 1)
    assert (code, wrong) == (PASSED, "") and "8 golden frames" in said


def test_the_shipped_bundle_passes_on_the_integer_engine_alone(check: Any, tmp_path: Path) -> None:
    """What a static build for a handheld has: no library of anybody else."""
    bundle = tmp_path / "stored.bundle"
    shutil.copytree(Path(shared.__file__).parent / "data" / "bundles" / "schema2", bundle)
    code, said, _ = check(bundle, "--engine", "integer")
    assert code == PASSED and "integer engine" in said
