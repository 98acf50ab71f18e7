"""Session: a bundle, an engine, ``predict(frame)``.

Opening one verifies every byte, loads the artefact that was asked for (or the first of the ladder;
another one is never taken in silence), asserts the device, runs golden frames and warms up. After
that a frame becomes a Prediction that says what made it, how long it took and whether it may be
trusted. Input is checked here, since engines differ in what they let through.

It does not know where frames come from, and it never switches engines by itself.

Shapes: HW = rows, columns of the model's input; NCHW = 1, channels, rows, columns.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tinyusfm_runtime.answer import answer, check_logits
from tinyusfm_runtime.bundle import GOLDEN_FRAMES, GOLDEN_REFERENCE, Artefact, Bundle, Manifest
from tinyusfm_runtime.chain import EXIT_NAME, ChainEngine, is_chain
from tinyusfm_runtime.drift import DRIFT_FILE, WINDOW_FRAMES, DriftMonitor, DriftReading, DriftStatistic
from tinyusfm_runtime.engine import Engine, EngineConfig
from tinyusfm_runtime.errors import (
    BundleError,
    EngineError,
    FrameError,
    InputError,
    MissingExtra,
    UnsupportedError,
    UnverifiedError,
)
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.machine import default_threads, machine_card, same_class
from tinyusfm_runtime.plugins import load, names, stem
from tinyusfm_runtime.preprocess import Placement, preprocess
from tinyusfm_runtime.selfcheck import DEFAULT_LIMITS, GoldenReport, golden_check, reference_check

if TYPE_CHECKING:
    from tinyusfm_runtime.measure import HeadMeasurement

GOLDEN_FRAMES_AT_START = 4
"""Golden frames run at start-up on the class of CPU the artefact was verified on; elsewhere all of them."""
WARM_UP_RUNS = 5
"""First runs are slower; they settle after three to four."""
CLOSE_WAIT_S, CLOSE_GRACE_S = 5.0, 2.0
"""How long closing waits for a prediction in progress before it is cancelled, and after that before it is given up."""
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_GATE_NAMES = {"probability_drift": "drift_worst", "cosine": "cosine_worst"}  # gate.py of the export -> selfcheck.py


@dataclass(frozen=True, kw_only=True, slots=True)
class Timings:
    """How long one prediction took, in ms.

    Attributes:
        preprocess_ms: frame to tensor.
        infer_ms: the engine.
        postprocess_ms: logits to answer.
        total_ms: all of it and what lies between.
    """

    preprocess_ms: float
    infer_ms: float
    postprocess_ms: float
    total_ms: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a session says about one frame.

    Attributes:
        seq: the frame's running number.
        mask_HW: uint8 label map at the input's size, or None; owned by the prediction.
        placement: where the frame lies in the input.
        scores: float32 class probabilities, or the raw values of a feature model, or None.
        measurement: head measurement, or None.
        engine: library, version, device, precision and threads that really answered.
        target: such as ``openvino``.
        precision: such as ``int8``.
        verified: False if the artefact never passed its gate, at export or on this device.
        degraded: True if another artefact than the chosen one answered (never by a session's own doing).
        valid: False if an output was not finite: mask, scores and measurement are then None.
        timings: how long it took.
        t_recv_ns: ``time.monotonic_ns`` at the frame's reception, or None.
        age_ms: time from reception to this prediction, or None.
        auxiliary: further outputs of the graph by name.
        drift: what a monitor made of it, where one watches the stream, or None; a session fills in nothing.
        exit_index: of a chain with early exits, which one answered: counted from 0, the end is the last; else None.
    """

    seq: int
    mask_HW: np.ndarray | None
    placement: Placement
    scores: np.ndarray | None
    measurement: HeadMeasurement | None
    engine: str
    target: str
    precision: str
    verified: bool
    degraded: bool = False
    valid: bool
    timings: Timings
    t_recv_ns: int | None
    age_ms: float | None
    auxiliary: Mapping[str, np.ndarray]
    drift: DriftReading | None = None
    exit_index: int | None = None

    def mask_on_frame(self) -> np.ndarray:
        """The mask at the frame's own size, nearest neighbour; 0 outside the region the model saw.

        Returns:
            uint8, rows x columns of the frame.

        Raises:
            InputError: this prediction has no mask.
        """
        if self.mask_HW is None:
            raise InputError("this prediction has no mask: it is not valid, or the model gives none")
        row, col, height, width = self.placement.crop
        top, left, box_h, box_w = self.placement.box
        # the input pixel in which the centre of a frame pixel falls, in integers
        rows = top + (2 * np.arange(height) + 1) * box_h // (2 * height)
        cols = left + (2 * np.arange(width) + 1) * box_w // (2 * width)
        out = np.zeros(self.placement.frame_size, np.uint8)
        out[row : row + height, col : col + width] = self.mask_HW[rows[:, None], cols]
        return out


