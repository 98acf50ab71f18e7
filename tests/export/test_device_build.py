"""``build`` on a fake GPU: the engine goes into the cache, the gate is completed there, and only that opens it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import Parts, make_parts
from tests.fakes import tensorrt as fake_tensorrt
from tests.fakes.tensorrt import World, real_module
from tinyusfm_export.device_build import build_bundle
from tinyusfm_export.targets.trt import PENDING, build_ahead
from tinyusfm_export.verify.gate import Gate
from tinyusfm_runtime.bundle.manifest import ArtefactState
from tinyusfm_runtime.engines.trt.build import BuildFlags
from tinyusfm_runtime.engines.trt.cache import EngineCache
from tinyusfm_runtime.errors import EngineError, InputError, TamperedError, UnsupportedError, UnverifiedError
from tinyusfm_runtime.phantom import make_phantom
from tinyusfm_runtime.session import Session

LIMITS = Gate(min_frames=1).to_json()


@pytest.fixture(scope="module")
def parts(tiny_files: Callable[[str], dict[str, bytes]]) -> Parts:
    real_module()
    made = make_parts({"trt": tiny_files("trt")})
    needs = {**made.artefacts[0].requirements, "cpu_features": [], "pending": PENDING}
    return made.with_artefact(
        state=ArtefactState.UNVERIFIED, requirements=needs, gate={"passed": True, "limits": LIMITS}
    )


@pytest.fixture
def bundle(parts: Parts, tmp_path: Path) -> Path:
    return parts.publish(tmp_path / "tiny.bundle")


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    return fake_tensorrt.install(monkeypatch)


def test_before_building_the_session_says_what_to_run(world: World, bundle: Path) -> None:
    for unverified in (False, True):
        with pytest.raises(UnsupportedError, match="no engine was built yet.*tinyusfm-edge build"):
            Session.open(bundle, allow_unverified=unverified)
    assert world.builds == 0 and not world.cudart.leaks()


def test_building_completes_the_gate_and_opens_the_session(world: World, bundle: Path) -> None:
    seen: list[tuple[str, float]] = []
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    report = build_bundle(bundle, progress=lambda what, share: seen.append((what, share)))
    assert report and report.builds[0].action == "built" and report.builds[0].report
    assert json.dumps(report.to_json()) and "GPU" in report.builds[0].engine
    shares = [share for _, share in seen]
    assert shares == sorted(shares) and shares[-1] == 1.0 and any("Building" in what for what, _ in seen)
    assert {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()} == before, "a bundle is read-only"
    with Session.open(bundle) as session:
        assert session.verified and "Fake RTX" in session.description
        answer = session.predict(make_phantom(3).frame)
    assert answer.verified and answer.valid and answer.target == "tensorrt"
    assert world.builds == 1 and not world.cudart.faults and not world.cudart.leaks()


def test_a_second_build_takes_the_cached_engine_and_what_was_compiled(world: World, bundle: Path) -> None:
    build_bundle(bundle)
    report = build_bundle(bundle)
    assert report.builds[0].action == "cached" and world.builds == 1
    assert world.compiled == [b"compiled kernels"]


def test_an_engine_that_answers_otherwise_misses_the_gate_and_stays_shut(world: World, bundle: Path) -> None:
    world.shift = 6.0
    report = build_bundle(bundle)
    assert not report and "tensorrt-fp32: " in report.failures[0]
    with pytest.raises(UnverifiedError, match="engine not yet verified on its GPU"):
        Session.open(bundle)
    world.shift = 0.0
    with Session.open(bundle, allow_unverified=True) as session:
        assert not session.predict(make_phantom(3).frame).verified


def test_an_engine_that_changes_after_the_gate_is_found_at_the_start(world: World, bundle: Path) -> None:
    build_bundle(bundle)
    world.shift = 6.0
    with pytest.raises(EngineError, match="does not answer as the artefact should.*reference"):
        Session.open(bundle)


def test_the_outcome_counts_for_this_bundle_only(world: World, bundle: Path, parts: Parts, tmp_path: Path) -> None:
    build_bundle(bundle)
    other = replace(parts, tools={"tinyusfm-edge": "another"}).publish(tmp_path / "other.bundle")
    with pytest.raises(UnverifiedError, match="not yet verified"):
        Session.open(other)
    assert build_bundle(other).builds[0].action == "cached", "the same ONNX needs no second engine"
    Session.open(other).close()


def test_the_outcome_counts_for_this_device_and_driver_only(world: World, bundle: Path) -> None:
    build_bundle(bundle, flags=BuildFlags(hardware_compatible=True))
    world.cudart.name, world.cudart.capability = "Another GPU", (8, 9)
    with pytest.raises(UnverifiedError, match="not yet verified"):
        Session.open(bundle)
    again = build_bundle(bundle, flags=BuildFlags(hardware_compatible=True))
    assert again and again.builds[0].action == "cached" and world.builds == 1
    Session.open(bundle).close()


def test_an_engine_out_of_the_bundle_is_taken(
    world: World, parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = parts.artefacts[0].files
    onnx = parts.files[path]
    engines = build_ahead({"model.onnx": onnx}, "fp32", ["8.6"])
    (name,) = engines
    assert name == f"tensorrt-rtx-{real_module().__version__}-sm86.engine"
    from tinyusfm_runtime.bundle.manifest import file_entry

    folder = path.rpartition("/")[0]
    more = {f"{folder}/{name}": engines[name]}
    artefact = parts.artefacts[0]
    files = {**artefact.files, **{place: file_entry(raw) for place, raw in more.items()}}
    made = replace(parts, files={**parts.files, **more}).with_artefact(files=files).publish(tmp_path / "ahead.bundle")
    built = world.builds
    report = build_bundle(made)
    assert report and report.builds[0].action == "from the bundle" and world.builds == built
    Session.open(made).close()


def test_a_foreign_cache_is_refused(world: World, bundle: Path, tmp_path: Path) -> None:
    build_bundle(bundle)
    world.cudart.name = "Another GPU"
    with pytest.raises(UnsupportedError, match="engines of other GPUs, which cannot run here"):
        Session.open(bundle)
    (folder,) = (path.parent for path in EngineCache().root.rglob("entry.json"))
    shutil.copytree(folder, folder.with_name("Another-GPU-20-SMs-sm8.6"))
    with pytest.raises(UnsupportedError, match="built for Fake RTX.*this is Another GPU"):
        build_bundle(bundle)
    assert build_bundle(bundle, rebuild=True).builds[0].action == "built"


def test_a_tampered_cache_is_refused(world: World, bundle: Path) -> None:
    build_bundle(bundle)
    (place,) = EngineCache().root.rglob("entry.json")
    place.write_text(place.read_text().replace('"passed": true', '"passed": false'), encoding="ascii")
    for attempt in (lambda: Session.open(bundle), lambda: build_bundle(bundle)):
        with pytest.raises(TamperedError, match="its own hash does not match"):
            attempt()


def test_int8_without_q_dq_is_refused(world: World, parts: Parts, tmp_path: Path) -> None:
    lying = parts.with_artefact(precision="int8").publish(tmp_path / "lying.bundle")
    with pytest.raises(UnsupportedError, match="no Q/DQ nodes"):
        build_bundle(lying)
    assert not EngineCache().root.exists()


def test_a_bundle_without_tensorrt_and_a_machine_without_a_gpu(
    world: World, fake_bundle: Path, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="no tensorrt artefact.*fake-fp32"):
        build_bundle(fake_bundle)
    world.cudart.devices = 0
    with pytest.raises(UnsupportedError, match="no NVIDIA GPU found on this machine"):
        build_bundle(bundle)


def test_build_needs_no_workshop_library() -> None:
    import subprocess
    import sys

    from tests.conftest import child_environment

    code = (
        "import sys, tinyusfm_export.device_build, tinyusfm_edge.cli.build\n"
        "print(sorted(set(sys.modules) & {'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt_rtx', 'tomllib'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=child_environment())
    assert done.stdout.strip() == "[]", done.stderr
