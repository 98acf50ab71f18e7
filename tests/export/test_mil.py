"""The interpreter of saved Core ML programs: every operator against torch, and what it must refuse or notice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.needs import needs
from tinyusfm_export.targets.coreml.ops import OPERATORS
from tinyusfm_export.targets.coreml.program import VALUE_INFERENCE, Program
from tinyusfm_runtime.errors import EngineError, UnsupportedError
from tinyusfm_runtime.numerics.order import wide

needs("coremltools", reason="coremltools is not installed: pip install 'tinyusfm-edge[coreml]'")

SHAPE = (1, 2, 6, 8)
pytestmark = pytest.mark.filterwarnings("ignore")


def rand(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def save(build: Callable[[Any, Any], Any], path: Path) -> Path:
    """A program of one input ``x`` as a package, in float32; ``build`` gets the library's builder and the input."""
    import coremltools as ct
    from coremltools.converters.mil import Builder as mb

    @mb.program(input_specs=[mb.TensorSpec(shape=SHAPE)], opset_version=ct.target.iOS17)
    def program(x: Any) -> Any:
        return build(mb, x)

    model = ct.convert(
        program, convert_to="mlprogram", minimum_deployment_target=ct.target.iOS17,
        compute_precision=ct.precision.FLOAT32, pass_pipeline=ct.PassPipeline.EMPTY, skip_model_load=True,
    )  # fmt: skip
    model.save(str(path))
    return path


W, K, B = rand(5, 8, seed=1), rand(3, 2, 3, 3, seed=2), rand(3, seed=3)
T = torch.from_numpy
STEP = np.float32(0.03)
"""Of an 8-bit grid that is too short for the largest inputs, so that clipping shows."""
CODES, SCALES = np.arange(-20, 20, dtype=np.int8).reshape(5, 8), np.abs(rand(5, seed=4)) + np.float32(0.1)
TABLE, INDICES = np.sort(wide(rand(16, seed=5))), np.random.default_rng(6).integers(0, 16, (5, 8)).astype(np.uint8)
PACKED = (INDICES.reshape(-1)[0::2] | (INDICES.reshape(-1)[1::2] << 4)).astype(np.uint8)


def on_codes(mb: Any, x: Any) -> Any:
    return mb.dequantize(input=mb.quantize(input=x, scale=STEP, output_dtype="int8"), scale=STEP)


def affine_weight(mb: Any) -> Any:
    return mb.constexpr_affine_dequantize(quantized_data=CODES, zero_point=np.int8(3), scale=SCALES, axis=0)


def table_weight(mb: Any) -> Any:
    return mb.constexpr_lut_to_dense(indices=PACKED, lut=TABLE, shape=np.array([5, 8], np.uint32))


