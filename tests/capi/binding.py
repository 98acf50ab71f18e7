"""tinyusfm.h through ctypes: proof that any language can bind it, and how the tests drive the library.

Structs are written down field by field, so a change of the ABI fails here before it fails in somebody's program.
"""

from __future__ import annotations

import ctypes as c
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

ABI = 1
NO_TIME = -(1 << 63)
CODES = (
    "OK", "INPUT", "FRAME", "SOURCE", "MISSING", "UNSUPPORTED", "BUNDLE", "TAMPERED", "UNVERIFIED", "ENGINE", "OUTPUT",
    "NO_MEMORY", "UNTRUSTED",
)  # fmt: skip
"""enum tusfm_code."""
FORMATS = {"grey": 0, "rgb": 1, "bgr": 2, "rgba": 3}
TRUST = ("unchecked", "good", "doubtful", "none")
"""enum tusfm_trust."""
REASONS = ("confidence", "agreement", "border", "sector", "size", "spacing", "drift")
"""enum tusfm_reason, the first is 1."""
SECOND_PASS = ("never", "not needed", "done", "off")
DRIFT = ("not checked", "checked", "not applied")
STATES = ("live", "stale", "frozen", "lost", "degraded")
LOG = c.CFUNCTYPE(None, c.c_void_p, c.c_int32, c.c_char_p)
FLOOR_READ = c.CFUNCTYPE(c.c_int64, c.c_void_p, c.c_char_p)
FLOOR_RAISE = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_char_p, c.c_int64)
GIVE = c.CFUNCTYPE(None, c.c_void_p, c.c_void_p)
LOOK = c.CFUNCTYPE(None, c.c_void_p, c.c_int32)
HOLDS = c.CFUNCTYPE(c.c_int32, c.c_void_p)
SIZE_OF = c.CFUNCTYPE(c.c_int64, c.c_void_p, c.c_char_p)
READ = c.CFUNCTYPE(c.c_int32, c.c_void_p, c.c_char_p, c.c_void_p, c.c_uint64)


class Frame(c.Structure):
    """tusfm_frame."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("format", c.c_int32), ("pixels", c.c_void_p), ("row_stride", c.c_int64),
        ("rows", c.c_int32), ("columns", c.c_int32), ("roi_row", c.c_int32), ("roi_column", c.c_int32),
        ("roi_rows", c.c_int32), ("roi_columns", c.c_int32), ("limited_range", c.c_int32), ("phantom", c.c_int32),
        ("spacing_row_mm", c.c_double), ("spacing_column_mm", c.c_double), ("seq", c.c_int64),
        ("t_source_ns", c.c_int64), ("t_recv_ns", c.c_int64),
    )  # fmt: skip


class Reading(c.Structure):
    """tusfm_reading."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("valid", c.c_int32), ("verified", c.c_int32), ("degraded", c.c_int32),
        ("seq", c.c_int64), ("t_recv_ns", c.c_int64), ("age_ms", c.c_double), ("preprocess_ms", c.c_double),
        ("infer_ms", c.c_double), ("postprocess_ms", c.c_double), ("total_ms", c.c_double), ("mask", c.c_void_p),
        ("mask_rows", c.c_int32), ("mask_columns", c.c_int32), ("scores", c.POINTER(c.c_float)),
        ("score_count", c.c_int32), ("exit_index", c.c_int32), ("crop", c.c_int32 * 4), ("box", c.c_int32 * 4),
        ("frame_rows", c.c_int32), ("frame_columns", c.c_int32), ("spacing_row_mm", c.c_double),
        ("spacing_column_mm", c.c_double), ("measured", c.c_int32), ("found", c.c_int32), ("hc_mm", c.c_double),
        ("hc_px", c.c_double), ("major_mm", c.c_double), ("minor_mm", c.c_double), ("major_px", c.c_double),
        ("minor_px", c.c_double), ("centre_row", c.c_double), ("centre_column", c.c_double), ("angle_deg", c.c_double),
        ("area_px", c.c_double), ("touches_border", c.c_int32), ("trust", c.c_int32), ("confidence", c.c_double),
        ("index", c.c_int64), ("dropped_since_last", c.c_int64), ("stale", c.c_int32), ("withheld", c.c_int32),
        ("level", c.c_int32), ("state", c.c_int32), ("answered", c.c_int32), ("reserved", c.c_int32),
        ("error", c.c_char_p), ("engine", c.c_char_p), ("reasons", c.c_int32), ("cut_by_sector", c.c_int32),
        ("second_pass", c.c_int32), ("drift", c.c_int32), ("strange", c.c_int32), ("drift_kind", c.c_int32),
        ("drift_score", c.c_double), ("drift_threshold", c.c_double), ("strangest", c.c_char_p),
        ("area_mm2", c.c_double), ("agreement", c.c_double), ("bounds_px", c.c_double * 4),
        ("centroid_row", c.c_double), ("centroid_column", c.c_double), ("second_pass_ms", c.c_double),
        ("drift_ms", c.c_double), ("labels", c.c_void_p), ("label_count", c.c_int32), ("reserved_end", c.c_int32),
        ("drift_share", c.c_double), ("drift_frames", c.c_int32), ("drift_window", c.c_int32),
        ("drift_alarm", c.c_int32), ("reserved_drift", c.c_int32),
    )  # fmt: skip

    def mask_HW(self) -> np.ndarray | None:
        """A copy of the mask, uint8 HW, or None."""
        if not self.mask:
            return None
        count = self.mask_rows * self.mask_columns
        return np.frombuffer(c.string_at(self.mask, count), np.uint8).reshape(self.mask_rows, self.mask_columns).copy()

    def scores_K(self) -> np.ndarray | None:
        """A copy of the scores, float32, or None."""
        return np.array(self.scores[: self.score_count], np.float32) if self.scores else None


