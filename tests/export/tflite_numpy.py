"""A ``.tflite`` file computed in numpy, in any float type: an oracle for the writer, and FP16 where no chip is at hand.

The file is read with the package ``tflite``, so that neither our writer's tables nor the runtime's reader are trusted.
Every operator's result is rounded to the wanted type; means are summed in it too, as an accelerator in FP16 may do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

NAMES = {0: np.float32, 2: np.int32, 3: np.uint8, 9: np.int8}
Options = Mapping[str, Any]


class NumpyModel:
    """One file.

    Args:
        content: its bytes.
        dtype: what every float is computed in.
    """

    def __init__(self, content: bytes, dtype: Any = np.float64) -> None:
        import tflite

        self.library, self.dtype = tflite, dtype
        model = self.file = tflite.Model.GetRootAs(content, 0)
        self.graph = model.Subgraphs(0)
        self.codes = [model.OperatorCodes(n).BuiltinCode() for n in range(model.OperatorCodesLength())]
        self.kinds = {n: name for name, n in vars(tflite.BuiltinOperator).items() if isinstance(n, int)}
        self.constants: dict[int, np.ndarray] = {}
        for number in range(self.graph.TensorsLength()):
            data = model.Buffers(self.graph.Tensors(number).Buffer()).DataAsNumpy()
            if isinstance(data, np.ndarray):
                self.constants[number] = self._constant(self.graph.Tensors(number), data)

    def operators(self) -> list[str]:
        """Kinds in order."""
        found = [self.codes[self.graph.Operators(n).OpcodeIndex()] for n in range(self.graph.OperatorsLength())]
        return [self.kinds[number] for number in found]

    def run(self, given: np.ndarray) -> dict[str, np.ndarray]:
        """Name -> value of every output, in order."""
        values = {**self.constants, int(self.graph.Inputs(0)): given}
        with np.errstate(all="ignore"):
            for number, kind in enumerate(self.operators()):
                operator = self.graph.Operators(number)
                inputs = [values[int(n)] for n in operator.InputsAsNumpy()]
                made = OPERATORS[kind](self, inputs, operator)
                results = made if isinstance(made, list) else [made]
                for place, value in zip(operator.OutputsAsNumpy(), results, strict=True):
                    declared = tuple(self.graph.Tensors(int(place)).ShapeAsNumpy())
                    assert value.shape == declared, (kind, value.shape, declared)
                    values[int(place)] = np.asarray(value, self.dtype)
        names = [self.graph.Tensors(int(n)).Name().decode() for n in self.graph.OutputsAsNumpy()]
        return dict(zip(names, (values[int(n)] for n in self.graph.OutputsAsNumpy()), strict=True))

    def options(self, operator: Any, stem: str) -> Any:
        """An operator's options table."""
        made = getattr(self.library, f"{stem}Options")()
        made.Init(operator.BuiltinOptions().Bytes, operator.BuiltinOptions().Pos)
        return made

    def _constant(self, tensor: Any, data: np.ndarray) -> np.ndarray:
        value = data.view(NAMES[tensor.Type()]).reshape(tensor.ShapeAsNumpy())
        quantization = tensor.Quantization()
        if quantization is not None and quantization.ScaleLength():
            scales = quantization.ScaleAsNumpy().reshape((-1,) + (1,) * (value.ndim - 1))
            value = value.astype(np.float64) * scales
        return value if value.dtype == np.int32 else value.astype(self.dtype)


