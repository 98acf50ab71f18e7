"""Target ``litert``: one ``.tflite`` file for LiteRT.

For Arm boards, phones and PCs.

* fp32: the graph as it is.
* int8: dynamic-range. Weights of the layers that the decision names are int8 with one scale per output channel,
  activations stay float and are quantized row by row by the kernel, so the decision's static ranges are not used.
  Static ranges for activations (w8a8) are not written: with stock tools they are slower and less exact on a CPU.
* Only built-in operators; LayerNorm does not overflow FP16 (writer.py), for accelerators that compute in it.

It does not run what it writes; the gate does that in the engine of the same name.
"""

from __future__ import annotations

from pathlib import Path

from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.targets import BuiltArtefact, Requirements
from tinyusfm_export.targets.litert.flatbuffer import import_format
from tinyusfm_export.targets.litert.writer import write_model
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.engines.litert import LIBRARY, MODEL_FILE, library_version
from tinyusfm_runtime.errors import MissingExtra, OutputError, UnsupportedError
from tinyusfm_runtime.plugins import Availability

PRUNES = True
"""It writes graphs that were pruned to a sector."""
_FORMS = {
    "fp32": "float32 built-in operators",
    "int8": "dynamic-range int8: int8 weights with a scale per output channel, float activations, rest float32",
}


def available() -> Availability:
    """Tells whether ``.tflite`` files can be written here; never raises."""
    try:
        _, tflite = import_format()
    except MissingExtra as error:
        return Availability(usable=False, reason=f"{error.library} is not installed", extra="litert")
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"tflite is broken: {type(error).__name__}", extra="litert")
    reason = f"tflite {tflite.__version__}, for {LIBRARY} {library_version()}"
    return Availability(usable=True, reason=reason, extra="litert")


class Target:
    """Writes ``model.tflite``."""

    name = "litert"
    suffix = ".tflite"
    precisions = ("fp32", "int8")

    def build(self, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
        """Writes the artefact (see target.Target)."""
        if decision.precision not in self.precisions:
            raise UnsupportedError(
                f"LiteRT artefacts are {' or '.join(self.precisions)}, not {decision.precision}: choose one of these, "
                "or another target"
            )
        path, content = out / MODEL_FILE, write_model(graph, decision)
        try:
            path.write_bytes(content)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
        return BuiltArtefact(
            files=(path,),
            form=_FORMS[decision.precision],
            rest_precision="f32",
            requirements=Requirements(
                cpu_features=machine_card().features, library=LIBRARY, library_version=library_version()
            ),
        )


__all__ = ["PRUNES", "Target", "available"]
