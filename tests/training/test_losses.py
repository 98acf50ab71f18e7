"""Losses are zero where they must be, positive elsewhere, and agree with torch's own where torch has one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tinyusfm_edge.training.adapt.losses import (
    class_loss,
    feature_distillation,
    logit_distillation,
    mask_loss,
    soft_dice_loss,
)


def test_dice_loss_is_zero_for_a_sure_and_right_answer() -> None:
    target = torch.zeros(2, 1, 8, 8)
    target[:, :, 2:6] = 1
    assert soft_dice_loss(40 * (target - 0.5), target) < 1e-4
    assert soft_dice_loss(-40 * (target - 0.5), target) > 0.9
    assert mask_loss(40 * (target - 0.5), target) < 1e-3


@given(st.integers(0, 10**6), st.floats(0.5, 8.0), st.integers(2, 5))
@settings(max_examples=30, deadline=None)
def test_logit_distillation_is_the_tempered_divergence(seed: int, temperature: float, classes: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, classes, generator=generator) * 3 for _ in range(2))
    found = logit_distillation(student, teacher, temperature)
    log_t, log_s = (F.log_softmax(x / temperature, 1) for x in (teacher, student))
    wanted = temperature**2 * F.kl_div(log_s, log_t, reduction="batchmean", log_target=True)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert logit_distillation(teacher, teacher, temperature) < 1e-5


def test_one_channel_is_a_bernoulli_answer_equal_to_two_classes() -> None:
    student, teacher = torch.randn(2, 1, 5, 5), torch.randn(2, 1, 5, 5)
    two = [torch.cat([torch.zeros_like(x), x], 1) for x in (student, teacher)]
    torch.testing.assert_close(logit_distillation(student, teacher, 4.0), logit_distillation(*two, 4.0))


def test_no_gradient_reaches_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    logit_distillation(student, teacher, 2.0).backward()
    assert teacher.grad is None and student.grad is not None
    tokens, theirs = torch.randn(2, 4, 3, requires_grad=True), torch.randn(2, 4, 3, requires_grad=True)
    feature_distillation(tokens, theirs).backward()
    assert theirs.grad is None and tokens.grad is not None


def test_feature_distillation_sees_direction_only() -> None:
    x = torch.randn(2, 4, 8)
    assert feature_distillation(3 * x, x) == pytest.approx(0.0, abs=1e-6)
    assert feature_distillation(-x, x) == pytest.approx(2.0, abs=1e-5)


def test_class_weights_count() -> None:
    logits, target = torch.tensor([[4.0, 0.0], [4.0, 0.0]]), torch.tensor([0, 1])
    plain = class_loss(logits, target, None, 0.0)
    heavy = class_loss(logits, target, torch.tensor([0.1, 1.9]), 0.0)
    assert heavy > plain
