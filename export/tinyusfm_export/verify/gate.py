"""Gate: the thresholds an artefact must hold against the reference.

Also the judgement of a comparison by them.

The defaults are the project's promise; a file (TOML or JSON, flat keys) changes them and is written into the bundle
with the verdict. It does not know how anything was measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from tinyusfm_export.verify.parity import MIN_COVERAGE, Comparison, GateLine, ParityReport
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import PostProcess, Task
from tinyusfm_runtime.strict_json import check_values, parse_json, refusing

GATE_VERSION = 1
"""Version of the file form."""

FLOAT_PRECISIONS = ("fp32", "fp16")
"""Precisions whose logits are those of the reference but for rounding of float32 or float16."""
_MAX_GATE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Gate:
    """Thresholds; all of them are inclusive.

    Attributes:
        dice_mean: least mean Dice against the reference mask.
        dice_worst: least Dice of any counted frame.
        hc_p95_mm: largest 95th percentile of the difference in head circumference, mm.
        hc_p95_share: the same as a share of the circumference, judged where no counted frame has a spacing: 1 mm of the
            175 mm that heads of HC18 measure on average (van den Heuvel et al. 2018, doi:10.1371/journal.pone.0200412).
        differing_pixels: largest share of differing pixels of any frame whose reference mask does not count.
        min_coverage: share of the image from which a reference mask counts.
        min_frames: least number of frames that Dice and HC, scores or features are judged on.
        top1: least share of frames with the same most probable label.
        drift_mean: largest mean over frames of the largest change of a probability.
        probability_drift: largest change of any probability of any frame.
        same_reading: least share of frames that both sides call good, doubtful or none alike, where the model has
            thresholds for its readings.
        same_exit: with early exits, least share of frames that stop at the exit the reference stops at. A frame on the
            edge of a threshold may go either way: what counts is that nearly all do not.
        cosine_mean: least mean cosine of the features.
        cosine: least cosine of any frame.
        float_logits: largest mean change of the logits as a share of the reference's, for artefacts that keep float32
            or float16 everywhere. A mask hardly feels a wrong axis in a late block or one spoilt weight; these do.
        version: of this form.
    """

    dice_mean: float = 0.99
    dice_worst: float = 0.95
    hc_p95_mm: float = 1.0
    hc_p95_share: float = 0.0057
    differing_pixels: float = 0.005
    min_coverage: float = MIN_COVERAGE
    min_frames: int = 32
    top1: float = 0.99
    drift_mean: float = 0.02
    probability_drift: float = 0.10
    same_reading: float = 0.95
    same_exit: float = 0.95
    cosine_mean: float = 0.99
    cosine: float = 0.97
    float_logits: float = 0.01
    version: int = GATE_VERSION

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a threshold that is no number, out of range, or of another version.
        """
        if self.version != GATE_VERSION:
            raise InputError(f"gate version {self.version!r} is not {GATE_VERSION}")
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
                raise InputError(f"gate {name} = {value!r} is not a number")
            if value < 0 or (name not in ("hc_p95_mm", "min_frames", "version") and value > 1):
                raise InputError(f"gate {name} = {value!r} is out of range")
        if not isinstance(self.min_frames, int) or self.min_frames < 1:
            raise InputError(f"gate min_frames = {self.min_frames!r} must be a whole number from 1")

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return asdict(self)

    @classmethod
    @refusing("the gate", InputError)
    def from_json(cls, data: Mapping[str, Any]) -> Gate:
        """Reads thresholds; what is not named keeps its default.

        Raises:
            InputError: unknown keys or impossible values.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise InputError(f"gate has unknown keys {', '.join(unknown)}; known are {', '.join(sorted(known))}")
        return cls(**data)

    @classmethod
    def from_file(cls, path: Path) -> Gate:
        """Reads a gate file.

        Args:
            path: ``.toml`` or ``.json``.

        Raises:
            InputError: no such file, not readable, unknown keys or impossible values.
        """
        try:
            raw = path.read_bytes()
            if len(raw) > _MAX_GATE_BYTES:
                raise InputError(f"gate {path.name} has {len(raw)} bytes: that is no gate")
            data = _parse(path, raw.decode("utf-8"))
        except OSError as error:
            raise InputError(f"gate {path} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"gate {path.name} is not readable: {' '.join(str(error).split())[:200]}") from error
        if not isinstance(data, dict):
            raise InputError(f"gate {path.name} holds no table of thresholds")
        return cls.from_json(data)


GATE_KEYS: dict[str, tuple[str, str]] = {
    "dice_mean": ("segment", "least mean Dice of the masks against the reference's, over frames that count"),
    "dice_worst": ("segment", "least Dice of any frame that counts"),
    "hc_p95_mm": ("segment, ellipse_hc", "largest 95th percentile of the change in head circumference, mm"),
    "hc_p95_share": (
        "segment, ellipse_hc",
        "the same as a share of the circumference, judged where no frame has a spacing",
    ),
    "differing_pixels": ("segment", "largest share of pixels that differ on any frame that does not count"),
    "min_coverage": ("segment", "share of the image from which the reference's mask makes a frame count"),
    "min_frames": ("all", "least number of frames that count; fewer are refused before anything is built"),
    "top1": ("classify", "least share of frames with the same most probable label"),
    "drift_mean": ("classify", "largest mean over frames of the largest change of a probability"),
    "probability_drift": ("classify", "largest change of any probability of any frame"),
    "same_reading": (
        "models with thresholds for readings",
        "least share of frames that both sides call good, doubtful or none alike",
    ),
    "same_exit": ("classify, early exits", "least share of frames that stop at the exit the reference stops at"),
    "cosine_mean": ("features", "least mean cosine of the features"),
    "cosine": ("features", "least cosine of any frame"),
    "float_logits": ("fp32 and fp16", "largest mean change of the logits as a share of their size"),
    "version": ("file", "version of this form"),
}
"""Key of a gate file -> the task or precision it is judged for, and what it demands."""


def gate_toml(gate: Gate | None = None) -> str:
    """A gate as a TOML file that explains itself; ``Gate.from_file`` reads it back.

    Args:
        gate: thresholds, or None for the defaults.
    """
    chosen, plain = gate or Gate(), Gate()
    lines = [
        "# Gate: what an artefact must hold against the float32 reference. All limits are inclusive.",
        "# Keys that are left out keep their default. The bundle records the gate that it passed.",
    ]
    for key, (task, meaning) in GATE_KEYS.items():
        value, default = getattr(chosen, key), getattr(plain, key)
        changed = f" (default {default})" if value != default else ""
        lines += ["", f"# {task}: {meaning}{changed}", f"{key} = {value}"]
    return "\n".join(lines) + "\n"


def _parse(path: Path, text: str) -> Any:
    if path.suffix == ".json":
        return parse_json(text)
    if path.suffix != ".toml":
        raise InputError(f"gate {path.name} must be a .toml or .json file")
    try:
        import tomllib
    except ImportError as error:  # Python 3.10
        raise InputError("reading a .toml gate needs Python 3.11: write it as .json") from error
    return check_values(tomllib.loads(text))


def judge(comparison: Comparison, gate: Gate, *, count_all: bool = False, precision: str = "") -> ParityReport:
    """Judges a comparison.

    A demand without a frame to judge it on is left out and noted, except the number of frames, which always stands; so
    an empty comparison never passes.

    Args:
        comparison: what was measured.
        gate: thresholds.
        count_all: ``min_frames`` counts frames with small reference masks as well; for the golden frames of a model
            that sees no head in a phantom, where the differing pixels carry the judgement.
        precision: of the artefact.

    Returns:
        The report; true where everything holds.
    """
    numbers, notes = comparison.statistics, []
    every = count_all or comparison.task is not Task.SEGMENT
    number, broken = numbers.get("frames" if every else "counted", 0.0), numbers.get("broken", 0.0)
    enough = f"{number:.0f} frames{'' if every else ' whose reference mask counts'}, at least {gate.min_frames} wanted"
    lines = [
        _line("min_frames", number, gate.min_frames, _at_least, enough),
        _line("broken", broken, 0, _at_most, f"{broken:.0f} frames gave no finite output"),
    ]
    if "exit_rule" in numbers:
        words = "the chain stops by the rule that the reference stopped by: 1 is yes, 0 is no"
        lines.append(_line("exit_rule", numbers["exit_rule"], 1, _at_least, words))
    for name, statistic, test, words in _demands(comparison, precision):
        if name == "hc_p95_share" and "hc_p95_mm" in numbers:
            continue
        value, limit = numbers.get(statistic), float(getattr(gate, _LIMITS.get(name, name)))
        if value is None:
            notes += [f"{words}: no frame to judge it on"] if not name.startswith("hc_") else []
            continue
        sign = ">=" if test is _at_least else "<="
        lines.append(_line(name, value, limit, test, f"{words} is {value:.5g}, {sign} {limit:.5g} wanted"))
    if comparison.post is PostProcess.ELLIPSE_HC:
        with_spacing, without = (int(numbers.get(key, 0)) for key in ("hc_frames", "hc_share_frames"))
        judged = f"in mm on {with_spacing} frames" if with_spacing else f"as a share on {without} frames, all"
        rest = f"; {without} frames without spacing are not judged" if with_spacing and without else ""
        notes.append(f"head circumference is judged {judged}{rest}" + ("" if with_spacing else " without spacing"))
    return ParityReport(comparison=comparison, limits=gate.to_json(), lines=tuple(lines), notes=tuple(notes))


_Test = Callable[[float, float], bool]
_LIMITS = {"full_top1": "top1", "full_drift": "probability_drift"}  # demands that share another's threshold


def _at_least(value: float, limit: float) -> bool:
    return value >= limit


def _at_most(value: float, limit: float) -> bool:
    return value <= limit


def _demands(comparison: Comparison, precision: str) -> list[tuple[str, str, _Test, str]]:
    """(gate key, statistic, test, words) for a task.

    Another choice for artefacts that round to no codes.
    """
    logits: tuple[str, str, _Test, str] = (
        "float_logits", "logit_share", _at_most, "mean change of the logits as a share of their size",
    )  # fmt: skip
    return (
        _task_demands(comparison) + _reading_demands(comparison) + ([logits] if precision in FLOAT_PRECISIONS else [])
    )


def _reading_demands(comparison: Comparison) -> list[tuple[str, str, _Test, str]]:
    if "same_reading" not in comparison.statistics:
        return []
    return [("same_reading", "same_reading", _at_least, "share of frames with the same reading")]


def _task_demands(comparison: Comparison) -> list[tuple[str, str, _Test, str]]:
    if comparison.task is Task.CLASSIFY:
        scores: list[tuple[str, str, _Test, str]] = [
            ("top1", "top1", _at_least, "top-1 agreement"),
            ("drift_mean", "drift_mean", _at_most, "mean probability drift"),
            ("probability_drift", "drift_worst", _at_most, "worst probability drift"),
        ]
        exits: list[tuple[str, str, _Test, str]] = [
            ("same_exit", "same_exit", _at_least, "share of frames that stop at the reference's exit"),
            ("full_top1", "full_top1", _at_least, "top-1 agreement at full depth"),
            ("full_drift", "full_drift_worst", _at_most, "worst probability drift at full depth"),
        ]
        return scores + (exits if "exit_rule" in comparison.statistics else [])
    if comparison.task is Task.FEATURES:
        return [
            ("cosine_mean", "cosine_mean", _at_least, "mean cosine"),
            ("cosine", "cosine_worst", _at_least, "worst cosine"),
        ]
    masks: list[tuple[str, str, _Test, str]] = [
        ("dice_mean", "dice_mean", _at_least, "mean Dice"),
        ("dice_worst", "dice_worst", _at_least, "worst Dice"),
        ("differing_pixels", "differing_pixels_worst", _at_most, "differing pixels on frames with small masks"),
    ]
    heads: list[tuple[str, str, _Test, str]] = [
        ("hc_p95_mm", "hc_p95_mm", _at_most, "HC difference p95 (mm)"),
        ("hc_p95_share", "hc_p95_share", _at_most, "HC difference p95 as a share"),
    ]
    return masks + (heads if comparison.post is PostProcess.ELLIPSE_HC else [])


def _line(name: str, value: float, limit: float, test: _Test, text: str) -> GateLine:
    return GateLine(name=name, text=text, value=value, limit=float(limit), passed=test(value, limit))


__all__ = ["FLOAT_PRECISIONS", "GATE_KEYS", "GATE_VERSION", "Gate", "gate_toml", "judge"]
