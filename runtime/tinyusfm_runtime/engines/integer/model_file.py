"""The integer engine's file.

A strict reader of the model that the tensors of a safetensors file are; bundle/arrays.py reads the file itself.

Every number is checked before memory is taken. It needs numpy and the standard library alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import numpy as np

from tinyusfm_runtime.bundle.arrays import ArrayLimits, unpack_arrays
from tinyusfm_runtime.engines.integer.bounds import check_operation
from tinyusfm_runtime.engines.integer.layout import (
    F32,
    FIELDS,
    I16,
    I32,
    KINDS,
    MAX_BUFFERS,
    MAX_ELEMENTS,
    MAX_MEMORY_BYTES,
    MAX_OPERATIONS,
    MAX_PORTS,
    MAX_PRODUCTS,
    MODEL_VERSION,
    TYPES,
    U8,
    Buffer,
    Model,
    Operation,
    Port,
    Ports,
)
from tinyusfm_runtime.errors import BundleError, EngineError

SAFE_TYPES = {"U8": "u1", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
"""Element types that an integer model may hold, by their names in a safetensors header."""
LIMITS = ArrayLimits(header_bytes=4 << 20, members=16 * MAX_OPERATIONS, axes=4, types=frozenset(SAFE_TYPES))
"""Of the file; the header of ours takes about 100 kB."""


def read_tensors(content: bytes) -> dict[str, np.ndarray]:
    """Tensors of a safetensors file, as read-only views of its bytes.

    Args:
        content: the whole file.

    Raises:
        EngineError: it is no safetensors file, or one that holds something else than integers.
    """
    try:
        return unpack_arrays(content, "the integer model", limits=LIMITS)
    except BundleError as error:
        raise EngineError(f"{error}: export it again") from error


def read_ports(tensors: Mapping[str, np.ndarray]) -> Ports:
    """The input and the outputs alone.

    Of a model that the compiled engine checks as ``read_model`` does.

    Args:
        tensors: of ``model.safetensors``.

    Raises:
        EngineError: they are no model of this version, or its ports are not usable.
    """
    _, _, port_count = _header(tensors)
    ports = _ports(_table(tensors, "ports", port_count, 6), tensors)
    return Ports(input=ports[0], outputs=ports[1:])


def read_model(tensors: Mapping[str, np.ndarray]) -> Model:
    """Checks a file's tensors and gives the model they are.

    Args:
        tensors: of ``model.safetensors``.

    Raises:
        EngineError: they are no model of this version, or could overflow.
    """
    buffer_count, operation_count, port_count = _header(tensors)
    buffers = tuple(_buffer(row) for row in _table(tensors, "buffers", buffer_count, 3))
    ports = _ports(_table(tensors, "ports", port_count, 6), tensors)
    owned = _owned(tensors, operation_count)
    rows = _table(tensors, "operations", operation_count, FIELDS)
    operations = tuple(_operation(number, row, owned[number], len(buffers)) for number, row in enumerate(rows))
    _check_budget(buffers, operations)
    if buffers[0].dtype != ports[0].dtype or prod(buffers[0].shape) != prod(ports[0].shape):
        raise EngineError("the integer model's input does not fit its first buffer: export the bundle again")
    for number, operation in enumerate(operations):
        try:
            check_operation(operation, buffers, ports)
        except ValueError as error:
            raise EngineError(f"operation {number} ({operation.kind}) of the integer model: {error}") from error
    written = [operation["port"] for operation in operations if operation.kind == "output"]
    if sorted(written) != list(range(1, len(ports))):
        raise EngineError("the integer model does not write each of its outputs once: export the bundle again")
    return Model(buffers=buffers, operations=operations, input=ports[0], outputs=ports[1:])


def _check_budget(buffers: Sequence[Buffer], operations: Sequence[Operation]) -> None:
    """Refuses what no model of this family needs, before memory is taken.

    The C engine does the same.
    """
    held = sum(prod(buffer.shape) * np.dtype(TYPES[buffer.dtype]).itemsize for buffer in buffers)
    if held > MAX_MEMORY_BYTES:
        raise EngineError(f"the integer model's buffers take {held >> 20} MiB; {MAX_MEMORY_BYTES >> 20} are the most")
    products = 0
    for operation in operations:
        source, target = buffers[operation.source], buffers[operation.target]
        weight = operation.tensors.get("weight")
        each = weight.size // max(1, len(weight)) if weight is not None and weight.ndim else 1
        if operation.kind == "attention":
            each = 2 * source.rows
        products += max(prod(source.shape), prod(target.shape) * each)
    if products > MAX_PRODUCTS:
        raise EngineError(f"the integer model multiplies {products:.2g} times for an answer: no model of ours does")


def _header(tensors: Mapping[str, np.ndarray]) -> tuple[int, int, int]:
    found = tensors.get("model")
    if found is None or found.dtype != np.dtype("<i4") or found.shape != (4,):
        raise EngineError("this is no integer model: export the bundle again")
    version, buffers, operations, ports = (int(number) for number in found)
    if version != MODEL_VERSION:
        raise EngineError(f"integer model of version {version}, this engine reads {MODEL_VERSION}: export it again")
    limits = ((buffers, 1, MAX_BUFFERS), (operations, 1, MAX_OPERATIONS), (ports, 2, MAX_PORTS))
    if not all(low <= number <= high for number, low, high in limits):
        raise EngineError("the integer model's counts are out of range: export the bundle again")
    return buffers, operations, ports


def _table(tensors: Mapping[str, np.ndarray], name: str, rows: int, columns: int) -> list[list[int]]:
    found = tensors.get(name)
    if found is None or found.dtype != np.dtype("<i4") or found.shape != (rows, columns):
        raise EngineError(f"the integer model's table of {name} is missing or of another shape: export it again")
    table: list[list[int]] = found.tolist()
    return table


def _buffer(row: list[int]) -> Buffer:
    dtype, rows, columns = row
    if dtype not in (U8, I16, I32, F32) or rows < 1 or columns < 1 or rows * columns > MAX_ELEMENTS:
        raise EngineError(f"a buffer of the integer model has type {dtype} and {rows} x {columns} elements")
    return Buffer(dtype=dtype, rows=rows, columns=columns)


def _ports(rows: list[list[int]], tensors: Mapping[str, np.ndarray]) -> tuple[Port, ...]:
    listed = tensors.get("names")
    if listed is None or listed.dtype != np.dtype("u1") or listed.ndim != 1 or listed.size > 4096:
        raise EngineError("the integer model names no ports: export the bundle again")
    names = listed.tobytes().decode("ascii", "replace").split("\n")
    if len(names) != len(rows) or len(set(names)) != len(names) or not all(_is_plain(name) for name in names):
        raise EngineError("the integer model's port names are not usable: export the bundle again")
    ports = []
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        dtype, axes, *sides = row
        shape = tuple(sides[:axes]) if 1 <= axes <= 4 else ()
        types = (U8, F32) if number == 0 else (F32,)
        if not shape or any(side < 1 or side > MAX_ELEMENTS for side in shape) or dtype not in types:
            raise EngineError(f"port {name!r} of the integer model has type {dtype} and shape {shape}")
        if prod(shape) > MAX_ELEMENTS:
            raise EngineError(f"port {name!r} of the integer model has {prod(shape)} elements, which is too many")
        ports.append(Port(name=name, dtype=dtype, shape=shape))
    return tuple(ports)


def _is_plain(name: str) -> bool:
    return 0 < len(name) <= 64 and name.isascii() and name.replace("_", "a").replace(".", "a").isalnum()


def _owned(tensors: Mapping[str, np.ndarray], operations: int) -> list[dict[str, np.ndarray]]:
    found: list[dict[str, np.ndarray]] = [{} for _ in range(operations)]
    for name, value in tensors.items():
        number, dot, role = name.partition(".")
        if not dot:
            continue
        if not number.isdecimal() or str(int(number)) != number or int(number) >= operations:
            raise EngineError(f"tensor {name[:64]!r} belongs to no operation of the integer model: export it again")
        found[int(number)][role] = value
    if extra := sorted({n for n in tensors if "." not in n} - {"model", "buffers", "operations", "ports", "names"}):
        raise EngineError(f"the integer model holds an unknown tensor {extra[0][:64]!r}: export it again")
    return found


def _operation(number: int, row: list[int], tensors: dict[str, np.ndarray], buffers: int) -> Operation:
    kind, source, target, *values = row
    if kind not in KINDS:
        raise EngineError(f"operation {number} of the integer model is of unknown kind {kind}: export it again")
    name, fields = KINDS[kind]
    if not (0 <= source < buffers and 0 <= target < buffers) or any(values[len(fields) :]):
        raise EngineError(f"operation {number} ({name}) of the integer model has numbers out of range")
    numbers = dict(zip(fields, values, strict=False))
    return Operation(kind=name, source=source, target=target, fields=numbers, tensors=tensors)


__all__ = ["LIMITS", "SAFE_TYPES", "read_model", "read_ports", "read_tensors"]
