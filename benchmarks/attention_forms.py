"""Attention in forms that compute the same: which one does each engine run fastest, by head size?

    python benchmarks/attention_forms.py --rounds 20 --json forms.json

One layer's attention, from the packed linear's output (1, tokens, 3 * width) to (1, tokens, width), written as ONNX in
each form and run by ONNX Runtime and OpenVINO in turns. Every form is first compared with the same sums in NumPy; one
that differs, or that an engine does not run, is a line with the reason and no time. A form is worth taking where its
ratio to ``ours`` holds in a run on a quiet machine.

Shapes: B = 1, N tokens, H heads, D size of a head, W = H * D.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.cli import console
from tinyusfm_export.verify.verdict import Samples, measure_interleaved
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.device.signal_stack import kept_signal_stack
from tinyusfm_runtime.engines.ort import import_onnxruntime
from tinyusfm_runtime.engines.ov import import_openvino
from tinyusfm_runtime.numerics.order import wide

SHAPES = ((197, 12, 16), (197, 3, 64), (128, 12, 16))
"""Tokens, heads, size of a head: the student, its fast twin, and the student with a sector of 65 %."""
TOLERANCE = 2e-5
"""Largest difference from NumPy in float32, of values around 1."""
TOLERANCE_BF16 = 2e-2
BASE = "ours"
"""Form that the others are compared with: three slices of the packed output, products of four axes."""
Run = Callable[[np.ndarray], np.ndarray]
"""Packed queries, keys and values -> the attention's output."""


def reference(packed: np.ndarray, heads: int) -> np.ndarray:
    """The attention in float64.

    Args:
        packed: (1, N, 3 W), queries, keys and values.
        heads: H.

    Returns:
        (1, N, W) float32; the scale of the queries is 1 / sqrt(D).
    """
    tokens, width = packed.shape[1], packed.shape[2] // 3
    q, k, v = (part.reshape(tokens, heads, -1).swapaxes(0, 1) for part in np.split(packed[0].astype(np.float64), 3, 1))
    scores = q @ k.swapaxes(1, 2) / np.sqrt(width // heads)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    found = (weights / weights.sum(-1, keepdims=True)) @ v
    return found.swapaxes(0, 1).reshape(1, tokens, width).astype(np.float32)


def forms(tokens: int, heads: int, size: int) -> dict[str, bytes]:
    """Every form as an ONNX file.

    Args:
        tokens: N.
        heads: H.
        size: D.
    """
    import onnx
    from onnx import helper, numpy_helper

    width, scale = heads * size, 1.0 / np.sqrt(size)
    shapes = {"four": [1, tokens, heads, size], "five": [1, tokens, 3, heads, size], "flat": [1, tokens, width],
              "three": [tokens, heads, size]}  # fmt: skip
    constants = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in shapes.items()]
    constants += [numpy_helper.from_array(np.array(index, np.int64), f"at{index}") for index in range(3)]
    constants.append(numpy_helper.from_array(np.array(scale, np.float32), "scale"))

    def node(kind: str, inputs: str, outputs: str, **fields: Any) -> Any:
        return helper.make_node(kind, inputs.split(), outputs.split(), **fields)

    def product(perm_out: list[int]) -> list[Any]:
        return [node("Mul", "qt scale", "qs"), node("MatMul", "qs kt", "s"), node("Softmax", "s", "w", axis=-1),
                node("MatMul", "w vt", "o"), node("Transpose", "o", "ot", perm=perm_out),
                node("Reshape", "ot flat", "out")]  # fmt: skip

    split = node("Split", "packed", "q k v", axis=2, num_outputs=3)
    four = [node("Reshape", f"{name} four", f"{name}4") for name in "qkv"]
    heads_first = [node("Transpose", f"{name}4", f"{name}t", perm=[0, 2, 1, 3]) for name in "qv"]
    keys = node("Transpose", "k4", "kt", perm=[0, 2, 3, 1])
    permuted = [node("Reshape", "packed five", "p5"), node("Transpose", "p5", "p", perm=[2, 0, 3, 1, 4])]
    permuted += [node("Gather", f"p at{index}", name, axis=0) for index, name in enumerate(("qt", "k5", "vt"))]
    permuted.append(node("Transpose", "k5", "kt", perm=[0, 1, 3, 2]))
    three = [node("Reshape", f"{name} three", f"{name}3") for name in "qkv"]
    three += [node("Transpose", f"{name}3", f"{name}t", perm=[1, 0, 2]) for name in "qv"]
    three.append(node("Transpose", "k3", "kt", perm=[1, 2, 0]))
    own = {"scale": float(scale)}
    counts = {"q_num_heads": heads, "kv_num_heads": heads}
    found = {
        BASE: [split, *four, *heads_first, keys, *product([0, 2, 1, 3])],
        "five axes": [*permuted, *product([0, 2, 1, 3])],
        "three axes": [split, *three, *product([1, 0, 2])],
        "Attention of opset 23": [split, node("Attention", "q k v", "out", **counts, **own)],
        "MultiHeadAttention": [
            split, node("MultiHeadAttention", "q k v", "out", num_heads=heads, domain="com.microsoft", **own),
        ],
    }  # fmt: skip
    made = {}
    for name, nodes in found.items():
        into = helper.make_tensor_value_info("packed", onnx.TensorProto.FLOAT, [1, tokens, 3 * width])
        out = helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [1, tokens, width])
        used = {one for each in nodes for one in each.input}
        graph = helper.make_graph(nodes, "attention", [into], [out], [one for one in constants if one.name in used])
        version = 23 if "opset 23" in name else 20
        opsets = [helper.make_opsetid("", version), helper.make_opsetid("com.microsoft", 1)]
        made[name] = bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return made


