"""Dependencies: ranges stand in pyproject once, tested versions in constraints.txt, and some things never come in."""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser, which pytest brings along on 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
UNWANTED = {"torchvision", "timm", "lightning", "torchmetrics", "opencv-python", "opencv-contrib-python"}
"""torchvision does not import beside the CPU torch and breaks what looks for it; the rest bring it or clash."""
BENCH_ONLY = {"nncf"}
UNTESTED_EXTRAS = {"tensorrt", "coreml"}
"""Their libraries run on other machines than those the constraints were made on."""


def project() -> dict[str, object]:
    """The [project] table."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert isinstance(table, dict)
    return table


def extras() -> dict[str, list[Requirement]]:
    """Every extra with its own requirements, the base under the empty name."""
    table = project()
    found = {name: [Requirement(line) for line in lines] for name, lines in table["optional-dependencies"].items()}
    found[""] = [Requirement(line) for line in table["dependencies"]]
    return found


def expand(name: str, table: dict[str, list[Requirement]]) -> dict[str, Requirement]:
    """Distribution -> requirement of an extra with all it includes, the base too."""
    found: dict[str, Requirement] = {}
    for requirement in table[name] + (table[""] if name else []):
        if requirement.name == "tinyusfm-edge":
            for extra in requirement.extras:
                found |= expand(extra, table)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def constraints() -> dict[str, Requirement]:
    """Distribution -> pin."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(pin.name): pin for pin in pins}


def test_base_is_numpy_and_typer() -> None:
    assert set(expand("", extras())) == {"numpy", "typer"}


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_an_engine_extra_brings_no_workshop(engine: str) -> None:
    assert set(expand(engine, extras())) == {"numpy", "typer", engine}


def test_torch_is_pinned_to_one_version_everywhere() -> None:
    spec = importlib.util.spec_from_file_location("environment", ROOT / "scripts" / "environment.py")
    assert spec is not None and spec.loader is not None
    environment = ModuleType("environment")
    environment.__file__ = str(ROOT / "scripts" / "environment.py")
    spec.loader.exec_module(environment)
    assert str(extras()["torch"][0].specifier) == f"=={environment.TORCH}"
    assert str(constraints()["torch"].specifier) == f"=={environment.TORCH}"


def test_constraints_pin_every_requirement_inside_its_range() -> None:
    pins, table = constraints(), extras()
    assert all(re.fullmatch(r"==[^*+]+", str(pin.specifier)) for pin in pins.values())
    # optional accelerators that no machine of ours could install are the exception
    for name, requirement in {
        k: v for e in table if e not in ("tensorrt", "coreml") for k, v in expand(e, table).items()
    }.items():
        assert name in pins, f"{name} is not in constraints.txt"
        version = str(pins[name].specifier)[2:]
        assert requirement.specifier.contains(version), f"{requirement} does not admit {version}"


def test_unwanted_libraries_are_asked_for_by_nobody() -> None:
    table = extras()
    asked = set(constraints()).union(*(expand(name, table) for name in table))
    assert not asked & {canonicalize_name(name) for name in UNWANTED}
    users = [name for name in table if BENCH_ONLY & set(expand(name, table))]
    assert users == ["bench"], "NNCF has telemetry and is a rival in the benchmark, not a dependency"


def pulled(root: str, wanted: str) -> set[str]:
    """Every installed distribution that a root with one extra leads to."""
    found: set[str] = set()
    queue = [(root, wanted)]
    seen = set()
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        for requirement in map(Requirement, lines):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                queue += [(canonicalize_name(requirement.name), more) for more in ("", *requirement.extras)]
    return found


def test_nothing_that_is_installed_for_us_brings_torchvision_or_timm() -> None:
    names = {requirement for extra in extras() for requirement in expand(extra, extras())}
    brought = set().union(*(pulled(name, "") for name in names))
    assert {"numpy", "pydantic"} <= brought, "the walk sees what requirements require"
    assert not brought & {"torchvision", "timm"}


def test_only_one_opencv_is_installed() -> None:
    names = {canonicalize_name(d.metadata["Name"] or "") for d in importlib.metadata.distributions()}
    assert len({name for name in names if name.startswith("opencv-")}) <= 1


def named_extras(source: str) -> set[str]:
    """Extras that a file's messages tell people to install."""
    found = set(re.findall(r"tinyusfm-edge\[([a-z,-]+)\]", source))
    found |= set(re.findall(r"pip_line\([\"']([a-z,-]+)[\"']\)", source))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("MissingExtra", "Availability"):
            values = [keyword.value for keyword in node.keywords if keyword.arg == "extra"]
            values += node.args[2:3]
            found |= {v.value for v in values if isinstance(v, ast.Constant) and isinstance(v.value, str)}
    return {extra for group in found for extra in group.split(",")}


def test_every_extra_that_a_message_names_exists() -> None:
    table = extras()
    unknown = {}
    for folder in ("tinyusfm_edge", "export", "runtime", "calibration"):
        for path in (ROOT / folder).rglob("*.py"):
            missing = named_extras(path.read_text(encoding="utf-8")) - set(table)
            if missing:
                unknown[str(path.relative_to(ROOT))] = missing
    assert not unknown


def test_an_extra_that_does_not_exist_is_caught() -> None:
    assert named_extras("raise MissingExtra('reading', 'lib', 'nothing')") == {"nothing"}
    assert named_extras("Availability(usable=False, reason='x', extra='no-such')") == {"no-such"}
    assert named_extras("text = \"pip install 'tinyusfm-edge[a,b]'\"") == {"a", "b"}
    assert named_extras("text = pip_line('a,b')") == {"a", "b"}
