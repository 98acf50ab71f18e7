"""The fewest layers of a shipped student that keep more than 8 bits in INT8.

``python -m tinyusfm_edge.release.wide --name NAME --data DIR`` adds, one after another, the layer that helps the worst
validation frame most, until that frame's Dice against float32 is ``WANTED``, writes them as ``wide.json`` and says so
in the card. No such file where none is needed. The integer artefact itself is measured, in its engine. The test split
is not read.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from tinyusfm_edge import students
from tinyusfm_edge.data.table import read_table
from tinyusfm_edge.models.checkpoint import LoadedStudent
from tinyusfm_edge.release.package import add_wide
from tinyusfm_export.graph.build import ExportGraph, build_graph
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.targets.integer import Target
from tinyusfm_export.verify.parity import label_dice, read_output
from tinyusfm_export.verify.reference import reference_outputs
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.integer import Engine
from tinyusfm_runtime.errors import EdgeError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.spec import Task

WANTED = 0.96
"""Dice of the worst validation frame: the gate wants 0.95."""
MOST_OWN = 4
"""Layers that a shipped student may keep above 8 bits."""
JUDGED = 6
"""Worst frames that a layer is tried on; the choice is then measured on all."""
Dices = Callable[[tuple[str, ...], Sequence[int]], np.ndarray]
"""Layers kept above 8 bits, numbers of frames -> Dice of each."""


def choose_layers(layers: Sequence[str], dices: Dices, count: int) -> tuple[tuple[str, ...], list[float]]:
    """Adds layers until the worst frame is good enough.

    Args:
        layers: that may be kept above 8 bits.
        dices: measures the artefact.
        count: frames there are.

    Returns:
        The layers in order, and the worst frame's Dice with none, one, two, ... of them.

    Raises:
        InputError: ``MOST_OWN`` layers do not suffice.
    """
    kept: tuple[str, ...] = ()
    everything = range(count)
    found = dices(kept, everything)
    worst = [float(found.min())]
    judged = [int(index) for index in np.argsort(wide(found), kind="stable")[:JUDGED]]
    while worst[-1] < WANTED:
        if len(kept) == min(MOST_OWN, len(layers)):
            raise InputError(
                f"{len(kept)} layers above 8 bits leave the worst frame at {worst[-1]:.3f}: train with qat"
            )
        tried = {name: dices((*kept, name), judged) for name in layers if name not in kept}
        kept = (*kept, max(tried, key=lambda name: (float(tried[name].min()), float(tried[name].mean()), name)))
        worst.append(float(dices(kept, everything).min()))
    return kept, worst


def measure(name: str, data: Path) -> dict[str, object] | None:
    """Chooses the layers of a student on its validation frames.

    Args:
        name: of a shipped segmenter with ranges.
        data: folder with ``split.csv``.

    Returns:
        Content of ``wide.json``, or None where no layer is needed.

    Raises:
        InputError: not a segmenter, no validation frames, or too many layers needed.
    """
    student = students.load(name)
    if student.spec.task is not Task.SEGMENT:
        raise InputError(f"{name} is no segmenter: its layers are not chosen by masks")
    frames = [sample.frame for sample in read_table(data, "val", need="mask")]
    graph = build_graph(student.module.eval(), student.spec)
    kept, worst = choose_layers(_layers(graph), _measured(student, graph, frames), len(frames))
    if not kept:
        return None
    return {
        "version": students.WIDE_VERSION,
        "weights_sha256": student.weights_sha256,
        "layers": list(kept),
        "frames": len(frames),
        "worst_dice": [round(value, 4) for value in worst],
    }


def _layers(graph: ExportGraph) -> list[str]:
    """Linears behind LayerNorms and GELUs: what reads codes in 8 bits."""
    ends = (".attn.qkv", ".mlp.fc1", ".mlp.fc2")
    return sorted({layer for layer in graph.linear_inputs.values() if layer.endswith(ends)})


def _measured(student: LoadedStudent, graph: ExportGraph, frames: Sequence[Frame]) -> Dices:
    spec = student.spec
    wanted = [output.mask_HW for output in reference_outputs(student.module, spec, frames)]
    inputs = [preprocess(frame, spec.preprocess) for frame in frames]

    def dices(kept: tuple[str, ...], chosen: Sequence[int]) -> np.ndarray:
        decision = decide(graph, "int8", student.ranges, policy=PtqPolicy(rest_precision="f32", keep_float=kept))
        with TemporaryDirectory() as folder:
            built = Target().build(graph, decision, Path(folder))
            files = {path.name: path.read_bytes() for path in built.files}
        engine = Engine()
        engine.load(files, spec, EngineConfig(threads=1, rest_precision="f32"))
        found = []
        for index in chosen:
            codes, placement = inputs[index]
            output = read_output(engine.run(codes), spec, placement, tensor=codes, frame=frames[index], run=engine.run)
            mask, right = output.mask_HW, wanted[index]
            assert mask is not None and right is not None
            found.append(label_dice(mask, right))
        engine.close()
        return np.array(found)

    return dices


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="layers of a shipped student that keep more than 8 bits")
    parser.add_argument("--name", default="fetal-head")
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv; its val split is used")
    options = parser.parse_args(argv)
    try:
        found = measure(options.name, options.data)
        place = students.folder(options.name)
        add_wide(place, found)
        if found is None:
            print("no layer needs more than 8 bits")
            return 0
        print(f"{place / students.WIDE}: {', '.join(map(str, found['layers']))}; worst frame {found['worst_dice']}")  # type: ignore[call-overload]
    except (EdgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if isinstance(error, EdgeError) else 3
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

__all__ = ["JUDGED", "MOST_OWN", "WANTED", "Dices", "choose_layers", "measure"]
