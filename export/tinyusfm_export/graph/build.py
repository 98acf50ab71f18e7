"""Student -> ExportGraph: the rewritten network, its ONNX and its ExportedProgram.

The student's parameters are read by their published names (``backbone.blocks.3.attn.qkv``, ``neck.convs``,
``head.lateral``, ...), never through the student's package. The rewritten network

* takes grey brightness codes 0..255 (uint8 or float): channels, /255, mean and std are folded into the patch embedding,
  which is a linear on flattened patches;
* writes attention with ``chunk`` and 4-D tensors, 1/sqrt(d) and the LayerNorm affines folded into the linears;
* drops the class token after the attention of the last block, where nobody reads it any more;
* leaves the patches outside the spec's sector out where that is asked for: they are dropped in front of the patch
  embedding (a linear, so before and after it are the same) with their rows of the position table, and the segmentation
  head gets the features of a zero token in their places;
* segments with one linear per pyramid level (neck and lateral merged), BatchNorm folded, and one classifier per
  level before enlargement; classifies with the token mean before the last linear.

All of it is exact up to float32 rounding. It does not know quantization, engines or frames.

Shapes: B = 1, N tokens, D width, H heads; NCHW images.
Shapes, all static, B = 1: image 1 1 H W; h, w = H/16, W/16 rows and columns of patches; N = h w patch tokens, one more
with the class token in front; D width; A heads of d = D/A channels each; C channels of the pyramid; K logits per pixel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from tinyusfm_export.graph import rewrites
from tinyusfm_export.graph.net import Net, shape_of
from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.spec import LOGITS_NAME, ExitPolicy, ModelSpec, Task, TensorSpec

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
        module: the rewritten network, float32, evaluation mode: uint8 or float 1x1xHxW codes -> tuple of outputs.
        spec: the model's spec.
        outputs: names of the outputs, ``logits`` first, then the auxiliary ones and the logits of early exits.
        linear_inputs: activation tensor that may be quantized -> path of the linear or convolution that reads it.
        sector: name of the sector whose patches alone are looked at; empty where all are.
        takes: what the graph takes where that is not the model's image: a later stage of a chain (stages.py).
    """

    module: nn.Module = field(repr=False)
    spec: ModelSpec
    outputs: tuple[str, ...]
    linear_inputs: dict[str, str] = field(repr=False)
    sector: str = ""
    takes: TensorSpec | None = None

    @property
    def input(self) -> TensorSpec:
        """What the graph takes."""
        return self.takes or self.spec.input

    @cached_property
    def exported(self) -> ExportedProgram:
        """The same module as a torch ExportedProgram with float32 codes as input."""
        import torch

        codes = torch.zeros(self.spec.input.shape, dtype=torch.float32)
        return torch.export.export(self.module, (codes,))


def build_graph(
    student: nn.Module, spec: ModelSpec, *, auxiliary: tuple[str, ...] = (), pruned: bool = False
) -> ExportGraph:
    """Rewrites a student into its export form.

    Args:
        student: a segmentation, classification or feature student with the published names; only read.
        spec: its spec; ``architecture["heads"]`` is needed since the shapes do not tell the heads.
        auxiliary: extra outputs, such as ``tokens_block4`` and ``peak_block4``.
        pruned: leave out the patches outside the spec's sector.

    Raises:
        InputError: not a grey model, student, spec and auxiliary names do not fit together, or there is no sector.
    """
    import torch

    if pruned and spec.sector is None:
        raise InputError(f"model {spec.name!r} has no sector to prune to")
    kept = spec.sector.indices if pruned and spec.sector is not None else None
    with torch.no_grad():
        recorder, logits = _record(student, spec, auxiliary, kept)
    outputs = {LOGITS_NAME: logits, **{name: recorder.auxiliary[name] for name in auxiliary}, **recorder.exits}
    module = recorder.net.finish(outputs)
    return ExportGraph(
        module=module,
        spec=spec,
        outputs=tuple(outputs),
        linear_inputs=dict(recorder.net.linear_inputs),
        sector=spec.sector.name if pruned and spec.sector is not None else "",
    )


def live_weights(student: nn.Module, spec: ModelSpec) -> dict[str, Tensor]:
    """The weights of the export graph as functions of the student's parameters.

    The functions are differentiable.

    Args:
        student: as in ``build_graph``.
        spec: its spec.

    Returns:
        Name in ``ExportGraph.module``'s state -> tensor through which gradients reach the student.

    Raises:
        InputError: as ``build_graph``.
    """
    return dict(_record(student, spec, ())[0].net.tensors)


