"""Runs the program of an ``.mlpackage``, one operator after another.

It is read back from the package's files.

An operator in ops.py is computed there, in float32 and rounded to its declared type; any other by coremltools' own
value inference; one that neither knows is an error. That is no device's arithmetic: a Neural Engine may accumulate in
float16, so passing here is no proof for a device. It does not know bundles, gates or frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_export.graph.inference import repeatable_inference
from tinyusfm_export.targets.coreml.ops import OPERATORS
from tinyusfm_runtime.engines import one_line
from tinyusfm_runtime.engines.coreml import import_coremltools
from tinyusfm_runtime.errors import EdgeError, EngineError, UnsupportedError

VALUE_INFERENCE = frozenset(
    {"abs", "add", "cast", "concat", "mul", "relu", "reshape", "slice_by_index", "slice_by_size", "split"}
    | {"transpose"}
)
"""Operators that coremltools' own value inference computes; each is held against torch by a test."""


class Program:
    """The main function of a saved package.

    Attributes:
        spec: Core ML's own description of the package.
        counts: way -> number of operators of the last run: ``torch``, ``coremltools``, ``const``.
    """

    def __init__(self, package: Path) -> None:
        """Reads a package.

        Args:
            package: folder ``NAME.mlpackage``.

        Raises:
            MissingExtra: coremltools is not installed.
            EngineError: it cannot be read.
            UnsupportedError: it holds an operator that nothing here computes.
        """
        coremltools = import_coremltools()
        from coremltools.converters.mil.frontend.milproto.load import load

        try:
            model = coremltools.models.MLModel(str(package), skip_model_load=True)
            self.spec = model.get_spec()
            program = load(self.spec, self.spec.specificationVersion, model.weights_dir)
            self._function = program.functions["main"]
        except Exception as error:  # coremltools has no class of its own for what it cannot read
            raise EngineError(f"the Core ML package cannot be read: {one_line(error, 200)}") from error
        self.counts: Counter[str] = Counter()
        known = {*OPERATORS, *VALUE_INFERENCE, "const"}
        unknown = sorted({op.op_type for op in self._function.operations} - known)
        if unknown:
            raise UnsupportedError(f"the Core ML program has operators nothing here computes: {', '.join(unknown)}")
        self._weights = {
            op.outputs[0]: _by_torch(op, {var: var.val for var in op.inputs.values()})
            for op in self._function.operations
            if op.op_type.startswith("constexpr_")
        }
        self._tensors: dict[Any, Any] = {}

    @property
    def operators(self) -> Counter[str]:
        """Way -> number of operators of the whole program, constants aside."""
        kinds = [op.op_type for op in self._function.operations if op.op_type != "const"]
        return Counter("torch" if kind in OPERATORS else "coremltools" for kind in kinds)

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Computes the outputs.

        Args:
            inputs: name -> array of the declared shape.

        Returns:
            Name -> array of the declared type.

        Raises:
            EngineError: an input is missing, an operator cannot be computed on what it is given, or gives another shape
                than the program declares.
        """
        if set(inputs) != set(self._function.inputs):
            raise EngineError(f"the Core ML program takes {', '.join(self._function.inputs)}")
        self.counts = Counter()
        values: dict[Any, Any] = {var: np.asarray(inputs[name]) for name, var in self._function.inputs.items()}
        for op in self._function.operations:
            try:
                results = self._compute(op, values)
            except EdgeError:
                raise
            except Exception as error:  # torch and coremltools raise many kinds where shapes do not fit
                raise EngineError(f"operator {op.op_type} cannot be computed: {one_line(error, 200)}") from error
            for var, result in zip(op.outputs, results, strict=True):
                if op.op_type != "const" and tuple(np.shape(result)) != tuple(var.shape):
                    raise EngineError(f"operator {op.op_type} gives {np.shape(result)}, {tuple(var.shape)} is declared")
                values[var] = result
        return {var.name: values[var] for var in self._function.outputs}

    def _compute(self, op: Any, values: dict[Any, Any]) -> list[Any]:
        if op.op_type == "const":
            self.counts["const"] += 1
            return [op.outputs[0].val]
        if op.op_type in OPERATORS:
            self.counts["torch"] += 1
            if op.outputs[0] in self._weights:
                return [self._weights[op.outputs[0]]]
            return [_by_torch(op, values, self._tensors)]
        self.counts["coremltools"] += 1
        return _by_inference(op, values)


def _by_torch(op: Any, values: dict[Any, Any], kept: dict[Any, Any] | None = None) -> np.ndarray:
    """One operator over torch.

    Args:
        op: the operator.
        values: variable -> what it holds.
        kept: constant -> its float32 tensor, filled as constants are met: most of a program's bytes are weights.
    """
    from coremltools.converters.mil.mil.types import nptype_from_builtin

    arguments: dict[str, Any] = {}
    for name, var in op.inputs.items():
        value = values.get(var)
        if isinstance(value, np.ndarray) and value.dtype.kind == "f":
            known = None if kept is None else kept.get(var)
            value = _float32(value) if known is None else known
            if kept is not None and var.op is not None and var.op.op_type.startswith("const"):
                kept[var] = value
        arguments[name] = value
    with repeatable_inference():
        found = OPERATORS[op.op_type](arguments)
        wanted = nptype_from_builtin(op.outputs[0].dtype)
        # torch rounds to float16 as numpy does, to nearest even, and ten times faster
        return np.asarray(found.half().numpy() if wanted is np.float16 else found.numpy().astype(wanted))


def _float32(value: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(np.ascontiguousarray(value)).reshape(value.shape).float()


def _by_inference(op: Any, values: dict[Any, Any]) -> list[Any]:
    """coremltools' inference on the operator's own inputs.

    They carry our values for as long as it takes.
    """
    flat = [v for var in op.inputs.values() for v in (var if isinstance(var, (list, tuple)) else (var,))]
    saved = [(var, var._sym_val) for var in flat if var in values and var.op is not None and var.op.op_type != "const"]
    saved += [(var, var._sym_val) for var in flat if var in values and var.op is None]
    try:
        for var, _ in saved:
            var._sym_val = _wrapped(var, values[var])
        found = type(op).value_inference(op)
    finally:
        for var, before in saved:
            var._sym_val = before
    if found is None:
        raise UnsupportedError(f"coremltools' inference has no value for {op.op_type}")
    results = list(found) if isinstance(found, (list, tuple)) else [found]
    return [np.asarray(getattr(result, "val", result)) for result in results]


def _wrapped(var: Any, value: Any) -> Any:
    made = var.sym_type()
    made.val = value
    return made


__all__ = ["VALUE_INFERENCE", "Program"]
