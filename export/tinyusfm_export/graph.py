"""Student -> ExportGraph: the rewritten net, its ONNX and its ExportedProgram.

The student's parameters are read by their published names (``backbone.blocks.3.attn.qkv``, ``neck.convs``,
``head.lateral``, ...), never through the student's package. The rewritten net

* takes grey brightness codes 0..255 (uint8 or float): channels, /255, mean and std are folded into the patch embedding,
  which is a linear on flattened patches;
* writes attention with ``chunk`` and 4-D tensors, 1/sqrt(d) and the LayerNorm affines folded into the linears;
* drops the class token after the attention of the last block, where nobody reads it any more;
* segments with one linear per pyramid level (neck and lateral merged), BatchNorm folded, and one classifier per
  level before enlargement; classifies with the token mean before the last linear.

All of it is exact up to float32 rounding. It does not know quantization, engines or frames.

Shapes: B = 1, N tokens, D width, H heads; NCHW pictures.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tinyusfm_export import rewrites
from tinyusfm_export.net import Net, shape_of
from tinyusfm_runtime.engine import LOGITS_NAME
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import ExitPolicy, ModelSpec, Task, TensorSpec

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.export import ExportedProgram
    from torch.fx import Node

PATCH = 16
"""Rows and columns of a patch."""
TAPS = (3, 5, 7, 11)
"""Blocks that feed the segmentation pyramid, finest level first (out_indices of the published seg model)."""
AUXILIARY_PREFIX = "tokens_block"
"""``tokens_block4`` is the mean patch token (1xD) after the block with index 4, counted from 0."""
PEAK_PREFIX = "peak_block"
"""``peak_block4`` is the largest absolute value (shape 1) behind the GELU of the block with index 4."""


@dataclass(frozen=True, kw_only=True)
class ExportGraph:
    """One graph in several forms.

    Attributes:
        module: the rewritten net, float32, evaluation mode: uint8 or float 1x1xHxW codes -> tuple of outputs.
        spec: the model's spec.
        outputs: names of the outputs, ``logits`` first, then the auxiliary ones and the logits of early exits.
        linear_inputs: activation tensor that may be quantized -> path of the linear or convolution that reads it.
        takes: what the graph takes where that is not the model's picture: a later stage of a chain (stages.py).
    """

    module: nn.Module = field(repr=False)
    spec: ModelSpec
    outputs: tuple[str, ...]
    linear_inputs: dict[str, str] = field(repr=False)
    takes: TensorSpec | None = None

    @property
    def input(self) -> TensorSpec:
        """What the graph takes."""
        return self.takes or self.spec.input

    @cached_property
    def onnx_bytes(self) -> bytes:
        """The ONNX with ``uint8`` input, see onnx_writer.py."""
        return self.onnx()

    def onnx(self, *, float_input: bool = False) -> bytes:
        """The graph as one ONNX file.

        Args:
            float_input: take float32 codes instead of uint8.

        Raises:
            MissingExtra: onnx is not installed.
        """
        from tinyusfm_export.onnx_writer import write_onnx

        return write_onnx(self, float_input=float_input)

    def onnx_path(self, out: Path) -> Path:
        """Writes the ONNX to a file and checks it there.

        Raises:
            OutputError: the file cannot be written.
            MissingExtra: onnx is not installed.
        """
        from tinyusfm_export.onnx_writer import save_checked

        return save_checked(self.onnx_bytes, out)

    @cached_property
    def exported(self) -> ExportedProgram:
        """The same module as a torch ExportedProgram with float32 codes as input."""
        import torch

        codes = torch.zeros(self.spec.input.shape, dtype=torch.float32)
        return torch.export.export(self.module, (codes,))


def build_graph(student: nn.Module, spec: ModelSpec, *, auxiliary: tuple[str, ...] = ()) -> ExportGraph:
    """Rewrites a student into its export form.

    Args:
        student: a segmentation, classification or feature student with the published names; only read.
        spec: its spec; ``architecture["heads"]`` is needed since the shapes do not tell the heads.
        auxiliary: extra outputs, such as ``tokens_block4`` and ``peak_block4``.

    Raises:
        InputError: not a grey model, or student, spec and auxiliary names do not fit together.
    """
    import torch

    with torch.no_grad():
        recorder, logits = _record(student, spec, auxiliary)
    outputs = {LOGITS_NAME: logits, **{name: recorder.auxiliary[name] for name in auxiliary}, **recorder.exits}
    module = recorder.net.finish(outputs)
    return ExportGraph(module=module, spec=spec, outputs=tuple(outputs), linear_inputs=dict(recorder.net.linear_inputs))


def live_weights(student: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """The weights of the export graph as differentiable functions of the student's parameters.

    Args:
        student: as in ``build_graph``.
        spec: its spec.

    Returns:
        Name in ``ExportGraph.module``'s state -> tensor through which gradients reach the student.

    Raises:
        InputError: as ``build_graph``.
    """
    return dict(_record(student, spec, ())[0].net.tensors)


def _record(student: nn.Module, spec: ModelSpec, auxiliary: tuple[str, ...]) -> tuple[_Recorder, Node]:
    if not spec.preprocess.grey:
        raise InputError(f"model {spec.name!r} is not grey: the export folds three equal channels into one")
    try:
        recorder = _Recorder(student, spec, auxiliary)
        heads = {Task.SEGMENT: _segment, Task.CLASSIFY: _classify, Task.FEATURES: _features}
        return recorder, heads[spec.task](recorder)
    except (AttributeError, IndexError, KeyError) as error:
        raise InputError(f"this is not a student for task {spec.task.value!r}: {error}") from error


class _Recorder:
    """The student being rewritten: its parts, the net recorded so far, and the auxiliary outputs found on the way."""

    def __init__(self, student: Any, spec: ModelSpec, auxiliary: tuple[str, ...]) -> None:
        self.student = student
        self.backbone = student.backbone
        self.spec = spec
        self.net = Net(spec.input.shape)
        self.auxiliary: dict[str, Node] = {}
        self.exits: dict[str, Node] = {}
        self.last = len(self.backbone.blocks) - 1
        depth = len(self.backbone.blocks)
        self.wanted = {_auxiliary_index(n, AUXILIARY_PREFIX, depth): n for n in auxiliary if not _is_peak(n)}
        self.peaks = {_auxiliary_index(n, PEAK_PREFIX, depth): n for n in auxiliary if _is_peak(n)}
        if spec.exits is not None:
            _check_exits(spec.exits.blocks, depth, [*self.wanted, *self.peaks])
        self.width = int(self.backbone.pos_embed.shape[-1])
        self.heads = spec.architecture.get("heads", 0)
        if not isinstance(self.heads, int) or self.heads < 1 or self.width % self.heads:
            raise InputError(f"spec {spec.name!r}: architecture['heads'] must divide the width {self.width}")
        self.grid = (spec.preprocess.height // PATCH, spec.preprocess.width // PATCH)
        patches = self.backbone.pos_embed.shape[1] - 1
        if self.grid[0] * self.grid[1] != patches or spec.preprocess.height % PATCH or spec.preprocess.width % PATCH:
            size = f"{spec.preprocess.height}x{spec.preprocess.width}"
            raise InputError(f"input size {size} does not fit a student with {patches} patches of {PATCH}x{PATCH}")

    def note(self, index: int, tokens: Node) -> None:
        """Records the auxiliary output of a block, if it is wanted; ``tokens`` has patches only."""
        name = self.wanted.get(index)
        if name is not None:
            self.auxiliary[name] = self.net.mean_token(name, tokens)


def _check_exits(blocks: tuple[int, ...], depth: int, auxiliary: list[int]) -> None:
    if blocks[-1] >= depth:
        raise InputError(f"early exits after blocks {blocks} need more than the student's {depth} blocks")
    if late := [index for index in auxiliary if index >= blocks[0]]:
        raise InputError(
            f"the auxiliary output of block {late[0]} lies behind the first early exit and would often be missing: "
            "calibrate this student anew, or export it with --no-drift"
        )


def _is_peak(name: str) -> bool:
    return name.startswith(PEAK_PREFIX)


def _auxiliary_index(name: str, prefix: str, depth: int) -> int:
    number = name.removeprefix(prefix)
    if number == name or not number.isdigit() or int(number) >= depth:
        known = " or ".join(f"{known}0 to {known}{depth - 1}" for known in (AUXILIARY_PREFIX, PEAK_PREFIX))
        raise InputError(f"unknown auxiliary output {name!r}: use {known}")
    return int(number)


def _embed(r: _Recorder) -> Node:
    """Codes -> tokens BND before the first block, class token first."""
    net, (rows, cols) = r.net, r.grid
    pre = r.spec.preprocess
    weight, bias = rewrites.fold_grey(r.backbone.patch_embed.proj, pre.mean, pre.std)
    first, offsets = rewrites.token_table(r.backbone.cls_token, r.backbone.pos_embed, bias)
    x = net.cast(net.image)
    x = net.reshape("patches.split", x, (rows, PATCH, cols, PATCH))
    x = net.permute("patches.order", x, (0, 2, 1, 3))
    x = net.reshape("patches", x, (1, rows * cols, PATCH * PATCH))
    x = net.linear("patch_embed", x, weight, None)
    x = net.add("patch_embed.positions", x, net.constant("patch_embed.offsets", offsets))
    return net.cat("tokens", net.constant("cls_token", first), x)


def _blocks(r: _Recorder, x: Node, stop: int, taps: tuple[int, ...] = ()) -> tuple[Node, list[Node]]:
    """Runs blocks 0 to stop - 1; returns the tokens after them and the patch tokens after the tapped ones."""
    tapped = []
    for index in range(stop):
        x = _block(r, index, x)
        if index in taps or index in r.wanted:
            patches = x if index == r.last else r.net.tail(f"blocks.{index}.patches", x)
            r.note(index, patches)
            tapped += [patches] if index in taps else []
    return x, tapped


def _block(r: _Recorder, index: int, x: Node) -> Node:
    """One block; the last one loses the class token."""
    path, block = f"blocks.{index}", r.backbone.blocks[index]
    x, branch = _attend(r, index, x)
    x = r.net.add(f"{path}.mid", x, branch)
    branch = r.net.linear(f"{path}.mlp.fc2", _hidden(r, index, x), block.mlp.fc2.weight, block.mlp.fc2.bias)
    return r.net.add(f"{path}.out", x, branch)


def _attend(r: _Recorder, index: int, x: Node) -> tuple[Node, Node]:
    """The residual of a block's attention and the branch added to it, both without class token in the last block."""
    net, path, block = r.net, f"blocks.{index}", r.backbone.blocks[index]
    size = r.width // r.heads
    packed = rewrites.fold_query_scale(rewrites.fold_layer_norm(block.norm1, block.attn.qkv), r.heads)
    normed = net.normalise(f"{path}.norm1", x, block.norm1.eps)
    q, k, v = net.chunk3(f"{path}.attn.chunk", net.linear(f"{path}.attn.qkv", normed, *packed))
    if index == r.last:
        q, x = net.tail(f"{path}.attn.query_patches", q), net.tail(f"{path}.patches_in", x)
    axes = {"q": (0, 2, 1, 3), "k": (0, 2, 3, 1), "v": (0, 2, 1, 3)}
    heads = {}
    for name, part in (("q", q), ("k", k), ("v", v)):
        split = net.reshape(f"{path}.attn.{name}.heads", part, (1, shape_of(part)[1], r.heads, size))
        heads[name] = net.permute(f"{path}.attn.{name}", split, axes[name])
    weights = net.softmax(f"{path}.attn.weights", net.matmul(f"{path}.attn.scores", heads["q"], heads["k"]))
    context = net.permute(f"{path}.attn.context", net.matmul(f"{path}.attn.mix", weights, heads["v"]), (0, 2, 1, 3))
    joined = net.reshape(f"{path}.attn.joined", context, (1, shape_of(x)[1], r.width))
    return x, net.linear(f"{path}.attn.proj", joined, block.attn.proj.weight, block.attn.proj.bias)


