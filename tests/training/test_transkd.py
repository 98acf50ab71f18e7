"""TransKD's terms by definition: shapes, the context loss by hand, the softmax of two, one image alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinyusfm_edge.training.adapt.transkd import SelectiveFusion, TransKd, context_loss


def test_context_loss_by_hand() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7, 7), torch.randn(2, 5, 7, 7)
    want = F.mse_loss(a, b)
    for weight, side in ((0.5, 4), (0.25, 2), (0.125, 1)):
        want = want + weight * F.mse_loss(F.adaptive_avg_pool2d(a, side), F.adaptive_avg_pool2d(b, side))
    torch.testing.assert_close(context_loss(a, b), want / 1.875)
    assert context_loss(a, a) == 0.0
    small = context_loss(a[..., :2, :2], b[..., :2, :2])
    pooled = F.mse_loss(a[..., :2, :2].mean((2, 3)), b[..., :2, :2].mean((2, 3)))
    torch.testing.assert_close(small, (F.mse_loss(a[..., :2, :2], b[..., :2, :2]) + 0.5 * pooled) / 1.5)


def test_fusion_is_a_convex_mixture_channel_by_channel() -> None:
    torch.manual_seed(0)
    fusion = SelectiveFusion(12, 24, deepest=False).eval()
    deeper = torch.randn(3, 64, 5, 5)
    with torch.no_grad():
        out, fused = fusion(torch.randn(3, 12, 5, 5), deeper)
        same = fusion.enter(torch.randn(3, 12, 5, 5))
    assert out.shape == (3, 24, 5, 5)
    assert fused.shape == (3, 64, 5, 5)
    with torch.no_grad():
        stage = torch.randn(3, 12, 5, 5)
        x = fusion.enter(stage)
        _, mixed = fusion(stage, x)
    torch.testing.assert_close(mixed, x, msg="a mixture of a map with itself is that map")
    assert same.shape == deeper.shape


def test_one_image_trains_without_batch_statistics() -> None:
    fusion = SelectiveFusion(12, 24, deepest=False).train()
    out, _ = fusion(torch.randn(1, 12, 5, 5), torch.randn(1, 64, 5, 5))
    assert torch.isfinite(out).all()


def test_the_deepest_stage_reaches_every_shallower_one() -> None:
    torch.manual_seed(0)
    net = TransKd(12, 24, 4).eval()
    stages = [torch.randn(2, 12, 4, 4) for _ in range(4)]
    before = net.fuse(stages)
    changed = net.fuse([*stages[:3], stages[3] + 1.0])
    assert all(not torch.allclose(a, b) for a, b in zip(before, changed, strict=True))
    shallow = net.fuse([stages[0] + 1.0, *stages[1:]])
    assert not torch.allclose(before[0], shallow[0])
    assert all(torch.allclose(a, b) for a, b in zip(before[1:], shallow[1:], strict=True))


def test_terms_pull_the_student_towards_the_teacher() -> None:
    torch.manual_seed(0)
    net = TransKd(12, 24, 2)
    stages = [torch.randn(4, 12, 4, 4) for _ in range(2)]
    targets = [torch.randn(4, 24, 4, 4) for _ in range(2)]
    tokens, theirs = torch.randn(4, 16, 12), torch.randn(4, 16, 24)
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        loss = net.context(stages, targets) + net.patches(tokens, theirs)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    aligned = F.linear(tokens, net.align.weight, net.align.bias).detach()
    assert float(net.patches(tokens, aligned).detach()) == pytest.approx(0.0, abs=1e-10)


def test_the_weight_halves_after_each_pool_that_is_used() -> None:
    """On a 4x4 map the pools are 2 and 1: (m + p2 / 2 + p1 / 4) / 1.75, as in the source."""
    mine, theirs = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    whole = F.mse_loss(mine, theirs)
    pools = [F.mse_loss(F.adaptive_avg_pool2d(mine, n), F.adaptive_avg_pool2d(theirs, n)) for n in (2, 1)]
    torch.testing.assert_close(context_loss(mine, theirs), (whole + pools[0] / 2 + pools[1] / 4) / 1.75)
