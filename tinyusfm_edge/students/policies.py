"""Which layers of a student keep more than 8 bits in INT8.

By its own measurement, by one that is given, or by the defaults.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import parse_json

if TYPE_CHECKING:
    from tinyusfm_export.quantize.ptq import PtqPolicy
    from tinyusfm_runtime.spec import ModelSpec


def int8_policies(
    spec: ModelSpec, shipped: str = "", *, mixed: Path | None = None, weight_bits: int = 8
) -> tuple[PtqPolicy, ...]:
    """INT8 policies to try in turn.

    The default ones, with the layers that a shipped student keeps above 8 bits; or ever fewer layers by what they were
    measured to cost.

    Args:
        spec: of the student.
        shipped: its name, where it is a shipped one: its ``wide.json`` counts where it has one.
        mixed: measurement of the sensitivity command, or None.
        weight_bits: of the weights, 4 to 8; a shipped student's choice is for 8.

    Raises:
        InputError: the measurement cannot be read or is of another student.
        CalibrationError: the student's ``wide.json`` is damaged or of other weights.
    """
    from tinyusfm_edge import students
    from tinyusfm_export.artefacts import default_policies
    from tinyusfm_export.quantize.ptq import PtqPolicy
    from tinyusfm_export.quantize.sensitivity import Sensitivity, mixed_policies

    limit = 2 ** (weight_bits - 1) - 1
    if mixed is None:
        own = students.wide_layers(shipped) if shipped and weight_bits == 8 else ()
        return tuple(
            replace(policy, weight_limit=limit, keep_float=policy.keep_float + own)
            for policy in default_policies(spec.task)
        )
    try:
        found = Sensitivity.from_json(parse_json(mixed.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise InputError(f"--mixed {mixed.name} cannot be read: tinyusfm-edge sensitivity writes it") from error
    if found.weights_sha256 != spec.weights_sha256:
        raise InputError(f"--mixed {mixed.name} was measured on another student: measure this one")
    return mixed_policies(found, PtqPolicy(weight_limit=limit))


__all__ = ["int8_policies"]
