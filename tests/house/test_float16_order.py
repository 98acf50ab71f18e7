"""No array of float16 is ever put in order: calls that sort name their argument's width, in tests too."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest

from tinyusfm_edge.cli.start.doctor import examine
from tinyusfm_runtime.numerics import order
from tinyusfm_runtime.numerics.order import sorts_float16, wide

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tinyusfm_edge", "export", "runtime", "calibration", "benchmarks", "scripts", "tests")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
ORDERING = {
    **dict.fromkeys(("sort", "argsort", "partition", "argpartition", "msort", "sort_complex", "lexsort"), 1),
    **dict.fromkeys(("unique", "unique_all", "unique_counts", "unique_inverse", "unique_values"), 1),
    **dict.fromkeys(("median", "percentile", "quantile", "nanmedian", "nanpercentile", "nanquantile"), 1),
    **dict.fromkeys(("histogram", "histogram_bin_edges", "histogramdd"), 1),
    **dict.fromkeys(("union1d", "intersect1d", "setdiff1d", "setxor1d", "isin", "in1d"), 2),
}
"""Functions of NumPy that sort -> how many of their arguments are arrays."""
NARROW = {"float16", "half", "e", "f2"}


def visibly_wide(node: ast.expr) -> bool:
    """Whether an argument cannot be float16, by what is written at the call itself."""
    if isinstance(node, ast.Constant):
        return True
    if isinstance(node, ast.List | ast.Tuple):
        return all(visibly_wide(item) for item in node.elts)
    if isinstance(node, ast.UnaryOp):
        return visibly_wide(node.operand)
    if not isinstance(node, ast.Call):
        return False
    name = ast.unparse(node.func)
    if name.rpartition(".")[2] in ("wide", "arange") or name in ("np.abs", "np.flatnonzero"):
        return name != "np.abs" or visibly_wide(node.args[0])
    kinds = node.args[:1] if name.endswith(".astype") else node.args[1:2] if name in ("np.asarray", "np.array") else []
    kinds += [keyword.value for keyword in node.keywords if keyword.arg == "dtype"]
    return bool(kinds) and not any(word in NARROW for kind in kinds for word in _words(kind))


def narrow_orders(source: str) -> list[str]:
    """Lines that order an array which could be float16, by function, method, import or alias."""
    tree = ast.parse(source)
    found, called = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "numpy":
            found += [f"{node.lineno}: import {a.name}" for a in node.names if a.name in ORDERING]
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name = node.func.attr
        if _is_numpy(node.func) and name in ORDERING:
            called.add(node.func)
            if not node.args or not all(visibly_wide(argument) for argument in node.args[: ORDERING[name]]):
                found.append(f"{node.lineno}: np.{name}")
        elif not _is_numpy(node.func) and _orders_itself(node):
            found.append(f"{node.lineno}: .{name}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_numpy(node) and node.attr in ORDERING and node not in called:
            found.append(f"{node.lineno}: np.{node.attr} without a call")
    return found


def _words(node: ast.expr) -> list[str]:
    return ast.unparse(node).replace("'", "").replace('"', "").split(".")


def _is_numpy(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("np", "numpy")


def _orders_itself(node: ast.Call) -> bool:
    """A method of an array that sorts it: not ``str.partition``, not ``list.sort(key=...)``."""
    assert isinstance(node.func, ast.Attribute)
    name, keywords = node.func.attr, {keyword.arg for keyword in node.keywords}
    if name not in ("sort", "partition", "argsort", "argpartition") or visibly_wide(node.func.value):
        return False
    if name == "sort":
        return "key" not in keywords
    if name == "partition":
        return not (
            node.args and isinstance(node.args[0], ast.Constant) and isinstance(node.args[0].value, str | bytes)
        )
    return True


TORCH_ONLY = {
    "tinyusfm_edge/training/adapt/objective.py",
    "tinyusfm_edge/training/pretrain/adaptive.py",
    "tinyusfm_edge/training/pretrain/mae.py",
    "tinyusfm_edge/training/pretrain/run.py",
    "tests/training/test_proxy.py",
}
"""Files whose methods are those of torch tensors, which torch sorts itself."""


def file_faults(path: Path) -> list[str]:
    """Orderings in one file that float16 could reach, each behind the file's path."""
    relative = path.relative_to(ROOT).as_posix()
    found = narrow_orders(path.read_text(encoding="utf-8"))
    if relative in TORCH_ONLY:
        found = [line for line in found if ": ." not in line]
    if relative == "runtime/tinyusfm_runtime/numerics/order.py":
        found = [line for line in found if "np.sort without a call" not in line]  # it tries NumPy's own sort
    return [f"{relative}: {line}" for line in found]


def test_nothing_orders_an_array_that_could_be_float16() -> None:
    found = [fault for path in SOURCES for fault in file_faults(path)]
    assert len(SOURCES) > 300 and not found, "put wide() of tinyusfm_runtime.numerics.order around the argument"


@pytest.mark.parametrize(
    "line",
    [
        "np.sort(x)",
        "np.unique(table[indices], return_inverse=True)",
        "np.percentile(samples, 95)",
        "np.median(x.astype(np.float16))",
        "np.partition(np.asarray(x, 'e'), 3)",
        "numpy.nanquantile(x, 0.5)",
        "np.isin(wide(labels), known)",
        "np.lexsort((wide(ties), cost))",
        "np.quantile(a=x, q=0.5)",
        "x.sort()",
        "x.argsort()",
        "x.partition(7)",
        "from numpy import unique",
        "middle = np.median",
        "list(map(np.unique, masks))",
    ],
)
def test_a_narrow_order_is_caught(line: str) -> None:
    assert narrow_orders(line)


@pytest.mark.parametrize(
    "line",
    [
        "np.sort(wide(x))",
        "np.percentile(x.astype(np.float64), 95)",
        "np.unique(np.asarray(names, dtype=np.str_))",
        "np.isin(wide(labels), wide(known))",
        "np.lexsort((np.arange(4), wide(cost)))",
        "rows.sort(key=lambda row: row.cost)",
        "text.partition(':')",
        "sorted(x)",
        "np.median([1.0, 2.0])",
    ],
)
def test_a_wide_order_passes(line: str) -> None:
    assert not narrow_orders(line)


def test_wide_keeps_every_number_and_every_other_type() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    assert wide(every).dtype == np.float32
    np.testing.assert_array_equal(
        wide(every).astype(np.float16).view(np.uint16)[every == every], np.arange(1 << 16)[every == every]
    )
    for kind in (np.float32, np.float64, np.uint8, np.int64, np.bool_):
        values = np.zeros(3, kind)
        assert wide(values) is values


def test_doctor_names_a_numpy_that_sorts_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    def faulty(values: np.ndarray) -> np.ndarray:
        """What the faulty kernel does: entries are lost and others come twice."""
        ordered = np.sort(wide(values)).astype(values.dtype)
        return ordered if values.dtype != np.float16 else np.roll(ordered, 1)

    assert not sorts_float16(faulty)
    assert sorts_float16(lambda values: np.sort(wide(values)).astype(values.dtype)), "the control: a right sort passes"
    monkeypatch.setattr(order, "sorts_float16", lambda: False)
    report = examine()
    assert report["numerics"] == {"numpy": np.__version__, "sorts_float16": False, "reason": order.FAULT}
    monkeypatch.setattr(order, "sorts_float16", lambda: True)
    assert "reason" not in examine()["numerics"]
