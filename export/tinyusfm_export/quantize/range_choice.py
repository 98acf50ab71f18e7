"""Ranges chosen by measurement on validation frames.

Range methods, equalisation and bias correction side by side.

Each candidate is simulated (fake_quant.py) on frames that did not calibrate and compared with the float graph: the
error of the logits relative to their own size, and for masks the Dice of the two masks. The method with the least
error is kept; equalisation and bias correction are added on top only where they take at least MIN_GAIN off the error.
Everything that was measured is kept, for the report. It does not know files or engines.

Shapes: NCHW, the model's input tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from tinyusfm_calibration.methods import RANGE_METHODS
from tinyusfm_calibration.observe import Histogram
from tinyusfm_calibration.ranges import Observer, Ranges
from tinyusfm_calibration.sets import CalibrationSet
from tinyusfm_export.quantize.bias_correction import WrittenWeight, correct_biases, measure_means
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.equalise import channel_peaks, equalise, find_divisors, outlier_ratio
from tinyusfm_export.quantize.fake_quant import Net, float_net, int8_net
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.spans import calibration_taps
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.spec import ModelSpec, Task
from tinyusfm_runtime.strict_json import refusing

if TYPE_CHECKING:
    from tinyusfm_export.graph.build import ExportGraph

MIN_GAIN: Final = 0.02
"""Share of the error that an addition must remove to be kept: below it, the simpler form is (our choice)."""
MIN_FRAMES: Final[Mapping[str, int]] = {"minmax": 16, "percentile": 32, "entropy": 32, "mse": 32}
"""Fewest calibration frames a method is trusted with: those that cut tails need tails (ours; NNCF asks for 300)."""
PREPARATION_VERSION: Final = 2
"""Version of the JSON that ``Preparation.to_json`` writes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Preparation:
    """How the graph is changed before it is quantized.

    Attributes:
        divisors: equalised tensor -> divisor of each channel, see equalise.py.
        means: layer -> mean input, from which the shift follows that is taken out of its bias, see bias_shift.py.
    """

    divisors: Mapping[str, np.ndarray] = field(default_factory=dict)
    means: Mapping[str, np.ndarray] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.divisors or self.means)

    def equalised(self, graph: ExportGraph) -> ExportGraph:
        """The graph that is calibrated and decided on; float outputs as before."""
        return equalise(graph, self.divisors)

    def corrected(
        self, equalised: ExportGraph, decision: QuantDecision, written: WrittenWeight | None = None
    ) -> ExportGraph:
        """The graph that is built under a decision.

        By a target that writes these weights (see bias_shift.py).
        """
        return correct_biases(equalised, decision, self.means, written)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "version": PREPARATION_VERSION,
            "divisors": {name: [float(v) for v in values] for name, values in sorted(self.divisors.items())},
            "means": {name: [float(v) for v in values] for name, values in sorted(self.means.items())},
        }

    @classmethod
    @refusing("the calibration file's preparation", CalibrationError)
    def from_json(cls, data: Any) -> Preparation:
        """Reads what ``to_json`` wrote.

        Raises:
            CalibrationError: another version, or not such data.
        """
        try:
            if data["version"] != PREPARATION_VERSION or set(data) != {"version", "divisors", "means"}:
                raise CalibrationError("the calibration file's preparation is of another version: calibrate again")
            with np.errstate(over="ignore"):  # what float32 has no room for is infinite, and refused below
                columns = [
                    {str(name): np.array(values, np.float32) for name, values in data[key].items()}
                    for key in ("divisors", "means")
                ]
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(f"the calibration file's preparation is not usable: {error}") from error
        if not all(array.ndim == 1 and np.isfinite(array).all() for column in columns for array in column.values()):
            raise CalibrationError("the calibration file's preparation holds NaN or infinity: calibrate again")
        return cls(divisors=columns[0], means=columns[1])


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One candidate and what it cost.

    Attributes:
        method: range method.
        equalised: tensors that were equalised.
        corrected: layers whose bias was corrected.
        error: root mean square error of the logits over their root mean square.
        dice_mean: mean Dice of its masks with the float graph's, or None without masks.
        dice_worst: the worst frame's, or None.
        chosen: whether this one is used.
    """

    method: str
    equalised: int
    corrected: int
    error: float
    dice_mean: float | None
    dice_worst: float | None
    chosen: bool = False

    @property
    def name(self) -> str:
        """In words."""
        extra = [f"{self.equalised} tensors equalised"] if self.equalised else []
        extra += [f"{self.corrected} biases corrected"] if self.corrected else []
        return ", ".join([self.method, *extra])


@dataclass(frozen=True, kw_only=True, slots=True)
class RangeChoice:
    """What was chosen, and everything that was measured.

    Attributes:
        ranges: of the equalised graph.
        preparation: of the graph.
        trials: one per candidate, in the order they were tried.
        histograms: tensor -> histogram on the calibration frames, of the graph as it was before equalisation.
        outliers: tensor that could be equalised -> its outlier ratio.
        notes: what was left out and why.
    """

    ranges: Ranges
    preparation: Preparation
    trials: tuple[Trial, ...]
    histograms: Mapping[str, Histogram]
    outliers: Mapping[str, float]
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """The choice in a sentence, for the bundle's notes."""
        chosen = next(trial for trial in self.trials if trial.chosen)
        others = ", ".join(f"{t.name} {t.error:.2%}" for t in self.trials if not t.chosen)
        line = f"ranges by {chosen.name}: logit error {chosen.error:.2%} on validation frames"
        return f"{line} against {others}" if others else f"{line}, nothing else was tried"


