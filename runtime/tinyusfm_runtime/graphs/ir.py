"""OpenVINO models (IR): what may stand in ``model.xml``.

Layer by layer, and no more.

XML only where XML is due: a document type, an entity, another encoding, an element or an attribute that is not known is
refused, and so are layers with bodies (control flow), free sides, and constants outside ``model.bin``. What OpenVINO
is handed is written again from what was understood here, so that its lenient XML reader cannot understand the file in
another way, or take it for another format. What the shapes come to is bounded by the model's spec (budget.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

import numpy as np

from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.graphs.budget import Budget
from tinyusfm_runtime.graphs.ir_operators import OPERATORS, TYPES
from tinyusfm_runtime.graphs.tensors import FOLLOWED, Tensor
from tinyusfm_runtime.spec import ModelSpec, TensorSpec

MAX_XML_BYTES = 16 << 20
MAX_ELEMENTS = 100_000
MAX_DEPTH = 8
NET_VERSIONS = ("10", "11")
"""Versions of the format."""
_ELEMENTS: Mapping[str, frozenset[str]] = {
    "net": frozenset({"name", "version"}),
    "layers": frozenset(),
    "layer": frozenset({"id", "name", "type", "version", "output_names"}),
    "input": frozenset(),
    "output": frozenset(),
    "port": frozenset({"id", "precision", "names"}),
    "dim": frozenset(),
    "edges": frozenset(),
    "edge": frozenset({"from-layer", "from-port", "to-layer", "to-port"}),
}
"""Element -> attributes it may have; ``data`` has those of its layer's operator."""
_CHILDREN: Mapping[str, frozenset[str]] = {
    "net": frozenset({"layers", "edges", "rt_info"}),
    "layers": frozenset({"layer"}),
    "layer": frozenset({"data", "input", "output", "rt_info"}),
    "input": frozenset({"port"}),
    "output": frozenset({"port"}),
    "port": frozenset({"dim", "rt_info"}),
    "edges": frozenset({"edge"}),
    "rt_info": frozenset({"attribute"}),
}
_NOTES = frozenset({"decompression", "DisablePrecisionConversion", "fused_names", "precise", "keep_const_precision"})
"""Notes on a layer that our targets write; those on the whole model are left out of what OpenVINO is handed."""
_OPSET = re.compile(r"opset[1-9][0-9]?")


@dataclass(slots=True)
class Element:
    """One element of the document."""

    name: str
    attributes: Mapping[str, str]
    children: list[Element] = field(default_factory=list)
    text: str = ""

    def of(self, name: str) -> list[Element]:
        """The children of a name."""
        return [child for child in self.children if child.name == name]

    def one(self, name: str) -> Element | None:
        """The child of a name, or None.

        Raises:
            EngineError: there are several.
        """
        found = self.of(name)
        if len(found) > 1:
            raise EngineError(f"the model has an element {self.name!r} with two of {name!r}")
        return found[0] if found else None


@dataclass(frozen=True, slots=True)
class _Layer:
    element: Element
    kind: str
    data: Mapping[str, str]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def check(xml: bytes, weights: bytes, takes: TensorSpec, spec: ModelSpec, budget: Budget | None = None) -> bytes:
    """Checks a whole model.

    Args:
        xml: content of ``model.xml``.
        weights: content of ``model.bin``.
        takes: the model's one input.
        spec: the model's spec, whose input bounds every size.
        budget: adds up what the graph asks for; None makes one.

    Returns:
        The same model as XML, written again from what was understood: what OpenVINO may be handed.

    Raises:
        EngineError: anything that is not known, does not fit, or is too large.
    """
    net = parse(xml)
    if net.name != "net" or net.attributes.get("version") not in NET_VERSIONS:
        raise EngineError("model.xml is no OpenVINO model, or of a version that none of ours has")
    layers, edges = net.one("layers"), net.one("edges")
    if layers is None or edges is None:
        raise EngineError("model.xml has no layers or no edges")
    listed = [_layer(element) for element in layers.children]
    known = _sources(edges, listed)
    budget = budget or Budget(spec, len(weights))
    made: dict[tuple[str, str], Tensor] = {}
    inputs = [layer for layer in listed if layer.kind == "Parameter"]
    _check_input(inputs, takes)
    for layer in listed:
        number = layer.element.attributes["id"]
        given = [made.get(known[number, port]) for port in layer.inputs]
        if None in given:
            raise EngineError(f"the model's layer {number} takes what nothing before it computes")
        tensors = _outputs(layer, [tensor for tensor in given if tensor is not None], weights, takes, budget)
        _agree(layer, tensors)
        made |= {(number, port): tensor for port, tensor in zip(layer.outputs, tensors, strict=False)}
    return _written(net)