CASES: dict[str, tuple[Callable[[Any, Any], Any], Callable[[Any], Any]]] = {
    "linear": (lambda mb, x: mb.linear(x=x, weight=W, bias=rand(5)), lambda x: F.linear(x, T(W), T(rand(5)))),
    "matmul": (lambda mb, x: mb.matmul(x=x, y=x, transpose_y=True), lambda x: x @ x.mT),
    "softmax": (lambda mb, x: mb.softmax(x=x, axis=-1), lambda x: x.softmax(-1)),
    "layer_norm": (
        lambda mb, x: mb.layer_norm(x=x, axes=[-1], gamma=W[0], beta=W[1], epsilon=1e-3),
        lambda x: F.layer_norm(x, (8,), T(W[0]), T(W[1]), 1e-3),
    ),
    "gelu": (lambda mb, x: mb.gelu(x=x, mode="EXACT"), F.gelu),
    "conv": (
        lambda mb, x: mb.conv(x=x, weight=K, bias=B, pad_type="custom", pad=[1, 0, 2, 1]),
        lambda x: F.conv2d(F.pad(x, (2, 1, 1, 0)), T(K), T(B)),
    ),
    "avg_pool": (
        lambda mb, x: mb.avg_pool(x=x, kernel_sizes=[2, 2], strides=[2, 2], pad_type="valid"),
        lambda x: F.avg_pool2d(x, 2),
    ),
    "upsample_bilinear": (
        lambda mb, x: mb.upsample_bilinear(x=x, scale_factor_height=2.0, scale_factor_width=3.0, align_corners=False),
        lambda x: F.interpolate(x, size=(12, 24), mode="bilinear", align_corners=False),
    ),
    "add": (lambda mb, x: mb.add(x=x, y=W[0]), lambda x: x + T(W[0])),
    "relu": (lambda mb, x: mb.relu(x=x), F.relu),
    "reshape": (lambda mb, x: mb.reshape(x=x, shape=[1, 12, 8]), lambda x: x.reshape(1, 12, 8)),
    "transpose": (lambda mb, x: mb.transpose(x=x, perm=[0, 2, 3, 1]), lambda x: x.permute(0, 2, 3, 1)),
    "concat": (lambda mb, x: mb.concat(values=[x, x], axis=1), lambda x: torch.cat([x, x], 1)),
    "split": (lambda mb, x: mb.split(x=x, num_splits=2, axis=-1)[1], lambda x: x.chunk(2, -1)[1]),
    "slice_by_index": (
        lambda mb, x: mb.slice_by_index(x=x, begin=[0, 0, 1, 0], end=[1, 2, 6, 8]),
        lambda x: x[:, :, 1:],
    ),
    "slice_by_size": (
        lambda mb, x: mb.slice_by_size(x=x, begin=[0, 1, 2, 0], size=[1, 1, 3, 8]),
        lambda x: x[:, 1:2, 2:5],
    ),
    "gather": (
        lambda mb, x: mb.gather(x=x, indices=np.array([5, 0, 0, 3], np.int32), axis=2),
        lambda x: x[:, :, [5, 0, 0, 3]],
    ),
    "mul": (lambda mb, x: mb.mul(x=x, y=W[0]), lambda x: x * T(W[0])),
    "abs": (lambda mb, x: mb.abs(x=x), torch.abs),
    "reduce_mean": (lambda mb, x: mb.reduce_mean(x=x, axes=[1], keep_dims=False), lambda x: x.mean(1)),
    "reduce_max": (
        lambda mb, x: mb.reduce_max(x=x, axes=[2, 3], keep_dims=True),
        lambda x: x.amax((2, 3), keepdim=True),
    ),
    "resize_bilinear": (
        lambda mb, x: mb.resize_bilinear(
            x=x, target_size_height=9, target_size_width=20, sampling_mode="UNALIGN_CORNERS"
        ),
        lambda x: F.interpolate(x, size=(9, 20), mode="bilinear", align_corners=False),
    ),
    "quantize": (on_codes, lambda x: torch.fake_quantize_per_tensor_affine(x, float(STEP), 0, -128, 127)),
    "dequantize": (on_codes, lambda x: torch.quantize_per_tensor(x, float(STEP), 0, torch.qint8).dequantize()),
    "constexpr_affine_dequantize": (
        lambda mb, x: mb.linear(x=x, weight=affine_weight(mb)),
        lambda x: F.linear(x, (T(CODES).float() - 3) * T(SCALES)[:, None]),
    ),
    "constexpr_lut_to_dense": (
        lambda mb, x: mb.linear(x=x, weight=table_weight(mb)),
        lambda x: F.linear(x, T(TABLE)[T(INDICES).long()]),
    ),
    "cast": (lambda mb, x: mb.cast(x=mb.cast(x=x, dtype="int32"), dtype="fp32"), lambda x: x.int().float()),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_operator_is_torch(kind: str, tmp_path: Path) -> None:
    build, torched = CASES[kind]
    program = Program(save(build, tmp_path / "m.mlpackage"))
    assert kind in {op.op_type for op in program._function.operations}, "the case holds the operator it is named after"
    x = rand(*SHAPE, seed=9)
    (found,) = program.run({"x": x}).values()
    np.testing.assert_allclose(found, torched(T(x)).numpy(), rtol=1e-5, atol=1e-5)
    assert program.counts["torch"] + program.counts["coremltools"] >= 1


def test_every_operator_the_interpreter_computes_is_held_against_torch() -> None:
    assert set(CASES) == set(OPERATORS) | VALUE_INFERENCE and not set(OPERATORS) & VALUE_INFERENCE


def test_an_operator_nobody_computes_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="erf"):
        Program(save(lambda mb, x: mb.erf(x=x), tmp_path / "m.mlpackage"))


def test_one_changed_weight_or_axis_shows(tmp_path: Path) -> None:
    x, changed = rand(*SHAPE, seed=9), K.copy()
    changed[1, 0, 2, 1] += 0.5
    for name, builds in {
        "weight": [lambda mb, x: mb.conv(x=x, weight=K, bias=B), lambda mb, x: mb.conv(x=x, weight=changed, bias=B)],
        "axis": [lambda mb, x: mb.softmax(x=x, axis=-1), lambda mb, x: mb.softmax(x=x, axis=-2)],
    }.items():
        answers = []
        for number, build in enumerate(builds):
            program = Program(save(build, tmp_path / f"{name}{number}.mlpackage"))
            answers += list(program.run({"x": x}).values())
        assert np.abs(answers[0] - answers[1]).max() > 0.1


def test_what_is_no_package_or_no_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot be read"):
        Program(tmp_path / "none.mlpackage")
    program = Program(save(lambda mb, x: mb.relu(x=x), tmp_path / "m.mlpackage"))
    with pytest.raises(EngineError, match="takes x"):
        program.run({"y": rand(*SHAPE)})
