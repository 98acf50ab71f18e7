"""``tinyusfm-edge doctor``: every plug-in, whether it works, how to get it.

One row per thing, what mends it in the line below, at most 100 columns.
"""

from __future__ import annotations

import platform
import textwrap
from typing import Any

from tinyusfm_edge.cli import console
from tinyusfm_edge.cli.output import SILENT, ReportOutput, reports

REPORT_VERSION = 2
"""Version of the JSON."""
MOST_COLUMNS = 100
"""Letters of the widest line."""
PYTHON_3_10 = "stops at numpy 2.2.6 and onnxruntime 1.23.2, and reads recipes, gates and rules as .json"
"""What 3.10 no longer gets."""
EXAMPLE = ("fetal-head.bundle", "phantom:0-9")


@reports("doctor")
def doctor(output: ReportOutput = SILENT) -> None:
    """Tell what works on this machine."""
    report = examine()
    output.result(report)
    for line in describe(report, min(MOST_COLUMNS, console.width() or MOST_COLUMNS)):
        console.say(line)
    output.end("demo" if report["training"]["works"] else "run", *(() if report["training"]["works"] else EXAMPLE))


def describe(report: dict[str, Any], columns: int) -> list[str]:
    """The report for people.

    One row per thing, what mends it below, no line wider than the columns.

    Args:
        report: of ``examine``.
        columns: letters that a line may have.
    """
    machine = report["machine"]
    facts = [
        ("toolkit", f"tinyusfm-edge {report['version']}, Python {report['python']}"),
        ("system", f"{report['platform']}: {report['support']}"),
        ("cpu", f"{machine['cpu']}, {machine['cores']} cores, {machine['usable_cpus']} usable CPUs"),
        ("features", " ".join(machine["features"]) or "unknown"),
        ("preprocessing", f"{report['preprocessing']['backend']} ({report['preprocessing']['reason']})"),
        *([("int8", f"OpenVINO: {report['int8']}")] if report["int8"] else []),
        ("students", ", ".join(report["students"]) or "none shipped"),
        ("training", report["training"]["reason"]),
    ]
    if report["python"].startswith("3.10."):
        facts.append(("python 3.10", PYTHON_3_10))
    if "reason" in report["numerics"]:
        facts.append(("numpy", f"{report['numerics']['numpy']}: {report['numerics']['reason']}"))
    lines = [part for name, text in facts for part in _wrapped(f"{name:<15}", text, columns)]
    for kind in dict.fromkeys(row["kind"] for row in report["plugins"]):
        lines += ["", f"{kind}s"]
        for row in report["plugins"]:
            if row["kind"] == kind:
                mine = [piece for piece in report["pieces"] if piece["of"] == row["name"] and kind == "engine"]
                lines += _rows(row, mine, columns)
    return lines


def _rows(row: dict[str, Any], pieces: list[dict[str, Any]], columns: int) -> list[str]:
    """One plug-in, the pieces it lacks, and what mends each."""
    mark = "yes" if row["works"] else "no"
    lines = _wrapped(f"  {row['name']:<10} {mark:<4} ", row["reason"], columns)
    missing = [piece for piece in pieces if not piece["works"]]
    for piece in missing:
        why = "" if piece["reason"] in row["reason"] else f": {piece['reason']}"
        lines += _wrapped(f"{'':<18}", f"missing piece {piece['name']}{why}", columns)
        lines += _wrapped(f"{'':<18}", f"mend: {piece['mend']}", columns)
    if not missing and row["install"]:
        lines += _wrapped(f"{'':<18}", f"mend: {row['install']}", columns)
    return lines


def _wrapped(label: str, text: str, columns: int) -> list[str]:
    return textwrap.wrap(
        text,
        columns,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_on_hyphens=False,
        break_long_words=False,
    )


def support(system: str, machine: str) -> str:
    """What is known about the toolkit on a system, in words.

    Args:
        system: as ``platform.system`` says, such as ``Linux``.
        machine: as ``platform.machine`` says, such as ``x86_64``.
    """
    if system == "Linux":
        if machine.lower() in ("x86_64", "amd64"):
            return "what it is tested on"
        return "built for, not run by us" if machine.lower() in ("aarch64", "arm64") else "not run by us"
    if system == "Darwin":
        return "built for, not run by us; shared-memory rings and cameras need Linux"
    if system == "Windows":
        return "not supported: use WSL2, which is Linux"
    return "not run by us"


def examine() -> dict[str, Any]:
    """The report as plain data."""
    from tinyusfm_edge import students
    from tinyusfm_runtime import plugins
    from tinyusfm_runtime.device.machine import machine_card
    from tinyusfm_runtime.engines.ov import int8_here
    from tinyusfm_runtime.installation import pip_line
    from tinyusfm_runtime.numerics import native
    from tinyusfm_runtime.numerics.preprocess import backend

    found: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = []
    for kind in plugins.KINDS:
        for name in plugins.names(kind):
            mine = _pieces(kind, name)
            pieces += mine
            probe = plugins.available(kind, name)
            install = None if probe.usable or probe.extra is None else pip_line(probe.extra)
            if not probe.usable and (missing := [row["mend"] for row in mine if not row["works"]]):
                install = missing[0]
            found.append(
                {
                    "kind": kind.removesuffix("s"),
                    "name": plugins.public_name(name),
                    "works": probe.usable,
                    "reason": probe.reason,
                    "install": install,
                }
            )
    return {
        "schema": REPORT_VERSION,
        "version": console.version(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "support": support(platform.system(), platform.machine()),
        "machine": machine_card().to_json(),
        "preprocessing": {"backend": backend(), "reason": native.reason() or "compiled kernels in use"},
        "numerics": _numerics(),
        "int8": int8_here() if plugins.available("engines", "ov").usable else None,
        "students": students.names(),
        "training": _training(),
        "plugins": found,
        "pieces": pieces,
    }


def _numerics() -> dict[str, Any]:
    """NumPy, and whether it sorts float16 as it should on this CPU."""
    import numpy as np

    from tinyusfm_runtime.numerics import order

    works = order.sorts_float16()
    return {"numpy": np.__version__, "sorts_float16": works, **({} if works else {"reason": order.FAULT})}


def _pieces(kind: str, name: str) -> list[dict[str, Any]]:
    """What an engine with several requirements says about each of them.

    They are given by ``pieces`` in its file.
    """
    from tinyusfm_runtime import plugins

    try:
        listed = getattr(plugins.load(kind, name), "pieces", None)
        found = listed() if kind == "engines" and callable(listed) else []
        return [
            {"of": plugins.public_name(name), "name": part, "works": works, "reason": reason, "mend": mend}
            for part, works, reason, mend in found
        ]
    except Exception:  # a broken plug-in has its line in the table above
        return []


def _training() -> dict[str, Any]:
    """Whether torch and onnx are there.

    Export, demo and the full verification need them.
    """
    from importlib import metadata

    from tinyusfm_runtime.installation import pip_line

    versions, missing = [], []
    for name in ("torch", "onnx"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        reason = f"{' and '.join(missing)} missing: export and demo need {pip_line('export')}"
        return {"works": False, "reason": reason}
    return {"works": True, "reason": ", ".join(versions)}
