"""Distillation: weights in [0, 1], 1 for equal features; losses look where they should; ablations differ; it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training.small_runs import small_config
from tinyusfm_edge.training.pretrain.balance import Balance, pull2
from tinyusfm_edge.training.pretrain.config import ABLATIONS, DistillConfig, read_config, to_json
from tinyusfm_edge.training.pretrain.distill import (
    DistillObjective,
    consistency,
    correlation,
    even_out,
    frequency_loss,
    inactive_stages,
    no_better_than_mean,
    spatial_loss,
    weighted_distance,
)
from tinyusfm_edge.training.pretrain.mae import MaeObjective, patches_of
from tinyusfm_edge.training.pretrain.masking import draw_bands, draw_spatial, pixels_of, removed_frequencies
from tinyusfm_edge.training.pretrain.standard import measure_standards
from tinyusfm_edge.training.pretrain.teacher_bank import plain_norm, regrid
from tinyusfm_edge.training.pretrain.views import ViewConfig, draw_views
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.phantom import make_phantom

SEEDS = st.integers(0, 2**40)


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(SEEDS, st.floats(0, 1))
@settings(max_examples=30, deadline=None)
def test_weights_lie_between_floor_and_one_and_carry_no_gradient(seed: int, floor: float) -> None:
    one, two = tokens(seed, 2, 5, 8).requires_grad_(), tokens(seed + 1, 2, 5, 8)
    weight = consistency(one, two, floor)
    assert weight.shape == (2, 5)
    assert not weight.requires_grad
    assert floor - 1e-6 <= float(weight.min()) <= float(weight.max()) <= 1
    same = consistency(one, one, floor)
    torch.testing.assert_close(same, torch.ones(2, 5), atol=1e-6, rtol=0)
    assert float(consistency(one, -one, 0.0).max()) == 0


def test_layer_norm_uncovers_what_huge_channels_hide() -> None:
    """Raw tokens with one huge common channel agree about everything; normalised ones do not."""
    one, two = tokens(1, 1, 50, 64), tokens(2, 1, 50, 64)
    one[..., 0] = two[..., 0] = 300.0
    assert float(consistency(one, two).min()) > 0.95
    one[..., 0] = two[..., 0] = 0.0
    assert float(consistency(plain_norm(one), plain_norm(two)).mean()) < 0.3


def test_uniform_weights_give_the_plain_mean_and_zero_weights_hide_tokens() -> None:
    student, target = tokens(1, 3, 4, 8), tokens(2, 3, 4, 8)
    plain = torch.nn.functional.smooth_l1_loss(student, target, beta=2.0)
    uniform = weighted_distance(student, target, torch.full((3, 4), 0.3), beta=2.0, dynamic_scale=False)
    torch.testing.assert_close(uniform, plain)
    scaled = weighted_distance(student, target, torch.full((3, 4), 0.3), beta=2.0, dynamic_scale=True)
    torch.testing.assert_close(scaled, 0.3 * plain)
    weight = torch.tensor([[1.0, 1, 0, 0]]).expand(3, 4)
    spoilt = target.clone()
    spoilt[:, 2:] = 99
    torch.testing.assert_close(
        weighted_distance(student, spoilt, weight, beta=2.0, dynamic_scale=False),
        torch.nn.functional.smooth_l1_loss(student[:, :2], target[:, :2], beta=2.0),
    )
    assert math.isfinite(weighted_distance(student, target, torch.zeros(3, 4), beta=2.0, dynamic_scale=False))


def test_spatial_loss_looks_at_masked_pixels_only() -> None:
    mask = draw_spatial(ViewConfig().mask, 64, torch.Generator().manual_seed(1))[None]
    target = torch.rand(1, 1, 64, 64)
    wrong = torch.where(pixels_of(mask), target, target + 5)
    assert float(spatial_loss(wrong, target, mask)) == 0
    assert float(spatial_loss(torch.where(pixels_of(mask), target + 2, target), target, mask)) == pytest.approx(2)


def test_frequency_loss_looks_at_removed_bands_only() -> None:
    config = ViewConfig(image_size=64)
    bands = draw_bands(config.mask, torch.Generator().manual_seed(1))[None]
    removed = removed_frequencies(config.mask, 64, bands)
    target = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
    spectrum = torch.fft.rfft2(target)
    noise = torch.fft.rfft2(torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(3)))
    elsewhere = torch.fft.irfft2(torch.where(removed, spectrum, noise), s=(64, 64))
    assert float(frequency_loss(elsewhere, target, removed)) < 1e-3
    there = torch.fft.irfft2(torch.where(removed, noise, spectrum), s=(64, 64))
    assert float(frequency_loss(there, target, removed)) > 0.1


def test_regridding_keeps_constant_maps_and_means() -> None:
    flat = torch.ones(2, 64, 3)
    torch.testing.assert_close(regrid(flat, 7), torch.ones(2, 49, 3))
    ramp = torch.linspace(-1, 1, 16)[:, None].expand(16, 16).reshape(1, 256, 1)
    smaller = regrid(ramp.contiguous(), 14).view(14, 14)
    assert smaller.shape == (14, 14)
    assert bool((smaller[1:] > smaller[:-1]).all())
    torch.testing.assert_close(smaller.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    with pytest.raises(InputError, match="square grid"):
        regrid(torch.ones(1, 60, 2), 7)


def batch_of(config: DistillConfig, count: int = 4, width: int = 24) -> dict[str, object]:
    pixels = [make_phantom(i, height=64, width=64).frame.pixels for i in range(count)]
    views = draw_views(pixels, list(range(count)), config.view)
    patches = config.built_student.image_size // 16
    order = torch.stack([torch.randperm(patches**2, generator=torch.Generator().manual_seed(i)) for i in range(count)])
    teacher = {
        kind: [plain_norm(tokens(10 * i + layer, count, patches**2, width)) for layer in config.layers]
        for i, kind in enumerate(("spatial", "frequency", "clean"))
    }
    return {
        "image": views.image_B1HW,
        "mask": views.mask_Bhw,
        "bands": views.bands_BK,
        "order": order,
        **({"kept": order[:, : max(1, round(config.keep * patches**2))]} if config.keep < 1 else {}),
        "teacher": teacher,
    }


@pytest.mark.parametrize("name", sorted(set(ABLATIONS) - {"dino"}))
def test_every_ablation_computes_its_own_loss_and_trains_every_parameter(name: str) -> None:
    config = small_config(name)
    torch.manual_seed(0)
    objective = MaeObjective(config) if config.method == "mae" else DistillObjective(config, (24,) * len(config.layers))
    loss, scalars = objective(batch_of(config))
    loss.backward()
    without = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, "a parameter without a gradient stops DDP"
    expected = {
        "ours": {"kd", "rebuild_spatial", "rebuild_frequency", "weight_mean/1", "weight_spread/2"},
        "uniform": {"kd", "rebuild_spatial", "rebuild_frequency"},
        "spatial": {"kd", "rebuild_spatial"},
        "frequency": {"kd", "rebuild_frequency"},
        "no-reconstruction": {"kd", "weight_mean/1"},
        "last-layer": {"kd", "weight_mean/2", "rebuild_spatial"},
        "mae": {"rebuild_mae"},
        "feature-kd": {"kd"},
        "dynamic-scale": {"kd", "weight_mean/1", "rebuild_spatial"},
        "unmasked": {"kd", "kd_of_mean"},
        "adaptive-masks": {"kd", "rebuild_spatial"},
        "masked-views": {"kd", "rebuild_spatial", "rebuild_frequency", "weight_mean/1"},
        "masked-targets": {"kd", "weight_mean/1", "rebuild_spatial"},
        "raw-targets": {"kd", "weight_mean/1", "rebuild_spatial"},
        "weights-everywhere": {"kd", "mask_correlation/1", "rebuild_spatial"},
    }[name]
    assert expected <= set(scalars)
    if name in ("spatial", "frequency", "mae", "feature-kd", "uniform", "unmasked", "adaptive-masks"):
        assert not [key for key in scalars if key.startswith("weight_")]
    if name in ("no-reconstruction", "unmasked"):
        assert not [key for key in scalars if key.startswith("rebuild")]


def test_losses_of_a_batch_are_means_over_its_images() -> None:
    """What makes two processes see one process's curve."""
    for name in ("ours", "mae", "dynamic-scale"):
        config = small_config(name)
        torch.manual_seed(0)
        objective = (
            MaeObjective(config) if config.method == "mae" else DistillObjective(config, (24,) * len(config.layers))
        ).eval()  # what losses are divided by follows the steps of a training
        whole = batch_of(config)

        def part(value: object, chosen: slice) -> object:
            if isinstance(value, torch.Tensor):
                return value[chosen]
            return {k: [t[chosen] for t in v] for k, v in value.items()}  # type: ignore[attr-defined]

        halves = [{k: part(v, s) for k, v in whole.items()} for s in (slice(0, 2), slice(2, 4))]
        parts = torch.stack([objective(half)[0] for half in halves])
        torch.testing.assert_close(objective(whole)[0], parts.mean(), atol=1e-5, rtol=1e-5)


