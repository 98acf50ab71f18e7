"""The live loop under load for an hour (``make soak``) or a minute (in the tests), and what became of every frame.

A source of 60 frames per second, the real student, all fallbacks loaded. Watched in the same run: frame accounting, age
at result against the engine's own time, every 10th result against PyTorch's answer to the same frame, memory, files,
threads, and sockets, of which there must be none. ``--leak-bytes 1024`` is the control: it must fail.

It prints a table and one JSON line; ``--json`` keeps everything. The exit code is the verdict. It does not make bundles
(soak_prepare.py does, in a process of its own).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paced import PacedSource
from tinyusfm_runtime.bundle.arrays import unpack_arrays
from tinyusfm_runtime.bundle.golden import DEFAULT_LIMITS
from tinyusfm_runtime.bundle.manifest import gate_limits
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.live.fallback import Fallback, FallbackOptions
from tinyusfm_runtime.live.loop import Live
from tinyusfm_runtime.live.options import LiveOptions
from tinyusfm_runtime.numerics.measure import dice
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.results import LiveResult

VERSION = 1
EVERY = 10
"""One result in so many is compared with the reference; a slow machine has few of them in a minute."""
MAX_GROWTH_MB, MAX_SLOPE_MB_H = 2.0, 1.0
"""Limits of a short soak (growth after warm-up) and of a long one (slope of a least-squares line)."""
LONG_S = 1800.0
"""From here on the slope counts; in a shorter run it is noise."""
_WINDOW_S = 5.0  # growth is between the medians of the first and the last seconds after the warm-up
_PAGE_MB = os.sysconf("SC_PAGE_SIZE") / 2**20 if hasattr(os, "sysconf") else 0.0


@dataclass(kw_only=True, slots=True)
class Samples:
    """What the process used, once every so often."""

    t_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)
    files: list[int] = field(default_factory=list)
    threads: list[int] = field(default_factory=list)

    def between(self, warm_up_s: float, end_s: float) -> Samples:
        """Those after the warm-up and before the source ended."""
        keep = [i for i, t in enumerate(self.t_s) if warm_up_s <= t <= end_s]
        return Samples(**{name: [values[i] for i in keep] for name, values in asdict(self).items()})

    def growth_mb(self) -> float:
        """Median of the last seconds minus that of the first."""
        times, memory = np.array(self.t_s), np.array(self.rss_mb)
        first, last = memory[times < times[0] + _WINDOW_S], memory[times > times[-1] - _WINDOW_S]
        return float(np.median(wide(last)) - np.median(wide(first)))

    def slope_mb_h(self) -> float:
        """Slope of the least-squares line."""
        return float(np.polyfit(self.t_s, self.rss_mb, 1)[0]) * 3600


class Sampler(threading.Thread):
    """Looks at this process every so often, into memory that it took beforehand: the watcher must not grow either."""

    def __init__(self, seconds: float, pause_s: float) -> None:
        super().__init__()
        self._pause_s, self._begin_s, self._over = pause_s, time.monotonic(), threading.Event()
        self._rows = np.full((int(seconds / pause_s) + 1000, 4), np.nan)
        self._count = 0

    def run(self) -> None:
        """Looks until it is stopped."""
        while not self._over.wait(self._pause_s) and self._count < len(self._rows):
            files = sum(1 for _ in os.scandir("/proc/self/fd"))
            threads = sum(1 for _ in os.scandir("/proc/self/task"))
            self._rows[self._count] = (time.monotonic() - self._begin_s, rss_mb(), files, threads)
            self._count += 1

    def end(self) -> Samples:
        """Stops looking.

        Returns:
            What it saw.
        """
        self._over.set()
        self.join()
        t_s, memory, files, threads = self._rows[: self._count].T
        return Samples(
            t_s=t_s.tolist(),
            rss_mb=memory.tolist(),
            files=files.astype(int).tolist(),
            threads=threads.astype(int).tolist(),
        )


def rss_mb() -> float:
    """Resident memory of this process (Linux), MB of 2**20 bytes."""
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * _PAGE_MB


@dataclass(kw_only=True, slots=True)
class Comparison:
    """Live results against the reference's answers to the same frames, in memory that it took beforehand."""

    masks: np.ndarray
    hc_mm: np.ndarray
    limits: Mapping[str, float]
    most: int
    count: int = 0
    missing: int = 0
    _kept: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self._kept = np.full((self.most, 2), np.nan)

    @property
    def dices(self) -> np.ndarray:
        """Of every compared mask."""
        return self._kept[: self.count, 0]

    @property
    def differences_mm(self) -> np.ndarray:
        """Of every compared circumference."""
        return self._kept[: self.count, 1]

    def look(self, result: LiveResult) -> None:
        """Compares one result; frames are numbered from 1 and shown in turn."""
        which = (result.frame.seq - 1) % len(self.masks)
        prediction = result.prediction
        if prediction is None or prediction.mask_HW is None:
            self.missing += 1
            return
        reading = prediction.measurement.hc_mm if prediction.measurement else None
        overlap = dice(prediction.mask_HW != 0, self.masks[which] != 0)
        self._kept[self.count] = (overlap, abs((reading or 0.0) - float(self.hc_mm[which])))
        self.count += 1

    def faults(self) -> list[str]:
        """What missed the gate."""
        if not self.count:
            return ["no result was compared with the reference"]
        found = [f"{self.missing} compared results had no mask"] if self.missing else []
        mean, worst = float(self.dices.mean()), float(self.dices.min())
        p95 = float(np.percentile(wide(self.differences_mm), 95, method="higher"))
        if mean < self.limits["dice_mean"] or worst < self.limits["dice_worst"]:
            found.append(f"Dice against the reference {mean:.4f}, worst {worst:.4f}: below the gate")
        if p95 > self.limits["hc_p95_mm"]:
            found.append(f"circumference {p95:.2f} mm from the reference at the 95th percentile: above the gate")
        return found