class Measurement(c.Structure):
    """tusfm_measurement."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("found", c.c_int32), ("label", c.c_char_p), ("trust", c.c_int32),
        ("reasons", c.c_int32), ("has_ellipse", c.c_int32), ("touches_border", c.c_int32), ("cut_by_sector", c.c_int32),
        ("contour_points", c.c_int32), ("confidence", c.c_double), ("area_px", c.c_double), ("area_mm2", c.c_double),
        ("bounds_px", c.c_double * 4), ("centroid_row", c.c_double), ("centroid_column", c.c_double),
        ("hc_mm", c.c_double), ("hc_px", c.c_double), ("major_mm", c.c_double), ("minor_mm", c.c_double),
        ("major_px", c.c_double), ("minor_px", c.c_double), ("centre_row", c.c_double), ("centre_column", c.c_double),
        ("angle_deg", c.c_double), ("agreement", c.c_double), ("contour_px", c.c_double * 128),
    )  # fmt: skip


class Options(c.Structure):
    """tusfm_options."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("abi", c.c_uint32), ("target", c.c_char_p), ("precision", c.c_char_p),
        ("engine_folder", c.c_char_p), ("threads", c.c_int32), ("allow_unverified", c.c_int32),
        ("allow_precision", c.c_int32), ("fallback", c.c_int32), ("full_depth", c.c_int32),
        ("misses_in_a_row", c.c_int32), ("budget_ms", c.c_double), ("deadline_ms", c.c_double),
        ("give_up_ms", c.c_double), ("grace_ms", c.c_double), ("overlay_limit_ms", c.c_double),
        ("recheck_s", c.c_double), ("log", LOG), ("log_user", c.c_void_p),
        ("no_second_pass", c.c_int32), ("no_drift", c.c_int32), ("trust", c.c_void_p),
        ("all_golden", c.c_int32), ("reserved", c.c_int32),
    )  # fmt: skip


class TrustOptions(c.Structure):
    """tusfm_trust_options."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("require_signed", c.c_int32), ("store", c.c_char_p), ("device_class", c.c_char_p),
        ("role", c.c_char_p), ("floor_read", FLOOR_READ), ("floor_raise", FLOOR_RAISE), ("floor_user", c.c_void_p),
        ("floor_file", c.c_char_p), ("today", c.c_int32), ("reserved", c.c_int32),
    )  # fmt: skip


class File(c.Structure):
    """tusfm_file."""

    _fields_ = (("path", c.c_char_p), ("data", c.c_char_p), ("size", c.c_uint64))


class Reader(c.Structure):
    """tusfm_reader."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("reserved", c.c_uint32), ("user", c.c_void_p), ("size", SIZE_OF), ("read", READ),
    )  # fmt: skip


