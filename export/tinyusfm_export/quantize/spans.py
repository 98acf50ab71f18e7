"""Spans: smallest and largest value of every integer tensor.

Every tensor of an integer-only artefact, beside the ranges of decisions.

Stock engines compute in float between the quantized layers, so a decision has ranges for the inputs of linears alone.
The integer engine also needs to know how far queries, keys and values of each head reach, the residual, a linear's
output in front of a GELU, and the decoder's maps. They are observed in the same run on the same frames and kept among
the ranges, as ``blocks.0.mid.span`` or, head by head, ``blocks.0.attn.q.3.span``; always min-max, whatever the
method of the ranges. It does not know what is made of them.

Shapes: values have those of the graph's nodes; a span is float32 (3,): smallest, largest, and one number above zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from tinyusfm_calibration.ranges import SPAN
from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.graph.net import shape_of

if TYPE_CHECKING:
    from torch.fx import Node

    from tinyusfm_export.graph.build import ExportGraph

_HEADS = (".attn.q", ".attn.k", ".attn.v")
_MODULES = ("Linear", "Conv2d", "LayerNorm")
_FUNCTIONS = ("add", "cat", "mean")


def calibration_taps(graph: ExportGraph) -> Callable[[np.ndarray], Mapping[str, np.ndarray]]:
    """The rewritten network as a callable that calibration can observe.

    Args:
        graph: the export graph.

    Returns:
        uint8 NCHW input -> float32 values of every tensor in ``graph.linear_inputs``, and three numbers for every span:
        its smallest value, its largest, and one just above zero.
    """
    import torch
    from torch import fx

    module: Any = graph.module
    readers = {path: name for name, path in graph.linear_inputs.items()}

    class Watcher(fx.Interpreter):
        """Keeps what is asked for while the graph runs."""

        def run_node(self, n: Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_module" and (name := readers.get(str(n.target))) is not None:
                # what the layer reads, before it runs: the tensor that a decision names
                given = self.env[n.args[0]].numpy()  # type: ignore[index]
                found[name] = given
                found[f"{name}{SPAN}"] = _extent(given)
            if _is_watched(module, n):
                found.update(_spans(n.meta["label"], value.numpy()))
            return value

    found: dict[str, np.ndarray] = {}

    def run(tensor_NCHW: np.ndarray) -> Mapping[str, np.ndarray]:
        found.clear()
        with repeatable_inference():
            Watcher(module).run(torch.from_numpy(np.ascontiguousarray(tensor_NCHW)))
        return dict(found)

    return run


def _is_watched(module: Any, node: Node) -> bool:
    label = str(node.meta.get("label", ""))
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__ in _MODULES
    if node.op != "call_function":
        return False
    called = getattr(node.target, "__name__", "")
    return called in _FUNCTIONS or (called == "permute" and label.endswith(_HEADS) and len(shape_of(node)) == 4)


def _spans(label: str, value: np.ndarray) -> dict[str, np.ndarray]:
    if label.endswith(_HEADS):
        # queries, keys and values have a step per head: (1, A, tokens, d) -> one span per head
        return {f"{label}.{head}{SPAN}": _extent(part) for head, part in enumerate(value[0])}
    return {f"{label}{SPAN}": _extent(value)}


def _extent(value: np.ndarray) -> np.ndarray:
    return np.array([value.min(), value.max(), np.finfo(np.float32).tiny * 2**20], np.float32)


__all__ = ["calibration_taps"]
