"""Every rewrite against the modules it replaces, on random weights with non-trivial norms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.export.students import awkward
from tinyusfm_export.graph import rewrites
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import IMAGENET_MEAN, IMAGENET_STD


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(11)


def close(found: Tensor, wanted: Tensor, rounding: float = 2e-6) -> None:
    """Equal within float32 rounding of the largest value."""
    scale = wanted.abs().max().item()
    assert (found - wanted).abs().max().item() <= rounding * scale, (found - wanted).abs().max().item() / scale


def batch_norm(channels: int) -> nn.BatchNorm2d:
    norm = awkward(nn.Sequential(nn.BatchNorm2d(channels)))[0]  # type: ignore[index]
    assert isinstance(norm, nn.BatchNorm2d)
    return norm


def test_grey_fold_equals_three_normalised_channels() -> None:
    proj = nn.Conv2d(3, 24, 16, 16)
    codes = torch.randint(0, 256, (1, 1, 48, 32)).float()
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    wanted = proj(((codes / 255).expand(1, 3, -1, -1) - mean) / std).flatten(2).transpose(1, 2)
    weight, bias = rewrites.fold_grey(proj, IMAGENET_MEAN, IMAGENET_STD)
    patches = codes.reshape(3, 16, 2, 16).permute(0, 2, 1, 3).reshape(1, 6, 256)
    close(F.linear(patches, weight, bias), wanted)


def test_grey_fold_sees_unequal_channels() -> None:
    proj = nn.Conv2d(3, 24, 16, 16)
    codes = torch.randint(0, 256, (1, 3, 16, 16)).float()
    wanted = proj(codes / 255).flatten(2).transpose(1, 2)
    weight, bias = rewrites.fold_grey(proj, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    assert (F.linear(codes[:, :1].reshape(1, 1, 256), weight, bias) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("proj", [nn.Conv2d(1, 8, 16, 16), nn.Conv2d(3, 8, 16, 8), nn.Conv2d(3, 8, 16, 16, padding=1)])
def test_grey_fold_refuses_what_is_no_patch_embedding(proj: nn.Conv2d) -> None:
    with pytest.raises(InputError, match="3 channels"):
        rewrites.fold_grey(proj, IMAGENET_MEAN, IMAGENET_STD)


def test_layer_norm_affine_moves_into_the_linear() -> None:
    norm, linear = awkward(nn.Sequential(nn.LayerNorm(40, eps=1e-6), nn.Linear(40, 24)))  # type: ignore[misc]
    x = torch.randn(2, 7, 40) * 5
    bare = F.layer_norm(x, (40,), eps=1e-6)
    close(F.linear(bare, *rewrites.fold_layer_norm(norm, linear)), linear(norm(x)))


def test_query_scale_touches_the_query_alone() -> None:
    weight, bias = torch.randn(72, 24), torch.randn(72)
    scaled = rewrites.fold_query_scale((weight, bias), heads=3)
    close(scaled[0][:24], weight[:24] / 8**0.5)
    close(scaled[1][:24], bias[:24] / 8**0.5)
    assert torch.equal(scaled[0][24:], weight[24:]) and torch.equal(scaled[1][24:], bias[24:])


@pytest.mark.parametrize("with_bias", [True, False])
def test_batch_norm_moves_into_the_convolution(with_bias: bool) -> None:
    conv, norm = nn.Conv2d(8, 12, 3, padding=1, bias=with_bias), batch_norm(12)
    x = torch.randn(1, 8, 9, 7)
    close(F.conv2d(x, *rewrites.fold_batch_norm(conv, norm), padding=1), norm(conv(x)))


def test_batch_norm_without_statistics_is_refused() -> None:
    with pytest.raises(InputError, match="statistics"):
        rewrites.fold_batch_norm(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))


@pytest.mark.parametrize("scale", [4.0, 2.0, 1.0])
def test_neck_and_lateral_commute_with_the_resize(scale: float) -> None:
    neck, lateral, norm = nn.Conv2d(32, 8, 1), nn.Conv2d(8, 16, 1), batch_norm(16)
    tokens = torch.randn(1, 25, 32)
    maps = tokens.transpose(1, 2).unflatten(2, (5, 5))
    scaled = F.interpolate(neck(maps), scale_factor=scale, mode="bilinear", align_corners=False)
    merged = F.linear(tokens, *rewrites.merge_neck_lateral(neck, lateral, norm)).transpose(1, 2).unflatten(2, (5, 5))
    found = F.interpolate(merged, scale_factor=scale, mode="bilinear", align_corners=False)
    close(found, norm(lateral(scaled)))


@pytest.mark.parametrize("side", [14, 5])
def test_bilinear_halving_is_the_mean_of_four(side: int) -> None:
    maps = torch.randn(1, 6, side, side)
    close(F.avg_pool2d(maps, 2), F.interpolate(maps, scale_factor=0.5, mode="bilinear", align_corners=False))


def test_neck_merge_refuses_wide_kernels() -> None:
    with pytest.raises(InputError, match="1x1"):
        rewrites.merge_neck_lateral(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1), batch_norm(8))


def test_classifier_per_level_equals_one_behind_the_sum() -> None:
    classifier = nn.Conv2d(16, 3, 1)
    levels = [torch.randn(1, 16, side, side) for side in (20, 10, 5, 2)]

    def up(x: Tensor) -> Tensor:
        return F.interpolate(x, size=(20, 20), mode="bilinear", align_corners=False)

    parts = rewrites.split_classifier(classifier, 4)
    found = sum(up(F.conv2d(level, *part)) for level, part in zip(levels, parts, strict=True))
    assert isinstance(found, Tensor)
    close(found, classifier(torch.stack([up(level) for level in levels]).sum(0)))


@pytest.mark.parametrize("size, out", [(5, 20), (56, 224), (7, 15), (2, 5), (14, 7), (1, 4), (3, 3)])
def test_bilinear_matrix_is_the_resize(size: int, out: int) -> None:
    x = torch.randn(2, 3, size, size)
    matrix = rewrites.bilinear_matrix(size, out)
    close(matrix @ x @ matrix.T, F.interpolate(x, size=(out, out), mode="bilinear", align_corners=False))
    assert torch.allclose(matrix.sum(1), torch.ones(out), atol=1e-6)


def test_token_table_keeps_the_sum_of_its_parts() -> None:
    cls_token, positions, bias = torch.randn(1, 1, 12), torch.randn(1, 26, 12), torch.randn(12)
    patches = torch.randn(1, 25, 12)
    first, offsets = rewrites.token_table(cls_token, positions, bias)
    close(torch.cat([first, patches + offsets], 1), torch.cat([cls_token, patches + bias], 1) + positions)
