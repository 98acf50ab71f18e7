"""``build``: TensorRT engines of a bundle, made on their device.

The gate is completed there.

For every TensorRT artefact: the engine comes out of the cache, out of the bundle or is built; it is loaded as a session
loads it; the golden frames are judged against the PyTorch reference stored in the bundle, by the gate of the export;
the outcome is written next to the engine. A session opens the artefact only if that outcome is a pass of exactly this
bundle on this device. The bundle itself is never written. numpy only: no torch, no onnx.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyusfm_export.verify.artefact import compare_outputs
from tinyusfm_export.verify.bundle import choose_artefacts
from tinyusfm_export.verify.engine_run import run_engine
from tinyusfm_export.verify.expected import Expected, stored_expectation
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.parity import ParityReport
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.trt import Engine
from tinyusfm_runtime.engines.trt.build import NOT_RUN, BuildFlags, Library, import_tensorrt
from tinyusfm_runtime.engines.trt.cache import CachedEngine, EngineCache
from tinyusfm_runtime.engines.trt.cuda import CudaDevice, open_cuda
from tinyusfm_runtime.engines.trt.device import DeviceEngine, engine_key, ensure_engine, model_of
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.graphs.onnx import check

BUILD_VERSION = 1
"""Version of the JSON that ``BuildReport.to_json`` writes, and of gate records in the cache."""
ENGINE = "trt"
"""File stem of the engine whose artefacts are built on the device."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the share that is done, 0..1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtefactBuild:
    """One artefact's outcome.

    Attributes:
        name: such as ``tensorrt-int8``.
        action: ``cached``, ``from the bundle`` or ``built``.
        reason: why an older engine was not used; empty if there was none.
        seconds: how long building took when it was built.
        engine: what ran it, one line.
        report: the judged comparison.
    """

    name: str
    action: str
    reason: str
    seconds: float
    engine: str
    report: ParityReport

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "name": self.name,
            "action": self.action,
            "reason": self.reason,
            "seconds": self.seconds,
            "engine": self.engine,
            "report": self.report.to_json(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildReport:
    """What building did. True if every engine holds the gate.

    Attributes:
        bundle_id: short name of exactly these bytes.
        device: the GPU.
        library: TensorRT's edition and version.
        cache: where the engines stand.
        builds: one per artefact, in the fallback's order.
    """

    bundle_id: str
    device: CudaDevice
    library: str
    cache: Path
    builds: tuple[ArtefactBuild, ...]

    def __bool__(self) -> bool:
        return bool(self.builds) and all(build.report for build in self.builds)

    @property
    def failures(self) -> tuple[str, ...]:
        """What does not hold, artefact first."""
        return tuple(f"{build.name}: {text}" for build in self.builds for text in build.report.failures)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "version": BUILD_VERSION,
            "passed": bool(self),
            "bundle_id": self.bundle_id,
            "gpu": self.device.gpu,
            "compute_capability": self.device.compute_capability,
            "driver": self.device.driver,
            "library": self.library,
            "note": NOT_RUN,
            "builds": [build.to_json() for build in self.builds],
        }


