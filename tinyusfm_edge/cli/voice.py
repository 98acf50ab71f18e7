"""How much the commands say, and where: what ``-q``, ``-v`` and ``--json -`` set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Voice:
    """How much is said, and where results for people go.

    Attributes:
        quiet: ``-q``: results, warnings and errors alone.
        verbose: ``-v``: also what the libraries of the toolkit log.
        results_aside: standard output belongs to JSON; results for people go to standard error.
    """

    quiet: bool = False
    verbose: bool = False
    results_aside: bool = False


voice = Voice()
"""Of this process; main.py sets it from the command line."""


__all__ = ["Voice", "voice"]
