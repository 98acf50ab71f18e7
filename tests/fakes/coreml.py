"""A Mac that is none: ``MLModel`` made from the installed coremltools (autospec), whose predict is interpretation.

A call or argument that the real class does not have fails. What Core ML's own kernels would answer stays unknown.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tinyusfm_runtime.engines import coreml


@dataclass
class Mac:
    """What a test may bend.

    Attributes:
        shift: added to every answer.
        predictions: how many were asked for.
    """

    shift: float = 0.0
    predictions: int = 0


def install(monkeypatch: pytest.MonkeyPatch, *, chip: str = "Apple M2 (Mac14,2)", macos: str = "15.1") -> Mac:
    """Makes this system a Mac as far as the Core ML engine can tell."""
    ct = coreml.import_coremltools()
    from tinyusfm_export.targets.coreml.program import Program

    mac, real = Mac(), ct.models.MLModel
    made = mock.create_autospec(real)

    def load(path: str, *args: Any, **options: Any) -> Any:
        if options.get("skip_model_load"):  # the interpreter reads packages by the real class
            return real(path, *args, **options)
        program = Program(Path(path))
        model = mock.create_autospec(real, instance=True)
        model.get_spec.return_value = program.spec

        def predict(data: dict[str, Any], state: Any = None) -> dict[str, np.ndarray]:
            mac.predictions += 1
            found = program.run({name: np.asarray(v, np.float32)[None, None] for name, v in data.items()})
            return {name: value + mac.shift for name, value in found.items()}

        model.predict.side_effect = predict
        return model

    made.side_effect = load
    monkeypatch.setattr(ct.models, "MLModel", made)
    monkeypatch.setattr(coreml, "runs_here", lambda: True)
    monkeypatch.setattr(coreml, "mac_model", lambda: chip)
    monkeypatch.setattr(platform, "mac_ver", lambda: (macos, ("", "", ""), "arm64"))
    return mac


__all__ = ["Mac", "install"]
