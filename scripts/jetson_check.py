"""What can be checked of a JetPack board without one: ``make jetson-check``.

JetPack 6 has Python 3.10 on aarch64. Checked here: that wheels for it resolve, that mypy and ruff accept the runtime
and the commands of a board for 3.10, that the shipped bundle answers under the newest onnxruntime and numpy that 3.10
has, in an environment of its own (on this Python, and on a 3.10 where one is installed), and that TensorRT is called as
its headers and its Python say (a fake made from TensorRT for RTX). What no machine but a board can say is listed as not
run. The exit code is 1 if something that was checked does not hold.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "jetson-check"
ONNXRUNTIME, NUMPY = "1.23.2", "2.2.6"
"""The newest of each with wheels for Python 3.10."""
PLATFORMS = tuple(f"manylinux_2_{minor}_aarch64" for minor in (35, 34, 31, 28, 27, 26, 17)) + ("manylinux2014_aarch64",)
"""What JetPack 6 takes: glibc 2.35 of Ubuntu 22.04."""
NEEDED = ("", "onnxruntime", "openvino", "litert", "images", "dicom", "video", "live", "signed")
"""Extras that a board needs; empty is the toolkit itself."""
LACKING: dict[str, str] = {}
"""Extras that are known not to resolve, and what is said of them."""
MODULES = (
    "tinyusfm_edge.cli.start.doctor", "tinyusfm_edge.cli.build", "tinyusfm_edge.cli.verify",
    "tinyusfm_edge.cli.profile", "tinyusfm_edge.cli.timing.tune", "tinyusfm_edge.cli.streams.run",
    "tinyusfm_edge.cli.streams.live",
)  # fmt: skip
"""Commands of a board."""
TRT_TESTS = ("tests/runtime/test_trt_engine.py", "tests/capi/test_tensorrt.py", "tests/runtime/test_cuda.py")
NOT_RUN = (
    ("Python 3.10 on aarch64", "nothing of ours has run on a board"),
    ("TensorRT on a Jetson's GPU", "engines are parsed and built with TensorRT for RTX, never executed"),
    ("JetPack's own tensorrt package", "it comes with JetPack, not from PyPI"),
)
"""What only a board can tell; docs/tutorials/jetson.md lists the ten minutes."""
HOLDS, BROKEN, NOT, LIMIT = "holds", "FAILED", "not run", "out of time"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One thing that was looked at.

    Attributes:
        what: in words.
        outcome: ``holds``, ``FAILED``, ``not run`` or ``out of time``.
        detail: versions, counts, or why not.
    """

    what: str
    outcome: str
    detail: str = ""


class OutOfTime(Exception):
    """The time limit is over."""


@dataclass(kw_only=True)
class Clock:
    """The time limit of the whole run.

    Attributes:
        seconds: that are left at the start.
        begun: when that was.
    """

    seconds: float
    begun: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds that are left.

        Raises:
            OutOfTime: none are.
        """
        found = self.seconds - (time.monotonic() - self.begun)
        if found <= 0:
            raise OutOfTime
        return found


def run(clock: Clock, *words: str | Path, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """Runs a command within the time limit: exit code, output, errors.

    Raises:
        OutOfTime: the limit is over.
    """
    command = [str(word) for word in words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=clock.left(), cwd=ROOT, env=env, check=False
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise OutOfTime from None
    return done.returncode, done.stdout, done.stderr


def last_line(text: str) -> str:
    """The last line that says something."""
    return (text.strip().splitlines() or ["it printed nothing"])[-1][:200]


def requirements(extra: str, project: dict[str, Any]) -> list[str]:
    """Requirements of an extra and of the extras that it names.

    Args:
        extra: its name; empty is the toolkit itself.
        project: the table ``project`` of pyproject.toml.
    """
    listed = project["dependencies"] if not extra else project["optional-dependencies"][extra]
    found = []
    for line in listed:
        inner = re.fullmatch(rf"{project['name']}\[([\w,-]+)\]", line.strip())
        found += [one for name in inner[1].split(",") for one in requirements(name, project)] if inner else [line]
    return found


def python_3_10() -> Path | None:
    """A Python 3.10 of this machine, or None."""
    places = [shutil.which("python3.10"), *map(str, Path.home().glob(".pyenv/versions/3.10.*/bin/python3.10"))]
    for place in filter(None, places):
        done = subprocess.run([place, "-c", "import venv, sys; print(sys.version_info[:2])"],
                              capture_output=True, text=True, check=False)  # fmt: skip
        if done.stdout.strip() == "(3, 10)":
            return Path(place)
    return None


def check_wheels(clock: Clock, python: Path) -> list[Row]:
    """Whether every requirement of a board has a wheel for cp310 on aarch64."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    rows = []
    for extra in (*NEEDED, *LACKING):
        report = WORK / "report.json"
        report.unlink(missing_ok=True)
        places = [word for name in PLATFORMS for word in ("--platform", name)]
        code, _, errors = run(
            clock, python, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--target",
            WORK / "nowhere", "--report", report, "--only-binary=:all:", "--python-version", "3.10", "--implementation",
            "cp", *places, *requirements(extra, project),
        )  # fmt: skip
        rows.append(wheel_row(extra, code, report, errors))
    return rows


