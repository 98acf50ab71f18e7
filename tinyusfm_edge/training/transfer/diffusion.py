"""A pixel diffusion model of image and mask together.

DDPM (Ho et al. 2020), with the U-Net and noise levels of ``diffusers``.

An image and its mask are two channels; squares of pixels are folded into channels, so that a CPU can train it. It
predicts the velocity (Salimans & Ho 2022), at cosine noise levels; samples take the deterministic steps of DDIM (Song
et al. 2021). Trained from random weights on the images given; nothing is fetched.

Shapes: N pairs, 2SS image and mask -1..1, B batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tinyusfm_edge.training.trainer.checkpoints import RunFolder
from tinyusfm_edge.training.trainer.loop import Draw, Outcome, ParameterGroup, fit, plain_groups, stable_seed
from tinyusfm_edge.training.transfer.config import DiffusionConfig
from tinyusfm_runtime.errors import CheckpointError, InputError, MissingExtra


class Diffusion(nn.Module):
    """The model and its loss."""

    def __init__(self, image_size: int, config: DiffusionConfig) -> None:
        super().__init__()
        try:
            # the submodules alone: the package's front loads every pipeline
            from diffusers.models.unets.unet_2d import UNet2DModel
            from diffusers.schedulers.scheduling_ddim import DDIMScheduler
        except ImportError as error:
            raise MissingExtra("a diffusion transfer set", "diffusers", "diffusion") from error
        self.config, self.image_size = config, image_size
        channels = 2 * config.fold**2
        widths = tuple(config.width * factor for factor in (1, 2, 3, 4)[: config.levels])
        widths += (4 * config.width,) * (config.levels - len(widths))
        self.network: Any = UNet2DModel(
            sample_size=image_size // config.fold,
            in_channels=channels,
            out_channels=channels,
            layers_per_block=config.depth,
            block_out_channels=widths,
            down_block_types=("DownBlock2D",) * (len(widths) - 1) + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (len(widths) - 1),
            attention_head_dim=8,
            norm_num_groups=8,
        )
        self.noise: Any = DDIMScheduler(
            num_train_timesteps=config.noise_levels,
            beta_schedule="squaredcos_cap_v2",
            prediction_type="v_prediction",
            timestep_spacing="trailing",
            clip_sample=True,
        )

    def forward(self, batch: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch: pairs B2SS, noise of that shape, noise levels B."""
        pairs, noise, level = batch
        clean, noise = (F.pixel_unshuffle(part, self.config.fold) for part in (pairs, noise))
        noisy = self.noise.add_noise(clean, noise, level)
        wanted = self.noise.get_velocity(clean, noise, level)
        loss = F.mse_loss(self.network(noisy, level).sample.float(), wanted)
        return loss, {"loss": loss.detach()}

    @torch.no_grad()
    def sample(self, noise_B2SS: Tensor) -> Tensor:
        """Pairs out of noise, -1..1, of its shape."""
        self.noise.set_timesteps(self.config.sampling_steps)
        current = F.pixel_unshuffle(noise_B2SS, self.config.fold)
        for level in self.noise.timesteps:
            said = self.network(current, level).sample.float()
            current = self.noise.step(said, level, current).prev_sample
        return F.pixel_shuffle(current, self.config.fold)


class DiffusionTask:
    """What the loop trains: the model on pairs in memory."""

    def __init__(self, model: Diffusion, images_NSS: np.ndarray, masks_NSS: np.ndarray) -> None:
        self.objective, self.images_NSS, self.masks_NSS = model, images_NSS, masks_NSS

    def groups(self) -> list[ParameterGroup]:
        """Every parameter, without weight decay on norms and biases."""
        return plain_groups(self.objective, 0.01)

    def __len__(self) -> int:
        return len(self.images_NSS)

    def batch(self, draws: Sequence[Draw]) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs, their noise and noise levels, which follow from each draw's seed."""
        rows = [draw.index for draw in draws]
        pairs = as_pairs(self.images_NSS[rows], self.masks_NSS[rows])
        noise, levels = [], []
        for draw in draws:
            generator = torch.Generator().manual_seed(draw.seed)
            noise.append(torch.randn(pairs.shape[1:], generator=generator))
            levels.append(torch.randint(0, self.objective.config.noise_levels, (), generator=generator))
        return pairs, torch.stack(noise), torch.stack(levels)


def as_pairs(images_NSS: np.ndarray, masks_NSS: np.ndarray) -> Tensor:
    """Codes 0..255 and masks 0/1 as N2SS, -1..1."""
    image = torch.from_numpy(np.ascontiguousarray(images_NSS)).float() / 127.5 - 1
    return torch.stack([image, torch.from_numpy(np.ascontiguousarray(masks_NSS)).float() * 2 - 1], 1)


def train_diffusion(
    images_NSS: np.ndarray,
    masks_NSS: np.ndarray,
    run_folder: Path,
    config: DiffusionConfig,
    *,
    seed: int,
    settings: dict[str, Any],
    quiet: bool = False,
    stop_after_s: float = 0.0,
) -> Outcome:
    """Trains a model, or goes on.

    Args:
        images_NSS: uint8, training frames alone.
        masks_NSS: uint8 0/1.
        run_folder: of the run.
        config: sizes and training.
        seed: of weights, order and noise.
        settings: what else defines the run, such as the data's hash.
        quiet: print nothing.
        stop_after_s: seconds after which a checkpoint is written and the run ends; 0 never.

    Returns:
        How far it came.

    Raises:
        InputError: fewer frames than two, or a run with other settings in the folder.
        MissingExtra: diffusers is not installed.
    """
    if len(images_NSS) < 2:
        raise InputError("a diffusion model needs two training frames or more")
    torch.manual_seed(stable_seed("diffusion", seed))
    model = Diffusion(images_NSS.shape[1], config)
    task = DiffusionTask(model, images_NSS, masks_NSS)
    return fit(task, config.loop(seed), run_folder, settings=settings, quiet=quiet, stop_after_s=stop_after_s)


def load_diffusion(run_folder: Path, image_size: int, config: DiffusionConfig) -> Diffusion:
    """A trained model, by the moving average of its weights.

    Raises:
        CheckpointError: no finished run there, or a damaged one.
        MissingExtra: diffusers is not installed.
    """
    found = RunFolder(run_folder, writes=False).load("cpu")
    if found is None or found[3].step < config.steps:
        raise CheckpointError(f"{run_folder} holds no finished run")
    model = Diffusion(image_size, config)
    model.load_state_dict(found[1] or found[0])
    return model.eval()


def sample_pairs(model: Diffusion, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images and masks.

    Args:
        model: trained.
        count: how many.
        seed: of their noise.

    Returns:
        uint8 images NSS and uint8 0/1 masks NSS.
    """
    generator = torch.Generator().manual_seed(stable_seed("samples", seed))
    noise = torch.randn((count, 2, model.image_size, model.image_size), generator=generator)
    pairs = model.sample(noise).clamp(-1, 1).numpy()
    images = ((pairs[:, 0] + 1) * 127.5).round().astype(np.uint8)
    return images, (pairs[:, 1] > 0).astype(np.uint8)


__all__ = ["Diffusion", "DiffusionTask", "as_pairs", "load_diffusion", "sample_pairs", "train_diffusion"]
