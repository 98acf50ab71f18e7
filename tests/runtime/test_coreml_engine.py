"""The Core ML engine: what it says where there is no Core ML, and its calls on a stand-in for coremltools' model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from tinyusfm_runtime.engines import EngineConfig, coreml
from tinyusfm_runtime.errors import EngineError, InputError, UnsupportedError
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task

SIDE = 32


def part(number: int, content: bytes) -> bytes:
    """A field of a protocol buffer message."""
    key = number << 3 | 2
    head = bytes([key & 0x7F | 0x80, key >> 7]) if key > 127 else bytes([key])
    return head + bytes([len(content) & 0x7F | 0x80, len(content) >> 7]) + content


def named(key: bytes, value: bytes) -> bytes:
    """An entry of a map."""
    return part(1, key) + part(2, value)


def whole(number: int, value: int) -> bytes:
    """A field that holds a whole number below 128."""
    return bytes([number << 3, value])


IMAGE_TYPE = part(1, whole(2, 4) + b"".join(part(3, part(1, whole(1, size))) for size in (1, 1, SIDE, SIDE)))
"""A tensor of the input's size."""
FUNCTION = part(1, part(1, b"image") + part(2, IMAGE_TYPE)) + part(3, named(b"CoreML7", b""))
FILES = {
    "model.mlmodel": part(502, part(2, named(b"main", FUNCTION))),
    "weight.bin": b"weights",
    "Manifest.json": json.dumps(
        {"itemInfoEntries": {name: {"path": f"com.apple.CoreML/{name}"} for name in ("model.mlmodel", "weights")}}
    ).encode(),
}
"""The smallest package whose program may be read."""
CONFIG = EngineConfig(threads=1, rest_precision="f16")
elsewhere = pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")


def spec() -> ModelSpec:
    size = PreprocessSpec(height=SIDE, width=SIDE)
    return ModelSpec(name="t", task=Task.CLASSIFY, labels=("a", "b"), preprocess=size)


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A Mac whose coremltools answers like a model with a grey image as input; the answer is its pixel sum."""
    ct = pytest.importorskip("coremltools", reason="coremltools is not installed")
    from coremltools.proto import Model_pb2

    described = Model_pb2.Model()
    image = described.description.input.add(name="image")
    image.type.imageType.width = image.type.imageType.height = SIDE
    image.type.imageType.colorSpace = image.type.imageType.ColorSpace.Value("GRAYSCALE")
    described.description.output.add(name="logits")
    model = mock.create_autospec(ct.models.MLModel, instance=True)
    model.get_spec.return_value = described
    model.predict.side_effect = lambda data: {"logits": np.full((1, 2), float(np.asarray(data["image"]).sum()))}
    made = mock.create_autospec(ct.models.MLModel, return_value=model)
    monkeypatch.setattr(ct.models, "MLModel", made)
    monkeypatch.setattr(coreml, "runs_here", lambda: True)
    made.model = model
    return made


@elsewhere
def test_elsewhere_it_says_so_in_one_line() -> None:
    answer = coreml.available()
    assert not answer.usable and "macOS only" in answer.reason and answer.extra == "coreml"
    assert [name for name, works, _, _ in coreml.pieces() if not works][0] == "macOS"
    with pytest.raises(UnsupportedError, match="macOS only") as caught:
        coreml.Engine().load(FILES, spec(), CONFIG)
    assert "\n" not in str(caught.value)


def test_it_loads_the_package_on_the_units_asked_for(mac: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(coreml.UNITS_VARIABLE, "CPU_AND_NE")
    seen: list[dict[str, bytes]] = []
    model = mac.model

    def load(path: str, **options: Any) -> Any:
        seen.append({place: (Path(path) / place).read_bytes() for place in coreml.PLACES.values()})
        assert options["compute_units"].name == "CPU_AND_NE"
        return model

    mac.side_effect = load
    engine = coreml.Engine()
    engine.load(FILES, spec(), CONFIG)
    assert seen == [{coreml.PLACES[name]: content for name, content in FILES.items()}]
    assert "cpu_and_ne" in engine.description and "f16" in engine.description
    tensor = np.full((1, 1, SIDE, SIDE), 3, np.uint8)
    found = engine.run(tensor)["logits"]
    assert found.dtype == np.float32 and found[0, 0] == 3 * SIDE * SIDE
    with pytest.raises(EngineError, match="takes uint8"):
        engine.run(tensor.astype(np.float32))
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="not loaded"):
        engine.run(tensor)


def _wider(described: Any) -> None:
    described.description.input[0].type.imageType.width = 48


def _coloured(described: Any) -> None:
    described.description.input[0].type.imageType.colorSpace = 20


def _renamed(described: Any) -> None:
    described.description.output[0].name = "scores"


@pytest.mark.parametrize("spoil", [_wider, _coloured, _renamed])
def test_another_interface_is_refused(mac: Any, spoil: Callable[[Any], None]) -> None:
    spoil(mac.model.get_spec.return_value)
    with pytest.raises(EngineError):
        coreml.Engine().load(FILES, spec(), CONFIG)


def test_what_goes_wrong_is_one_line(mac: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EngineError, match="exactly"):
        coreml.Engine().load({**FILES, "more": b""}, spec(), CONFIG)
    looped = FUNCTION[: -len(named(b"CoreML7", b"")) - 3] + part(3, named(b"CoreML7", part(3, part(1, b"while_loop"))))
    with pytest.raises(EngineError, match="while_loop"):
        coreml.Engine().load({**FILES, "model.mlmodel": part(502, part(2, named(b"main", looped)))}, spec(), CONFIG)
    with pytest.raises(UnsupportedError, match="bf16"):
        coreml.Engine().load(FILES, spec(), EngineConfig(threads=1, rest_precision="bf16"))
    engine = coreml.Engine()
    engine.load(FILES, spec(), CONFIG)
    mac.model.predict.side_effect = RuntimeError("two\nlines")
    with pytest.raises(EngineError, match="two lines"):
        engine.run(np.zeros((1, 1, SIDE, SIDE), np.uint8))
    monkeypatch.setenv(coreml.UNITS_VARIABLE, "toaster")
    with pytest.raises(InputError, match="toaster"):
        coreml.Engine().load(FILES, spec(), CONFIG)
    engine.close()


@pytest.mark.macos
@pytest.mark.skipif(sys.platform != "darwin", reason="Core ML predicts on macOS only")
def test_on_a_mac_it_answers_like_the_interpreter(tmp_path: Path) -> None:
    from tests.export.students import phantom_inputs, small_graph
    from tinyusfm_export.quantize.ptq import decide
    from tinyusfm_export.targets.coreml import Target
    from tinyusfm_export.targets.coreml.stand_in import MilEngine

    graph = small_graph("classify")
    built = Target().build(graph, decide(graph, "fp16"), tmp_path)
    files = {path.name: path.read_bytes() for path in built.files}
    answers = []
    for engine in (coreml.Engine(), MilEngine()):
        engine.load(files, graph.spec, CONFIG)
        answers.append(engine.run(phantom_inputs(graph.spec, 1)[0])["logits"])
        engine.close()
    np.testing.assert_allclose(answers[0], answers[1], atol=0.05)
