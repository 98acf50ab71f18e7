"""Target ``onnx``: one ONNX file for ONNX Runtime on a CPU.

* fp32: the graph as it is.
* fp16: weights stored as float16 and widened when the file is loaded; ONNX Runtime computes in float32 on CPUs, so this
  halves the file and gains no time.
* int8: dynamic int8 linears and static int8 convolutions (onnx_int8.py has the measurements behind that choice). The
  rest is float32 also where the decision allows bf16, which ONNX Runtime has not on CPUs.

It does not run what it writes; the gate does that in the engine of the same name.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.onnx_files.int8 import ort_onnx
from tinyusfm_export.onnx_files.writer import FloatForm, save_checked, write_onnx
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.targets import BuiltArtefact, Requirements
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import UnsupportedError
from tinyusfm_runtime.plugins import Availability

MODEL_FILE = "model.onnx"
"""The one file of an artefact."""
LIBRARY = "onnxruntime"
"""Distribution of the engine."""
_FORMS = {
    "fp32": "float32 ONNX, opset 20",
    "fp16": "float16 storage, computed in float32 on a CPU",
    "int8": "dynamic int8 linears, static int8 decoder convolutions (QLinearConv), rest float32",
}


PRUNES = True
"""It writes graphs that were pruned to a sector."""


def available() -> Availability:
    """Tells whether ONNX files can be written here; never raises."""
    try:
        import onnx
    except ImportError:
        return Availability(usable=False, reason="onnx is not installed", extra="export")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"onnx is broken: {type(error).__name__}", extra="export")
    return Availability(usable=True, reason=f"onnx {onnx.__version__}, for onnxruntime {_version()}", extra="export")


class Target:
    """Writes ``model.onnx``."""

    name = "onnx"
    suffix = ".onnx"
    precisions = ("fp32", "fp16", "int8")

    def build(self, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
        """Writes the artefact (see target.Target)."""
        if decision.precision not in self.precisions:
            raise UnsupportedError(
                f"ONNX Runtime does not compute {decision.precision} on a CPU: use {', '.join(self.precisions)}, "
                "or target openvino"
            )
        if decision.precision == "int8":
            data = ort_onnx(graph, decision)
        else:
            form = FloatForm(half_storage=decision.precision == "fp16")
            data = write_onnx(graph, form=form, flat_heads=True)
        path = save_checked(data, out / MODEL_FILE)
        return BuiltArtefact(
            files=(path,),
            form=_FORMS[decision.precision],
            rest_precision="f32",
            requirements=Requirements(
                cpu_features=machine_card().features, library=LIBRARY, library_version=_version()
            ),
        )


def _version() -> str:
    try:
        return metadata.version(LIBRARY)
    except metadata.PackageNotFoundError:
        return "not installed"


__all__ = ["LIBRARY", "MODEL_FILE", "PRUNES", "Target", "available"]
