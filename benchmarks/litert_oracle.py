"""Our LiteRT files against those of Google's own converter, on the same frames.

    make litert-oracle ARGS="--data hc18/"

``litert-torch`` converts the PyTorch student, and ``ai-edge-quantizer`` makes it dynamic INT8, in an environment of
their own (1.2 GB): they pin versions that the toolkit does not, and are no dependency of it. Both files and ours then
answer the same frames in LiteRT. It fails where our float32 file differs from theirs by more than ``TOLERANCE`` of the
logits' size, or where our INT8 is further from PyTorch than theirs by more than ``MARGIN`` of mean Dice; the control,
our file of a student with one layer's weights negated, has to fail. ``--keep FOLDER`` keeps their files, for
``benchmarks/against.py --tflite FOLDER/stock-int8.tflite``.

Shapes: inputs NCHW uint8, logits NKHW float32.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

TOOLS = ("litert-torch==0.10.0",)
"""What converts, with all that it brings."""
TOLERANCE = 1e-3
"""Largest difference of float32 logits, as a share of their largest size; two orders of sums differ by 1e-6 to 1e-4."""
MARGIN = 0.001
"""Mean Dice by which our INT8 may be further from PyTorch than the stock one."""
FLOAT_FILE, INT8_FILE = "stock-fp32.tflite", "stock-int8.tflite"


def convert(student: str, folder: Path) -> None:
    """Writes the stock files; runs in the converter's environment.

    Args:
        student: name of a shipped student, or a student file.
        folder: where to.
    """
    import litert_torch
    import torch
    from ai_edge_quantizer import quantizer, recipe

    from tinyusfm_edge.students import load

    loaded = load(student)
    shape = loaded.spec.input.shape
    image = torch.zeros(1, 3, shape[-2], shape[-1])
    litert_torch.convert(loaded.module.eval(), (image,)).export(str(folder / FLOAT_FILE))
    quantized = quantizer.Quantizer(str(folder / FLOAT_FILE))
    quantized.load_quantization_recipe(recipe.dynamic_wi8_afp32())
    quantized.quantize().export_model(str(folder / INT8_FILE))


def converted(student: str, folder: Path, environment: Path) -> None:
    """Installs the converter apart, and runs ``convert`` there.

    Args:
        student: see ``convert``.
        folder: where to.
        environment: virtual environment; made where it is not there yet.
    """
    import torch

    python = environment / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
        plain = torch.__version__.partition("+")[0]
        subprocess.run([python, "-m", "pip", "install", "--quiet", f"torch=={plain}", *TOOLS], check=True)
    root = Path(__file__).resolve().parent.parent
    paths = ":".join(str(root / part) for part in ("", "runtime", "export", "calibration"))
    command = [str(python), str(Path(__file__).resolve()), "--student", student, "--convert", str(folder)]
    subprocess.run(command, check=True, env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"})


def answers(content: bytes, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Logits of a LiteRT file with one thread.

    Args:
        content: of the file.
        inputs: NCHW, of the file's own type.
    """
    from ai_edge_litert.interpreter import Interpreter

    model = Interpreter(model_content=content, num_threads=1)
    model.allocate_tensors()
    taken, given = model.get_input_details()[0]["index"], model.get_output_details()[0]["index"]
    found = []
    for tensor in inputs:
        model.set_tensor(taken, tensor)
        model.invoke()
        found.append(np.array(model.get_tensor(given)))
    return found


def dice(found: np.ndarray, wanted: np.ndarray) -> float:
    """Dice of two masks, 1 where both are empty."""
    a, b = found > 0, wanted > 0
    return 1.0 if not (a.any() or b.any()) else float(2.0 * (a & b).sum() / (a.sum() + b.sum()))


def compare(student: str, data: Path | None, count: int, folder: Path) -> int:
    """Compares and prints; 0 where everything holds.

    Args:
        student: see ``convert``; a segmenter that carries its ranges.
        data: labelled folder whose validation split is taken, or None for phantoms.
        count: frames.
        folder: where the stock files are.
    """
    import torch

    from prepare import FIRST_SEED, frames_of
    from tinyusfm_edge.students import load
    from tinyusfm_export.graph.build import build_graph
    from tinyusfm_export.quantize.decision import float_decision
    from tinyusfm_export.quantize.ptq import decide
    from tinyusfm_export.targets.litert.writer import write_model
    from tinyusfm_export.verify.reference import normalise, reference_mode, run_reference

    loaded = load(student)
    frames = list(frames_of(loaded, data, "val", count, FIRST_SEED))
    images = [normalise(torch.from_numpy(codes).float(), loaded.spec.preprocess).numpy() for codes in frames]
    with reference_mode(loaded.module):
        wanted = [run_reference(loaded.module, loaded.spec, codes) for codes in frames]
    graph = build_graph(loaded.module, loaded.spec)
    broken: Any = copy.deepcopy(graph.module)
    broken.get_submodule("blocks.5.mlp.fc2").weight.data.neg_()
    float32, int8 = float_decision("fp32"), decide(graph, "int8", loaded.ranges)
    stock = answers((folder / FLOAT_FILE).read_bytes(), images)
    found = {
        "stock fp32": stock,
        "ours fp32": answers(write_model(graph, float32), frames),
        "stock int8": answers((folder / INT8_FILE).read_bytes(), images),
        "ours int8": answers(write_model(graph, int8), frames),
        "control": answers(write_model(replace(graph, module=broken), float32), frames),
    }
    size = max(float(np.abs(logits).max()) for logits in stock)
    away, near = {}, {}
    print(
        f"{len(frames)} frames, {'phantoms' if data is None else f'validation split of {data.name}'}, against PyTorch:"
    )
    for name, given in found.items():
        dices = [dice(a, b) for a, b in zip(given, wanted, strict=True)]
        near[name] = float(np.mean(dices))
        away[name] = max(float(np.abs(a - b).max()) for a, b in zip(given, stock, strict=True)) / size
        print(
            f"{name:10}  mean Dice {near[name]:.4f}, worst {min(dices):.4f}, "
            f"{away[name]:.2g} of the logits' size from stock fp32"
        )
    missed = []
    if away["ours fp32"] > TOLERANCE:
        missed.append("our float32 file is not the converter's network")
    if near["ours int8"] < near["stock int8"] - MARGIN:
        missed.append("our INT8 is further from PyTorch than the stock one")
    if away["control"] <= TOLERANCE:
        missed.append("the control, a broken network, was not seen")
    print("\n".join(missed) or "everything held")
    return 1 if missed else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Converts, compares."""
    parser = argparse.ArgumentParser(description="our LiteRT files against litert-torch's")
    parser.add_argument("--student", default="fetal-head")
    parser.add_argument("--data", type=Path, help="labelled folder; its validation split in place of phantoms")
    parser.add_argument("--frames", type=int, default=60)
    parser.add_argument("--environment", type=Path, default=Path("build/litert-oracle"), help="of the converter")
    parser.add_argument("--keep", type=Path, help="folder for the stock files")
    parser.add_argument("--convert", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.convert is not None:
        convert(options.student, options.convert)
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (FLOAT_FILE, INT8_FILE):
            (folder / name).unlink(missing_ok=True)  # the quantizer leaves a file that is there as it is
        converted(options.student, folder, options.environment)
        return compare(options.student, options.data, options.frames, folder)


if __name__ == "__main__":
    sys.exit(main())
