"""Chosen attacks of ``broken.py``: external data, pickles that would run code, archives and folders with traps.

Every payload leaves a marker file if it runs; a marker is a fault, and so is what is accepted.
"""

from __future__ import annotations

import io
import os
import pickle
import shutil
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broken_outcome import Outcome, hashed_again, try_once
from tinyusfm_edge.models.weights_file import read_weights_file
from tinyusfm_runtime.bundle.manifest import MANIFEST_NAME, read_manifest
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.session import Session

LIMIT_S = 1.0
LIMIT = "refused, no code run, 1 s"
EXTERNAL: dict[str, dict[str, str]] = {
    "a file beside it": {"location": "weights.bin"},
    "another file of the bundle": {"location": "../../quant.json"},
    "the manifest": {"location": "../../manifest.json"},
    "upwards": {"location": "../../../../../../etc/passwd"},
    "absolute": {"location": "/etc/passwd"},
    "memory of the process": {"location": "*/_ORT_MEM_ADDR_/*", "offset": "4096", "length": "16"},
    "memory as a file": {"location": "/proc/self/mem", "offset": "4096", "length": "16"},
    "an address": {"location": "file:///etc/passwd"},
    "another machine": {"location": "//203.0.113.1/share/weights.bin"},
    "a device": {"location": "/dev/zero", "offset": "0", "length": "1099511627776"},
    "a pipe": {"location": "/dev/stdin"},
    "no location": {},
    "an empty location": {"location": ""},
    "before the file": {"location": "weights.bin", "offset": "-1"},
    "behind every file": {"location": "weights.bin", "offset": "9223372036854775807", "length": "9223372036854775807"},
}
"""Places that an ONNX file may name for its weights; 15 of them."""


@dataclass(frozen=True, slots=True)
class Payload:
    """Runs a shell command when it is unpickled.

    Attributes:
        marker: file that the command makes.
    """

    marker: Path

    def __reduce__(self) -> tuple[Any, ...]:
        """What an unpickler would call."""
        return (os.system, (f"touch '{self.marker}'",))


def external_data(bundle: Path) -> Outcome:
    """A graph whose weights lie elsewhere, in a bundle whose manifest was hashed again, under both engines' names.

    Args:
        bundle: with artefacts of ONNX Runtime, of OpenVINO, or of both.
    """
    import onnx

    outcome = Outcome(name="R6 external data", limit=LIMIT)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "b.bundle"
        shutil.copytree(bundle, place)
        manifest = read_manifest((place / MANIFEST_NAME).read_bytes())
        graphs = {a.engine: next((p for p in a.files if p.endswith((".onnx", ".xml"))), "") for a in manifest.artefacts}
        own = {a.engine: a for a in manifest.artefacts}
        source = next((place / path for path in graphs.values() if path.endswith(".onnx")), None)
        model = onnx.load_from_string(source.read_bytes()) if source else onnx.ModelProto()
        for path, target, precision in (
            (path, own[engine].target, own[engine].precision) for engine, path in graphs.items() if path
        ):
            for fields in EXTERNAL.values():
                with _instead(place, path, _external(onnx, model, fields)):
                    _attack(outcome, lambda: Session.open(place, target=target, precision=precision), ())  # noqa: B023
    return outcome