def test_teacher_is_no_part_of_the_state() -> None:
    teacher = torch.nn.Linear(24, 24)
    objective = DistillObjective(small_config(), (24, 24), teacher)  # type: ignore[arg-type]
    assert not [name for name in objective.state_dict() if "teacher" in name]
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in objective.parameters()}


def test_eight_images_can_be_learnt_by_heart() -> None:
    config = small_config("ours", "view.image_size=32", "student.depth=2")
    torch.manual_seed(0)
    objective = DistillObjective(config, (24,) * len(config.layers))
    batch = batch_of(config, 8)
    # targets that follow from the image, so that there is something to learn
    flat = patches_of(batch["image"])  # type: ignore[arg-type]
    target = plain_norm(flat @ tokens(5, 256, 24))
    batch["teacher"] = {kind: [target] * 2 for kind in ("spatial", "frequency", "clean")}
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss, scalars = objective(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(scalars["kd"]))
    assert losses[-1] < 0.25 * losses[0]


def test_mae_hides_what_it_scores() -> None:
    """Changing hidden patches changes the target only, changing visible ones the answer."""
    config = small_config("mae", "view.image_size=64")
    torch.manual_seed(0)
    objective = MaeObjective(config).eval()
    batch = batch_of(config, 1)
    image, order = batch["image"], batch["order"]
    seen: list[torch.Tensor] = []
    objective.head.register_forward_hook(lambda _m, _i, out: seen.append(out.detach().clone()))
    grid = 4
    changed = image.clone()  # type: ignore[attr-defined]
    place = int(order[0, -1])  # type: ignore[index]
    row, col = divmod(place, grid)
    changed[..., row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] = 1.0
    objective(batch)
    objective({**batch, "image": changed})
    torch.testing.assert_close(seen[0], seen[1])


