"""Transfer sets: distances mean what they say, copies and worse sets are refused, adapt takes the folder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.needs import needs

needs("cv2", "install tinyusfm-edge[train]")
needs("lightning_fabric", "install tinyusfm-edge[train]")

from tests.tables import phantom_table, read_rows  # noqa: E402
from tests.training.small_runs import random_teacher  # noqa: E402
from tinyusfm_edge.cli.main import main  # noqa: E402
from tinyusfm_edge.cli.train.transfer_set import METHOD_NAMES  # noqa: E402
from tinyusfm_edge.data.table import read_frames  # noqa: E402
from tinyusfm_edge.models.teachers import Teacher, load_teacher  # noqa: E402
from tinyusfm_edge.training.transfer.config import METHODS, DiffusionConfig, JudgeConfig, TransferConfig  # noqa: E402
from tinyusfm_edge.training.transfer.distances import frechet_distance, nearest_distances  # noqa: E402
from tinyusfm_edge.training.transfer.judge import judge_set  # noqa: E402
from tinyusfm_edge.training.transfer.make import SIDECAR, Pairs, judge_pairs, make_pairs, read_pairs  # noqa: E402
from tinyusfm_edge.training.transfer.warped import warped_pairs  # noqa: E402
from tinyusfm_runtime.errors import InputError  # noqa: E402
from tinyusfm_runtime.numerics.order import wide  # noqa: E402

SIZE = 32
SMALL = TransferConfig(count=16, image_size=SIZE, piece=6, judge=JudgeConfig(teacher_size=56))


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A table of 30 training and 20 validation phantoms, and a test split whose file is damaged."""
    folder = tmp_path_factory.mktemp("frames")
    phantom_table(folder, {"train": range(600, 630), "val": range(630, 650), "test": range(650, 652)})
    (folder / "650.png").write_bytes(b"nobody reads the test split")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def teacher(weights: Path) -> Teacher:
    return load_teacher("dinov2_vits14", weights)


@pytest.fixture(scope="module")
def splits(frames: Path) -> tuple[Pairs, Pairs]:
    training, validation = (read_pairs(frames, split, SIZE) for split in ("train", "val"))
    return training, validation


def test_a_frechet_distance_is_that_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    first = rng.standard_normal((4000, 3)) * [1.0, 2.0, 0.5]
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(first, first + [3.0, 0.0, 4.0]) == pytest.approx(25.0, rel=1e-9)
    # of one Gaussian each: (difference of the means)^2 + (difference of the standard deviations)^2
    wider = first[:, :1] * 3.0 + 1.0
    expected = float((wider.mean() - first[:, 0].mean()) ** 2 + (2.0 * first[:, 0].std(ddof=1)) ** 2)
    assert frechet_distance(first[:, :1], wider) == pytest.approx(expected, rel=1e-9)
    # a rotation of both changes nothing; fewer frames than features are no obstacle
    turn = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    other = rng.standard_normal((500, 3)) + 1
    assert frechet_distance(first @ turn, other @ turn) == pytest.approx(frechet_distance(first, other), rel=1e-6)
    assert 0 < frechet_distance(rng.standard_normal((8, 40)), rng.standard_normal((8, 40))) < 200
    with pytest.raises(InputError, match="two frames"):
        frechet_distance(first[:1], first)
    with pytest.raises(InputError, match="finite"):
        frechet_distance(first, np.where(first > 2, np.nan, first))


def test_a_nearest_distance_is_the_root_of_the_mean_square() -> None:
    others = np.array([[0.0, 0.0], [10.0, 0.0]])
    assert nearest_distances(np.array([[3.0, 4.0], [10.0, 0.0]]), others).tolist() == [pytest.approx(12.5**0.5), 0.0]


def features(shift: float, count: int, seed: int, spread: float = 1.0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, 12)) * spread + shift


def test_a_set_like_the_held_out_frames_is_accepted_and_others_say_why_not() -> None:
    training, validation, warped = features(0, 200, 1), features(0, 100, 2), features(0.7, 60, 3)
    good, keep = judge_set("diffusion", features(0.1, 60, 4), warped, training, validation, JudgeConfig(), wanted=50)
    assert good.accepted and good.kept == 50 and keep.mean() > 0.9
    assert good.frechet["training"] < good.frechet["set"] < good.frechet["warp"]
    assert [row[0] for row in good.table()][0] == "this set (diffusion)"
    worse, _ = judge_set("diffusion", features(1.5, 60, 4), warped, training, validation, JudgeConfig(), wanted=50)
    assert not worse.accepted and "is not below that of warped training frames" in worse.reasons[0]
    copies = training[:60] + 1e-3
    found, keep = judge_set("diffusion", copies, warped, training, validation, JudgeConfig(), wanted=50)
    assert not found.accepted and found.refused == 60 and not keep.any() and "they are copies" in found.reasons[0]
    some = np.concatenate([features(0.1, 57, 4), training[:3]])
    found, keep = judge_set("diffusion", some, warped, training, validation, JudgeConfig(), wanted=50)
    assert found.accepted and not keep[-3:].any(), "a few copies are left out and counted"
    itself, _ = judge_set("warp", warped, warped, training, validation, JudgeConfig(), wanted=50)
    assert itself.accepted and "warp" not in itself.frechet, "warped frames are not measured against themselves"
    with pytest.raises(InputError, match="16 frames or more"):
        judge_set("diffusion", warped[:4], warped, training, validation, JudgeConfig(), wanted=4)


