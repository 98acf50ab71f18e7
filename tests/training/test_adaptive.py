"""Masks that follow the student, attention relations, TransKD's mixer and assistant: each does what its source says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.training.small_runs import random_teacher, small_config
from tinyusfm_edge.data.images import list_rows
from tinyusfm_edge.models.encoder import EncoderShape
from tinyusfm_edge.models.student import Attention
from tinyusfm_edge.models.teachers.dinov2 import Dinov2
from tinyusfm_edge.training.adapt.transkd import EmbeddingAssistant, GlobalLocalMixer
from tinyusfm_edge.training.pretrain.adaptive import AdaptiveMask, choose_masked
from tinyusfm_edge.training.pretrain.relation import RelationLoss, attention_logits
from tinyusfm_edge.training.pretrain.run import DistillTeacher, pretrain
from tinyusfm_edge.training.trainer.loop import read_scalars
from tinyusfm_runtime.errors import InputError


def test_the_share_of_guided_patches_is_what_was_asked_for() -> None:
    torch.manual_seed(0)
    score = torch.arange(100.0).repeat(64, 1)
    for share in (0.0, 0.5, 1.0):
        mask = choose_masked(score, 0.6, share)
        assert bool((mask.sum(1) == 60).all())
        top = mask[:, -60:].float().mean()
        assert float(top) == pytest.approx(share + (1 - share) * 0.6, abs=0.15)
    assert bool(choose_masked(score, 0.6, 1.0)[:, -60:].all())


def test_hard_places_are_hidden_more_often_as_the_run_goes_on() -> None:
    """The student is wrong in one corner only; late in the run what the teacher finds salient decides."""
    torch.manual_seed(0)
    chooser = AdaptiveMask(49, 0.4, 100)
    hard, tokens = torch.zeros(8, 49), torch.ones(64, 49, 6)
    hard[:, :10] = 1.0
    tokens[:, -10:] = 3.0
    early_share = chooser(tokens)[:, :10].float().mean()
    for _ in range(30):
        chooser.remember(hard)
    assert float(chooser(tokens)[:, :10].float().mean()) > float(early_share) + 0.1
    for _ in range(70):
        chooser.remember(hard)
    assert bool(chooser(tokens)[:, -10:].float().mean() > 0.99)


def test_relations_are_zero_for_equal_attention_and_head_counts_may_differ() -> None:
    torch.manual_seed(0)
    attention, x = Attention(24, 3), torch.randn(2, 5, 24)
    logits = attention_logits(attention, x)
    weights = logits.softmax(-1)
    qkv = attention.qkv(x).reshape(2, 5, 3, 3, 8).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(weights, (qkv[0] * 8**-0.5 @ qkv[1].transpose(-1, -2)).softmax(-1))
    same = RelationLoss(3, 3)
    torch.nn.init.zeros_(same.adapt.weight)
    torch.nn.init.zeros_(same.adapt.bias)
    with torch.no_grad():
        same.adapt.weight[range(3), range(3)] = 1.0
    assert float(same(logits, logits).detach()) == pytest.approx(0.0, abs=1e-6)
    teacher = Dinov2(EncoderShape(width=24, depth=1, heads=6, patch=14, grid=2, scale="timm"))
    theirs = attention_logits(teacher.blocks[0].attn, x)  # type: ignore[arg-type]
    loss = RelationLoss(3, 6)(logits, theirs)
    assert float(loss.detach()) > 0
    loss.backward()
    assert attention.qkv.weight.grad is not None


def test_a_run_learns_relations_of_a_live_teacher_and_masks_adapt(table: Path, tmp_path: Path) -> None:
    teacher = DistillTeacher(name="dinov2_vits14", weights=random_teacher(tmp_path))
    options = {"teacher": teacher, "cache": tmp_path / "cache", "device": "cpu", "quiet": True, "short": True}
    live = small_config("ours", "variants=0", "lambda_relation=1.0", "steps=3")
    pretrain(list_rows([table]), live, tmp_path / "relation", **options)  # type: ignore[arg-type]
    relations = [entry["relation"] for entry in read_scalars(tmp_path / "relation")]
    assert len(relations) == 3 and min(relations) > 0
    adaptive = small_config("adaptive-masks", "steps=3")
    pretrain(list_rows([table]), adaptive, tmp_path / "adaptive", **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="variants=0"):
        small_config("ours", "lambda_relation=1.0")


def test_mixer_and_assistant_reach_the_teachers_shape_and_learn() -> None:
    torch.manual_seed(0)
    mixer, assistant = GlobalLocalMixer(16, 24), EmbeddingAssistant(16, 24)
    assert mixer.weights.tolist() == [1.0, 1.0]
    tokens, image = torch.randn(2, 4, 16), torch.randn(2, 3, 32, 32)
    assert mixer(tokens).shape == (2, 4, 24)
    assert assistant(tokens, image).shape == (2, 4, 24)
    moved = assistant(tokens, image + 1)
    assert not torch.allclose(moved, assistant(tokens, image))
    (mixer(tokens).square().mean() + moved.square().mean()).backward()
    assert all(p.grad is not None for module in (mixer, assistant) for p in module.parameters())
