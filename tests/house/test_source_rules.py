"""What no file may hold: calls that run strangers' code, placeholders, machine paths and registry hosts."""

from __future__ import annotations

import ast
import os
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("tinyusfm_edge", "export", "runtime", "calibration", "benchmarks", "scripts")
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".c", ".h", ".json", ".cfg", ".sh", ""}
SKIPPED = {".git", ".venv", "build", "dist", "demo-out", "runs", "__pycache__"}

# written in pieces, so that this file does not hold what it forbids
FORBIDDEN_TEXT = re.compile(
    "|".join(
        [
            r"(?<![\w.])/" + r"work/",
            r"(?<![\w.])/" + r"root/",
            r"(?<![\w.])/" + r"home/\w",
            "pypi" + r"\.org",
            "python" + r"hosted\.org",
            "npm" + r"js\.(org|com)",
            "deb" + r"ian\.org",
            "download" + r"\.pytorch\.org",
        ]
    )
)
PLACEHOLDER = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME|XX" + r"X)\b")


def texts() -> list[Path]:
    """Every text file of the project that a person or a machine reads."""
    found = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part.startswith(".") and part not in (".ci", ".gitignore") for part in parts)
        skipped = hidden or SKIPPED & set(parts) or any(part.endswith((".egg-info", ".bundle")) for part in parts)
        if not skipped and path.is_file() and path.suffix in TEXT_SUFFIXES:
            found.append(path)
    return found


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a name and its attributes, as it is written; of anything else the last attribute alone."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


PLUGIN_CLASSES = ("Engine", "Target")
"""Every engine's class and every target's class."""
LOUD = ("openvino", "onnxruntime")
"""Libraries that report to their makers unless they are kept from it."""
QUIET_PARTS = ("onnxruntime.quantization",)
"""Parts that are imported after the library itself."""


def loud_imports(source: str, loud: tuple[str, ...] = LOUD) -> list[str]:
    """Lines that import a library directly which reports home; ``import_openvino`` and its twin do not."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [f"{node.lineno}" for alias in node.names if alias.name.split(".")[0] in loud]
        elif isinstance(node, ast.ImportFrom) and node.module in QUIET_PARTS:
            continue
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in loud:
            found.append(f"{node.lineno}")
        elif isinstance(node, ast.Call) and dotted(node.func).endswith("import_module"):
            found += [f"{node.lineno}" for value in node.args[:1] if ast.unparse(value).strip("'") in loud]
    return found


RISKY_OPTIONS = ("weights_only", "allow_pickle", "shell")


def dangerous_calls(source: str) -> list[str]:
    """Names calls that could run code hidden in data, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            found += [f"{node.lineno}: import {n}" for n in names if n.split(".")[0] in ("torchvision", "timm")]
            found += [f"{node.lineno}: from pickle" for n in names[-1:] if n == "pickle"]
        if not isinstance(node, ast.Call):
            continue
        name = dotted(node.func)
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords if k.arg in RISKY_OPTIONS}
        if name == "locals":
            found.append(f"{node.lineno}: locals() as a bag of arguments that no type checker sees")
        if name in ("eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler"):
            found.append(f"{node.lineno}: {name}()")
        if keywords.get("weights_only", "True") != "True" or (name == "torch.load" and "weights_only" not in keywords):
            found.append(f"{node.lineno}: {name} without weights_only=True")
        if keywords.get("allow_pickle", "False") != "False":
            found.append(f"{node.lineno}: {name} with allow_pickle")
        if keywords.get("shell", "False") != "False":
            found.append(f"{node.lineno}: {name} with a shell")
    return found


MAX_FIRST_LINE = 80


def long_first_lines(source: str) -> list[str]:
    """Docstrings whose first line is too long for a list, a tool tip or a help page."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            length = len((ast.get_docstring(node) or "").partition("\n")[0])
            if length > MAX_FIRST_LINE:
                found.append(f"{getattr(node, 'name', 'module')}: first line of {length} characters")
    return found


def source_faults(source: str) -> list[str]:
    """What one source file may not hold, and the docstring that it must open with."""
    found = [*dangerous_calls(source), *PLACEHOLDER.findall(source)]
    opens = source.strip() == "" or ast.get_docstring(ast.parse(source))
    return found if opens else [*found, "does not open with what it does"]


def test_sources_run_no_hidden_code_and_say_what_they_do() -> None:
    found = [
        f"{path.relative_to(ROOT)}: {fault}"
        for path in SOURCES
        for fault in source_faults(path.read_text(encoding="utf-8"))
    ]
    assert len(SOURCES) > 100 and not found


def test_docstrings_open_with_a_short_line() -> None:
    roots = ("tinyusfm_edge", "export/tinyusfm_export", "calibration/tinyusfm_calibration", "runtime/tinyusfm_runtime")
    found = []
    for path in sorted(path for root in roots for path in (ROOT / root).rglob("*.py")):
        faults = long_first_lines(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(ROOT)}: {fault}" for fault in faults]
    assert not found, "the first line says what it is in at most 80 characters; the rest is a second paragraph"


def test_a_long_first_line_is_caught() -> None:
    long = "x" * (MAX_FIRST_LINE + 1)
    assert len(long_first_lines(f'"""{long}"""\nclass A:\n    """Short."""\n    def f(): "{long}"')) == 2
    assert not long_first_lines(f'"""{long[1:]}\n\n{long} {long}"""')


def shared_names(sources: list[tuple[str, str]]) -> dict[str, list[str]]:
    """Public classes of one name, with their files; a plug-in's own class has the name that its contract gives."""
    places: dict[str, list[str]] = {}
    for name, source in sources:
        for node in ast.parse(source).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_") and node.name not in PLUGIN_CLASSES:
                places.setdefault(node.name, []).append(name)
    return {name: files for name, files in places.items() if len(files) > 1}


