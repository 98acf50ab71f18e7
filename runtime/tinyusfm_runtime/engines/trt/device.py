"""This device's TensorRT engine for an artefact.

Out of the cache, out of the bundle, or built here and now.

It says which of the three it was. It does not run engines and knows no gates; the command ``build`` puts both together
(tinyusfm_export/device_build.py).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone

from tinyusfm_runtime.engines.trt.build import (
    MIN_HARDWARE_COMPATIBLE,
    BuildFlags,
    Library,
    Progress,
    build_plan,
    check_types,
    parse,
)
from tinyusfm_runtime.engines.trt.cache import CachedEngine, EngineCache, EngineKey, timing_stem
from tinyusfm_runtime.engines.trt.cuda import CudaDevice
from tinyusfm_runtime.errors import EngineError, UnsupportedError

MODEL_FILE = "model.onnx"
"""The verified ONNX of an artefact."""
ENGINE_SUFFIX = ".engine"
"""Suffix of engines that an export built ahead of time."""
TIMING_SUFFIX = ".timing"
"""Suffix of timing caches of a device that an export put in, so that the device builds the same engine again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceEngine:
    """What was found or made.

    Attributes:
        entry: the cache's entry.
        action: ``cached``, ``from the bundle`` or ``built``.
        reason: why an older entry was not used; empty if there was none, or it was used.
    """

    entry: CachedEngine
    action: str
    reason: str = ""


def engine_key(onnx: bytes, library: Library, device: CudaDevice, flags: BuildFlags | None = None) -> EngineKey:
    """The key under which an engine of this ONNX stands on this device.

    Args:
        onnx: the artefact's ONNX.
        library: TensorRT's edition.
        device: the GPU.
        flags: of the build.
    """
    return EngineKey(
        content_sha256=hashlib.sha256(onnx).hexdigest(),
        gpu=device.gpu,
        compute_capability=device.compute_capability,
        library=library.name,
        library_version=library.version,
        driver=device.driver,
        flags=(flags or BuildFlags()).to_json(),
    )


def prebuilt_name(library: Library, compute_capability: str) -> str:
    """File name of an engine built ahead of time.

    Such as ``tensorrt-rtx-1.7.1.116-sm86.engine``.
    """
    return f"{library.name}-{library.version}-sm{compute_capability.replace('.', '')}{ENGINE_SUFFIX}"


def timing_name(key: EngineKey) -> str:
    """File name of a timing cache in an artefact.

    Such as ``tensorrt-10.3.0-Orin-16-SMs-sm8.7.timing``.
    """
    return f"{timing_stem(key)}{TIMING_SUFFIX}"


def model_of(files: Mapping[str, bytes]) -> bytes:
    """The ONNX among an artefact's files.

    Raises:
        EngineError: there is none, or something lies beside it that no export writes.
    """
    beside = (ENGINE_SUFFIX, TIMING_SUFFIX)
    strange = [name for name in files if name != MODEL_FILE and not name.endswith(beside)]
    if MODEL_FILE not in files or strange:
        got = ", ".join(sorted(files)) or "nothing"
        raise EngineError(f"TensorRT needs {MODEL_FILE} and at most engines and timing caches beside it, got {got}")
    return files[MODEL_FILE]


def ensure_engine(
    files: Mapping[str, bytes],
    precision: str,
    library: Library,
    device: CudaDevice,
    cache: EngineCache,
    *,
    flags: BuildFlags,
    rebuild: bool = False,
    progress: Progress | None = None,
) -> DeviceEngine:
    """Finds or builds the engine and stores it in the cache.

    Args:
        files: the artefact's files, verified; a timing cache of this library and GPU among them is taken before the
            device's own.
        precision: fp32, fp16 or int8, checked against the ONNX before anything is built.
        library: TensorRT's edition.
        device: the GPU.
        cache: where engines stand.
        flags: what changes the engine; an entry with other flags is built again.
        rebuild: remove what stands there, whatever it is, and build.
        progress: called with what is done and the share done.

    Raises:
        TamperedError: the entry is not as it was written, and ``rebuild`` is off.
        UnsupportedError: the entry is of another GPU, the ONNX is not what the precision says, or TensorRT or the GPU
            cannot do it.
        EngineError: the builder failed.
        OutputError: the cache cannot be written.
    """
    onnx = model_of(files)
    key = engine_key(onnx, library, device, flags)
    if flags.hardware_compatible and float(device.compute_capability) < MIN_HARDWARE_COMPATIBLE:
        raise UnsupportedError(
            f"--hardware-compatible needs compute capability {MIN_HARDWARE_COMPATIBLE} or more, "
            f"this GPU has {device.compute_capability}"
        )
    network = parse(library, onnx)
    check_types(network, precision)
    reason = ""
    if rebuild:
        cache.remove(key)
    elif (entry := cache.find(key)) is not None:
        stale = entry.key.stale_against(key)
        if dict(entry.key.flags) != dict(key.flags):
            stale.append(f"flags {dict(entry.key.flags)} are now {dict(key.flags)}")
        if not stale:
            return DeviceEngine(entry=entry, action="cached")
        reason = "stale: " + "; ".join(stale)
        cache.remove(key)
    ready = None if flags != BuildFlags() else files.get(prebuilt_name(library, device.compute_capability))
    start = time.monotonic()
    if ready is None:
        known = files.get(timing_name(key)) or cache.timing(key)
        plan, timing = build_plan(library, network, flags, timing_cache=known, progress=progress)
        cache.keep_timing(key, timing)
    else:
        plan = ready
    entry = CachedEngine(
        key=key,
        origin="from the bundle" if ready is not None else "built here",
        seconds=round(time.monotonic() - start, 3),
        files={},
        gates={},
        created_utc=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    stored = cache.store(entry, {"plan": plan})
    return DeviceEngine(entry=stored, action="from the bundle" if ready is not None else "built", reason=reason)


__all__ = [
    "ENGINE_SUFFIX",
    "MODEL_FILE",
    "TIMING_SUFFIX",
    "DeviceEngine",
    "engine_key",
    "ensure_engine",
    "model_of",
    "prebuilt_name",
    "timing_name",
]
