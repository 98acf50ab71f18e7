"""What a Jetson's own programs tell: rails and load, power mode, clocks.

``tegrastats`` prints a line at an interval, ``nvpmodel -q`` the power mode, ``jetson_clocks --show`` (root) the clocks.
They are started only where the machine says that it is a Tegra, and ended with the measurement. The parsers are tested
on recorded output, the calls on programs of the same names; not run on a Jetson.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

TIMEOUT_S = 10.0
"""Longest wait for a program's answer."""
_MARKS = ("etc/nv_tegra_release", "proc/device-tree/compatible")
_NEW = re.compile(r"\b((?:VDD|VIN)_\w+) (\d+)(?:mW)?/(\d+)(?:mW)?")
_OLD = re.compile(r"\b(POM_\w+) (\d+)/(\d+)")
_TEMPERATURE = re.compile(r"\b(\w+)@(-?[\d.]+)C")
_GPU = re.compile(r"\bGR3D_FREQ (\d+)%")
_MODE = re.compile(r"NV Power Mode: ?(\S+)\s+(\d+)")
_CLOCK = re.compile(r"^(cpu\d+|GPU|EMC)\b.*?MinFreq=(\d+) MaxFreq=(\d+) CurrentFreq=(\d+)", re.MULTILINE)


def is_tegra(root: Path) -> bool:
    """Whether a machine says that it is a Jetson.

    Args:
        root: under which /etc and /proc lie.
    """
    release, tree = (root / mark for mark in _MARKS)
    try:
        return release.is_file() or b"nvidia,tegra" in tree.read_bytes()
    except OSError:
        return False


def tegra_state(root: Path) -> dict[str, Any] | None:
    """Power mode and clocks now, or None on any other machine.

    Args:
        root: under which /etc and /proc lie.

    Returns:
        ``power_mode`` of nvpmodel or None, ``clocks_held`` of jetson_clocks (clock -> held at its largest value), and
        ``why``: program -> why it gave nothing.
    """
    if not is_tegra(root):
        return None
    why: dict[str, str] = {}
    mode = parse_nvpmodel(_said(why, "nvpmodel", "-q"))
    clocks = parse_jetson_clocks(_said(why, "jetson_clocks", "--show"))
    return {"power_mode": mode, "clocks_held": clocks, "why": why}


class TegraStats:
    """A running tegrastats whose rails are added up.

    Args:
        process: it, with its output as a pipe of text.
        clock_s: monotonic seconds.
    """

    def __init__(self, process: subprocess.Popen[str], clock_s: Callable[[], float] = time.monotonic) -> None:
        self._process, self._clock = process, clock_s
        self._joules: dict[str, float] = {}
        self._last = clock_s()
        self._thread = threading.Thread(target=self._read, name="tegrastats", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, interval_s: float) -> TegraStats | None:
        """Starts it, or returns None where there is no such program.

        Args:
            interval_s: between two lines.
        """
        program = shutil.which("tegrastats")
        if program is None:
            return None
        words = [program, "--interval", str(max(1, round(1000 * interval_s)))]
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:
            return None
        return cls(process)

    def stop(self) -> dict[str, float]:
        """Ends it.

        Returns:
            Rail -> joules since the start.
        """
        self._process.terminate()
        try:
            self._process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._thread.join(TIMEOUT_S)
        if self._process.stdout is not None and not self._thread.is_alive():
            self._process.stdout.close()
        return dict(self._joules)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            now = self._clock()
            for rail, milliwatts in parse_tegrastats(line)["milliwatts"].items():
                self._joules[rail] = self._joules.get(rail, 0.0) + milliwatts / 1e3 * (now - self._last)
            self._last = now


def parse_tegrastats(line: str) -> dict[str, Any]:
    """One line of ``tegrastats``, of JetPack 4 to 6.

    Args:
        line: as it was printed.

    Returns:
        ``milliwatts`` by rail (now), ``celsius`` by sensor, ``gpu_percent`` or None.
    """
    rails = {name: int(now) for pattern in (_NEW, _OLD) for name, now, _ in pattern.findall(line)}
    heat = {name.lower(): float(value) for name, value in _TEMPERATURE.findall(line) if float(value) > -200}
    gpu = _GPU.search(line)
    return {"milliwatts": rails, "celsius": heat, "gpu_percent": int(gpu.group(1)) if gpu else None}


def parse_nvpmodel(text: str) -> str | None:
    """Power mode of ``nvpmodel -q``, name and number, or None.

    Args:
        text: as it was printed.
    """
    found = _MODE.search(text)
    return f"{found.group(1)} ({found.group(2)})" if found else None


def parse_jetson_clocks(text: str) -> dict[str, bool]:
    """Whether each clock of ``jetson_clocks --show`` is held at its largest value.

    Args:
        text: as it was printed.
    """
    return {name: low == high == now for name, low, high, now in _CLOCK.findall(text)}


def _said(why: dict[str, str], name: str, *words: str) -> str:
    """What a program prints.

    Empty where it is not there or fails, and ``why`` says so.
    """
    program = shutil.which(name)
    if program is None:
        why[name] = "not found"
        return ""
    try:
        done = subprocess.run(
            [program, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        why[name] = type(error).__name__
        return ""
    if done.returncode:
        why[name] = f"exit code {done.returncode}" + (": it needs root" if name == "jetson_clocks" else "")
        return ""
    return done.stdout


__all__ = [
    "TIMEOUT_S",
    "TegraStats",
    "is_tegra",
    "parse_jetson_clocks",
    "parse_nvpmodel",
    "parse_tegrastats",
    "tegra_state",
]