class Info(c.Structure):
    """tusfm_info."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("verified", c.c_int32), ("model", c.c_char_p), ("task", c.c_char_p),
        ("artefact", c.c_char_p), ("engine", c.c_char_p), ("precision", c.c_char_p), ("executed", c.c_char_p),
        ("bundle_sha256", c.c_char_p), ("intended_use", c.c_char_p), ("threads", c.c_int32), ("input_rows", c.c_int32),
        ("input_columns", c.c_int32), ("label_count", c.c_int32), ("artefacts", c.c_int32),
        ("golden_frames", c.c_int32), ("verify_ms", c.c_double), ("load_ms", c.c_double), ("golden_ms", c.c_double),
        ("warm_up_ms", c.c_double), ("in_place", c.c_int32), ("reserved_end", c.c_int32),
    )  # fmt: skip


class Artefact(c.Structure):
    """tusfm_artefact."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("count", c.c_int32), ("verified", c.c_int32), ("built_in", c.c_int32),
        ("name", c.c_char * 128), ("target", c.c_char * 64), ("precision", c.c_char * 32), ("engine", c.c_char * 32),
    )  # fmt: skip


class Lease(c.Structure):
    """tusfm_lease."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("reserved", c.c_uint32), ("user", c.c_void_p), ("look", LOOK), ("holds", HOLDS),
    )  # fmt: skip


class Counters(c.Structure):
    """tusfm_counters."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("state", c.c_int32), ("received", c.c_int64), ("processed", c.c_int64),
        ("overtaken", c.c_int64), ("out_of_order", c.c_int64), ("duplicate", c.c_int64), ("closing", c.c_int64),
        ("rejected", c.c_int64), ("waiting", c.c_int64), ("unseen", c.c_int64), ("restarts", c.c_int64),
    )  # fmt: skip

    @property
    def balanced(self) -> bool:
        """Whether every received frame is accounted for."""
        dropped = self.overtaken + self.out_of_order + self.duplicate + self.closing
        return bool(self.received == self.processed + dropped + self.rejected + self.waiting)


