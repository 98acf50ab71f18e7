"""``tinyusfm-edge doctor``: everything that can be plugged in, whether it works here, and the pip line if not."""

from __future__ import annotations

import platform
from typing import Annotated, Any

import typer

from tinyusfm_edge.cli import console

REPORT_VERSION = 1
"""Version of the JSON."""


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for machines.")] = False,
) -> None:
    """Tell what works on this machine."""
    report = examine()
    if as_json:
        console.write_json("-", report, "the report")
        return
    machine = report["machine"]
    console.say(f"tinyusfm-edge {report['version']}, Python {report['python']}, {report['platform']}")
    console.say(f"cpu            {machine['cpu']}, {machine['cores']} cores, {machine['usable_cpus']} usable CPUs")
    console.say(f"features       {' '.join(machine['features']) or 'unknown'}")
    console.say(f"preprocessing  {report['preprocessing']['backend']} ({report['preprocessing']['reason']})")
    console.say(f"students       {', '.join(report['students']) or 'none shipped'}")
    console.say(f"workshop       {report['workshop']['reason']}")
    console.say()
    rows = [
        (row["kind"], row["name"], "yes" if row["works"] else "no", row["reason"], row["install"] or "")
        for row in report["plugins"]
    ]
    console.say(console.table(("kind", "name", "works", "how, or why not", "what brings it"), rows))
    if missing := [row for row in report["pieces"] if not row["works"]]:
        console.say()
        lines = [(row["of"], row["name"], row["reason"], row["mend"]) for row in missing]
        console.say(console.table(("for", "missing piece", "why", "what brings it"), lines))


def examine() -> dict[str, Any]:
    """The report as plain data."""
    from tinyusfm_edge import students
    from tinyusfm_runtime import native, plugins
    from tinyusfm_runtime.machine import machine_card
    from tinyusfm_runtime.preprocess import backend

    found: list[dict[str, Any]] = []
    pieces: list[dict[str, Any]] = []
    for kind in plugins.KINDS:
        for name in plugins.names(kind):
            mine = _pieces(kind, name)
            pieces += mine
            probe = plugins.probe(kind, name)
            install = None if probe.works or probe.extra is None else f"pip install 'tinyusfm-edge[{probe.extra}]'"
            if not probe.works and (missing := [row["mend"] for row in mine if not row["works"]]):
                install = missing[0]
            found.append(
                {
                    "kind": kind.removesuffix("s"),
                    "name": plugins.public_name(name),
                    "works": probe.works,
                    "reason": probe.reason,
                    "install": install,
                }
            )
    return {
        "schema": REPORT_VERSION,
        "version": console.version(),
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "machine": machine_card().to_json(),
        "preprocessing": {"backend": backend(), "reason": native.reason() or "compiled kernels in use"},
        "students": students.names(),
        "workshop": _workshop(),
        "plugins": found,
        "pieces": pieces,
    }


def _pieces(kind: str, name: str) -> list[dict[str, Any]]:
    """What an engine with several requirements says about each of them (``pieces`` in its file)."""
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


def _workshop() -> dict[str, Any]:
    """Whether torch and onnx are there, which export, demo and the full verification need."""
    from importlib import metadata

    versions, missing = [], []
    for name in ("torch", "onnx"):
        try:
            versions.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            missing.append(name)
    if missing:
        reason = f"{' and '.join(missing)} missing: export and demo need pip install 'tinyusfm-edge[export]'"
        return {"works": False, "reason": reason}
    return {"works": True, "reason": ", ".join(versions)}