def parse(xml: bytes) -> Element:
    """Reads a document of plain elements.

    Args:
        xml: its bytes, UTF-8.

    Returns:
        The outermost element.

    Raises:
        EngineError: not XML, or XML with anything but elements, attributes and text.
    """
    if (
        not xml.startswith((b"<?xml", b"<net"))
        or len(xml) > MAX_XML_BYTES
        or b"\x00" in xml
        or xml.count(b"<") > 2 * MAX_ELEMENTS + 16
    ):
        raise EngineError("model.xml is not XML, or too large")
    parser = expat.ParserCreate("utf-8")
    stack: list[Element] = []
    roots: list[Element] = []
    count = 0

    def refuse(*_: object) -> NoReturn:
        raise EngineError("model.xml holds a document type, an entity or an instruction, which no model of ours has")

    def declared(_version: str, encoding: str | None, _standalone: int) -> None:
        if (encoding or "utf-8").lower() not in ("utf-8", "us-ascii"):
            raise EngineError("model.xml is in another encoding than UTF-8")

    def start(name: str, attributes: dict[str, str]) -> None:
        nonlocal count
        count += 1
        if count > MAX_ELEMENTS or len(stack) >= MAX_DEPTH:
            raise EngineError("model.xml has more elements, or deeper ones, than any model of ours")
        element = Element(name, attributes)
        (stack[-1].children if stack else roots).append(element)
        stack.append(element)

    def text(words: str) -> None:
        if stack and words.strip():
            stack[-1].text += words.strip()
            if stack[-1].name != "dim":
                raise EngineError(f"model.xml has text in an element {stack[-1].name!r}")

    parser.XmlDeclHandler, parser.StartElementHandler = declared, start
    parser.EndElementHandler = lambda _name: stack.pop() and None
    parser.CharacterDataHandler = text
    for event in ("StartDoctypeDecl", "EntityDecl", "ProcessingInstruction", "ExternalEntityRef", "StartCdataSection"):
        setattr(parser, f"{event}Handler", refuse)
    try:
        parser.Parse(xml, True)
    except expat.ExpatError as error:
        raise EngineError(f"model.xml is not XML: {error}") from error
    _check_known(roots[0])
    return roots[0]


def _check_known(element: Element) -> None:
    """Elements and attributes are those that our targets write.

    Notes on the whole model are not looked at.
    """
    allowed = _CHILDREN.get(element.name, frozenset())
    for child in element.children:
        if child.name not in allowed:
            raise EngineError(f"the model holds an element {child.name!r} in {element.name!r}, which none of ours has")
        if child.name == "rt_info":
            if element.name != "net":
                _check_notes(child)
            continue
        unknown = set(child.attributes) - _ELEMENTS.get(child.name, frozenset(child.attributes))
        if unknown:
            raise EngineError(f"the model's {child.name} has an attribute {min(unknown)!r} that none of ours has")
        _check_known(child)


def _check_notes(notes: Element) -> None:
    for note in notes.children:
        known = note.name == "attribute" and not note.children and set(note.attributes) <= {"name", "version", "value"}
        if not known or note.attributes.get("name") not in _NOTES:
            raise EngineError(
                f"the model has a note {note.attributes.get('name')!r} on a layer, which none of ours has"
            )


def _layer(element: Element) -> _Layer:
    kind, version = element.attributes.get("type", ""), element.attributes.get("version", "")
    if kind not in OPERATORS or not _OPSET.fullmatch(version):
        raise EngineError(f"the model holds a layer {kind!r} of {version!r} that no model of ours has")
    data = element.one("data")
    values = {} if data is None else data.attributes
    unknown = set(values) - OPERATORS[kind].attributes
    if unknown or (data is not None and data.children):
        raise EngineError(
            f"the model's layer {kind} has an attribute {min(unknown, default='')!r} that none of ours has"
        )
    sides = [element.one(name) for name in ("input", "output")]
    ports = [tuple(port.attributes.get("id", "") for port in side.of("port")) if side else () for side in sides]
    if len(set(ports[0] + ports[1])) != len(ports[0] + ports[1]) or not element.attributes.get("id", "").isdigit():
        raise EngineError(f"the model's layer {kind} has no number, or two ports of one number")
    return _Layer(element, kind, values, ports[0], ports[1])


