"""Names of foreign checkpoints -> names of our students.

Containers, prefixes, what may be missing.

Read are the official TinyUSFM file (``model.blocks.0...``, flat), what its train_cls.py and train_seg.py save
(``decode_head.conv_seg`` and so on), MAE-Lite's (``{"model": ...}``), the ``module.`` of data-parallel training and the
``_orig_mod.`` of torch.compile, our own, and plain state dicts. Everything of the backbone must be there with equal
shapes; only heads may be missing. The head count is never guessed: 12 heads of 16 and 3 of 64 have the same shapes.

It does not read files and does not know the student file's metadata.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tinyusfm_edge.models.student import Student
from tinyusfm_runtime.errors import CheckpointError

WRAPPERS = ("module", "_orig_mod", "model", "net", "student", "backbone")
"""Names that may stand before ``blocks.0``, in any order and number: wrappers of training code (methods.md 1.6)."""
AVERAGES = ("model_ema", "ema", "ema_state_dict", "state_dict_ema", "ema_model")
"""Keys of a checkpoint that may hold a moving average of the weights beside the weights themselves."""
CONTAINERS = ("state_dict", "model", "model_state_dict", "net", "teacher", "student", *AVERAGES)
"""Keys of a checkpoint that may hold the state dict (methods.md 1.6)."""
INNER = ("module", "state_dict")
"""Keys inside such a container that may hold it, beside a count of updates and the like."""
ANYWHERE = ("module", "_orig_mod")
"""Wrappers that also stand inside a name, where a part alone was compiled or made parallel."""
RENAMES = (
    ("neck.projections.", "neck.convs."),
    ("decode_head.lateral_convs.", "head.lateral."),
    ("decode_head.fpn_convs.", "head.smooth."),
    ("decode_head.conv_seg.", "head.classifier."),
)
"""Parts of the official segmentation model (model/tinyusfm_seg.py) and their names here."""
_TOKEN_NORMS = {kind: {f"norm.{kind}", f"backbone.norm.{kind}"} for kind in ("weight", "bias")}
_NORMS = frozenset(
    f"{place}{norm}.{kind}"
    for place in ("", "backbone.")
    for norm in ("norm", "fc_norm")
    for kind in ("weight", "bias")
)
_ANCHOR = "blocks.0.attn.qkv.weight"
_HEADS = {"segment": ("neck.", "head."), "classify": ("head.", "exits."), "features": ()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Fit:
    """Tensors brought to a student's names.

    Attributes:
        state: tensors by the student's names, in the file's element types.
        prefix: what stood before the backbone's names.
        missing_heads: tensors of heads that the file lacks or has in another shape.
        unexpected: names in the file that the student has no place for.
        notes: what was done beyond plain copying, one line each.
    """

    state: dict[str, Tensor]
    prefix: str
    missing_heads: tuple[str, ...]
    unexpected: tuple[str, ...]
    notes: tuple[str, ...]


def find_tensors(content: Mapping[str, Any], container: str | None = None) -> tuple[str | None, dict[str, Tensor]]:
    """Finds the state dict in a checkpoint.

    Args:
        content: a state dict, or a mapping that holds one.
        container: which of several to take, such as ``teacher``: a key, or what stands before the names of one of
            several models in one state dict.

    Returns:
        The container's key (None where the mapping is the state dict) and its tensors.

    Raises:
        CheckpointError: no tensors, or several containers and none chosen.
    """
    holding = [key for key in CONTAINERS if _tensors(content.get(key))]
    if container is not None:
        return container, _chosen(content, container, holding)
    if len(holding) > 1:
        averaged = [key for key in holding if key in AVERAGES]
        hint = f"; {', '.join(averaged)} is a moving average of the weights" if averaged else ""
        raise CheckpointError(
            f"the checkpoint holds several models, {', '.join(holding)}{hint}: choose one with container= (--container)"
        )
    if holding:
        return holding[0], _tensors(content[holding[0]])
    found = _tensors(content)
    if not found:
        others = [str(key) for key, value in content.items() if _tensors(value)]
        hint = f"; tensors stand under {', '.join(others)}: choose with container= (--container)" if others else ""
        raise CheckpointError(f"the checkpoint holds no named tensors, only {_some(content)}{hint}")
    return None, found


def _chosen(content: Mapping[str, Any], container: str, holding: list[str]) -> dict[str, Tensor]:
    """The tensors under a key.

    Or those whose names begin with it, without that beginning.
    """
    if found := _tensors(content.get(container)):
        return found
    flat = _tensors(content[holding[0]] if len(holding) == 1 else content)
    start = f"{container}."
    if found := {key.removeprefix(start): value for key, value in flat.items() if key.startswith(start)}:
        return found
    raise CheckpointError(f"the checkpoint has no weights under {container!r}; it has {', '.join(holding) or 'none'}")


def _tensors(value: Any) -> dict[str, Tensor]:
    if not isinstance(value, Mapping):
        return {}
    inner = next((value[key] for key in INNER if isinstance(value.get(key), Mapping)), value)
    return {k: v for k, v in inner.items() if isinstance(k, str) and isinstance(v, Tensor)}


def fit(student: Student, tensors: Mapping[str, Tensor], *, resize_positions: bool = False) -> Fit:
    """Brings foreign tensors to a student's names and checks every shape.

    Args:
        student: the student to be filled; only its names and shapes are read, so it may be on the meta device.
        tensors: the file's tensors.
        resize_positions: interpolate a position table of another image size (bicubic) in place of refusing it.

    Returns:
        The fit; ``state`` lacks ``missing_heads`` and nothing else.

    Raises:
        CheckpointError: another model, something of the backbone missing, or a position table of another size.
    """
    wanted = {k: v for k, v in student.state_dict().items() if not k.endswith("num_batches_tracked")}
    prefix = _find_prefix(tensors, len(wanted))
    named, unexpected = _rename(tensors, prefix, wanted)
    notes: list[str] = []
    _adopt_norm(named, unexpected, student.config.task, wanted, notes)
    _fit_positions(named, wanted, student.config.grid_hw, resize_positions, notes)
    deep = [key for key in unexpected if _unwrapped(key).startswith(f"{_unwrapped(prefix)}blocks.")]
    if deep:
        raise CheckpointError(f"weights of a deeper net: this student has no place for {_some(deep)}")
    heads = _HEADS[student.config.task]
    wrong = [k for k, v in wanted.items() if k not in named or named[k].shape != v.shape]
    problems = [k for k in wrong if not k.startswith(heads)] if heads else wrong
    if problems:
        raise CheckpointError(_describe(problems, named, wanted))
    state = {k: v for k, v in named.items() if k not in wrong}
    odd = [k for k, v in state.items() if not v.is_floating_point()]
    if odd:
        raise CheckpointError(f"weights must be floating point: {_some(odd)} of the file are {state[odd[0]].dtype}")
    return Fit(state=state, prefix=prefix, missing_heads=tuple(wrong), unexpected=tuple(unexpected), notes=tuple(notes))


def _find_prefix(tensors: Mapping[str, Tensor], num_wanted: int) -> str:
    ends = [k[: -len(_ANCHOR)] for k in tensors if k.endswith(_ANCHOR)]
    found = [p for p in ends if p == "" or p.endswith(".")]
    known = [p for p in found if set(p.split(".")[:-1]) <= set(WRAPPERS)]
    if len(known) == 1 and len(found) == 1:
        return known[0]
    if len(found) > 1:
        raise CheckpointError(
            f"the file holds several models, {_apart(found)}: choose one with container= (--container)"
        )
    if found:
        raise CheckpointError(
            f"weights stand under the unknown prefix {found[0]!r}; known: any of {', '.join(WRAPPERS)}; "
            f"take them with container={found[0].split('.')[0]!r} (--container)"
        )
    raise CheckpointError(
        f"weights of another model: all {num_wanted} tensors of the student are missing; the file has {_some(tensors)}"
    )


def _apart(prefixes: Sequence[str]) -> str:
    """The shortest beginnings that tell models in one state dict apart.

    Averages are said to be such.
    """
    parts = [prefix.split(".")[:-1] for prefix in prefixes]
    depth = next((n for n in range(1, 9) if len({tuple(part[:n]) for part in parts}) == len(parts)), 9)
    names = [".".join(part[:depth]) for part in parts]
    averaged = [name for name in names if set(name.split(".")) & set(AVERAGES)]
    hint = f"; {', '.join(averaged)} is a moving average of the weights" if averaged else ""
    return ", ".join(name or "names without a prefix" for name in names) + hint


def _unwrapped(name: str) -> str:
    """A name without the wrappers that may stand anywhere in it."""
    return ".".join(part for part in name.split(".") if part not in ANYWHERE)


def _rename(
    tensors: Mapping[str, Tensor], prefix: str, wanted: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    prefix = _unwrapped(prefix)
    outer = prefix.removesuffix("backbone.")
    named: dict[str, Tensor] = {}
    unexpected = []
    for given, tensor in tensors.items():
        key = _unwrapped(given)
        inner = f"backbone.{key[len(prefix) :]}" if key.startswith(prefix) else ""
        plain = _own_name(key[len(outer) :]) if key.startswith(outer) else ""
        name = inner if inner in wanted else plain
        if name in named:
            raise CheckpointError(f"the file holds two tensors for {name}: save one model alone")
        if name in wanted or name in _NORMS:
            named[name] = tensor
        elif not key.endswith("num_batches_tracked"):
            unexpected.append(given)
    return named, unexpected


def _own_name(name: str) -> str:
    """The official segmentation model's name of a tensor -> ours.

    Other names as they are.
    """
    for theirs, ours in RENAMES:
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _adopt_norm(
    named: dict[str, Tensor], unexpected: list[str], task: str, wanted: Mapping[str, Tensor], notes: list[str]
) -> None:
    """Renames the norm: a file has ``fc_norm`` or ``norm``, never both.

    Classification pools before its norm (``fc_norm``), other models norm each token.
    """
    for kind in ("weight", "bias"):
        pooled = [
            named.pop(k) for k in (f"fc_norm.{kind}", f"backbone.fc_norm.{kind}") if k in named and k not in wanted
        ]
        if task == "classify" and pooled and f"fc_norm.{kind}" not in named:
            named[f"fc_norm.{kind}"] = pooled[0]
        elif task == "features" and pooled and not _TOKEN_NORMS[kind] & set(named):
            named[f"backbone.norm.{kind}"] = pooled[0]
            notes.append(
                f"norm.{kind} starts from the file's fc_norm.{kind}: it was trained on mean tokens, not on each"
            )
        elif pooled:
            unexpected.append(f"fc_norm.{kind}")
        held = [named.pop(k) for k in (f"norm.{kind}", f"backbone.norm.{kind}") if k in named and k not in wanted]
        if task == "classify" and held and f"fc_norm.{kind}" not in named:
            named[f"fc_norm.{kind}"] = held[0]
            notes.append(
                f"fc_norm.{kind} starts from the file's norm.{kind}: it was trained on tokens, not on their mean"
            )
        elif held:
            unexpected.append(f"norm.{kind}")
        if task == "segment" and f"backbone.norm.{kind}" not in named:
            named[f"backbone.norm.{kind}"] = torch.full(
                wanted[f"backbone.norm.{kind}"].shape, 1.0 if kind == "weight" else 0.0
            )
            notes.append(f"norm.{kind} is not in the file and keeps its start value: segmentation does not use it")


def _fit_positions(
    named: dict[str, Tensor],
    wanted: Mapping[str, Tensor],
    grid_hw: tuple[int, int],
    resize_positions: bool,
    notes: list[str],
) -> None:
    table, want = named.get("backbone.pos_embed"), wanted["backbone.pos_embed"].shape
    if table is None or table.shape == want or table.ndim != 3 or table.shape[::2] != want[::2]:
        return
    old, (rows, cols) = math.isqrt(table.shape[1] - 1), grid_hw
    if old < 1 or old * old + 1 != table.shape[1] or not table.is_floating_point():
        return
    if not resize_positions:
        raise CheckpointError(
            f"the position table is for images of {16 * old}x{16 * old} ({old}x{old} patches), the student takes "
            f"{16 * rows}x{16 * cols}: set image_size={16 * old} or ask for resize_positions=True"
        )
    grid = table[:, 1:].float().transpose(1, 2).unflatten(2, (old, old))
    grid = F.interpolate(grid, size=(rows, cols), mode="bicubic", align_corners=False)
    named["backbone.pos_embed"] = torch.cat([table[:, :1].float(), grid.flatten(2).transpose(1, 2)], 1)
    notes.append(f"position table interpolated from {old}x{old} to {rows}x{cols} patches")


def _describe(problems: list[str], named: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> str:
    lines = []
    for key in problems[:3]:
        have = tuple(named[key].shape) if key in named else "missing"
        lines.append(f"{key} is {have}, want {tuple(wanted[key].shape)}")
    kind = "another model" if any(k in named for k in problems) else "an incomplete model"
    return f"weights of {kind}: {len(problems)} of {len(wanted)} tensors do not fit; {'; '.join(lines)}"


def _some(names: Iterable[str]) -> str:
    every = [str(n) for n in names]
    return ", ".join(every[:3]) + (f" and {len(every) - 3} more" if len(every) > 3 else "")


__all__ = ["ANYWHERE", "AVERAGES", "CONTAINERS", "INNER", "RENAMES", "WRAPPERS", "Fit", "find_tensors", "fit"]
