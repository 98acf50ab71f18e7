"""A change as a page, under the headings of a change control plan."""

from __future__ import annotations

from tinyusfm_edge.change.assess import Change
from tinyusfm_edge.change.kinds import KINDS
from tinyusfm_edge.report.page import Block, Facts, Page, Table

MAX_FLIPS = 200
"""Frames with another answer that the page lists; the JSON holds all."""
PARTS = ("Description of modifications", "Modification protocol", "Impact assessment")
"""Of a predetermined change control plan (FDA, final guidance, August 2025)."""


def change_page(change: Change) -> Page:
    """The change as a page.

    Args:
        change: judged or not.
    """
    blocks: list[Block] = [_description(change), _protocol(change), *_impact(change)]
    lead = [f"{change.model}: bundle {change.old} -> {change.new}"]
    title = f"Change of {change.model}"
    return Page(title=title, passed=bool(change), headline=change.headline, lead=lead, blocks=blocks)


def _description(change: Change) -> Table:
    allowed = change.protocol.allowed if change.protocol is not None else frozenset(KINDS)
    rows = [
        (item.kind, item.what, item.before, item.after, "yes" if item.kind in allowed else "no")
        for item in change.modifications
    ]
    note = change.protocol.rationale if change.protocol is not None else "No protocol was given: nothing is judged."
    return Table(title=PARTS[0], note=note, header=("kind", "what", "before", "after", "declared"), rows=rows)


def _protocol(change: Change) -> Block:
    if change.protocol is None:
        return Facts(title=PARTS[1], note="None.", facts=[("data sha256", change.data_sha256 or "-")])
    header = ("metric", "frames", "new minus old", "margin", "verdict")
    limits = ", ".join(f"{name} at most {limit:g}" for name, limit in sorted(change.protocol.limits.items())) or "none"
    data = "the declared data" if change.data_sha256 == change.protocol.data_sha256 else "not the declared data"
    note = (
        f"Non-inferiority on {data} (split {change.protocol.split}): the 95 % interval over patients must lie on the "
        f"good side of the margin. Limits: {limits}."
    )
    return Table(title=PARTS[1], note=note, header=header, rows=[test.row() for test in change.margins])


def _impact(change: Change) -> list[Block]:
    declared = []
    if change.protocol is not None:
        declared = [("benefit", change.protocol.benefit), ("risk", change.protocol.risk)]
    impact = change.impact
    if impact is None:
        return [Facts(title=PARTS[2], note="Nothing was run: the change was refused before.", facts=declared)]
    facts = [*declared, ("frames", f"{impact.frames}: {impact.about}"), ("artefact", " -> ".join(impact.artefacts))]
    facts.append(("answers that change", f"{len(impact.flips)} of {impact.frames} ({impact.flip_share:.1%})"))
    if impact.hc_shift_mm is not None:
        mean, p95, most = impact.hc_shift_mm
        facts.append(("circumference moves by", f"mean {mean:.2f}, p95 {p95:.2f}, at most {most:.2f} mm"))
    if impact.latency is not None:
        took = impact.latency
        shown = f"{took.old_ms:.1f} -> {took.new_ms:.1f} ms, ratio {took.ratio:.3f} ({took.low:.3f} to {took.high:.3f})"
        facts.append(("latency, median", shown))
    header = ("metric", "frames", "old", "new", "new minus old")
    flips = [(flip.id, flip.stratum or "-", flip.before, flip.after) for flip in impact.flips[:MAX_FLIPS]]
    return [
        Facts(title=PARTS[2], facts=facts),
        Table(title="Metrics", note="Mean and 95 % interval over patients.", header=header,
              rows=[metric.row() for metric in impact.metrics]),
        Table(title="Answers that change", header=("frame", "kind", "before", "after"), rows=flips),
    ]  # fmt: skip


__all__ = ["MAX_FLIPS", "PARTS", "change_page"]
