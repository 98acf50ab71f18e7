"""Core ML packages: what may stand in the program.

Operation by operation, and no more.

One function of plain operations from one image; no nested blocks (control flow, loops), no custom layers, no other
model types, no weights outside the package's own file. Sizes are measured (mil_shapes.py), bounded by the model's
spec, and must be the ones that the package declares. Numbers of fields are those of
coremltools' Model.proto and MIL.proto (https://github.com/apple/coremltools/tree/main/mlmodel/format).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs.budget import Budget
from tinyusfm_runtime.graphs.mil_shapes import measured, node_of, shape_of_type
from tinyusfm_runtime.graphs.protobuf import Field, MessageSchema, read
from tinyusfm_runtime.graphs.tensors import Tensor
from tinyusfm_runtime.spec import ModelSpec
from tinyusfm_runtime.strict_json import parse_json

OPERATIONS: Mapping[str, frozenset[str]] = {
    kind: frozenset(inputs.split())
    for kind, inputs in {
        "add": "x y", "sub": "x y", "mul": "x y", "real_div": "x y", "maximum": "x y", "minimum": "x y", "abs": "x",
        "relu": "x", "sigmoid": "x", "tanh": "x", "exp": "x", "sqrt": "x", "rsqrt": "x epsilon", "clip": "x alpha beta",
        "gelu": "x mode", "softmax": "x axis", "layer_norm": "x axes gamma beta epsilon",
        "batch_norm": "x mean variance gamma beta epsilon", "cast": "x dtype", "const": "",
        "linear": "x weight bias", "matmul": "x y transpose_x transpose_y",
        "conv": "x weight bias strides pad_type pad dilations groups",
        "avg_pool": "x kernel_sizes strides pad_type pad exclude_padding_from_average ceil_mode",
        "max_pool": "x kernel_sizes strides pad_type pad ceil_mode",
        "reshape": "x shape", "transpose": "x perm", "concat": "values axis interleave",
        "gather": "x indices axis batch_dims validate_indices",
        "split": "x num_splits split_sizes axis", "slice_by_size": "x begin size",
        "slice_by_index": "x begin end stride begin_mask end_mask squeeze_mask", "squeeze": "x axes",
        "expand_dims": "x axes", "reduce_mean": "x axes keep_dims", "reduce_max": "x axes keep_dims",
        "reduce_sum": "x axes keep_dims", "upsample_bilinear": "x scale_factor_height scale_factor_width align_corners",
        "resize_bilinear": "x target_size_height target_size_width sampling_mode",
        "upsample_nearest_neighbor": "x scale_factor_height scale_factor_width",
        "quantize": "input zero_point scale output_dtype axis", "dequantize": "input zero_point scale axis",
        "constexpr_affine_dequantize": "", "constexpr_lut_to_dense": "",
    }.items()
}  # fmt: skip
"""Operation -> the inputs it may have."""
_ATTRIBUTES = {
    "const": frozenset({"name", "val"}),
    "constexpr_affine_dequantize": frozenset({"name", "axis", "quantized_data", "scale", "zero_point"}),
    "constexpr_lut_to_dense": frozenset({"name", "indices", "lut", "shape"}),
}
WEIGHTS = "@model_path/weights/weight.bin"
"""The one file that values may lie in."""
_PATHS = ("com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights")
_SKIP = Field("skipped", "skip")


def _map(name: str, value: MessageSchema) -> MessageSchema:
    """Entries of a map from text."""
    return MessageSchema(name, {1: Field("key", "text"), 2: Field("value", value)})


_CONSTANT_SIDE = MessageSchema("a side", {1: Field("size", "int")})
_SIDE = MessageSchema("a side", {1: Field("constant", _CONSTANT_SIDE)}, {2: "a side without a number"})
_TENSOR_TYPE = MessageSchema(
    "a tensor's type",
    {1: Field("dtype", "int"), 2: Field("rank", "int"), 3: Field("sides", _SIDE, many=True, most=16)},
    {4: "attributes"},
)
_TYPE = MessageSchema(
    "a type", {1: Field("tensor", _TENSOR_TYPE)}, {2: "a list", 3: "a tuple", 4: "a table", 5: "a state"}
)
_NAMED = MessageSchema("an entry", {1: Field("name", "text"), 2: Field("type", _TYPE)})
_VALUES = {
    kind: MessageSchema(f"values ({kind})", {1: Field("values", kind, many=True, most=1 << 20)})
    for kind in ("float", "int", "double")
}
_TEXTS = MessageSchema("texts", {1: Field("values", "text", many=True, most=64)})
_BYTES = MessageSchema("bytes", {1: Field("values", "bytes")})
_TENSOR_VALUE = MessageSchema(
    "a tensor's value",
    {
        1: Field("floats", _VALUES["float"]),
        2: Field("ints", _VALUES["int"]),
        3: Field("bools", _VALUES["int"]),
        4: Field("strings", _TEXTS),
        5: Field("longs", _VALUES["int"]),
        6: Field("doubles", _VALUES["double"]),
        7: Field("bytes", _BYTES),
    },
)
_IMMEDIATE = MessageSchema("a value", {1: Field("tensor", _TENSOR_VALUE)}, {2: "a tuple", 3: "a list", 4: "a table"})
_BLOB = MessageSchema("a place in the weights", {1: Field("file", "text"), 2: Field("offset", "int")})
_VALUE = MessageSchema(
    "a value",
    {1: _SKIP, 2: Field("type", _TYPE), 3: Field("immediate", _IMMEDIATE), 5: Field("blob", _BLOB)},
)
_BINDING = MessageSchema("an argument", {1: Field("name", "text")}, {2: "a value in place of a name"})
_ARGUMENT = MessageSchema("an argument", {1: Field("arguments", _BINDING, many=True, most=4096)})
_OPERATION = MessageSchema(
    "an operation",
    {
        1: Field("kind", "text"),
        2: Field("inputs", _map("an input", _ARGUMENT), many=True, most=64),
        3: Field("outputs", _NAMED, many=True, most=1024),
        5: Field("attributes", _map("an attribute", _VALUE), many=True, most=64),
    },
    {4: "nested blocks (control flow)"},
)
_BLOCK = MessageSchema(
    "the block",
    {
        2: Field("outputs", "text", many=True, most=1024),
        3: Field("operations", _OPERATION, many=True, most=20_000),
    },
    {1: "inputs of a block", 4: "attributes"},
)
_FUNCTION = MessageSchema(
    "the function",
    {
        1: Field("inputs", _NAMED, many=True, most=16),
        2: Field("opset", "text"),
        3: Field("blocks", _map("a block", _BLOCK), many=True, most=1),
    },
    {4: "attributes"},
)
_PROGRAM = MessageSchema(
    "the program",
    {
        1: Field("version", "int"),
        2: Field("functions", _map("a function", _FUNCTION), many=True, most=1),
        3: Field("doc", "skip"),
        4: Field("notes", "skip", many=True, most=64),
    },
)
_MODEL = MessageSchema(
    "the model",
    {
        1: Field("version", "int"),
        2: Field("description", "skip"),
        10: Field("updatable", "int"),
        502: Field("program", _PROGRAM),
    },
)


def check(files: Mapping[str, bytes], spec: ModelSpec) -> None:
    """Checks a whole package.

    Args:
        files: ``model.mlmodel``, ``weight.bin`` and ``Manifest.json``.
        spec: the model's spec, whose input bounds every size.

    Raises:
        EngineError: anything that is not known, does not fit, or is too large.
    """
    _check_table(files["Manifest.json"])
    weights = files["weight.bin"]
    found = read(memoryview(files["model.mlmodel"]), _MODEL)
    if "program" not in found or found.get("updatable", 0):
        raise EngineError("the package holds no MIL program, or one that goes on learning")
    functions = found["program"]["functions"]
    if [entry.get("key") for entry in functions] != ["main"] or len(functions[0]["value"]["blocks"]) != 1:
        raise EngineError("the package's program has other functions than main, or several blocks")
    function = functions[0]["value"]
    budget = Budget(spec, sum(map(len, files.values())))
    tensors = {entry.get("name", ""): Tensor(shape_of_type(entry.get("type", {}))) for entry in function["inputs"]}
    if [tensor.shape for tensor in tensors.values()] != [tuple(spec.input.shape)]:
        raise EngineError("the package's program has several inputs, or one of another size than the model's")
    for operation in function["blocks"][0]["value"]["operations"]:
        _check_operation(operation, tensors, weights, budget)


def _check_operation(operation: Mapping[str, Any], tensors: dict[str, Tensor], weights: bytes, budget: Budget) -> None:
    """Holds an operation against the allow-list, and its sizes against its inputs."""
    kind = operation.get("kind", "")
    if kind not in OPERATIONS:
        raise EngineError(f"the model holds an operation {kind!r} that no model of ours has")
    inputs: dict[str, list[Tensor]] = {}
    for entry in operation["inputs"]:
        if entry.get("key", "") not in OPERATIONS[kind]:
            raise EngineError(f"the model's operation {kind} has an input {entry.get('key')!r} that none of ours has")
        names = [argument.get("name", "") for argument in entry.get("value", {}).get("arguments", [])]
        if any(name not in tensors for name in names):
            raise EngineError(f"the model's operation {kind} takes what nothing before it computes")
        inputs[entry["key"]] = [tensors[name] for name in names]
    attributes: dict[str, Tensor] = {}
    for entry in operation["attributes"]:
        if entry.get("key", "") not in _ATTRIBUTES.get(kind, frozenset({"name"})):
            raise EngineError(
                f"the model's operation {kind} has an attribute {entry.get('key')!r} that none of ours has"
            )
        value = entry.get("value", {})
        blob = value.get("blob")
        if blob is not None and (blob.get("file") != WEIGHTS or not 0 <= blob.get("offset", 0) < len(weights)):
            raise EngineError("the model has a value that lies outside its own weights")
        if entry["key"] != "name":
            attributes[entry["key"]] = measured(value, weights, kind)
    made = _made(kind, inputs, attributes, len(operation["outputs"]), budget)
    for output, tensor in zip(operation["outputs"], made, strict=True):
        name, declared = output.get("name", ""), shape_of_type(output.get("type", {}))
        if not name or name in tensors:
            raise EngineError(f"the model computes {name!r} twice")
        if declared != tensor.shape:
            raise EngineError(
                f"the model's operation {kind} declares a tensor of {list(declared)} and makes one of "
                f"{list(tensor.shape)}"
            )
        tensors[name] = tensor


def _made(
    kind: str, inputs: Mapping[str, list[Tensor]], attributes: Mapping[str, Tensor], outputs: int, budget: Budget
) -> list[Tensor]:
    if kind == "const":
        if outputs != 1 or "val" not in attributes:
            raise EngineError("the model holds a constant without a value")
        budget.declare(attributes["val"].shape, kind, fixed=True)
        return [attributes["val"]]
    try:
        node = node_of(kind, inputs, attributes, outputs)
    except (ValueError, KeyError, IndexError) as error:
        raise EngineError(f"the model's operation {kind} does not fit its inputs: {error}") from error
    made = budget.apply(node, kind)
    if len(made) != outputs:
        raise EngineError(f"the model's operation {kind} has another number of outputs than it makes")
    return made


def _check_table(raw: bytes) -> None:
    """The package's table of contents names our two places and nothing else."""
    try:
        if len(raw) > 1 << 16:
            raise ValueError("too long")
        entries = parse_json(raw)["itemInfoEntries"]
        paths = sorted(entry["path"] for entry in entries.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError("the package's Manifest.json is not one that we write") from error
    if paths != sorted(_PATHS):
        raise EngineError("the package's Manifest.json names other files than ours")


__all__ = ["OPERATIONS", "WEIGHTS", "check"]
