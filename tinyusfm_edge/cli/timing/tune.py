"""``tinyusfm-edge tune``: what runs best on this device, and the recipe for it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.data.folder import split_names
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_runtime.errors import GateError, InputError

if TYPE_CHECKING:
    from tinyusfm_edge.cli.timing.remote import Device
    from tinyusfm_edge.tuning.choice import TuneChoice
    from tinyusfm_edge.tuning.page import TuneReport
    from tinyusfm_edge.tuning.run import TuneRequest
    from tinyusfm_edge.tuning.variants import VariantBundles

DEVICE_PANEL = "On a device"
REPORT_NAME, PAGE_NAME = "tune.json", "tune.html"
"""Files in the run's folder, beside the state, the recipe and the bundles that students gave."""


@reports("tune", page=True)
@reads_data
def tune(
    variants: Annotated[
        list[str], typer.Argument(help="Students, bundles, or folders of bundles; the preferred one first.")
    ],
    budget_ms: Annotated[
        float | None,
        typer.Option(
            min=0.001, rich_help_panel="Options", help="What a frame may take. Default: the fastest of the first."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for state, recipe, page and bundles; a killed run goes on.")] = Path(
        "tune-out"
    ),
    data: Annotated[Path | None, typer.Option(help="Images that judge and calibrate a student, as in export.")] = None,
    target: Annotated[str | None, typer.Option(help="Targets to try for a student. Default: all that work.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precisions to try for a student. Default: int8, bf16 and fp32.")
    ] = None,
    threads: Annotated[
        str | None, typer.Option(metavar="N,...", help="Threads to try. Default: powers of two up to the cores.")
    ] = None,
    pin: Annotated[bool, typer.Option(help="Also try it pinned to the first CPUs (Linux).")] = True,
    source: Annotated[str, typer.Option(help="Frames to time.")] = "phantom:200-215",
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="How often the fast candidates have their turn.")] = 6,
    runs: Annotated[
        int, typer.Option(metavar="N", min=1, max=100_000, help="Timed frames in a turn, if the time suffices.")
    ] = 40,
    seconds: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.01, help="Most time of a turn; 8 frames are timed all the same.")
    ] = 3.0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run measured and exported.")] = False,
    host: Annotated[
        str | None,
        typer.Option(rich_help_panel=DEVICE_PANEL, metavar="USER@DEVICE", help="Measure on a device over SSH."),
    ] = None,
    ssh: Annotated[
        str, typer.Option(rich_help_panel=DEVICE_PANEL, help="The ssh program with its options (with --host).")
    ] = "ssh",
    remote_python: Annotated[
        str, typer.Option(rich_help_panel=DEVICE_PANEL, help="Python on the device (with --host).")
    ] = "python3",
    wheel: Annotated[
        Path | None,
        typer.Option(rich_help_panel=DEVICE_PANEL, help="Wheel of this toolkit to copy there (with --host)."),
    ] = None,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Find what runs best on this device."""
    from tinyusfm_edge.cli.timing.remote import Device
    from tinyusfm_edge.export import export_student
    from tinyusfm_edge.tuning.page import tune_page
    from tinyusfm_edge.tuning.run import TuneRequest, measure_here, prepare_variants
    from tinyusfm_edge.tuning.visit import VisitPlan

    request = TuneRequest(
        words=tuple(variants), budget_ms=budget_ms, out=out, data=data, reading=reading,
        targets=tuple(split_names(target)), precisions=tuple(split_names(precision)), threads=read_threads(threads),
        pin=pin, plan=VisitPlan(source=source, runs=runs, seconds=seconds), rounds=rounds, fresh=fresh,
    )  # fmt: skip
    console.check_writable(out / REPORT_NAME, "the report")
    out.mkdir(parents=True, exist_ok=True)
    device = None if host is None else Device(host=host, ssh=shlex.split(ssh), python=remote_python, wheel=wheel)
    with console.progress() as progress:
        found = prepare_variants(request, lambda one, inner: export_student(one, progress=inner), progress)
    if device is None:
        with console.progress() as progress:
            report = measure_here(request, found, progress)
    else:
        report = measure_there(request, found, device)
    place = write_recipe(out, report)
    tell(report)
    console.write_json(str(out / REPORT_NAME), report.to_json(), "the report")
    output.written.append(str(out / REPORT_NAME))
    output.result(report.to_json())
    output.page(lambda: tune_page(report), out / PAGE_NAME)
    if place is not None and report.choice.pick is not None:
        output.written.append(str(place))
        output.end("run", report.choice.pick.candidate.bundle, "phantom:0-9", "--recipe", place)
        return
    output.end("profile", found[0].bundles[0])
    raise GateError(_in_short(report.choice))


def _in_short(choice: TuneChoice) -> str:
    """The reason, or where lines of advice stand below it, that they do."""
    if not choice.would or choice.ratio is None:
        return choice.reason
    times = f"the nearest takes {choice.ratio:.2f} times the budget"
    return f"no variant meets {choice.budget_ms:g} ms here, {times}: what would meet it stands above"


def read_threads(text: str | None) -> tuple[int, ...]:
    """Numbers of threads as typed, or none.

    Args:
        text: with commas between.

    Raises:
        InputError: something else.
    """
    words = split_names(text)
    if not all(word.isascii() and word.isdigit() and 1 <= int(word) <= 1024 for word in words):
        raise InputError(f"--threads N,...: whole numbers from 1 to 1024, not {text!r}")
    return tuple(sorted({int(word) for word in words}))


def measure_there(request: TuneRequest, variants: Sequence[VariantBundles], device: Device) -> TuneReport:
    """Measures on a device, one round for each connection.

    What came back is kept, so that a broken connection costs one round.

    Args:
        request: what was asked for.
        variants: their bundles go there.
        device: where.

    Raises:
        UnsupportedError: the device cannot be reached, or the command could not run there.
        EngineError: the measurement failed there.
        InputError: the answer is of something else.
    """
    from tinyusfm_edge.cli.timing.remote import bundle_files, command_on
    from tinyusfm_edge.tuning.rounds import TuneState
    from tinyusfm_edge.tuning.run import candidates_from, report_of

    groups = [variant.open() for variant in variants]
    files = {
        f"v{rank}/{name}": content
        for rank, variant in enumerate(variants)
        for bundle in variant.bundles
        for name, content in bundle_files(bundle, f"{variant.name}/{bundle.resolve().name}").items()
    }
    words = ["tune", *(f"v{rank}/{variant.name}" for rank, variant in enumerate(variants)), "--out", "run"]
    words += ["--json", "out.json", "--source", request.plan.source, "--runs", str(request.plan.runs)]
    words += ["--seconds", str(request.plan.seconds), *([] if request.pin else ["--no-pin"])]
    words += ["--threads", ",".join(map(str, request.threads))] if request.threads else []
    name = device.host.rpartition("@")[2]
    kept = request.out / f"state-{name}.json"
    if request.fresh:
        kept.unlink(missing_ok=True)
    data: dict[str, Any] = {}
    with console.progress() as progress:
        for number in range(1, request.rounds + 1):
            progress(f"round {number} of {request.rounds} on {name}", (number - 1) / request.rounds)
            before = {"run/state.json": kept.read_bytes()} if kept.is_file() else {}
            data, _ = command_on(device, [*words, "--rounds", str(number)], {**files, **before})
            console.write_json(str(kept), data.get("state"), "the state of the run")
    found = data.get("state")
    if not isinstance(found, dict) or not isinstance(found.get("about"), dict):
        raise InputError(f"{name} answered something else: is the toolkit there of the same version?")
    state = TuneState.open(kept, found["about"])
    out = {**dict(data.get("left_out", {})), **{f"{v.name}/{k}": why for v in variants for k, why in v.missed.items()}}
    return report_of(request, candidates_from(data.get("rows"), groups), state, groups, out, host=name)


def write_recipe(out: Path, report: TuneReport) -> Path | None:
    """Writes the recipe of the pick; without a pick an earlier one goes.

    Args:
        out: the run's folder.
        report: of the run.

    Raises:
        OutputError: it cannot be written.
    """
    from tinyusfm_edge.tuning.run import RECIPE_SUFFIX

    place = out / f"recipe{RECIPE_SUFFIX}"
    if not report.recipe:
        place.unlink(missing_ok=True)
        return None
    console.write_file(place, report.recipe.encode(), "the recipe")
    return place


def tell(report: TuneReport) -> None:
    """Prints what was tried and what is picked.

    Args:
        report: of the run.
    """
    from tinyusfm_edge.tuning.page import HEADER, MOST_ROWS, cells

    rows = report.ordered()
    console.say(console.table(HEADER, [cells(row) for row in rows[:MOST_ROWS]]))
    if len(rows) > MOST_ROWS:
        console.say(f"and {len(rows) - MOST_ROWS} more, slower ones, on the page")
    for what, why in report.left_out.items():
        console.note(f"note: not tried: {what}: {why}")
    for row in rows:
        if row.why_not:
            console.note(f"note: {row.name}: {row.why_not}")
    if report.busy:
        console.note(f"warning: {report.busy}")
    console.say(f"{'picked' if report.choice else 'none':<13}{report.choice.reason}")
    for index, line in enumerate(report.choice.would):
        console.say(f"{'' if index else 'would do':<13}{line}")
    if report.host:
        console.say(f"{'measured on':<13}{report.host}")
