"""Runs of ``broken.py`` that end in the middle: killed at a random moment, or with no room left on the disk.

Four commands write: ``export``, ``calibrate``, ``distill`` and ``bundle sign``. Each works on a tiny student and a few
phantoms, so that most of a run is the command itself. After every end what was there before must still load; after a
run that is let through nothing may lie around under a hidden name.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from broken_outcome import Outcome
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import EdgeError

KILL_LIMIT = "the old one loads, nothing left over"
BUG = 70
"""Exit code of a failure that nobody expected."""
TINY = {"view.image_size": 64, "student.image_size": 64, "student.width": 48, "student.depth": 3, "student.heads": 3}
STEPS = 12
DISK_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True)
class Command:
    """A command that writes, and how to look at what it wrote.

    Attributes:
        name: of the command.
        words: behind the interpreter.
        folder: where it writes.
        holds: looks at what is there; a fault in words, or empty.
        outputs: what it writes.
        again: a run over its outputs has nothing to do, so they are removed before the next one.
    """

    name: str
    words: Sequence[str]
    folder: Path
    holds: Callable[[], str]
    outputs: tuple[Path, ...]
    again: bool = False

    def start(self, file_limit: int | None = None) -> subprocess.Popen[str]:
        """Starts it.

        Args:
            file_limit: bytes that a file of the process may have, or None for no limit.
        """
        path = os.pathsep.join(place for place in sys.path if place)
        return subprocess.Popen(
            [sys.executable, "-m", "tinyusfm_edge", *self.words],
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": path},
            preexec_fn=None if file_limit is None else lambda: _limit_files(file_limit),
        )  # fmt: skip

    def run(self, file_limit: int | None = None) -> tuple[int, str]:
        """Runs it to its end.

        Args:
            file_limit: as of ``start``.

        Returns:
            Exit code, and the end of what it said.
        """
        process = self.start(file_limit)
        _, said = process.communicate()
        return process.returncode, said.strip()[-200:]

    def clear(self) -> None:
        """Removes what would leave the next run nothing to do."""
        for place in self.outputs if self.again else ():
            shutil.rmtree(place, ignore_errors=True)


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def left_over(folder: Path) -> str:
    """A fault where something lies under a hidden name below a folder.

    Args:
        folder: of a run that came to its end.
    """
    found = [path.name for path in folder.rglob("*") if path.name.startswith(".") and path.name != ".lock"]
    return f"left over: {found[0]}" if found else ""


def kill_runs(command: Command, count: int, seed: int) -> Outcome:
    """R7: a command is killed at random moments of its length.

    Args:
        command: it.
        count: of the kills.
        seed: of the draws.
    """
    outcome, rng = Outcome(name=f"R7 {command.name}, killed", limit=KILL_LIMIT), random.Random(seed)
    start = time.perf_counter()
    code, said = command.run()
    length = time.perf_counter() - start
    if code != 0 or command.holds():
        outcome.faults.append(f"it does not run: {said or command.holds()}")
        return outcome
    for _ in range(count):
        start = time.perf_counter()
        process = command.start()
        try:
            process.communicate(timeout=rng.random() * length)
            outcome.counts["ended before"] += 1
            command.clear()
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            outcome.counts["killed"] += 1
        outcome.tries += 1
        outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - start)
        if fault := command.holds():
            outcome.faults.append(fault)
    _let_through(command, outcome)
    return outcome


def _let_through(command: Command, outcome: Outcome) -> None:
    code, said = command.run()
    fault = said if code != 0 else command.holds() or left_over(command.folder)
    if fault:
        outcome.faults.append(f"the run afterwards: {fault}")


def full_disk(command: Command, points: int, *, tmpfs: bool) -> Outcome:
    """R7: a command runs out of room at so many places of what it writes.

    Args:
        command: it.
        points: how many.
        tmpfs: its folder is a memory disk of its own whose size is set; else the largest file of the process is.
    """
    way = "disk full" if tmpfs else "files cut"
    outcome = Outcome(name=f"R7 {command.name}, {way}", limit=KILL_LIMIT)
    code, said = command.run()
    if code != 0:
        outcome.faults.append(f"it does not run: {said}")
        return outcome
    volume, largest = _sizes(command.outputs)
    for point in range(points):
        command.clear()
        share = (point + 0.5) / points
        if tmpfs:
            _resize(command.folder, shutil.disk_usage(command.folder).used + int(share * volume))
        start = time.perf_counter()
        code, said = command.run(None if tmpfs else int(share * largest))
        outcome.tries += 1
        outcome.slowest_s = max(outcome.slowest_s, time.perf_counter() - start)
        outcome.counts["enough room" if code == 0 else f"exit code {code}"] += 1
        if code in (BUG, 1) or code < 0 or "Traceback" in said:
            outcome.faults.append(f"exit code {code}: {said[-100:]}")
        if fault := command.holds():
            outcome.faults.append(fault)
        if tmpfs:
            _resize(command.folder, DISK_BYTES)
    _let_through(command, outcome)
    return outcome


def _sizes(places: Sequence[Path]) -> tuple[int, int]:
    """Bytes on the disk of files and folders, and the size of the largest file."""
    paths = [path for place in places for path in (place, *place.rglob("*")) if path.is_file()]
    found = [path.stat() for path in paths]
    return sum(one.st_blocks * 512 for one in found), max((one.st_size for one in found), default=0)


def _resize(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


@contextmanager
def memory_disk(place: Path) -> Iterator[bool]:
    """A memory disk of its own at a folder; False where this user may not mount one.

    Args:
        place: an empty folder.
    """
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(words, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


def commands(inputs: Path, out: Path) -> list[Command]:
    """The commands that write.

    Args:
        inputs: folder where ``make_inputs`` put student, frames and key.
        out: folder that they write into; ``signed.bundle`` in it is signed.
    """
    student, pool, signed = str(inputs / "tiny.safetensors"), str(inputs / "pool"), out / "signed.bundle"
    bundle, ranges, run = out / "b.bundle", out / "set.json", out / "run"
    export = ["export", student, "--target", "onnx", "--fp32", "--no-compare", "--no-gate", "--data", pool]
    calibrate = ["calibrate", student, pool, "--count", "16", "--method", "minmax", "--no-drift"]
    settings = {"steps": STEPS, "batch": 2, "checkpoint_every": 3, "layers": "[1,2,3]", **TINY}
    distill = ["distill", "--data", pool, "--ablation", "mae", "--short"]
    distill += [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    sign = ["bundle", "sign", str(signed), "--key", str(inputs / "key.pem"), "--security-version", "2", "--replace"]
    return [
        Command(
            name="export", words=[*export, "--out", str(bundle)], folder=out,
            outputs=(bundle, out / "b.html"), holds=lambda: whole_bundle(bundle),
        ),
        Command(
            name="calibrate", words=[*calibrate, "--out", str(ranges)], folder=out,
            outputs=(ranges, out / "set.html"), holds=lambda: _whole_calibration(ranges),
        ),
        Command(
            name="distill", words=[*distill, "--out", str(run)], folder=out,
            outputs=(run,), holds=lambda: _whole_run(run), again=True,
        ),
        Command(
            name="sign", words=sign, folder=out,
            outputs=(signed / "model.sig",), holds=lambda: whole_bundle(signed),
        ),
    ]  # fmt: skip


def make_inputs(place: Path) -> None:
    """A tiny student, 40 phantoms with a table, and a key.

    Args:
        place: an empty folder.
    """
    import torch
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    from PIL import Image

    from tinyusfm_edge.models.checkpoint import save_student
    from tinyusfm_edge.models.student import StudentConfig, build_student
    from tinyusfm_runtime.phantom import make_phantom
    from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

    (place / "pool").mkdir()
    rows = ["file,split,group"]
    for seed in range(40):
        Image.fromarray(make_phantom(seed, height=80, width=96).frame.pixels).save(place / "pool" / f"{seed}.png")
        rows.append(f"{seed}.png,{'val' if seed % 4 == 0 else 'train'},g{seed}")
    (place / "pool" / "split.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    config = StudentConfig(task="segment", width=48, heads=3, image_size=80)
    torch.manual_seed(0)
    spec = ModelSpec(
        name="tiny", task=Task("segment"), labels=("head",), preprocess=PreprocessSpec(height=80, width=80),
        architecture=config.to_json(),
    )  # fmt: skip
    save_student(place / "tiny.safetensors", build_student(config).eval(), spec, torch.float32, {})
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (place / "key.pem").write_bytes(secret)


def whole_bundle(place: Path) -> str:
    """A fault where a bundle does not open.

    Args:
        place: its folder.
    """
    try:
        Bundle.open(place, on_device=False)
    except EdgeError as error:
        return f"{place.name} does not open: {error}"
    return ""


def _whole_calibration(place: Path) -> str:
    from tinyusfm_export.quantize.calibration_file import read_calibration_file

    try:
        read_calibration_file(place)
    except EdgeError as error:
        return f"{place.name} cannot be read: {error}"
    return ""


def _whole_run(run: Path) -> str:
    """A student, where there is one, is whole, and so is every step's folder that has its name."""
    from tinyusfm_edge.models.weights_file import read_weights_file

    files = [run / "student.safetensors", *run.glob("step-*/weights.safetensors")]
    try:
        for file in files:
            if file.exists():
                read_weights_file(file)
        if (run / "config.json").exists():
            json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (EdgeError, ValueError) as error:
        return f"the run cannot be read: {error}"
    return ""


__all__ = [
    "BUG",
    "KILL_LIMIT",
    "Command",
    "commands",
    "full_disk",
    "kill_runs",
    "left_over",
    "make_inputs",
    "memory_disk",
    "whole_bundle",
]
