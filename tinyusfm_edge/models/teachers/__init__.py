"""Teachers: frozen models whose patch tokens a student learns from.

One file a format, found by the names it declares.

A teacher file has ``VARIANTS`` (name -> shape) and ``load(variant, weights)``; what that gives keeps the ``Teacher``
protocol. A file's own checks refuse weights that lack any tensor, positions above all: a ViT without them still runs
and answers nonsense. It does not know training, masks or students.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Protocol, runtime_checkable

from torch import Tensor

from tinyusfm_runtime.errors import InputError


@runtime_checkable
class Teacher(Protocol):
    """A frozen model: four members.

    ``width`` is the tokens' width, ``depth`` the number of blocks, ``patch`` the side of a patch in pixels.
    """

    width: int
    depth: int
    patch: int

    def tokens(self, image_NCHW: Tensor, layers: tuple[int, ...]) -> list[Tensor]:
        """Patch tokens (NPD, row by row) after the named blocks, counted from 1.

        Image normalised as for ImageNet.
        """
        ...


def _modules() -> list[str]:
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def names() -> dict[str, str]:
    """Every teacher that can be named, and the file that reads it."""
    found: dict[str, str] = {}
    for stem in _modules():
        module = importlib.import_module(f"{__name__}.{stem}")
        found |= dict.fromkeys(module.VARIANTS, stem)
    return found


def load_teacher(name: str, weights: Path) -> Teacher:
    """Loads a teacher.

    Args:
        name: one of ``names()``, such as ``dinov2_vits14``.
        weights: its weights file, or the folder of a feature bank.

    Returns:
        The teacher, frozen, in float32 and evaluation mode.

    Raises:
        InputError: no teacher of that name.
        CheckpointError: the file is unusable or of another model.
    """
    known = names()
    if name not in known:
        raise InputError(f"there is no teacher {name!r}; there is: {', '.join(sorted(known))}")
    teacher: Teacher = importlib.import_module(f"{__name__}.{known[name]}").load(name, weights)
    return teacher


__all__ = ["Teacher", "load_teacher", "names"]