def _sources(edges: Element, layers: Sequence[_Layer]) -> dict[tuple[str, str], tuple[str, str]]:
    """Layer and input port -> layer and output port; every input has exactly one."""
    numbers = [layer.element.attributes["id"] for layer in layers]
    wanted = {(layer.element.attributes["id"], port) for layer in layers for port in layer.inputs}
    found: dict[tuple[str, str], tuple[str, str]] = {}
    for edge in edges.children:
        source = edge.attributes.get("from-layer", ""), edge.attributes.get("from-port", "")
        goal = edge.attributes.get("to-layer", ""), edge.attributes.get("to-port", "")
        if goal in found or goal not in wanted:
            raise EngineError("the model joins an input twice, or one that is not there")
        found[goal] = source
    if len(set(numbers)) != len(numbers) or set(found) != wanted:
        raise EngineError("the model has two layers of one number, or an input that nothing is joined to")
    return found


def _check_input(inputs: Sequence[_Layer], takes: TensorSpec) -> None:
    listed = [(layer.data.get("element_type"), _numbers(layer.data.get("shape", ""))) for layer in inputs]
    kind = {"uint8": "u8", "float32": "f32"}.get(takes.dtype, takes.dtype)
    if listed != [(kind, list(takes.shape))]:
        raise EngineError(f"the model's inputs are {listed}; the manifest says {takes.name} {kind} {list(takes.shape)}")


def _outputs(layer: _Layer, given: list[Tensor], weights: bytes, takes: TensorSpec, budget: Budget) -> Sequence[Tensor]:
    if layer.kind == "Parameter":
        return [Tensor(tuple(takes.shape), takes.dtype)]
    if layer.kind == "Const":
        return [_constant(layer.data, weights)]
    if layer.kind == "Result":
        return []
    try:
        node = OPERATORS[layer.kind].prepare(given, layer.data, len(layer.outputs))
    except (ValueError, IndexError) as error:
        raise EngineError(f"the model's layer {layer.kind} has an attribute that none of ours has: {error}") from error
    return budget.apply(node, layer.kind)


def _constant(data: Mapping[str, str], weights: bytes) -> Tensor:
    """A constant; it lies inside the weights and is exactly as long as its shape says."""
    dtype, bits = TYPES.get(data.get("element_type", ""), ("", 0))
    shape, place = (
        tuple(_numbers(data.get("shape", ""))),
        _numbers(data.get("offset", "")) + _numbers(data.get("size", "")),
    )
    count = math.prod(shape)
    if not dtype or len(place) != 2 or any(side < 0 for side in shape) or place[1] != -(-count * bits // 8):
        raise EngineError("the model has a constant of a type or size that none of ours has")
    offset, size = place
    if offset < 0 or offset + size > len(weights):
        raise EngineError("the model has a constant that lies outside model.bin")
    value = None
    if count <= FOLLOWED and dtype in ("int64", "int32", "float32"):
        value = np.frombuffer(weights[offset : offset + size], dtype).reshape(shape)
    return Tensor(shape, dtype, value, fixed=True)


def _agree(layer: _Layer, tensors: Sequence[Tensor]) -> None:
    """What the file declares is what the layers really give."""
    output = layer.element.one("output")
    ports = [] if output is None else output.of("port")
    if len(ports) > len(tensors) or (layer.kind != "Result" and not ports):
        raise EngineError(f"the model's layer {layer.kind} has {len(ports)} outputs")
    for port, tensor in zip(ports, tensors, strict=False):
        sides = tuple(side for dim in port.of("dim") for side in _numbers(dim.text))
        if sides != tensor.shape:
            raise EngineError(f"the model's layer {layer.kind} is declared as {sides}, it gives {tensor.shape}")


def _numbers(text: str) -> list[int]:
    """Whole numbers with commas between them."""
    if not text.strip():
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"-?\d{1,18}", part, re.ASCII) for part in parts):
        raise EngineError(f"the model has {text[:40]!r} where whole numbers belong")
    return [int(part) for part in parts]


def _written(net: Element) -> bytes:
    """The document written again, without notes on the whole model."""
    parts = ['<?xml version="1.0"?>\n']

    def write(element: Element) -> None:
        attributes = "".join(f" {name}={quoteattr(value)}" for name, value in element.attributes.items())
        children = [child for child in element.children if not (element is net and child.name == "rt_info")]
        if not children and not element.text:
            parts.append(f"<{element.name}{attributes}/>")
            return
        parts.append(f"<{element.name}{attributes}>{element.text}")
        for child in children:
            write(child)
        parts.append(f"</{element.name}>\n")

    write(net)
    return "".join(parts).encode("utf-8")


__all__ = ["MAX_DEPTH", "MAX_ELEMENTS", "MAX_XML_BYTES", "NET_VERSIONS", "Element", "check", "parse"]
