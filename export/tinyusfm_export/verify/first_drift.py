"""The first tensor of an artefact that drifts, found in its own engine.

What it drifts from is the float32 graph in PyTorch. A tensor drifts where the distance of the two, as a share of the
float tensor's length, is above a limit. The artefact's own file is first given every tensor as an output, which says
where to look but stops the engine from fusing operators. Each suspect is then looked at alone, in the order of
computing, so that all other fusions stay as they are; the first one that still drifts is the answer. A plain bisection
would miss an error that residual additions dilute.

It reads ONNX, OpenVINO and LiteRT files; other engines have no names inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.targets.litert.writer import CODE_SCALE
from tinyusfm_export.verify.engine_run import open_engine
from tinyusfm_export.verify.tflite_inside import InsideRunner, tensor_numbers
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.early_exit import is_chain
from tinyusfm_runtime.engines.litert import MODEL_FILE
from tinyusfm_runtime.engines.ov import import_openvino
from tinyusfm_runtime.errors import MissingExtra, UnsupportedError
from tinyusfm_runtime.spec import LOGITS_NAME, ModelSpec

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph

DRIFT_LIMIT = 0.1
"""Share from which a tensor counts as drifting: INT8 of a ViT lies at a few percent (our choice)."""
INSIDE = ("ort", "ov", "litert")
"""Engines that give tensors inside by their names."""
MAX_SUSPECTS = 16
"""Tensors that are looked at alone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """What a bisection found.

    Attributes:
        artefact: its name.
        limit: share from which a tensor drifts.
        shares: (tensor, share) of all tensors that both sides have, in the order of computing, all outputs at once.
        alone: (tensor, share) of the suspects, each looked at alone.
        first: the first that drifts, or empty.
        share: of that tensor, or the largest of all where none drifts.
    """

    artefact: str
    limit: float
    shares: tuple[tuple[str, float], ...]
    alone: tuple[tuple[str, float], ...]
    first: str
    share: float

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)

    @property
    def sentence(self) -> str:
        """What was found, one line."""
        if not self.first:
            rest = f"the largest distance of {len(self.shares)} is {self.share:.1%}"
            return f"{self.artefact}: no tensor drifts by more than {self.limit:.0%}; {rest}"
        return f"{self.artefact}: {self.first} is the first tensor that drifts, by {self.share:.1%}"


def float_tensors(graph: ExportGraph, tensor_NCHW: np.ndarray) -> dict[str, np.ndarray]:
    """Every float tensor of the graph on one input, in the order of computing.

    Args:
        graph: the export graph.
        tensor_NCHW: uint8 input.
    """
    import torch
    from torch import fx

    found: dict[str, np.ndarray] = {}

    class Watcher(fx.Interpreter):
        """Keeps what every node gives."""

        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            label = str(n.meta.get("label", ""))
            if label and isinstance(value, torch.Tensor) and value.dtype is torch.float32 and value.numel() > 1:
                found[label] = value.detach().numpy().copy()
            return value

    with repeatable_inference():
        Watcher(graph.module).run(torch.from_numpy(np.ascontiguousarray(tensor_NCHW)))
    return found


def find_first_drift(
    bundle: Bundle,
    artefact: Artefact,
    graph: ExportGraph,
    inputs: Sequence[np.ndarray],
    *,
    limit: float = DRIFT_LIMIT,
    threads: int = 1,
) -> Drift:
    """Looks for the first tensor that drifts.

    Args:
        bundle: holds it.
        artefact: of engine ``ort``, ``ov`` or ``litert``, without early exits.
        graph: the float graph of the same student.
        inputs: uint8 NCHW inputs, one or more; a tensor's share is the largest over them.
        limit: share from which a tensor drifts.
        threads: inside the engine.

    Raises:
        UnsupportedError: an engine whose files have no names, or a chain of early exits.
        MissingExtra: onnx, openvino or LiteRT is not installed.
        EngineError: the engine refused the file with one more output.
    """
    files = bundle.artefact_files(artefact)
    if artefact.engine not in INSIDE or is_chain(files):
        why = "the engine of a chain of early exits runs several files" if is_chain(files) else "its engine names none"
        raise UnsupportedError(f"tensors inside {artefact.name} cannot be looked at: {why}")
    right = [float_tensors(graph, tensor) for tensor in inputs]
    inside = _names(artefact.engine, files)
    names = [name for name in right[0] if name in inside or name == LOGITS_NAME]
    together = _shares(artefact, files, graph.spec, names, inputs, right, threads)
    alone: dict[str, float] = {}
    first = ""
    for name in [name for name in names if together[name] > limit][:MAX_SUSPECTS]:
        alone |= _shares(artefact, files, graph.spec, [name], inputs, right, threads)
        if alone[name] > limit:
            first = name
            break
    worst = max(together, key=lambda name: together[name], default="")
    return Drift(
        artefact=artefact.name,
        limit=limit,
        shares=tuple(together.items()),
        alone=tuple(alone.items()),
        first=first,
        share=alone[first] if first else together.get(worst, 0.0),
    )


