"""A ``.tflite`` file, put together tensor by tensor and operator by operator.

The classes that know the format's tables come from the packages ``tflite`` and ``flatbuffers``; here is only what the
operators of our graphs need. Equal calls give equal bytes. Constants lie on multiples of 16 bytes, as the library asks
for, and equal ones are stored once. It does not know graphs or decisions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import MissingExtra

SIGNATURE = "serving_default"
"""Name of the one signature: apps find inputs and outputs by name through it."""
ALIGNMENT = 16
"""Bytes on whose multiples constants lie (schema.fbs, Buffer)."""
SCHEMA_VERSION = 3
_TYPES = {"float32": "FLOAT32", "int32": "INT32", "uint8": "UINT8", "int8": "INT8"}


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorKind:
    """One operator of the format as our graphs use it.

    Attributes:
        options: stem of its options table, or empty if it has none.
        version: of the operator, the lowest that can do what we ask for (tflite/tools/versioning/op_version.cc).
    """

    options: str = ""
    version: int = 1


KINDS: Mapping[str, OperatorKind] = {
    "ABS": OperatorKind(options="Abs"),
    "ADD": OperatorKind(options="Add"),
    "AVERAGE_POOL_2D": OperatorKind(options="Pool2D"),
    "BATCH_MATMUL": OperatorKind(options="BatchMatMul"),
    "CAST": OperatorKind(options="Cast"),
    "CONCATENATION": OperatorKind(options="Concatenation"),
    "CONV_2D": OperatorKind(options="Conv2D"),
    "DEPTHWISE_CONV_2D": OperatorKind(options="DepthwiseConv2D"),
    "DIV": OperatorKind(options="Div"),
    "FULLY_CONNECTED": OperatorKind(options="FullyConnected", version=5),
    "GATHER": OperatorKind(options="Gather"),
    "GELU": OperatorKind(options="Gelu"),
    "MAXIMUM": OperatorKind(options="MaximumMinimum"),
    "MEAN": OperatorKind(options="Reducer"),
    "MUL": OperatorKind(options="Mul"),
    "REDUCE_MAX": OperatorKind(options="Reducer"),
    "RELU": OperatorKind(),
    "RESHAPE": OperatorKind(options="Reshape"),
    "RESIZE_BILINEAR": OperatorKind(options="ResizeBilinear", version=3),
    "RSQRT": OperatorKind(),
    "SLICE": OperatorKind(options="Slice"),
    "SOFTMAX": OperatorKind(options="Softmax"),
    "SPLIT": OperatorKind(options="Split"),
    "SUB": OperatorKind(options="Sub"),
    "TRANSPOSE": OperatorKind(options="Transpose"),
}
"""Every operator that may be written."""
QUANTIZED_VERSIONS: Mapping[str, int] = {"FULLY_CONNECTED": 12, "CONV_2D": 5}
"""Version of an operator with int8 weights, one scale per output channel, and float activations."""


@dataclass(slots=True)
class _Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: int = 0
    scales: np.ndarray | None = None


@dataclass(slots=True)
class _Operator:
    kind: str
    version: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict)


class ModelFile:
    """Tensors and operators so far; ``finish`` makes the bytes.

    Args:
        description: one line about the model, stored in the file.
    """

    def __init__(self, description: str) -> None:
        self.description = description
        self.tensors: list[_Tensor] = []
        self.operators: list[_Operator] = []
        self._buffers: list[bytes] = [b""]
        self._constants: dict[tuple[str, tuple[int, ...], bytes], int] = {}

    def shape(self, tensor: int) -> tuple[int, ...]:
        """Sides of a tensor."""
        return self.tensors[tensor].shape

    def tensor(self, name: str, shape: Sequence[int], dtype: str = "float32") -> int:
        """Adds a tensor that an operator computes or that the caller gives.

        Returns:
            Its number.
        """
        self.tensors.append(_Tensor(name, tuple(int(side) for side in shape), dtype))
        return len(self.tensors) - 1

    def constant(self, name: str, value: np.ndarray, scales: np.ndarray | None = None) -> int:
        """Adds a stored tensor; a plain one that is there already is used again.

        Args:
            name: its name.
            value: float32, int32 or int8.
            scales: of int8 weights, one for each place of the first axis.

        Returns:
            Its number.
        """
        value = np.ascontiguousarray(value)
        key = (str(value.dtype), value.shape, value.tobytes())
        if scales is None and key in self._constants:
            return self._constants[key]
        number = self.tensor(name, value.shape, str(value.dtype))
        self.tensors[number].buffer, self.tensors[number].scales = len(self._buffers), scales
        self._buffers.append(value.astype(value.dtype.newbyteorder("<")).tobytes())
        if scales is None:
            self._constants[key] = number
        return number

    def operator(self, kind: str, inputs: Sequence[int], outputs: Sequence[int], **options: Any) -> None:
        """Adds an operator.

        Args:
            kind: of ``KINDS``.
            inputs: numbers of tensors, -1 for one that is left out.
            outputs: numbers of tensors.
            options: fields of its options table as schema.fbs spells them in CamelCase.
        """
        coded = any(number >= 0 and self.tensors[number].scales is not None for number in inputs)
        version = QUANTIZED_VERSIONS[kind] if coded else KINDS[kind].version
        self.operators.append(_Operator(kind, version, tuple(inputs), tuple(outputs), options))

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file.

        Args:
            inputs: numbers of what the caller gives.
            outputs: numbers of what the caller gets, in order.

        Raises:
            MissingExtra: a package of the extra ``litert`` is not installed.
        """
        flatbuffers, tflite = import_format()
        return _Assembly(flatbuffers, tflite, self, self._buffers).whole(inputs, outputs)


