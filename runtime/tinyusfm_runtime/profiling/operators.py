"""Time of every operator and the precision that it really ran in.

As the engine itself reports them.

ONNX Runtime's profiler and OpenVINO's performance counters are asked in a session of their own, since both slow an
engine down; times are shares, not latencies.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.signal_stack import kept_signal_stack
from tinyusfm_runtime.early_exit import is_chain
from tinyusfm_runtime.engines.ort import import_onnxruntime
from tinyusfm_runtime.engines.ov import import_openvino
from tinyusfm_runtime.errors import MissingExtra, UnsupportedError
from tinyusfm_runtime.graphs.tflite import ReadOperator, check

RUNS = 5
"""Runs whose times are added up, after one that is thrown away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ProfiledOperator:
    """All operators of one kind and precision.

    Attributes:
        kind: such as ``MatMul``; of an engine's own fused kinds its own name.
        precision: type that it computes in, as the engine says.
        count: operators of it.
        share: of the time of all operators, 0..1, or None where the engine reports no times.
        mean_us: microseconds a frame, or None likewise.
    """

    kind: str
    precision: str
    count: int
    share: float | None
    mean_us: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def row(self) -> tuple[str, str, str, str, str]:
        """(kind, precision, count, microseconds, share) for people."""
        if self.mean_us is None or self.share is None:
            return (self.kind, self.precision, str(self.count), "not reported", "not reported")
        return (self.kind, self.precision, str(self.count), f"{self.mean_us:.0f}", f"{self.share:.1%}")


def operator_table(
    bundle: Bundle, artefact: Artefact, tensor: np.ndarray, *, threads: int = 1
) -> list[ProfiledOperator]:
    """Operators of an artefact, those that cost most first.

    LiteRT reports no times: its operators come with the precision that its file says, the most frequent first.

    Args:
        bundle: holds it.
        artefact: of engine ``ort``, ``ov`` or ``litert``, without early exits.
        tensor: uint8 NCHW input.
        threads: inside the engine.

    Raises:
        UnsupportedError: an engine that reports no operators, or a chain of early exits.
        MissingExtra: its library is not installed.
    """
    files = bundle.artefact_files(artefact)
    if is_chain(files) or artefact.engine not in ("ort", "ov", "litert"):
        raise UnsupportedError(f"the engine of {artefact.name} reports no operators")
    if artefact.engine == "litert":
        return _listed(check(files["model.tflite"], bundle.manifest.spec.input, bundle.manifest.spec))
    read = _onnxruntime if artefact.engine == "ort" else _openvino
    return _summed(read(files, np.ascontiguousarray(tensor), threads, artefact.rest_precision))


Timed = tuple[str, str, str, float]
"""Name, kind, precision, microseconds a frame."""


def _summed(timed: Sequence[Timed]) -> list[ProfiledOperator]:
    found: dict[tuple[str, str], list[tuple[str, float]]] = defaultdict(list)
    for name, kind, precision, microseconds in timed:
        found[kind, precision].append((name, microseconds))
    total = sum(item[3] for item in timed) or 1.0
    rows = [
        ProfiledOperator(
            kind=kind,
            precision=precision,
            count=len({name for name, _ in parts}),
            share=sum(time for _, time in parts) / total,
            mean_us=sum(time for _, time in parts),
        )
        for (kind, precision), parts in found.items()
    ]
    return sorted(rows, key=lambda row: -(row.share or 0.0))


def _listed(operators: Sequence[ReadOperator]) -> list[ProfiledOperator]:
    """Operators of a LiteRT file by kind; those with int8 weights multiply in int8."""
    counts = Counter((operator.kind, "int8" if operator.weight == "int8" else "f32") for operator in operators)
    return [
        ProfiledOperator(kind=kind, precision=precision, count=count, share=None, mean_us=None)
        for (kind, precision), count in counts.most_common()
    ]


def _onnxruntime(files: Mapping[str, bytes], tensor: np.ndarray, threads: int, _: str) -> list[Timed]:
    try:
        onnxruntime = import_onnxruntime()
    except ImportError as error:
        raise MissingExtra("operators of an onnx artefact", "onnxruntime", "onnxruntime") from error
    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "operators")
        session = onnxruntime.InferenceSession(files["model.onnx"], options, providers=["CPUExecutionProvider"])
        name = session.get_inputs()[0].name
        for _run in range(RUNS + 1):
            session.run(None, {name: tensor})
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return parse_ort_profile(events, RUNS + 1)


def parse_ort_profile(events: Sequence[Mapping[str, Any]], runs: int) -> list[Timed]:
    """Kernel times of ONNX Runtime's profile, without the first run.

    Args:
        events: content of the profile.
        runs: that were made.
    """
    times: dict[str, list[float]] = defaultdict(list)
    about: dict[str, tuple[str, str]] = {}
    for event in events:
        if event.get("cat") != "Node" or not str(event.get("name", "")).endswith("_kernel_time"):
            continue
        name, args = str(event["name"]).removesuffix("_kernel_time"), event.get("args", {})
        times[name].append(float(event["dur"]))
        shapes = args.get("input_type_shape") or [{}]
        types = [str(kind) for entry in shapes for kind in entry]
        about[name] = (str(args.get("op_name", "unknown")), _computes_in(types))
    kept = {name: values[1:] if len(values) == runs else values for name, values in times.items()}
    return [(name, *about[name], sum(values) / max(1, len(values))) for name, values in kept.items()]


def _computes_in(types: Sequence[str]) -> str:
    """The narrowest of an operator's inputs is what it multiplies in."""
    for wanted in ("uint8", "int8"):
        if wanted in types:
            return "int8"
    for wanted in ("float16", "bfloat16", "float"):
        if wanted in types:
            return {"float": "f32", "float16": "f16", "bfloat16": "bf16"}[wanted]
    return types[0] if types else "unknown"


@kept_signal_stack()
def _openvino(files: Mapping[str, bytes], tensor: np.ndarray, threads: int, rest: str) -> list[Timed]:
    try:
        openvino = import_openvino()
    except ImportError as error:
        raise MissingExtra("operators of an openvino artefact", "openvino", "openvino") from error
    core = openvino.Core()
    model = core.read_model(model=files["model.xml"], weights=files["model.bin"])
    settings = {
        "PERF_COUNT": True,
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": rest,
        "NUM_STREAMS": 1,
    }
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    times: dict[str, list[float]] = defaultdict(list)
    about: dict[str, tuple[str, str]] = {}
    for run in range(RUNS + 1):
        request.infer([tensor])
        for item in request.get_profiling_info() if run else ():
            if item.status == item.Status.EXECUTED:
                times[item.node_name].append(item.real_time.total_seconds() * 1e6)
                about[item.node_name] = (item.node_type, _from_kernel(item.exec_type))
    return [(name, *about[name], sum(values) / len(values)) for name, values in times.items()]


def _from_kernel(kernel: str) -> str:
    """``brgemm_avx512_I8`` -> ``int8``."""
    last = kernel.rsplit("_", 1)[-1].lower()
    return {"i8": "int8", "u8": "int8"}.get(last, last)


__all__ = ["RUNS", "ProfiledOperator", "Timed", "operator_table", "parse_ort_profile"]
