"""A whole run on this machine.

Variants become bundles, bundles candidates, candidates rows, rows a pick and a recipe.

request = TuneRequest(words=("fetal-head.bundle",), budget_ms=10.0)
report = measure_here(request, prepare_variants(request, export_student))
print(report.choice.reason)
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.tuning.advice import what_would
from tinyusfm_edge.tuning.candidates import (
    TuneCandidate,
    TuneVariant,
    list_candidates,
    pinnable_cpus,
    thread_counts,
)
from tinyusfm_edge.tuning.choice import decide, make_rows
from tinyusfm_edge.tuning.page import TuneReport
from tinyusfm_edge.tuning.recipe import recipe_of
from tinyusfm_edge.tuning.rounds import TuneProgress, TuneState, Visit, measure_rounds
from tinyusfm_edge.tuning.variants import Export, VariantBundles, combinations, export_variant, ready_bundles
from tinyusfm_edge.tuning.visit import VisitPlan, visit
from tinyusfm_runtime.device.circumstances import circumstances
from tinyusfm_runtime.device.machine import machine_card
from tinyusfm_runtime.errors import InputError

STATE_NAME, VARIANTS_NAME = "state.json", "variants"
"""In the run's folder: what was measured, and the bundles that students gave."""
RECIPE_SUFFIX = ".toml" if sys.version_info >= (3, 11) else ".json"
"""Of the recipe: what this Python can read again."""
_SETUP = ("system", "python", "numpy", "toolkit", "governor", "power_mode")


@dataclass(frozen=True, kw_only=True, slots=True)
class TuneRequest:
    """What is tried and how long.

    Attributes:
        words: students, bundles or folders of bundles, the preferred one first.
        budget_ms: for a whole frame, or None for the fastest of the first variant.
        out: the run's folder.
        data: labelled frames for the gate of students, or None.
        reading: how those are read.
        targets: to try for a student; empty is all that work here.
        precisions: to try for a student; empty is int8, bf16 and fp32.
        threads: to try; empty is powers of two up to the cores.
        pin: also try it pinned.
        plan: how one candidate is timed.
        rounds: how often.
        fresh: forget what was measured and exported before.
    """

    words: tuple[str, ...]
    budget_ms: float | None = None
    out: Path = Path("tune-out")
    data: Path | None = None
    reading: Reading = AS_IT_IS
    targets: tuple[str, ...] = ()
    precisions: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    pin: bool = True
    plan: VisitPlan = VisitPlan()
    rounds: int = 6
    fresh: bool = False


def prepare_variants(
    request: TuneRequest, export: Export, progress: TuneProgress | None = None
) -> list[VariantBundles]:
    """Bundles of every word; students are exported where that was not done yet.

    Args:
        request: what was asked for.
        export: writes one bundle, as ``export_student``.
        progress: progress.

    Raises:
        EdgeError: a word names nothing that can be used, or an export failed for another reason than its gate.
    """
    from tinyusfm_edge.export import ExportRequest

    found = []
    for word in request.words:
        ready = ready_bundles(word)
        if ready is None:
            folder = request.out / VARIANTS_NAME / Path(word).stem
            if request.fresh and folder.is_dir():
                shutil.rmtree(folder)
            folder.mkdir(parents=True, exist_ok=True)
            if progress is not None:
                progress("looking which targets work here", 0.0)
            base = ExportRequest(data=request.data, reading=request.reading)
            pairs = combinations(request.targets, request.precisions)
            ready = export_variant(word, folder, pairs, export, base, progress)
        found.append(ready)
    return found


def measure_here(
    request: TuneRequest,
    variants: Sequence[VariantBundles],
    progress: TuneProgress | None = None,
    *,
    timed: Visit | None = None,
) -> TuneReport:
    """Measures on this machine and decides.

    Args:
        request: what was asked for.
        variants: see ``prepare_variants``.
        progress: progress.
        timed: times one candidate; None starts a process for it.

    Raises:
        InputError: nothing can be tried, or the state is of something else.
        BundleError: a bundle cannot be used.
        OutputError: the state cannot be written.
    """
    groups = [variant.open() for variant in variants]
    cpus = pinnable_cpus() if request.pin else ()
    candidates, left_out = list_candidates(groups, request.threads or thread_counts(), cpus)
    for variant in variants:
        left_out |= {f"{variant.name}/{what}": why for what, why in variant.missed.items()}
    place = request.out / STATE_NAME
    if request.fresh:
        place.unlink(missing_ok=True)
    state = TuneState.open(place, about_of(request, groups))
    measure_rounds(
        candidates, state, timed or (lambda one: visit(one, request.plan)), rounds=request.rounds, progress=progress
    )
    return report_of(request, candidates, state, groups, left_out)


def about_of(request: TuneRequest, groups: Sequence[Sequence[TuneVariant]]) -> dict[str, Any]:
    """What measurements are of: those of two runs that differ in it are never mixed.

    Args:
        request: what was asked for.
        groups: the opened bundles of each variant.
    """
    setup = circumstances()
    return {
        "machine": machine_card().to_json(),
        "setup": {key: setup[key] for key in _SETUP},
        "bundles": {group[0].name: [variant.bundle_id for variant in group] for group in groups},
        "source": request.plan.source,
        "runs": request.plan.runs,
        "seconds": request.plan.seconds,
    }


def report_of(
    request: TuneRequest,
    candidates: Sequence[TuneCandidate],
    state: TuneState,
    groups: Sequence[Sequence[TuneVariant]],
    left_out: dict[str, str],
    host: str = "",
) -> TuneReport:
    """Rows, pick and recipe of what was measured.

    Args:
        request: what was asked for.
        candidates: that were tried.
        state: what was measured.
        groups: the opened bundles of each variant.
        left_out: what was not tried, and why.
        host: device that measured, or empty.
    """
    from tinyusfm_export.recipe import recipe_text

    rows = make_rows(candidates, state, [variant for group in groups for variant in group])
    choice = decide(rows, request.budget_ms)
    report = TuneReport(rows=rows, choice=choice, state=state, left_out=left_out, host=host)
    if choice.pick is None:
        would = what_would(choice, rows, left_out, int(report.machine.get("usable_cpus", 1)))
        return replace(report, choice=replace(choice, would=would))
    date = circumstances()["date"][:10]
    recipe = recipe_of(choice.pick, request.budget_ms, report.machine, date)
    return replace(report, recipe=recipe_text(recipe, RECIPE_SUFFIX))


def candidates_from(data: Any, groups: Sequence[Sequence[TuneVariant]]) -> list[TuneCandidate]:
    """Candidates that a device tried, with the bundles as they lie here.

    Args:
        data: ``rows`` of the device's report.
        groups: the opened bundles of each variant.

    Raises:
        InputError: a candidate that no bundle here has.
    """
    places = {
        (v.name, a.name): (v.bundle, rank) for rank, group in enumerate(groups) for v in group for a in v.artefacts
    }
    found = []
    for row in data if isinstance(data, list) else []:
        key = (str(row.get("variant")), str(row.get("artefact")))
        if key not in places:
            raise InputError(f"the device answers about {'/'.join(key)}, which no bundle here holds")
        bundle, rank = places[key]
        found.append(TuneCandidate.from_json({**row, "rank": rank}, bundle))
    return found


__all__ = [
    "RECIPE_SUFFIX",
    "STATE_NAME",
    "VARIANTS_NAME",
    "TuneRequest",
    "about_of",
    "candidates_from",
    "measure_here",
    "prepare_variants",
    "report_of",
]
