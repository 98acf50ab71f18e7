"""The student is the published model: counts, shapes, variants, and it learns."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tinyusfm_edge.models.macs import count_macs, count_parameters, static_card
from tinyusfm_edge.models.student import TAPS, Attention, StudentConfig, build_student
from tinyusfm_runtime.errors import InputError

BACKBONE_PARAMETERS = 5_524_416
SEGMENTATION_PARAMETERS = 6_179_073
BACKBONE_MACS = 1_253_491_200


def test_parameter_counts_are_the_published_ones() -> None:
    student = build_student(StudentConfig())
    assert count_parameters(student.backbone) == BACKBONE_PARAMETERS
    assert count_parameters(student) == SEGMENTATION_PARAMETERS


def test_backbone_macs_are_the_published_ones() -> None:
    macs = count_macs(build_student(StudentConfig()).backbone, 224)
    assert macs.total == BACKBONE_MACS
    assert macs.linear + macs.convolution == pytest.approx(1.0747e9, rel=1e-4)
    assert macs.attention == 12 * 2 * 197 * 197 * 192


def test_counting_leaves_the_student_alone() -> None:
    student = build_student(StudentConfig(image_size=32))
    count_macs(student, 32)
    assert not any(part._forward_hooks for part in student.modules())
    assert all(not p.is_meta for p in student.parameters())


def test_macs_of_known_layers() -> None:
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.nn.Flatten()
    )
    assert count_macs(net, 4).convolution == 16 * 3 * 8 * 9 + 16 * 8 * 9
    attention = torch.nn.Sequential(torch.nn.Flatten(2), Attention(16, 4))
    macs = count_macs(attention, 4)  # a 1x3x4x4 image as 3 tokens of 16
    assert (macs.linear, macs.attention) == (3 * 16 * 48 + 3 * 16 * 16, 2 * 3 * 3 * 16)


def test_static_card_adds_up() -> None:
    card = static_card(build_student(StudentConfig(seg_head="lite")))
    assert card["macs"] == card["macs_linear"] + card["macs_convolution"] + card["macs_attention"]
    assert card["macs"] == sum(card["macs_by_part"].values())
    official = static_card(build_student(StudentConfig()))
    assert official["gflops"] == pytest.approx(3.80, abs=0.01)
    assert card["macs"] < official["macs"] - 4e8, "the light head saves the 3x3 convolution at 56x56"
    assert (
        static_card(build_student(StudentConfig(heads=3)))["attention_map_elements"] * 4
        == (official["attention_map_elements"])
    )


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        (StudentConfig(image_size=64), (2, 1, 64, 64)),
        (StudentConfig(image_size=64, num_classes=4), (2, 4, 64, 64)),
        (StudentConfig(image_size=64, seg_head="lite"), (2, 1, 64, 64)),
        (StudentConfig(image_size=64, heads=3), (2, 1, 64, 64)),
        (StudentConfig(image_size=48), (2, 1, 48, 48)),
        (StudentConfig(image_size=32, width=96, heads=6), (2, 1, 32, 32)),
        (StudentConfig(image_size=64, task="classify", num_classes=3), (2, 3)),
        (StudentConfig(image_size=64, task="classify", num_classes=1, depth=4), (2, 1)),
        (StudentConfig(image_size=64, task="features"), (2, 192, 4, 4)),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_output_shapes(config: StudentConfig, shape: tuple[int, ...]) -> None:
    student = build_student(config).eval()
    with torch.inference_mode():
        out = student(torch.randn(2, 3, config.image_size, config.image_size))
    assert out.shape == shape
    assert out.shape[1] == config.outputs
    assert torch.isfinite(out).all()


def test_three_heads_have_the_same_weights_and_another_answer() -> None:
    torch.manual_seed(0)
    twelve = build_student(StudentConfig(image_size=64, task="features")).eval()
    three = build_student(StudentConfig(image_size=64, task="features", heads=3)).eval()
    three.load_state_dict(twelve.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        assert not torch.allclose(twelve(image), three(image), atol=1e-3)


def test_training_attention_equals_fused_attention() -> None:
    torch.manual_seed(0)
    attention = Attention(48, 6)
    x = torch.randn(2, 9, 48)
    with torch.no_grad():
        written_out = attention.train()(x)
        fused = attention.eval()(x)
    torch.testing.assert_close(written_out, fused, atol=1e-5, rtol=1e-5)


def test_taps_are_the_outputs_of_the_named_blocks() -> None:
    torch.manual_seed(0)
    backbone = build_student(StudentConfig(image_size=32, task="features")).backbone.eval()
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        taps = backbone.taps(image)
        x = backbone.embed(image)
        for index, block in enumerate(backbone.blocks):
            x = block(x)
            if index in TAPS:
                torch.testing.assert_close(taps[TAPS.index(index)], x)


def test_stochastic_depth_grows_linearly_and_is_off_in_evaluation() -> None:
    student = build_student(StudentConfig(image_size=32, drop_path=0.11))
    rates = [block.drop_path for block in student.backbone.blocks]
    assert rates == pytest.approx([0.01 * index for index in range(12)])
    image = torch.randn(1, 3, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(student.eval()(image), student(image))


@pytest.mark.parametrize(
    "values",
    [
        {"heads": 5},
        {"heads": 0},
        {"width": 190, "heads": 10},
        {"image_size": 100},
        {"image_size": 1 << 20},
        {"image_size": "224"},
        {"depth": 6},
        {"num_classes": 1},
        {"num_classes": 1 << 30},
        {"num_classes": True},
        {"drop_path": 1.0},
        {"drop_path": "much"},
        {"task": "detect"},
        {"seg_head": "big"},
        {"width": 10**9, "heads": 1},
    ],
    ids=str,
)
def test_impossible_configs_are_refused(values: dict[str, object]) -> None:
    with pytest.raises(InputError):
        StudentConfig.from_json(values)


def test_config_survives_json_and_unknown_keys_do_not() -> None:
    config = StudentConfig(heads=3, seg_head="lite", num_classes=3)
    assert StudentConfig.from_json(config.to_json()) == config
    with pytest.raises(InputError, match="unknown keys"):
        StudentConfig.from_json({**config.to_json(), "patch": 8})
    with pytest.raises(InputError, match="table"):
        StudentConfig.from_json([])  # type: ignore[arg-type]


def test_overfits_eight_images() -> None:
    torch.manual_seed(0)
    rows, cols = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    centres = torch.rand(8, 2) * 32 + 16
    masks = torch.stack([((rows - r) ** 2 + (cols - c) ** 2 < 144).float() for r, c in centres])[:, None]
    images = (masks + 0.3 * torch.randn(8, 1, 64, 64)).expand(-1, 3, -1, -1)
    student = build_student(StudentConfig(image_size=64, width=48, heads=3, drop_path=0.0)).train()
    optimiser = torch.optim.AdamW(student.parameters(), lr=3e-3)
    for _ in range(60):
        loss = F.binary_cross_entropy_with_logits(student(images), masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    with torch.inference_mode():
        found = student.eval()(images) > 0
    overlap = 2 * (found & (masks > 0)).sum() / (found.sum() + masks.sum())
    assert overlap > 0.95
