"""What ``profile --baseline`` compares with.

A bundle that is at hand, in turns, or the samples of a report.

A baseline is a bundle's folder, or the report of an earlier profile. Where the bundle of that report is found as well
(``--baseline-bundle``, or a folder of its name and id beside the report or beside the new bundle), both bundles answer
in turns, so that a slow minute of the machine slows both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.timing.turns import in_turns
from tinyusfm_edge.report.comparison import HEADER, ReportComparison, compare_reports
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import BundleError, InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.latency import PERCENTILES
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.session import Session
from tinyusfm_runtime.strict_json import parse_json


@dataclass(frozen=True, slots=True)
class Baseline:
    """What a profile is compared with.

    Attributes:
        report: of an earlier profile, or None where a bundle was named.
        bundle: folder of the bundle that the report is of, or None where it is not at hand.
    """

    report: Mapping[str, Any] | None
    bundle: Path | None

    def judge(
        self, data: dict[str, Any], session: Session, frames: Sequence[Frame], rounds: int
    ) -> tuple[str, ReportComparison]:
        """Compares, and keeps in the report how.

        Args:
            data: the new report; ``baseline`` is put in.
            session: of the new bundle, open.
            frames: answered for in every round.
            rounds: of the turns.

        Returns:
            Lines for people, and the comparison, whose ``demand`` ends the command.

        Raises:
            InputError: the two have nothing in common.
        """
        if self.bundle is None:
            return self.stored(data)
        artefact = session.artefact
        with Session.open(
            self.bundle,
            target=artefact.target,
            precision=artefact.precision,
            threads=session.threads,
            allow_unverified=not artefact.trusted,
            full_depth=session.full_depth,
        ) as other:
            took_RF2 = in_turns(other, session, frames, rounds)
        before, after = (_report(data, took_RF2[:, :, side].ravel()) for side in (0, 1))
        before = {**before, **_ground(self.report)} if self.report is not None else before
        found = compare_reports(before, after)
        note = f"measured in turns with {self.bundle.name}"
        found = replace(found, notes=(*found.notes, note))
        samples = [took_RF2[:, :, side].ravel().tolist() for side in (0, 1)]
        data["baseline"] = {"how": "in turns", "bundle": self.bundle.name, "samples_ms": samples, **found.to_json()}
        return _lines(found), found

    def stored(self, data: dict[str, Any]) -> tuple[str, ReportComparison]:
        """Compares with the stored samples.

        Args:
            data: the new report; ``baseline`` is put in.

        Raises:
            InputError: the two have nothing in common, or only a bundle was named.
        """
        if self.report is None:
            raise InputError("a bundle has no stored samples: it is measured in turns")
        found = compare_reports(self.report, data)
        found = replace(found, notes=(*found.notes, "against the stored samples: its bundle is not at hand"))
        data["baseline"] = {"how": "stored samples", **found.to_json()}
        return _lines(found), found


def find_baseline(place: Path | None, given: Path | None, bundle: Path, *, there: bool = False) -> Baseline | None:
    """What a baseline is, and where its bundle lies.

    Args:
        place: a bundle's folder, what an earlier ``profile --json`` wrote, or None.
        given: folder of the report's bundle, or None.
        bundle: the new bundle.
        there: it is measured on another machine, so that no bundle is at hand.

    Returns:
        None where nothing was named.

    Raises:
        InputError: it is neither, cannot be read, or the bundle given is not the report's.
    """
    if place is None:
        if given is not None:
            raise InputError("--baseline-bundle belongs to a report: give that with --baseline")
        return None
    if there and (given is not None or place.is_dir()):
        raise InputError("a baseline's bundle is measured on this machine: give its report alone, or leave --host out")
    if place.is_dir():
        if given is not None:
            raise InputError("--baseline-bundle belongs to a report: --baseline is a bundle already")
        return Baseline(None, place)
    try:
        report = parse_json(place.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"baseline {place} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"baseline {place.name} is not JSON: profile --json writes it") from error
    if not isinstance(report, dict) or report.get("kind") != "tinyusfm-edge profile":
        raise InputError(f"baseline {place.name} is no report of profile: profile --json writes it")
    subject = report.get("subject")
    subject = subject if isinstance(subject, dict) else {}
    name, wanted = str(subject.get("bundle", "")), str(subject.get("bundle_id", ""))
    if given is not None:
        found = Bundle.open(given).manifest.bundle_id
        if found != wanted:
            raise InputError(f"--baseline-bundle {given.name} is bundle {found}; the report is of {wanted or 'none'}")
        return Baseline(report, given)
    known = not there and name and name == Path(name).name
    candidates = [folder / name for folder in (place.parent, bundle.parent)] if known else []
    return Baseline(report, next((folder for folder in candidates if _is(folder, wanted, bundle)), None))


def _is(folder: Path, wanted: str, bundle: Path) -> bool:
    """Whether a folder is the bundle that is wanted, and another one than the new one."""
    try:
        if not folder.is_dir() or folder.resolve() == bundle.resolve():
            return False
        return Bundle.open(folder).manifest.bundle_id == wanted
    except BundleError:
        return False


def _report(data: Mapping[str, Any], samples_ms: np.ndarray) -> dict[str, Any]:
    """A profile's report of whole predictions alone."""
    points = {f"p{percent}": float(np.percentile(wide(samples_ms), percent)) for percent in PERCENTILES}
    samples = {"total_ms": samples_ms.tolist()}
    return {**data, "stages": {"total_ms": points}, "samples_ms": samples, "cold": None}


def _ground(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a stored report rests on."""
    return {name: report.get(name) for name in ("machine", "setup", "threads", "frames") if name in report}


def _lines(found: ReportComparison) -> str:
    table = console.table(HEADER, [change.row() for change in found.changes])
    notes = "".join(f"\nnote         {note}" for note in found.notes)
    return f"{table}{notes}\nbaseline     {found.headline}"


__all__ = ["Baseline", "find_baseline"]
