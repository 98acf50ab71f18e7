"""``import tinyusfm_runtime`` is light: numpy and the standard library, and nothing of itself before it is used."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import tinyusfm_runtime
from tests.conftest import child_environment

ALLOWED = {"tinyusfm_runtime", "numpy"} | set(sys.stdlib_module_names)
"""Every top-level package that the runtime may load."""
SOURCES = sorted(Path(tinyusfm_runtime.__file__).parent.rglob("*.py"))

USE_EVERYTHING = """
import numpy as np
import tinyusfm_runtime as t
for name in t.__all__: getattr(t, name)
from tinyusfm_runtime import plugins
from tinyusfm_runtime.numerics import preprocess
from tinyusfm_runtime.spec import PostProcess, PreprocessSpec
for kind in plugins.KINDS: plugins.names(kind)
phantom = t.make_phantom(0, height=96, width=128)
tensor, placement = preprocess.preprocess(phantom.frame, PreprocessSpec(height=64, width=64))
from tinyusfm_runtime.numerics.postprocess import answer
spec = t.ModelSpec(name='x', task=t.Task.SEGMENT, labels=('a',), postprocess=PostProcess.ELLIPSE_HC)
spec = t.ModelSpec.from_json({**spec.to_json(), 'preprocess': {'height': 64, 'width': 64}})
answer({'logits': (tensor - 90.0).astype(np.float32)}, spec, placement)
"""


def loaded_after(code: str) -> set[str]:
    """Modules in a fresh interpreter after some code."""
    program = f"import json, sys\nexec({code!r})\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=child_environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout))


def foreign(code: str) -> set[str]:
    """Top-level packages beyond the allow-list that some code loads, beside what an interpreter starts with."""
    tops = {name.split(".")[0] for name in loaded_after(code) - loaded_after("pass")}
    # numpy.random's compiled parts register these two
    return {name for name in tops - ALLOWED if name != "cython_runtime" and not name.startswith("_cython_")}


def test_importing_loads_numpy_and_the_standard_library_at_most() -> None:
    assert foreign("import tinyusfm_runtime") == set()


def test_importing_loads_none_of_its_own_modules() -> None:
    loaded = loaded_after("import tinyusfm_runtime")
    assert [name for name in loaded if name.startswith("tinyusfm_runtime.")] == ["tinyusfm_runtime.face"]


def test_using_everything_but_an_engine_loads_nothing_else() -> None:
    assert foreign(USE_EVERYTHING) == set()


def test_a_heavier_import_would_be_seen() -> None:
    """The control."""
    pytest.importorskip("pytest")
    assert "pytest" in foreign("import tinyusfm_runtime, pytest")


def test_the_flat_list_is_sorted_and_every_name_is_there() -> None:
    names = tinyusfm_runtime.__all__
    assert len(set(names)) == len(names)
    assert names == sorted(names, key=lambda name: (name[0].islower(), name))
    for name in names:
        assert getattr(tinyusfm_runtime, name) is not None
        assert name in dir(tinyusfm_runtime)
    with pytest.raises(AttributeError, match="nothing_here"):
        tinyusfm_runtime.nothing_here  # noqa: B018


def test_the_lazy_table_and_the_static_imports_say_the_same() -> None:
    tree = ast.parse(Path(tinyusfm_runtime.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    static = {
        alias.name: (node.module or "").removeprefix("tinyusfm_runtime.")
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    homes = tinyusfm_runtime._HOMES
    assert static == {name: home for home, names in homes.items() for name in names}
    assert sorted(static) == sorted(tinyusfm_runtime.__all__)


def test_no_name_hides_a_module() -> None:
    modules = {path.stem for path in SOURCES}
    assert not modules & set(tinyusfm_runtime.__all__)


NEWER = {"StrEnum", "tomllib", "UTC", "Self", "ExceptionGroup", "batched", "override", "file_digest", "chdir"}
"""Additions to the standard library after Python 3.10 that are easily used by mistake."""


def newer_names(source: str) -> set[str]:
    """Names of a source that Python 3.10 lacks; its grammar must be 3.10's too."""
    tree = ast.parse(source, feature_version=(3, 10))
    used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    used |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
    return used & NEWER


def test_the_runtime_is_python_3_10() -> None:
    found = {path.name: newer_names(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert len(found) > 50 and not {name: names for name, names in found.items() if names}


def test_newer_names_and_grammar_are_caught() -> None:
    assert newer_names("from enum import StrEnum\nimport tomllib as t\nt.x") == {"StrEnum"}
    with pytest.raises(SyntaxError):
        newer_names("try:\n    pass\nexcept* ValueError:\n    pass\n")