def test_a_generator_that_copies_patients_is_refused(splits: tuple[Pairs, Pairs], teacher: Teacher) -> None:
    training, validation = splits
    noisy = training.images_NSS[:24].astype(int) + np.random.default_rng(0).integers(-2, 3, (24, SIZE, SIZE))
    copies = Pairs(images_NSS=np.clip(noisy, 0, 255).astype(np.uint8), masks_NSS=training.masks_NSS[:24])
    found, kept = judge_pairs(copies, training, validation, teacher, SMALL)
    assert not found.accepted and found.refused >= 20 and len(kept.images_NSS) == found.kept < 16
    assert found.neighbours["set"].median < found.limit < found.neighbours["validation"].median


def test_noise_is_farther_from_held_out_frames_than_warped_frames(
    splits: tuple[Pairs, Pairs], teacher: Teacher
) -> None:
    training, validation = splits
    rng = np.random.default_rng(1)
    noise = rng.integers(0, 256, (20, SIZE, SIZE)).astype(np.uint8)
    found, _ = judge_pairs(
        Pairs(images_NSS=noise, masks_NSS=training.masks_NSS[:20]), training, validation, teacher, SMALL
    )
    assert found.frechet["set"] > 1.1 * found.frechet["warp"] > 1.1 * found.frechet["training"]
    assert not found.accepted and "not below" in found.reasons[-1]


def test_a_patient_in_both_splits_is_refused(splits: tuple[Pairs, Pairs], teacher: Teacher) -> None:
    training, validation = splits
    with pytest.raises(InputError, match="1 patients stand in the training and the validation split"):
        judge_pairs(
            training, training, replace(validation, groups=(training.groups[0], *validation.groups[1:])), teacher, SMALL
        )


def test_warped_pairs_are_seeded(splits: tuple[Pairs, Pairs]) -> None:
    images, masks = splits[0].images_NSS, splits[0].masks_NSS
    first, second = (warped_pairs(images, masks, 4, seed) for seed in (0, 0))
    assert np.array_equal(first[0], second[0]) and np.array_equal(first[1], second[1])
    assert not np.array_equal(first[0], warped_pairs(images, masks, 4, 1)[0])


def line(frames: Path, weights: Path, out: Path, *more: str) -> list[str]:
    return [
        "transfer-set", "--data", str(frames), "--out", str(out), "--teacher", "dinov2_vits14", "--teacher-weights",
        str(weights), "--count", "16", "--image-size", str(SIZE), "--set", "judge.teacher_size=56", *more,
    ]  # fmt: skip


