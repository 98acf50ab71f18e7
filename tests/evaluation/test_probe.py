"""The token probe reads off what is there, and nothing where nothing is."""

from __future__ import annotations

import pytest
import torch

from tinyusfm_edge.evaluation.probe import coverage, probe
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_runtime.errors import InputError

CONFIG = StudentConfig(task="features", image_size=64, width=32, heads=2, depth=2, drop_path=0.0)


def discs(seed: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows, cols = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    centres = torch.rand(count, 2, generator=generator) * 40 + 12
    masks = torch.stack([((rows - r) ** 2 + (cols - c) ** 2 < 14**2).float() for r, c in centres])
    return masks[:, None].expand(-1, 3, -1, -1).clone(), masks


def test_what_the_tokens_hold_is_found_and_noise_is_not() -> None:
    torch.manual_seed(0)
    student = build_student(CONFIG)
    train, held = discs(1, 60), discs(2, 30)
    scores = probe(student, train, held, (1, 2))
    assert [score.block for score in scores] == [1, 2] and min(score.r2 for score in scores) > 0.5
    shuffled = held[1][torch.randperm(30, generator=torch.Generator().manual_seed(3))]
    assert probe(student, train, (held[0], shuffled), (2,))[0].r2 < 0.3


def test_coverage_is_the_share_of_a_patch() -> None:
    mask = torch.zeros(1, 32, 32)
    mask[0, :16, :8] = 1
    assert coverage(mask).tolist() == [[0.5, 0.0, 0.0, 0.0]]


def test_nothing_to_explain_is_refused() -> None:
    student, train = build_student(CONFIG), discs(1, 4)
    with pytest.raises(InputError, match="all alike"):
        probe(student, train, (train[0], torch.zeros_like(train[1])), (2,))