def test_no_two_classes_share_a_name() -> None:
    files = [path for path in SOURCES if path.relative_to(ROOT).parts[0] not in ("benchmarks", "scripts")]
    assert shared_names([(path.name, path.read_text(encoding="utf-8")) for path in files]) == {}


def test_a_shared_name_is_caught() -> None:
    assert shared_names([("a", "class Pool: ..."), ("b", "class Pool: ..."), ("c", "class Engine: ...")]) == {
        "Pool": ["a", "b"]
    }


def test_a_silent_file_and_a_placeholder_are_caught() -> None:
    assert source_faults("x = 1") == ["does not open with what it does"]
    assert source_faults('"""Says it."""\nx = 1  # ' + "TO" + "DO later") == ["TO" + "DO"]


def test_no_text_names_a_machine_path_or_a_registry() -> None:
    found = {
        str(path.relative_to(ROOT)): match.group()
        for path in texts()
        if (match := FORBIDDEN_TEXT.search(path.read_text(encoding="utf-8", errors="replace")))
    }
    assert not found


def test_comments_are_ascii() -> None:
    found = []
    for path in [*SOURCES, *sorted((ROOT / "tests").rglob("*.py"))]:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            comment = line.partition("#")[2]
            if not comment.isascii():
                found.append(f"{path.relative_to(ROOT)}:{number}")
    assert not found


def test_loud_libraries_are_imported_in_one_place() -> None:
    loud = {}
    engines = ROOT / "runtime" / "tinyusfm_runtime" / "engines"
    tests = sorted((ROOT / "tests").rglob("*.py"))
    for path in [*SOURCES, *tests]:
        # what the tests start inherits the environment that keeps ONNX Runtime quiet, but not sys.modules
        lines = loud_imports(path.read_text(encoding="utf-8"), LOUD[:1] if path in tests else LOUD)
        if lines and path not in (engines / "ov.py", engines / "ort.py"):
            loud[str(path.relative_to(ROOT))] = lines
    assert not loud, "call import_openvino or import_onnxruntime of tinyusfm_runtime.engines, which leave telemetry out"


def test_the_tests_import_without_telemetry() -> None:
    assert sys.modules.get("openvino_telemetry", "loud") is None, "tests/conftest.py shuts it out"
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "1"


def test_a_loud_import_is_caught() -> None:
    assert loud_imports("def f():\n    import openvino as ov") == ["2"]
    assert loud_imports("from openvino.runtime import Core") == ["1"]
    assert loud_imports("ov = importlib.import_module('openvino')") == ["1"]
    assert loud_imports("import onnxruntime as ort") == ["1"]
    assert not loud_imports("from onnxruntime.quantization import quantize_static")
    assert not loud_imports("from tinyusfm_runtime.engines.ov import import_openvino")


@pytest.mark.parametrize(
    "source",
    [
        "from pickle import loads",
        "pickle.load(file)",
        "from timm.models import create_model",
        "eval(text)",
        "run(SimpleNamespace(**locals()))",
        "torch.load(path)",
        "torch.load(path, weights_only=" + "False)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=" + "True)",
    ],
)
def test_a_dangerous_call_is_caught(source: str) -> None:
    assert dangerous_calls(source)


@pytest.mark.parametrize(
    "source", ["torch.load(path, weights_only=True)", "np.load(path, allow_pickle=False)", "model.eval()"]
)
def test_a_harmless_call_passes(source: str) -> None:
    assert not dangerous_calls(source)


def test_a_machine_path_is_caught() -> None:
    assert FORBIDDEN_TEXT.search("see " + "/wor" + "k/main/file")
    assert not FORBIDDEN_TEXT.search("a frame/work/flow and ../shared/data")