def soak(
    bundle: Path,
    folder: Path,
    *,
    seconds: float,
    rate_hz: float,
    budget_ms: float,
    warm_up_s: float,
    leak_bytes: int = 0,
) -> dict[str, Any]:
    """Runs the loop and watches it.

    Args:
        bundle: of the shipped student.
        folder: frames that soak_prepare.py wrote.
        seconds: how long.
        rate_hz: of the source.
        budget_ms: of the loop.
        warm_up_s: time that memory, files and threads get to settle.
        leak_bytes: memory lost with every frame, for the control.

    Returns:
        Plain data; ``faults`` is empty if everything held.
    """
    sockets = listen_for_sockets()
    frames, arrays = read_frames(folder)
    errors: list[str] = []
    source = PacedSource(rate_hz, frames, seconds, leak_bytes)
    limits = FallbackOptions(misses_in_a_row=0, threads=1)
    with Fallback.open(bundle, advanced=limits) as fallback:
        gate = {**DEFAULT_LIMITS, **gate_limits(fallback.manifest.artefacts[0])}
        comparison = Comparison(
            masks=arrays["masks"], hc_mm=arrays["hc_mm"], limits=gate, most=int(seconds * rate_hz / EVERY) + 16
        )
        # a machine that is busy with other things must not look like a hanging engine
        options = LiveOptions(withhold_stale=False, give_up_ms=60_000, grace_ms=60_000)
        gc.collect()
        sampler, unbalanced = Sampler(seconds, 1.0 if seconds > 600 else 0.25), 0
        with Live(fallback, source, budget_ms=budget_ms, advanced=options) as live:
            sampler.start()
            try:
                for count, result in enumerate(live):
                    unbalanced += not live.counters.balanced
                    if count % EVERY == 0:
                        comparison.look(result)
            except Exception as error:  # whatever it is, it is the finding
                errors.append(f"{type(error).__name__}: {error}")
            samples = sampler.end()
        counters, latency = live.counters, live.latency()
        engine, level = fallback.description, fallback.level
    settled = samples.between(warm_up_s, seconds)
    found = {
        "version": VERSION,
        "machine": machine_card().to_json(),
        "engine": engine,
        "seconds": seconds,
        "rate_hz": rate_hz,
        "sent": source.sent,
        "counters": asdict(counters),
        "latency": latency.to_json(),
        "age_limit_ms": age_limit_ms(latency.infer_ms, 1000 / rate_hz),
        "compared": comparison.count,
        "dice_worst": float(comparison.dices.min()) if comparison.count else None,
        "hc_max_mm": float(comparison.differences_mm.max()) if comparison.count else None,
        "growth_mb": settled.growth_mb() if settled.t_s else None,
        "slope_mb_h": settled.slope_mb_h() if len(settled.t_s) > 2 else None,
        "files": sorted(set(settled.files)),
        "threads": sorted(set(settled.threads)),
        "sockets": sockets,
        "samples": asdict(samples),
    }
    faults = [*errors, *comparison.faults(), *_faults(found, settled)]
    if unbalanced or not counters.balanced or counters.waiting or counters.received != source.sent:
        faults.append(f"frame accounting does not balance ({unbalanced} times while it ran)")
    if level != 0:
        faults.append("a fallback answered at the end")
    return {**found, "faults": faults}


def age_limit_ms(infer_ms: Sequence[float], period_ms: float) -> float | None:
    """What the age at result must not pass at the 99th percentile: 2 x engine p99 + a frame period."""
    return 2 * float(np.percentile(wide(infer_ms), 99)) + period_ms if infer_ms else None


