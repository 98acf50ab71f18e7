"""Under which circumstances something was timed.

System, tools, clock governor, power mode, date.

Two timings can be compared only where these are the same. It reads files of the system and starts nothing.
"""

from __future__ import annotations

import platform
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
POWER_MODE = Path("/var/lib/nvpmodel/status")
"""Where a Jetson keeps its power mode, such as ``pmode:0002``."""
UNKNOWN = "unknown"


def circumstances() -> dict[str, Any]:
    """System, Python, numpy, toolkit, governor, power mode and date, as plain data."""
    return {
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "toolkit": _toolkit(),
        "governor": _line(GOVERNOR),
        "power_mode": _line(POWER_MODE),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def _toolkit() -> str:
    try:
        return metadata.version("tinyusfm-edge")
    except metadata.PackageNotFoundError:
        return "from a checkout"


def _line(place: Path) -> str:
    try:
        return place.read_text(encoding="ascii", errors="replace").strip() or UNKNOWN
    except OSError:
        return UNKNOWN


__all__ = ["GOVERNOR", "POWER_MODE", "UNKNOWN", "circumstances"]