def test_patches_are_cut_row_by_row() -> None:
    image = torch.arange(32 * 48, dtype=torch.float32).view(1, 1, 32, 48)
    assert torch.equal(patches_of(image)[0, 4].view(16, 16), image[0, 0, 16:, 16:32])


def test_an_inactive_mechanism_is_said_out_loud() -> None:
    lines = inactive_stages({"weight_spread/4": 0.001, "weight_spread/8": 0.2, "kd": 0.0}, 0.01)
    assert len(lines) == 1
    assert "mechanism inactive at block 4" in lines[0]


def test_settings_are_read_strictly_and_survive_json(tmp_path: Path) -> None:
    config, data = read_config("spatial", None, ["view.mask.spatial_ratio=0.5", "layers=[6,12]", "precision=fp32"])
    assert (config.views, config.layers, config.view.mask.spatial_ratio) == (("spatial",), (6, 12), 0.5)
    (tmp_path / "c.json").write_text(__import__("json").dumps(data), encoding="utf-8")
    assert to_json(read_config("ours", tmp_path / "c.json")[0]) == data
    for wrong in ("view.sise=3", "batch=many", "views=[spatial]", "weights=loud", "nothing", "layers=[13]", "view=3"):
        with pytest.raises(InputError):
            read_config("ours", None, [wrong])
    with pytest.raises(InputError, match="there is no ablation"):
        read_config("better")