def _external(onnx: Any, model: Any, fields: Mapping[str, str]) -> bytes:
    made = onnx.ModelProto()
    made.CopyFrom(model)
    tensor = made.graph.initializer[-1] if len(made.graph.initializer) else made.graph.initializer.add()
    tensor.ClearField("raw_data")
    tensor.ClearField("float_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in fields.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    content: bytes = made.SerializeToString()
    return content


class _instead:
    """Other content for one file of a bundle, the manifest hashed again, while the block runs."""

    def __init__(self, place: Path, name: str, content: bytes) -> None:
        self._files = {name: content, MANIFEST_NAME: b""}
        self._place = place
        self._before = {path: (place / path).read_bytes() for path in self._files}
        self._files[MANIFEST_NAME] = hashed_again(self._before[MANIFEST_NAME], name, content)

    def __enter__(self) -> None:
        self._write(self._files)

    def __exit__(self, *_: object) -> None:
        self._write(self._before)

    def _write(self, files: Mapping[str, bytes]) -> None:
        for path, content in files.items():
            (self._place / path).unlink()
            (self._place / path).write_bytes(content)


def weights_files() -> list[Outcome]:
    """Pickles that would run code, and archives with traps, met by the reader of weights files."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        marker, file = Path(folder) / "it-ran", Path(folder) / "w.pth"
        for name, cases in (("R6 pickles", _pickles(marker)), ("R6 archives", _archives())):
            outcome = Outcome(name=name, limit=LIMIT)
            for content in cases.values():
                file.write_bytes(content)
                _attack(outcome, lambda: read_weights_file(file), (marker,))
            found.append(outcome)
    return found


def _pickles(marker: Path) -> dict[str, bytes]:
    import torch

    payload = Payload(marker)
    good = _torch_zip({"a": torch.ones(1)})
    return {
        "bare": pickle.dumps(payload, protocol=2),
        "newest protocol": pickle.dumps(payload, protocol=5),
        "in text": pickle.dumps(payload, protocol=0),
        "beside a tensor": _torch_zip({"a": torch.ones(1), "x": payload}),
        "as the archive's index": _rewritten(good, {"data.pkl": pickle.dumps(payload, protocol=2)}),
        "behind the end": _rewritten(good, {"data.pkl": b"\x80\x02}." + pickle.dumps(payload, protocol=2)}),
        "by eval": _rewritten(good, {"data.pkl": b"\x80\x02cbuiltins\neval\nX\x01\x00\x00\x001\x85R."}),
        "by an import": _rewritten(good, {"data.pkl": b"\x80\x02cthis\ns\n."}),
        "by a name in a name": _rewritten(good, {"data.pkl": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R."}),
        "by a state": _rewritten(good, {"data.pkl": b"\x80\x02cargparse\nNamespace\n)\x81cos\nsystem\nb."}),
        "memo of 64 GiB": _rewritten(good, {"data.pkl": b"\x80\x02}r\xff\xff\xff\xff."}),
        "8 GiB of bytes": _rewritten(good, {"data.pkl": b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"x."}),
        "as TorchScript": _rewritten(good, {"constants.pkl": pickle.dumps(payload, protocol=2)}),
    }


def _archives() -> dict[str, bytes]:
    import torch

    good = _torch_zip({"a": torch.ones(16)})
    large = _torch_zip({"a": torch.zeros(10**6)})
    return {
        "compressed": _rewritten(large, {}, compress=True),
        "upwards": _rewritten(good, {"../../evil": b"x"}),
        "without an index": _rewritten(good, {}, drop="data.pkl"),
        "without its numbers": _rewritten(good, {}, drop="data/0"),
        "numbers missing": _rewritten(good, {"data/0": b"\0" * 8}),
        "a tensor larger than its numbers": _torch_zip({"a": torch.zeros(1).expand(10**9)}),
        "one name twice": _twice(good),
        "cut": good[: len(good) // 2],
        "without a directory": good[:-30],
        "another archive in it": _rewritten(b"", {"data.pkl": good}),
        "an archive of nothing": _rewritten(b"", {}),
        "upwards inside": _rewritten(good, {"data/../../../evil": b"x"}),
        "behind another archive": _torch_zip({"b": torch.ones(4)}) + good,
    }


def _torch_zip(content: object) -> bytes:
    import torch

    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def _rewritten(data: bytes, change: Mapping[str, bytes], *, compress: bool = False, drop: str = "") -> bytes:
    """An archive with some members put in, replaced or dropped."""
    content, folder = {}, "archive"
    if data:
        with zipfile.ZipFile(io.BytesIO(data)) as old:
            folder = old.namelist()[0].split("/")[0]
            content = {name: old.read(name) for name in old.namelist() if not drop or not name.endswith(drop)}
    content |= {f"{folder}/{name}": value for name, value in change.items()}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as new:
        for name, value in content.items():
            new.writestr(name, value, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
    return out.getvalue()


def _twice(data: bytes) -> bytes:
    out = io.BytesIO(data)
    with zipfile.ZipFile(out, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr(archive.namelist()[0], b"other")
    return out.getvalue()


def folders(bundle: Path) -> Outcome:
    """What an unpacked archive can leave in a bundle's folder: links, devices, files that nobody listed.

    Args:
        bundle: any one.
    """
    outcome = Outcome(name="R6 unpacked folders", limit=LIMIT)
    for spoil in _SPOILED.values():
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder) / "b.bundle"
            shutil.copytree(bundle, place)
            spoil(place)
            _attack(outcome, lambda: Bundle.open(place, on_device=False), ())  # noqa: B023
    return outcome


def _linked(place: Path, name: str = "quant.json") -> None:
    file = next(path for path in (place / name, place / "golden" / "frames.safetensors") if path.is_file())
    file.rename(place.parent / "moved")
    file.symlink_to(place.parent / "moved")


def _hard_linked(place: Path) -> None:
    os.link(place / MANIFEST_NAME, place.parent / "second-name")


def _renamed_in_the_list(place: Path, name: str) -> None:
    raw = (place / MANIFEST_NAME).read_bytes()
    (place / MANIFEST_NAME).unlink()
    (place / MANIFEST_NAME).write_bytes(raw.replace(b"golden/frames.safetensors", name.encode()))


_SPOILED: dict[str, Callable[[Path], object]] = {
    "a file that is not listed": lambda place: (place / "extra.txt").write_bytes(b"x"),
    "a hidden file": lambda place: (place / ".gitignore").write_bytes(b"x"),
    "a repository": lambda place: (place / ".git").mkdir(),
    "a library": lambda place: (place / "artefacts" / "evil.so").write_bytes(b"\x7fELF"),
    "a link to a file": _linked,
    "a link to a folder": lambda place: (place / "more").symlink_to("/etc"),
    "a second name": _hard_linked,
    "a pipe": lambda place: os.mkfifo(place / "pipe"),
    "an empty folder": lambda place: (place / "empty").mkdir(),
    "deep folders": lambda place: (place / "/".join("abcdefghijklmnop")).mkdir(parents=True),
    "upwards in the list": lambda place: _renamed_in_the_list(place, "../frames.safetensors"),
    "absolute in the list": lambda place: _renamed_in_the_list(place, "/etc/passwd"),
    "no manifest": lambda place: (place / MANIFEST_NAME).unlink(),
}


def _attack(outcome: Outcome, call: Callable[[], object], markers: tuple[Path, ...]) -> None:
    if try_once(outcome, call, LIMIT_S) == "accepted":
        outcome.faults.append("it was accepted")
    for marker in markers:
        if marker.exists():
            marker.unlink()
            outcome.faults.append("code ran")


__all__ = ["EXTERNAL", "LIMIT", "LIMIT_S", "Payload", "external_data", "folders", "weights_files"]
