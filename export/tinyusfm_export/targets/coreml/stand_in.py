"""An engine that executes an artefact's saved Core ML program on the CPU.

It judges the artefact where Core ML cannot run.

It reads the files back as a Mac would (program and weight file, not the objects they were written from). It says how
many operators each way computed. It is no Core ML: passing here judges the file, not a device's kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from tinyusfm_export.targets.coreml.program import Program
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.coreml import check_files, check_interface, write_package
from tinyusfm_runtime.errors import EngineError, UnsupportedError
from tinyusfm_runtime.graphs.mil import check
from tinyusfm_runtime.spec import INPUT_NAME, ModelSpec


class MilEngine:
    """One saved program, interpreted.

    Threads are torch's own, whatever the configuration says.
    """

    def __init__(self) -> None:
        self._program: Program | None = None
        self._shape: tuple[int, ...] = ()
        self._description = "MIL interpreter, not loaded"

    @property
    def description(self) -> str:
        """What ran, with the number of operators that each way computed, one line."""
        return self._description

    def load(self, files: Mapping[str, bytes], spec: ModelSpec, config: EngineConfig) -> None:
        """Reads the package back (see engine.Engine)."""
        if config.rest_precision == "bf16":
            raise UnsupportedError("Core ML computes in f32 or f16, not in bf16: take another artefact")
        check_files(files)
        check(files, spec)
        with tempfile.TemporaryDirectory(prefix="tinyusfm-") as folder:
            self._program = Program(write_package(files, Path(folder)))
        check_interface(self._program.spec, spec)
        self._shape = tuple(spec.input.shape)
        ways = self._program.operators
        self._description = (
            f"the saved MIL program, interpreted on the CPU: {ways['torch']} operators over torch, "
            f"{ways['coremltools']} by coremltools' value inference, {config.rest_precision} "
            "(no Core ML was run)"
        )

    def run(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        """Computes one answer (see engine.Engine)."""
        if self._program is None:
            raise EngineError("the MIL interpreter is not loaded")
        if tensor.shape != self._shape or tensor.dtype != np.uint8:
            raise EngineError(f"the program takes uint8 {self._shape}, not {tensor.dtype} {tensor.shape}")
        return self._program.run({INPUT_NAME: tensor.astype(np.float32)})

    def cancel(self) -> None:
        """Nothing: it judges at export, where nobody waits."""

    def close(self) -> None:
        """Frees the program."""
        self._program = None


__all__ = ["MilEngine"]
