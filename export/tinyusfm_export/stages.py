"""An early-exit student's graph cut into the stages of a chain, and a chain's files built by any target that can.

The whole net is one export graph with the logits of every exit among its outputs, so ranges, quantization decision and
preparation are made once for all of it. Here it is cut behind each exit's block into graphs that share its weights: the
picture or ``tokens_in`` goes in, ``logits`` and, but for the last, ``tokens_out`` come out. Every stage is then written
by the target as a graph like any other. It does not know engines or when to stop (tinyusfm_runtime/chain.py does).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_export.decision import QuantDecision, float_decision
from tinyusfm_export.graph import ExportGraph, logit_names
from tinyusfm_export.net import shape_of
from tinyusfm_export.target import BuiltArtefact, Target
from tinyusfm_runtime import plugins
from tinyusfm_runtime.chain import TOKENS_IN, TOKENS_OUT, stage_file
from tinyusfm_runtime.engine import LOGITS_NAME
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.spec import TensorSpec

if TYPE_CHECKING:
    from torch.fx import Node


def writes_chains(target: str) -> bool:
    """Whether the engine of a target runs the stages of a chain.

    Args:
        target: name or alias.
    """
    return bool(getattr(plugins.load("engines", plugins.canonical("targets", target)), "CHAINS", False))


def split_graph(graph: ExportGraph) -> list[ExportGraph]:
    """Cuts the graph of an early-exit student into its stages.

    Args:
        graph: the whole net; its spec names the exits.

    Returns:
        One graph a stage, sharing the weights; auxiliary outputs stay in the first.

    Raises:
        InputError: the student has no exits.
    """
    policy = graph.spec.exits
    if policy is None:
        raise InputError("the student has no early exits, so there is nothing to cut")
    module: Any = graph.module
    labels = {node.meta["label"]: node for node in module.graph.nodes if "label" in node.meta}
    answers = dict(zip(graph.outputs, _results(module), strict=True))
    auxiliary = {name: node for name, node in answers.items() if name not in logit_names(policy)}
    cuts = [labels[f"blocks.{block - 1}.out"] for block in policy.blocks]
    stages, before = [], None
    for index, name in enumerate(logit_names(policy)):
        outputs = {LOGITS_NAME: answers[name]}
        if index < len(cuts):
            outputs[TOKENS_OUT] = cuts[index]
        stages.append(_stage(graph, before, {**outputs, **(auxiliary if index == 0 else {})}))
        before = cuts[index] if index < len(cuts) else None
    return stages


def build_chain(target: Target, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
    """Writes every stage and gives its files the names of a chain's.

    Args:
        target: writes one graph.
        graph: the whole net of an early-exit student.
        decision: the one of the whole net.
        out: an existing folder.

    Raises:
        UnsupportedError, MissingExtra, OutputError: as the target.
    """
    files: list[Path] = []
    built: BuiltArtefact | None = None
    for number, stage in enumerate(split_graph(graph), start=1):
        folder, mine = out / f"stage{number}", stage_decision(stage, decision)
        try:
            folder.mkdir()
            made = target.build(stage, mine, folder)
            files += [path.rename(out / stage_file(number, path.name)) for path in made.files]
        except OSError as error:
            raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
        built = made if built is None or mine.precision == decision.precision else built
    assert built is not None
    return replace(built, files=tuple(files), form=f"{built.form}; chain of {number} graphs")


def stage_decision(stage: ExportGraph, decision: QuantDecision) -> QuantDecision:
    """The part of a decision that concerns a stage; a float one where none of its layers is int8.

    Args:
        stage: one graph of the chain.
        decision: of the whole net.
    """
    mine = {name: quant for name, quant in decision.tensors.items() if name in stage.linear_inputs}
    if decision.precision == "int8" and all(quant.mode == "float" for quant in mine.values()):
        return float_decision("fp32")
    return replace(decision, tensors=mine)


def stage_products(graph: ExportGraph) -> list[int]:
    """Multiply-accumulates of each stage: linears and the two products of attention.

    Args:
        graph: the whole net of an early-exit student.
    """
    return [_products(stage) for stage in split_graph(graph)]


def _products(stage: ExportGraph) -> int:
    module: Any = stage.module
    total = 0
    for node in module.graph.nodes:
        layer = type(module.get_submodule(str(node.target))).__name__ if node.op == "call_module" else ""
        if layer == "Linear" or (node.op == "call_function" and getattr(node.target, "__name__", "") == "matmul"):
            total += math.prod(shape_of(node)) * shape_of(node.args[0])[-1]
    return total


def _results(module: Any) -> list[Node]:
    return list(next(node for node in module.graph.nodes if node.op == "output").args[0])


def _stage(graph: ExportGraph, cut: Node | None, outputs: dict[str, Node]) -> ExportGraph:
    """The part of a graph between a cut (None: the picture) and some outputs."""
    from torch import fx

    whole: Any = graph.module
    needed = _behind(cut, outputs.values())
    part, copied = fx.Graph(), {}
    takes: TensorSpec | None = None
    if cut is not None:
        takes = TensorSpec(name=TOKENS_IN, dtype="float32", axes="BND", shape=shape_of(cut))
        copied[cut] = part.placeholder(TOKENS_IN)
        copied[cut].meta = {"label": TOKENS_IN, "path": TOKENS_IN, "shape": shape_of(cut)}
    for node in whole.graph.nodes:
        if node in needed and node is not cut:
            copied[node] = part.node_copy(node, lambda old: copied[old])
    for name, node in outputs.items():
        copied[node].meta["path"] = name
    part.output(tuple(copied[node] for node in outputs.values()))
    part.lint()
    module = fx.GraphModule(whole, part, "ExportGraph").eval().requires_grad_(False)
    reads = {str(node.target) for node in part.nodes if node.op == "call_module"}
    mine = {name: path for name, path in graph.linear_inputs.items() if path in reads}
    return ExportGraph(module=module, spec=graph.spec, outputs=tuple(outputs), linear_inputs=mine, takes=takes)


def _behind(cut: Node | None, ends: Iterable[Node]) -> set[Node]:
    """Everything that the ends are computed from, up to the cut."""
    found: set[Node] = set()
    waiting = list(ends)
    while waiting:
        node = waiting.pop()
        if node in found:
            continue
        found.add(node)
        if node is not cut:
            waiting += node.all_input_nodes
    return found


__all__ = ["build_chain", "split_graph", "stage_decision", "stage_products", "writes_chains"]
