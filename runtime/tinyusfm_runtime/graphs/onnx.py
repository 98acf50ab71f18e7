"""ONNX models: what may stand in one, operator by operator, and no more.

One graph of plain tensors from one input; no control flow, no functions, no sub-graphs, no sparse or external tensors,
no operators of other domains, no free sides. The reader is strict (protobuf.py), so that no library can understand the
file in another way; what the shapes come to is bounded by the model's spec (budget.py). Numbers of fields and of types
are those of onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs.budget import Budget
from tinyusfm_runtime.graphs.onnx_operators import OPERATORS
from tinyusfm_runtime.graphs.protobuf import Field, MessageSchema, read
from tinyusfm_runtime.graphs.tensors import FOLLOWED, Tensor
from tinyusfm_runtime.spec import ModelSpec, TensorSpec

DTYPES: Mapping[int, tuple[str, int]] = {
    1: ("float32", 4), 2: ("uint8", 1), 3: ("int8", 1), 4: ("uint16", 2), 5: ("int16", 2), 6: ("int32", 4),
    7: ("int64", 8), 9: ("bool", 1), 10: ("float16", 2), 11: ("float64", 8), 12: ("uint32", 4), 16: ("bfloat16", 2),
}  # fmt: skip
"""TensorProto.DataType -> name and bytes of one number."""
IR_VERSIONS, OPSETS = range(7, 14), range(13, 27)
"""Versions whose operators are those of ``OPERATORS``."""
MAX_NODES = 20_000
_TYPED = {1: "float_data", 6: "int32_data", 7: "int64_data"}
_DOC = Field("doc", "skip")
_DIM = MessageSchema("a side of a tensor", {1: Field("value", "int")}, {2: "a side without a number"})
_SHAPE = MessageSchema("a shape", {1: Field("dims", _DIM, many=True, most=16)})
_TENSOR_TYPE = MessageSchema("a tensor's type", {1: Field("dtype", "int"), 2: Field("shape", _SHAPE)})
_TYPE = MessageSchema(
    "a type",
    {1: Field("tensor", _TENSOR_TYPE)},
    {4: "a sequence", 5: "a map", 7: "an opaque type", 8: "a sparse tensor", 9: "an optional value"},
)
_VALUE = MessageSchema("the entry of a tensor", {1: Field("name", "text"), 2: Field("type", _TYPE), 3: _DOC})
_TENSOR = MessageSchema(
    "a weight",
    {
        1: Field("dims", "int", many=True, most=16),
        2: Field("dtype", "int"),
        4: Field("float_data", "float", many=True),
        5: Field("int32_data", "int", many=True),
        7: Field("int64_data", "int", many=True),
        8: Field("name", "text"),
        9: Field("raw", "bytes"),
        12: _DOC,
    },
    {3: "a segment", 6: "text", 10: "doubles", 11: "uint64", 13: "external data", 14: "external data", 16: "notes"},
)
_ATTRIBUTE = MessageSchema(
    "an attribute",
    {
        1: Field("name", "text"),
        2: Field("f", "float"),
        3: Field("i", "int"),
        4: Field("s", "bytes"),
        5: Field("t", _TENSOR),
        7: Field("floats", "float", many=True, most=FOLLOWED),
        8: Field("ints", "int", many=True, most=FOLLOWED),
        13: _DOC,
        20: Field("type", "int"),
    },
    {
        6: "a sub-graph",
        9: "texts",
        10: "tensors",
        11: "sub-graphs",
        14: "a type",
        21: "a reference",
        22: "a sparse tensor",
    },
)
_VALUES = {1: "f", 2: "i", 3: "s", 4: "t", 6: "floats", 7: "ints"}
"""AttributeProto.AttributeType -> the field that holds the value."""
_NODE = MessageSchema(
    "an operator",
    {
        1: Field("inputs", "text", many=True, most=4096),
        2: Field("outputs", "text", many=True, most=4096),
        3: Field("name", "text"),
        4: Field("kind", "text"),
        5: Field("attributes", _ATTRIBUTE, many=True, most=64),
        6: _DOC,
        7: Field("domain", "text"),
    },
    {8: "an overload", 9: "notes"},
)
_GRAPH = MessageSchema(
    "the graph",
    {
        1: Field("nodes", _NODE, many=True, most=MAX_NODES),
        2: Field("name", "text"),
        5: Field("weights", _TENSOR, many=True, most=MAX_NODES),
        10: _DOC,
        11: Field("inputs", _VALUE, many=True, most=64),
        12: Field("outputs", _VALUE, many=True, most=1024),
        13: Field("values", _VALUE, many=True, most=MAX_NODES),
    },
    {14: "notes on quantization", 15: "sparse weights", 16: "notes"},
)
_OPSET = MessageSchema("the operators' version", {1: Field("domain", "text"), 2: Field("version", "int")})
_MODEL = MessageSchema(
    "the model",
    {
        1: Field("ir", "int"),
        2: Field("producer", "skip"),
        3: Field("producer_version", "skip"),
        4: Field("domain", "skip"),
        5: Field("version", "int"),
        6: _DOC,
        7: Field("graph", _GRAPH),
        8: Field("opsets", _OPSET, many=True, most=8),
    },
    {14: "notes", 20: "training", 25: "functions", 26: "devices"},
)


def check(model: bytes, takes: TensorSpec, spec: ModelSpec, budget: Budget | None = None) -> None:
    """Checks a whole model.

    Args:
        model: content of the ``.onnx`` file.
        takes: its one input.
        spec: the model's spec, whose input bounds every size.
        budget: adds up what the graph asks for; None makes one.

    Raises:
        EngineError: anything that is not known, does not fit, or is too large.
    """
    if model[4:8] == b"ORTM":  # ONNX Runtime takes such bytes for a format of its own
        raise EngineError("the model is not in the ONNX format")
    found = read(memoryview(model), _MODEL)
    graph = found.get("graph")
    if graph is None or found.get("ir") not in IR_VERSIONS:
        raise EngineError("the model is no ONNX model, or of a version that none of ours has")
    if [(opset.get("domain", ""), opset.get("version") in OPSETS) for opset in found["opsets"]] not in (
        [("", True)],
        [("ai.onnx", True)],
    ):
        raise EngineError("the model asks for operators of another domain or version than ours")
    budget = budget or Budget(spec, len(model))
    known = _weights(graph["weights"])
    _input(graph["inputs"], takes, known)
    for node in graph["nodes"]:
        _apply(node, known, budget)
    for value in (*graph["outputs"], *graph["values"]):
        _agree(value, known)


def _weights(weights: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    known: dict[str, Tensor] = {}
    for weight in weights:
        name = weight.get("name", "")
        if not name or name in known:
            raise EngineError(f"the model names a weight {name!r} twice, or not at all")
        known[name] = _tensor(weight, name)
    return known


def _tensor(weight: Mapping[str, Any], name: str) -> Tensor:
    """A constant; its bytes must be exactly as many as its shape says."""
    number, dims = weight.get("dtype", 0), tuple(weight["dims"])
    if number not in DTYPES or any(side < 0 for side in dims):
        raise EngineError(f"the model's weight {name!r} has a type or a shape that none of ours has")
    dtype, size = DTYPES[number]
    count = math.prod(dims)
    typed = {kind: weight[kind] for kind in _TYPED.values() if weight[kind]}
    raw = weight.get("raw")
    if raw is not None and (typed or len(raw) != count * size):
        raise EngineError(f"the model's weight {name!r} holds {len(raw)} bytes; its shape needs {count * size}")
    if raw is None and (set(typed) - {_TYPED.get(number)} or len(typed.get(_TYPED.get(number, ""), ())) != count):
        raise EngineError(f"the model's weight {name!r} holds another number of values than its shape needs")
    value = None
    if count <= FOLLOWED and dtype in ("int64", "int32", "float32"):
        listed = np.frombuffer(raw, dtype) if raw is not None else np.asarray(typed.get(_TYPED[number], []), dtype)
        value = listed.reshape(dims)
    return Tensor(dims, dtype, value, fixed=True)


def _input(inputs: Sequence[Mapping[str, Any]], takes: TensorSpec, known: dict[str, Tensor]) -> None:
    listed = [(value.get("name", ""), *_declared(value)) for value in inputs]
    wanted = [(takes.name, takes.dtype, tuple(takes.shape))]
    if listed != wanted or takes.name in known:
        raise EngineError(f"the model's inputs are {listed}; the manifest says {wanted}")
    known[takes.name] = Tensor(tuple(takes.shape), takes.dtype)


def _declared(value: Mapping[str, Any]) -> tuple[str | None, tuple[int, ...] | None]:
    """Type and shape as an entry says them, None where it does not."""
    tensor = value.get("type", {}).get("tensor", {})
    shape = tensor.get("shape")
    sides = None if shape is None else tuple(dim.get("value", 0) for dim in shape["dims"])
    return DTYPES.get(tensor.get("dtype", 0), (None, 0))[0], sides


def _agree(value: Mapping[str, Any], known: Mapping[str, Tensor]) -> None:
    """Checks that an entry says what the operators really give.

    An entry of an output or of a tensor in between.
    """
    name = value.get("name", "")
    if name not in known:
        raise EngineError(f"the model names a tensor {name!r} that nothing computes")
    dtype, sides = _declared(value)
    if (sides is not None and sides != known[name].shape) or dtype is None:
        raise EngineError(f"the model's tensor {name!r} is declared as {sides}, its operators give {known[name].shape}")


def _apply(node: Mapping[str, Any], known: dict[str, Tensor], budget: Budget) -> None:
    kind = node.get("kind", "")
    operator = OPERATORS.get(kind)
    if operator is None or node.get("domain", "") not in ("", "ai.onnx"):
        raise EngineError(f"the model holds an operator {kind!r} that no model of ours has")
    attributes = {}
    for attribute in node["attributes"]:
        name = attribute.get("name", "")
        if name not in operator.attributes or name in attributes:
            raise EngineError(f"the model's operator {kind} has an attribute {name!r} that none of ours has, or twice")
        attributes[name] = _attribute(attribute, name)
    missing = [name for name in node["inputs"] if name and name not in known]
    if missing:
        raise EngineError(f"the model's operator {kind} takes {missing[0]!r}, which nothing before it computes")
    inputs = [known[name] if name else None for name in node["inputs"]]
    names = node["outputs"]
    if kind == "Constant":
        made = [_constant(attributes)]
    else:
        prepared = operator.prepare(kind, inputs, attributes, len(names))
        made = budget.apply(prepared, kind)
    for name, tensor in zip(names, made, strict=False):
        if name and name in known:
            raise EngineError(f"the model computes {name!r} twice")
        if name:
            known[name] = tensor
    if len(names) > len(made) or not any(names):
        raise EngineError(f"the model's operator {kind} has {len(names)} outputs")


def _attribute(attribute: Mapping[str, Any], name: str) -> Any:
    """An attribute's value; only the field that its type names may be there."""
    place = _VALUES.get(attribute.get("type", 0))
    there = {key for key in _VALUES.values() if attribute.get(key) not in (None, [])}
    if place is None or there - {place}:
        raise EngineError(f"the model has an attribute {name!r} of a type that none of ours has")
    if place in ("floats", "ints"):
        return attribute[place]
    if place == "t":
        return _tensor(attribute.get("t", {"dims": []}), name)
    if place == "s":
        return bytes(attribute.get("s", b"")).decode("ascii", "replace")
    return attribute.get(place, 0)


def _constant(attributes: Mapping[str, Any]) -> Tensor:
    if len(attributes) != 1:
        raise EngineError("the model's operator Constant has no value, or several")
    ((name, value),) = attributes.items()
    if isinstance(value, Tensor):
        return value
    return Tensor(*_shaped(np.asarray(value, np.float32 if "float" in name else np.int64)))


def _shaped(array: np.ndarray) -> tuple[tuple[int, ...], str, np.ndarray, bool]:
    return array.shape, str(array.dtype), array, True


__all__ = ["DTYPES", "IR_VERSIONS", "MAX_NODES", "OPSETS", "check"]
