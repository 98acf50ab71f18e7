"""The folder of a run: its settings, its checkpoints and its scalars.

Each of them survives a kill at any moment.

A checkpoint is a folder ``step-NNNNNNNN`` with ``weights.safetensors``, ``average.safetensors`` where there is one, and
``trainer.pt`` (optimiser, step, best; read with ``weights_only=True``). It is written under a hidden name, flushed, and
renamed; the one before is removed after that. Scalars go to ``scalars.jsonl`` and to TensorBoard's ``tensorboard/``;
what a killed run logged beyond its checkpoint is cut off when it is resumed.

It does not know what is trained.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from tinyusfm_runtime.atomic import rename_folder, write_file
from tinyusfm_runtime.errors import CheckpointError, InputError, OutputError
from tinyusfm_runtime.strict_json import parse_json

RUN_VERSION = 2
"""Version of a run folder's ``config.json`` and checkpoints (1 is the supervised recipe's)."""
LENGTHS = frozenset(
    {"engine.steps", "engine.warmup", "adapt.steps", "config.steps", "config.epochs", "config.least_steps"}
)
"""Settings in which a run may differ from the one in its folder: how long it is."""
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

        A run may be given another length (``LENGTHS``): it goes on from where it is.

        Raises:
            InputError: a run with other settings is there, or one that is longer already.
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
            write_file(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())
        if self.writes:
            for left in self.path.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)

    def _compare(self, path: Path, data: dict[str, Any]) -> None:
        try:
            found = parse_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read: {error}") from error
        if not isinstance(found, dict):
            raise InputError(f"{path} holds no table of settings")
        names = _differences(found, data)
        others = [name for name in names if name not in LENGTHS]
        if others:
            shown = ", ".join(f"{name} = {_value(found, name)}" for name in others[:4])
            raise InputError(
                f"{self.path} holds a run with other settings ({', '.join(others[:4])}): it was started with {shown}; "
                "use the same to go on, or choose another folder"
            )
        if names and self.writes:
            self._lengthen(path, data)

    def _lengthen(self, path: Path, data: dict[str, Any]) -> None:
        """Records the run's new length; the learning rate follows it from here on."""
        every = self._checkpoints()
        done = every[-1][0] if every else 0
        wanted = int(data.get("engine", {}).get("steps", done))
        if wanted < done:
            raise InputError(
                f"{self.path} has taken {done} steps already, {wanted} are asked for: give at least {done}, or choose "
                "another folder"
            )
        write_file(path, (json.dumps(data, indent=1, sort_keys=True) + "\n").encode())

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
            (hidden / "weights.safetensors").write_bytes(save(_plain(weights)))
            if average:
                (hidden / "average.safetensors").write_bytes(save(_plain(average)))
            packed = io.BytesIO()  # onto a full disk torch.save raises no OSError
            torch.save({"version": RUN_VERSION, "optimiser": optimiser, "state": asdict(state)}, packed)
            (hidden / "trainer.pt").write_bytes(packed.getvalue())
            if (self.path / name).exists():
                shutil.rmtree(self.path / name)
            rename_folder(hidden, self.path / name)
        except OSError as error:
            raise OutputError(f"cannot write a checkpoint into {self.path}: {error.strerror or error}") from error
        for step, folder in self._checkpoints():
            if step != state.step:
                shutil.rmtree(folder, ignore_errors=True)

    def write_weights(self, name: str, weights: Mapping[str, Tensor]) -> None:
        """Writes weights under a name of their own, whole or not at all."""
        write_file(self.path / name, save(_plain(weights)))

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
        """A function that logs scalars of a step.

        Entries beyond ``step`` are cut off first.
        """
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


def read_scalars(out: Path) -> list[dict[str, float]]:
    """Scalars of a run, in order.

    Args:
        out: folder of the run.

    Returns:
        One mapping an entry, ``step`` included.

    Raises:
        InputError: no run there.
    """
    try:
        lines = (out / "scalars.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise InputError(f"{out} holds no run: {error.strerror}") from error
    return [json.loads(line) for line in lines]


def _cut(path: Path, step: int) -> None:
    """Keeps entries up to a step; a line that a kill cut in half goes as well."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if parse_json(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_file(path, "".join(kept).encode())


def _board(folder: Path, step: int) -> Any:
    """TensorBoard's writer, or None where it is not installed.

    ``scalars.jsonl`` holds the same.
    """
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


def _value(settings: Mapping[str, Any], name: str) -> Any:
    found: Any = settings
    for part in name.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


__all__ = ["LENGTHS", "RUN_VERSION", "RunFolder", "TrainerState", "read_scalars"]
