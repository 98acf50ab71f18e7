"""The mark on every label of a student that is for demonstrations alone.

With it no reading loses this information.
"""

from __future__ import annotations

DEMO_MARK = " (demo only)"
"""Appended to a label; tables hold the label without it."""

__all__ = ["DEMO_MARK"]