def _hidden(r: _Recorder, index: int, x: Node) -> Node:
    """GELU(fc1(norm2(x)))."""
    net, path, block = r.net, f"blocks.{index}", r.backbone.blocks[index]
    normed = net.normalise(f"{path}.norm2", x, block.norm2.eps)
    folded = rewrites.fold_layer_norm(block.norm2, block.mlp.fc1)
    hidden = net.gelu(f"{path}.mlp.act", net.linear(f"{path}.mlp.fc1", normed, *folded))
    if index in r.peaks:
        r.auxiliary[r.peaks[index]] = net.peak(r.peaks[index], hidden)
    return hidden


def _segment(r: _Recorder) -> Node:
    """Pyramid, top-down sum, 3x3 per level, classifier per level, sum, enlargement to the input's size."""
    net, student = r.net, r.student
    sizes = [_level_size(r.grid, scale) for scale in student.neck.scales]
    levels = []
    for i, tokens in enumerate(_blocks(r, _embed(r), r.last + 1, TAPS)[1]):
        conv, norm, _ = student.head.lateral[i]
        merged = rewrites.merge_neck_lateral(student.neck.convs[i], conv, norm)
        x = net.linear(f"head.lateral.{i}", tokens, *merged)
        x = net.permute(f"head.lateral.{i}.channels", x, (0, 2, 1))
        x = net.reshape(f"head.lateral.{i}.map", x, (1, shape_of(x)[1], *r.grid))
        halve = student.neck.scales[i] == 0.5
        x = net.halve(f"head.scale.{i}", x) if halve else net.resize(f"head.scale.{i}", x, sizes[i])
        levels.append(net.relu(f"head.lateral.{i}.relu", x))
    for i in range(len(levels) - 1, 0, -1):
        up = net.resize(f"head.down.{i}", levels[i], sizes[i - 1])
        levels[i - 1] = net.add(f"head.sum.{i - 1}", levels[i - 1], up)
    classifiers = rewrites.split_classifier(student.head.classifier, len(levels))
    total = None
    for i, level in enumerate(levels):
        x = net.relu(f"head.smooth.{i}.relu", _smooth(r, i, level))
        x = net.conv(f"head.classifier.{i}", x, *classifiers[i])
        x = _enlarge(net, f"head.up.{i}", x, sizes[0])
        total = x if total is None else net.add(f"head.total.{i}", total, x)
    assert total is not None
    return _enlarge(net, "logits", total, (r.spec.preprocess.height, r.spec.preprocess.width))


