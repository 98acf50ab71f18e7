"""A whole integer model in numpy, operation by operation.

The definition, and the slow way where nothing is compiled.

It does not check the model; model_file.py did.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from tinyusfm_runtime.engines.integer import arithmetic as exact
from tinyusfm_runtime.engines.integer.layout import (
    ADD,
    ADDED,
    CODES,
    EXACT,
    RELU,
    TYPES,
    Model,
    Operation,
)

Buffers = list[np.ndarray]
"""One array a buffer, rows and columns."""


class Definition:
    """A model that runs in numpy.

    Args:
        model: a checked model.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self._buffers: Buffers = [np.zeros(buffer.shape, TYPES[buffer.dtype]) for buffer in model.buffers]

    def run(self, tensor: np.ndarray, is_cancelled: Callable[[], bool] = lambda: False) -> dict[str, np.ndarray] | None:
        """Computes one answer.

        Args:
            tensor: what the model's input says.
            is_cancelled: asked before every operation.

        Returns:
            Outputs by name, float32; None if it was cancelled.
        """
        self._buffers[0][:] = tensor.reshape(self._buffers[0].shape)
        found: dict[int, np.ndarray] = {}
        for operation in self._model.operations:
            if is_cancelled():
                return None
            if operation.kind == "output":
                found[operation["port"]] = _output(operation, self._buffers[operation.source])
            else:
                RUN[operation.kind](operation, self._buffers)
        ports = self._model.outputs
        return {port.name: found[number].reshape(port.shape) for number, port in enumerate(ports, start=1)}

    def buffer(self, number: int) -> np.ndarray:
        """What a buffer holds now; for tests and reports."""
        return self._buffers[number]


def _patches(o: Operation, buffers: Buffers) -> None:
    buffers[o.target][:] = exact.patches(buffers[o.source], o["size"])


def _tokens(o: Operation, buffers: Buffers) -> None:
    with np.errstate(invalid="ignore", over="ignore"):
        scaled = np.floor(buffers[o.source].astype(np.float64) * float(2 ** o["bits"]) + 0.5)
    buffers[o.target][:] = exact.saturate(np.nan_to_num(scaled, nan=0.0))


def _fill(o: Operation, buffers: Buffers) -> None:
    buffers[o.target][:] = o.tensors["table"]


def _scaled(o: Operation, sums_NO: np.ndarray) -> np.ndarray:
    shift_O, factor_O = o.tensors["shift"].astype(np.int32), o.tensors["factor"].astype(np.int32)
    return exact.requantise(sums_NO, shift_O, factor_O)


def _linear(o: Operation, buffers: Buffers) -> None:
    rows = slice(o["row"], o["row"] + o["rows"])
    sums_NO = exact.product(buffers[o.source][rows], o.tensors["weight"], o.tensors["bias"])
    values_NO = _scaled(o, sums_NO)
    target_NO = buffers[o.target][o["target_row"] : o["target_row"] + o["rows"]]
    if o["mode"] == CODES:
        codes_NO = exact.to_codes(values_NO, o["bits"], o["zero"])
        target_NO[:] = o.tensors["table"][codes_NO] if o["table"] else codes_NO
    else:
        words_NO = exact.to_words(values_NO, o["bits"])
        target_NO[:] = exact.saturate(target_NO + words_NO) if o["mode"] == ADD else words_NO


def _norm(o: Operation, buffers: Buffers) -> None:
    epsilon, root = (int(number) for number in o.tensors["constants"])
    values_ND = exact.layer_norm(buffers[o.source][o["row"] : o["row"] + o["rows"]], epsilon, root)
    if o["mode"] == CODES:
        scaled_ND = exact.multiply(values_ND, o.tensors["factor"].astype(np.int32))
        buffers[o.target][:] = exact.to_codes(scaled_ND, o["bits"], o["zero"])
    else:
        buffers[o.target][:] = values_ND


def _attention(o: Operation, buffers: Buffers) -> None:
    packed, target = buffers[o.source].astype(np.int32) - exact.ZERO, buffers[o.target]
    width, size = target.shape[1], target.shape[1] // o["heads"]
    for head in range(o["heads"]):
        q, k, v = (packed[:, at + head * size : at + (head + 1) * size] for at in (0, width, 2 * width))
        left, right, factor, out = (int(o.tensors[role][head]) for role in ("left", "right", "factor", "out"))
        mixed = exact.attend(q[o["row"] :], k, v, left=left, right=right, factor=factor, drop=o["drop"])
        codes = exact.to_codes(exact.multiply(mixed, out), o["bits"], o["zero"])
        target[:, head * size : (head + 1) * size] = codes