class Session:
    """An artefact ready to predict. Open it with ``Session.open``; it is a context manager.

    Calls from several threads queue up; ``cancel`` may come from any thread at any time.
    """

    @classmethod
    def open(
        cls,
        bundle: str | Path | Bundle,
        *,
        target: str | None = None,
        precision: str | None = None,
        threads: int | None = None,
        allow_unverified: bool = False,
        full_depth: bool = False,
    ) -> Session:
        """Verifies a bundle and readies one of its artefacts.

        Args:
            bundle: a bundle's folder, or an open bundle.
            target: take the first artefact of this target (``openvino``, ``onnx``, or an alias).
            precision: take the first artefact of this precision.
            threads: threads inside the engine; None is half of the cores, at least 1, at most 4.
            allow_unverified: also open an artefact that never passed its gate, and mark its predictions.
            full_depth: never stop at an early exit; without exits there is nothing to stop at anyway.

        Returns:
            The session, checked against golden frames and warm.

        Raises:
            InputError: no such bundle, or no such artefact in it.
            BundleError: the bundle was tampered with, cannot be read, or (UnverifiedError) is not verified.
            MissingExtra: the artefact's library is not installed.
            UnsupportedError: this machine cannot run the artefact.
            EngineError: the library failed, or does not answer as it should.
        """
        clock = _Clock()
        opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        clock.lap("verify_hashes")
        artefact = choose_artefact(opened.manifest, target, precision)
        if not artefact.trusted and not artefact.pending and not allow_unverified:
            why = "was exported with its gate switched off" if not artefact.gated else "never passed its gate"
            raise UnverifiedError(
                f"artefact {artefact.name} {why}: export it again, or allow unverified artefacts to use it all the same"
            )
        config = EngineConfig(
            threads=default_threads(machine_card()) if threads is None else threads,
            rest_precision=artefact.rest_precision,
            reuse_outputs=True,
        )
        engine = _load_engine(opened, artefact, config, full_depth=full_depth)
        clock.lap("load")
        session = cls(opened, artefact, engine, config.threads)
        session.full_depth = full_depth
        try:
            if artefact.pending and not session.verified and not allow_unverified:
                raise UnverifiedError(f"artefact {artefact.name}: {artefact.pending}")
            session._start(clock)
        except BaseException:
            engine.close()
            raise
        return session

    def __init__(self, bundle: Bundle, artefact: Artefact, engine: Engine, threads: int) -> None:
        """Binds what ``open`` made; nothing is checked here. Use ``Session.open``."""
        self.manifest = bundle.manifest
        self.artefact = artefact
        self.path = bundle.path
        self.spec = bundle.manifest.spec
        self.threads = threads
        self.full_depth = False
        self.startup: Mapping[str, float] = MappingProxyType({})
        # only the golden vectors stay in memory; the artefacts' bytes go with the bundle
        self._golden = _Golden(bundle, artefact)
        self.verified = artefact.trusted or _passed_here(engine, bundle.manifest)
        self._drift = (
            DriftStatistic.from_bytes(bundle.read(DRIFT_FILE)) if DRIFT_FILE in bundle.manifest.files else None
        )
        self._auxiliary: tuple[str, ...] = ()
        self._engine: Engine | None = engine
        self._description = engine.description
        self._closed = False
        self._lock = threading.Lock()
        # filled anew for every frame; whoever fills it holds the lock until the answer is made of the engine's outputs
        self._tensor = np.zeros(self.spec.input.shape, np.uint8)
        self._turn = threading.Lock()

    @property
    def description(self) -> str:
        """Artefact and engine really used, one line."""
        return f"{self.artefact.name} on {self._description}"

    @property
    def engine_description(self) -> str:
        """Engine really used, one line."""
        return self._description

    @property
    def golden_frames(self) -> Sequence[Frame]:
        """The bundle's golden frames, phantoms all of them."""
        return self._golden.frames

    def predict(self, frame: Frame) -> Prediction:
        """Answers for one frame.

        Args:
            frame: any frame the model's preprocessing can place.

        Returns:
            The prediction; its arrays are its own.

        Raises:
            FrameError: not a frame, or the crop lies outside it.
            EngineError: the engine failed, was cancelled or closed.
        """
        if not isinstance(frame, Frame):
            raise FrameError(f"predict takes a Frame, not {type(frame).__name__}: wrap the pixels in Frame(pixels=...)")
        start = time.perf_counter_ns()
        with self._turn:
            tensor, placement = preprocess(frame, self.spec.preprocess, self._tensor)
            return self._predict(tensor, placement, frame.seq, frame.t_recv_ns, start)

    def predict_tensor(self, tensor: np.ndarray, *, spacing_mm: tuple[float, float] | None = None) -> Prediction:
        """Answers for an input that was preprocessed elsewhere.

        Args:
            tensor: uint8 NCHW of exactly the model's input shape, C-contiguous.
            spacing_mm: (row, column) spacing of the *input's* pixels, or None.

        Returns:
            The prediction, its placement that of a frame of the input's size.

        Raises:
            FrameError: another type, shape or memory layout; nothing is cast or copied to fit.
            EngineError: the engine failed, was cancelled or closed.
        """
        start = time.perf_counter_ns()
        self._check_tensor(tensor)
        frame = Frame(pixels=tensor[0, 0], spacing_mm=spacing_mm)
        whole = (0, 0, *frame.pixels.shape)
        placement = Placement(crop=whole, box=whole, spacing_mm=spacing_mm, frame_size=frame.pixels.shape)
        with self._turn:
            return self._predict(tensor, placement, 0, None, start)

    def run_golden(self, full: bool = False) -> GoldenReport:
        """Runs golden frames and compares; raises nothing when they differ, the report says so.

        Args:
            full: False compares a few frames with the artefact's own outputs; True compares all frames, with the
                reference where the artefact passed a gate, else with its own outputs.

        Returns:
            The numbers and the verdict.

        Raises:
            BundleError: the golden files are not what the layout says.
            EngineError: the engine failed.
        """
        return self._golden.check(self, full=full)

    @property
    def has_drift(self) -> bool:
        """Whether the bundle carries a drift statistic."""
        return self._drift is not None

    def watch_drift(self, *, window: int = WINDOW_FRAMES) -> DriftMonitor:
        """A monitor for one stream: give it every frame with its prediction.

        Args:
            window: frames that decide together.

        Raises:
            InputError: the bundle carries no drift statistic, or the window has no frames.
        """
        if self._drift is None:
            raise InputError("this bundle carries no drift statistic: export it again with --calibration SET.json")
        return DriftMonitor(self._drift, self._auxiliary, window=window)

    def cancel(self) -> None:
        """Asks a prediction in progress in another thread to stop; it raises EngineError."""
        engine = self._engine
        if engine is not None:
            engine.cancel()

    def close(self) -> None:
        """Frees the engine, after a prediction in progress has ended. Closing twice is harmless.

        A prediction that goes on for ``CLOSE_WAIT_S`` is cancelled; one that does not react to that within
        ``CLOSE_GRACE_S`` hangs in native code, where nothing can end it: then it is given up, with a line in the log,
        and whichever thread it holds frees the engine if it ever comes back.
        """
        self._closed = True
        if not self._lock.acquire(timeout=CLOSE_WAIT_S):
            self.cancel()
            if not self._lock.acquire(timeout=CLOSE_GRACE_S):
                _log.warning("the engine hangs and was given up unclosed: %s", self.description)
                return
        try:
            self._free()
        finally:
            self._lock.release()

    def _is_closed(self) -> bool:
        return self._closed

    def _free(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self, clock: _Clock) -> None:
        frame = self._golden.frames[0]
        self._auxiliary = tuple(self.predict(frame).auxiliary)
        clock.lap("first_frame")
        full = not self._on_verified_machine()
        report = self.run_golden(full=full)
        if not report:
            raise EngineError(
                f"{self.description} does not answer as the artefact should ({report.frames} golden frames against "
                f"{report.against}: {'; '.join(report.reasons) or 'none compared'}): export it again on this machine"
            )
        clock.lap("golden")
        for _ in range(WARM_UP_RUNS):
            self.predict(frame)
        clock.lap("warm_up")
        self.startup = MappingProxyType(clock.laps)

    def _on_verified_machine(self) -> bool:
        needs = self.artefact.requirements
        return (
            not self.artefact.pending and same_class(needs.get("cpu_features"), machine_card()) and _same_library(needs)
        )

    def _check_tensor(self, tensor: Any) -> None:
        wanted = self.spec.input
        if not isinstance(tensor, np.ndarray) or tensor.dtype != np.uint8:
            kind = getattr(tensor, "dtype", type(tensor).__name__)
            raise FrameError(f"input {wanted.name!r} must be a numpy uint8 array of codes 0..255, not {kind}")
        if tensor.shape != wanted.shape:
            raise FrameError(f"input {wanted.name!r} must have shape {wanted.shape}, not {tensor.shape}")
        if not tensor.flags.c_contiguous:
            raise FrameError(f"input {wanted.name!r} must be C-contiguous: pass numpy.ascontiguousarray(tensor)")

    def _infer(self, tensor: np.ndarray) -> dict[str, np.ndarray]:
        return self._held(tensor, lambda engine: engine.run(tensor))

    def _held(self, tensor: np.ndarray, work: Callable[[Engine], _T]) -> _T:
        """Lets the engine work on a tensor while nobody else uses or frees it."""
        self._check_tensor(tensor)
        with self._lock:
            if self._engine is None or self._closed:
                raise EngineError("the session is closed")
            try:
                return work(self._engine)
            finally:
                if self._is_closed():  # it may have been given up meanwhile, and nobody else comes to free it
                    self._free()

    def _logits(self, tensor: np.ndarray) -> np.ndarray:
        """Logits without the leading 1, owned by the caller: KHW or K, of a chain EK."""

        def logits(engine: Engine) -> np.ndarray:
            if isinstance(engine, ChainEngine):
                return engine.run_checked(tensor)[0][0]
            return check_logits(engine.run(tensor), self.spec)[0].copy()

        return self._held(tensor, logits)

    def _predict(
        self, tensor: np.ndarray, placement: Placement, seq: int, t_recv_ns: int | None, start_ns: int
    ) -> Prediction:
        before = time.perf_counter_ns()
        outputs = self._infer(tensor)
        after = time.perf_counter_ns()
        stopped = outputs.pop(EXIT_NAME, None)
        said = answer(outputs, self.spec, placement)
        end = time.perf_counter_ns()
        return Prediction(
            seq=seq,
            mask_HW=said.mask_HW,
            placement=placement,
            scores=said.scores,
            measurement=said.measurement,
            engine=self._description,
            target=self.artefact.target,
            precision=self.artefact.precision,
            verified=self.verified,
            valid=said.valid,
            timings=Timings(
                preprocess_ms=(before - start_ns) / 1e6,
                infer_ms=(after - before) / 1e6,
                postprocess_ms=(end - after) / 1e6,
                total_ms=(end - start_ns) / 1e6,
            ),
            t_recv_ns=t_recv_ns,
            age_ms=None if t_recv_ns is None else (time.monotonic_ns() - t_recv_ns) / 1e6,
            auxiliary={name: value.copy() for name, value in said.auxiliary.items()},
            exit_index=None if stopped is None else int(stopped[0]),
        )


