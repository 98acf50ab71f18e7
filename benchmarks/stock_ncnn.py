"""The ncnn model that stock tools make of a student, for ``benchmarks/against.py --ncnn``.

    pip install ncnn pnnx
    python benchmarks/stock_ncnn.py --student fetal-head --out stock/          # writes stock/stock.ncnn.param and .bin

pnnx has no form for slices of five axes, so attention is traced with a chunk and four axes, which gives the same bits
in PyTorch (checked here). The written model then answers one input as PyTorch does, or the command ends with 1.

Shapes: normalised float32 images NCHW, logits NKHW.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tinyusfm_edge.students import load

TOLERANCE = 1e-4
"""Largest difference from PyTorch, of the logits' largest size."""


def trace(student: Any, image: Any, path: Path) -> np.ndarray:
    """Writes a student as TorchScript, attention in four axes.

    Args:
        student: module, evaluation mode.
        image: NCHW input.
        path: file to write.

    Returns:
        Its logits, by PyTorch.

    Raises:
        ValueError: the other form of attention gives other numbers.
    """
    import torch
    from torch.nn import functional

    def attend(self: Any, x_BND: Any) -> Any:
        batch, tokens, width = x_BND.shape
        parts = [
            part.reshape(batch, tokens, self.heads, width // self.heads).permute(0, 2, 1, 3)
            for part in self.qkv(x_BND).chunk(3, dim=-1)
        ]
        found = functional.scaled_dot_product_attention(*parts)
        return self.proj(found.permute(0, 2, 1, 3).reshape(batch, tokens, width))

    with torch.no_grad():
        wanted = student(image)
        for module in student.modules():
            if hasattr(module, "qkv"):
                module.forward = attend.__get__(module)
        if not torch.equal(student(image), wanted):
            raise ValueError("attention in four axes gives other numbers")
        torch.jit.trace(student, image, check_trace=False).save(str(path))
    return np.asarray(wanted.numpy())


def answer(path: Path, image: np.ndarray) -> np.ndarray:
    """Logits of an ncnn model.

    Args:
        path: its .param, .bin beside it.
        image: NCHW float32.
    """
    import ncnn

    network = ncnn.Net()
    if network.load_param(str(path)) or network.load_model(str(path.with_suffix(".bin"))):
        raise ValueError(f"ncnn cannot load {path.name}")
    with network.create_extractor() as extractor:
        extractor.input(network.input_names()[0], ncnn.Mat(np.ascontiguousarray(image[0])).clone())
        return np.array(extractor.extract(network.output_names()[0])[1])[None]


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the model and compares it."""
    import torch

    parser = argparse.ArgumentParser(description="the ncnn model that pnnx makes of a student")
    parser.add_argument("--student", default="fetal-head")
    parser.add_argument("--out", type=Path, required=True, help="folder")
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    loaded = load(options.student)
    sides = loaded.spec.input.shape[-2:]
    image = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 3, *sides)).astype(np.float32))
    wanted = trace(loaded.module.eval(), image, options.out / "stock.pt")
    program = Path(sys.executable).with_name("pnnx")
    shape = f"inputshape=[1,3,{sides[0]},{sides[1]}]"
    subprocess.run([program, "stock.pt", shape, "fp16=0"], cwd=options.out, check=True, stdout=subprocess.DEVNULL)
    param = options.out / "stock.ncnn.param"
    away = float(np.abs(answer(param, image.numpy()) - wanted).max() / np.abs(wanted).max())
    print(f"{param}: differs from PyTorch by {away:.1e} of the logits' size")
    return 0 if away <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
