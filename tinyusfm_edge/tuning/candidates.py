"""What can be tried here: each artefact of each variant, by threads and pinning."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.manifest import Artefact
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.device.machine import MachineCard, machine_card
from tinyusfm_runtime.errors import InputError

NO_THREADS = frozenset({"trt", "coreml"})
"""Engines that do not compute on the CPU's cores: threads and pinning mean nothing to them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneVariant:
    """One bundle that takes part.

    Attributes:
        name: what people read, unique in a run.
        bundle: the bundle's folder.
        bundle_id: digest of its manifest.
        artefacts: of the bundle, in its order.
    """

    name: str
    bundle: Path
    bundle_id: str
    artefacts: tuple[Artefact, ...]

    @classmethod
    def of(cls, bundle: Path, name: str | None = None) -> TuneVariant:
        """Opens a bundle and verifies every byte of it.

        Args:
            bundle: its folder.
            name: another name than that of the folder.

        Raises:
            BundleError, InputError: it cannot be used.
        """
        found = Bundle.open(bundle)
        return cls(
            name=name or found.path.name.removesuffix(".bundle"),
            bundle=found.path,
            bundle_id=found.manifest.bundle_id,
            artefacts=tuple(found.manifest.artefacts),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneCandidate:
    """One way to run one artefact.

    Attributes:
        variant: name of its variant.
        rank: place of its variant on the command line, 0 first.
        bundle: the bundle's folder.
        artefact: name of the artefact in it, such as ``openvino-int8``.
        target: of the artefact.
        precision: of the artefact.
        engine: plug-in that runs it.
        threads: threads inside the engine.
        cpus: CPUs it is pinned to; empty leaves it to the operating system.
    """

    variant: str
    rank: int
    bundle: Path
    artefact: str
    target: str
    precision: str
    engine: str
    threads: int
    cpus: tuple[int, ...] = ()

    @property
    def key(self) -> str:
        """Name that is unique in a run."""
        where = f"cpus {'+'.join(map(str, self.cpus))}" if self.cpus else "free"
        return f"{self.variant}/{self.artefact}/{self.threads}/{where}"

    @property
    def opens(self) -> str:
        """What a session is opened with as precision, such as ``int8-sector``."""
        return self.artefact.removeprefix(f"{self.target}-")

    @property
    def pruned(self) -> bool:
        """Whether its artefact looks at a sector alone."""
        return self.opens != self.precision

    @property
    def pinning(self) -> str:
        """The pinning in words."""
        return f"CPU {', '.join(map(str, self.cpus))}" if self.cpus else "not pinned"

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the place of the bundle."""
        return {
            "key": self.key, "variant": self.variant, "rank": self.rank, "artefact": self.artefact,
            "target": self.target, "precision": self.precision, "engine": self.engine, "threads": self.threads,
            "cpus": list(self.cpus),
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any], bundle: Path) -> TuneCandidate:
        """Reads what ``to_json`` gave.

        Args:
            data: plain data.
            bundle: the bundle's folder here.

        Raises:
            InputError: a value of another kind.
        """
        try:
            return cls(
                variant=str(data["variant"]), rank=int(data["rank"]), bundle=bundle, artefact=str(data["artefact"]),
                target=str(data["target"]), precision=str(data["precision"]), engine=str(data["engine"]),
                threads=int(data["threads"]), cpus=tuple(int(cpu) for cpu in data["cpus"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"a candidate of the device cannot be read: {error}") from error


def thread_counts(card: MachineCard | None = None) -> tuple[int, ...]:
    """Threads that are worth a try: powers of two up to the cores, and all cores.

    Args:
        card: of the machine; None is this one.
    """
    found = card or machine_card()
    most = max(1, min(found.cores, found.usable_cpus))
    return tuple(sorted({1 << power for power in range(most.bit_length()) if 1 << power <= most} | {most}))


def pinnable_cpus() -> tuple[int, ...]:
    """CPUs that this process may use, or none where the system cannot pin."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_setaffinity") else ()


def usable_artefacts(variant: TuneVariant) -> tuple[list[Artefact], dict[str, str]]:
    """Artefacts of a variant whose engine works here, and why the others cannot run.

    Args:
        variant: a bundle.

    Returns:
        The artefacts, and name -> reason of the rest.
    """
    works: list[Artefact] = []
    left_out: dict[str, str] = {}
    for artefact in variant.artefacts:
        found = plugins.available("engines", artefact.engine)
        if found.usable:
            works.append(artefact)
        else:
            left_out[f"{variant.name}/{artefact.name}"] = found.reason
    return works, left_out


def list_candidates(
    groups: Sequence[Sequence[TuneVariant]], threads: Sequence[int], cpus: Sequence[int]
) -> tuple[list[TuneCandidate], dict[str, str]]:
    """Everything that can be tried.

    Args:
        groups: the bundles of each variant, variants in the order in which they are preferred.
        threads: numbers of threads to try.
        cpus: CPUs to pin to, the first ones first; none tries no pinning.

    Returns:
        Candidates, and artefact -> why it cannot run here.

    Raises:
        InputError: two variants of one name, or nothing can run.
    """
    names = [group[0].name for group in groups if group]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InputError(f"two variants are named {', '.join(twice)}: rename one of the bundles")
    found: list[TuneCandidate] = []
    left_out: dict[str, str] = {}
    for rank, variant in ((rank, variant) for rank, group in enumerate(groups) for variant in group):
        works, missing = usable_artefacts(variant)
        left_out |= missing
        for artefact in works:
            fixed = artefact.engine in NO_THREADS
            for count in (1,) if fixed else threads:
                # as many CPUs as threads, where that leaves a choice
                pins = [(), tuple(cpus[:count])] if not fixed and count < len(cpus) else [()]
                found += [_candidate(variant, rank, artefact, count, pin) for pin in pins]
    if not found:
        why = "; ".join(f"{name}: {reason}" for name, reason in left_out.items()) or "no bundle holds an artefact"
        raise InputError(f"nothing can be tried here: {why}")
    keys = [one.key for one in found]
    if twice := sorted({key for key in keys if keys.count(key) > 1}):
        raise InputError(f"{twice[0]} stands in two bundles of one variant: leave one of them out")
    return found, left_out


def _candidate(
    variant: TuneVariant, rank: int, artefact: Artefact, threads: int, cpus: tuple[int, ...]
) -> TuneCandidate:
    return TuneCandidate(
        variant=variant.name, rank=rank, bundle=variant.bundle, artefact=artefact.name, target=artefact.target,
        precision=artefact.precision, engine=artefact.engine, threads=threads, cpus=cpus,
    )  # fmt: skip


__all__ = [
    "NO_THREADS",
    "TuneCandidate",
    "TuneVariant",
    "list_candidates",
    "pinnable_cpus",
    "thread_counts",
    "usable_artefacts",
]