class _Golden:
    """The golden files of one artefact: packed bytes, unpacked when they are compared."""

    def __init__(self, bundle: Bundle, artefact: Artefact) -> None:
        names = (GOLDEN_FRAMES, GOLDEN_REFERENCE, artefact.golden)
        self._small = Bundle(bundle.path, bundle.manifest, {name: bundle.read(name) for name in names})
        self._artefact = artefact
        self.frames: Sequence[Frame] = self._small.golden_frames()

    def check(self, session: Session, *, full: bool) -> GoldenReport:
        # own answers of an artefact that waits for its device come from a stand-in: only the reference counts there
        against_reference = full and (self._artefact.trusted or bool(self._artefact.pending))
        stored = self._small.golden_reference() if against_reference else self._small.golden_outputs(self._artefact)
        want, count = stored["logits"], len(self.frames)
        if len(want) != count:
            raise BundleError(f"the bundle has {count} golden frames and {len(want)} golden answers")
        some = {i * count // GOLDEN_FRAMES_AT_START for i in range(GOLDEN_FRAMES_AT_START)}
        chosen = list(range(count)) if full else sorted(some)
        prepared = [preprocess(self.frames[i], session.spec.preprocess) for i in chosen]
        with session._turn:
            got = np.stack([session._logits(tensor) for tensor, _ in prepared])
        placements = [placement for _, placement in prepared]
        if against_reference:
            return reference_check(got, want[chosen], session.spec, placements, gate_limits(self._artefact))
        return golden_check(got, want[chosen], session.spec, placements, self._artefact.tolerance)


def choose_artefact(manifest: Manifest, target: str | None, precision: str | None) -> Artefact:
    """The first artefact of the ladder that fits what was asked for.

    Raises:
        InputError: none fits; the message lists what there is.
    """
    for artefact in manifest.artefacts:
        if target is not None and stem(target) not in (stem(artefact.target), artefact.engine):
            continue
        if precision is not None and precision.strip().lower() != artefact.precision:
            continue
        return artefact
    wanted = " ".join(part for part in (target, precision) if part)
    there = ", ".join(artefact.name for artefact in manifest.artefacts)
    raise InputError(f"the bundle has no artefact {wanted!r}; it has: {there}")


def _passed_here(engine: Engine, manifest: Manifest) -> bool:
    """Whether the engine carries a passed gate of exactly this bundle on exactly this device (trt.py, coreml.py)."""
    gate = getattr(engine, "device_gate", None)
    if not isinstance(gate, Mapping):
        return False
    return gate.get("passed") is True and gate.get("bundle_id") == manifest.bundle_id


def gate_limits(artefact: Artefact) -> dict[str, float]:
    """Thresholds the artefact was gated with, as far as its gate report names them, under the names used here."""
    report = artefact.gate or {}
    found = report.get("limits", report.get("gate"))
    if not isinstance(found, Mapping):
        return {}
    named = {_GATE_NAMES.get(name, name): value for name, value in found.items()}
    return {n: float(value) for n, value in named.items() if n in DEFAULT_LIMITS and type(value) in (int, float)}


def _load_engine(bundle: Bundle, artefact: Artefact, config: EngineConfig, *, full_depth: bool) -> Engine:
    others = [other for other in bundle.manifest.artefacts if other is not artefact]
    choices = " or ".join(f"target {other.target} precision {other.precision}" for other in others)
    hint = f" (this bundle also has {choices})" if others else ""  # never taken unasked
    if artefact.engine not in names("engines"):
        raise UnsupportedError(f"artefact {artefact.name} needs an engine {artefact.engine!r} unknown here{hint}")
    files = bundle.artefact_files(artefact)
    engine = make_engine(artefact.engine, files, full_depth=full_depth)
    try:
        engine.load(files, bundle.manifest.spec, config)
    except MissingExtra as error:
        raise MissingExtra(f"artefact {artefact.name}{hint}", error.library, error.extra) from error
    except BaseException:
        engine.close()
        raise
    return engine


def make_engine(name: str, files: Mapping[str, bytes], *, full_depth: bool = False) -> Engine:
    """An engine for an artefact, not loaded yet: the plug-in itself, or a chain of it.

    Args:
        name: of the plug-in.
        files: file name -> content, which is not looked at.
        full_depth: a chain never stops early.

    Raises:
        UnsupportedError: the artefact is a chain, and the engine runs whole graphs only.
    """
    module = load("engines", name)
    if not is_chain(files):
        made: Engine = module.Engine()
        return made
    if not getattr(module, "CHAINS", False):
        raise UnsupportedError(f"engine {name!r} runs no chain of early exits: take an onnx or openvino artefact")
    return ChainEngine(module.Engine, full_depth=full_depth)


def _same_library(requirements: Mapping[str, Any]) -> bool:
    """Whether the engine's library is of the version the artefact was verified with."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(str(requirements.get("library"))) == str(requirements.get("library_version")).partition("-")[0]
    except (PackageNotFoundError, ValueError):
        return False


class _Clock:
    """Wall time of start-up stages, ms."""

    def __init__(self) -> None:
        self.laps: dict[str, float] = {}
        self._last = time.perf_counter_ns()

    def lap(self, name: str) -> None:
        now = time.perf_counter_ns()
        self.laps[name] = (now - self._last) / 1e6
        self._last = now


__all__ = [
    "CLOSE_GRACE_S",
    "CLOSE_WAIT_S",
    "GOLDEN_FRAMES_AT_START",
    "WARM_UP_RUNS",
    "Prediction",
    "Session",
    "Timings",
    "choose_artefact",
    "gate_limits",
    "make_engine",
]
