"""The gradient trajectory of every image under a small proxy.

How strongly the image would move a model, epoch by epoch.

The proxy is the plain masked autoencoder of mae.py at student size. Recorded is the norm of the gradient of an image's
own loss with respect to the last prediction layer, in closed form: with decoder outputs h_p and errors
delta_p = dl/dy_p of hidden patches p, ``G = sum_p delta_p h_p^T`` and ``|G|^2 = sum((Delta Delta^T) * (H H^T))``; no
backward pass per image (methods.md 1.10). An image keeps its mask in every epoch (seed = hash of its id), or the
course would measure the mask's noise; it is shown whole, without a crop, for the same reason.

It does not know clusters or ranks. Shapes: N images, E epochs, B batch, P hidden patches, D decoder width, K pixels.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tinyusfm_edge.data.images import ImagePool
from tinyusfm_edge.data.room import take_room
from tinyusfm_edge.training.pretrain.config import DistillConfig, read_config
from tinyusfm_edge.training.pretrain.mae import MaeObjective
from tinyusfm_edge.training.trainer.loop import TrainerConfig, learning_rate, plain_groups, stable_seed
from tinyusfm_runtime.atomic import write_file
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.numerics.order import wide
from tinyusfm_runtime.strict_json import parse_json

TRAJECTORY_VERSION = 1
"""Version of ``proxy.json``."""
Track = Callable[[Iterable[Any], str, int], Iterable[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProxyConfig:
    """How the proxy is trained.

    Our choice; the published figure shows curves over epochs and no numbers.

    Attributes:
        image_size: rows and columns of its images.
        epochs: points of a trajectory.
        batch: images per step.
        learning_rate: peak.
        share: of the pool that trains, (0, 1]; the others are scored in a pass of their own each epoch.
        ratio: share of hidden patches.
        width: of the encoder; with depth and heads the student's by default.
        depth: blocks of the encoder.
        heads: of the encoder.
        seed: of weights and order.
    """

    image_size: int = 112
    epochs: int = 10
    batch: int = 64
    learning_rate: float = 5e-4
    share: float = 1.0
    ratio: float = 0.75
    width: int = 192
    depth: int = 12
    heads: int = 12
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            InputError: a count below 1 or a share outside (0, 1].
        """
        if min(self.epochs, self.batch) < 1 or not 0 < self.share <= 1 or self.learning_rate <= 0:
            raise InputError("proxy: epochs and batch at least 1, share in (0, 1], learning_rate above 0")

    @property
    def objective(self) -> DistillConfig:
        """The same as settings of the masked autoencoder."""
        changes = {
            "view.image_size": self.image_size,
            "student.width": self.width,
            "student.depth": self.depth,
            "student.heads": self.heads,
            "layers": [self.depth],
            "mae.ratio": self.ratio,
            "precision": "fp32",
        }
        return read_config("mae", None, [f"{key}={json.dumps(value)}" for key, value in changes.items()])[0]


def gradient_norms(decoded_BPD: Tensor, error_BPK: Tensor) -> Tensor:
    """Norm of each image's gradient with respect to the last layer's weight.

    Args:
        decoded_BPD: inputs of that layer at hidden patches.
        error_BPK: derivative of the image's own loss with respect to the layer's outputs there.

    Returns:
        B, float32.
    """
    decoded, error = decoded_BPD.double(), error_BPK.double()
    # the gradient is error' decoded (K, D); its squared norm is the sum of the products of two Gram
    # matrices (P, P), so the gradient itself need not be made
    if decoded.shape[1] ** 2 < decoded.shape[2] * error.shape[2]:
        square = ((error @ error.transpose(1, 2)) * (decoded @ decoded.transpose(1, 2))).sum((1, 2))
    else:  # many patches: the gradient itself is the smaller matrix
        square = (error.transpose(1, 2) @ decoded).square().sum((1, 2))
    return square.clamp_min(0).sqrt().float()


def mask_order(identity: str, count: int) -> Tensor:
    """An image's own order of patches, the same in every epoch, run and machine."""
    generator = torch.Generator().manual_seed(stable_seed("proxy mask", identity))
    return torch.randperm(count, generator=generator)


