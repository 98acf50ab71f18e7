"""Inference whose numbers go into a bundle: one thread, no gradients, no autocast.

PyTorch's convolutions round otherwise on two threads than on one. A bundle must not depend on how many cores the
machine that built it has, nor on who set the number of threads before.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def repeatable_inference() -> Iterator[None]:
    """PyTorch on one thread, without gradients and autocast.

    The number of threads is put back afterwards.
    """
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode(), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_num_threads(threads)


__all__ = ["repeatable_inference"]