def _dot(model: NumpyModel, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """A product; in FP16 summed in FP32, as matrix units do."""
    wide = np.promote_types(model.dtype, np.float32)
    return np.matmul(left.astype(wide), right.astype(wide)).astype(model.dtype)


def _linear(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    assert model.options(operator, "FullyConnected").KeepNumDims()
    return np.asarray(_dot(model, inputs[0], inputs[1].T) + inputs[2])


def _conv(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    data, weight, bias = inputs  # NHWC, OkkI
    reach = weight.shape[1] // 2
    padded = np.pad(data, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[1:3], (1, 2))  # NHWIkk
    flat = windows.transpose(0, 1, 2, 4, 5, 3).reshape(*data.shape[:3], -1)
    return np.asarray(_dot(model, flat, weight.reshape(len(weight), -1).T) + bias)


def _depthwise(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    data, weight, bias = inputs  # NHWC, 1kkC
    reach = weight.shape[1] // 2
    padded = np.pad(data, ((0, 0), (reach, reach), (reach, reach), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, weight.shape[1:3], (1, 2))
    return np.asarray(np.einsum("nhwcij,ijc->nhwc", windows, weight[0]) + bias)


def _pool(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    batch, rows, cols, channels = inputs[0].shape
    cut = inputs[0][:, : rows // 2 * 2, : cols // 2 * 2]
    return np.asarray(cut.reshape(batch, rows // 2, 2, cols // 2, 2, channels).mean((2, 4)))


def _resize(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    import torch
    import torch.nn.functional as F

    options = model.options(operator, "ResizeBilinear")
    assert options.HalfPixelCenters() and not options.AlignCorners()
    data = torch.from_numpy(inputs[0].astype(np.float64)).permute(0, 3, 1, 2)
    size = tuple(int(side) for side in inputs[1])
    return F.interpolate(data, size=size, mode="bilinear", align_corners=False).permute(0, 2, 3, 1).numpy()


def _softmax(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    powers = np.exp(inputs[0] - inputs[0].max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def _gelu(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    assert not model.options(operator, "Gelu").Approximate()
    wide = inputs[0].astype(np.float64)
    return np.asarray(wide * 0.5 * (1.0 + np.vectorize(math.erf)(wide / math.sqrt(2.0))))


def _reduced(work: Callable[..., Any]) -> Callable[..., np.ndarray]:
    def does(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
        axes = tuple(int(axis) for axis in inputs[1])
        return np.asarray(work(inputs[0], axis=axes, keepdims=model.options(operator, "Reducer").KeepDims()))

    return does


def _split(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> list[np.ndarray]:
    return np.split(inputs[1], model.options(operator, "Split").NumSplits(), int(inputs[0][0]))


def _slice(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    data, begin, size = inputs
    return np.asarray(data[tuple(slice(int(b), int(b + s)) for b, s in zip(begin, size, strict=True))])


def _concat(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    return np.concatenate(inputs, model.options(operator, "Concatenation").Axis())


def _gather(model: NumpyModel, inputs: Sequence[np.ndarray], operator: Any) -> np.ndarray:
    options = model.options(operator, "Gather")
    assert options.BatchDims() == 0
    return np.take(inputs[0], inputs[1], options.Axis())


def _plain(work: Callable[..., Any]) -> Callable[..., np.ndarray]:
    return lambda model, inputs, operator: np.asarray(work(*inputs))


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "ABS": _plain(np.abs), "ADD": _plain(np.add), "SUB": _plain(np.subtract), "MUL": _plain(np.multiply),
    "DIV": _plain(np.divide), "MAXIMUM": _plain(np.maximum), "RSQRT": _plain(lambda x: 1.0 / np.sqrt(x)),
    "RELU": _plain(lambda x: np.maximum(x, 0)), "CAST": lambda model, inputs, _: inputs[0].astype(model.dtype),
    "RESHAPE": _plain(lambda x, shape: x.reshape(shape)), "TRANSPOSE": _plain(np.transpose),
    "MEAN": _reduced(np.mean), "REDUCE_MAX": _reduced(np.max), "SPLIT": _split, "SLICE": _slice,
    "CONCATENATION": _concat, "SOFTMAX": _softmax, "GELU": _gelu, "FULLY_CONNECTED": _linear, "CONV_2D": _conv,
    "GATHER": _gather, "DEPTHWISE_CONV_2D": _depthwise, "AVERAGE_POOL_2D": _pool, "RESIZE_BILINEAR": _resize,
    "BATCH_MATMUL": lambda model, inputs, _: _dot(model, inputs[0], inputs[1]),
}  # fmt: skip