def _faults(found: Mapping[str, Any], settled: Samples) -> list[str]:
    faults = []
    ages = found["latency"]["age_ms"]
    if not ages or float(np.percentile(wide(ages), 99)) > found["age_limit_ms"]:
        faults.append("age at result p99 is above 2 x engine p99 + a frame period")
    if found["latency"]["deepest"] > 1:
        faults.append("more than one frame waited")
    if not settled.t_s:
        return [*faults, "the run ended within its warm-up"]
    for name in ("files", "threads"):
        if len(found[name]) != 1:
            faults.append(f"{name} were not constant: {found[name]}")
    if found["sockets"]:
        faults.append(f"sockets were used: {found['sockets'][:3]}")
    if found["seconds"] < LONG_S and found["growth_mb"] > MAX_GROWTH_MB:
        faults.append(f"memory grew by {found['growth_mb']:.2f} MB, more than {MAX_GROWTH_MB}")
    if found["seconds"] >= LONG_S and found["slope_mb_h"] >= MAX_SLOPE_MB_H:
        faults.append(f"memory grows by {found['slope_mb_h']:.2f} MB per hour, not less than {MAX_SLOPE_MB_H}")
    return faults


def listen_for_sockets() -> list[str]:
    """From now on every use of a socket in this process is noted in the list that comes back."""
    heard: list[str] = []

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith("socket."):
            heard.append(event)

    sys.addaudithook(hear)
    return heard


def read_frames(folder: Path) -> tuple[list[Frame], dict[str, np.ndarray]]:
    """The frames that soak_prepare.py wrote, and its arrays."""
    arrays = unpack_arrays((folder / "frames.npz").read_bytes(), "frames.npz")
    pairs = zip(arrays["pixels"], arrays["spacing_mm"], strict=True)
    return [Frame(pixels=pixels, spacing_mm=(float(mm[0]), float(mm[1]))) for pixels, mm in pairs], arrays


def print_table(found: Mapping[str, Any]) -> None:
    """The run for people."""
    counters, rows = found["counters"], found["latency"]["percentiles"]
    print(f"engine     {found['engine']}")
    print(f"frames     {counters['received']} of {found['sent']} sent: {counters['processed']} answered, ", end="")
    print(f"dropped {counters['dropped']}, rejected {counters['rejected']}")
    for name in ("age_ms", "infer_ms"):
        print(f"{name:<10} {', '.join(f'{key} {value:.1f}' for key, value in rows.get(name, {}).items())}")
    print(f"age limit  {found['age_limit_ms'] or 0:.1f} ms (2 x engine p99 + a period)")
    print(
        f"reference  {found['compared']} compared, worst Dice {found['dice_worst']}, HC {found['hc_max_mm']} mm at most"
    )
    print(f"memory     growth {found['growth_mb']} MB, slope {found['slope_mb_h']} MB/h after the warm-up")
    print(f"constant   files {found['files']}, threads {found['threads']}, sockets {len(found['sockets'])}")
    print(f"verdict    {'; '.join(found['faults']) or 'everything held'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; the exit code is the verdict."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0, help="how long")
    parser.add_argument("--rate", type=float, default=60.0, help="frames per second")
    parser.add_argument("--budget-ms", type=float, default=100.0, help="age above which a result is stale")
    parser.add_argument("--warm-up-s", type=float, default=60.0, help="time that memory gets to settle")
    parser.add_argument("--leak-bytes", type=int, default=0, help="lose so much with every frame: the control")
    parser.add_argument("--prepared", type=Path, help="folder of soak_prepare.py; made again if not given")
    parser.add_argument("--bundle", type=Path, help="bundle of the shipped student to use")
    parser.add_argument("--json", type=Path, help="keep everything here")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="tinyusfm-soak-") as temporary:
        folder = options.prepared
        if folder is None:
            folder = Path(temporary)
            command = [sys.executable, str(Path(__file__).with_name("soak_prepare.py")), "--out", str(folder)]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
            if options.bundle is not None:
                command += ["--no-bundle"]
            subprocess.run(command, check=True, env=environment)
        found = soak(
            options.bundle or folder / "student.bundle", folder, seconds=options.minutes * 60, rate_hz=options.rate,
            budget_ms=options.budget_ms, warm_up_s=options.warm_up_s, leak_bytes=options.leak_bytes,
        )  # fmt: skip
    print_table(found)
    print(json.dumps({key: value for key, value in found.items() if key not in ("samples", "latency", "machine")}))
    if options.json is not None:
        options.json.write_text(json.dumps(found) + "\n", encoding="utf-8")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
