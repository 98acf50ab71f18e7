"""Scales by depth; that they act in a real run is tested in test_adapt.py."""

from __future__ import annotations

import pytest

from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.training.adapt.layer_decay import layer_of, layer_scale
from tinyusfm_edge.training.trainer.loop import plain_groups

SMALL = StudentConfig(image_size=32, width=48, heads=3)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("backbone.pos_embed", 0),
        ("backbone.cls_token", 0),
        ("backbone.patch_embed.proj.weight", 0),
        ("backbone.blocks.0.attn.qkv.weight", 1),
        ("model.backbone.blocks.11.norm2.bias", 12),
        ("backbone.norm.weight", 13),
        ("model.neck.convs.0.weight", 13),
        ("head.classifier.bias", 13),
        ("guide.transkd.align.weight", 13),
        ("encoder.blocks.3.attn.q.lora_A.default.weight", 13),
    ],
)
def test_depth_is_read_off_the_name(name: str, layer: int) -> None:
    assert layer_of(name, 12) == layer


def test_scales_fall_geometrically() -> None:
    assert layer_scale("head.weight", depth=12, layer_decay=0.8) == 1.0
    assert layer_scale("backbone.blocks.11.mlp.fc1.weight", depth=12, layer_decay=0.8) == pytest.approx(0.8)
    assert layer_scale("backbone.pos_embed", depth=12, layer_decay=0.8) == pytest.approx(0.8**13)
    assert layer_scale("backbone.pos_embed", depth=12, layer_decay=1.0) == 1.0


def test_weight_decay_spares_vectors_and_positions() -> None:
    model = build_student(SMALL)
    groups = plain_groups(model, 0.05)
    spared = {id(p) for g in groups if g.weight_decay == 0.0 for p in g.parameters}
    for name, p in model.named_parameters():
        assert (id(p) in spared) == (p.ndim < 2 or name.endswith(("pos_embed", "cls_token"))), name
