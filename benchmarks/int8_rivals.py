"""INT8 by every rival's defaults beside ours: same weights, same calibration frames, same judged frames, same metric.

``python benchmarks/int8_rivals.py --data DATA/hc18 --frames 48`` prints a table and one JSON line. Rivals quantize the
stock ONNX of the unchanged student; ours is the default decision in both CPU targets. Every side is compared with the
PyTorch float32 student: mean and worst Dice of the masks (segmentation) or agreement of the top class and largest
change of a probability (classification). Accuracy alone; bench_engines.py times.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from rivals import write_nncf, write_stock_onnx
from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.train.student import load
from tinyusfm_edge.data.folder import read_data
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.ptq import decide
from tinyusfm_export.verify.confidence import probabilities
from tinyusfm_export.verify.engine_run import open_engine, preprocess_all
from tinyusfm_runtime import plugins
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import EdgeError
from tinyusfm_runtime.spec import ModelSpec, Task

Run = Callable[[np.ndarray], np.ndarray]
"""uint8 NCHW codes -> logits."""


def normalised(codes: np.ndarray, spec: ModelSpec) -> np.ndarray:
    """Codes 1HW or NCHW of one channel -> float32 of three, as the stock model takes them."""
    mean, std = (np.array(v, np.float32).reshape(3, 1, 1) for v in (spec.preprocess.mean, spec.preprocess.std))
    return np.asarray(((codes.astype(np.float32).repeat(3, axis=-3) / 255 - mean) / std).astype(np.float32))


class Frames:
    """A calibration reader for ONNX Runtime over normalised inputs."""

    def __init__(self, name: str, inputs: Sequence[np.ndarray]) -> None:
        self._name, self._rest = name, iter(inputs)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next input, or None."""
        found = next(self._rest, None)
        return None if found is None else {self._name: found}


def ort_sides(
    stock: Path, calibration: Sequence[np.ndarray], spec: ModelSpec, out: Path
) -> dict[str, Callable[[], Run]]:
    """ONNX Runtime's quantizers with their defaults: static on all operators, and dynamic."""
    from tinyusfm_runtime.engines.ort import import_onnxruntime

    ort = import_onnxruntime()
    from onnxruntime.quantization import QuantFormat, quant_pre_process, quantize_dynamic, quantize_static

    prepared = out / "prepared.onnx"

    def ready() -> Path:
        if not prepared.is_file():
            quant_pre_process(str(stock), str(prepared))
        return prepared

    def run(path: Path) -> Run:
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        return lambda codes: np.asarray(session.run(None, {name: normalised(codes, spec)})[0])

    def static() -> Run:
        path, name = out / "static.onnx", ort.InferenceSession(str(ready())).get_inputs()[0].name
        quantize_static(str(prepared), str(path), Frames(name, calibration), quant_format=QuantFormat.QDQ)
        return run(path)

    def dynamic() -> Run:
        path = out / "dynamic.onnx"
        quantize_dynamic(str(ready()), str(path))
        return run(path)

    return {"ORT static, all operators": static, "ORT dynamic, all operators": dynamic}


def nncf_sides(stock: Path, codes: np.ndarray, spec: ModelSpec, out: Path) -> dict[str, Callable[[], Run]]:
    """NNCF with its defaults, and with its settings for transformers."""
    from tinyusfm_runtime.engines.ov import import_openvino

    openvino = import_openvino()

    def run(model: Any) -> Run:
        config = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
        compiled = openvino.Core().compile_model(model, "CPU", config)
        return lambda frame: np.array(compiled(normalised(frame, spec))[0])

    def transformer() -> Run:
        import nncf

        inputs = [normalised(code, spec) for code in codes]
        with redirect_stdout(sys.stderr):
            model = nncf.quantize(
                openvino.Core().read_model(stock),
                nncf.Dataset(inputs),
                subset_size=len(inputs),
                model_type=nncf.ModelType.TRANSFORMER,
                preset=nncf.QuantizationPreset.MIXED,
            )
        return run(model)

    return {
        "NNCF, defaults": lambda: run(openvino.Core().read_model(write_nncf(stock, codes, spec, out))),
        "NNCF, transformer settings": transformer,
    }


def modelopt_sides(
    stock: Path, calibration: Sequence[np.ndarray], spec: ModelSpec, out: Path
) -> dict[str, Callable[[], Run]]:
    """ModelOpt's ONNX quantizer with its defaults, where it is installed."""

    def default() -> Run:
        from tinyusfm_runtime.engines.ort import import_onnxruntime

        ort = import_onnxruntime()
        from modelopt.onnx.quantization import quantize

        path = out / "modelopt.onnx"
        name = ort.InferenceSession(str(stock)).get_inputs()[0].name
        quantize(str(stock), calibration_data={name: np.concatenate(calibration)}, output_path=str(path))
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda codes: np.asarray(session.run(None, {name: normalised(codes, spec)})[0])

    return {"ModelOpt, defaults": default}