class SwapOptions(c.Structure):
    """tusfm_swap_options."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("shadow_frames", c.c_int32), ("probation_frames", c.c_int32),
        ("reserved", c.c_int32), ("min_dice", c.c_double), ("patience_s", c.c_double),
    )  # fmt: skip


class SwapReport(c.Structure):
    """tusfm_swap_report."""

    _fields_ = (
        ("struct_size", c.c_uint32), ("outcome", c.c_int32), ("load_ms", c.c_double), ("switch_ms", c.c_double),
        ("dice_mean", c.c_double), ("dice_worst", c.c_double), ("hc_max_mm", c.c_double), ("shadow_frames", c.c_int64),
        ("bundle_sha256", c.c_char * 65), ("reason", c.c_char * 255),
    )  # fmt: skip


STRUCTS: Mapping[str, type[c.Structure]] = {
    "frame": Frame, "reading": Reading, "measurement": Measurement, "options": Options, "info": Info,
    "trust_options": TrustOptions, "artefact": Artefact, "lease": Lease,
    "counters": Counters, "swap_options": SwapOptions, "swap_report": SwapReport,
}  # fmt: skip
"""Structs that have an _init function, by the middle of its name."""


def reasons_of(bits: int) -> tuple[str, ...]:
    """Names of what speaks against a reading."""
    return tuple(name for place, name in enumerate(REASONS) if bits >> place & 1)


class Failed(Exception):
    """A status: ``code`` is its name without the prefix."""

    def __init__(self, code: str, text: str) -> None:
        self.code = code
        super().__init__(f"{code}: {text}")


class Library:
    """The shared library with its signatures.

    Args:
        path: of libtinyusfm.so.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        lib = self.lib = c.CDLL(str(path))
        status, pointer = c.c_void_p, c.c_void_p
        signatures: dict[str, tuple[Any, list[Any]]] = {
            "tusfm_abi": (c.c_uint32, []), "tusfm_version": (c.c_char_p, []), "tusfm_now_ns": (c.c_int64, []),
            "tusfm_status_code": (c.c_int32, [status]), "tusfm_status_text": (c.c_char_p, [status]),
            "tusfm_status_free": (None, [status]),
            "tusfm_open": (status, [c.c_char_p, pointer, pointer]),
            "tusfm_open_memory": (status, [pointer, c.c_size_t, pointer, pointer]),
            "tusfm_open_reader": (status, [pointer, pointer, pointer]),
            "tusfm_get_artefact": (status, [c.c_char_p, pointer, c.c_int32, pointer]),
            "tusfm_get_info": (status, [pointer, pointer]), "tusfm_label": (c.c_char_p, [pointer, c.c_int32]),
            "tusfm_predict": (status, [pointer, pointer, pointer]),
            "tusfm_get_measurement": (status, [pointer, c.c_int32, pointer]),
            "tusfm_mask_on_frame": (status, [pointer, pointer, c.c_int64]), "tusfm_cancel": (None, [pointer]),
            "tusfm_submit": (status, [pointer, pointer]),
            "tusfm_answer": (status, [pointer, pointer, pointer, GIVE, pointer]),
            "tusfm_room": (status, [pointer, c.c_int64, pointer]),
            "tusfm_newest": (status, [pointer, c.c_double, pointer, pointer]),
            "tusfm_overlay": (status, [pointer, pointer, pointer]), "tusfm_contact": (None, [pointer]),
            "tusfm_get_counters": (status, [pointer, pointer]),
            "tusfm_swap": (status, [pointer, c.c_char_p, pointer, pointer]), "tusfm_close": (None, [pointer]),
            "tusfm_drift_monitor_new": (status, [c.c_int32, pointer]),
            "tusfm_drift_observe": (status, [pointer, pointer]), "tusfm_drift_monitor_free": (None, [pointer]),
        }  # fmt: skip
        signatures |= {f"tusfm_{name}_init": (None, [pointer, c.c_size_t]) for name in STRUCTS}
        for name, (result, arguments) in signatures.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        self.names = frozenset(signatures)

    def check(self, status: int | None) -> None:
        """Raises Failed for a status that is not NULL, and frees it."""
        if status:
            code, text = self.lib.tusfm_status_code(status), self.lib.tusfm_status_text(status).decode()
            self.lib.tusfm_status_free(status)
            raise Failed(CODES[code], text)

    def make(self, name: str, **values: Any) -> Any:
        """A struct, filled in by its _init function and then changed."""
        struct = STRUCTS[name]()
        getattr(self.lib, f"tusfm_{name}_init")(c.byref(struct), c.sizeof(struct))
        for field, value in values.items():
            setattr(struct, field, value.encode() if isinstance(value, str) else value)
        return struct

    def frame(self, pixels: np.ndarray, pixel_format: str = "grey", **values: Any) -> Frame:
        """A frame over an array whose pixels lie next to one another; the array must live as long as the frame."""
        assert pixels.strides[1:] == ((1,) if pixels.ndim == 2 else (pixels.shape[2], 1))
        frame: Frame = self.make(
            "frame", pixels=pixels.ctypes.data, row_stride=pixels.strides[0], rows=pixels.shape[0],
            columns=pixels.shape[1], format=FORMATS[pixel_format], **values,
        )  # fmt: skip
        frame.kept = pixels
        return frame