def test_a_warped_set_is_a_folder_that_adapt_takes(frames: Path, weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "made"
    # a teacher of random weights finds bent phantoms alike
    lenient = ("--method", "warp", "--set", "judge.most_near=0.5")
    assert main(line(frames, weights, out, *lenient, "--json", str(tmp_path / "made.json"))) == 0
    rows = read_rows(out)
    assert (
        len(rows) == 16 and {row["split"] for row in rows} == {"train"} and {row["made_by"] for row in rows} == {"warp"}
    )
    shown = read_frames(out, "train")
    assert len(shown) == 16 and shown[0].pixels.shape == (SIZE, SIZE)
    assert len(read_pairs(out, "train", SIZE).masks_NSS) == 16, "its masks can be read as well"
    about = json.loads((out / SIDECAR).read_text())
    assert about["accepted"] and not about["anyway"] and about["training"]["frames"] == 30
    assert json.loads((tmp_path / "made.json").read_text())["frechet"] == about["frechet"]
    assert "accepted" in (out / "report.html").read_text()


def test_a_folder_with_another_table_is_left_alone(frames: Path, weights: Path, tmp_path: Path) -> None:
    before = (frames / "split.csv").read_bytes()
    assert main(line(frames, weights, frames, "--method", "warp")) == 2
    assert (frames / "split.csv").read_bytes() == before
    assert METHOD_NAMES == METHODS


TINY = DiffusionConfig(
    width=8, depth=1, levels=2, steps=8, batch=8, noise_levels=50, sampling_steps=4, warmup=2, checkpoint_every=3,
    precision="fp32", learning_rate=2e-3,
)  # fmt: skip
TINY_WORDS = [
    f"--set=diffusion.{name}={getattr(TINY, name)}"
    for name in ("width", "depth", "levels", "steps", "batch", "noise_levels", "sampling_steps", "warmup")
]


def test_a_diffusion_set_goes_on_where_it_was_stopped(splits: tuple[Pairs, Pairs], tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="install tinyusfm-edge[diffusion]")
    config = replace(SMALL, diffusion=TINY)
    said: list[str] = []
    assert make_pairs(splits[0], tmp_path / "a", config, quiet=True, stop_after_s=1e-6, say=said.append) is None
    assert "stopped at step 1 of 8" in said[0]
    resumed = make_pairs(splits[0], tmp_path / "a", config, quiet=True)
    whole = make_pairs(splits[0], tmp_path / "b", config, quiet=True)
    assert resumed is not None and whole is not None
    assert np.array_equal(resumed.images_NSS, whole.images_NSS) and np.array_equal(resumed.masks_NSS, whole.masks_NSS)
    assert len(whole.images_NSS) == 18 and set(np.unique(wide(whole.masks_NSS))) <= {0, 1}
    pieces = sorted((tmp_path / "b").glob("samples-*/*.npz"))
    assert len(pieces) == 3
    pieces[1].write_bytes(b"a kill in the middle")
    again = make_pairs(splits[0], tmp_path / "b", config, quiet=True)
    assert again is not None and np.array_equal(again.images_NSS, whole.images_NSS)
    other = replace(config, diffusion=replace(TINY, width=16))
    with pytest.raises(InputError, match="other settings"):
        make_pairs(splits[0], tmp_path / "b", other, quiet=True)


def test_a_diffusion_model_learns(splits: tuple[Pairs, Pairs], tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="install tinyusfm-edge[diffusion]")
    from tinyusfm_edge.training.trainer.loop import read_scalars
    from tinyusfm_edge.training.transfer.diffusion import load_diffusion, sample_pairs, train_diffusion

    longer = replace(TINY, fold=4, width=24, steps=60, sampling_steps=6, ema=0.8)
    images, masks = splits[0].images_NSS, splits[0].masks_NSS
    train_diffusion(images, masks, tmp_path / "run", longer, seed=0, settings={}, quiet=True)
    losses = [entry["loss"] for entry in read_scalars(tmp_path / "run")]
    assert np.mean(losses[-2:]) < 0.8 * losses[0]
    _, made = sample_pairs(load_diffusion(tmp_path / "run", SIZE, longer), 16, 0)
    middle, corner = made[:, 12:20, 12:20].mean(), made[:, :3, :3].mean()
    assert middle > corner + 0.3, "heads lie in the middle, as they do in training"


def test_a_bad_diffusion_set_is_refused_and_written_only_when_asked(
    frames: Path, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("diffusers", reason="install tinyusfm-edge[diffusion]")
    out = tmp_path / "made"
    assert main(line(frames, weights, out, *TINY_WORDS)) == 1
    assert "the set is refused" in capsys.readouterr().err
    assert not (out / "split.csv").exists() and not json.loads((out / SIDECAR).read_text())["accepted"]
    assert "refused" in (out / "report.html").read_text()
    assert main(line(frames, weights, out, *TINY_WORDS, "--anyway")) == 0
    assert "written all the same" in capsys.readouterr().err
    about = json.loads((out / SIDECAR).read_text())
    assert about["anyway"] and about["written"] and not about["accepted"]
    assert {row["accepted"] for row in read_rows(out)} == {"no"}
    assert "written all the same" in (out / "report.html").read_text()


@pytest.mark.parametrize(
    "changes",
    [{"count": 3}, {"image_size": 30}, {"method": "gan"}, {"diffusion": {"width": 12}}, {"judge": {"near": 0.0}}],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, object]) -> None:
    inner = {"diffusion": DiffusionConfig, "judge": JudgeConfig}
    with pytest.raises(InputError):
        TransferConfig(**{k: inner[k](**v) if k in inner else v for k, v in changes.items()})  # type: ignore[arg-type, operator]


def test_one_seed_gives_one_batch() -> None:
    pytest.importorskip("diffusers", reason="install tinyusfm-edge[diffusion]")
    from tinyusfm_edge.training.trainer.loop import Draw
    from tinyusfm_edge.training.transfer.diffusion import Diffusion, DiffusionTask

    torch.manual_seed(0)
    images = np.random.default_rng(0).integers(0, 256, (3, 16, 16)).astype(np.uint8)
    task = DiffusionTask(Diffusion(16, TINY), images, (images > 90).astype(np.uint8))
    draws = [Draw(index=index, seed=seed, position=0) for index, seed in ((0, 5), (2, 6))]
    first, second = task.batch(draws), task.batch(draws)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].shape == (2, 2, 16, 16) and set(first[0][:, 1].unique().tolist()) <= {-1.0, 1.0}
    assert 0 <= min(first[2].tolist()) <= max(first[2].tolist()) < TINY.noise_levels
