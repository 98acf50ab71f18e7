"""Small random integer models of one operation each, for the tests of the integer engine.

A model reads its input, runs the operation, and gives what the operation wrote: codes through an identity layer, words
and sums as they are. Inputs for operations on words come as float tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from tinyusfm_export.targets.integer.writer import ModelWriter
from tinyusfm_runtime.engines.integer.layout import (
    ADD,
    CODES,
    EXACT,
    F32,
    I16,
    I32,
    U8,
    WORDS,
)

Tensors = dict[str, np.ndarray]
"""What a file holds."""


class OneOperation:
    """A model around one operation.

    Args:
        rng: draws everything.
        rows: of the source.
        columns: of the source.
        words: the source holds words, else codes.
    """

    def __init__(self, rng: np.random.Generator, rows: int, columns: int, *, words: bool) -> None:
        self.rng, self.words = rng, words
        self.writer = ModelWriter()
        self.writer.port("tokens_in" if words else "image", F32 if words else U8, (1, rows, columns))
        source = self.writer.buffer("input", F32 if words else U8, rows, columns)
        self.source = source
        if words:
            self.source = self.writer.buffer("words", I16, rows, columns)
            self.writer.add("tokens", source, self.source, label="", bits=0)

    def target(self, dtype: int, rows: int, columns: int) -> int:
        """A buffer to write to."""
        return self.writer.buffer("target", dtype, rows, columns)

    def finish(self, target: int) -> Tensors:
        """The file's tensors, the target given as the output."""
        dtype, rows, columns = self.writer.buffers[target]
        if dtype == U8:
            again = self.writer.buffer("again", I16, rows, columns)
            identity = {
                "weight": np.eye(columns, dtype=np.int8),
                "bias": np.zeros(columns, "<i4"),
                "shift": np.zeros(columns, "i1"),
                "factor": np.full(columns, 32767, "<i2"),
            }
            fields = {"row": 0, "target_row": 0, "rows": rows, "mode": WORDS, "bits": 0, "zero": 0, "table": 0}
            self.writer.add("linear", target, again, label="", tensors=identity, **fields)
            target = again
        port = self.writer.port("logits", F32, (1, rows, columns))
        one = int(np.array([1.0], np.float32).view(np.int32)[0])
        self.writer.add("output", target, target, label="", port=port, scale=one, transposed=0)
        return self.writer.all_tensors()

    def channels(self, outputs: int, inputs: tuple[int, ...], reach: int, limit: int) -> Tensors:
        """Weights, biases and multipliers of a layer whose sums reach about so far."""
        shift = self.rng.integers(0, max(1, int(reach).bit_length() - 12), outputs)
        return {
            "weight": self.rng.integers(-limit, limit + 1, (outputs, *inputs)).astype(np.int8),
            "bias": self.rng.integers(-(2**16), 2**16, outputs).astype("<i4"),
            "shift": shift.astype("i1"),
            "factor": self.rng.integers(0, 2**15, outputs).astype("<i2"),
        }

    def input(self, *, extreme: bool) -> np.ndarray:
        """An input: uniform, or of the smallest and largest values alone."""
        _, dtype, shape = self.writer.ports[0]
        low, high = (-(2**15), 2**15 - 1) if self.words else (0, 255)
        values = self.rng.choice([low, high, 0, 1], shape) if extreme else self.rng.integers(low, high + 1, shape)
        return values.astype(np.float32 if dtype == F32 else np.uint8)