class Session:
    """A tusfm_session that closes itself.

    Args:
        library: the library.
        bundle: its folder, or path inside the bundle -> content.
        reader: hand the content in through a tusfm_reader.
        log: called with what happens.
        trust: fields of tusfm_trust_options, or None.
        options: fields of tusfm_options.
    """

    def __init__(
        self,
        library: Library,
        bundle: Path | Mapping[str, bytes],
        *,
        reader: bool = False,
        log: Callable[[int, str], None] | None = None,
        trust: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.library, self.handle = library, c.c_void_p()
        told = LOG(lambda _user, level, text: log(level, text.decode()) if log else None)
        self._log = told
        given = library.make("options", log=told, **options)
        if trust is not None:
            self._trust = library.make("trust_options", **trust)
            given.trust = c.addressof(self._trust)
        lib, place = library.lib, c.byref(self.handle)
        if not isinstance(bundle, Mapping):
            library.check(lib.tusfm_open(str(bundle).encode(), c.byref(given), place))
        elif reader:
            library.check(lib.tusfm_open_reader(c.byref(_reader_of(bundle)), c.byref(given), place))
        else:
            files = (File * len(bundle))(*[File(name.encode(), raw, len(raw)) for name, raw in bundle.items()])
            library.check(lib.tusfm_open_memory(files, len(bundle), c.byref(given), place))

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def predict(self, frame: Frame) -> Reading:
        reading: Reading = self.library.make("reading")
        self.library.check(self.library.lib.tusfm_predict(self.handle, c.byref(frame), c.byref(reading)))
        return reading

    def submit(self, frame: Frame) -> None:
        self.library.check(self.library.lib.tusfm_submit(self.handle, c.byref(frame)))

    def answer(self, frame: Frame, lease: Lease | None = None) -> Reading | None:
        """The reading of a frame answered in this thread, or None; its pointers are good until the next call."""
        taken: list[Reading] = []

        def give(_user: int | None, reading: int) -> None:
            kept = Reading()
            c.memmove(c.byref(kept), reading, c.sizeof(kept))
            taken.append(kept)

        there = c.byref(lease) if lease is not None else None
        self.library.check(self.library.lib.tusfm_answer(self.handle, c.byref(frame), there, GIVE(give), None))
        return taken[0] if taken else None

    def room(self, count: int) -> int:
        """Address of the session's own memory for the next frame."""
        place = c.c_void_p()
        self.library.check(self.library.lib.tusfm_room(self.handle, c.c_int64(count), c.byref(place)))
        assert place.value is not None
        return place.value

    def newest(self, wait_ms: float = 0.0) -> Reading | None:
        return self._there("tusfm_newest", c.c_double(wait_ms))

    def overlay(self) -> Reading | None:
        return self._there("tusfm_overlay")

    def info(self) -> Info:
        info: Info = self.library.make("info")
        self.library.check(self.library.lib.tusfm_get_info(self.handle, c.byref(info)))
        return info

    def counters(self) -> Counters:
        counters: Counters = self.library.make("counters")
        self.library.check(self.library.lib.tusfm_get_counters(self.handle, c.byref(counters)))
        return counters

    def swap(self, bundle: Path, **options: Any) -> SwapReport:
        report: SwapReport = self.library.make("swap_report")
        given = self.library.make("swap_options", **options)
        lib = self.library.lib
        self.library.check(lib.tusfm_swap(self.handle, str(bundle).encode(), c.byref(given), c.byref(report)))
        return report

    def measurements(self, reading: Reading) -> list[Measurement]:
        """Those of all labels of a reading whose pointers are still good."""
        found = []
        for index in range(reading.label_count):
            measured = self.library.make("measurement")
            self.library.check(self.library.lib.tusfm_get_measurement(c.byref(reading), index, c.byref(measured)))
            found.append(measured)
        return found

    def mask_on_frame(self, reading: Reading) -> np.ndarray:
        out = np.full((reading.frame_rows, reading.frame_columns), 77, np.uint8)
        self.library.check(self.library.lib.tusfm_mask_on_frame(c.byref(reading), out.ctypes.data, 0))
        return out

    def cancel(self) -> None:
        self.library.lib.tusfm_cancel(self.handle)

    def close(self) -> None:
        handle, self.handle = self.handle, c.c_void_p()
        self.library.lib.tusfm_close(handle)

    def _there(self, name: str, *arguments: Any) -> Reading | None:
        reading, there = self.library.make("reading"), c.c_int32()
        function = getattr(self.library.lib, name)
        self.library.check(function(self.handle, *arguments, c.byref(reading), c.byref(there)))
        return reading if there.value else None


class DriftMonitor:
    """A tusfm_drift_monitor that frees itself.

    Args:
        library: the library.
        window: frames that decide together, 0 for the usual ones.
    """

    def __init__(self, library: Library, window: int = 0) -> None:
        self.library, self.handle = library, c.c_void_p()
        library.check(library.lib.tusfm_drift_monitor_new(window, c.byref(self.handle)))

    def __enter__(self) -> DriftMonitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.library.lib.tusfm_drift_monitor_free(self.handle)

    def observe(self, reading: Reading) -> None:
        self.library.check(self.library.lib.tusfm_drift_observe(self.handle, c.byref(reading)))


def _reader_of(files: Mapping[str, bytes]) -> Reader:
    def size(_user: Any, path: bytes) -> int:
        raw = files.get(path.decode())
        return -1 if raw is None else len(raw)

    def read(_user: Any, path: bytes, into: int, count: int) -> int:
        c.memmove(into, files[path.decode()], count)
        return 0

    return Reader(c.sizeof(Reader), 0, None, SIZE_OF(size), READ(read))
