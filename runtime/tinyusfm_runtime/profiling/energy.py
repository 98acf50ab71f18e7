"""Joules, where this machine can tell; else "not measurable here".

RAPL on x86, the INA rails or tegrastats of a Jetson.

RAPL counts microjoules (Linux powercap) and wraps; INA3221 gives millivolts and milliamperes through hwmon and is
sampled in a thread; where the kernel does not show it, ``tegrastats`` prints milliwatts. NVML is silent on a Jetson's
GPU, so it is not asked. What else runs on the machine counts too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tinyusfm_runtime.profiling.tegra import TegraStats, is_tegra

SYSTEM = Path("/")
"""Root under which /sys is looked for; tests give another."""
NOT_HERE = "not measurable here"
INTERVAL_S = 0.1
"""Between two samples of a rail."""
_RAPL = "sys/class/powercap"
_INA = ("sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*", "sys/bus/i2c/drivers/ina3221x/*/hwmon/hwmon*")


@dataclass(frozen=True, kw_only=True, slots=True)
class Energy:
    """Energy of one stretch of time.

    Attributes:
        source: ``rapl``, ``ina3221``, ``tegrastats``, or empty where nothing could be measured.
        joules: rail -> joules.
        seconds: of the stretch.
        why: why nothing was measured, or empty.
    """

    source: str
    joules: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    why: str = ""

    def to_json(self, frames: int) -> dict[str, Any]:
        """Plain data.

        Args:
            frames: answered in that time.
        """
        per = {rail: joules / frames for rail, joules in self.joules.items()} if frames else {}
        watts = {rail: joules / self.seconds for rail, joules in self.joules.items()} if self.seconds else {}
        return {
            "source": self.source or NOT_HERE, "why": self.why, "seconds": self.seconds, "frames": frames,
            "joules": dict(self.joules), "joules_per_frame": per, "watts": watts,
        }  # fmt: skip


class EnergyMeter:
    """Measures from ``start`` to ``stop``.

    Args:
        root: under which /sys lies, or None for ``SYSTEM``.
        clock_s: monotonic seconds.
        interval_s: between two samples of a rail.
    """

    def __init__(
        self, root: Path | None = None, clock_s: Callable[[], float] = time.monotonic, interval_s: float = INTERVAL_S
    ) -> None:
        root = SYSTEM if root is None else root
        self._root, self._clock, self._interval = root, clock_s, interval_s
        self._counters = {place: _read(place / "energy_uj") for place in _rapl_places(root)}
        self._rails = ina_rails(root)
        self._joules: dict[str, float] = {}
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._stats: TegraStats | None = None
        self._began = self._last = clock_s()

    def start(self) -> None:
        """Begins to count."""
        self._began = self._last = self._clock()
        self._counters = {place: _read(place / "energy_uj") for place in _rapl_places(self._root)}
        counted = any(value is not None for value in self._counters.values())
        if not counted and not self._rails and is_tegra(self._root):
            self._stats = TegraStats.start(self._interval)
        if self._rails and not counted:
            self._joules = dict.fromkeys(self._rails, 0.0)
            self._thread = threading.Thread(target=self._sample, name="energy", daemon=True)
            self._thread.start()

    def stop(self) -> Energy:
        """Ends the count."""
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
            return Energy(source="ina3221", joules=dict(self._joules), seconds=self._clock() - self._began)
        seconds = self._clock() - self._began
        if self._stats is not None:
            joules = self._stats.stop()
            why = "" if joules else "tegrastats printed no rail"
            return Energy(source="tegrastats" if joules else "", joules=joules, seconds=seconds, why=why)
        joules = {}
        for place, before in self._counters.items():
            after = _read(place / "energy_uj")
            if before is None or after is None:
                continue
            wrap = _read(place / "max_energy_range_uj") or 0
            joules[_name(place)] = (after - before if after >= before else after + wrap - before) / 1e6
        if joules:
            return Energy(source="rapl", joules=joules, seconds=seconds)
        why = "RAPL may be read by root alone" if self._counters else "no RAPL counter, no INA rail, no tegrastats"
        return Energy(source="", seconds=seconds, why=why)

    def _sample(self) -> None:
        while not self._ended.wait(self._interval):
            now = self._clock()
            for rail, place in self._rails.items():
                watts = _watts(place)
                self._joules[rail] += (watts or 0.0) * (now - self._last)
            self._last = now


def ina_rails(root: Path = SYSTEM) -> dict[str, tuple[Path, Path]]:
    """Rail -> files with its millivolts and milliamperes.

    Args:
        root: under which /sys lies.
    """
    found = {}
    for pattern in _INA:
        for folder in sorted(root.glob(pattern)):
            for label in sorted(folder.glob("in*_label")):
                number = label.name.removeprefix("in").removesuffix("_label")
                files = folder / f"in{number}_input", folder / f"curr{number}_input"
                if all(file.is_file() for file in files):
                    found[label.read_text(encoding="utf-8").strip()] = files
    return found


def _rapl_places(root: Path) -> list[Path]:
    """Packages and memory; cores are part of a package."""
    found = sorted((root / _RAPL).glob("intel-rapl:*"))
    return [place for place in found if place.name.count(":") == 1 or _name(place).endswith("dram")]


def _name(place: Path) -> str:
    try:
        own = (place / "name").read_text(encoding="utf-8").strip()
    except OSError:
        return place.name
    return own if place.name.count(":") == 1 else f"{place.name.split(':')[1]} {own}"


def _read(place: Path) -> int | None:
    try:
        return int(place.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _watts(files: tuple[Path, Path]) -> float | None:
    millivolts, milliamperes = _read(files[0]), _read(files[1])
    return None if millivolts is None or milliamperes is None else millivolts * milliamperes / 1e6


__all__ = [
    "INTERVAL_S",
    "NOT_HERE",
    "SYSTEM",
    "Energy",
    "EnergyMeter",
    "ina_rails",
]