def _shares(
    artefact: Artefact,
    files: Mapping[str, bytes],
    spec: ModelSpec,
    names: Sequence[str],
    inputs: Sequence[np.ndarray],
    right: Sequence[Mapping[str, np.ndarray]],
    threads: int,
) -> dict[str, float]:
    """Distance of every named tensor, the largest over the inputs."""
    found = dict.fromkeys(names, 0.0)
    # a LiteRT file computes on shares of the largest code until the patches are embedded
    scales = (1.0, CODE_SCALE) if artefact.engine == "litert" else (1.0,)
    with _opened(artefact, files, spec, names, threads) as engine:
        for tensor, tensors in zip(inputs, right, strict=True):
            outputs = engine.run(np.ascontiguousarray(tensor))
            for name in names:
                ours = tensors[name].astype(np.float64)
                theirs = channels_first(outputs[name], ours.shape).astype(np.float64)
                if theirs.size != ours.size:
                    raise UnsupportedError(f"{artefact.name}: tensor {name} has another size in the engine")
                theirs, ours = theirs.ravel(), ours.ravel()
                size = max(float(np.linalg.norm(ours)), 1e-12)
                gap = min(float(np.linalg.norm(scale * theirs - ours)) / size for scale in scales)
                found[name] = max(found[name], gap)
    return found


def _opened(artefact: Artefact, files: Mapping[str, bytes], spec: ModelSpec, names: Sequence[str], threads: int) -> Any:
    """What runs the files and gives these tensors as well, a context manager."""
    if artefact.engine == "litert":
        return InsideRunner(files[MODEL_FILE], names, threads=threads)
    more = [name for name in names if name != LOGITS_NAME]
    opened = _with_outputs(artefact.engine, files, more) if more else files
    return open_engine(artefact.engine, opened, spec, threads=threads, rest_precision=artefact.rest_precision)


def channels_first(theirs: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A map with channels last, turned to channels first.

    Any other tensor as it is.

    Args:
        theirs: of an engine.
        shape: of the same tensor in the graph.
    """
    if theirs.ndim == 4 and theirs.shape != shape and theirs.shape == (shape[0], *shape[2:], shape[1]):
        return np.moveaxis(theirs, -1, 1)
    return theirs


def _names(engine: str, files: Mapping[str, bytes]) -> set[str]:
    """Names of the float tensors inside an artefact's files."""
    if engine == "ort":
        graph = _onnx_model(files).graph
        return {output for node in graph.node for output in node.output}
    if engine == "litert":
        return set(tensor_numbers(files[MODEL_FILE]))
    return {name for name, _ in _ov_ports(_ov_model(files))}


def _ov_ports(model: Any) -> list[tuple[str, Any]]:
    """(name, port) of the float tensors inside; constants are none."""
    return [
        (name, node.output(0))
        for node in model.get_ordered_ops()
        if node.get_output_size() == 1 and node.get_type_name() not in ("Constant", "Result", "Parameter")
        if node.get_output_element_type(0).get_type_name() == "f32"
        for name in sorted({node.get_friendly_name(), *node.output(0).get_names()})
    ]


def _with_outputs(engine: str, files: Mapping[str, bytes], names: Sequence[str]) -> dict[str, bytes]:
    """The files with more outputs of these names."""
    if engine == "ort":
        import onnx

        model = _onnx_model(files)
        shaped = onnx.shape_inference.infer_shapes(model)
        known = {value.name: value for value in shaped.graph.value_info}
        there = {value.name for value in model.graph.output}
        for name in names:
            if name not in there:
                model.graph.output.append(known.get(name) or onnx.helper.make_empty_tensor_value_info(name))
        return {**files, "model.onnx": bytes(model.SerializeToString())}
    model = _ov_model(files)
    there = {name for port in model.outputs for name in port.get_names()}
    ports = {name: port for name, port in _ov_ports(model) if name in set(names) - there}
    for name, port in ports.items():
        port.get_tensor().set_names({name})
        model.add_outputs([port])
    with TemporaryDirectory() as folder:
        paths = Path(folder) / "model.xml", Path(folder) / "model.bin"
        import_openvino().serialize(model, str(paths[0]), str(paths[1]))
        return {path.name: path.read_bytes() for path in paths}


def _onnx_model(files: Mapping[str, bytes]) -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtra("looking inside an onnx artefact", "onnx", "export") from error
    return onnx.load_from_string(files["model.onnx"])


def _ov_model(files: Mapping[str, bytes]) -> Any:
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise MissingExtra("looking inside an openvino artefact", "openvino", "openvino") from error
    return openvino.Core().read_model(model=files["model.xml"], weights=files["model.bin"])


__all__ = [
    "DRIFT_LIMIT",
    "INSIDE",
    "MAX_SUSPECTS",
    "Drift",
    "channels_first",
    "find_first_drift",
    "float_tensors",
]
