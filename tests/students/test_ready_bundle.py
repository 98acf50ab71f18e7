"""The bundle that ships is that of the shipped weights, whole, small, and runs by its name without any library."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import Parts
from tinyusfm_edge import students
from tinyusfm_export.verify.bundle import verify_bundle
from tinyusfm_runtime.bundle.arrays import pack_arrays, unpack_metadata
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.bundle.shipped import SHIPPED, shipped_names
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.integer import compiled, make_definition
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.results import ReadingState
from tinyusfm_runtime.session import Session

NAMES = shipped_names()
MOST_BYTES = 15_000_000
"""Of one bundle."""
PACKAGE_BYTES = 28_000_000
"""Of all files that are installed, weights of fetal-head and the bundle among them; 29 MB with compiled kernels."""
AGAIN = 'run make bundle ARGS="--data hc18/" and commit what it writes'


@pytest.fixture(scope="module")
def opened() -> Bundle:
    """The bundle of fetal-head."""
    return Bundle.open("fetal-head")


def stale(manifest_sha256: str, weights: Path) -> bool:
    """Whether a bundle was made of other weights than those that ship."""
    return hashlib.sha256(weights.read_bytes()).hexdigest() != manifest_sha256


def test_a_bundle_ships() -> None:
    assert NAMES == ["fetal-head"]


def test_it_was_made_of_the_weights_that_ship(opened: Bundle, tmp_path: Path) -> None:
    weights = students.folder("fetal-head") / students.WEIGHTS
    assert not stale(opened.manifest.weights_sha256, weights), AGAIN
    (tmp_path / "other").write_bytes(weights.read_bytes()[:-1] + b"x")
    assert stale(opened.manifest.weights_sha256, tmp_path / "other")


def test_it_is_read_as_the_student_is(opened: Bundle) -> None:
    card, spec = students.card("fetal-head")["spec"], opened.manifest.spec.to_json()
    assert {key: spec[key] for key in card if key != "reading"} == {
        key: card[key] for key in card if key != "reading"
    }, AGAIN
    assert spec["reading"] is not None and opened.manifest.drift is not None, "it judges its readings, and drift"
    assert spec["reading"]["rates"]["good_but_wrong_limit"] < 0.05


def test_it_is_the_integer_artefact_alone_and_passed_its_gate_on_patients(opened: Bundle) -> None:
    (artefact,) = opened.manifest.artefacts
    assert artefact.name == "integer-int8" and artefact.engine == "integer", "any CPU computes it, without a library"
    assert artefact.trusted and artefact.rest_precision == "f32" and not artefact.requirements["cpu_features"]
    assert artefact.gate is not None and artefact.gate["statistics"]["frames"] >= 151


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= MOST_BYTES


def test_what_is_installed_is_small() -> None:
    root = Path(__file__).resolve().parents[2]
    roots = [root / folder for folder in ("tinyusfm_edge", "export", "calibration", "runtime/tinyusfm_runtime")]
    files = [
        path for folder in roots for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts
    ]
    left_out = students.folder("breast-lesion") / students.WEIGHTS
    installed = [path for path in files if path != left_out and path.suffix not in (".so", ".pyd")]
    assert len(installed) < len(files)
    assert sum(path.stat().st_size for path in installed) <= PACKAGE_BYTES


@pytest.mark.parametrize("threads", [1, 2])
def test_it_finds_the_heads_of_phantoms(threads: int) -> None:
    if not compiled.available():
        pytest.skip(f"kernels {compiled.reason()}")
    with Session.open("fetal-head", threads=threads) as session:
        assert "bit-identical" in session.description
        for seed in (3, 5):
            phantom = make_phantom(seed)
            answer = session.predict(phantom.frame)
            assert answer.verified and answer.found and answer.reading in (ReadingState.GOOD, ReadingState.DOUBTFUL)
            assert answer.measurement is not None and answer.measurement.hc_mm == pytest.approx(phantom.hc_mm, rel=0.08)


def test_the_definition_in_numpy_gives_the_bytes_that_ship(opened: Bundle) -> None:
    """One golden frame, as on a machine without compiled kernels."""
    (artefact,) = opened.manifest.artefacts
    engine, spec = make_definition(), opened.manifest.spec
    engine.load(opened.artefact_files(artefact), spec, EngineConfig(threads=1, rest_precision="f32"))
    found = engine.run(preprocess(opened.golden_frames()[0], spec.preprocess)[0])
    assert np.array_equal(found["logits"][0], opened.golden_outputs(artefact)["logits"][0])


def test_verify_says_that_its_answers_are_bit_identical(opened: Bundle, tmp_path: Path) -> None:
    report = verify_bundle("fetal-head")
    assert report and ("integer-int8", "bit_identical", "1", "1", "passed") in report.table()
    (artefact,) = opened.manifest.artefacts
    files = {name: opened.read(name) for name in opened.manifest.files}
    golden = {name: value.copy() for name, value in opened.golden_outputs(artefact).items()}
    golden["logits"][0, 0, 0, 0] += 2.0**-10
    files[artefact.golden] = pack_arrays(golden, unpack_metadata(files[artefact.golden], artefact.golden))
    parts = Parts(spec=opened.manifest.spec, artefacts=opened.manifest.artefacts, files=files)
    report = verify_bundle(parts.publish(tmp_path / "other.bundle", weights_sha256=opened.manifest.weights_sha256))
    (failure,) = report.failures
    assert "7 of 8 golden answers are bit-identical" in failure
