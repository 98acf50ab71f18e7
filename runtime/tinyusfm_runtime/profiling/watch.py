"""Clocks, temperature, throttling, load and memory of this machine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

UNKNOWN = "not known here"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conditions:
    """What the machine was like at one moment; None where it does not say.

    Attributes:
        clocks_mhz: least and largest clock of the CPUs.
        governors: of the clocks, without repeats.
        hottest_celsius: hottest zone.
        throttled: how often a core was slowed by heat since the start of the machine.
        load: mean number of runnable processes of the last minute.
        rss_mb: memory of this process.
        peak_rss_mb: most that it ever had.
    """

    clocks_mhz: tuple[float, float] | None
    governors: tuple[str, ...]
    hottest_celsius: float | None
    throttled: int | None
    load: float | None
    rss_mb: float | None
    peak_rss_mb: float | None

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """(what, value) for people."""
        clocks = UNKNOWN if self.clocks_mhz is None else f"{self.clocks_mhz[0]:.0f} to {self.clocks_mhz[1]:.0f} MHz"
        return [
            ("clocks", clocks),
            ("governor", ", ".join(self.governors) or UNKNOWN),
            ("hottest zone", UNKNOWN if self.hottest_celsius is None else f"{self.hottest_celsius:.1f} C"),
            ("slowed by heat", UNKNOWN if self.throttled is None else f"{self.throttled} times"),
            ("load", UNKNOWN if self.load is None else f"{self.load:.2f}"),
            (
                "memory",
                UNKNOWN if self.rss_mb is None else f"{self.rss_mb:.0f} MB, peak {self.peak_rss_mb or 0:.0f} MB",
            ),
        ]


def look(root: Path = Path("/")) -> Conditions:
    """Looks at the machine.

    Args:
        root: under which /sys and /proc lie.
    """
    clocks = _clocks(root)
    throttles = _numbers(root, "sys/devices/system/cpu/cpu*/thermal_throttle/core_throttle_count")
    heat = [value / 1000.0 for value in _numbers(root, "sys/class/thermal/thermal_zone*/temp") if value > -200_000]
    status = _text(root / "proc/self/status")
    load = _text(root / "proc/loadavg").split()
    return Conditions(
        clocks_mhz=(min(clocks), max(clocks)) if clocks else None,
        governors=tuple(sorted({_text(file).strip() for file in _files(root, "cpu*/cpufreq/scaling_governor")} - {""})),
        hottest_celsius=max(heat) if heat else None,
        throttled=int(sum(throttles)) if throttles else None,
        load=float(load[0]) if load else None,
        rss_mb=_status(status, "VmRSS"),
        peak_rss_mb=_status(status, "VmHWM"),
    )


def _clocks(root: Path) -> list[float]:
    found = [_text(file).strip() for file in _files(root, "cpu*/cpufreq/scaling_cur_freq")]
    if any(found):
        return [float(text) / 1000.0 for text in found if text.isdigit()]
    lines = _text(root / "proc/cpuinfo").splitlines()
    return [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]


def _files(root: Path, pattern: str) -> list[Path]:
    return sorted((root / "sys/devices/system/cpu").glob(pattern))


def _numbers(root: Path, pattern: str) -> list[float]:
    texts = [_text(file).strip() for file in sorted(root.glob(pattern))]
    return [float(text) for text in texts if text.lstrip("-").isdigit()]


def _status(text: str, key: str) -> float | None:
    for line in text.splitlines():
        if line.startswith(f"{key}:"):
            return float(line.split()[1]) / 1024.0
    return None


def _text(place: Path) -> str:
    try:
        return place.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


__all__ = ["UNKNOWN", "Conditions", "look"]
