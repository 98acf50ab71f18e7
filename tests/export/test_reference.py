"""The PyTorch reference: float32, evaluation mode, one thread, fed exactly as in training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import tiny_logits, tiny_spec
from tests.export.fake_world import Bright
from tinyusfm_calibration.sets import NamedFrame, pixels_sha256
from tinyusfm_export.verify.expected import expect
from tinyusfm_export.verify.gate_frames import GateFrames
from tinyusfm_export.verify.reference import normalise, reference_mode, reference_name, reference_outputs, run_reference
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.frame import Frame
from tinyusfm_runtime.numerics.preprocess import preprocess
from tinyusfm_runtime.phantom import make_phantom

SPEC = tiny_spec()
FRAMES = [make_phantom(seed, height=96, width=128).frame for seed in range(3)]


class Watched(nn.Module):
    """Remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.bright = Bright()
        self.seen: list[tuple[bool, bool, int, bool, torch.dtype]] = []

    def forward(self, image: Tensor) -> Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        self.seen.append((self.training, torch.is_grad_enabled(), torch.get_num_threads(), autocast, image.dtype))
        out: Tensor = self.bright(image)
        return out


def test_answers_are_the_modules_own_and_repeat_to_the_bit() -> None:
    outputs = reference_outputs(Bright(), SPEC, FRAMES)
    for frame, output in zip(FRAMES, outputs, strict=True):
        want = tiny_logits(preprocess(frame, SPEC.preprocess)[0])
        assert np.abs(output.logits - want).max() < 1e-4
    again = reference_outputs(Bright(), SPEC, FRAMES)
    assert all(np.array_equal(a.logits, b.logits) for a, b in zip(outputs, again, strict=True))


def test_frames_are_normalised_by_mean_and_deviation_of_each_channel() -> None:
    codes = torch.arange(256, dtype=torch.float32).reshape(1, 1, 16, 16)
    spec = replace(SPEC.preprocess, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    found = normalise(codes, spec)
    assert found.shape == (1, 3, 16, 16)
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        assert torch.allclose(found[:, channel : channel + 1], (codes / 255 - mean) / std, atol=1e-6)


def test_it_runs_in_evaluation_mode_without_gradients_or_autocast_on_one_thread_and_puts_all_back() -> None:
    module = Watched().train()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            reference_outputs(module, SPEC, FRAMES[:1])
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert module.seen == [(False, False, 1, False, torch.float32)]
    assert module.training


def test_everything_is_put_back_after_an_error_too() -> None:
    module = Bright().train()
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), reference_mode(module):
        raise RuntimeError
    assert module.training
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_student_of_another_precision_is_no_reference(dtype: torch.dtype) -> None:
    with pytest.raises(InputError, match="float32"):
        reference_outputs(Bright().to(dtype), SPEC, FRAMES[:1])


def test_the_first_output_counts_where_a_module_gives_several() -> None:
    class Several(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bright = Bright()

        def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
            return self.bright(image), image

    tensor = preprocess(FRAMES[0], SPEC.preprocess)[0]
    with reference_mode(Bright()):
        assert np.array_equal(run_reference(Several(), SPEC, tensor), run_reference(Bright(), SPEC, tensor))


def test_frames_of_data_are_named_by_their_hash() -> None:
    frame = Frame(pixels=FRAMES[0].pixels, spacing_mm=(0.2, 0.2))
    named = GateFrames(kind="data", frames=(NamedFrame(id="DOE_JANE.png", frame=frame),))
    expected = expect(Bright(), SPEC, named)
    assert expected.ids == (pixels_sha256(frame)[:16],)
    assert "DOE" not in repr(expected.provenance)
    assert expected.reference == reference_name()
