"""A folder is a registry: names come without imports, aliases resolve, a broken plug-in is listed with its reason."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import child_environment
from tinyusfm_runtime import plugins
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.plugins import KINDS, Availability
from tinyusfm_runtime.sources import open_source

Distribute = Callable[..., None]


@pytest.fixture
def distribute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Distribute:
    """Installs a foreign distribution with one module and its entry points."""

    def install(source: str, **entry_points: str) -> None:
        (tmp_path / "foreign_plugin.py").write_text(source, encoding="utf-8")
        info = tmp_path / "foreign_plugin-1.0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: foreign-plugin\nVersion: 1.0\n", encoding="utf-8")
        lines = []
        for name, target in entry_points.items():
            kind, _, label = name.partition("__")
            lines += [f"[tinyusfm.{kind}]", f"{label} = {target}", ""]
        (info / "entry_points.txt").write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "foreign_plugin", raising=False)

    return install


WORKS = """
from tinyusfm_runtime.plugins import Availability
def available(): return Availability(usable=True, reason="foreign 1.0", extra=None)
class Engine: ...
"""


def test_names_are_the_files_of_the_folder() -> None:
    assert {"ort", "ov"} <= set(plugins.names("engines"))
    for kind in ("engines", "sources", "sinks"):
        folder = Path(plugins.__file__).parent / kind
        files = {path.stem for path in folder.glob("[!_]*.py")} | {
            path.parent.name for path in folder.glob("*/__init__.py")
        }
        assert plugins.names(kind)[: len(files)] == sorted(files)


def test_names_import_nothing() -> None:
    code = (
        "import sys; from tinyusfm_runtime import plugins\n"
        "for kind in plugins.KINDS: plugins.names(kind)\n"
        "print([m for m in sys.modules if m.startswith(('tinyusfm_export', 'tinyusfm_runtime.')) "
        "and m not in ('tinyusfm_runtime.plugins', 'tinyusfm_runtime.errors', 'tinyusfm_runtime.face')])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=child_environment()
    )
    assert done.stdout.strip() == "[]"


def test_targets_are_empty_where_the_export_package_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if "export" in name else real(name))
    assert plugins.names("targets") == []
    with pytest.raises(InputError, match="none is installed"):
        plugins.canonical("targets", "onnx")


@pytest.mark.parametrize(
    ("typed", "stem"),
    [("onnx", "ort"), ("onnxruntime", "ort"), ("ort", "ort"), ("openvino", "ov"), ("OpenVINO", "ov"), (" ov ", "ov")],
)
def test_aliases_lead_to_the_file(typed: str, stem: str) -> None:
    assert plugins.canonical("engines", typed) == stem
    assert plugins.load("engines", typed).__name__ == f"tinyusfm_runtime.engines.{stem}"


def test_public_names_are_what_people_type() -> None:
    for stem, public in plugins.PUBLIC_NAMES.items():
        assert plugins.stem(public) == stem and plugins.public_name(stem) == public
    assert plugins.public_name("folder") == "folder"


@pytest.mark.parametrize("typed", ["", "onnxx", "../ort", "__init__", "tinyusfm_runtime", "engines.ort", "x" * 500])
def test_an_unknown_name_lists_what_there_is(typed: str) -> None:
    with pytest.raises(InputError) as caught:
        plugins.load("engines", typed)
    assert "openvino" in str(caught.value) and "onnx" in str(caught.value)


def test_an_unknown_kind_lists_the_kinds() -> None:
    for call in (plugins.names, lambda kind: plugins.load(kind, "x"), lambda kind: plugins.available(kind, "x")):
        with pytest.raises(InputError, match="engines"):
            call("motors")


@pytest.mark.parametrize("kind", ["engines", "sources", "sinks"])
def test_every_plug_in_probes_without_raising(kind: str) -> None:
    existing = plugins.names(kind)
    assert len(existing) >= 3
    for name in existing:
        answer = plugins.load(kind, name).available()
        assert isinstance(answer, Availability) and answer.reason
        assert plugins.available(kind, name) == answer


@pytest.mark.parametrize("kind", KINDS)
def test_another_distribution_adds_a_plug_in(distribute: Distribute, kind: str) -> None:
    distribute(WORKS, **{f"{kind}__foreign": "foreign_plugin"})
    assert plugins.names(kind)[-1] == "foreign"
    assert plugins.canonical(kind, "Foreign") == "foreign"
    assert plugins.load(kind, "foreign").__name__ == "foreign_plugin"
    assert plugins.available(kind, "foreign") == Availability(usable=True, reason="foreign 1.0", extra=None)


def test_a_built_in_name_wins(distribute: Distribute) -> None:
    distribute(WORKS, engines__ort="foreign_plugin")
    assert plugins.names("engines").count("ort") == 1
    assert plugins.load("engines", "ort").__name__ == "tinyusfm_runtime.engines.ort"


def test_other_distributions_are_looked_for_once_and_not_for_every_image(
    distribute: Distribute, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import importlib.metadata

    real, scans = importlib.metadata.entry_points, list[str]()

    def counted(**wanted: str) -> object:
        scans.append(wanted["group"])
        return real(**wanted)

    monkeypatch.setattr(importlib.metadata, "entry_points", counted)
    monkeypatch.syspath_prepend(str(tmp_path / "fresh"))
    for number in range(50):
        open_source(f"phantom:{number}")
    assert scans == ["tinyusfm.sources"]
    distribute(WORKS, sources__foreign="foreign_plugin")
    assert "foreign" in plugins.names("sources"), "the control: another path is searched again"


@pytest.mark.parametrize(
    ("source", "target", "words"),
    [
        ("raise RuntimeError('two\\nlines')", "foreign_plugin", "two lines"),
        ("import surely_not_installed", "foreign_plugin", "surely_not_installed"),
        ("x = 1", "foreign_plugin", "available"),
        ("class Engine: ...", "foreign_plugin:Engine", "module"),
        ("def available(): raise RuntimeError('broken hook')", "foreign_plugin", "broken hook"),
        ("def available(): return True", "foreign_plugin", "bool"),
    ],
)
def test_a_broken_plug_in_is_listed_with_its_reason(
    distribute: Distribute, source: str, target: str, words: str
) -> None:
    distribute(source, engines__foreign=target)
    assert "foreign" in plugins.names("engines")
    answer = plugins.available("engines", "foreign")
    assert not answer.usable and words in answer.reason and "\n" not in answer.reason
    assert plugins.available("engines", "ort").reason, "the others are none the worse"
