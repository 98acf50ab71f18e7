"""What a ring of frames and a ring of readings add to a prediction, with a control on the same machine.

    make capi
    python benchmarks/ring_latency.py fetal-head.bundle --build build/capi --out result.json    # three minutes

Frames of 1080 rows that move go into a ring by the C writer, from this process. ``tinyusfm-run`` answers them into a
ring of readings and says of each when its frame was published, when its reading was, and how long the prediction of
that very frame worked (preprocessing, network and reading; what ``tusfm_predict`` calls its total):

    overhead = reading published - frame published - work of the same frame

So the copy out of the ring, its CRC where the writer gives one, every wake-up between processes and threads and the
copy into the ring of readings are overhead; nothing is estimated from another run. The control is ``shm_echo``: the
same wake-up, the same copy, no session. Frames go to both in turns, so a scheduler that is late is late for both:
what the control takes is the machine's and the rings' share. Aim: overhead <= 0.3 ms at p99 on a quiet machine.

Variants: ``plain`` frames, ``checked`` ones with a CRC-32 of their pixels, ``still`` ones, the same image again and
again, which the freeze rule compares to the end. With ``--idle SECONDS`` it also says how much of a core the program
takes while no frame comes. What stands after ``--`` goes to ``tinyusfm-run``, such as ``--threads 1``. ``--fifo 10``
runs both programs before everything else on the machine, as a scanner's process may (root).
"""

from __future__ import annotations

import argparse
import ctypes as c
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.phantom import make_phantom

ROWS, COLUMNS = 1080, 1920
OPENING_S = 120.0
"""How long the program may take to open the bundle."""
WARM = 20
"""First frames of each variant that do not count."""
CHECKED, NO_TIME = 8, -(1 << 63)
VARIANTS = {"plain": (0, True), "checked": (CHECKED, True), "still": (0, False)}
"""Flags of the frames, and whether they move."""


class _CFrame(c.Structure):
    """tue_shm_frame."""

    _fields_ = (
        ("pixels", c.c_void_p), ("rows", c.c_uint32), ("columns", c.c_uint32), ("format", c.c_uint32),
        ("row_stride", c.c_uint32), ("flags", c.c_uint32), ("seq", c.c_uint64), ("t_source_ns", c.c_int64),
        ("spacing_row_mm", c.c_double), ("spacing_column_mm", c.c_double), ("crop", c.c_uint32 * 4),
        ("orientation", c.c_char * 8),
    )  # fmt: skip


class CRing:
    """A ring of frames by the C writer; a context manager.

    Args:
        library: path of libtinyusfm.
        name: of the ring.
        room: bytes for a frame.

    Raises:
        SystemExit: it cannot be made.
    """

    def __init__(self, library: Path, name: str, room: int) -> None:
        self._lib, self._writer = c.CDLL(str(library)), (c.c_uint8 * 512)()
        self._lib.tue_shm_open.argtypes = [c.c_void_p, c.c_char_p, c.c_uint64]
        self._lib.tue_shm_write.argtypes = [c.c_void_p, c.c_void_p]
        if self._lib.tue_shm_open(self._writer, name.encode(), room) != 0:
            raise SystemExit("the ring cannot be made")

    def __enter__(self) -> CRing:
        return self

    def __exit__(self, *_: object) -> None:
        self._lib.tue_shm_close(self._writer, 1)

    def write(self, pixels: np.ndarray, seq: int, flags: int) -> None:
        """Publishes a frame.

        Args:
            pixels: uint8 (rows, columns), C order.
            seq: its number.
            flags: enum tue_shm_flags.
        """
        rows, columns = pixels.shape
        frame = _CFrame(pixels=pixels.ctypes.data, rows=rows, columns=columns, row_stride=columns, flags=flags, seq=seq,
                        t_source_ns=NO_TIME)  # fmt: skip
        if self._lib.tue_shm_write(self._writer, c.byref(frame)) != 0:
            raise SystemExit("a frame cannot be written")

    def beat(self) -> None:
        """Says that the writer lives."""
        self._lib.tue_shm_beat(self._writer)


def percentiles(samples: Sequence[float]) -> dict[str, float]:
    """Median and tail, ms."""
    return {f"p{percent}": round(float(np.percentile(wide(samples), percent)), 4) for percent in (50, 90, 99)}


def read_times(path: Path) -> np.ndarray:
    """Lines of ``--times``: (N, 5) int64, sorted by number."""
    lines = [line.split() for line in path.read_text(encoding="ascii").splitlines()]
    found = sorted([int(word) for word in line] for line in lines if len(line) == 5)
    return np.array(found, np.int64).reshape(-1, 5)


def overheads_ms(times: np.ndarray) -> np.ndarray:
    """(N, 5) lines -> (N,) overheads."""
    taken: np.ndarray = (times[:, 3] - times[:, 1] - times[:, 4]) / 1e6
    return taken