def import_format() -> tuple[Any, Any]:
    """The packages ``flatbuffers`` and ``tflite``, which know the format.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        import flatbuffers
    except ImportError as error:
        raise MissingExtra("target litert", "flatbuffers", "litert") from error
    try:
        import tflite
    except ImportError as error:
        raise MissingExtra("target litert", "tflite", "litert") from error
    return flatbuffers, tflite


class _Assembly:
    """Writes the tables, the innermost first, as the format asks for."""

    def __init__(self, flatbuffers: Any, tflite: Any, file: ModelFile, buffers: Sequence[bytes]) -> None:
        self.builder = flatbuffers.Builder(sum(len(content) for content in buffers) + (1 << 18))
        self.tflite, self.file, self.buffers = tflite, file, buffers

    def whole(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        buffers = self.vector([self.buffer(content) for content in self.buffers])
        codes = list(dict.fromkeys((operator.kind, operator.version) for operator in self.file.operators))
        subgraph = self.vector([self.subgraph(codes, inputs, outputs)])
        model = self.table(
            "Model",
            Version=SCHEMA_VERSION,
            OperatorCodes=self.vector([self.code(*code) for code in codes]),
            Subgraphs=subgraph,
            Description=self.builder.CreateString(self.file.description),
            Buffers=buffers,
            SignatureDefs=self.vector([self.signature(inputs, outputs)]),
        )
        self.builder.Finish(model, file_identifier=b"TFL3")
        return bytes(self.builder.Output())

    def table(self, stem: str, **fields: Any) -> int:
        getattr(self.tflite, f"{stem}Start")(self.builder)
        for name, value in fields.items():
            getattr(self.tflite, f"{stem}Add{name}")(self.builder, value)
        return int(getattr(self.tflite, f"{stem}End")(self.builder))

    def vector(self, tables: Sequence[int]) -> int:
        self.builder.StartVector(4, len(tables), 4)
        for offset in reversed(tables):
            self.builder.PrependUOffsetTRelative(offset)
        return int(self.builder.EndVector())

    def numbers(self, values: Sequence[int]) -> int:
        return int(self.builder.CreateNumpyVector(np.asarray(values, np.int32)))

    def buffer(self, content: bytes) -> int:
        if not content:
            return self.table("Buffer")
        self.builder.StartVector(1, len(content), ALIGNMENT)
        self.builder.head = self.builder.head - len(content)
        self.builder.Bytes[self.builder.head : self.builder.head + len(content)] = content
        return self.table("Buffer", Data=self.builder.EndVector())

    def code(self, kind: str, version: int) -> int:
        number = getattr(self.tflite.BuiltinOperator, kind)
        # the older field holds what fits a byte; readers since schema version 3a take the larger of both
        return self.table("OperatorCode", DeprecatedBuiltinCode=min(number, 127), BuiltinCode=number, Version=version)

    def subgraph(self, codes: Sequence[tuple[str, int]], inputs: Sequence[int], outputs: Sequence[int]) -> int:
        tensors = self.vector([self.tensor(tensor) for tensor in self.file.tensors])
        operators = self.vector([self.operator(operator, codes) for operator in self.file.operators])
        ends = {"Inputs": self.numbers(inputs), "Outputs": self.numbers(outputs)}
        name = self.builder.CreateString("main")
        return self.table("SubGraph", Tensors=tensors, **ends, Operators=operators, Name=name)

    def tensor(self, tensor: _Tensor) -> int:
        fields: dict[str, Any] = {"Shape": self.numbers(tensor.shape), "Name": self.builder.CreateString(tensor.name)}
        if tensor.scales is not None:
            scale = self.builder.CreateNumpyVector(np.ascontiguousarray(tensor.scales, np.float32))
            zero = self.builder.CreateNumpyVector(np.zeros(len(tensor.scales), np.int64))
            quantization = self.table("QuantizationParameters", Scale=scale, ZeroPoint=zero, QuantizedDimension=0)
            fields["Quantization"] = quantization
        kind = getattr(self.tflite.TensorType, _TYPES[tensor.dtype])
        return self.table("Tensor", Type=kind, Buffer=tensor.buffer, **fields)

    def operator(self, operator: _Operator, codes: Sequence[tuple[str, int]]) -> int:
        fields: dict[str, Any] = {
            "Inputs": self.numbers(operator.inputs),
            "Outputs": self.numbers(operator.outputs),
            "OpcodeIndex": codes.index((operator.kind, operator.version)),
        }
        stem = KINDS[operator.kind].options
        if stem:
            fields["BuiltinOptionsType"] = getattr(self.tflite.BuiltinOptions, f"{stem}Options")
            fields["BuiltinOptions"] = self.table(f"{stem}Options", **operator.options)
        return self.table("Operator", **fields)

    def signature(self, inputs: Sequence[int], outputs: Sequence[int]) -> int:
        sides = {}
        for field_name, numbers in (("Inputs", inputs), ("Outputs", outputs)):
            names = [self.builder.CreateString(self.file.tensors[number].name) for number in numbers]
            maps = [
                self.table("TensorMap", Name=name, TensorIndex=number)
                for name, number in zip(names, numbers, strict=True)
            ]
            sides[field_name] = self.vector(maps)
        return self.table("SignatureDef", **sides, SignatureKey=self.builder.CreateString(SIGNATURE), SubgraphIndex=0)


__all__ = [
    "ALIGNMENT",
    "KINDS",
    "QUANTIZED_VERSIONS",
    "SCHEMA_VERSION",
    "SIGNATURE",
    "ModelFile",
    "OperatorKind",
    "import_format",
]