def test_learning_rate_follows_the_batch_and_precision_is_settled_once() -> None:
    engine = read_config("ours", None, ["batch=64", "epochs=200", "precision=fp32"])[0].engine(640)
    assert engine.steps == 2000
    assert engine.learning_rate == pytest.approx(1e-3 * 2**0.5)
    assert engine.warmup == 100
    few = read_config("ours", None, ["precision=fp32"])[0].engine(151)
    assert (few.steps, few.learning_rate) == (800, 1e-3), "a small pool gets the steps that were measured"
    assert read_config()[0].engine(10).precision in ("fp32", "bf16")


def test_the_student_is_pulled_to_the_clean_answer_and_not_to_that_of_holes() -> None:
    """Targets of masked views do not enter the loss; by the named ablation they do."""
    for name, changes in (("ours", False), ("masked-targets", True)):
        config = small_config(name, "reconstruct=false", "weights=uniform")
        torch.manual_seed(0)
        objective = DistillObjective(config, (24,) * len(config.layers))
        batch = batch_of(config)
        before = float(objective(batch)[0].detach())
        teacher: dict[str, list[torch.Tensor]] = batch["teacher"]  # type: ignore[assignment]
        batch["teacher"] = {**teacher, "spatial": [x + 5 for x in teacher["spatial"]]}
        assert (abs(float(objective(batch)[0].detach()) - before) > 0.1) is changes


def test_weights_within_visible_tokens_are_no_mask_detector() -> None:
    generator = torch.Generator().manual_seed(3)
    visible = torch.rand(8, 49, generator=generator) < 0.4
    weight = torch.where(visible, 0.8, 0.4) + 0.1 * torch.rand(8, 49, generator=generator)
    assert float(correlation(weight, visible)) > 0.9
    even = even_out(weight, visible)
    assert abs(float(correlation(even, visible))) < 0.05
    torch.testing.assert_close(even[visible], weight[visible])
    assert float(correlation(torch.ones(2, 3), torch.ones(2, 3))) == 0


def test_the_log_says_how_far_weights_only_tell_the_mask() -> None:
    scalars = DistillObjective(small_config("ours", "view.image_size=64"), (24, 24))(
        batch_of(small_config("ours", "view.image_size=64"))
    )[1]
    assert {"mask_correlation/1", "mask_correlation_raw/1"} <= set(scalars)
    assert abs(float(scalars["mask_correlation/1"])) < 0.2


def test_standardised_channels_have_mean_0_and_deviation_1() -> None:
    raw = tokens(1, 40, 9, 12) * torch.linspace(0.1, 30, 12) + torch.linspace(-5, 50, 12)
    (standard,) = measure_standards([[raw[:20]], [raw[20:]]])
    flat = standard(raw).flatten(0, 1)
    torch.testing.assert_close(flat.mean(0), torch.zeros(12), atol=1e-4, rtol=0)
    torch.testing.assert_close(flat.std(0), torch.ones(12), atol=1e-2, rtol=0)


