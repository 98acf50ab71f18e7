"""A Core ML bundle from its export without Core ML to the gate completed on a Mac, pass and fail.

The Mac is tests/fakes/coreml.py: coremltools' own interface, answered by interpretation. The last test needs one.
"""

from __future__ import annotations

import json
import platform
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests.export.students import make_student
from tests.fakes import coreml as fake
from tests.needs import needs
from tinyusfm_calibration.sets import phantom_frames
from tinyusfm_edge.cli.main import main
from tinyusfm_export import pipeline
from tinyusfm_export.pipeline import export_bundle
from tinyusfm_export.targets import coreml as target
from tinyusfm_export.targets.coreml.stand_in import MilEngine
from tinyusfm_export.verify.bundle import verify_bundle
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.golden import golden_frames
from tinyusfm_runtime.bundle.manifest import ArtefactState
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.owned_files import CACHE_VARIABLE
from tinyusfm_runtime.engines import coreml
from tinyusfm_runtime.errors import UnverifiedError
from tinyusfm_runtime.session import Session

needs("coremltools", reason="coremltools is not installed: pip install 'tinyusfm-edge[coreml]'")
pytestmark = pytest.mark.filterwarnings("ignore")
GATE = Gate(min_frames=4)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small classifier in FP16 with four golden frames, exported where Core ML cannot run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "golden_frames", lambda: golden_frames(range(4)))
        patch.setattr(target, "runs_here", lambda: False)
        patch.setattr(target, "StandIn", MilEngine, raising=False)
        module, spec = make_student("classify")
        spec = replace(spec, labels=("left", "right"))
        frames = GateFrames(kind="phantom", frames=tuple(phantom_frames(range(100, 104))), source="test phantoms")
        return export_bundle(
            module, spec, targets=["coreml"], precisions=["fp16"], gate=GATE, gate_frames=frames,
            out=tmp_path_factory.mktemp("bundle") / "a.bundle",
        ).path  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    root = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(root))
    monkeypatch.delenv(coreml.UNITS_VARIABLE, raising=False)
    return root


def test_a_mac_completes_the_gate_and_only_there_the_artefact_opens(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (artefact,) = Bundle.open(bundle).manifest.artefacts
    assert artefact.state is ArtefactState.UNVERIFIED and "on a Mac" in artefact.pending
    assert "no Core ML was run" in (artefact.gate or {})["engine"], "the bundle says what judged it"
    mac = fake.install(monkeypatch)
    with pytest.raises(UnverifiedError, match=r"verify .*a\.bundle"):
        Session.open(bundle, threads=1)
    report = verify_bundle(bundle, gate=GATE)
    where = f"Apple M2 (Mac14,2), macOS 15.1, coremltools {coreml.import_coremltools().__version__}, units all"
    assert report and report.checks[0].completed == where
    assert mac.predictions >= 4 and report.to_json()["artefacts"][0]["completed"] == where
    with Session.open(bundle, threads=1) as session:
        assert session.verified and session.description.startswith("coreml-fp16 on Core ML on macOS 15.1")
        assert session.predict(session.golden_frames[0]).verified
    kept = [json.loads(path.read_text()) for path in cache.rglob("*.json")]
    (stored,) = (record for record in kept if "answers_sha256" not in record["outcome"])
    assert stored["outcome"]["bundle_id"] == Bundle.open(bundle).manifest.bundle_id and stored["version"] == 1
    for place, name, value in (
        (platform, "mac_ver", lambda: ("15.2", ("", "", ""), "arm64")),
        (coreml, "mac_model", lambda: "Apple M1 (Mac13,1)"),
    ):
        with monkeypatch.context() as other:
            other.setattr(place, name, value)
            with pytest.raises(UnverifiedError):
                Session.open(bundle, threads=1)
    monkeypatch.setenv(coreml.UNITS_VARIABLE, "cpu_only")
    with pytest.raises(UnverifiedError):
        Session.open(bundle, threads=1)


def test_a_failed_gate_is_kept_too_and_a_changed_record_counts_as_none(
    bundle: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mac = fake.install(monkeypatch)
    assert verify_bundle(bundle, gate=GATE).checks[0].completed
    mac.shift = np.nan
    report = verify_bundle(bundle, gate=GATE)
    assert not report and report.checks[0].completed, "what passed yesterday may fail today"
    mac.shift = 0.0
    with pytest.raises(UnverifiedError):
        Session.open(bundle, threads=1)
    (record,) = cache.rglob("*.json")
    record.write_text(record.read_text().replace('"passed": false', '"passed": true'))
    with pytest.raises(UnverifiedError):
        Session.open(bundle, threads=1)


def test_other_limits_complete_nothing_and_the_command_says_what_was_kept(
    bundle: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.install(monkeypatch)
    loose = Gate(min_frames=4, probability_drift=1.0)
    assert not verify_bundle(bundle, gate=loose).checks[0].completed and not cache.exists()
    limits = tmp_path / "gate.json"
    limits.write_text(json.dumps(GATE.to_json()))
    assert main(["verify", str(bundle), "--gate", str(limits)]) == 0
    assert "coreml-fp16: completed and kept for Apple M2 (Mac14,2), macOS 15.1" in capsys.readouterr().out


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="needs: macos (Core ML predicts there only)")
def test_on_a_real_mac_the_gate_completes(bundle: Path) -> None:
    report = verify_bundle(bundle, gate=GATE)
    assert report and "macOS" in report.checks[0].completed
    with Session.open(bundle, threads=1) as session:
        assert session.verified