def wheel_row(extra: str, code: int, report: Path, errors: str) -> Row:
    """The row of one extra.

    Args:
        extra: its name, or empty.
        code: exit code of pip.
        report: what pip wrote, where it resolved.
        errors: what pip printed.
    """
    what = f"cp310 aarch64 wheels: {extra or 'the toolkit itself'}"
    if code:
        wrong = [line for line in errors.splitlines() if line.startswith("ERROR")] or [last_line(errors)]
        return Row(what=what, outcome=NOT if extra in LACKING else BROKEN, detail=LACKING.get(extra, wrong[-1][:200]))
    found = {
        one["metadata"]["name"].lower(): one["metadata"]["version"] for one in json.loads(report.read_text())["install"]
    }
    shown = ", ".join(
        f"{name} {found[name]}" for name in ("numpy", "onnxruntime", "openvino", "ai-edge-litert") if name in found
    )
    newest = {"numpy": NUMPY, "onnxruntime": ONNXRUNTIME}
    moved = [f"{name} is {found[name]} now" for name, wanted in newest.items() if found.get(name, wanted) != wanted]
    if moved:
        return Row(what=what, outcome=BROKEN, detail=f"{'; '.join(moved)}: change the versions in this script")
    return Row(what=what, outcome=HOLDS, detail=f"{len(found)} packages{f', {shown}' if shown else ''}")


def check_style(clock: Clock) -> list[Row]:
    """mypy and ruff, for 3.10, over the runtime and the commands of a board."""
    paths = [ROOT / "runtime" / "tinyusfm_runtime", ROOT / "tinyusfm_edge", ROOT / "export", ROOT / "calibration"]
    code, said, errors = run(clock, sys.executable, "-m", "ruff", "check", "--target-version", "py310", *paths)
    rows = [Row(what="ruff for Python 3.10", outcome=BROKEN if code else HOLDS, detail=last_line(said + errors))]
    modules = [word for name in MODULES for word in ("-m", name)]
    code, said, errors = run(
        clock, sys.executable, "-m", "mypy", "--python-version", "3.10", "-p", "tinyusfm_runtime", *modules
    )
    return [*rows, Row(what="mypy for Python 3.10", outcome=BROKEN if code else HOLDS, detail=last_line(said + errors))]


def onnx_bundle(clock: Clock) -> Path:
    """A bundle for ONNX Runtime, exported once; the one that ships holds integers alone.

    Raises:
        RuntimeError: the export failed.
    """
    place = WORK / "fetal-head.bundle"
    if not place.is_dir():
        words = ("export", "fetal-head", "--target", "onnx", "--int8", "--no-compare", "--out", place)
        code, _, errors = run(clock, sys.executable, "-m", "tinyusfm_edge", *words)
        if code:
            raise RuntimeError(last_line(errors))
    return place