def _enlarge(net: Net, path: str, x: Node, size: tuple[int, int]) -> Node:
    """Bilinear resize of a map with few channels."""
    rows, cols = (rewrites.bilinear_matrix(a, b) for a, b in zip(shape_of(x)[2:], size, strict=True))
    return net.resize_thin(path, x, rows, cols)


def _smooth(r: _Recorder, index: int, x: Node) -> Node:
    """The 3x3 convolution of one level with its BatchNorm, or depthwise and pointwise in the light head."""
    layers, path = r.student.head.smooth[index], f"head.smooth.{index}"
    if len(layers) == 3:
        return r.net.conv(path, x, *rewrites.fold_batch_norm(layers[0], layers[1]))
    depthwise, pointwise, norm, _ = layers
    x = r.net.conv(f"{path}.depthwise", x, depthwise.weight, depthwise.bias, groups=depthwise.groups, quantizable=False)
    return r.net.conv(f"{path}.pointwise", x, *rewrites.fold_batch_norm(pointwise, norm))


def _level_size(grid: tuple[int, int], scale: float) -> tuple[int, int]:
    return int(grid[0] * scale), int(grid[1] * scale)


def _classify(r: _Recorder) -> Node:
    """Mean of the patch tokens, norm, linear; the mean is taken before the last block's second linear."""
    net, student, path = r.net, r.student, f"blocks.{r.last}"
    blocks = r.spec.exits.blocks if r.spec.exits is not None else ()
    x, tapped = _blocks(r, _embed(r), r.last, tuple(block - 1 for block in blocks))
    for block, patches in zip(blocks, tapped, strict=True):
        _exit(r, block, patches)
    x, branch = _attend(r, r.last, x)
    x = net.add(f"{path}.mid", x, branch)
    fc2 = r.backbone.blocks[r.last].mlp.fc2
    hidden = net.mean_token(f"{path}.mlp.mean", _hidden(r, r.last, x))
    second = net.linear(f"{path}.mlp.fc2", hidden, fc2.weight, fc2.bias, quantizable=False)
    pooled = net.add(f"{path}.out", net.mean_token(f"{path}.mean", x), second)
    if r.last in r.wanted:
        r.auxiliary[r.wanted[r.last]] = net.reshape(r.wanted[r.last], pooled, (1, r.width))
    normed = net.normalise("fc_norm", pooled, student.fc_norm.eps)
    return net.linear("logits", normed, *rewrites.fold_layer_norm(student.fc_norm, student.head), quantizable=False)