def test_a_predictor_of_the_mean_is_found_out() -> None:
    """Without standardising it scores well; distinguished it is named, and a student that knows more is not."""
    config = small_config("feature-kd")
    objective = DistillObjective(config, (24, 24))
    for projection in objective.projections:
        torch.nn.init.zeros_(projection.weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(projection.bias)  # type: ignore[arg-type]
    scalars = {name: float(value) for name, value in objective(batch_of(config))[1].items()}
    assert "no better than a predictor of the mean" in no_better_than_mean(scalars)
    assert not no_better_than_mean({"kd": 0.5, "kd_of_mean": 1.0})
    assert not no_better_than_mean({"loss": 1.0})


def test_dropped_tokens_are_not_looked_at_and_not_scored() -> None:
    config = small_config("unmasked", "view.image_size=64")
    torch.manual_seed(0)
    objective = DistillObjective(config, (24, 24)).eval()
    batch = batch_of(config, 1)
    kept = batch["kept"]
    assert kept.shape == (1, 6)  # type: ignore[attr-defined]
    before = float(objective(batch)[0].detach())
    gone = next(place for place in range(16) if place not in kept[0].tolist())  # type: ignore[index]
    row, col = divmod(gone, 4)
    batch["image"][..., row * 16 : row * 16 + 16, col * 16 : col * 16 + 16] = 1.0  # type: ignore[index]
    for stage in batch["teacher"]["clean"]:  # type: ignore[index]
        stage[:, gone] = 99
    assert float(objective(batch)[0].detach()) == pytest.approx(before, abs=1e-6)
    batch["image"][:] = 0.0  # type: ignore[index]
    assert float(objective(batch)[0].detach()) != pytest.approx(before, abs=1e-6)


def test_losses_are_balanced_by_their_own_size() -> None:
    """The second becomes as large as the first, which stays as it is."""
    balance = Balance(["kd", "spatial"])
    for _ in range(400):
        loss = balance({"kd": torch.tensor(0.01), "spatial": torch.tensor(20.0)}, {"kd": 1.0, "spatial": 1.0})
    assert float(loss) == pytest.approx(0.02, rel=1e-3)
    small = torch.tensor(0.01, requires_grad=True)
    large = torch.tensor(20.0, requires_grad=True)
    balance({"kd": small, "spatial": large}, {"kd": 1.0, "spatial": 1.0}).backward()
    assert float(small.grad) == pytest.approx(1.0, rel=1e-2)  # type: ignore[arg-type]
    assert float(large.grad) == pytest.approx(0.0005, rel=1e-2)  # type: ignore[arg-type]


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_losses_pull_at_the_tokens_as_their_weights_say(weight: float) -> None:
    """A square near its minimum and an absolute error of its size: the second would pull a hundred times as hard."""
    tokens = torch.full((4, 8), 0.01, requires_grad=True)

    def terms() -> dict[str, torch.Tensor]:
        return {"kd": tokens.square().sum() * 100, "spatial": tokens.abs().sum() * 10}

    weights, at = {"kd": 1.0, "spatial": weight}, {"kd": [tokens], "spatial": [tokens]}
    by_gradient, by_size = Balance(["kd", "spatial"]), Balance(["kd", "spatial"])
    by_gradient(terms(), weights, at), by_size(terms(), weights)
    kd = math.sqrt(pull2(terms()["kd"], [tokens]))
    both = math.sqrt(pull2(by_gradient.eval()(terms(), weights, at), [tokens]))
    assert both == pytest.approx((1 + weight) * kd, rel=1e-4), "they point the same way here"
    assert math.sqrt(pull2(by_size.eval()(terms(), weights), [tokens])) != pytest.approx((1 + weight) * kd, rel=0.05)
    assert tokens.grad is None, "measuring leaves nothing behind"


def test_the_full_method_follows_the_teacher_first() -> None:
    """Each reconstruction pulls at the tokens by its share of the feature loss's pull."""
    config = small_config("ours")
    torch.manual_seed(0)
    objective = DistillObjective(config, (24, 24)).train()
    objective(batch_of(config))
    scale = {name: float(getattr(objective.balance, f"mean_{name}")) for name in ("kd", "spatial", "frequency")}
    assert len({*scale.values()}) == 3 and min(scale.values()) > 0
    state = objective.state_dict()
    assert float(state["balance.mean_spatial"]) == scale["spatial"], "a resumed run goes on with it"
