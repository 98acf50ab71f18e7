"""Values of ``--mask-value`` and classes that masks do not hold.

Such a mask counts as empty. Where it holds other values than 0 that is a doubt, and where no mask of a table holds one
an error that names the values that are there. It reads nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from tinyusfm_edge.data.mask_values import MaskOptions, list_values
from tinyusfm_runtime.errors import InputError


def doubt_of(others: Sequence[str], options: MaskOptions) -> tuple[str, ...]:
    """The doubt about one mask without foreground, as one line.

    There is none where it holds 0 alone.

    Args:
        others: its values other than 0, as they are typed.
        options: what was asked for.
    """
    if not others or not options.values:
        return ()
    asked = ",".join(map(str, options.values))
    return (f"the mask holds {list_values(others)} and no --mask-value {asked}: it counts as empty",)


def check_values(masks: Sequence[tuple[bool, Sequence[str]]], where: str, options: MaskOptions) -> None:
    """Refuses masks of which none holds a value that was asked for.

    Args:
        masks: of each whether it has foreground, and its other values.
        where: what they are, for the message.
        options: what was asked for.

    Raises:
        InputError: none has foreground, and there are other values; names them.
    """
    if not options.values or any(full for full, _ in masks):
        return
    there = Counter(value for _, others in masks for value in others)
    if there:
        asked = ",".join(map(str, options.values))
        shown = list_values([f"{value} in {count}" for value, count in there.most_common()])
        raise InputError(
            f"{where}: no mask holds --mask-value {asked} (0 of {len(masks)}); there are {shown}: give the value of "
            "the foreground"
        )


def absent_classes(masks: Sequence[Sequence[str]], where: str, options: MaskOptions) -> str:
    """What is wrong with classes that none of some masks holds, as one line.

    Empty where each class stands in one.

    Args:
        masks: of each the names of the classes that it holds.
        where: what they are, for the message.
        options: what was asked for.
    """
    there = Counter(name for names in masks for name in names)
    absent = [f"{name}={span}" for name, span in options.classes.items() if name not in there]
    if not masks or not absent:
        return ""
    shown = ", ".join(f"{name} in {count}" for name, count in there.most_common()) or "none of the others either"
    return (
        f"{where}: no mask holds class {', '.join(absent)} (0 of {len(masks)}; {shown}): correct its value, or leave "
        "it out of --classes"
    )


__all__ = ["absent_classes", "check_values", "doubt_of"]
