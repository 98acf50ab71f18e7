"""Messages between a program and the process its engine runs in.

A JSON head, then arrays as raw bytes.

    4 bytes   length of the head, big-endian
    head      JSON, ASCII: kind, number, and for every array its name, type and shape
    arrays    one after another, C order

Both ends are ours and start together, so there are no versions; what does not fit is a ValueError, and the process is
given up. Nothing here is ever unpickled.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, BinaryIO

import numpy as np

from tinyusfm_runtime.frame import Frame, PixelFormat, VideoRange
from tinyusfm_runtime.numerics.measure import Measurement
from tinyusfm_runtime.numerics.preprocess import Placement
from tinyusfm_runtime.reading import DriftStatus, Judged, ReadingState, Reason, SecondPassState
from tinyusfm_runtime.results import DriftReading, Prediction, Timings

HELLO, PREDICT, CANCEL, ANSWER, REFUSED, FAILED, PULSE, PROGRESS, OTHER_SECTOR = (
    "hello", "predict", "cancel", "answer", "refused", "failed", "pulse", "progress",
    "other_sector",
)  # fmt: skip
"""Kinds of messages: the session is open; a frame; stop; a prediction; FrameError; EngineError; I live; how far opening
is; SectorError."""
_MAX_HEAD, _MAX_ARRAY = 1 << 20, 1 << 30
_TYPES = ("uint8", "int8", "uint16", "int16", "int32", "int64", "float16", "float32", "float64", "bool")


@dataclass(frozen=True, slots=True)
class Message:
    """One message: its head, and its arrays by name."""

    head: dict[str, Any]
    arrays: dict[str, np.ndarray]


def send(pipe: BinaryIO, head: Mapping[str, Any], arrays: Mapping[str, np.ndarray] | None = None) -> None:
    """Writes one message.

    Raises:
        OSError: the other end is gone.
        ValueError: an array of a type that is not sent, or the pipe is closed.
    """
    solid = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
    listed = [[name, str(array.dtype), list(array.shape)] for name, array in solid.items()]
    if unknown := [dtype for _, dtype, _ in listed if dtype not in _TYPES]:
        raise ValueError(f"arrays of type {unknown[0]} are not sent")
    text = json.dumps({**head, "arrays": listed}).encode("ascii")
    _write(pipe, len(text).to_bytes(4, "big") + text)
    for array in solid.values():
        if array.size:
            _write(pipe, array.reshape(-1).view(np.uint8).data)


def receive(pipe: BinaryIO) -> Message | None:
    """Reads one message; None where the other end has closed between two of them.

    Raises:
        EOFError: it has closed within one.
        ValueError: this is no message.
    """
    first = pipe.read(4)
    if not first:
        return None
    size = int.from_bytes(_all(first, 4), "big")
    if not 2 <= size <= _MAX_HEAD:
        raise ValueError("the head of a message is too long")
    head = json.loads(_all(pipe.read(size), size).decode("ascii"))
    arrays = {}
    for name, dtype, shape in head.pop("arrays"):
        if dtype not in _TYPES:
            raise ValueError("an array of a type that is not sent")
        array = np.empty([int(side) for side in shape], dtype)
        if array.nbytes > _MAX_ARRAY:
            raise ValueError("an array is too large")
        if array.size:
            _read_into(pipe, array.reshape(-1).view(np.uint8).data)
        arrays[name] = array
    return Message(head, arrays)


def send_frame(pipe: BinaryIO, number: int, frame: Frame) -> None:
    """Writes a frame that is to be answered under a number."""
    head = {
        "kind": PREDICT,
        "number": number,
        "frame": {
            "pixel_format": PixelFormat(frame.pixel_format).value,
            "video_range": VideoRange(frame.video_range).value,
            "spacing_mm": frame.spacing_mm,
            "seq": frame.seq,
            "t_source_ns": frame.t_source_ns,
            "t_recv_ns": frame.t_recv_ns,
            "orientation": frame.orientation,
            "crop": frame.crop,
            "phantom": frame.phantom,
        },
    }
    send(pipe, head, {"pixels": frame.pixels})


def frame_of(message: Message) -> Frame:
    """The frame in a message."""
    head = message.head["frame"]
    pair, box = head["spacing_mm"], head["crop"]
    return Frame(
        pixels=message.arrays["pixels"],
        pixel_format=PixelFormat(head["pixel_format"]),
        video_range=VideoRange(head["video_range"]),
        spacing_mm=None if pair is None else (pair[0], pair[1]),
        seq=head["seq"],
        t_source_ns=head["t_source_ns"],
        t_recv_ns=head["t_recv_ns"],
        orientation=head["orientation"],
        crop=None if box is None else (box[0], box[1], box[2], box[3]),
        phantom=head["phantom"],
    )


def send_prediction(pipe: BinaryIO, number: int, prediction: Prediction) -> None:
    """Writes an answer."""
    plain = {name: getattr(prediction, name) for name in _PLAIN}
    arrays = {f"+{name}": value for name, value in prediction.auxiliary.items()}
    for name in ("mask_HW", "scores"):
        if (value := getattr(prediction, name)) is not None:
            arrays[name] = value
    head = {
        "kind": ANSWER,
        "number": number,
        "prediction": plain,
        "placement": asdict(prediction.placement),
        "timings": asdict(prediction.timings),
        "measurements": [asdict(measured) for measured in prediction.measurements],
        "judged": [[one.state.value, [reason.value for reason in one.reasons]] for one in prediction.judged],
        "drift": None if prediction.drift is None else asdict(prediction.drift),
        "second_pass": prediction.second_pass.value,
        "drift_status": prediction.drift_status.value,
    }
    send(pipe, head, arrays)


_PLAIN = (
    "seq", "engine", "target", "precision", "verified", "degraded", "valid", "t_recv_ns", "age_ms", "exit_index",
    "confidence",
)  # fmt: skip


def prediction_of(message: Message) -> Prediction:
    """The prediction in a message."""
    head, arrays = message.head, message.arrays
    drift = head["drift"]
    return Prediction(
        **head["prediction"],
        mask_HW=arrays.get("mask_HW"),
        scores=arrays.get("scores"),
        placement=Placement(**_tupled(head["placement"])),
        timings=Timings(**head["timings"]),
        measurements=tuple(Measurement(**_tupled(measured)) for measured in head["measurements"]),
        judged=tuple(
            Judged(ReadingState(state), tuple(Reason(reason) for reason in reasons))
            for state, reasons in head["judged"]
        ),
        drift=None if drift is None else DriftReading(**drift),
        second_pass=SecondPassState(head["second_pass"]),
        drift_status=DriftStatus(head["drift_status"]),
        auxiliary={name[1:]: value for name, value in arrays.items() if name.startswith("+")},
    )


class Answers:
    """Where answers wait for whoever asked.

    Answers to calls that were given up are thrown away.
    """

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._answer: tuple[int, str, Any] | None = None
        self._ended = False

    def put(self, message: Message) -> None:
        """Takes what was received."""
        kind, number = message.head["kind"], int(message.head.get("number", 0))
        content: Any = message.head.get("text")
        if kind == ANSWER:
            content = prediction_of(message)
        elif kind == HELLO:
            content = message.head["hello"]
        with self._condition:
            self._answer = (number, kind, content)
            self._condition.notify_all()

    def take(self, number: int, timeout_s: float | None) -> tuple[str, Any]:
        """Waits for the answer of a number.

        Returns:
            Its kind and content.

        Raises:
            EOFError: there will be none.
            TimeoutError: there is none yet.
        """
        with self._condition:
            there = self._condition.wait_for(lambda: self._ended or self._is(number), timeout_s)
            if self._is(number):
                assert self._answer is not None
                _, kind, content = self._answer
                self._answer = None
                return kind, content
            if not there:
                raise TimeoutError
            raise EOFError

    def end(self) -> None:
        """Nothing more will come."""
        with self._condition:
            self._ended = True
            self._condition.notify_all()

    def _is(self, number: int) -> bool:
        return self._answer is not None and self._answer[0] == number


def _tupled(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples."""
    return {name: _tuple(value) for name, value in values.items()}


def _tuple(value: Any) -> Any:
    return tuple(_tuple(item) for item in value) if isinstance(value, list) else value


def _write(pipe: BinaryIO, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[(pipe.write(view) or 0) :]


def _all(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise EOFError
    return data


def _read_into(pipe: BinaryIO, view: memoryview) -> None:
    while view:
        count = pipe.readinto(view)  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        view = view[count:]


__all__ = [
    "ANSWER", "CANCEL", "FAILED", "HELLO", "OTHER_SECTOR", "PREDICT", "PROGRESS", "PULSE", "REFUSED",
    "Answers", "Message", "frame_of",
    "prediction_of", "receive", "send", "send_frame", "send_prediction",
]  # fmt: skip
