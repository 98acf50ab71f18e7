"""Which CPU this is, as far as an inference engine cares.

Name, cores, features, class.

Two machines are of one *class* when they agree on the architecture and on every feature that makes
an engine pick another kernel, and with it other roundings. An artefact verified on one class is
checked in full on another one. It knows Linux's /proc/cpuinfo; elsewhere the features are unknown
and no two machines count as one class.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from tinyusfm_runtime.errors import InputError


def pin(cpus: Iterable[int] | None) -> None:
    """Pins the calling thread to CPUs, where the system can (Linux).

    Threads it starts later inherit that.

    Args:
        cpus: numbers of CPUs, or None to leave everything as it is.

    Raises:
        InputError: none of these CPUs may be used, or the system cannot pin.
    """
    if cpus is None:
        return
    if not hasattr(os, "sched_setaffinity"):
        raise InputError("this system cannot pin threads to CPUs: leave the option out")
    try:
        os.sched_setaffinity(0, set(cpus))
    except (OSError, ValueError) as error:
        raise InputError(f"cannot pin to CPUs {sorted(cpus)}: {error}") from error


@contextmanager
def pinned(cpus: Iterable[int] | None) -> Iterator[None]:
    """Pins the calling thread for a while; threads started meanwhile stay pinned.

    Args:
        cpus: numbers of CPUs, or None to leave everything as it is.

    Raises:
        InputError: none of these CPUs may be used, or the system cannot pin.
    """
    before = None if cpus is None or not hasattr(os, "sched_getaffinity") else os.sched_getaffinity(0)
    pin(cpus)
    try:
        yield
    finally:
        pin(before)


WATCHED_FEATURES = (
    # x86: wider vectors, INT8 and bfloat16 dot products, matrix tiles
    "fma", "avx2", "avx512f", "avx512bw", "avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16",
    "avx_vnni_int8", "avx_ne_convert", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16",
    # Arm: half precision, dot products, INT8 and bfloat16 matrix products, scalable vectors
    "asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "svei8mm", "svebf16", "sme",
)  # fmt: skip
"""Features by which engines choose kernels, as Linux spells them."""
BF16_FEATURES = frozenset({"avx512_bf16", "avx_ne_convert", "amx_bf16", "bf16", "svebf16"})
"""Any of these means that the CPU computes bfloat16 itself."""
INT8_DOT_FEATURES = frozenset(
    {"avx_vnni", "avx512_vnni", "avx_vnni_int8", "amx_int8", "asimd", "asimddp", "i8mm", "sve", "sve2", "svei8mm"}
)
"""Any of these means that sums of 8-bit products are kept in 32 bits (Arm's older widening products do that too)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MachineCard:
    """One machine, for reports and for the choice of checks.

    Attributes:
        cpu: the CPU's name as its maker gives it.
        architecture: such as ``x86_64`` or ``aarch64``.
        cores: physical cores.
        usable_cpus: logical CPUs this process may run on.
        features: those of ``WATCHED_FEATURES`` that it has, sorted; empty where they cannot be known.
    """

    cpu: str
    architecture: str
    cores: int
    usable_cpus: int
    features: tuple[str, ...]

    @property
    def cpu_class(self) -> str:
        """Architecture and features in one string, equal for machines of one class."""
        return f"{self.architecture}:{'+'.join(self.features) or 'unknown'}"

    @property
    def has_bf16(self) -> bool:
        """True if the CPU is known to compute bfloat16 itself."""
        return not BF16_FEATURES.isdisjoint(self.features)

    @property
    def has_int8_dot(self) -> bool:
        """True if the CPU is known to sum 8-bit products without saturating at 16 bits."""
        return not INT8_DOT_FEATURES.isdisjoint(self.features)

    def to_json(self) -> dict[str, Any]:
        """Plain data, ready for ``json.dumps``."""
        return {
            "cpu": self.cpu,
            "architecture": self.architecture,
            "cores": self.cores,
            "usable_cpus": self.usable_cpus,
            "features": list(self.features),
            "cpu_class": self.cpu_class,
        }


@lru_cache(maxsize=1)
def machine_card() -> MachineCard:
    """Looks at this machine (once per process)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    return card_from_cpuinfo(text, platform.machine() or "unknown")


def card_from_cpuinfo(text: str, architecture: str) -> MachineCard:
    """Reads the text of /proc/cpuinfo.

    Args:
        text: its content, or nothing where there is none.
        architecture: ``platform.machine()``.

    Returns:
        The card; features are those of the first CPU that lists any.
    """
    blocks = [_fields(block) for block in text.split("\n\n") if block.strip()]
    cpus = [block for block in blocks if "processor" in block]
    flags = next((block[key] for block in cpus for key in ("flags", "Features") if key in block), "")
    usable = _usable_cpus()
    places = {(block.get("physical id"), block["core id"]) for block in cpus if "core id" in block}
    return MachineCard(
        cpu=_name(blocks) or architecture,
        architecture=architecture,
        cores=len(places) or len(cpus) or usable,
        usable_cpus=usable,
        features=tuple(sorted(set(flags.split()) & set(WATCHED_FEATURES))),
    )


def same_class(listed: object, card: MachineCard) -> bool:
    """Whether a machine is of the class that a list of features describes.

    Args:
        listed: CPU features an artefact was verified with, as its manifest has them.
        card: the machine.

    Returns:
        True only if the machine's features are known and exactly these among the watched ones.
    """
    if not isinstance(listed, (list, tuple)) or not card.features:
        return False
    return {str(feature) for feature in listed} & set(WATCHED_FEATURES) == set(card.features)


def default_threads(card: MachineCard) -> int:
    """Threads for an engine where nobody says.

    Half of the cores, at least 1, at most 4.

    The other half belongs to whatever else runs on a scanner; beyond 4 a network of this size gains
    little and its slowest frames get slower.
    """
    return max(1, min(4, min(card.cores, card.usable_cpus) // 2))


def _usable_cpus() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _fields(block: str) -> dict[str, str]:
    pairs = (line.partition(":") for line in block.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, _, value in pairs}


def _name(blocks: list[dict[str, str]]) -> str:
    for key in ("model name", "Model", "Hardware"):
        for block in blocks:
            if block.get(key):
                return block[key]
    for block in blocks:
        if "CPU part" in block:
            return f"Arm implementer {block.get('CPU implementer', '?')} part {block['CPU part']}"
    return ""


__all__ = [
    "BF16_FEATURES",
    "INT8_DOT_FEATURES",
    "WATCHED_FEATURES",
    "MachineCard",
    "card_from_cpuinfo",
    "default_threads",
    "machine_card",
    "pin",
    "pinned",
    "same_class",
]