def linear(rng: np.random.Generator, limit: int) -> tuple[OneOperation, Tensors]:
    """A linear of any mode; ``limit`` is the largest weight."""
    words, mode = bool(rng.integers(2)), int(rng.integers(3))
    rows, inputs, outputs = (int(rng.integers(1, n)) for n in (20, 70, 50))
    model = OneOperation(rng, rows, inputs, words=words)
    first, before = int(rng.integers(rows)), int(rng.integers(3))
    target = model.target(U8 if mode == CODES else I16, rows - first + before, outputs)
    tensors = model.channels(outputs, (inputs,), inputs * limit * (2**15 if words else 255), limit)
    table = int(mode == CODES and rng.integers(2))
    if table:
        tensors["table"] = rng.integers(0, 256, 256).astype(np.uint8)
    if mode == ADD:
        start = rng.integers(-(2**15), 2**15, (rows - first + before, outputs)).astype("<i2")
        model.writer.add("fill", target, target, label="", tensors={"table": start})
    fields = {"row": first, "target_row": before, "rows": rows - first, "mode": mode, "table": table}
    fields |= {"bits": int(rng.integers(8)), "zero": int(rng.integers(256)) if mode == CODES else 0}
    model.writer.add("linear", model.source, target, label="", tensors=tensors, **fields)
    return model, model.finish(target)


def norm(rng: np.random.Generator, width: int) -> tuple[OneOperation, Tensors]:
    """A LayerNorm of some width."""
    rows, mode = int(rng.integers(1, 8)), int(rng.integers(2))
    model = OneOperation(rng, rows, width, words=True)
    first = int(rng.integers(rows))
    target = model.target(U8 if mode == CODES else I16, rows - first, width)
    root = int(np.sqrt(width) * 2.0 ** (15 + int(np.floor(14 - np.log2(np.sqrt(width)) - 1e-9))))
    tensors: Tensors = {"constants": np.array([int(rng.integers(1, 2**40)), root], "<i8")}
    if mode == CODES:
        tensors["factor"] = rng.integers(0, 2**15, width).astype("<i2")
    fields = {"row": first, "rows": rows - first, "mode": mode, "bits": int(rng.integers(8))}
    model.writer.add("norm", model.source, target, label="", tensors=tensors, zero=int(rng.integers(256)), **fields)
    return model, model.finish(target)


def attention(rng: np.random.Generator, size: int) -> tuple[OneOperation, Tensors]:
    """An attention over heads of some size."""
    heads, tokens = int(rng.integers(1, 5)), int(rng.integers(1, 70))
    model = OneOperation(rng, tokens, 3 * heads * size, words=False)
    first = int(rng.integers(2)) if tokens > 1 else 0
    target = model.target(U8, tokens - first, heads * size)
    shift = rng.integers(-12, 6, heads)
    tensors = {
        "left": np.maximum(shift, 0).astype("i1"),
        "right": np.maximum(-shift, 0).astype("i1"),
        "factor": rng.integers(0, 2**15, heads).astype("<i2"),
        "out": rng.integers(0, 2**15, heads).astype("<i2"),
    }
    fields = {"heads": heads, "row": first, "bits": int(rng.integers(8)), "zero": int(rng.integers(256))}
    model.writer.add("attention", model.source, target, label="", tensors=tensors, drop=int(rng.integers(7)), **fields)
    return model, model.finish(target)


def window(rng: np.random.Generator, kind: str, limit: int) -> tuple[OneOperation, Tensors]:
    """A convolution or a depthwise one."""
    height, width, channels = (int(rng.integers(1, n)) for n in (9, 9, 40))
    outputs = channels if kind == "depthwise" else int(rng.integers(1, 40))
    model = OneOperation(rng, height * width, channels, words=False)
    target = model.target(U8, height * width, outputs)
    inputs = (9,) if kind == "depthwise" else (9, channels)
    tensors = model.channels(outputs, inputs, 9 * channels * limit * 255, limit)
    fields = {"height": height, "width": width, "bits": int(rng.integers(8)), "zero": int(rng.integers(256))}
    model.writer.add(kind, model.source, target, label="", tensors=tensors, **fields)
    return model, model.finish(target)