def our_sides(loaded: Any, spec: ModelSpec, out: Path, stack: ExitStack) -> dict[str, Callable[[], Run]]:
    """The default decision in both CPU targets; the stack closes their engines."""
    graph = build_graph(loaded.module, spec)
    decision = decide(graph, "int8", loaded.ranges)

    def side(target: str) -> Callable[[], Run]:
        def make() -> Run:
            folder = out / target
            folder.mkdir()
            built = plugins.load("targets", target).Target().build(graph, decision, folder)
            files = {path.name: path.read_bytes() for path in built.files}
            rest = built.rest_precision
            engine = stack.enter_context(open_engine(target, files, spec, threads=1, rest_precision=rest))
            return lambda codes: engine.run(codes)["logits"]

        return make

    return {"ours, OpenVINO": side("ov"), "ours, ONNX Runtime": side("ort")}


def score(run: Run, inputs: Sequence[np.ndarray], wanted: Sequence[np.ndarray], spec: ModelSpec) -> dict[str, float]:
    """Agreement of one side with the float reference."""
    found = [run(codes) for codes in inputs]
    change = max(float(np.abs(probabilities(a) - probabilities(b)).max()) for a, b in zip(found, wanted, strict=True))
    if spec.task is Task.CLASSIFY:
        same = np.mean([a.argmax() == b.argmax() for a, b in zip(found, wanted, strict=True)])
        return {"agreement": float(same), "worst": 1.0 - change}
    cut = np.log(spec.threshold / (1 - spec.threshold))
    dices = []
    for a, b in zip(found, wanted, strict=True):
        total = int((a > cut).sum()) + int((b > cut).sum())
        dices.append(1.0 if total == 0 else 2.0 * int(((a > cut) & (b > cut)).sum()) / total)
    return {"agreement": float(np.mean(dices)), "worst": float(np.min(dices))}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="INT8 by rivals' defaults beside ours")
    parser.add_argument("--student", default="fetal-head")
    parser.add_argument("--data", type=Path, required=True, help="folder with split.csv")
    parser.add_argument("--frames", type=int, default=48, help="validation frames that judge")
    parser.add_argument("--calibration", type=int, default=64, help="training frames the rivals calibrate on")
    parser.add_argument("--only", default="", help="only sides with this in their name")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    import torch

    try:
        loaded, _ = load(options.student)
        spec, folder = loaded.spec, read_data(options.data, calibrate=True)
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    judged = preprocess_all([named.frame for named in folder.validation[: options.frames]], spec)
    inputs = [tensor for tensor, _ in judged]
    codes = np.stack([t for t, _ in preprocess_all([n.frame for n in folder.calibration[: options.calibration]], spec)])
    calibration = [normalised(code, spec) for code in codes]
    module = loaded.module.eval()
    with torch.inference_mode():
        wanted = [module(torch.from_numpy(normalised(tensor, spec))).numpy() for tensor in inputs]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
        out = Path(name)
        stock = write_stock_onnx(loaded.module, spec, out)
        sides = {
            **our_sides(loaded, spec, out, stack),
            **nncf_sides(stock, codes, spec, out),
            **ort_sides(stock, calibration, spec, out),
            **modelopt_sides(stock, calibration, spec, out),
        }
        for side, make in ((side, make) for side, make in sides.items() if options.only in side):
            print(f"{side} ...", file=sys.stderr, flush=True)
            try:
                rows.append({"side": side, **score(make(), inputs, wanted, spec)})
            except Exception as error:  # a rival may fail in any way, which is a result too
                rows.append({"side": side, "failed": f"{type(error).__name__}: {' '.join(str(error).split())[:90]}"})
    words = ("Dice mean", "Dice worst") if spec.task is not Task.CLASSIFY else ("same class", "1 - largest change")
    cells = [
        (row["side"], f"{row['agreement']:.4f}", f"{row['worst']:.4f}")
        if "agreement" in row
        else (row["side"], row["failed"], "-")
        for row in rows
    ]
    print(console.table(("INT8 by", *words), cells))
    versions = {name: _version(name) for name in ("torch", "onnxruntime", "openvino", "nncf", "nvidia-modelopt")}
    print(
        json.dumps(
            {
                "version": 1,
                "student": spec.name,
                "frames": len(inputs),
                "calibration": len(codes),
                "rows": rows,
                "machine": machine_card().to_json(),
                "versions": versions,
            }
        )
    )
    return 0


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    raise SystemExit(main())