def check_bundle(clock: Clock, python: Path, version: str) -> list[Row]:
    """Bundles under the packages of 3.10, in an environment of its own."""
    what = f"bundles on Python {version}, onnxruntime {ONNXRUNTIME}, numpy {NUMPY}"
    place = WORK / f"env-{version}"
    inside = place / "bin" / "python"
    packages = [f"onnxruntime=={ONNXRUNTIME}", f"numpy=={NUMPY}", "typer>=0.15"]
    if not (place / "ready").is_file():
        shutil.rmtree(place, ignore_errors=True)
        steps: list[tuple[str | Path, ...]] = [
            (python, "-m", "venv", place),
            (inside, "-m", "pip", "install", "--quiet", *packages),
        ]
        for words in steps:
            code, _, errors = run(clock, *words)
            if code:
                return [Row(what=what, outcome=BROKEN, detail=last_line(errors))]
        (place / "ready").touch()
    folders = [ROOT / name for name in ("", "runtime", "export", "calibration")]
    env = {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(map(str, folders)), "HOME": str(WORK),
           "TINYUSFM_EDGE_CACHE": str(WORK / f"cache-{version}")}  # fmt: skip
    try:
        bundle = onnx_bundle(clock)
    except RuntimeError as error:
        return [Row(what=what, outcome=BROKEN, detail=f"no bundle to try: {error}")]
    commands: list[tuple[str, tuple[str | Path, ...]]] = [
        ("doctor", ("doctor",)),
        ("run the bundle that ships", ("run", "fetal-head", "phantom:0-7")),
        ("run", ("run", bundle, "phantom:0-7", "--target", "onnx")),
        ("profile", ("profile", bundle, "--target", "onnx", "--rounds", "2", "--no-cold")),
        ("tune", ("tune", bundle, "--out", WORK / f"tune-{version}", "--fresh", "--rounds", "1", "--threads", "1",
                  "--no-pin", "--runs", "40")),
    ]  # fmt: skip
    rows = []
    for name, words in commands:
        code, said, errors = run(clock, inside, "-m", "tinyusfm_edge", *words, env=env)
        rows.append(Row(what=f"{what}: {name}", outcome=BROKEN if code else HOLDS,
                        detail=last_line(errors if code else found_in(name, said))))  # fmt: skip
    return rows


def found_in(name: str, said: str) -> str:
    """The line of a command's output that counts."""
    labels = {"run": "found", "run the bundle that ships": "found", "tune": "picked", "doctor": "toolkit"}
    wanted = {**labels, "profile": "total"}.get(name, "")
    return next((line for line in said.splitlines() if wanted and line.startswith(wanted)), said)


def check_tensorrt(clock: Clock) -> list[Row]:
    """The tests of the TensorRT engine against the fake."""
    code, said, errors = run(clock, sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TRT_TESTS)
    what = "TensorRT calls against the fake of TensorRT for RTX"
    detail = last_line(said + errors)
    if not code and "passed" not in detail:
        return [Row(what=what, outcome=NOT, detail=detail)]
    return [Row(what=what, outcome=BROKEN if code else HOLDS, detail=detail)]


def gather(clock: Clock, python: Path | None) -> list[Row]:
    """All rows; what the time limit cut off is a row too.

    Args:
        clock: the limit.
        python: a Python 3.10 of this machine, or None.
    """
    here = Path(sys.executable)
    parts: list[tuple[str, Callable[[], list[Row]]]] = [
        ("wheels", lambda: check_wheels(clock, python or here)),
        ("mypy and ruff", lambda: check_style(clock)),
        (
            "the bundle on Python 3.11",
            lambda: check_bundle(clock, here, f"{sys.version_info[0]}.{sys.version_info[1]}"),
        ),
        ("TensorRT", lambda: check_tensorrt(clock)),
    ]
    if python is not None:
        parts.insert(3, ("the bundle on Python 3.10", lambda: check_bundle(clock, python, "3.10")))
    rows = []
    for name, part in parts:
        try:
            rows += part()
        except OutOfTime:
            rows.append(Row(what=name, outcome=LIMIT, detail="give more --minutes"))
    if python is None:
        rows.append(Row(what="execution on Python 3.10", outcome=NOT, detail="no Python 3.10 is installed here"))
    return [*rows, *(Row(what=what, outcome=NOT, detail=why) for what, why in NOT_RUN)]


def table(rows: Sequence[Row]) -> str:
    """The rows as lines."""
    wide = max(len(row.what) for row in rows)
    return "\n".join(f"{row.outcome:<12}{row.what:<{wide}}  {row.detail}".rstrip() for row in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table; the exit code says whether everything that was checked holds."""
    parser = argparse.ArgumentParser(description="what can be checked of a JetPack board without one")
    parser.add_argument("--minutes", type=float, default=20.0, help="time limit of the whole run")
    parser.add_argument("--json", type=Path, default=None, help="also write the rows there")
    options = parser.parse_args(arguments)
    WORK.mkdir(parents=True, exist_ok=True)
    rows = gather(Clock(seconds=60.0 * options.minutes), python_3_10())
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps([vars(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    broken = [row for row in rows if row.outcome in (BROKEN, LIMIT)]
    print(f"\n{len(broken)} of {len(rows)} rows do not hold" if broken else "\nwhat can be checked here holds")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