def build_bundle(
    bundle: str | Path | Bundle,
    *,
    cache: EngineCache | None = None,
    flags: BuildFlags | None = None,
    rebuild: bool = False,
    precision: str | None = None,
    gate: Gate | None = None,
    progress: Progress | None = None,
) -> BuildReport:
    """Builds and judges every TensorRT artefact of a bundle on this device.

    Args:
        bundle: a bundle's folder, or an open bundle.
        cache: where engines stand; None takes the folder the environment names.
        flags: what changes the engines.
        rebuild: remove older engines, whatever state they are in.
        precision: only artefacts of this precision.
        gate: thresholds; None takes those each artefact was exported with.
        progress: called with what is done and the share done.

    Raises:
        InputError: no such bundle, or it has no TensorRT artefact.
        BundleError: the bundle was tampered with; TamperedError also of a cached engine.
        MissingExtra: TensorRT or the CUDA runtime is not installed.
        UnsupportedError: no GPU, a cached engine of another GPU, or flags that TensorRT or the GPU cannot do.
        EngineError: TensorRT failed.
        OutputError: the cache cannot be written.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    if not any(artefact.engine == ENGINE for artefact in opened.manifest.artefacts):
        there = ", ".join(artefact.name for artefact in opened.manifest.artefacts)
        raise InputError(f"the bundle has no tensorrt artefact, so there is nothing to build; it has: {there}")
    chosen = choose_artefacts(opened, ENGINE, precision)
    library, device = import_tensorrt(), open_cuda().device()
    place, say = cache or EngineCache(), progress or (lambda what, share: None)
    builds = []
    for number, artefact in enumerate(chosen):

        def part(what: str, share: float, number: int = number, name: str = artefact.name) -> None:
            say(f"{name}: {what}", (number + share) / len(chosen))

        part("looking for an engine", 0.0)
        files = opened.artefact_files(artefact)
        check(model_of(files), opened.manifest.spec.input, opened.manifest.spec)
        found = ensure_engine(
            files,
            artefact.precision,
            library,
            device,
            place,
            flags=flags or BuildFlags(),
            rebuild=rebuild,
            progress=lambda what, share, part=part: part(what, 0.8 * share),  # type: ignore[misc]
        )
        part("running the gate", 0.85)
        limits, expected = gate or _exported_gate(artefact), stored_expectation(opened, artefact.reference)
        builds.append(_judge(opened, artefact, found, place, library, device, expected, limits))
    say("done", 1.0)
    return BuildReport(
        bundle_id=opened.manifest.bundle_id,
        device=device,
        library=f"{library.name} {library.version}",
        cache=place.root,
        builds=tuple(builds),
    )


def _judge(
    bundle: Bundle,
    artefact: Artefact,
    found: DeviceEngine,
    cache: EngineCache,
    library: Library,
    device: CudaDevice,
    expected: Expected,
    gate: Gate,
) -> ArtefactBuild:
    spec, files = bundle.manifest.spec, bundle.artefact_files(artefact)
    engine = Engine(cache)
    try:
        engine.load(files, spec, EngineConfig(threads=1, rest_precision=artefact.rest_precision))
        outputs = run_engine(engine, spec, expected.inputs)
        report = compare_outputs(spec, expected, outputs, gate, engine.description, precision=artefact.precision)
        compiled, description = engine.runtime_cache(), engine.description
    finally:
        engine.close()
    here = engine_key(model_of(files), library, device)
    record = {
        "version": BUILD_VERSION,
        "passed": bool(report),
        "bundle_id": bundle.manifest.bundle_id,
        "driver": device.driver,
        "report": report.summary(),
    }
    _record(cache, found.entry, here.device, record, compiled)
    return ArtefactBuild(
        name=artefact.name,
        action=found.action,
        reason=found.reason,
        seconds=found.entry.seconds,
        engine=description,
        report=report,
    )


def _record(
    cache: EngineCache, entry: CachedEngine, device: str, record: Mapping[str, Any], compiled: bytes
) -> CachedEngine:
    """Writes the gate's outcome next to the engine.

    Also what the library compiled while loading.
    """
    content = {"plan": entry.content["plan"], **({"runtime": compiled} if compiled else {})}
    return cache.store(replace(entry, gates={**entry.gates, device: dict(record)}), content)


def _exported_gate(artefact: Artefact) -> Gate:
    """The thresholds an artefact was exported with.

    The default ones where its report names none.
    """
    limits = (artefact.gate or {}).get("limits")
    return Gate.from_json(limits) if isinstance(limits, Mapping) else Gate()


__all__ = ["BUILD_VERSION", "ENGINE", "ArtefactBuild", "BuildReport", "Progress", "build_bundle"]