def choose_ranges(
    graph: ExportGraph,
    calibration_NCHW: Sequence[np.ndarray],
    validation_NCHW: Sequence[np.ndarray],
    calibration: CalibrationSet,
    *,
    methods: Sequence[str] = tuple(RANGE_METHODS),
    policy: PtqPolicy | None = None,
    additions: bool = True,
) -> RangeChoice:
    """Measures the candidates and chooses.

    Args:
        graph: the export graph.
        calibration_NCHW: inputs of the set's frames, in its order.
        validation_NCHW: inputs that judge; none of them calibrates.
        calibration: names and hashes of the set's frames.
        methods: range methods to compare.
        policy: what becomes int8.
        additions: also try equalisation and bias correction.

    Raises:
        CalibrationError: no frames, too few for every method, NaN, or a tensor that is always zero.
        InputError: no such method.
    """
    if not calibration_NCHW or not validation_NCHW:
        raise CalibrationError("ranges are chosen by measurement: give calibration and validation frames")
    if unknown := [method for method in methods if method not in RANGE_METHODS]:
        raise InputError(f"no range method {unknown[0]!r}: there are {', '.join(RANGE_METHODS)}")
    enough = [method for method in methods if len(calibration_NCHW) >= MIN_FRAMES[method]]
    notes = []
    if left_out := [method for method in methods if method not in enough]:
        wanted = max(MIN_FRAMES[method] for method in left_out)
        verb = "was" if len(left_out) == 1 else "were"
        listed = " and ".join([", ".join(left_out[:-1]), left_out[-1]] if len(left_out) > 1 else left_out)
        notes.append(f"{listed} {verb} not tried: it needs {wanted} calibration frames, not {len(calibration_NCHW)}")
    if not enough:
        raise CalibrationError("; ".join(notes))
    bench = _Bench(graph, validation_NCHW, calibration, policy)
    # one pass over the calibration frames serves all range methods
    observer, peaks = _observe(graph, calibration_NCHW)
    # candidates without preparation: the range methods alone
    tried = [bench.measure(method, bench.ranges(observer, method), Preparation()) for method in enough]
    best = min(tried, key=lambda found: found.trial.error)
    if additions:
        divisors = find_divisors(graph, peaks)
        if divisors:
            # an equalised graph has other activations, so it is observed again
            again, _ = _observe(equalise(graph, divisors), calibration_NCHW)
            method = best.trial.method
            tried.append(bench.measure(method, bench.ranges(again, method), Preparation(divisors=divisors)))
            best = _better(best, tried[-1])
        else:
            notes.append("equalisation was not tried: no tensor that allows it has outlier channels")
        # last, on the graph as it will be built
        means = measure_means(best.preparation.equalised(graph), calibration_NCHW)
        with_means = Preparation(divisors=best.preparation.divisors, means=means)
        tried.append(bench.measure(best.trial.method, best.ranges, with_means))
        best = _better(best, tried[-1])
    trials = tuple(Trial(**{**asdict(found.trial), "chosen": found is best}) for found in tried)
    return RangeChoice(
        ranges=best.ranges,
        preparation=best.preparation,
        trials=trials,
        histograms=observer.histograms,
        outliers={name: outlier_ratio(peaks_C) for name, peaks_C in peaks.items()},
        notes=tuple(notes),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Measured:
    trial: Trial
    ranges: Ranges
    preparation: Preparation


def _better(old: _Measured, new: _Measured) -> _Measured:
    return new if new.trial.error <= old.trial.error * (1.0 - MIN_GAIN) else old


def _observe(graph: ExportGraph, inputs_NCHW: Sequence[np.ndarray]) -> tuple[Observer, dict[str, np.ndarray]]:
    observer, taps = Observer(), calibration_taps(graph)
    peaks: dict[str, np.ndarray] = {}
    for tensor_NCHW in inputs_NCHW:
        tensors = taps(tensor_NCHW)
        observer.add(tensors)
        for name, peaks_C in channel_peaks(graph, [tensors]).items():
            peaks[name] = np.maximum(peaks.get(name, 0.0), peaks_C)
    return observer, peaks


class _Bench:
    """The float graph's answers to the validation frames.

    Candidates are measured against them.
    """

    def __init__(
        self,
        graph: ExportGraph,
        inputs_NCHW: Sequence[np.ndarray],
        calibration: CalibrationSet,
        policy: PtqPolicy | None,
    ) -> None:
        self.graph, self.inputs_NCHW, self.calibration = graph, inputs_NCHW, calibration
        self.policy = policy or PtqPolicy(rest_precision="f32")
        self.wanted = _logits(float_net(graph), inputs_NCHW)

    def ranges(self, observer: Observer, method: str) -> Ranges:
        return Ranges(
            tensors=observer.tensors(method),
            method=method,
            set_id=self.calibration.id,
            frame_sha256=tuple(sorted(self.calibration.hashes)),
            weights_sha256=self.graph.spec.weights_sha256,
        )

    def measure(self, method: str, ranges: Ranges, preparation: Preparation) -> _Measured:
        equalised = preparation.equalised(self.graph)
        decision = decide(equalised, "int8", ranges, policy=self.policy)
        # one answer per validation frame, under this candidate
        got = _logits(int8_net(preparation.corrected(equalised, decision), decision), self.inputs_NCHW)
        # relative error: root of the mean squared gap over the mean squared logit
        gaps = [np.square(a - b, dtype=np.float64).mean() for a, b in zip(got, self.wanted, strict=True)]
        size = np.mean([np.square(logits, dtype=np.float64).mean() for logits in self.wanted])
        dice = [mask_dice(a, b, self.graph.spec) for a, b in zip(got, self.wanted, strict=True)]
        known = [value for value in dice if value is not None]
        trial = Trial(
            method=method,
            equalised=len(preparation.divisors),
            corrected=len(preparation.means),
            error=float(np.sqrt(np.mean(gaps) / size)),
            dice_mean=float(np.mean(known)) if known else None,
            dice_worst=float(np.min(known)) if known else None,
        )
        return _Measured(trial=trial, ranges=ranges, preparation=preparation)


def mask_dice(got: np.ndarray, wanted: np.ndarray, spec: ModelSpec) -> float | None:
    """Dice of two masks, 1 where both are empty, or None for a model without masks.

    Args:
        got: logits NKHW.
        wanted: logits NKHW.
        spec: the model.
    """
    if spec.task is not Task.SEGMENT:
        return None
    from tinyusfm_runtime.numerics.measure import binary_mask

    a, b = (binary_mask(logits, spec.threshold) > 0 for logits in (got, wanted))
    total = int(a.sum()) + int(b.sum())
    return 2.0 * int((a & b).sum()) / total if total else 1.0


def _logits(net: Net, inputs_NCHW: Sequence[np.ndarray]) -> list[np.ndarray]:
    return [net(tensor_NCHW)["logits"].copy() for tensor_NCHW in inputs_NCHW]


__all__ = [
    "MIN_FRAMES",
    "MIN_GAIN",
    "PREPARATION_VERSION",
    "Preparation",
    "RangeChoice",
    "Trial",
    "choose_ranges",
    "mask_dice",
]
