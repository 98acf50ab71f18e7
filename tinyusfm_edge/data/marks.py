"""The mark on every label of a student that is for demonstrations alone.

With it no reading loses this information. Tables hold the label without it.
"""

from __future__ import annotations

from collections.abc import Sequence

DEMO_MARK = " (demo only)"
"""Appended to a label."""


def label_numbers(labels: Sequence[str]) -> dict[str, int]:
    """Label as a table writes it -> its number.

    Args:
        labels: of the model, with the mark or without.
    """
    return {label.removesuffix(DEMO_MARK): number for number, label in enumerate(labels)}


__all__ = ["DEMO_MARK", "label_numbers"]