def _exit(r: _Recorder, block: int, patches: Node) -> None:
    """An early answer after a block counted from 1: mean of the patch tokens, norm, linear."""
    net, head, path = r.net, r.student.exits[str(block)], f"exits.{block}"
    normed = net.normalise(f"{path}.norm", net.mean_token(f"{path}.mean", patches), head.norm.eps)
    folded = rewrites.fold_layer_norm(head.norm, head.head)
    r.exits[exit_logits(block)] = net.linear(f"{path}.head", normed, *folded, quantizable=False)


def exit_logits(block: int) -> str:
    """Name of the output with the logits of the exit after a block, counted from 1."""
    return f"logits_exit{block}"


def logit_names(policy: ExitPolicy | None) -> list[str]:
    """Outputs of the whole net that hold logits: those of its early exits, if any, in order, and the end last."""
    return [*(exit_logits(block) for block in (policy.blocks if policy is not None else ())), LOGITS_NAME]


def _features(r: _Recorder) -> Node:
    """Final norm on the patch tokens, as a map NDhw."""
    net, norm = r.net, r.backbone.norm
    tokens, _ = _blocks(r, _embed(r), r.last + 1)
    normed = net.normalise("norm", tokens, norm.eps, (norm.weight, norm.bias))
    return net.reshape("logits", net.permute("norm.channels", normed, (0, 2, 1)), (1, r.width, *r.grid))


__all__ = [
    "AUXILIARY_PREFIX",
    "PATCH",
    "PEAK_PREFIX",
    "TAPS",
    "ExportGraph",
    "build_graph",
    "exit_logits",
    "live_weights",
    "logit_names",
]
