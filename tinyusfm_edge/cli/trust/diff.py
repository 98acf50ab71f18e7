"""``tinyusfm-edge bundle diff``: the change between two bundles."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_runtime.errors import GateError, InputError

if TYPE_CHECKING:
    from tinyusfm_edge.change.assess import Change
    from tinyusfm_edge.change.protocol import Protocol
    from tinyusfm_edge.data.table import Sample
    from tinyusfm_runtime.bundle.reader import Bundle


@reports("bundle diff", page=True)
@reads_data
def diff(
    old: Annotated[Path, typer.Argument(help="The bundle in use.")],
    new: Annotated[Path, typer.Argument(help="The bundle that shall replace it.")],
    protocol: Annotated[Path | None, typer.Option(help="Declared changes and criteria, pccp.toml or .json.")] = None,
    data: Annotated[Path | None, typer.Option(help="Labelled images with a split.csv. Default: golden frames.")] = None,
    split: Annotated[str | None, typer.Option(help="Split of the data. Default: the protocol's, else val.")] = None,
    target: Annotated[str | None, typer.Option(help="Artefact to compare. Default: the first that both have.")] = None,
    precision: Annotated[str | None, typer.Option(help="Its precision.")] = None,
    threads: Annotated[int, typer.Option(min=1, max=1024, help="Threads inside the engines.")] = 1,
    rounds: Annotated[
        int, typer.Option(min=0, max=console.MOST, help="Rounds of the latency measurement; 0 leaves it out.")
    ] = 10,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Say what changed between two bundles and what that does."""
    from tinyusfm_edge.change.page import change_page
    from tinyusfm_edge.change.protocol import read_protocol
    from tinyusfm_runtime.bundle.reader import Bundle

    declared = read_protocol(protocol) if protocol is not None else None
    if declared is not None and data is None:
        raise InputError("a protocol is judged on its declared data: give --data")
    chosen = split or (declared.split if declared is not None else "val")
    if declared is not None and chosen != declared.split:
        raise InputError(f"the protocol declares split {declared.split}: leave --split out")
    before, after = Bundle.open(old, on_device=False), Bundle.open(new, on_device=False)
    change = _change(
        before,
        after,
        declared,
        data=data,
        split=chosen,
        target=target,
        precision=precision,
        threads=threads,
        rounds=rounds,
        reading=reading,
    )
    output.result(change.to_json())
    output.page(lambda: change_page(change))
    _tell(change)
    if not change:
        raise GateError(change.headline, change)
    output.end("bundle", "sign", new, "--key", "release.pem", "--security-version", 2)


def _change(
    old: Bundle,
    new: Bundle,
    declared: Protocol | None,
    *,
    data: Path | None,
    split: str,
    target: str | None,
    precision: str | None,
    threads: int,
    rounds: int,
    reading: Reading,
) -> Change:
    from tinyusfm_edge.change.assess import Change, judge, undeclared_kinds
    from tinyusfm_edge.change.impact import compare_sides
    from tinyusfm_edge.change.kinds import modifications

    model = new.manifest.spec.name
    if declared is not None and declared.model != model:
        raise InputError(f"the protocol is for {declared.model}, not for {model}")
    found = modifications(old, new)
    digest = _digest(data, split, reading) if data is not None else ""
    undeclared = undeclared_kinds(found, declared)
    missed: tuple[str, ...] = ()
    if declared is not None and digest != declared.data_sha256:
        missed = (f"the data's sha256 is {digest[:16]}, the protocol declares {declared.data_sha256[:16]}",)
    sides = None
    margins = ()
    if not undeclared and not missed:
        samples, about = _samples(data, split, new, reading)
        sides = compare_sides(
            old, new, samples, about=about, target=target, precision=precision, threads=threads, rounds=rounds
        )
        if declared is not None:
            margins, missed = judge(sides, declared)  # type: ignore[assignment]
    return Change(
        old=old.manifest.bundle_id,
        new=new.manifest.bundle_id,
        model=model,
        modifications=found,
        protocol=declared,
        undeclared=undeclared,
        data_sha256=digest,
        impact=None if sides is None else sides.impact,
        margins=margins,
        missed=missed,
    )


def _digest(data: Path, split: str, reading: Reading) -> str:
    from tinyusfm_edge.data.fingerprint import images_sha256

    return images_sha256([data], (split,), reading)


def _samples(data: Path | None, split: str, bundle: Bundle, reading: Reading) -> tuple[list[Sample] | None, str]:
    from tinyusfm_runtime.spec import Task

    if data is None:
        return None, "golden phantoms: they show that something moves, not what it means for patients"
    from tinyusfm_edge.data.table import read_table

    need = "label" if bundle.manifest.spec.task is Task.CLASSIFY else "mask"
    return read_table(data, split, need=need, reading=reading), f"split {split} of {data.name}"  # type: ignore[arg-type]


def _tell(change: Change) -> None:
    rows = [(item.kind, item.what, item.before, item.after) for item in change.modifications]
    console.say(console.table(("kind", "what", "before", "after"), rows))
    impact = change.impact
    if impact is not None:
        console.say()
        if impact.metrics:
            header = ("metric", "frames", "old", "new", "new minus old")
            console.say(console.table(header, [metric.row() for metric in impact.metrics]))
        if change.margins:
            header = ("metric", "frames", "new minus old", "margin", "verdict")
            console.say(console.table(header, [test.row() for test in change.margins]))
        console.say(f"frames       {impact.frames}: {impact.about}")
        console.say(f"flips        {len(impact.flips)} answers of {impact.frames} change ({impact.flip_share:.1%})")
        if impact.hc_shift_mm is not None:
            mean, p95, most = impact.hc_shift_mm
            console.say(f"hc moves     mean {mean:.2f}, p95 {p95:.2f}, at most {most:.2f} mm")
        if impact.latency is not None:
            took = impact.latency
            ends = f"{took.low:.3f} to {took.high:.3f}"
            console.say(f"latency      {took.old_ms:.1f} -> {took.new_ms:.1f} ms, ratio {took.ratio:.3f} ({ends})")
    if change.data_sha256:
        console.say(f"data sha256  {change.data_sha256}")
    console.say(f"verdict      {change.headline}")


__all__ = ["diff"]