def in_onnxruntime(model: bytes) -> Run:
    """One thread of ONNX Runtime."""
    library = import_onnxruntime()
    options = library.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = 1, 1, 4
    session = library.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda packed: np.asarray(session.run(None, {"packed": packed})[0])


@kept_signal_stack()
def in_openvino(model: bytes, precision: str) -> Run:
    """One thread of OpenVINO."""
    library = import_openvino()
    settings = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY"}
    core = library.Core()
    request = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", settings).create_infer_request()

    def run(packed: np.ndarray) -> np.ndarray:
        request.infer({0: packed}, share_inputs=True)
        return np.array(request.get_output_tensor(0).data)

    return run


def engines() -> dict[str, tuple[Callable[[bytes], Run], float]]:
    """Engine -> what opens a file in it, and how far it may differ."""
    found: dict[str, tuple[Callable[[bytes], Run], float]] = {
        "onnxruntime f32": (in_onnxruntime, TOLERANCE),
        "openvino f32": (lambda model: in_openvino(model, "f32"), TOLERANCE),
    }
    if machine_card().has_bf16:
        found["openvino bf16"] = (lambda model: in_openvino(model, "bf16"), TOLERANCE_BF16)
    return found


def right_ones(
    models: Mapping[str, bytes], opened: Callable[[bytes], Run], packed: np.ndarray, heads: int, tolerance: float
) -> tuple[dict[str, Run], dict[str, str]]:
    """Forms that an engine runs and that give NumPy's answer, and why the others do not.

    Args:
        models: form -> ONNX file.
        opened: opens one in the engine.
        packed: an input.
        heads: H.
        tolerance: largest difference.
    """
    wanted = reference(packed, heads)
    good: dict[str, Run] = {}
    wrong: dict[str, str] = {}
    for name, model in models.items():
        try:
            run = opened(model)
            away = float(np.abs(run(packed) - wanted).max())
        except Exception as error:  # an engine may refuse a form in any way, which is a result
            wrong[name] = " ".join(str(error).split())[:120] or type(error).__name__
            continue
        if away <= tolerance:
            good[name] = run
        else:
            wrong[name] = f"differs from NumPy by {away:.2g}"
    return good, wrong


def ratio(samples: Mapping[str, Samples], name: str) -> float:
    """How many times as fast as ``ours`` a form is, the median over rounds.

    Args:
        samples: form -> rounds of samples, ms.
        name: the form.
    """
    pairs = zip(samples[BASE], samples[name], strict=True)
    return float(np.median(wide([np.median(wide(base)) / np.median(wide(mine)) for base, mine in pairs])))


def main(argv: Sequence[str] | None = None) -> int:
    """Measures every form and prints a table."""
    parser = argparse.ArgumentParser(description="attention in equal forms, by engine and head size")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=50, help="timed runs of a form in a round")
    parser.add_argument("--json", type=Path, default=None)
    options = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for tokens, heads, size in SHAPES:
        packed = np.random.default_rng(7).normal(size=(1, tokens, 3 * heads * size)).astype(np.float32)
        models = forms(tokens, heads, size)
        for engine, (opened, tolerance) in engines().items():
            good, wrong = right_ones(models, opened, packed, heads, tolerance)
            samples = measure_interleaved(good, [packed], rounds=options.rounds, runs=options.runs)
            about = {"engine": engine, "tokens": tokens, "heads": heads, "size": size}
            for name, parts in samples.items():
                median = float(np.median(wide([value for part in parts for value in part])))
                times = ratio(samples, name) if BASE in samples else None
                rows.append({**about, "form": name, "p50_ms": median, "ratio": times, "samples_ms": parts})
            rows += [{**about, "form": name, "failed": why} for name, why in wrong.items()]
    header = ("engine", "tokens", "heads", "form", "ms, p50", "times as fast as ours")
    cells = [
        (
            row["engine"], str(row["tokens"]), f"{row['heads']} of {row['size']}", row["form"],
            f"{row['p50_ms']:.3f}" if "p50_ms" in row else "-",
            row["failed"] if "failed" in row else "-" if row["ratio"] is None else f"{row['ratio']:.2f}",
        )
        for row in rows
    ]  # fmt: skip
    print(console.table(header, cells))
    if options.json is not None:
        told = {"version": 1, "machine": machine_card().to_json(), "rows": rows}
        options.json.write_text(json.dumps(told) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
