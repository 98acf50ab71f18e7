"""The folder of a run: its settings, its checkpoints and its scalars, each of which survives a kill at any moment.

A checkpoint is a folder ``step-NNNNNNNN`` with ``weights.safetensors``, ``average.safetensors`` where there is one, and
``trainer.pt`` (optimiser, step, best; read with ``weights_only=True``). It is written under a hidden name, flushed, and
renamed; the one before is removed after that. Scalars go to ``scalars.jsonl`` and to TensorBoard's ``tensorboard/``;
what a killed run logged beyond its checkpoint is cut off when it is resumed.

It does not know what is trained.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tinyusfm_edge.models.checkpoint import write_atomically
from tinyusfm_runtime.errors import CheckpointError, InputError, OutputError

RUN_VERSION = 2
"""Version of a run folder's ``config.json`` and checkpoints (1 is the supervised recipe's)."""
_STEP = re.compile(r"step-(\d{8})")


@dataclass(kw_only=True, slots=True)
class TrainerState:
    """What the loop knows beside weights and optimiser.

    Attributes:
        step: optimiser steps taken.
        best: best value of the measurement that is kept by.
        best_step: when that was; 0 is never.
    """

    step: int = 0
    best: float = float("-inf")
    best_step: int = 0


class RunFolder:
    """Reads and writes a run's folder; only one process writes."""

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path, self.writes = path, writes

    def settle(self, settings: Mapping[str, Any]) -> None:
        """Writes the run's settings, or checks that the run in the folder has the same.

        Raises:
            InputError: a run with other settings is there.
            OutputError: the folder cannot be made.
        """
        data = json.loads(json.dumps({"version": RUN_VERSION, **settings}, sort_keys=True))
        path = self.path / "config.json"
        if path.is_file():
            self._compare(path, data)
        elif self.writes:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OutputError(f"cannot make the run's folder {self.path}: {error.strerror}") from error
            write_atomically(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
        if self.writes:
            for left in self.path.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)

    def _compare(self, path: Path, data: dict[str, Any]) -> None:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"{path} holds no table of settings")
        names = _differences(found, data)
        if names:
            raise InputError(
                f"{self.path} holds a run with other settings ({', '.join(names[:4])}): "
                "resume it with the same ones or name another folder"
            )

    def save(
        self, weights: Mapping[str, Tensor], average: Mapping[str, Tensor], optimiser: Any, state: TrainerState
    ) -> None:
        """Writes a checkpoint and removes older ones.

        Raises:
            OutputError: no room or no permission; the checkpoint before still stands.
        """
        name = f"step-{state.step:08d}"
        hidden = self.path / f".{name}"
        try:
            shutil.rmtree(hidden, ignore_errors=True)
            hidden.mkdir()
            self._put(hidden / "weights.safetensors", save(_plain(weights)))
            if average:
                self._put(hidden / "average.safetensors", save(_plain(average)))
            with (hidden / "trainer.pt").open("wb") as stream:
                torch.save({"version": RUN_VERSION, "optimiser": optimiser, "state": asdict(state)}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
            hidden.rename(self.path / name)
        except OSError as error:
            raise OutputError(f"cannot write a checkpoint into {self.path}: {error.strerror or error}") from error
        for step, folder in self._checkpoints():
            if step != state.step:
                shutil.rmtree(folder, ignore_errors=True)

    @staticmethod
    def _put(path: Path, data: bytes) -> None:
        with path.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def write_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Writes weights under a name of their own, whole or not at all."""
        write_atomically(self.path / name, save(_plain(weights)))

    def _checkpoints(self) -> list[tuple[int, Path]]:
        if not self.path.is_dir():
            return []
        found = [(match, p) for p in self.path.iterdir() if (match := _STEP.fullmatch(p.name))]
        return sorted((int(match.group(1)), p) for match, p in found)

    def load(self, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor], Any, TrainerState] | None:
        """Reads the last checkpoint.

        Args:
            device: where its tensors go.

        Returns:
            Weights, average, optimiser state and trainer state, or None where there is no checkpoint.

        Raises:
            CheckpointError: it is damaged or of another version.
        """
        every = self._checkpoints()
        if not every:
            return None
        folder = every[-1][1]
        try:
            weights = load_file(folder / "weights.safetensors", device=device)
            average_path = folder / "average.safetensors"
            average = load_file(average_path, device=device) if average_path.is_file() else {}
            trainer = torch.load(folder / "trainer.pt", weights_only=True, map_location=device)
            version = trainer["version"]
            state = TrainerState(**trainer["state"])
        except Exception as error:  # a damaged file can make its reader raise anything
            raise CheckpointError(f"checkpoint {folder} is damaged ({type(error).__name__}): remove it") from error
        if version != RUN_VERSION:
            raise CheckpointError(f"checkpoint {folder} is of version {version!r}, this release reads {RUN_VERSION}")
        return weights, average, trainer["optimiser"], state

    @contextlib.contextmanager
    def scalars(self, step: int) -> Iterator[Callable[[int, Mapping[str, float]], None]]:
        """A function that logs scalars of a step; entries beyond ``step`` are cut off first."""
        if not self.writes:
            yield lambda _step, _values: None
            return
        path = self.path / "scalars.jsonl"
        _cut(path, step)
        with path.open("a", encoding="utf-8") as stream, contextlib.ExitStack() as stack:
            board = _board(self.path / "tensorboard", step)
            if board is not None:
                stack.callback(board.close)

            def write(at: int, values: Mapping[str, float]) -> None:
                stream.write(json.dumps({"step": at, **values}) + "\n")
                stream.flush()
                for name, value in values.items() if board is not None else ():
                    board.add_scalar(name, value, at)

            yield write


def _cut(path: Path, step: int) -> None:
    """Keeps entries up to a step; a line that a kill cut in half goes as well."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_atomically(path, "".join(kept).encode())


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed: ``scalars.jsonl`` holds the same."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=step + 1)


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # a clone each: safetensors refuses tensors that share memory
    return {name: value.detach().to("cpu").clone().contiguous() for name, value in tensors.items()}


def _differences(found: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    names: list[str] = []
    for key in sorted(set(found) | set(wanted)):
        left, right = found.get(key), wanted.get(key)
        if isinstance(left, dict) and isinstance(right, dict):
            names += _differences(left, right, f"{prefix}{key}.")
        elif left != right:
            names.append(prefix + key)
    return names


__all__ = ["RUN_VERSION", "RunFolder", "TrainerState"]
