"""Session: a bundle, an engine, ``predict(frame)``.

Opening one verifies every byte, loads the artefact that was asked for (or the first of the fallback;
another one is never chosen silently), asserts the device, runs golden frames and warms up. After
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
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from tinyusfm_runtime.bundle.golden import GoldenReport, golden_check, reference_check, spec_faults
from tinyusfm_runtime.bundle.manifest import gate_limits
from tinyusfm_runtime.bundle.reader import GOLDEN_FRAMES, Artefact, Bundle, open_trusted
from tinyusfm_runtime.bundle.shipped import choose_here
from tinyusfm_runtime.device.engine_facts import executed_in, needed_int8, passed_here, same_library, with_place
from tinyusfm_runtime.device.golden_memory import REMEMBERED, GoldenMemory, digest_of
from tinyusfm_runtime.device.machine import default_threads, machine_card, same_class
from tinyusfm_runtime.device.start_clock import StartClock
from tinyusfm_runtime.drift import DRIFT_FILE, WINDOW_FRAMES, DriftCheck, DriftMonitor, DriftStatistic
from tinyusfm_runtime.early_exit import EXIT_NAME, ChainEngine, is_chain
from tinyusfm_runtime.engines import Engine, EngineConfig
from tinyusfm_runtime.errors import (
    BundleError,
    EngineError,
    FrameError,
    InputError,
    MissingExtra,
    UnsupportedError,
    UnverifiedError,
)
from tinyusfm_runtime.frame import Frame, PixelFormat
from tinyusfm_runtime.numerics.postprocess import check_logits
from tinyusfm_runtime.numerics.preprocess import Placement, preprocess
from tinyusfm_runtime.numerics.sector import watch_of
from tinyusfm_runtime.passes import confidence_of, judged_of, read_outputs
from tinyusfm_runtime.plugins import load, names
from tinyusfm_runtime.reading import DriftStatus
from tinyusfm_runtime.results import DriftReading, Prediction, Timings

if TYPE_CHECKING:
    from tinyusfm_runtime.trust.policy import Trust

GOLDEN_FRAMES_AT_START = 4
"""Golden frames run at start-up on the class of CPU the artefact was verified on; elsewhere all of them."""
WARM_UP_RUNS = 5
"""First runs are slower; they settle after three to four."""
CLOSE_WAIT_S, CLOSE_GRACE_S = 5.0, 2.0
"""How long closing waits for a prediction in progress before it is cancelled, and after that before it is given up."""
_log = logging.getLogger(__name__)
_T = TypeVar("_T")
_Progress = Callable[[str, float], None]


class Session:
    """An artefact ready to predict, by ``Session.open``; a context manager.

        with Session.open("fetal-head.bundle") as session:
            prediction = session.predict(grey_HW, spacing_mm=(0.12, 0.12))
            print(prediction.valid, prediction.measurement, prediction.mask)

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
        progress: _Progress | None = None,
        trust: Trust | None = None,
        second_pass: bool = True,
        drift: bool = True,
        need_int8: str = "some",
    ) -> Session:
        """Verifies a bundle and readies one of its artefacts.

        Its files are checked strictly before a library reads them, but the library is not bounded in time or memory
        inside the caller's process; in a process of its own it is (``WorkerSession``, ``isolate=True`` of a fallback).

        Args:
            bundle: a bundle's folder, the name of a shipped one (see bundle/shipped.py), or an open bundle.
            target: take the first artefact of this target (``openvino``, ``onnx``, or an alias).
            precision: take the first artefact of this precision.
            threads: threads inside the engine; None is half of the cores, at least 1, at most 4.
            allow_unverified: also open an artefact that never passed its gate, and mark its predictions.
            full_depth: never stop at an early exit; without exits there is nothing to stop at anyway.
            progress: called with what is done and the share that is done, where this machine has to be checked in full.
            trust: demands a signature by a trusted key (see trust/policy.py) before anything is loaded.
            second_pass: False never looks twice, whatever the model's spec says; every prediction says so.
            drift: False compares no frame with the calibration frames; every prediction says so.
            need_int8: how many layers of an int8 artefact must really run in 8 bits, where the library tells: ``all``
                that did where it was verified, ``some``, or ``none``. Fewer than were verified are logged in any case.

        Returns:
            The session, checked against golden frames and warm.

        Raises:
            InputError: no such bundle, or no such artefact in it.
            BundleError: the bundle was tampered with, cannot be read, is not verified (UnverifiedError), or its
                signature is not what is demanded (UntrustedError).
            MissingExtra: the artefact's library is not installed.
            UnsupportedError: this machine cannot run the artefact.
            EngineError: the library failed, or does not answer as it should.
        """
        clock = StartClock()
        opened = open_trusted(bundle, trust)
        clock.lap("verify_hashes")
        artefact = choose_here(opened.manifest, opened.path, target, precision)
        if not artefact.trusted and not artefact.pending and not allow_unverified:
            why = "was exported with its gate switched off" if not artefact.gated else "never passed its gate"
            raise UnverifiedError(
                f"artefact {artefact.name} {why}: export it again, or allow unverified artefacts to use it all the same"
            )
        config = EngineConfig(
            threads=default_threads(machine_card()) if threads is None else threads,
            rest_precision=artefact.rest_precision,
            reuse_outputs=True,
            int8_layers=needed_int8(artefact.precision, artefact.requirements, need_int8),
        )
        engine = _load_engine(opened, artefact, config, full_depth=full_depth)
        clock.lap("load")
        session = cls(
            opened, artefact, engine, config.threads, full_depth=full_depth, second_pass=second_pass, drift=drift
        )
        try:
            if artefact.pending and not session.verified and not allow_unverified:
                raise UnverifiedError(f"artefact {artefact.name}: {with_place(artefact.pending, opened.path)}")
            session._start(clock, progress)
        except BaseException:
            engine.close()
            raise
        return session

    def __init__(
        self, bundle: Bundle, artefact: Artefact, engine: Engine, threads: int,
        *, full_depth: bool = False, second_pass: bool = True, drift: bool = True,
    ) -> None:  # fmt: skip
        """Binds what ``open`` made; nothing is checked here. Use ``Session.open``."""
        self.manifest = bundle.manifest
        self.trust = bundle.trust
        self.artefact = artefact
        self.path = bundle.path
        self.spec = bundle.manifest.spec
        self.threads = threads
        self.full_depth = full_depth
        self.second_pass = second_pass
        self._checks_drift = drift
        self.startup: Mapping[str, float] = MappingProxyType({})
        # only the golden vectors stay in memory; the artefacts' bytes go with the bundle
        self._golden = _Golden(bundle, artefact)
        self.verified = artefact.trusted or passed_here(engine, bundle.manifest.bundle_id)
        self._drift = (
            DriftStatistic.from_bytes(bundle.read(DRIFT_FILE)) if DRIFT_FILE in bundle.manifest.files else None
        )
        whole = [other.name for other in self.artefacts if not other.sector]
        self._sector = watch_of(self.spec.sector if artefact.sector else None, whole)
        self._auxiliary: tuple[str, ...] = ()
        self._check: DriftCheck | None = None
        self._engine: Engine | None = engine
        self._description = engine.description
        self._executed = executed_in(engine, self.description, artefact.requirements)
        self._closed = False
        self._lock = threading.Lock()
        # filled again for every frame; whoever fills it holds the lock until the answer is made of the engine's outputs
        self._tensor = np.zeros(self.spec.input.shape, np.uint8)
        self._closer = np.zeros(self.spec.input.shape, np.uint8)
        self._turn = threading.Lock()
        # a loop of several models lets those that agree share a tensor
        self.prepare: Callable[..., tuple[np.ndarray, Placement]] = preprocess

    @property
    def description(self) -> str:
        """Artefact and engine really used, one line."""
        return f"{self.artefact.name} on {self._description}"

    @property
    def engine_description(self) -> str:
        """Engine really used, one line."""
        return self._description

    @property
    def executed(self) -> str:
        """What the engine computes in, such as in how many layers int8, or empty."""
        return self._executed

    @property
    def golden_frames(self) -> Sequence[Frame]:
        """The bundle's golden frames, phantoms all of them."""
        return self._golden.frames

    @property
    def artefacts(self) -> tuple[Artefact, ...]:
        """Every artefact of the bundle in its order; ``artefact`` is among them."""
        return tuple(self.manifest.artefacts)

    def __repr__(self) -> str:
        """Bundle, artefact and engine, one line."""
        end = "" if self.verified else ", not verified"
        return f"Session({self.path.name}: {self.description}{end}{', closed' if self._closed else ''})"

    def predict(
        self,
        frame: Frame | np.ndarray,
        *,
        spacing_mm: tuple[float, float] | None = None,
        pixel_format: PixelFormat | str | None = None,
    ) -> Prediction:
        """Answers for one frame.

        Args:
            frame: any frame the model's preprocessing can place, or its pixels: uint8, rows x columns (grey) or rows x
                columns x channels.
            spacing_mm: of pixels: (row, column) distance in mm; without it there is no reading in mm.
            pixel_format: of pixels: None is grey; nothing is guessed.

        Returns:
            The prediction; its arrays are its own.

        Raises:
            FrameError: not a frame and not usable pixels, the crop lies outside the frame, or spacing or format were
                given beside a frame that has its own.
            SectorError: the frame shows another sector than its artefact was pruned to (see numerics/sector.py).
            EngineError: the engine failed, was cancelled or closed.
        """
        start = time.perf_counter_ns()
        frame = as_frame(frame, spacing_mm, pixel_format)
        with self._turn:
            tensor, placement = self.prepare(frame, self.spec.preprocess, self._tensor)
            return self._predict(tensor, placement, frame, frame, start)

    def predict_tensor(self, tensor: np.ndarray, *, spacing_mm: tuple[float, float] | None = None) -> Prediction:
        """Answers for an input that was preprocessed elsewhere.

        Args:
            tensor: uint8 NCHW of exactly the model's input shape, C-contiguous.
            spacing_mm: (row, column) spacing of the *input's* pixels, or None.

        Returns:
            The prediction, its placement that of a frame of the input's size; there is no second pass.

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
            return self._predict(tensor, placement, None, frame, start)

    def run_golden(self, full: bool = False) -> GoldenReport:
        """Runs golden frames and compares; a difference is reported, not raised.

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
        """Whether the bundle has a drift statistic, and it is not off."""
        return self._drift is not None and self._checks_drift

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
        """Frees the engine after a prediction in progress has ended. Idempotent.

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

    def _check_start(self, progress: _Progress | None) -> GoldenReport:
        """A few golden frames on a CPU of the verified class, else all, once."""
        if self._on_verified_machine():
            return self.run_golden()
        memory = GoldenMemory(self.manifest.manifest_sha256, self.artefact.name, self._description, machine_card())
        if (before := memory.digest()) is not None:
            report = self.run_golden()
            if before == self._golden.digest:
                return replace(report, against=REMEMBERED, reasons=())
        _log.info("first start on this machine: all %d golden frames are checked", len(self._golden.frames))
        report = self._golden.check(self, full=True, progress=progress)
        if report:
            memory.keep(self._golden.digest, report.to_json())
        return report

    def _start(self, clock: StartClock, progress: _Progress | None = None) -> None:
        frame = self._golden.frames[0]
        watch, self._sector = self._sector, None  # golden frames are phantoms, and may have another sector
        self._auxiliary = tuple(self.predict(frame).auxiliary)
        if self._drift is not None and self._checks_drift:
            self._check = DriftCheck(self._drift, self._auxiliary)
        clock.lap("first_frame")
        report = self._check_start(progress)
        if not report:
            raise EngineError(
                f"{self.description} does not answer as the artefact should ({report.frames} golden frames against "
                f"{report.against}: {'; '.join(report.reasons) or 'none compared'}): export it again on this machine"
            )
        clock.lap("golden")
        for _ in range(WARM_UP_RUNS):
            self.predict(frame)
        self._sector = watch
        clock.lap("warm_up")
        self.startup = MappingProxyType(clock.laps)

    def _on_verified_machine(self) -> bool:
        needs = self.artefact.requirements
        if getattr(load("engines", self.artefact.engine), "EXACT", False):
            return not self.artefact.pending  # it answers with the same bytes on every machine
        return (
            not self.artefact.pending and same_class(needs.get("cpu_features"), machine_card()) and same_library(needs)
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
        self, tensor: np.ndarray, placement: Placement, seen: Frame | None, frame: Frame, start_ns: int
    ) -> Prediction:
        """Predicts; ``seen`` is a frame for a second look, ``frame`` stands for it."""
        if self._sector is not None:
            self._sector.look(tensor)
        before = time.perf_counter_ns()
        outputs = self._infer(tensor)
        after = time.perf_counter_ns()
        stopped = outputs.pop(EXIT_NAME, None)
        passed = read_outputs(
            outputs, self._infer, self.spec, seen, tensor, placement, second_pass=self.second_pass, spare=self._closer
        )
        answered = passed.answer
        read_ns = time.perf_counter_ns()
        status, drift = self._drift_of(answered.auxiliary, frame, valid=answered.valid)
        strange = drift is not None and drift.strange
        end = time.perf_counter_ns()
        drift_ms = (end - read_ns) / 1e6
        return Prediction(
            seq=frame.seq,
            mask_HW=answered.mask_HW,
            placement=placement,
            scores=answered.scores,
            measurements=answered.measurements,
            engine=self._description,
            target=self.artefact.target,
            precision=self.artefact.precision,
            verified=self.verified,
            valid=answered.valid,
            timings=Timings(
                preprocess_ms=(before - start_ns) / 1e6,
                infer_ms=(after - before) / 1e6,
                postprocess_ms=(read_ns - after) / 1e6 - passed.second_ms,
                total_ms=(end - start_ns) / 1e6,
                second_pass_ms=passed.second_ms,
                drift_ms=drift_ms,
            ),
            t_recv_ns=frame.t_recv_ns,
            age_ms=None if frame.t_recv_ns is None else (time.monotonic_ns() - frame.t_recv_ns) / 1e6,
            auxiliary={name: value.copy() for name, value in answered.auxiliary.items()},
            drift=drift,
            exit_index=None if stopped is None else int(stopped[0]),
            confidence=confidence_of(passed, self.spec),
            judged=judged_of(passed, self.spec, placement, strange=strange),
            second_pass=passed.second_pass,
            drift_status=status,
        )

    def _drift_of(
        self, auxiliary: Mapping[str, np.ndarray], frame: Frame, *, valid: bool
    ) -> tuple[DriftStatus, DriftReading | None]:
        if frame.phantom and self._drift is not None and self._checks_drift:
            return DriftStatus.NOT_APPLIED, None
        if self._check is None:
            return DriftStatus.NOT_CHECKED, None
        return DriftStatus.CHECKED, self._check.look(auxiliary, frame, valid=valid)


class _Golden:
    """The golden files of one artefact: packed bytes, unpacked when they are compared."""

    def __init__(self, bundle: Bundle, artefact: Artefact) -> None:
        names = (GOLDEN_FRAMES, artefact.reference, artefact.golden)
        self._small = Bundle(bundle.path, bundle.manifest, {name: bundle.read(name) for name in names})
        self._artefact = artefact
        self.digest = ""
        """Hash of the last answers to the frames of a usual start."""
        self.frames: Sequence[Frame] = self._small.golden_frames()

    def check(self, session: Session, *, full: bool, progress: _Progress | None = None) -> GoldenReport:
        # own answers of an artefact that waits for its device come from a stand-in: only the reference counts there
        against_reference = full and (self._artefact.trusted or bool(self._artefact.pending))
        path = self._artefact.reference if against_reference else self._artefact.golden
        stored = self._small.golden_reference(path) if against_reference else self._small.golden_artefact(path)
        want, count = stored["logits"], len(self.frames)
        if len(want) != count:
            raise BundleError(f"the bundle has {count} golden frames and {len(want)} golden answers")
        some = {i * count // GOLDEN_FRAMES_AT_START for i in range(GOLDEN_FRAMES_AT_START)}
        chosen = list(range(count)) if full else sorted(some)
        prepared = [preprocess(self.frames[i], session.spec.preprocess) for i in chosen]
        answers = []
        with session._turn:
            for number, (tensor, _) in enumerate(prepared):
                answers.append(session._logits(tensor))
                if progress is not None:
                    progress("checking this machine", (number + 1) / len(prepared))
        got = np.stack(answers)
        self.digest = digest_of(got[[place for place, index in enumerate(chosen) if index in some]])
        placements = [placement for _, placement in prepared]
        if against_reference:
            report = reference_check(got, want[chosen], session.spec, placements, gate_limits(self._artefact))
        else:
            report = golden_check(got, want[chosen], session.spec, placements, self._artefact.tolerance)
        faults = spec_faults(stored, self._small.golden_digest(path), session.spec, prepared, chosen)
        return replace(report, reasons=(*report.reasons, *faults))


def _load_engine(bundle: Bundle, artefact: Artefact, config: EngineConfig, *, full_depth: bool) -> Engine:
    others = [other for other in bundle.manifest.artefacts if other is not artefact]
    choices = " and ".join(other.name for other in others)
    hint = f" (the bundle also has {choices})" if others else ""  # never taken unasked
    if artefact.engine not in names("engines"):
        raise UnsupportedError(f"artefact {artefact.name} needs an engine {artefact.engine!r} unknown here{hint}")
    files = bundle.artefact_files(artefact)
    engine = make_engine(artefact.engine, files, full_depth=full_depth)
    try:
        engine.load(files, bundle.manifest.spec, config)
    except MissingExtra as error:
        raise MissingExtra(f"artefact {artefact.name}{hint}", error.library, error.extra) from error
    except UnsupportedError as error:
        engine.close()
        raise UnsupportedError(with_place(str(error), bundle.path)) from error
    except BaseException:
        engine.close()
        raise
    return engine


def as_frame(
    frame: Frame | np.ndarray,
    spacing_mm: tuple[float, float] | None = None,
    pixel_format: PixelFormat | str | None = None,
) -> Frame:
    """The frame as it is, or one around pixels.

    Args:
        frame: a frame, or uint8 pixels.
        spacing_mm: of pixels: (row, column) distance in mm, or None.
        pixel_format: of pixels: None is grey.

    Raises:
        FrameError: neither, or a frame with a second spacing or format beside it.
    """
    if isinstance(frame, Frame):
        if spacing_mm is not None or pixel_format is not None:
            raise FrameError("a Frame carries its own spacing_mm and pixel_format: give them to Frame(...)")
        return frame
    if not isinstance(frame, np.ndarray):
        raise FrameError(f"predict takes a Frame or a numpy uint8 array of pixels, not {type(frame).__name__}")
    given = PixelFormat.GREY if pixel_format is None else pixel_format
    return Frame(pixels=frame, spacing_mm=spacing_mm, pixel_format=given)  # type: ignore[arg-type]


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
        raise UnsupportedError(f"engine {name!r} runs no chain of early exits: take onnx, openvino or litert")
    return ChainEngine(module.Engine, full_depth=full_depth)


__all__ = [
    "CLOSE_GRACE_S",
    "CLOSE_WAIT_S",
    "GOLDEN_FRAMES_AT_START",
    "WARM_UP_RUNS",
    "Session",
    "as_frame",
    "make_engine",
]
