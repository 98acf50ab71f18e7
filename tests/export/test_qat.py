"""QAT: it gives back at least half of what 4-bit weights lose, only reads the teacher, and resumes to the same end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.export.students import make_student, observed, phantom_inputs
from tinyusfm_calibration.ranges import Ranges
from tinyusfm_export.graph.build import build_graph
from tinyusfm_export.quantize.decision import QuantDecision
from tinyusfm_export.quantize.fake_quant import FakeQuant
from tinyusfm_export.quantize.ptq import PtqPolicy, decide
from tinyusfm_export.quantize.qat import QatConfig, finetune
from tinyusfm_runtime.errors import CalibrationError, InputError
from tinyusfm_runtime.spec import ModelSpec


@pytest.fixture(scope="module")
def student() -> tuple[torch.nn.Module, ModelSpec]:
    return make_student()


@pytest.fixture(scope="module")
def ranges(student: tuple[torch.nn.Module, ModelSpec]) -> Ranges:
    return observed(build_graph(*student))


def decided(student: torch.nn.Module, spec: ModelSpec, ranges: Ranges, limit: int = 7) -> QuantDecision:
    return decide(
        build_graph(student, spec), "int8", ranges, policy=PtqPolicy(weight_limit=limit, rest_precision="f32")
    )


@pytest.fixture(scope="module")
def decision(student: tuple[torch.nn.Module, ModelSpec], ranges: Ranges) -> QuantDecision:
    return decided(*student, ranges)


@pytest.fixture(scope="module")
def frames(student: tuple[torch.nn.Module, ModelSpec]) -> list[np.ndarray]:
    return [tensor[0] for tensor in phantom_inputs(student[1], 24)]


def lost(
    which: torch.nn.Module, teacher: torch.nn.Module, spec: ModelSpec, decision: QuantDecision, held: list[np.ndarray]
) -> float:
    """Mean squared error of the logits in the int8 graph against the float teacher, over the teacher's variance."""
    codes = torch.from_numpy(np.stack(held)).float()
    with torch.inference_mode():
        wanted = torch.cat([build_graph(teacher, spec).module(one[None])[0] for one in codes])
        found = FakeQuant(build_graph(which, spec), decision)(codes)
    return float((found - wanted).square().mean() / wanted.var())


def test_it_recovers_at_least_half_on_frames_it_did_not_see(
    student: tuple[torch.nn.Module, ModelSpec], ranges: Ranges, decision: QuantDecision, frames: list[np.ndarray]
) -> None:
    module, spec = student
    before = {name: value.clone() for name, value in module.state_dict().items()}
    result = finetune(module, spec, decision, frames[:12], QatConfig(steps=80, batch=4, warmup=5))
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items()), "teacher changed"
    ptq = lost(module, module, spec, decision, frames[12:])
    qat = lost(result.student, module, spec, decided(result.student, spec, result.learned(ranges)), frames[12:])
    assert ptq > 0.01, "4-bit weights lose nothing here, so nothing can be shown"
    assert qat < 0.5 * ptq
    assert result.last_loss < result.first_loss


def test_ranges_widened_by_outliers_are_learned_back(
    student: tuple[torch.nn.Module, ModelSpec], ranges: Ranges, frames: list[np.ndarray]
) -> None:
    """Min-max ranges that single values have made eight times too wide; without learned ranges little comes back."""
    module, spec = student
    wide = replace(ranges, tensors={name: (8 * low, 8 * high) for name, (low, high) in ranges.tensors.items()})
    decision = decided(module, spec, wide, 127)
    ptq = lost(module, module, spec, decision, frames[12:])
    left = {}
    for rate in (0.0, 0.05):
        config = QatConfig(steps=60, batch=2, warmup=5, range_rate=rate)
        result = finetune(module, spec, decision, frames[:12], config)
        learned = result.learned(wide)
        left[rate] = lost(result.student, module, spec, decided(result.student, spec, learned, 127), frames[12:])
        assert (learned == wide) is (rate == 0.0)
    assert left[0.05] < 0.5 * ptq < left[0.0]


def test_a_killed_run_goes_on_to_the_same_student(
    student: tuple[torch.nn.Module, ModelSpec], decision: QuantDecision, frames: list[np.ndarray], tmp_path: Path
) -> None:
    module, spec = student
    config = QatConfig(steps=6, batch=2, warmup=2, checkpoint_every=3)
    whole = finetune(module, spec, decision, frames[:4], config)
    place = tmp_path / "checkpoint"

    class Killed(Exception):
        pass

    def kill(what: str, share: float) -> None:
        if share > 0.6:
            raise Killed

    with pytest.raises(Killed):
        finetune(module, spec, decision, frames[:4], config, checkpoint=place, progress=kill)
    resumed = finetune(module, spec, decision, frames[:4], config, checkpoint=place)
    assert len(resumed.losses) == 3
    for name, value in whole.student.state_dict().items():
        assert torch.equal(value, resumed.student.state_dict()[name]), name
    assert whole.factors == resumed.factors and set(whole.factors.values()) != {1.0}
    with pytest.raises(InputError, match="another run"):
        finetune(module, spec, decision, frames[:4], QatConfig(steps=7, batch=2), checkpoint=place)
    place.write_bytes(b"no checkpoint")
    with pytest.raises(InputError, match="cannot be read"):
        finetune(module, spec, decision, frames[:4], config, checkpoint=place)


def test_no_frames_is_an_error(student: tuple[torch.nn.Module, ModelSpec], decision: QuantDecision) -> None:
    with pytest.raises(CalibrationError, match="needs frames"):
        finetune(*student, decision, [], QatConfig())
    with pytest.raises(InputError, match="at least 1"):
        QatConfig(steps=0)