@contextmanager
def running(command: Sequence[object], output: Path | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A program, ended at the end; ``output`` takes what it prints."""
    with ExitStack() as stack:
        into = None if output is None else stack.enter_context(output.open("wb"))
        program = subprocess.Popen([str(word) for word in command], stdout=into)
        try:
            yield program
        finally:
            program.terminate()
            program.wait(timeout=60)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process and its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(") ", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _images() -> list[np.ndarray]:
    still = np.ascontiguousarray(make_phantom(3, height=ROWS, width=COLUMNS).frame.pixels)
    rng = np.random.default_rng(0)
    speckle = [rng.integers(0, 4, still.shape, np.uint8) for _ in range(4)]
    return [still, *(np.ascontiguousarray(np.minimum(still, 250) + noise) for noise in speckle)]


def _wait_until_it_runs(ring: CRing, images: list[np.ndarray], times: Path, program: subprocess.Popen[bytes]) -> int:
    end, seq = time.monotonic() + OPENING_S, 1
    while not (times.exists() and times.stat().st_size):
        if program.poll() is not None or time.monotonic() > end:
            raise SystemExit("the program gives no readings: is it of this build, and the bundle's target there?")
        ring.write(images[seq % len(images)], seq, 0)
        seq += 1
        time.sleep(0.1)
    return seq


def through_rings(
    build: Path,
    bundle: Path,
    words: Sequence[str],
    *,
    frames: int,
    period_s: float,
    idle_s: float,
    rounds: int,
    before: Sequence[str] = (),
) -> dict[str, Any]:
    """Every variant through program and control, interleaved frame by frame.

    Args:
        build: folder of tinyusfm-run, shm_echo and libtinyusfm.so.
        bundle: its folder.
        words: further arguments of tinyusfm-run.
        frames: of each variant in each round.
        period_s: from frame to frame; the control's lie in between.
        idle_s: how long to watch the program without frames, 0 for never.
        rounds: of all variants.
        before: what stands before both programs, such as ``chrt -f 10``.

    Returns:
        By variant the percentiles of program and control, and the raw samples.

    Raises:
        SystemExit: a program does not answer.
    """
    name, images = f"latency-{os.getpid()}", _images()
    marks: dict[str, list[range]] = {variant: [] for variant in VARIANTS}
    report: dict[str, Any] = {"load_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as folder:
        times = {kind: Path(folder) / kind for kind in ("run", "echo")}
        with ExitStack() as stack:
            rings = {
                kind: stack.enter_context(CRing(build / "libtinyusfm.so", f"{name}-{kind}", ROWS * COLUMNS))
                for kind in times
            }
            stack.enter_context(
                running([*before, build / "shm_echo", f"{name}-echo", f"{name}-echo-out"], times["echo"])
            )
            sink = ["--sink", f"shm-out:{name}-run-out", "--quiet", "--times", times["run"]]
            program = stack.enter_context(
                running([*before, build / "tinyusfm-run", bundle, f"shm:{name}-run", *sink, *words])
            )
            seq = _wait_until_it_runs(rings["run"], images, times["run"], program)
            for _ in range(rounds):
                for variant, (flags, moves) in VARIANTS.items():
                    marks[variant].append(range(seq + WARM, seq + WARM + frames))
                    for _ in range(WARM + frames):
                        for ring in rings.values():
                            ring.write(images[1 + seq % 4 if moves else 0], seq, flags)
                            time.sleep(period_s / 2)
                        seq += 1
            if idle_s:
                report["idle_core_percent"] = _idle(rings["run"], program.pid, idle_s)
        lines = {kind: read_times(path) for kind, path in times.items()}
    for variant, ranges in marks.items():
        report[variant] = {kind: _of(found, ranges) for kind, found in lines.items()}
    return {**report, "load_after": os.getloadavg()}


def _idle(ring: CRing, pid: int, seconds: float) -> float:
    before, end = cpu_seconds(pid), time.monotonic() + seconds
    while time.monotonic() < end:
        ring.beat()
        time.sleep(0.1)
    return round(100 * (cpu_seconds(pid) - before) / seconds, 3)


def _of(lines: np.ndarray, ranges: Sequence[range]) -> dict[str, Any]:
    found = lines[[any(number in part for part in ranges) for number in lines[:, 0].tolist()]]
    wanted = sum(len(part) for part in ranges)
    if len(found) < 0.9 * wanted:
        raise SystemExit(f"{len(found)} readings of {wanted} frames: the period is too short for this machine")
    overhead = overheads_ms(found)
    work = found[:, 4] / 1e6
    return {
        "readings": len(found), "frames": wanted, "overhead_ms": percentiles(overhead.tolist()),
        "work_ms": percentiles(work.tolist()), "samples_ms": np.round(overhead, 4).tolist(),
    }  # fmt: skip


def lines_of(report: Mapping[str, Any]) -> list[str]:
    """A report of ``through_rings`` as lines of text."""
    lines = [
        f"{variant:8} {kind:4} overhead {found['overhead_ms']} work {found['work_ms']} n {found['readings']}"
        for variant in VARIANTS
        for kind, found in report[variant].items()
    ]
    load = " to ".join(f"{report[name][0]:.1f}" for name in ("load_before", "load_after"))
    return [*lines, f"load {load}, idle {report.get('idle_core_percent')} % of a core"]


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--build", type=Path, default=Path("build/capi"), help="folder of make capi")
    parser.add_argument("--frames", type=int, default=100, help="of each variant in each round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--period-ms", type=float, default=80.0)
    parser.add_argument("--idle", type=float, default=5.0, metavar="SECONDS")
    parser.add_argument("--fifo", type=int, help="real-time priority of both programs (root)")
    parser.add_argument("--out", type=Path)
    given = sys.argv[1:]
    split = given.index("--") if "--" in given else len(given)
    asked, words = parser.parse_args(given[:split]), given[split + 1 :]
    report = {"version": 1, "machine": machine_card().to_json(), "frame": [ROWS, COLUMNS], "words": words,
              "fifo": asked.fifo}  # fmt: skip
    report |= through_rings(
        asked.build, asked.bundle, words, frames=asked.frames, period_s=asked.period_ms / 1e3, idle_s=asked.idle,
        rounds=asked.rounds, before=["chrt", "-f", str(asked.fifo)] if asked.fifo else [],
    )  # fmt: skip
    print("\n".join(lines_of(report)))
    if asked.out is not None:
        asked.out.write_text(json.dumps(report) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
