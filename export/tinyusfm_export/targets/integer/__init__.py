"""Target ``integer``: the whole network in integers.

For the engine of the same name, the same bytes on every CPU.

The export graph becomes a list of operations with 8-bit weights, multipliers, shifts and tables (docs/reference/
integer.md). Where a decision keeps a linear float, the LayerNorm in front of it keeps 16 bits instead: there is no
float. That no accumulator leaves 32 bits is proven here from the weights, by the checks that the engine makes again.

It does not run what it writes; the gate does that in the engine of the same name.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from tinyusfm_export.graph.build import AUXILIARY_PREFIX, ExportGraph, exit_logits
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.ptq import rounded_weight
from tinyusfm_export.targets import BuiltArtefact, Requirements
from tinyusfm_export.targets.integer.context import Context, weight_limit
from tinyusfm_export.targets.integer.decoder import write_decoder, write_laterals
from tinyusfm_export.targets.integer.scales import Step
from tinyusfm_export.targets.integer.tokens import (
    block_indices,
    write_block,
    write_features,
    write_head,
    write_input,
    write_mean,
    write_pooled_block,
)
from tinyusfm_export.targets.integer.writer import ModelWriter
from tinyusfm_runtime.early_exit import TOKENS_OUT
from tinyusfm_runtime.engines.integer import DESCRIPTION_FILE, LIBRARY_VERSION, MODEL_FILE
from tinyusfm_runtime.engines.integer.layout import F32, I32, MODEL_VERSION
from tinyusfm_runtime.engines.integer.model_file import read_model
from tinyusfm_runtime.errors import EngineError, OutputError, UnsupportedError
from tinyusfm_runtime.plugins import Availability

LIBRARY = "tinyusfm-edge"
"""Distribution that holds the engine: this one."""
PRUNES = True
"""It writes graphs that were pruned to a sector."""
_OUT = re.compile(r"blocks\.(\d+)\.out")


def available() -> Availability:
    """Tells whether integer artefacts can be written here; never raises."""
    return Availability(usable=True, reason=f"integer model version {MODEL_VERSION}, needs no library", extra="export")


def written_weight(weight: np.ndarray, decision: QuantDecision) -> np.ndarray:
    """What a weight is after rounding (see bias_correction.py)."""
    return rounded_weight(weight, weight_limit(decision))


class Target:
    """Writes ``model.safetensors`` and ``model.json``."""

    name = "integer"
    suffix = ".safetensors"
    precisions = ("int8",)

    def build(self, graph: ExportGraph, decision: QuantDecision, out: Path) -> BuiltArtefact:
        """Writes the artefact (see targets.Target).

        Raises:
            CalibrationError: the ranges do not know what an integer artefact has to know.
        """
        if decision.precision != "int8":
            raise UnsupportedError(f"target integer computes in int8, not in {decision.precision}: export with int8")
        context = _written(graph, decision)
        writer = context.writer
        try:
            read_model(writer.all_tensors())
        except EngineError as error:
            raise UnsupportedError(f"the model cannot be computed in 32-bit integers: {error}") from error
        files = {
            MODEL_FILE: writer.file(),
            DESCRIPTION_FILE: writer.description(
                model=graph.spec.name, weights_sha256=graph.spec.weights_sha256, **_described_sector(graph)
            ),
        }
        try:
            for name, content in files.items():
                (out / name).write_bytes(content)
        except OSError as error:
            for name in files:
                (out / name).unlink(missing_ok=True)
            raise OutputError(f"cannot write {out}: {error.strerror or error}") from error
        width = 16 - (context.range_bits - context.residual_bits)
        return BuiltArtefact(
            files=tuple(out / name for name in files),
            form=f"integers alone, 8-bit weights and activations, {width}-bit residual; bit-identical on every CPU",
            rest_precision="f32",
            requirements=Requirements(cpu_features=(), library=LIBRARY, library_version=LIBRARY_VERSION),
        )


def _described_sector(graph: ExportGraph) -> dict[str, object]:
    """What ``model.json`` says of a pruned graph; nothing of another."""
    sector = graph.spec.sector
    if not graph.sector or sector is None:
        return {}
    return {"sector": {"name": sector.name, "kept_patches": len(sector.indices), "patches": sum(map(len, sector.kept))}}


def write_model(graph: ExportGraph, decision: QuantDecision) -> ModelWriter:
    """Translates a graph.

    Args:
        graph: the export graph, or a stage of a chain.
        decision: of this graph, with spans.

    Raises:
        CalibrationError: no spans, or those of another graph.
        UnsupportedError: the graph holds what the engine has no operation for, or a layer is too coarse for integers.
    """
    return _written(graph, decision).writer


def _written(graph: ExportGraph, decision: QuantDecision) -> Context:
    """The model with a residual as fine as its range allows.

    Coarser where a layer that adds to it has coarser sums, which is known once all are written: then it is written
    again.
    """
    draft = _draft(graph, decision, most_bits=30)
    if (bits := draft.bits_that_fill) == draft.residual_bits:
        return draft
    return _draft(graph, decision, most_bits=bits)


def _draft(graph: ExportGraph, decision: QuantDecision, *, most_bits: int) -> Context:
    c = Context(graph=graph, decision=decision, writer=ModelWriter(), most_bits=most_bits)
    write_input(c)
    pooled = next((i for i in block_indices(c.labels) if f"blocks.{i}.mlp.mean" in c.labels), None)
    for index in block_indices(c.labels):
        if index == pooled:
            _write_pooled(c, index)
            continue
        write_block(c, index)
        _write_readers(c, index)
    if "head.lateral.0" in c.labels:
        write_decoder(c)
    elif "norm" in c.labels:
        write_features(c)
    _write_outputs(c)
    return c


def _write_readers(c: Context, index: int) -> None:
    """What reads the tokens behind a block.

    Laterals, early exits, auxiliary outputs, the next stage.
    """
    if "head.lateral.0" in c.labels:
        write_laterals(c, index)
    unit = 2.0**-c.residual_bits
    if f"exits.{index + 1}.mean" in c.labels:
        path, start = f"exits.{index + 1}", 1
        token = write_mean(c, f"{path}.mean", c.residual, Step(scale=unit, wide=True), unit, row=start)
        buffer, step = write_head(c, norm=f"{path}.norm", linear=f"{path}.head", source=token)
        c.answers[exit_logits(index + 1)] = (buffer, step, False)
        c.answers[f"{path}.head"] = (buffer, step, False)
    name = f"{AUXILIARY_PREFIX}{index}"
    if name in c.graph.outputs:
        rows = c.all_rows - 1
        target = c.writer.buffer(name, I32, 1, c.width)
        c.writer.add("sum", c.residual, target, label=name, row=1, rows=rows)
        c.answers[name] = (target, unit / rows, False)
    if TOKENS_OUT in c.graph.outputs and c.labels[f"blocks.{index}.out"].meta["path"] == TOKENS_OUT:
        c.answers[TOKENS_OUT] = (c.residual, unit, False)


def _write_pooled(c: Context, index: int) -> None:
    """A classifier's last block and head: the mean is taken before the second linear."""
    pooled = write_pooled_block(c, index)
    name = f"{AUXILIARY_PREFIX}{index}"
    if name in c.graph.outputs:
        c.answers[name] = (pooled, 2.0**-c.residual_bits, False)
    buffer, step = write_head(c, norm="fc_norm", linear="logits", source=pooled)
    c.answers["logits"] = (buffer, step, False)


def _write_outputs(c: Context) -> None:
    output = next(node for node in c.module.graph.nodes if node.op == "output")
    for name, node in zip(c.graph.outputs, output.args[0], strict=True):
        found = c.answers.get(name) if name != "logits" else c.answers.get(node.meta["label"], c.answers.get(name))
        if found is None:
            raise UnsupportedError(f"the integer engine has nothing that computes output {name!r}")
        buffer, step, transposed = found
        port = c.writer.port(name, F32, tuple(node.meta["shape"]))
        scale = int(np.array([step], np.float32).view(np.int32)[0])
        c.writer.add(
            "output",
            buffer,
            buffer,
            label=name,
            scales={"step": step},
            port=port,
            scale=scale,
            transposed=int(transposed),
        )


__all__ = ["LIBRARY", "PRUNES", "Target", "available", "write_model", "written_weight"]
