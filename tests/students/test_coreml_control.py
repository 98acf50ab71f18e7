"""The shipped student's Core ML program under the real gate: intact it passes, one changed weight or axis fails.

Every control changes one number of the saved package (tests/export/mil_edit.py) and goes the whole way: read back,
interpreted, compared with PyTorch, judged by the default thresholds on frames with a head in them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.export.mil_edit import Files, weight_of, with_input, with_weight
from tests.needs import needs
from tinyusfm_calibration.sets import phantom_frames
from tinyusfm_edge.cli.train.student import ForeignOptions, load
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.ptq import decide
from tinyusfm_export.targets.coreml import Target
from tinyusfm_export.targets.coreml.stand_in import MilEngine
from tinyusfm_export.verify.artefact import compare_outputs
from tinyusfm_export.verify.engine_run import run_engine
from tinyusfm_export.verify.expected import Expected, expect
from tinyusfm_export.verify.gate import Gate
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.parity import ParityReport
from tinyusfm_runtime.engines import EngineConfig
from tinyusfm_runtime.errors import EngineError
from tinyusfm_runtime.spec import ModelSpec

needs("coremltools", reason="coremltools is not installed: pip install 'tinyusfm-edge[coreml]'")
pytestmark = pytest.mark.filterwarnings("ignore")
SEEDS = (101, 104)
Judge = Callable[[Files], ParityReport]


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> tuple[Files, ModelSpec, Expected]:
    """FP16 package of ``fetal-head``, and PyTorch's answers to two phantoms."""
    student, _ = load("fetal-head", ForeignOptions())
    frames = GateFrames(kind="phantom", frames=tuple(phantom_frames(SEEDS)), source="test phantoms")
    graph = build_graph(student.module, student.spec)
    built = Target().build(graph, decide(graph, "fp16"), tmp_path_factory.mktemp("fp16"))
    files = {path.name: path.read_bytes() for path in built.files}
    return files, student.spec, expect(student.module, student.spec, frames)


@pytest.fixture(scope="module")
def judged(shipped: tuple[Files, ModelSpec, Expected]) -> Judge:
    """Package -> the real gate's report; only the least number of frames is that of the test."""
    _, spec, expected = shipped

    def judge(files: Files) -> ParityReport:
        engine = MilEngine()
        engine.load(files, spec, EngineConfig(threads=1, rest_precision="f16"))
        gate = Gate(min_frames=len(SEEDS))
        outputs = run_engine(engine, spec, expected.inputs)
        return compare_outputs(spec, expected, outputs, gate, engine.description, precision="fp16")

    return judge


def test_intact_it_passes(shipped: tuple[Files, ModelSpec, Expected], judged: Judge) -> None:
    report = judged(shipped[0])
    assert report, report.failures
    assert report.comparison.statistics["counted"] == len(SEEDS), "both phantoms have a head"


def flipped_bit(files: Files, name: str) -> Files:
    """The highest bit of the exponent of a weight's largest entry below 2 flipped: what one bad bit in a file does.

    From 2 on that bit is set, and flipping it makes the entry vanish.
    """
    weights = weight_of(files, name)
    sizes = np.abs(weights.astype(np.float32))
    index = int(np.where(sizes < 2, sizes, 0).argmax())
    assert weights.dtype == np.float16
    changed = (weights[index : index + 1].view(np.uint16) ^ np.uint16(1 << 14)).view(np.float16)
    return with_weight(files, name, index, float(changed[0]))


@pytest.mark.parametrize(
    "name",
    ["patch_embed_weight", "blocks_0_attn_proj_weight", "blocks_5_mlp_fc1_weight", "blocks_11_attn_proj_weight",
     "head_classifier_0_weight"],
)  # fmt: skip
def test_one_changed_weight_fails(shipped: tuple[Files, ModelSpec, Expected], judged: Judge, name: str) -> None:
    assert not judged(flipped_bit(shipped[0], name))


@pytest.mark.parametrize(
    ("operator", "key", "value"),
    [
        ("blocks_0_attn_weights", "axis", -2),  # softmax over the queries
        ("blocks_5_attn_weights", "axis", -2),
        ("blocks_9_attn_weights", "axis", -2),
        ("blocks_11_attn_weights", "axis", -2),
        ("blocks_2_mlp_fc1_input", "axes", [1]),  # layer norm over the tokens
        ("patches_order", "perm", [0, 2, 3, 1]),  # the patches' own rows and columns exchanged
    ],
)
def test_one_changed_axis_fails(
    shipped: tuple[Files, ModelSpec, Expected], judged: Judge, operator: str, key: str, value: int | list[int]
) -> None:
    report = judged(with_input(shipped[0], operator, key, value))
    assert not report and report.comparison.statistics["logit_share"] > 3 * Gate().float_logits


@pytest.mark.parametrize(
    ("operator", "key", "value"),
    [
        ("tokens", "axis", 2),  # concat
        ("blocks_0_attn_chunk_0", "axis", 1),  # split
        ("blocks_0_attn_q", "perm", [0, 1, 2, 3]),
        ("blocks_0_attn_k", "perm", [0, 2, 1, 3]),
        ("head_lateral_0_channels", "perm", [0, 1, 2]),
    ],
)
def test_one_changed_axis_that_fits_no_shape_is_refused(
    shipped: tuple[Files, ModelSpec, Expected], judged: Judge, operator: str, key: str, value: int | list[int]
) -> None:
    with pytest.raises(EngineError):
        judged(with_input(shipped[0], operator, key, value))