def resize(rng: np.random.Generator) -> tuple[OneOperation, Tensors]:
    """A resize with any shares and flags."""
    old, new = rng.integers(1, 8, 2).tolist(), rng.integers(1, 16, 2).tolist()
    channels, bits = int(rng.integers(1, 20)), int(rng.integers(8))
    flags = int(rng.choice([0, 1, 2, 3, EXACT]))
    model = OneOperation(rng, old[0] * old[1], channels, words=True)
    target = model.target(I32 if flags == EXACT else I16, new[0] * new[1], channels)
    if flags & 2:
        start = rng.integers(-(2**15), 2**15, (new[0] * new[1], channels)).astype("<i2")
        model.writer.add("fill", target, target, label="", tensors={"table": start})
    tensors: dict[str, Any] = {}
    for axis, before, after in (("rows", old[0], new[0]), ("columns", old[1], new[1])):
        tensors[f"{axis}_first"] = rng.integers(0, before, after).astype("<i4")
        tensors[f"{axis}_share"] = rng.integers(0, 2**bits + 1, after).astype("<i2")
    fields = {"from_height": old[0], "from_width": old[1], "height": new[0], "width": new[1]}
    model.writer.add("resize", model.source, target, label="", tensors=tensors, share_bits=bits, flags=flags, **fields)
    return model, model.finish(target)


def gather(rng: np.random.Generator, blank: int) -> tuple[OneOperation, Tensors]:
    """Rows by their numbers: codes, words or sums, with a blank row (1) or without (0)."""
    rows, kept, channels = int(rng.integers(1, 60)), int(rng.integers(1, 80)), int(rng.integers(1, 40))
    dtype = int(rng.choice([U8, I16, I32]))
    model = OneOperation(rng, rows, channels, words=dtype != U8)
    source = model.source
    if dtype == I32:
        source = model.writer.buffer("sums", I32, rows, channels)
        affine = {"factor": np.full(channels, 9999, "<i4"), "bias": rng.integers(-99, 99, channels).astype("<i4")}
        model.writer.add("affine", model.source, source, label="", tensors=affine)
    tensors: Tensors = {"index": rng.integers(-blank, rows, kept).astype("<i4")}
    if blank:
        low, high = {U8: (0, 255), I16: (-(2**15), 2**15 - 1), I32: (-(2**31), 2**31 - 1)}[dtype]
        tensors["blank"] = rng.integers(low, high + 1, channels).astype("<i4")
    target = model.target(dtype, kept, channels)
    model.writer.add("gather", source, target, label="", tensors=tensors, blank=blank)
    return model, model.finish(target)


def simple(rng: np.random.Generator, kind: str) -> tuple[OneOperation, Tensors]:
    """Any of the operations without weights."""
    height, width, channels = int(rng.integers(2, 8)), int(rng.integers(2, 8)), int(rng.integers(1, 30))
    rows = height * width
    model = OneOperation(rng, rows, channels, words=kind != "peak" and not (kind == "mean" and rng.integers(2)))
    first = int(rng.integers(rows))
    kept = {"row": first, "rows": rows - first}
    if kind == "halve":
        target, fields = model.target(I16, height // 2 * (width // 2), channels), {"height": height, "width": width}
        model.writer.add(kind, model.source, target, label="", flags=int(rng.integers(2)), **fields)
    elif kind == "codes":
        target, factor = model.target(U8, rows, channels), int(rng.integers(2**15))
        fields = {"bits": int(rng.integers(8)), "zero": int(rng.integers(256))}
        model.writer.add(kind, model.source, target, label="", factor=factor, **fields)
    elif kind == "mean":
        target, fields = model.target(I16, 1, channels), {"shift": int(rng.integers(12)), "bits": int(rng.integers(15))}
        bias, factor = int(rng.integers(-(2**20), 2**20)), int(rng.integers(2**15))
        model.writer.add(kind, model.source, target, label="", bias=bias, factor=factor, **kept, **fields)
    elif kind == "peak":
        target = model.target(I32, 1, 1)
        model.writer.add(kind, model.source, target, label="", zero=int(rng.integers(256)))
    elif kind == "sum":
        target = model.target(I32, 1, channels)
        model.writer.add(kind, model.source, target, label="", **kept)
    else:
        target = model.target(I32, rows, channels)
        tensors = {"factor": rng.integers(-9999, 9999, channels).astype("<i4")}
        tensors["bias"] = rng.integers(-(2**28), 2**28, channels).astype("<i4")
        model.writer.add(kind, model.source, target, label="", tensors=tensors)
    return model, model.finish(target)
