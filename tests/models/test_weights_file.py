"""Hostile and broken weights files are refused by name, before memory is taken, and nothing in them runs."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tinyusfm_edge.models import weights_file
from tinyusfm_edge.models.weights_file import read_weights_file
from tinyusfm_runtime.errors import CheckpointError

TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}
ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


class Payload:
    """Runs a shell command when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch '{self.marker}'",))


def torch_zip(content: object) -> bytes:
    """What ``torch.save`` writes."""
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


def rewritten(data: bytes, change: dict[str, bytes], *, compress: bool = False, drop: str = "") -> bytes:
    """A torch zip with some members replaced (by the end of their name), added or dropped."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        folder = old.namelist()[0].split("/")[0]
        content = {name: old.read(name) for name in old.namelist() if not drop or not name.endswith(drop)}
        content |= {f"{folder}/{name}": value for name, value in change.items()}
        for name, value in content.items():
            new.writestr(name, value, zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED)
    return out.getvalue()


def stride_zero(numel: int) -> bytes:
    """A torch file of about a kilobyte with one tensor of ``numel`` elements over a storage of one."""
    return torch_zip({"blocks.0.attn.qkv.weight": torch.zeros(1).expand(numel)})


def oversized_storage(numel: int) -> bytes:
    """A torch file whose pickle claims a storage of ``numel`` floats while its record holds 16."""
    data = torch_zip({"w": torch.zeros(16)})
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        name = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        scan = archive.read(name)
    claim = b"K\x10"  # BININT1 16: the storage's elements, then the tensor's size
    assert scan.count(claim) >= 2
    return rewritten(data, {"data.pkl": scan.replace(claim, b"J" + struct.pack("<i", numel))})


def safetensors(header: Any, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def memo_bomb() -> bytes:
    """A pickle that asks for memo entry 2^32 - 1: the C unpickler would allocate 64 GiB for its table."""
    return b"\x80\x02}r\xff\xff\xff\xff."


def hash_bomb() -> bytes:
    """A pickle of a few hundred bytes whose table has a name that takes 2^40 steps to hash."""
    nested = b"K\x01\x85"  # (1,)
    return b"\x80\x02}" + nested + b"q\x000" + b"h\x00h\x00\x86q\x000" * 40 + b"h\x00K\x01s."


def text_bomb() -> bytes:
    """A pickle whose storage has a name of 2^40 letters, once it is written out."""
    nested = b"K\x01\x85q\x000" + b"h\x00h\x00\x86q\x000" * 40
    return b"\x80\x02" + nested + b"(X\x07\x00\x00\x00storageh\x00X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ."


def bytearray_bomb() -> bytes:
    """A pickle that asks for a byte array of 8 GiB."""
    return b"\x80\x05\x96" + struct.pack("<Q", 1 << 33) + b"x."


def entry(shape: Any, offsets: Any = (0, 16)) -> bytes:
    """A safetensors file of one tensor with any shape."""
    return safetensors({"w": {"dtype": "F32", "shape": shape, "data_offsets": list(offsets)}}, bytes(16))


def bare_pickle(content: object) -> bytes:
    """A plain pickle."""
    return pickle.dumps(content, protocol=2)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("kind", ["safetensors", "torch-zip"])
def test_both_formats_give_the_same_tensors_whatever_the_suffix(tmp_path: Path, kind: str) -> None:
    data = save(TENSORS) if kind == "safetensors" else torch_zip(TENSORS)
    file = read_weights_file(written(tmp_path / "weights.bin", data))
    assert file.format == kind
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert all(torch.equal(file.content[name], tensor) for name, tensor in TENSORS.items())


def test_training_checkpoint_with_namespace_and_shared_storage(tmp_path: Path) -> None:
    shared = torch.arange(12.0)
    state = OrderedDict(a=shared[:6].reshape(2, 3).t(), b=torch.nn.Parameter(shared[6:]), c=torch.tensor(3))
    state._metadata = {"": {"version": 1}}  # type: ignore[attr-defined]
    content = {"model": state, "args": argparse.Namespace(lr=0.1, blr=None), "epoch": 3}
    file = read_weights_file(written(tmp_path / "checkpoint.pth", torch_zip(content)))
    assert torch.equal(file.content["model"]["a"], shared[:6].reshape(2, 3).t())
    assert torch.equal(file.content["model"]["b"], shared[6:])


def test_metadata_of_safetensors_is_returned(tmp_path: Path) -> None:
    file = read_weights_file(written(tmp_path / "w", save(TENSORS, metadata={"tinyusfm_edge": "{}"})))
    assert file.metadata == {"tinyusfm_edge": "{}"}


@pytest.mark.parametrize("wrap", ["zip", "bare", "inside"])
def test_payload_is_refused_and_does_not_run(tmp_path: Path, wrap: str) -> None:
    marker = tmp_path / "executed"
    payload = Payload(marker)
    data = {
        "zip": lambda: torch_zip({"a": torch.ones(1), "x": payload}),
        "bare": lambda: bare_pickle(payload),
        "inside": lambda: rewritten(torch_zip(TENSORS), {"data.pkl": bare_pickle(payload)}),
    }[wrap]()
    with pytest.raises(CheckpointError, match="posix.system|bare pickle"):
        read_weights_file(written(tmp_path / "w.pth", data))
    assert not marker.exists()


def test_the_payload_of_these_tests_is_live(tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    assert pickle.loads(bare_pickle(Payload(marker))) == 0
    assert marker.exists()


def test_global_outside_the_list_is_named(tmp_path: Path) -> None:
    data = torch_zip({"a": torch.ones(1), "args": argparse.Namespace(out=pathlib.PurePosixPath("x"))})
    with pytest.raises(CheckpointError, match=r"pathlib.*PurePosixPath.*nothing was run"):
        read_weights_file(written(tmp_path / "w.pth", data))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (stride_zero(10**9), "does not fit its storage of 1 elements"),
        (oversized_storage(10**9), "claims 4000000000 bytes, its record has 64"),
        (rewritten(torch_zip({"w": torch.zeros(10**6)}), {}, compress=True), "is compressed"),
        (rewritten(torch_zip(TENSORS), {"data.pkl": memo_bomb()}), "holds nothing"),
        (rewritten(torch_zip(TENSORS), {"data.pkl": b"\x80\x02]"}), "damaged"),
        (rewritten(torch_zip(TENSORS), {"constants.pkl": b""}), "TorchScript"),
        (rewritten(torch_zip(TENSORS), {}, drop="data.pkl"), "without one data.pkl"),
        (rewritten(torch_zip(TENSORS), {"../../evil": b"x"}), "outside the archive's folder"),
        (rewritten(torch_zip(TENSORS), {}, drop="data/0"), "its record has 0"),
        (torch_zip([1, 2, 3]), "not named tensors"),
        (torch_zip(TENSORS)[:-30], "truncated"),
        (torch_zip(TENSORS)[:100], "truncated"),
        (safetensors({}, length=2**40), "header claims"),
        (safetensors({"w": ENTRY}, bytes(15)), "truncated or forged"),
        (safetensors({"w": ENTRY}, bytes(17)), "truncated or forged"),
        (safetensors({"w": {**ENTRY, "shape": [2**40, 2**40]}}, bytes(16)), "truncated or forged"),
        (safetensors({"w": {**ENTRY, "shape": [-2, -2]}}, bytes(16)), "truncated or forged"),
        (safetensors({"w": {**ENTRY, "data_offsets": [0, 2**50]}}, bytes(16)), "truncated or forged"),
        (safetensors({"w": {**ENTRY, "dtype": "F1"}}, bytes(16)), "unusable or unknown"),
        (safetensors({"w": 3}, bytes(16)), "unusable or unknown"),
        (safetensors(b"{" * 100_000), "not JSON"),
        (safetensors({"__metadata__": {"a": 1}}), "metadata"),
        (safetensors({"v": ENTRY, "w": ENTRY}, bytes(32)), "sound safetensors"),
        (save(TENSORS)[:-1], "truncated or forged"),
        (save(TENSORS)[:12], "truncated"),
        (save({"w": torch.tensor([1.0, float("nan")])}), "'w' holds NaN"),
        (b"", "neither"),
        (b"\x00" * 64, "neither"),
    ],
    ids=lambda value: value[:24].replace(" ", "_") if isinstance(value, str) else None,
)
def test_broken_files_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        read_weights_file(written(tmp_path / "w", data))
    assert "\n" not in str(caught.value)


def test_duplicate_members_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "w.pth", torch_zip(TENSORS))
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(CheckpointError, match="same name"):
        read_weights_file(path)


def test_large_files_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with path.open("wb") as stream:
        stream.truncate(weights_file.MAX_FILE_BYTES + 1)
    with pytest.raises(CheckpointError, match="more than the"):
        read_weights_file(path)


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, message in ((tmp_path / "pipe", "regular"), (tmp_path, "regular|cannot"), (tmp_path / "no", "No such")):
        with pytest.raises(CheckpointError, match=message):
            read_weights_file(path)


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """In a process that may take 1 GiB beyond what torch maps, every bomb ends in the same plain error."""
    files = {
        "stride": stride_zero(10**10),
        "storage": oversized_storage(2 * 10**9),
        "memo": rewritten(torch_zip(TENSORS), {"data.pkl": memo_bomb()}),
        "header": safetensors({"w": {"dtype": "F32", "shape": [10**10], "data_offsets": [0, 4 * 10**10]}}, bytes(16)),
        "hash": rewritten(torch_zip(TENSORS), {"data.pkl": hash_bomb()}),
        "text": rewritten(torch_zip(TENSORS), {"data.pkl": text_bomb()}),
        "bytearray": rewritten(torch_zip(TENSORS), {"data.pkl": bytearray_bomb()}),
        "lists": rewritten(torch_zip(TENSORS), {"data.pkl": b"\x80\x02" + b"]" * (8 << 20) + b"."}),
        "sets": rewritten(torch_zip(TENSORS), {"data.pkl": b"\x80\x04\x8f(K\x01\x90."}),
        "words": entry([3_000_000_000, "a"]),
        "table": entry({"a": 1}),
        "huge": entry([10**400]),
        "dims": entry([10**9] * 300_000),
        "ones": entry([1] * 1_000_000),
    }
    for name, data in files.items():
        written(tmp_path / name, data)
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from tinyusfm_edge.models.weights_file import read_weights_file\n"
        "from tinyusfm_runtime.errors import CheckpointError\n"
        "used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30),) * 2)\n"
        "resource.setrlimit(resource.RLIMIT_CPU, (60, 60))\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n"
        "        read_weights_file(Path(name))\n"
        "    except CheckpointError:\n"
        "        print('refused')\n"
    )
    paths = [str(tmp_path / name) for name in files]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, *paths],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    assert done.stdout.split() == ["refused"] * len(files), done.stdout + done.stderr[-500:]


def test_mutated_files_never_crash(tmp_path: Path) -> None:
    """Flipped bytes either load as the same tensors' shapes or are refused in one line; nothing else happens."""
    generator = torch.Generator().manual_seed(0)
    for data in (save(TENSORS), torch_zip(TENSORS)):
        counts = {"loaded": 0, "refused": 0}
        for _ in range(150):
            broken = bytearray(data)
            for position in torch.randint(len(data), (3,), generator=generator).tolist():
                broken[position] ^= 1 << int(torch.randint(8, (1,), generator=generator))
            try:
                read_weights_file(written(tmp_path / "w", bytes(broken)))
                counts["loaded"] += 1
            except CheckpointError as error:
                assert "\n" not in str(error)
                counts["refused"] += 1
        # flipped weights of safetensors cannot be told from others; a header, or anything of a zip with its CRC, can
        assert counts["refused"] >= 10, counts
