"""The one quantization decision.

Which tensors are 8-bit, with which ranges, and what the rest computes in.

A decision names activation tensors of the export graph (``blocks.3.mlp.fc1.input``, see graph.py). A layer whose
input is ``static`` or ``dynamic`` has int8 weights, symmetric, one scale per output channel; that is implied and
has no entry of its own. Every target writes the same decision in the form its engine runs well: explicit Q/DQ
(onnx_int8.py), FakeQuantize (targets/ov.py), dynamic int8 matmuls (onnx_int8.py).

It is plain data: no torch, no onnx, no engine, no idea how the ranges were found.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import refusing

DECISION_VERSION = 1
"""Version of the JSON form; raise it when a key changes its meaning."""

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "w6", "w4")
"""What an artefact may be called; w6 and w4 have palettised weights and float activations."""
PALETTE_BITS = {"w6": 6, "w4": 4}
"""Precision -> bits of a weight's index into its palette."""

RestPrecision = Literal["f32", "bf16"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorQuant:
    """How one activation tensor is represented.

    Attributes:
        mode: ``static`` has a range fixed at export, ``dynamic`` finds it per frame, ``float`` stays in the rest
            precision.
        low: smallest value of the static range, or None.
        high: largest value of the static range, or None.
        symmetric: the code grid must be symmetric about zero in every form. Where it is False a form may use the range
            as it is (unsigned codes with an offset); a form that only knows symmetric codes takes max(-low, high).
    """

    mode: Literal["static", "dynamic", "float"]
    low: float | None = None
    high: float | None = None
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.mode not in ("static", "dynamic", "float"):
            raise InputError(f"quantization mode {self.mode!r} is not one of static, dynamic, float")
        if self.mode != "static":
            if self.low is not None or self.high is not None:
                raise InputError(f"a {self.mode} tensor has no range")
            return
        if self.low is None or self.high is None or not math.isfinite(self.low) or not math.isfinite(self.high):
            raise InputError(f"a static tensor needs a finite range, not {self.low} to {self.high}")
        if not self.low < self.high or self.low > 0.0 or self.high < 0.0:
            raise InputError(f"range {self.low} to {self.high} must be ordered and contain zero")

    @property
    def bound(self) -> float:
        """Half-width of the symmetric grid that covers a static range.

        Raises:
            InputError: the tensor is not static.
        """
        if self.low is None or self.high is None:
            raise InputError("only a static tensor has a bound")
        return max(-self.low, self.high)


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantDecision:
    """One decision for all targets, stored in the bundle.

    Attributes:
        precision: what the artefact is called: fp32, fp16, bf16 or int8.
        rest_precision: arithmetic of everything that is not int8, ``f32`` or ``bf16``; always explicit.
        tensors: activation tensor name -> how it is represented; names that are absent are float.
        set_id: calibration set the ranges came from, or None.
        method: how the ranges were found (``minmax``, ``percentile``, ...), or ``none``.
        weight_limit: largest weight code: 127 for 8-bit weights, 7 for 4-bit ones (stored in 8 bits all the same).
        spans: smallest and largest value of further tensors, for targets without any float, see spans.py.
        version: version of this form.
    """

    precision: str
    rest_precision: RestPrecision
    tensors: dict[str, TensorQuant] = field(default_factory=dict)
    set_id: str | None = None
    method: str = "none"
    weight_limit: int = 127
    spans: dict[str, tuple[float, float]] = field(default_factory=dict)
    version: int = DECISION_VERSION

    def __post_init__(self) -> None:
        if self.version != DECISION_VERSION:
            raise InputError(f"quantization decision of version {self.version}: this toolkit reads {DECISION_VERSION}")
        if self.precision not in PRECISIONS:
            raise InputError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if type(self.weight_limit) is not int or not 1 <= self.weight_limit <= 127:
            raise InputError(f"the largest weight code is 1 to 127, not {self.weight_limit!r}")
        if self.rest_precision not in ("f32", "bf16"):
            raise InputError(f"rest precision {self.rest_precision!r} is not f32 or bf16")
        if self.precision == "bf16" and self.rest_precision != "bf16":
            raise InputError("a bf16 artefact has rest precision bf16")
        if self.precision not in ("bf16", "int8") and self.rest_precision != "f32":
            raise InputError(f"a {self.precision} artefact has rest precision f32")
        if (self.precision == "int8") != any(t.mode != "float" for t in self.tensors.values()):
            raise InputError(f"a {self.precision} decision and its quantized tensors contradict each other")

    def quantized(self) -> dict[str, TensorQuant]:
        """The tensors that are not float, in name order."""
        return {name: quant for name, quant in sorted(self.tensors.items()) if quant.mode != "float"}

    def to_json(self) -> dict[str, Any]:
        """Plain data, tensors in name order."""
        data = asdict(self)
        data["tensors"] = {name: data["tensors"][name] for name in sorted(data["tensors"])}
        spans = data.pop("spans")
        return {**data, "spans": {name: list(spans[name]) for name in sorted(spans)}} if spans else data

    @classmethod
    @refusing("the quantization decision", InputError)
    def from_json(cls, data: dict[str, Any]) -> QuantDecision:
        """Reads what ``to_json`` wrote.

        Raises:
            InputError: unknown keys, another version, or a contradiction.
        """
        unknown = set(data) - {f.name for f in fields(cls)}
        if unknown:
            raise InputError(f"quantization decision has unknown keys {sorted(unknown)}")
        try:
            tensors = {str(name): TensorQuant(**quant) for name, quant in dict(data.get("tensors", {})).items()}
            spans = {str(name): (float(low), float(high)) for name, (low, high) in dict(data.get("spans", {})).items()}
            return cls(**{**data, "tensors": tensors, "spans": spans})
        except (TypeError, ValueError) as error:
            raise InputError(f"quantization decision is not usable: {error}") from error


def float_decision(precision: str) -> QuantDecision:
    """The decision of an artefact without int8.

    Args:
        precision: fp32, fp16 (storage; a CPU computes in f32), bf16, w6 or w4.

    Raises:
        InputError: int8 or an unknown name.
    """
    return QuantDecision(precision=precision, rest_precision="bf16" if precision == "bf16" else "f32")


__all__ = [
    "DECISION_VERSION",
    "PALETTE_BITS",
    "PRECISIONS",
    "QuantDecision",
    "RestPrecision",
    "TensorQuant",
    "float_decision",
]
