"""Target ``openvino``: ``model.xml`` and ``model.bin`` for OpenVINO's CPU plug-in.

* fp32; fp16 (float16 storage, computed in float32 on a CPU); bf16 (the float16 file, computed in bfloat16, which needs
  a CPU that has it); int8 with everything else in bf16 or f32, as the decision says.
* int8 is written as FakeQuantize on a layer's input and int8 weights with a scale per output channel, which the
  plug-in turns into u8 x i8 kernels. The range is used as it is, not made symmetric: FakeQuantize maps [low, high] to
  [0, high - low], so the codes are unsigned without a zero point, and ``low`` times the row sums of the weights
  goes into the bias, which is exact. Against symmetric codes that costs no time and halves the rounding error of
  skewed tensors (logit error 0.063 against 0.105 rms on the fetal-head student); against a zero point it is 2 %
  faster (OpenVINO 2026.4.1, Zen 5).
* FakeQuantize with one range per channel on tokens must not be used: the plug-in of 2026.4.1 runs it without
  an error and with wrong results.

It does not run what it writes; the gate does that in the engine of the same name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_export.graph.build import ExportGraph
from tinyusfm_export.graph.net import as_array
from tinyusfm_export.onnx_files.writer import write_onnx
from tinyusfm_export.quantize.decision import QuantDecision, TensorQuant
from tinyusfm_export.quantize.ptq import natural_grid, quantize_weight, rounded_weight, symmetric_grid
from tinyusfm_export.targets import BuiltArtefact, Requirements
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.engines.ov import import_openvino, library_version
from tinyusfm_runtime.errors import MissingExtra, OutputError, UnsupportedError
from tinyusfm_runtime.plugins import Availability

XML_FILE, BIN_FILE = "model.xml", "model.bin"
"""The two files of an artefact."""
LIBRARY = "openvino"
"""Distribution of the engine."""
_REST = {"f32": "float32", "bf16": "bfloat16"}


PRUNES = True
"""It writes graphs that were pruned to a sector."""


def available() -> Availability:
    """Tells whether OpenVINO files can be written here; never raises."""
    try:
        openvino = import_openvino()
        import onnx
    except ImportError as error:
        missing = str(error.name or "openvino").split(".")[0]
        extra = "export" if missing == "onnx" else "openvino"
        return Availability(usable=False, reason=f"{missing} is not installed", extra=extra)
    except Exception as error:  # a broken installation may raise anything
        return Availability(usable=False, reason=f"openvino is broken: {type(error).__name__}", extra="openvino")
    return Availability(
        usable=True, reason=f"openvino {library_version(openvino)}, onnx {onnx.__version__}", extra="openvino"
    )


class Target:
    """Writes ``model.xml`` and ``model.bin``."""

    name = "openvino"
    suffix = ".xml"
    precisions = ("fp32", "fp16", "bf16", "int8")

    def build(self, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
        """Writes the artefact (see target.Target)."""
        if decision.rest_precision == "bf16" and not machine_card().has_bf16:
            raise UnsupportedError(f"{machine_card().cpu} does not compute bf16: decide with rest precision f32")
        try:
            openvino = import_openvino()
        except ImportError as error:
            raise MissingExtra("target openvino", LIBRARY, "openvino") from error
        try:
            model = openvino.Core().read_model(write_onnx(graph))
            insert_int8(model, graph, decision)
        except RuntimeError as error:  # openvino raises nothing more precise
            raise UnsupportedError(f"OpenVINO cannot express the model: {str(error).splitlines()[0]}") from error
        return BuiltArtefact(
            files=_save(openvino, model, out, half=decision.precision in ("fp16", "bf16")),
            form=_form(decision),
            rest_precision=decision.rest_precision,
            requirements=Requirements(
                cpu_features=machine_card().features, library=LIBRARY, library_version=library_version(openvino)
            ),
        )


def insert_int8(model: Any, graph: ExportGraph, decision: QuantDecision) -> None:
    """Writes the decision into an ``openvino.Model``, in place.

    The model was read from the graph's ONNX.

    Args:
        model: the model.
        graph: the export graph it came from.
        decision: any decision; a float one changes nothing.

    Raises:
        UnsupportedError: a dynamic tensor, or a tensor that the graph has not.
    """
    operations = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    for name, quant in decision.quantized().items():
        if quant.mode == "dynamic":
            raise UnsupportedError(f"OpenVINO takes static ranges only, {name!r} is dynamic: calibrate it")
        if name not in graph.linear_inputs:
            raise UnsupportedError(f"the decision names {name!r}, which this graph has not: decide again")
        layer = graph.linear_inputs[name]
        _insert_layer(operations, layer, graph.module.get_submodule(layer), quant, decision.weight_limit)
    model.validate_nodes_and_infer_types()


def _insert_layer(operations: dict[str, Any], path: str, layer: Any, quant: TensorQuant, weight_limit: int) -> None:
    """Replaces one product by its int8 form and corrects the bias.

    The form is FakeQuantize, int8 weights and the same product.
    """
    op = import_openvino().opset13
    weight = as_array(layer.weight)
    codes, scales = quantize_weight(weight, limit=min(weight_limit, cpu_weight_limit()))
    old = operations[f"{path}/matmul" if weight.ndim == 2 else f"{path}/WithoutBiases"]
    padded = weight.ndim == 4 and any(layer.padding)
    source, low = _fake_quantize(op, old.input_value(0), quant, shift=not padded)
    column = scales.reshape((-1,) + (1,) * (weight.ndim - 1))
    narrow = op.multiply(op.convert(op.constant(codes), np.float32), op.constant(column), name=f"{path}/weight")
    if weight.ndim == 2:
        new = op.matmul(source, narrow, False, True, name=old.get_friendly_name())
    else:
        pads = list(layer.padding)
        if layer.groups != 1:
            raise UnsupportedError(f"layer {path!r} is a grouped convolution: keep it float")
        new = op.convolution(source, narrow, [1, 1], pads, pads, [1, 1], name=old.get_friendly_name())
    sums = codes.reshape(len(codes), -1).astype(np.float64).sum(1) * scales
    _replace(op, operations.get(f"{path}/bias" if weight.ndim == 2 else path), old, new, layer, low * sums)


def written_weight(weight: np.ndarray, decision: QuantDecision, *, limit: int | None = None) -> np.ndarray:
    """What a weight is after rounding (see bias_shift.py).

    Args:
        weight: float32.
        decision: whose own limit holds too.
        limit: largest code, or None for what this CPU multiplies without overflow.
    """
    return rounded_weight(weight, min(decision.weight_limit, cpu_weight_limit() if limit is None else limit))


def cpu_weight_limit() -> int:
    """Largest weight code that does not overflow on this CPU.

    In the products of OpenVINO's kernels.

    Without 8-bit dot products they add two products in 16 bits, which saturates; 7-bit weights cannot reach that.
    """
    return 127 if machine_card().has_int8_dot else 63


def _fake_quantize(op: Any, source: Any, quant: TensorQuant, *, shift: bool) -> tuple[Any, float]:
    """FakeQuantize on a product's input, and the mean shift it brings.

    The shift is how much lower its output lies than its input.
    """
    grid = natural_grid(quant)
    if grid.zero != 0 and not grid.signed and not shift:
        # padding inserts zeros behind the shift, so a padded convolution keeps zero where it is
        grid = symmetric_grid(quant)
    low = 0.0 if grid.signed else grid.low
    limits = (grid.low, grid.high, grid.low - low, grid.high - low)
    name = f"{source.get_node().get_friendly_name()}/codes"
    return op.fake_quantize(source, *(op.constant(np.float32(v)) for v in limits), 256, name=name), low


def _replace(op: Any, add: Any, old: Any, new: Any, layer: Any, correction: np.ndarray) -> None:
    """Puts ``new`` in the old product's place.

    The correction is added to the bias behind it.
    """
    bias = np.zeros(len(correction)) if layer.bias is None else as_array(layer.bias).astype(np.float64)
    value = (bias + correction).astype(np.float32)
    value = value.reshape((1, -1, 1, 1)) if as_array(layer.weight).ndim == 4 else value
    if layer.bias is None:
        new = op.add(new, op.constant(value)) if correction.any() else new
    else:
        sides = [add.input_value(i).get_node().get_friendly_name() for i in range(2)]
        add.input(1 - sides.index(old.get_friendly_name())).replace_source_output(op.constant(value).output(0))
    old.output(0).replace(new.output(0))


def _save(openvino: Any, model: Any, out: Path, *, half: bool) -> tuple[Path, Path]:
    """Writes the two files.

    Names that OpenVINO numbers per process are replaced first, so that bytes repeat.

    OpenVINO creates missing folders and does not notice a full disk, so the folder is checked before and the files
    are read back after.
    """
    if not out.is_dir():
        raise OutputError(f"cannot write {out}: no such folder")
    for index, node in enumerate(model.get_ordered_ops()):
        if node.get_friendly_name() == node.get_name():
            node.set_friendly_name(f"{node.get_type_name()}/{index}")
    model.set_friendly_name("tinyusfm")
    paths = out / XML_FILE, out / BIN_FILE
    try:
        if half:
            openvino.save_model(model, str(paths[0]), compress_to_fp16=True)
        else:
            openvino.serialize(model, str(paths[0]), str(paths[1]))
        openvino.Core().read_model(str(paths[0]), str(paths[1]))
    except (OSError, RuntimeError) as error:
        for path in paths:
            path.unlink(missing_ok=True)
        raise OutputError(f"cannot write {out}: no room, or no permission ({str(error).splitlines()[0]})") from error
    return paths


def _form(decision: QuantDecision) -> str:
    rest = _REST[decision.rest_precision]
    if decision.precision == "int8":
        weights = "" if machine_card().has_int8_dot else ", 7-bit weights (no 8-bit dot products on this CPU)"
        return f"static int8 by FakeQuantize, u8 activations with the offset in the bias{weights}, rest {rest}"
    if decision.precision == "fp32":
        return "float32"
    return f"float16 storage, computed in {rest}" + (" on a CPU" if rest == "float32" else "")


__all__ = [
    "BIN_FILE",
    "LIBRARY",
    "PRUNES",
    "XML_FILE",
    "Target",
    "available",
    "cpu_weight_limit",
    "insert_int8",
    "written_weight",
]
