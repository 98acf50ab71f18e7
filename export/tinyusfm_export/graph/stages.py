"""An early-exit student's graph cut into the stages of a chain.

A chain's files can be built by any target that can write its stages.

The whole network is one export graph with the logits of every exit among its outputs, so ranges, quantization decision
and preparation are made once for all of it. Here it is cut behind each exit's block into graphs that share its
weights: the image or ``tokens_in`` goes in, ``logits`` and, but for the last, ``tokens_out`` come out. Every stage is
then written by the target as a graph like any other. It does not know engines or when to stop
(tinyusfm_runtime/chain.py does).

Shapes: ``tokens_in`` and ``tokens_out`` are (1, 1 + patches, D), class token first, float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from tinyusfm_export.graph.build import ExportGraph, logit_names
from tinyusfm_export.graph.net import shape_of
from tinyusfm_runtime.early_exit import TOKENS_IN, TOKENS_OUT
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import LOGITS_NAME, TensorSpec

if TYPE_CHECKING:
    from torch.fx import Node


def split_graph(graph: ExportGraph) -> list[ExportGraph]:
    """Cuts the graph of an early-exit student into its stages.

    Args:
        graph: the whole network; its spec names the exits.

    Returns:
        One graph a stage, sharing the weights; auxiliary outputs stay in the first.

    Raises:
        InputError: the student has no exits.
    """
    policy = graph.spec.exits
    if policy is None:
        raise InputError("the student has no early exits, so there is nothing to cut")
    module: Any = graph.module
    # by label, since an output's path is its public name
    labels = {node.meta["label"]: node for node in module.graph.nodes if "label" in node.meta}
    answers = dict(zip(graph.outputs, _results(module), strict=True))
    auxiliary = {name: node for name, node in answers.items() if name not in logit_names(policy)}
    # residual sum behind the exit's block, (1, 1 + patches, D); exits count blocks from 1
    cuts = [labels[f"blocks.{block - 1}.out"] for block in policy.blocks]
    stages, before = [], None
    for index, name in enumerate(logit_names(policy)):
        # every stage calls its own answer ``logits``, whatever the whole graph calls it
        outputs = {LOGITS_NAME: answers[name]}
        if index < len(cuts):
            outputs[TOKENS_OUT] = cuts[index]
        stages.append(_stage(graph, before, {**outputs, **(auxiliary if index == 0 else {})}))
        before = cuts[index] if index < len(cuts) else None
    return stages


def stage_products(graph: ExportGraph) -> list[int]:
    """Multiply-accumulates of each stage: linears and the two products of attention.

    Args:
        graph: the whole network of an early-exit student.
    """
    return [_products(stage) for stage in split_graph(graph)]


def _products(stage: ExportGraph) -> int:
    module: Any = stage.module
    total = 0
    for node in module.graph.nodes:
        layer = type(module.get_submodule(str(node.target))).__name__ if node.op == "call_module" else ""
        if layer == "Linear" or (node.op == "call_function" and getattr(node.target, "__name__", "") == "matmul"):
            # numbers that come out times the length of the sum behind each
            total += math.prod(shape_of(node)) * shape_of(node.args[0])[-1]
    return total


def _results(module: Any) -> list[Node]:
    return list(next(node for node in module.graph.nodes if node.op == "output").args[0])


def _stage(graph: ExportGraph, cut: Node | None, outputs: dict[str, Node]) -> ExportGraph:
    """The part of a graph between a cut (None: the image) and some outputs."""
    from torch import fx

    whole: Any = graph.module
    needed = _behind(cut, outputs.values())
    part, copied = fx.Graph(), {}
    takes: TensorSpec | None = None
    if cut is not None:
        takes = TensorSpec(name=TOKENS_IN, dtype="float32", axes="BND", shape=shape_of(cut))
        copied[cut] = part.placeholder(TOKENS_IN)
        copied[cut].meta = {"label": TOKENS_IN, "path": TOKENS_IN, "shape": shape_of(cut)}
    # nodes are copied, weights are not: ``fx.GraphModule(whole, ...)`` below takes them by name
    for node in whole.graph.nodes:
        if node in needed and node is not cut:
            copied[node] = part.node_copy(node, lambda old: copied[old])
    for name, node in outputs.items():
        copied[node].meta["path"] = name
    part.output(tuple(copied[node] for node in outputs.values()))
    part.lint()
    module = fx.GraphModule(whole, part, "ExportGraph").eval().requires_grad_(False)
    reads = {str(node.target) for node in part.nodes if node.op == "call_module"}
    # layers of this stage alone, so that a decision is cut the same way
    mine = {name: path for name, path in graph.linear_inputs.items() if path in reads}
    return ExportGraph(
        module=module, spec=graph.spec, outputs=tuple(outputs), linear_inputs=mine, sector=graph.sector, takes=takes
    )


def _behind(cut: Node | None, ends: Iterable[Node]) -> set[Node]:
    """Everything that the ends are computed from, up to the cut."""
    found: set[Node] = set()
    # backwards from the outputs; the cut itself is taken, what is before it is not
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node is not cut:
            waiting += node.all_input_nodes
    return found


__all__ = ["split_graph", "stage_products"]
