"""Broken on purpose, at a small size; ``make broken`` runs the stated one. Each part has a broken control."""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import broken
import broken_cases
import broken_outcome
import broken_runs
from tests.conftest import Parts
from tinyusfm_runtime.bundle.manifest import MANIFEST_NAME
from tinyusfm_runtime.bundle.reader import Bundle

pytest.importorskip("cryptography", reason="install tinyusfm-edge[signed]")


@pytest.fixture(scope="module")
def bundle(engine_parts: Callable[[str], Parts], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return engine_parts("ort").publish(tmp_path_factory.mktemp("broken") / "b.bundle")


def test_every_mutation_of_a_bundle_is_refused(bundle: Path) -> None:
    plain = broken.attack_bundle(bundle, 40, 1, None, hashed_again=False)
    assert plain.tries >= 30 and not plain.faults and set(plain.counts) <= {"TamperedError", "BundleError"}
    with broken.signed_copy(bundle) as (signed, trust):
        Bundle.open(signed, trust=trust)
        damaged = broken.attack_bundle(signed, 40, 2, trust, hashed_again=False)
        rewritten = broken.attack_bundle(signed, 40, 3, trust, hashed_again=True)
    assert not damaged.faults and "accepted" not in damaged.counts
    assert not rewritten.faults and set(rewritten.counts) == {"UntrustedError"}


def test_what_is_accepted_though_it_was_changed_is_a_fault(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tinyusfm_runtime.bundle.reader._check_content", lambda *_: None)
    monkeypatch.setattr("broken.mutate", lambda raw, _: bytes(len(raw)) if len(raw) > 5000 else raw)
    found = broken.attack_bundle(bundle, 40, 4, None, hashed_again=False)
    assert found.faults and "accepted" in found.counts
    assert "MISSED" in found.row()


def test_readers_answer_damage_with_typed_errors(bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip("pydicom", reason="install tinyusfm-edge[dicom]")
    pytest.importorskip("safetensors", reason="install tinyusfm-edge[torch]")
    pytest.importorskip("torch", reason="install tinyusfm-edge[torch]")
    seeds = broken.reader_seeds((bundle / MANIFEST_NAME).read_bytes())
    for kind, (good, reader) in seeds.items():
        place = tmp_path / broken.FILE_NAMES[kind]
        place.write_bytes(good)
        reader(place)  # what is not broken is read
    found = broken.fuzz_readers(seeds, 7 * 25, 5)
    assert [outcome.name for outcome in found] == [f"R8 {kind}" for kind in broken.KINDS]
    assert all(outcome.tries == 25 for outcome in found)
    untyped = [fault for outcome in found for fault in outcome.faults if "untyped" in fault]
    assert not untyped


def test_an_untyped_error_is_a_fault() -> None:
    outcome = broken.Outcome(name="control")
    broken.try_once(outcome, lambda: {}["gone"], 1.0)
    assert outcome.faults == ["untyped KeyError: 'gone'"]


@pytest.fixture(scope="module")
def written(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, broken_runs.Command]:
    """The commands that write, by name, on a tiny student."""
    pytest.importorskip("torch", reason="install tinyusfm-edge[torch]")
    pytest.importorskip("lightning_fabric", reason="install tinyusfm-edge[train]")
    pytest.importorskip("sklearn", reason="install tinyusfm-edge[calibration]")
    inputs, out = (tmp_path_factory.mktemp(name) for name in ("inputs", "out"))
    broken_runs.make_inputs(inputs)
    shutil.copytree(bundle, out / "signed.bundle")
    return {command.name: command for command in broken_runs.commands(inputs, out)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "count"), [("sign", 3), ("distill", 1)])
def test_a_killed_command_leaves_what_loads(name: str, count: int, written: dict[str, broken_runs.Command]) -> None:
    found = broken_runs.kill_runs(written[name], count, 6)
    assert found.tries == count and not found.faults, found.faults
    assert found.counts["killed"] + found.counts["ended before"] == count


@pytest.mark.slow
def test_a_command_without_room_says_so_and_leaves_what_loads(written: dict[str, broken_runs.Command]) -> None:
    found = broken_runs.full_disk(written["sign"], 2, tmpfs=False)
    assert found.tries == 2 and not found.faults, found.faults
    assert not found.counts["enough room"], found.counts


@pytest.mark.slow
def test_a_full_memory_disk_is_one_line(bundle: Path, written: dict[str, broken_runs.Command], tmp_path: Path) -> None:
    inputs = Path(next(word for word in written["sign"].words if word.endswith("key.pem"))).parent
    with broken_runs.memory_disk(tmp_path) as mounted:
        if not mounted:
            pytest.skip("a memory disk needs root")
        shutil.copytree(bundle, tmp_path / "signed.bundle")
        found = broken_runs.full_disk(broken_runs.commands(inputs, tmp_path)[-1], 2, tmpfs=True)
    assert found.tries == 2 and not found.faults, found.faults


def test_a_bundle_that_does_not_open_is_a_fault(bundle: Path, tmp_path: Path) -> None:
    assert broken_runs.whole_bundle(bundle) == ""
    shutil.copytree(bundle, tmp_path / "torn.bundle")
    (tmp_path / "torn.bundle" / "quant.json").write_text("{}")
    assert "does not open" in broken_runs.whole_bundle(tmp_path / "torn.bundle")
    assert broken_runs.left_over(tmp_path) == ""
    (tmp_path / "torn.bundle" / ".b.tmp-1-00000000").write_text("")
    assert "left over" in broken_runs.left_over(tmp_path)


def test_a_command_that_fails_by_a_bug_or_tears_its_output_is_a_fault(tmp_path: Path) -> None:
    good = broken_runs.Command(
        name="x", words=["--version"], folder=tmp_path, outputs=(tmp_path,), holds=lambda: "it is torn"
    )
    assert "it is torn" in broken_runs.kill_runs(good, 1, 0).faults[0]
    assert "it is torn" in broken_runs.full_disk(good, 1, tmpfs=False).faults
    bad = broken_runs.Command(name="x", words=["no-such"], folder=tmp_path, outputs=(), holds=lambda: "")
    assert "does not run" in broken_runs.kill_runs(bad, 1, 0).faults[0]


def test_chosen_attacks_are_refused_and_run_nothing(bundle: Path) -> None:
    pytest.importorskip("onnx", reason="install tinyusfm-edge[export]")
    pytest.importorskip("torch", reason="install tinyusfm-edge[torch]")
    found = [broken_cases.external_data(bundle), *broken_cases.weights_files(), broken_cases.folders(bundle)]
    assert [(one.name, one.tries) for one in found] == [
        ("R6 external data", 15), ("R6 pickles", 13), ("R6 archives", 13), ("R6 unpacked folders", 13),
    ]  # fmt: skip
    faults = [fault for one in found for fault in one.faults if "allowed" not in fault]
    assert not faults


def test_code_that_runs_and_what_is_accepted_are_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch", reason="install tinyusfm-edge[torch]")
    monkeypatch.setattr("broken_cases.read_weights_file", lambda file: pickle.loads(file.read_bytes()))
    monkeypatch.setattr("broken_cases._archives", dict)
    found = broken_cases.weights_files()[0]
    assert found.faults.count("code ran") >= 3 and "it was accepted" in found.faults


def test_a_short_run_writes_the_table_of_the_documents(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--only", "R6", "--scale", "0.01", "--table", str(tmp_path / "t.md")]
    broken.main([str(bundle), *words])
    rows = (tmp_path / "t.md").read_text(encoding="utf-8").splitlines()
    assert rows[0].startswith("| attack |") and len(rows) == 2 + 8
    assert rows[2].startswith("| R6 unsigned | 10 |") and len(capsys.readouterr().out.splitlines()) == 8
    with pytest.raises(SystemExit):
        broken.main([str(bundle), "--scale", "0"])


def test_an_attack_that_was_never_tried_does_not_hold() -> None:
    empty = broken_outcome.Outcome(name="x")
    assert empty.row().endswith("not run") and "not run" in empty.table_row()
    empty.tries = 1
    assert empty.row().endswith("holds")
