"""The weighted mean of states of one training, as a student file.

``python -m tinyusfm_edge.release.mean OUT 0.1=a.safetensors 0.4=b.safetensors 0.5=c.safetensors`` adds up float32
weights. The shares add up to one. It does not train, and does not say which mean is good.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from tinyusfm_edge.models.checkpoint import load_student_file, save_student
from tinyusfm_runtime.errors import EdgeError, InputError


def parse_parts(words: Sequence[str]) -> dict[Path, float]:
    """``SHARE=FILE`` words as shares by file.

    Raises:
        InputError: a word of another form, a file twice, or shares that do not add up to one.
    """
    parts: dict[Path, float] = {}
    for word in words:
        share, _, name = word.partition("=")
        try:
            value = float(share)
        except ValueError as error:
            raise InputError(f"{word!r} is not SHARE=FILE, such as 0.5=a.safetensors") from error
        if not name or not 0 < value <= 1:
            raise InputError(f"{word!r} is not SHARE=FILE with a share above 0 and at most 1")
        if Path(name) in parts:
            raise InputError(f"{name} stands twice")
        parts[Path(name)] = value
    if not math.isclose(sum(parts.values()), 1.0, abs_tol=1e-9):
        raise InputError(f"the shares add up to {sum(parts.values()):g}, not to 1")
    return parts


def write_mean(out: Path, parts: Mapping[Path, float]) -> str:
    """Writes the mean in float32; the last part says what goes in and out.

    Args:
        out: student file to write.
        parts: share of each student file; they add up to one.

    Returns:
        sha256 of the file, hex.

    Raises:
        CheckpointError: a file is no whole student.
        InputError: the students are not of one network.
        OutputError: the file cannot be written.
    """
    loaded = [load_student_file(path) for path in parts]
    last = loaded[-1]
    if any(student.module.config != last.module.config for student in loaded):
        raise InputError("the files hold students of different networks: a mean needs states of one training")
    states = [student.module.state_dict() for student in loaded]
    mean = {
        name: sum(share * state[name].double() for share, state in zip(parts.values(), states, strict=True)).to(
            value.dtype
        )
        if value.is_floating_point()
        else value
        for name, value in states[-1].items()
    }
    last.module.load_state_dict(mean)
    return save_student(out, last.module, last.spec, torch.float32, last.report.stages)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="weighted mean of states of one training")
    parser.add_argument("out", type=Path)
    parser.add_argument("parts", nargs="+", metavar="SHARE=FILE")
    options = parser.parse_args(argv)
    try:
        print(f"{options.out}  {write_mean(options.out, parse_parts(options.parts))[:12]}")
    except EdgeError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

__all__ = ["parse_parts", "write_mean"]