class Proxy:
    """The proxy, its optimiser and the trajectories so far; saved after every epoch."""

    def __init__(self, pool: ImagePool, config: ProxyConfig, folder: Path, device: str = "auto") -> None:
        if pool.pixels_NSS.shape[1] != config.image_size:
            raise InputError(
                f"the pool holds squares of {pool.pixels_NSS.shape[1]}, the proxy takes {config.image_size}"
            )
        self.pool, self.config, self.folder = pool, config, folder
        chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(chosen)
        torch.manual_seed(config.seed)
        self.objective = MaeObjective(config.objective).to(self.device)
        self.optimiser = torch.optim.AdamW(
            [
                {"params": group.parameters, "weight_decay": group.weight_decay}
                for group in plain_groups(self.objective, 0.05)
            ],
            betas=(0.9, 0.95),
        )
        # a share of the pool trains; the others only have their norms taken
        trained = np.random.default_rng(config.seed).permutation(len(pool))
        self.trained = np.sort(wide(trained[: max(1, round(config.share * len(pool)))]))
        self.rest = np.setdiff1d(np.arange(len(pool)), wide(self.trained))
        steps = config.epochs * -(-len(self.trained) // config.batch)
        self.schedule = TrainerConfig(
            steps=steps, batch=config.batch, learning_rate=config.learning_rate, warmup=max(1, steps // 20)
        )
        self.epoch = 0
        self.key = hashlib.sha256(json.dumps([asdict(config), pool.fingerprint], sort_keys=True).encode()).hexdigest()
        shape = (len(pool), config.epochs)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "gradients.f32"
        if not self._resume(path, shape):
            np.memmap(path, np.float32, "w+", shape=shape).flush()
            take_room(path)
        self.gradients_NE: np.ndarray = np.memmap(path, np.float32, "r+", shape=shape)

    def run(self, track: Track = lambda items, _label, _total: items) -> np.ndarray:
        """Trains to the end; returns the norms, N x E.

        Args:
            track: wraps the batches of an epoch for a progress bar.
        """
        while self.epoch < self.config.epochs:
            order = np.random.default_rng([self.config.seed, self.epoch]).permutation(self.trained)
            batch = self.config.batch
            work = [(True, order[i : i + batch]) for i in range(0, len(order), batch)]
            # the rest is looked at after the training batches, without a step
            work += [(False, self.rest[i : i + batch]) for i in range(0, len(self.rest), batch)]
            step = self.epoch * -(-len(order) // batch)
            for number, (train, rows) in enumerate(track(work, f"proxy epoch {self.epoch + 1}", len(work))):
                self.gradients_NE[rows, self.epoch] = self._pass(rows, step + number if train else None)
            self.epoch += 1
            self._save()
        return self.gradients_NE

    def _pass(self, rows: np.ndarray, step: int | None) -> np.ndarray:
        """One batch, with a step of the optimiser or without; returns its norms."""
        image = torch.from_numpy(np.array(self.pool.pixels_NSS[rows]))[:, None].to(self.device).float() / 255
        count = self.objective.student.backbone.num_patches
        # (B, P): the same mask for an image in every epoch, so that its norms can be compared
        order = torch.stack([mask_order(self.pool.ids[row], count) for row in rows]).to(self.device)
        with torch.set_grad_enabled(step is not None):
            found = self.objective.predict(image, order)
            error = found.rebuilt_BPK - found.target_BPK
            loss = error.square().mean()
        # the derivative of one image's mean square
        slope = 2 * error.detach() / (error.shape[1] * error.shape[2])
        # (B,)
        norms = gradient_norms(found.decoded_BPD.detach(), slope)
        if step is not None:
            for group in self.optimiser.param_groups:
                group["lr"] = learning_rate(self.schedule, step)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.objective.parameters(), 3.0)
            self.optimiser.step()
        return norms.cpu().numpy()

    def _save(self) -> None:
        from safetensors.torch import save

        getattr(self.gradients_NE, "flush", lambda: None)()
        state = {k: v.cpu().contiguous() for k, v in self.objective.state_dict().items()}
        write_file(self.folder / f"proxy-{self.epoch}.safetensors", save(state))
        packed = io.BytesIO()
        torch.save(self.optimiser.state_dict(), packed)
        write_file(self.folder / f"optimiser-{self.epoch}.pt", packed.getvalue())
        note = {"version": TRAJECTORY_VERSION, "key": self.key, "epoch": self.epoch}
        write_file(self.folder / "proxy.json", json.dumps(note).encode())
        for stem in ("proxy", "optimiser"):
            for path in self.folder.glob(f"{stem}-*"):
                if path.stem != f"{stem}-{self.epoch}":
                    path.unlink()

    def _resume(self, path: Path, shape: tuple[int, int]) -> bool:
        try:
            note = parse_json((self.folder / "proxy.json").read_text(encoding="utf-8"))
            fits = note["version"] == TRAJECTORY_VERSION and note["key"] == self.key
            fits = fits and path.stat().st_size == 4 * shape[0] * shape[1]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        if not fits:
            return False
        self.epoch = int(note["epoch"])
        self.objective.load_state_dict(load_file(self.folder / f"proxy-{self.epoch}.safetensors"))
        state = torch.load(self.folder / f"optimiser-{self.epoch}.pt", weights_only=True, map_location=self.device)
        self.optimiser.load_state_dict(state)
        return True


def embed_pool(
    pool: ImagePool,
    tokens: Callable[[Tensor], Tensor],
    width: int,
    path: Path,
    *,
    batch: int = 64,
    device: torch.device | None = None,
    track: Track = lambda items, _label, _total: items,
) -> np.ndarray:
    """Mean patch token of every image, written to a memory-mapped file as they come.

    Args:
        pool: images.
        tokens: brightness B1HW 0..1 -> patch tokens BPD.
        width: of a token.
        path: file to write, float32 N x D.
        batch: images at a time.
        device: where the network is.
        track: wraps the batches for a progress bar.

    Returns:
        The mapped vectors, not normalised.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    found = np.memmap(path, np.float32, "w+", shape=(len(pool), width))
    take_room(path)
    starts: Sequence[int] = range(0, len(pool), batch)
    for start in track(starts, "embeddings", len(starts)):
        part = torch.from_numpy(np.array(pool.pixels_NSS[start : start + batch]))[:, None].to(device).float() / 255
        with torch.no_grad():
            # (B, P, D) -> mean over the patches (B, D)
            found[start : start + batch] = tokens(part).float().mean(1).cpu().numpy()
    found.flush()
    return found


__all__ = ["TRAJECTORY_VERSION", "Proxy", "ProxyConfig", "Track", "embed_pool", "gradient_norms", "mask_order"]
