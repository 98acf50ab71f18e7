"""Model files that attack the C runtime: refused before a library reads a byte, by the lists that Python has."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.capi.binding import Failed, Library, Session
from tests.capi.conftest import SOURCE, engine_folders
from tests.conftest import make_parts, tiny_onnx
from tinyusfm_runtime.graphs import ir_operators, onnx_operators


@pytest.mark.parametrize(("name", "operators"), [("onnx", onnx_operators.OPERATORS), ("ir", ir_operators.OPERATORS)])
def test_both_runtimes_have_one_list(name: str, operators: dict[str, Any]) -> None:
    text = (SOURCE / "engines" / "allowed.c").read_text(encoding="utf-8")
    body = text.split(f"{name}_kinds =")[1].split(";")[0]
    assert set(" ".join(re.findall(r'"([^"]*)"', body)).split()) == set(operators)


def hostile(name: str) -> bytes:
    """An ONNX file with one thing in it that ours never have."""
    onnx = pytest.importorskip("onnx", reason="onnx is not installed: pip install 'tinyusfm-edge[export]'")
    model = onnx.load_from_string(tiny_onnx())
    graph, helper = model.graph, onnx.helper
    if name == "external data":
        tensor = graph.initializer.add()
        tensor.name, tensor.data_type, tensor.data_location = "x", onnx.TensorProto.FLOAT, onnx.TensorProto.EXTERNAL
        tensor.dims.append(1)
        entry = tensor.external_data.add()
        entry.key, entry.value = "location", "*/_ORT_MEM_ADDR_/*"
    elif name == "loop":
        inside = helper.make_graph([], "body", [], [])
        graph.node.append(helper.make_node("Loop", [], [], body=inside))
    elif name == "graph in an attribute":
        graph.node[0].attribute.append(helper.make_attribute("then_branch", helper.make_graph([], "b", [], [])))
    elif name == "other domain":
        graph.node.append(helper.make_node("Abs", ["image"], ["y"], domain="com.microsoft"))
    elif name == "function":
        model.functions.add().name = "f"
    elif name == "unknown kind":
        graph.node.append(helper.make_node("EPContext", [], ["y"]))
    data: bytes = model.SerializeToString()
    return data[:-3] if name == "cut off" else data


ATTACKS = ["external data", "loop", "graph in an attribute", "other domain", "function", "unknown kind", "cut off"]


@pytest.mark.parametrize("name", ATTACKS)
def test_a_hostile_onnx_file_is_refused(name: str, library: Library, tmp_path: Path) -> None:
    folder = engine_folders().get("ort")
    if folder is None:
        pytest.skip("ONNX Runtime is not installed")
    bundle = make_parts({"ort": {"model.onnx": hostile(name)}}).publish(tmp_path / "a.bundle")
    with pytest.raises(Failed, match=r"ENGINE.*the model holds .*do not use it"):
        Session(library, bundle, engine_folder=str(folder))


XML = {
    "onnx bytes": (None, "is not XML"),
    "entities": (lambda text: text.replace("<net", '<!DOCTYPE net [<!ENTITY a "b">]><net', 1), "document type"),
    "a loop": (lambda text: text.replace('type="Result"', 'type="Loop"', 1), "another kind"),
    "a body": (lambda text: text.replace("</net>", "<body></body></net>"), "inside a layer"),
    "two kinds": (lambda text: text.replace(' type="Result"', ' type="Result" type="Abs"', 1), "two"),
    "no kind": (lambda text: text.replace(' type="Result"', "", 1), "without a kind"),
}


@pytest.mark.parametrize("name", XML)
def test_a_hostile_ir_file_is_refused(
    name: str, library: Library, tmp_path: Path, tiny_files: Callable[[str], dict[str, bytes]]
) -> None:
    folder = engine_folders().get("ov")
    if folder is None:
        pytest.skip("OpenVINO is not installed")
    files = dict(tiny_files("ov"))
    change, words = XML[name]
    files["model.xml"] = tiny_onnx() if change is None else change(files["model.xml"].decode()).encode()
    bundle = make_parts({"ov": files}).publish(tmp_path / "a.bundle")
    with pytest.raises(Failed, match=f"ENGINE.*{words}.*do not use it"):
        Session(library, bundle, engine_folder=str(folder))


def test_the_good_models_pass(library: Library, tmp_path: Path, tiny_files: Callable[[str], dict[str, bytes]]) -> None:
    for name, folder in engine_folders().items():
        bundle = make_parts({name: tiny_files(name)}).publish(tmp_path / f"{name}.bundle")
        try:
            Session(library, bundle, engine_folder=str(folder)).close()
        except Failed as error:  # its golden answers are not those of this model: it was read and run
            assert "does not answer as the artefact should" in str(error)
