"""The LoRA teacher: splitting is exact, fresh adapters and merging change nothing, the base is frozen."""

from __future__ import annotations

import pytest
import torch

from tests.needs import needs
from tinyusfm_edge.models.encoder import EncoderShape
from tinyusfm_edge.models.teachers.dinov2 import Dinov2
from tinyusfm_edge.models.teachers.usfm_beit import UsfmBeit
from tinyusfm_edge.models.teachers.vit_plain import PlainVit
from tinyusfm_edge.training.adapt.lora import TaskTeacher, inject_adapters, merge_adapters, split_attention
from tinyusfm_runtime.errors import InputError

needs("peft", reason="install tinyusfm-edge[train]")

SHAPE = EncoderShape(width=48, depth=12, heads=3, patch=14, grid=4, scale="timm")


def randomised(net: torch.nn.Module, like: str = "") -> None:
    for name, parameter in net.named_parameters():
        if like in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.fixture(scope="module")
def encoder() -> Dinov2:
    torch.manual_seed(0)
    net = Dinov2(SHAPE).eval()
    randomised(net)
    return net


def last(net: Dinov2) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return net.sequence(torch.randn(2, 3, 28, 28), (12,))[0]


def test_splitting_q_k_and_v_is_exact_and_leaves_the_original(encoder: Dinov2) -> None:
    before = last(encoder)
    torch.testing.assert_close(last(split_attention(encoder)), before, atol=1e-5, rtol=1e-5)
    assert hasattr(encoder.blocks[0].attn, "qkv")


def test_fresh_adapters_change_nothing_and_trained_ones_merge_exactly(encoder: Dinov2) -> None:
    net = split_attention(encoder)
    inject_adapters(net, 4)
    torch.testing.assert_close(last(net), last(encoder), atol=1e-5, rtol=1e-5)
    randomised(net, "lora_")
    adapted = last(net)
    assert not torch.allclose(adapted, last(encoder), atol=1e-2)
    merged = merge_adapters(net)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]
    assert float((last(merged) - adapted).abs().max()) < 1e-5 * float(adapted.abs().max())  # type: ignore[arg-type]
    torch.testing.assert_close(last(net), adapted, msg="merging works on a copy")


def test_merged_weight_is_w_plus_two_b_a(encoder: Dinov2) -> None:
    net = split_attention(encoder)
    inject_adapters(net, 2)
    randomised(net, "lora_")
    layer = net.blocks[3].attn.q
    want = layer.base_layer.weight + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    merged = merge_adapters(net)
    torch.testing.assert_close(merged.blocks[3].attn.q.weight, want)  # type: ignore[union-attr,index]


@pytest.mark.parametrize(("task", "outputs", "shape"), [("segment", 1, (2, 1, 64, 64)), ("classify", 3, (2, 3))])
def test_only_adapters_and_head_learn(encoder: Dinov2, task: str, outputs: int, shape: tuple[int, ...]) -> None:
    teacher = TaskTeacher(encoder, task=task, outputs=outputs, image_hw=(64, 64), rank=2)
    logits, tokens = teacher.seen(torch.randn(2, 3, 64, 64))
    assert logits.shape == shape
    assert [t.shape for t in tokens] == [(2, 16, 48)] * 4, "on the student's grid of 4x4"
    assert teacher.patches(torch.randn(2, 3, 64, 64)).shape == (2, 16, 48)
    learning = {name for name, p in teacher.named_parameters() if p.requires_grad}
    inside = {name for name in learning if name.startswith("encoder.")}
    assert inside and all(".q.lora_" in name or ".v.lora_" in name for name in inside)
    assert len(inside) == 12 * 2 * 2, "A and B of q and v in every block"
    logits.sum().backward()
    frozen = [p.grad for name, p in teacher.named_parameters() if name not in learning]
    assert all(gradient is None for gradient in frozen)


def test_without_a_rank_only_the_head_learns(encoder: Dinov2) -> None:
    teacher = TaskTeacher(encoder, task="classify", outputs=2, image_hw=(32, 32), rank=0)
    assert {name.split(".")[0] for name, p in teacher.named_parameters() if p.requires_grad} == {"norm", "classifier"}
    with pytest.raises(InputError, match="rank"):
        inject_adapters(split_attention(encoder), 0)


@pytest.mark.parametrize("kind", ["plain", "usfm"])
def test_other_encoders_are_adapted_alike(kind: str) -> None:
    """Splitting and merging change nothing in a plain ViT and in USFM with its relative positions."""
    torch.manual_seed(0)
    if kind == "plain":
        net = PlainVit(EncoderShape(width=48, depth=12, heads=3, patch=16, grid=2)).eval()
    else:
        net = UsfmBeit(EncoderShape(width=48, depth=12, heads=3, patch=16, grid=2, scale="beit", bias="qv")).eval()  # type: ignore[assignment]
    randomised(net)
    image = torch.randn(2, 3, 32, 32)
    before = net.tokens(image, (12,))[0]
    teacher = TaskTeacher(net, task="segment", outputs=1, image_hw=(32, 32), rank=2)
    torch.testing.assert_close(teacher.encoder.tokens(image, (12,))[0], before, atol=1e-5, rtol=1e-5)
    randomised(teacher.encoder, "lora_")
    adapted = teacher.encoder.tokens(image, (12,))[0]
    assert not torch.allclose(adapted, before, atol=1e-2)
    merged = merge_adapters(teacher.encoder)
    torch.testing.assert_close(merged.tokens(image, (12,))[0], adapted, atol=1e-4, rtol=1e-4)  # type: ignore[operator]
    assert teacher(image).shape == (2, 1, 32, 32)