def _record(
    student: nn.Module, spec: ModelSpec, auxiliary: tuple[str, ...], kept: tuple[int, ...] | None = None
) -> tuple[_Recorder, Node]:
    if not spec.preprocess.grey:
        raise InputError(f"model {spec.name!r} is not grey: the export folds three equal channels into one")
    try:
        recorder = _Recorder(student, spec, auxiliary, kept)
        heads = {Task.SEGMENT: _segment, Task.CLASSIFY: _classify, Task.FEATURES: _features}
        return recorder, heads[spec.task](recorder)
    except (AttributeError, IndexError, KeyError) as error:
        raise InputError(f"this is not a student for task {spec.task.value!r}: {error}") from error


class _Recorder:
    """The student being rewritten.

    Its parts, the network recorded so far, and the auxiliary outputs found on the way.
    """

    def __init__(self, student: Any, spec: ModelSpec, auxiliary: tuple[str, ...], kept: tuple[int, ...] | None) -> None:
        self.student, self.kept = student, kept
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

    def scatter(self, path: str, tokens: Node, blank: Tensor) -> Node:
        """Puts kept patches back in their places.

        Args:
            path: name of the result.
            tokens: (1, kept, C).
            blank: (C,), what a patch has that was left out.
        """
        if self.kept is None:
            return tokens
        place = {patch: row for row, patch in enumerate(self.kept)}
        index = tuple(place.get(patch, len(self.kept)) for patch in range(self.grid[0] * self.grid[1]))
        rows = self.net.cat(f"{path}.rows", tokens, self.net.constant(f"{path}.blank", blank.reshape(1, 1, -1)))
        return self.net.take(path, rows, index)

    def note(self, index: int, tokens: Node) -> None:
        """Records the auxiliary output of a block, if it is wanted.

        ``tokens`` has patches only.
        """
        name = self.wanted.get(index)
        if name is not None:
            self.auxiliary[name] = self.net.mean_token(name, tokens)


