"""Export: a trained student becomes artefacts that other engines run.

They are checked against the student itself.

    from tinyusfm_export import Gate, export_bundle, verify_bundle

    result = export_bundle(module, spec, targets=["openvino"], precisions=["int8"], out="mine.bundle",
                           gate_frames=frames, calibration=frames_of_mine)
    report = verify_bundle("mine.bundle", module=module)

The floor above the calibration package and below tinyusfm_edge, which it never imports: an ``nn.Module`` and a
ModelSpec are handed in. Importing this package loads none of its modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tinyusfm_export.pipeline import ExportOptions as ExportOptions
    from tinyusfm_export.pipeline import ExportResult as ExportResult
    from tinyusfm_export.pipeline import export_bundle as export_bundle
    from tinyusfm_export.verify.bundle import VerifyReport as VerifyReport
    from tinyusfm_export.verify.bundle import verify_bundle as verify_bundle
    from tinyusfm_export.verify.gate import Gate as Gate
    from tinyusfm_export.verify.gate_frames import GateFrames as GateFrames
    from tinyusfm_export.verify.gate_frames import choose_gate_frames as choose_gate_frames

_HOMES = {
    "pipeline": ("ExportOptions", "ExportResult", "export_bundle"),
    "verify.bundle": ("VerifyReport", "verify_bundle"),
    "verify.gate": ("Gate",),
    "verify.gate_frames": ("GateFrames", "choose_gate_frames"),
}
if not TYPE_CHECKING:
    from tinyusfm_runtime.face import lazy_names as _lazy_names

    __getattr__, __dir__ = _lazy_names(__name__, _HOMES)

__all__ = [
    "ExportOptions",
    "ExportResult",
    "Gate",
    "GateFrames",
    "VerifyReport",
    "choose_gate_frames",
    "export_bundle",
    "verify_bundle",
]