def _convolution(o: Operation, buffers: Buffers) -> None:
    map_HWC = buffers[o.source].reshape(o["height"], o["width"], -1)
    sums = exact.convolve(map_HWC, o.tensors["weight"], o.tensors["bias"])
    buffers[o.target][:] = exact.to_codes(_scaled(o, sums), o["bits"], o["zero"])


def _depthwise(o: Operation, buffers: Buffers) -> None:
    map_HWC = buffers[o.source].reshape(o["height"], o["width"], -1)
    sums = exact.convolve_depthwise(map_HWC, o.tensors["weight"], o.tensors["bias"])
    buffers[o.target][:] = exact.to_codes(_scaled(o, sums), o["bits"], o["zero"])


def _resize(o: Operation, buffers: Buffers) -> None:
    map_HWC = buffers[o.source].reshape(o["from_height"], o["from_width"], -1)
    rows, columns = ((o.tensors[f"{a}_first"], o.tensors[f"{a}_share"].astype(np.int32)) for a in ("rows", "columns"))
    target = buffers[o.target]
    sums = exact.resize(map_HWC, rows, columns, o["share_bits"]).reshape(target.shape)
    if o["flags"] == EXACT:
        target[:] = sums
        return
    values = exact.shift_round(sums, 2 * o["share_bits"])
    values = np.maximum(values, 0) if o["flags"] & RELU else values
    target[:] = exact.saturate(target + values) if o["flags"] & ADDED else values


def _halve(o: Operation, buffers: Buffers) -> None:
    values = exact.halve(buffers[o.source].reshape(o["height"], o["width"], -1))
    target = buffers[o.target]
    target[:] = (np.maximum(values, 0) if o["flags"] & RELU else values).reshape(target.shape)


def _codes(o: Operation, buffers: Buffers) -> None:
    scaled = exact.multiply(buffers[o.source].astype(np.int32), o["factor"])
    buffers[o.target][:] = exact.to_codes(scaled, o["bits"], o["zero"])


def _mean(o: Operation, buffers: Buffers) -> None:
    sums_C = buffers[o.source][o["row"] : o["row"] + o["rows"]].sum(0, dtype=np.int32) + np.int32(o["bias"])
    values_C = exact.multiply(exact.saturate(sums_C >> o["shift"]), o["factor"])
    buffers[o.target][0] = exact.to_words(values_C, o["bits"])


def _peak(o: Operation, buffers: Buffers) -> None:
    buffers[o.target][:] = np.abs(buffers[o.source].astype(np.int32) - o["zero"]).max()


def _sum(o: Operation, buffers: Buffers) -> None:
    buffers[o.target][0] = buffers[o.source][o["row"] : o["row"] + o["rows"]].sum(0, dtype=np.int32)


def _affine(o: Operation, buffers: Buffers) -> None:
    buffers[o.target][:] = buffers[o.source].astype(np.int32) * o.tensors["factor"] + o.tensors["bias"]


def _gather(o: Operation, buffers: Buffers) -> None:
    buffers[o.target][:] = exact.gather(buffers[o.source], o.tensors["index"], o.tensors.get("blank"))


def _output(o: Operation, values: np.ndarray) -> np.ndarray:
    """Leaves the integers: float32 of the integer, times the scale.

    Rounded to nearest even.
    """
    scale = np.array([o["scale"]], np.int32).view(np.float32)[0]
    found = (values.T if o["transposed"] else values).astype(np.float32) * scale
    return np.ascontiguousarray(found, np.float32)


# bounds.py has a table of the same kinds: what is checked there is computed here
# pylint: disable=duplicate-code
RUN: Mapping[str, Callable[[Operation, Buffers], None]] = {
    "patches": _patches,
    "tokens": _tokens,
    "fill": _fill,
    "linear": _linear,
    "norm": _norm,
    "attention": _attention,
    "convolution": _convolution,
    "depthwise": _depthwise,
    "resize": _resize,
    "halve": _halve,
    "codes": _codes,
    "mean": _mean,
    "peak": _peak,
    "sum": _sum,
    "affine": _affine,
    "gather": _gather,
}
"""Kind -> runs it on the buffers; ``output`` is apart."""


__all__ = ["RUN", "Buffers", "Definition"]