def _check_exits(blocks: tuple[int, ...], depth: int, auxiliary: list[int]) -> None:
    if blocks[-1] >= depth:
        raise InputError(f"early exits after blocks {blocks} need more than the student's {depth} blocks")
    if late := [index for index in auxiliary if index >= blocks[0]]:
        raise InputError(
            f"the auxiliary output of block {late[0]} lies behind the first early exit and would often be missing: "
            "calibrate this student again, or export it with --no-drift"
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
    # weight (D, 256): one grey code instead of three channels; bias (D,) moves into the offsets
    weight, bias = rewrites.fold_grey(r.backbone.patch_embed.proj, pre.mean, pre.std)
    first, offsets = rewrites.token_table(r.backbone.cls_token, r.backbone.pos_embed, bias)
    # (1, 1, H, W) codes; the batch and channel axes of 1 vanish in the first reshape
    x = net.cast(net.image)
    # (h, 16, w, 16): rows of patches, rows in a patch, columns of patches, columns in a patch
    x = net.reshape("patches.split", x, (rows, PATCH, cols, PATCH))
    # (h, w, 16, 16): the 256 pixels of a patch side by side
    x = net.permute("patches.order", x, (0, 2, 1, 3))
    # (1, N, 256); a linear on patches is the stride-16 convolution, and faster as int8
    x = net.reshape("patches", x, (1, rows * cols, PATCH * PATCH))
    if r.kept is not None:
        # (1, kept, 256)
        x, offsets = net.take("patches.kept", x, r.kept), offsets[:, list(r.kept)]
    # (1, N, D)
    x = net.linear("patch_embed", x, weight, None)
    x = net.add("patch_embed.positions", x, net.constant("patch_embed.offsets", offsets))
    # (1, 1 + N, D)
    return net.cat("tokens", net.constant("cls_token", first), x)


def _blocks(r: _Recorder, x: Node, stop: int, taps: tuple[int, ...] = ()) -> tuple[Node, list[Node]]:
    """Runs blocks 0 to stop - 1.

    Returns the tokens after them and the patch tokens after the tapped ones.
    """
    tapped = []
    for index in range(stop):
        x = _block(r, index, x)
        if index in taps or index in r.wanted:
            # the last block has dropped the class token already, every other one still carries it in front
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
    """The residual of a block's attention and the branch added to it.

    In the last block both are without class token.
    """
    net, path, block = r.net, f"blocks.{index}", r.backbone.blocks[index]
    size = r.width // r.heads
    # weight (3 D, D): queries, keys, values; norm1's affine and 1/sqrt(d) are inside it
    packed = rewrites.fold_query_scale(rewrites.fold_layer_norm(block.norm1, block.attn.qkv), r.heads)
    # LayerNorm without affine, (1, 1 + N, D)
    normed = net.normalise(f"{path}.norm1", x, block.norm1.eps)
    # three of (1, 1 + N, D); a chunk and 4-D products are what engines match as attention
    q, k, v = net.chunk3(f"{path}.attn.chunk", net.linear(f"{path}.attn.qkv", normed, *packed))
    # nobody reads the class token behind the last block: it stays a key and a value, but asks nothing
    if index == r.last:
        q, x = net.tail(f"{path}.attn.query_patches", q), net.tail(f"{path}.patches_in", x)
    # keys are laid out transposed, so that the scores are a plain product
    axes = {"q": (0, 2, 1, 3), "k": (0, 2, 3, 1), "v": (0, 2, 1, 3)}
    heads = {}
    for name, part in (("q", q), ("k", k), ("v", v)):
        # (1, tokens, A, d)
        split = net.reshape(f"{path}.attn.{name}.heads", part, (1, shape_of(part)[1], r.heads, size))
        # q and v (1, A, tokens, d), k (1, A, d, tokens)
        heads[name] = net.permute(f"{path}.attn.{name}", split, axes[name])
    # scores (1, A, queries, keys), softmax over the keys; queries = N in the last block, else 1 + N
    weights = net.softmax(f"{path}.attn.weights", net.matmul(f"{path}.attn.scores", heads["q"], heads["k"]))
    # (1, A, queries, d) -> (1, queries, A, d)
    context = net.permute(f"{path}.attn.context", net.matmul(f"{path}.attn.mix", weights, heads["v"]), (0, 2, 1, 3))
    # (1, queries, D)
    joined = net.reshape(f"{path}.attn.joined", context, (1, shape_of(x)[1], r.width))
    return x, net.linear(f"{path}.attn.proj", joined, block.attn.proj.weight, block.attn.proj.bias)


def _hidden(r: _Recorder, index: int, x: Node) -> Node:
    """GELU(fc1(norm2(x)))."""
    net, path, block = r.net, f"blocks.{index}", r.backbone.blocks[index]
    normed = net.normalise(f"{path}.norm2", x, block.norm2.eps)
    folded = rewrites.fold_layer_norm(block.norm2, block.mlp.fc1)
    # (1, tokens, 4 D) with the published ratio
    hidden = net.gelu(f"{path}.mlp.act", net.linear(f"{path}.mlp.fc1", normed, *folded))
    if index in r.peaks:
        r.auxiliary[r.peaks[index]] = net.peak(r.peaks[index], hidden)
    return hidden


def _segment(r: _Recorder) -> Node:
    """The segmentation head: pyramid, classifiers, enlargement.

    Pyramid, top-down sum, 3x3 per level, classifier per level, sum, enlargement to the input's size.
    """
    net, student = r.net, r.student
    # rows and columns of the four levels: 4, 2, 1 and 1/2 times the patch grid
    sizes = [_level_size(r.grid, scale) for scale in student.neck.scales]
    levels = []
    # one level per tapped block; tokens (1, N, D)
    for i, tokens in enumerate(_blocks(r, _embed(r), r.last + 1, TAPS)[1]):
        conv, norm, _ = student.head.lateral[i]
        # two 1x1 convolutions and a BatchNorm as one linear D -> C, moved in front of the resize
        merged = rewrites.merge_neck_lateral(student.neck.convs[i], conv, norm)
        x = net.linear(f"head.lateral.{i}", tokens, *merged)
        # what the linear makes of a zero token stands where no patch was looked at
        x = r.scatter(f"head.lateral.{i}.scattered", x, merged[1])
        # (1, N, C) -> (1, C, N) -> (1, C, h, w)
        x = net.permute(f"head.lateral.{i}.channels", x, (0, 2, 1))
        x = net.reshape(f"head.lateral.{i}.map", x, (1, shape_of(x)[1], *r.grid))
        # (1, C, h_i, w_i)
        halve = student.neck.scales[i] == 0.5
        x = net.halve(f"head.scale.{i}", x) if halve else net.resize(f"head.scale.{i}", x, sizes[i])
        levels.append(net.relu(f"head.lateral.{i}.relu", x))
    # top down: the coarser level, enlarged, is added to the next finer one
    for i in range(len(levels) - 1, 0, -1):
        up = net.resize(f"head.down.{i}", levels[i], sizes[i - 1])
        levels[i - 1] = net.add(f"head.sum.{i - 1}", levels[i - 1], up)
    # classify, then enlarge: K channels are resized instead of C
    classifiers = rewrites.split_classifier(student.head.classifier, len(levels))
    total = None
    for i, level in enumerate(levels):
        x = net.relu(f"head.smooth.{i}.relu", _smooth(r, i, level))
        # (1, K, h_i, w_i), then (1, K, 4 h, 4 w)
        x = net.conv(f"head.classifier.{i}", x, *classifiers[i])
        x = _enlarge(net, f"head.up.{i}", x, sizes[0])
        total = x if total is None else net.add(f"head.total.{i}", total, x)
    assert total is not None
    # (1, K, H, W)
    return _enlarge(net, "logits", total, (r.spec.preprocess.height, r.spec.preprocess.width))


def _enlarge(net: Net, path: str, x: Node, size: tuple[int, int]) -> Node:
    """Bilinear resize of a map with few channels."""
    # constant (rows out, rows in) and (columns out, columns in)
    rows, cols = (rewrites.bilinear_matrix(a, b) for a, b in zip(shape_of(x)[2:], size, strict=True))
    return net.resize_thin(path, x, rows, cols)


def _smooth(r: _Recorder, index: int, x: Node) -> Node:
    """The 3x3 convolution of one level with its BatchNorm.

    In the light head: depthwise and pointwise.
    """
    layers, path = r.student.head.smooth[index], f"head.smooth.{index}"
    # convolution, BatchNorm, ReLU
    if len(layers) == 3:
        return r.net.conv(path, x, *rewrites.fold_batch_norm(layers[0], layers[1]))
    # light head: the 3x3 of each channel stays float, the 1x1 takes the BatchNorm
    depthwise, pointwise, norm, _ = layers
    x = r.net.conv(f"{path}.depthwise", x, depthwise.weight, depthwise.bias, groups=depthwise.groups, quantizable=False)
    return r.net.conv(f"{path}.pointwise", x, *rewrites.fold_batch_norm(pointwise, norm))


def _level_size(grid: tuple[int, int], scale: float) -> tuple[int, int]:
    return int(grid[0] * scale), int(grid[1] * scale)


def _classify(r: _Recorder) -> Node:
    """Mean of the patch tokens, norm, linear.

    The mean is taken before the last block's second linear.
    """
    net, student, path = r.net, r.student, f"blocks.{r.last}"
    blocks = r.spec.exits.blocks if r.spec.exits is not None else ()
    x, tapped = _blocks(r, _embed(r), r.last, tuple(block - 1 for block in blocks))
    for block, patches in zip(blocks, tapped, strict=True):
        _exit(r, block, patches)
    # the mean is linear, so it moves in front of fc2: one row instead of N rows to multiply
    x, branch = _attend(r, r.last, x)
    x = net.add(f"{path}.mid", x, branch)
    fc2 = r.backbone.blocks[r.last].mlp.fc2
    # (1, N, 4 D) -> (1, 4 D)
    hidden = net.mean_token(f"{path}.mlp.mean", _hidden(r, r.last, x))
    # (1, D); a single row of products stays float
    second = net.linear(f"{path}.mlp.fc2", hidden, fc2.weight, fc2.bias, quantizable=False)
    pooled = net.add(f"{path}.out", net.mean_token(f"{path}.mean", x), second)
    if r.last in r.wanted:
        r.auxiliary[r.wanted[r.last]] = net.reshape(r.wanted[r.last], pooled, (1, r.width))
    # (1, D) -> logits (1, K)
    normed = net.normalise("fc_norm", pooled, student.fc_norm.eps)
    return net.linear("logits", normed, *rewrites.fold_layer_norm(student.fc_norm, student.head), quantizable=False)


def _exit(r: _Recorder, block: int, patches: Node) -> None:
    """An early answer after a block counted from 1.

    Mean of the patch tokens, norm, linear.
    """
    net, head, path = r.net, r.student.exits[str(block)], f"exits.{block}"
    normed = net.normalise(f"{path}.norm", net.mean_token(f"{path}.mean", patches), head.norm.eps)
    folded = rewrites.fold_layer_norm(head.norm, head.head)
    r.exits[exit_logits(block)] = net.linear(f"{path}.head", normed, *folded, quantizable=False)


def exit_logits(block: int) -> str:
    """Name of the output with the logits of the exit after a block, counted from 1."""
    return f"logits_exit{block}"


def logit_names(policy: ExitPolicy | None) -> list[str]:
    """Outputs of the whole network that hold logits.

    Those of its early exits, if any, in order, and the end last.
    """
    return [*(exit_logits(block) for block in (policy.blocks if policy is not None else ())), LOGITS_NAME]


def _features(r: _Recorder) -> Node:
    """Final norm on the patch tokens, as a map NDhw."""
    net, norm = r.net, r.backbone.norm
    tokens, _ = _blocks(r, _embed(r), r.last + 1)
    # (1, N, D); its affine has no linear behind it to fold into, so it stays
    normed = net.normalise("norm", tokens, norm.eps, (norm.weight, norm.bias))
    normed = r.scatter("norm.scattered", normed, norm.bias * 0.0)
    # (1, N, D) -> (1, D, N) -> (1, D, h, w)
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
