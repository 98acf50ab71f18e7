"""Start weights are selected by rule out of a teacher of the right shape, and out of no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tinyusfm_edge.cli.main import main
from tinyusfm_edge.models.checkpoint import load_student_file, load_weights
from tinyusfm_edge.models.student import StudentConfig, build_student
from tinyusfm_edge.models.weight_selection import TEACHER_GRID, TEACHER_WIDTH, select_weights
from tinyusfm_runtime.errors import CheckpointError

CONFIG = StudentConfig(image_size=32)


@pytest.fixture(scope="module")
def teacher() -> dict[str, Tensor]:
    """A random network with the names and shapes of timm's vit_small_patch14_dinov2."""
    generator = torch.Generator().manual_seed(0)
    d = TEACHER_WIDTH
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, TEACHER_GRID**2 + 1, d),
        "patch_embed.proj.weight": (d, 3, 14, 14),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for index in range(12):
        p = f"blocks.{index}."
        shapes |= {p + f"{norm}.{kind}": (d,) for norm in ("norm1", "norm2") for kind in ("weight", "bias")}
        shapes |= {p + "ls1.gamma": (d,), p + "ls2.gamma": (d,)}
        layers = {"attn.qkv": (3 * d, d), "attn.proj": (d, d), "mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, shape in layers.items():
            shapes |= {f"{p}{name}.weight": shape, f"{p}{name}.bias": shape[:1]}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def test_every_backbone_tensor_is_filled(teacher: dict[str, Tensor]) -> None:
    selected = select_weights(teacher, CONFIG)
    own = build_student(CONFIG).backbone.state_dict()
    assert {name: tuple(t.shape) for name, t in selected.items()} == {
        f"backbone.{name}": tuple(t.shape) for name, t in own.items()
    }


def test_channels_are_every_second_one(teacher: dict[str, Tensor]) -> None:
    selected = select_weights(teacher, CONFIG)
    assert torch.equal(selected["backbone.blocks.4.norm1.weight"], teacher["blocks.4.norm1.weight"][::2])
    packed = teacher["blocks.4.attn.qkv.bias"]
    assert torch.equal(selected["backbone.blocks.4.attn.qkv.bias"][:16], packed[0:32:2]), "head 0: first half of head 0"
    assert torch.equal(selected["backbone.blocks.4.attn.qkv.bias"][16:32], packed[32:64:2]), "head 1: its second half"
    keys = selected["backbone.blocks.4.attn.qkv.bias"][192:208]
    assert torch.equal(keys, packed[384:416:2])
    gain = 2.0**0.5
    fc1 = selected["backbone.blocks.0.mlp.fc1.weight"]
    torch.testing.assert_close(fc1, teacher["blocks.0.mlp.fc1.weight"][::2, ::2] * gain)


def test_layer_scale_is_folded(teacher: dict[str, Tensor]) -> None:
    silent = {name: torch.zeros_like(t) if "ls" in name else t for name, t in teacher.items()}
    selected = select_weights(silent, CONFIG)
    assert not selected["backbone.blocks.2.attn.proj.weight"].any()
    assert not selected["backbone.blocks.2.mlp.fc2.bias"].any()


def test_other_teachers_and_students_are_refused(teacher: dict[str, Tensor]) -> None:
    with pytest.raises(CheckpointError, match="width 192, 12 blocks"):
        select_weights(teacher, StudentConfig(heads=6))
    with pytest.raises(CheckpointError, match="position table"):
        select_weights({**teacher, "pos_embed": torch.zeros(1, 197, 384)}, CONFIG)
    with pytest.raises(CheckpointError, match="lacks 'blocks.5.ls1.gamma'"):
        select_weights({k: v for k, v in teacher.items() if k != "blocks.5.ls1.gamma"}, CONFIG)


def test_three_heads_are_every_second_of_the_teachers_whole(teacher: dict[str, Tensor]) -> None:
    selected = select_weights(teacher, StudentConfig(heads=3, image_size=32))
    packed, own = teacher["blocks.4.attn.qkv.bias"], selected["backbone.blocks.4.attn.qkv.bias"]
    assert torch.equal(own[:64], packed[:64])
    assert torch.equal(own[64:128], packed[128:192]), "head 1 is the teacher's head 2"
    assert torch.equal(own[192:256], packed[384:448]), "keys likewise"


def test_command_writes_a_student_file_that_says_where_it_comes_from(
    teacher: dict[str, Tensor], tmp_path: Path
) -> None:
    save_file(teacher, tmp_path / "teacher.safetensors")
    out = tmp_path / "init.safetensors"
    assert main(["select", "--teacher-weights", str(tmp_path / "teacher.safetensors"), "--out", str(out)]) == 0
    found = load_weights(build_student(StudentConfig()), out)
    assert "selected out of a DINOv2" in found.origin
    assert found.missing_heads and all(name.startswith(("neck.", "head.")) for name in found.missing_heads)
    assert load_student_file(out).spec.task.value == "features"
    assert main(["select", "--teacher-weights", str(tmp_path / "none"), "--out", str(out)]) == 2
