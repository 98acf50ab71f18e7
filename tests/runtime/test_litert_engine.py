"""What is LiteRT's own beside the contract: what it computes in, its greeting, its operators, two threads."""

from __future__ import annotations

import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conftest import SIDE, Parts, child_environment, tiny_litert, tiny_spec
from tests.needs import needs
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.litert import DELEGATE, Engine, executed_in, operators_outside
from tinyusfm_runtime.errors import EngineError, UnsupportedError
from tinyusfm_runtime.graphs.tflite import ReadOperator
from tinyusfm_runtime.profiling.card import make_card
from tinyusfm_runtime.profiling.operators import operator_table

needs("ai_edge_litert", "ai-edge-litert is not installed: pip install 'tinyusfm-edge[litert]'")
needs("tflite", "tflite is not installed: pip install 'tinyusfm-edge[litert]'")
CONFIG = EngineConfig(threads=1, rest_precision="f32")


def loaded() -> Engine:
    engine = Engine()
    engine.load({"model.tflite": tiny_litert()}, tiny_spec(), CONFIG)
    return engine


def test_it_says_what_the_delegate_takes() -> None:
    engine = loaded()
    assert DELEGATE in engine.description
    assert engine.executed == f"f32; {DELEGATE} takes 7 of 8 operators", "the cast of the image is LiteRT's own"


def entry(kind: str, inputs: list[int], outputs: list[int]) -> dict[str, Any]:
    return {"op_name": kind, "inputs": np.array(inputs, np.int32), "outputs": np.array(outputs, np.int32)}


def test_operators_outside_are_those_the_outputs_are_reached_through() -> None:
    file = [entry("CAST", [0], [1]), entry("MUL", [1, 9], [2]), entry("ADD", [2, 9], [3])]
    assert operators_outside(file, [3]) == {0, 1, 2}, "no delegate: all are LiteRT's own"
    assert operators_outside([*file, entry("DELEGATE", [1, 9], [3])], [3]) == {0}
    parts = [entry("DELEGATE", [1, 9], [2])]
    assert operators_outside([*file, *parts], [3]) == {0, 2}, "what stands behind the delegate's part counts too"


def test_int8_layers_are_counted_by_the_file() -> None:
    listed = [ReadOperator(kind="CONV_2D", outputs=("a",), weight=word) for word in ("int8", "float32", "int8")]
    assert executed_in([*listed, ReadOperator(kind="RELU", outputs=("b",), weight="")], {3}) == (
        f"int8 in 2 of 3 layers with weights (by the file's types), the rest f32; {DELEGATE} takes 3 of 4 operators"
    )


@pytest.mark.parametrize("rest", ["f16", "bf16"])
def test_other_rest_precisions_are_refused(rest: str) -> None:
    config = EngineConfig(threads=1, rest_precision=rest)
    with pytest.raises(UnsupportedError, match=rest):
        Engine().load({"model.tflite": tiny_litert()}, tiny_spec(), config)


def test_the_answers_are_the_same_on_two_threads() -> None:
    tensor = np.random.default_rng(4).integers(0, 256, (1, 1, SIDE, SIDE), dtype=np.uint8)
    two = Engine()
    two.load({"model.tflite": tiny_litert()}, tiny_spec(), EngineConfig(threads=2, rest_precision="f32"))
    np.testing.assert_allclose(two.run(tensor)["logits"], loaded().run(tensor)["logits"], atol=1e-5)


def test_card_and_operators_without_times(engine_parts: Callable[[str], Parts], tmp_path: Path) -> None:
    bundle = Bundle.open(engine_parts("litert").publish(tmp_path / "b.bundle"))
    artefact = bundle.manifest.artefacts[0]
    assert make_card(bundle, artefact, seconds=0.01).macs == 64 * 64 * 7 * 7
    found = operator_table(bundle, artefact, np.zeros((1, 1, SIDE, SIDE), np.uint8))
    assert {row.kind: (row.precision, row.count) for row in found}["CONV_2D"] == ("f32", 1)
    assert all(row.share is None and row.row()[3:] == ("not reported", "not reported") for row in found)


def test_only_the_greeting_is_kept_from_standard_error(tmp_path: Path) -> None:
    """Another thread's words, written while the model loads, arrive."""
    (tmp_path / "model.tflite").write_bytes(tiny_litert())
    code = """
    import os, sys
    from pathlib import Path
    from tinyusfm_runtime.engines import litert
    from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task
    library = litert.import_litert()
    class Loud(library.Interpreter):
        def allocate_tensors(self):
            os.write(2, b"somebody else\\n")
            super().allocate_tensors()
    library.Interpreter = Loud
    spec = ModelSpec(name="t", task=Task.SEGMENT, labels=("a",), preprocess=PreprocessSpec(height=64, width=64))
    engine = litert.Engine()
    config = litert.EngineConfig(threads=1, rest_precision="f32")
    engine.load({"model.tflite": Path(sys.argv[1]).read_bytes()}, spec, config)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "model.tflite")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=child_environment())
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "somebody else\n")


NETWORK = """
import sys
from pathlib import Path
import numpy as np
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.engines.litert import Engine
from tinyusfm_runtime.spec import ModelSpec, PreprocessSpec, Task
spec = ModelSpec(name="t", task=Task.SEGMENT, labels=("a",), preprocess=PreprocessSpec(height=64, width=64))
engine = Engine()
engine.load({"model.tflite": Path(sys.argv[1]).read_bytes()}, spec, EngineConfig(threads=2, rest_precision="f32"))
engine.run(np.zeros((1, 1, 64, 64), np.uint8))
engine.close()
"""


def test_its_native_code_makes_no_network_call(tmp_path: Path) -> None:
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("strace is not installed")
    (tmp_path / "model.tflite").write_bytes(tiny_litert())

    def calls(code: str) -> tuple[int, list[str]]:
        watch = [strace, "-f", "-qq", "-e", "trace=network", "-o", str(tmp_path / "calls")]
        command = [*watch, sys.executable, "-c", code, str(tmp_path / "model.tflite")]
        done = subprocess.run(command, capture_output=True, check=False, env=child_environment())
        lines = (tmp_path / "calls").read_text().splitlines() if (tmp_path / "calls").exists() else []
        return done.returncode, [line for line in lines if "(" in line]

    if not calls("import socket; socket.socket().close()")[1]:
        pytest.skip("strace cannot watch a process here")
    assert calls(NETWORK) == (0, [])


def test_a_cancelled_run_gives_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, tensor = loaded(), np.zeros((1, 1, SIDE, SIDE), np.uint8)
    run = engine._interpreter.invoke

    def cancelled() -> None:
        engine.cancel()
        run()

    monkeypatch.setattr(engine._interpreter, "invoke", cancelled)
    with pytest.raises(EngineError, match="cancelled"):
        engine.run(tensor)
    monkeypatch.setattr(engine._interpreter, "invoke", run)
    assert np.isfinite(engine.run(tensor)["logits"]).all()
