"""``tinyusfm-edge calibrate``: choose frames and measure how to set ranges.

The frames cover a pool; both choices are written to files.

One line of every result goes to standard output, the whole to an HTML report beside the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from tinyusfm_edge.calibrate import AUTO, FRAMES, Calibrated, CalibrateOptions, calibrate_student
from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.data_options import reads_data
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports
from tinyusfm_edge.cli.train.student import ContainerOption, LabelsOption, TaskOption, foreign, load
from tinyusfm_edge.data.calibration_pool import open_pool
from tinyusfm_edge.data.reading import AS_IT_IS, Reading
from tinyusfm_edge.extras import require
from tinyusfm_runtime.errors import InputError


@reports("calibrate")
@reads_data
def calibrate(
    student: Annotated[str, typer.Argument(help="Shipped student or weights file.")],
    data: Annotated[Path, typer.Argument(help="Folder with a split.csv, folder of images, clip or DICOM file.")],
    out: Annotated[Path, typer.Option(help="File to write; export --calibration takes it.")] = Path("set.json"),
    count: Annotated[int, typer.Option(min=1, max=console.MOST, help="Frames wanted.")] = FRAMES,
    method: Annotated[str, typer.Option(help="minmax, percentile, entropy, mse, or auto: measured.")] = AUTO,
    crop: Annotated[
        str | None,
        typer.Option(help="ROW,COL,HEIGHT,WIDTH, region (default for DICOM) or whole, before anything else."),
    ] = None,
    drift: Annotated[
        bool | None, typer.Option(help="Fit the drift statistic. Default: where there are enough patients.")
    ] = None,
    false_alarms: Annotated[float, typer.Option(help="Rate of windows that may alarm without drift.")] = 0.05,
    report: Annotated[Path | None, typer.Option(help="HTML report. Default: beside the file.")] = None,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
    task: TaskOption = None,
    labels: LabelsOption = None,
    container: ContainerOption = None,
    num_classes: Annotated[
        int | None, typer.Option(min=1, max=console.MOST, help="Number of the model's classes.")
    ] = None,
    reading: Reading = AS_IT_IS,
    output: ReportOutput = SILENT,
) -> None:
    """Choose calibration frames and ranges."""
    options = CalibrateOptions(
        count=count,
        methods=() if method == AUTO else (method,),
        drift=drift,
        false_alarms=false_alarms,
        seed=seed,
    )
    require("calibrate", ("torch", "safetensors"), "torch")
    require("calibrate", ("sklearn",), "calibration")
    console.check_writable(out, "the calibration file")
    page = report or out.with_suffix(".html")
    console.check_writable(page, "the calibration report")
    if page.resolve() == out.resolve():
        raise InputError("the report and the calibration file must be different files")
    pool = open_pool(data, crop, reading)
    for line in (pool.note, *pool.notes):
        console.note(f"note: {line}")
    loaded, _ = load(student, foreign(task, labels, container, num_classes))
    with console.progress() as progress:
        found = calibrate_student(loaded, pool, options, progress=progress, track=console.track)
    from tinyusfm_edge.report.calibration import calibration_page
    from tinyusfm_edge.report.page import render

    html = render(calibration_page(found.file, found.choice, found.chosen, found.notes, loaded.spec))
    console.write_file(page, html.encode(), "the calibration report")
    console.write_json(str(out), found.file.to_json(), "the calibration file")
    for line in describe(found):
        console.say(line)
    console.say(f"report       {page}")
    console.say(f"set          {out}")
    output.result(found.file.to_json())
    output.end("export", student, "--int8", "--calibration", out, "--data", data)


def describe(found: Calibrated) -> list[str]:
    """Lines that tell what was chosen."""
    file = found.file
    rows = [
        (trial["name"], f"{trial['error']:.2%}", *_dice(trial), "chosen" if trial["chosen"] else "")
        for trial in file.trials
    ]
    lines = [console.table(("ranges by", "logit error", "Dice", "worst Dice", ""), rows), ""]
    lines.append(
        f"frames       {len(file.frames.ids)} of {file.selection['pool']}, {file.selection['patients']} patients"
    )
    lines += [f"{axis:<13}{counts}" for axis, counts in coverage_lines(file.coverage)]
    if file.drift is not None:
        kept = file.drift.about["held_out"]
        lines.append(
            f"drift        at most {file.drift.false_alarms:.0%} false alarms a window, set on {kept} patients"
        )
    return lines + [f"note         {note}" for note in found.notes]


def _dice(trial: Mapping[str, Any]) -> tuple[str, str]:
    if trial["dice_mean"] is None:
        return "-", "-"
    return f"{trial['dice_mean']:.4f}", f"{trial['dice_worst']:.4f}"


def coverage_lines(coverage: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Axis and what of it is covered, in words."""
    found: dict[str, list[str]] = {}
    for entry in coverage:
        star = "*" if entry["measured"] else ""
        found.setdefault(f"{entry['axis']}{star}", []).append(f"{entry['kind']}: {entry['chosen']} of {entry['pool']}")
    return [(axis, "; ".join(kinds)) for axis, kinds in found.items()]
