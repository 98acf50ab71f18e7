"""Core ML on a Mac: the artefact's ``.mlpackage`` through coremltools.

On the compute units that are asked for.

Core ML predicts on macOS only, so elsewhere ``probe`` and ``load`` say that in one line. ``TINYUSFM_COREML_UNITS``
(``all``, ``cpu_and_ne``, ``cpu_and_gpu`` or ``cpu_only``; default ``all``) chooses the compute units; Core ML decides
itself which operator runs on which of them. Threads do not matter to it. A run cannot be interrupted: a cancelled one
ends within milliseconds and its answer is discarded. It does not check tensor values (Session does) and knows no gates;
the outcome that ``verify`` found on this Mac is kept by gate_record.py and handed to whoever asks.

Core ML execution: not run by us.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.device.gate_record import GateKey, files_sha256, keep_record, read_record
from tinyusfm_runtime.engines import EngineConfig, one_line
from tinyusfm_runtime.errors import EngineError, InputError, MissingExtra, UnsupportedError
from tinyusfm_runtime.graphs.mil import check
from tinyusfm_runtime.installation import pip_line
from tinyusfm_runtime.plugins import Availability
from tinyusfm_runtime.spec import INPUT_NAME, LOGITS_NAME, ModelSpec

PACKAGE = "model.mlpackage"
"""Folder that Core ML and Xcode open."""
PLACES: Mapping[str, str] = {
    "model.mlmodel": "Data/com.apple.CoreML/model.mlmodel",
    "weight.bin": "Data/com.apple.CoreML/weights/weight.bin",
    "Manifest.json": "Manifest.json",
}
"""File of an artefact -> where it lies inside the package."""
UNITS_VARIABLE = "TINYUSFM_COREML_UNITS"
"""Environment variable that chooses the compute units."""
UNITS = ("all", "cpu_and_ne", "cpu_and_gpu", "cpu_only")
"""What it may say."""
NOT_RUN = "Core ML execution: not run by us"
"""What stands wherever a Core ML device is spoken of."""
_ELSEWHERE = "Core ML predicts on macOS only"


def runs_here() -> bool:
    """Whether this system has Core ML at all."""
    return sys.platform == "darwin"


def available() -> Availability:
    """Tells whether Core ML can run here; never raises."""
    missing = [reason for _, works, reason, _ in pieces() if not works]
    if missing:
        return Availability(usable=False, reason=missing[0], extra="coreml")
    return Availability(
        usable=True, reason=f"{pieces()[1][2]} on macOS {platform.mac_ver()[0]}; {NOT_RUN}", extra="coreml"
    )


def pieces() -> list[tuple[str, bool, str, str]]:
    """Everything it needs, piece by piece.

    Each with name, whether it is there, what it is or why not, and what brings it.
    """
    here = runs_here()
    system = f"macOS {platform.mac_ver()[0]}" if here else f"{_ELSEWHERE}, this is {platform.system()}"
    found = [("macOS", here, system, "a Mac with macOS 14 or later; export and its check run here all the same")]
    try:
        found.append(("coremltools", True, f"coremltools {import_coremltools().__version__}", ""))
    except MissingExtra:
        found.append(("coremltools", False, "coremltools is not installed", pip_line("coreml")))
    except Exception as error:  # a broken installation may raise anything
        found.append(("coremltools", False, f"coremltools is broken: {one_line(error)}", "install it again"))
    return found


def import_coremltools() -> Any:
    """The library, without what it prints about other libraries' versions.

    Raises:
        MissingExtra: it is not installed.
    """
    logging.getLogger("coremltools").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import coremltools
    except ImportError as error:
        raise MissingExtra("a coreml artefact", "coremltools", "coreml") from error
    return coremltools


def check_files(files: Mapping[str, bytes]) -> None:
    """Checks that an artefact's files are a package's.

    Raises:
        EngineError: a file is missing, or there is one too many.
    """
    if set(files) != set(PLACES):
        got = ", ".join(sorted(files)) or "nothing"
        raise EngineError(f"Core ML needs exactly {', '.join(PLACES)}, got {got}")


def write_package(files: Mapping[str, bytes], folder: Path) -> Path:
    """Lays an artefact's files out as Core ML wants them.

    Args:
        files: file name -> content.
        folder: an existing folder.

    Returns:
        The package inside the folder.

    Raises:
        EngineError: a file is missing, or there is one too many.
    """
    check_files(files)
    package = folder / PACKAGE
    for name, content in files.items():
        place = package / PLACES[name]
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
    return package


class Engine:
    """One Core ML model."""

    def __init__(self) -> None:
        self.device_gate: Mapping[str, Any] | None = None
        """What ``tinyusfm-edge verify`` found when it ran the gate on this Mac, or None if it has not."""
        self._key: GateKey | None = None
        self._model: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._shape: tuple[int, ...] = ()
        self._outputs: list[str] = []
        self._running = self._cancelled = False
        self._description = "Core ML, not loaded"

    @property
    def description(self) -> str:
        """Library, version, system, units and precision, one line."""
        return self._description

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Compiles the package and asserts its input and outputs (see engine.Engine)."""
        if not runs_here():
            raise UnsupportedError(f"{_ELSEWHERE}, this is {platform.system()}: open the bundle on a Mac")
        if config.rest_precision == "bf16":
            raise UnsupportedError("Core ML computes in f32 or f16, not in bf16: take another artefact")
        units = chosen_units()
        check_files(files)
        check(files, spec)
        ct = import_coremltools()
        self.close()
        self._folder = tempfile.TemporaryDirectory(prefix="tinyusfm-")
        try:
            package = write_package(files, Path(self._folder.name))
            with contextlib.redirect_stderr(io.StringIO()):
                model = ct.models.MLModel(str(package), compute_units=ct.ComputeUnit[units.upper()])
            self._outputs = check_interface(model.get_spec(), spec)
        except Exception as error:
            self.close()
            if isinstance(error, EngineError):
                raise
            raise EngineError(f"Core ML cannot load the model: {one_line(error)}") from error
        self._model, self._shape = model, tuple(spec.input.shape)
        system = f"macOS {platform.mac_ver()[0]}"
        self._key = GateKey(
            content_sha256=files_sha256(files),
            device=mac_model(),
            system=system,
            library="coremltools",
            library_version=ct.__version__,
            settings=f"units {units}",
        )
        self.device_gate = read_record(self._key)
        self._description = f"Core ML on {system}, coremltools {ct.__version__}, units {units}, {config.rest_precision}"

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer (see engine.Engine)."""
        if self._model is None:
            raise EngineError("the Core ML engine is not loaded")
        if tensor.shape != self._shape or tensor.dtype != np.uint8:
            raise EngineError(f"the engine takes uint8 {self._shape}, not {tensor.dtype} {tensor.shape}")
        try:
            from PIL import Image
        except ImportError as error:
            raise MissingExtra("running a coreml artefact", "pillow", "coreml") from error
        self._cancelled, self._running = False, True
        try:
            found = self._model.predict({INPUT_NAME: Image.fromarray(tensor[0, 0])})
        except Exception as error:  # coremltools has no class of its own
            raise EngineError(f"Core ML failed: {one_line(error)}") from error
        finally:
            self._running = False
        if self._cancelled:
            raise EngineError("Core ML: the run was cancelled")
        return {name: np.array(found[name], np.float32) for name in self._outputs}

    def cancel(self) -> None:
        """Discards the answer of a run in progress."""
        if self._running:
            self._cancelled = True

    def keep_gate(self, outcome: Mapping[str, Any]) -> str:
        """Keeps the outcome of a gate that was run on this engine.

        Sessions on this Mac find it.

        Args:
            outcome: plain data: ``passed``, ``bundle_id``, ``report``.

        Returns:
            Where it holds: Mac, macOS, coremltools and compute units, one line.

        Raises:
            EngineError: nothing is loaded.
            OutputError: the record cannot be written.
            TamperedError: the cache's folder belongs to somebody else, or others may write to it.
        """
        if self._key is None:
            raise EngineError("the Core ML engine is not loaded")
        keep_record(self._key, outcome)
        self.device_gate = outcome
        return self._key.words

    def close(self) -> None:
        """Frees the model and its temporary package."""
        self._model = self._key = self.device_gate = None
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()


def mac_model() -> str:
    """Chip and model of this Mac, such as ``Apple M2 (Mac14,2)``.

    The architecture where macOS does not say.
    """
    try:
        asked = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string", "hw.model"]
        printed = subprocess.run(asked, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
        chip, model = (line.strip() for line in printed[:2])
    except (OSError, ValueError, subprocess.SubprocessError):
        return platform.machine() or "unknown"
    return f"{chip} ({model})"


def chosen_units() -> str:
    """The compute units that the environment names.

    Raises:
        InputError: a name that Core ML does not know.
    """
    named = os.environ.get(UNITS_VARIABLE, "").strip().lower() or UNITS[0]
    if named not in UNITS:
        raise InputError(f"{UNITS_VARIABLE} must be one of {', '.join(UNITS)}, not {named!r}")
    return named


def check_interface(model_spec: Any, spec: ModelSpec) -> list[str]:
    """Asserts a grey image as input and ``logits`` as first output.

    The image must be of the model's size.

    Args:
        model_spec: Core ML's own description of the package.
        spec: the model.

    Returns:
        Names of the outputs, in order.

    Raises:
        EngineError: another interface.
    """
    inputs, outputs = list(model_spec.description.input), [o.name for o in model_spec.description.output]
    rows, cols = spec.input.shape[2:]
    image = inputs[0].type.imageType if len(inputs) == 1 and inputs[0].type.HasField("imageType") else None
    if image is None or inputs[0].name != INPUT_NAME or (image.height, image.width) != (rows, cols):
        raise EngineError(f"the model's input is not an image {INPUT_NAME!r} of {rows}x{cols} pixels")
    if spec.input.shape[1] != 1 or image.colorSpace != image.ColorSpace.Value("GRAYSCALE"):
        raise EngineError("the model's input and the manifest disagree about grey or colour")
    if outputs[:1] != [LOGITS_NAME]:
        raise EngineError(f"the model's first output is not {LOGITS_NAME}")
    return outputs


__all__ = [
    "NOT_RUN",
    "PACKAGE",
    "PLACES",
    "UNITS",
    "UNITS_VARIABLE",
    "Engine",
    "available",
    "check_files",
    "check_interface",
    "chosen_units",
    "import_coremltools",
    "mac_model",
    "pieces",
    "runs_here",
    "write_package",
]
