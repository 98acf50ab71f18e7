"""Exact rewrites of weights.

Pure functions from the student's parameters to those of the export graph.

Each computes in float64 and rounds once to float32, so the rewritten network differs from the student only by
float32 rounding (measured on the segmentation student: max abs 2e-5 on logits of up to 23, masks equal). They buy
little in float32 (2 % with ONNX Runtime) and more where products are cheap: of OpenVINO's int8 time, one Zen 5 core,
chunked attention saves 11 %, thin resizes as products 5 %, patches as a linear 3 to 6 %, the rest together 2 %.

They know parameters, not graphs: where a fold is placed is graph.py's business. They are differentiable, so that
quantization-aware training reaches the student through them; whoever only wants numbers calls them without gradients.

Shapes: O outputs, I inputs of a layer; OIHW convolution weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from tinyusfm_runtime.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

Affine = tuple["Tensor", "Tensor"]
"""Weight and bias of a linear or convolution, float32."""


def fold_grey(proj: nn.Conv2d, mean: tuple[float, ...], std: tuple[float, ...]) -> Affine:
    """Folds three equal channels, /255, mean and std into the patch embedding.

    ``sum_c w_c * ((g/255 - mean_c) / std_c) + b`` is linear in the brightness code g.

    Args:
        proj: patch embedding, weight (O, 3, P, P), stride P.
        mean: per-channel mean on a 0..1 scale.
        std: per-channel standard deviation on a 0..1 scale.

    Returns:
        Weight (O, P*P) for flattened row-major patches of codes 0..255, and bias (O,).

    Raises:
        InputError: not a patch embedding of three channels.
    """
    import torch

    if proj.in_channels != 3 or tuple(proj.stride) != tuple(proj.kernel_size) or any(proj.padding):
        raise InputError("the grey fold needs a patch embedding of 3 channels, unpadded, with stride = patch size")
    # (O, 3, P, P)
    weight = proj.weight.double()
    mean_C = torch.tensor(mean, dtype=torch.float64)
    std_C = torch.tensor(std, dtype=torch.float64)
    # (O, P, P): three equal channels g, each (g / 255 - mean) / std, share one code g
    per_code = (weight / (255.0 * std_C)[None, :, None, None]).sum(1)
    # (O,): what the means take off, the same for every patch
    offset = (weight.sum((2, 3)) * (mean_C / std_C)).sum(1)
    return per_code.flatten(1).float(), (_bias(proj) - offset).float()


def fold_layer_norm(norm: nn.LayerNorm, linear: nn.Linear) -> Affine:
    """Folds a LayerNorm's scale and shift into the linear that follows it.

    Args:
        norm: affine LayerNorm over I.
        linear: the only reader of its output.

    Returns:
        Weight (O, I) and bias (O,) for the output of the same LayerNorm without affine.
    """
    weight = linear.weight.double()
    scale, shift = norm.weight.double(), norm.bias.double()
    return (weight * scale[None]).float(), (_bias(linear) + weight @ shift).float()


def fold_query_scale(packed: Affine, heads: int) -> Affine:
    """Multiplies the query rows of a packed qkv projection by 1/sqrt(head size).

    Args:
        packed: weight (3*D, I) and bias (3*D,), query rows first.
        heads: attention heads, a divisor of D.
    """
    weight, bias = packed[0].double().clone(), packed[1].double().clone()
    width = weight.shape[0] // 3
    scale = (width // heads) ** -0.5
    # rows 0 .. D - 1 are the queries; keys and values stay
    weight[:width] *= scale
    bias[:width] *= scale
    return weight.float(), bias.float()


def fold_batch_norm(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Affine:
    """Folds an evaluation-mode BatchNorm into the convolution before it.

    Returns:
        Weight OIHW and bias (O,).

    Raises:
        InputError: the BatchNorm keeps no running statistics.
    """
    scale, shift = _batch_norm(norm)
    weight = conv.weight.double()
    return (weight * scale[:, None, None, None]).float(), (_bias(conv) * scale + shift).float()


def merge_neck_lateral(neck: nn.Conv2d, lateral: nn.Conv2d, norm: nn.BatchNorm2d) -> Affine:
    """Merges the neck's and the lateral 1x1 convolutions into one linear.

    The lateral one's BatchNorm is merged as well.

    A 1x1 convolution mixes channels and bilinear resizing mixes positions with weights that sum to one, so the
    two commute, bias included; the resize between the two convolutions moves behind the merged one (before the ReLU).

    Returns:
        Weight (O, I) over token channels, and bias (O,).

    Raises:
        InputError: a convolution is not 1x1.
    """
    if tuple(neck.kernel_size) != (1, 1) or tuple(lateral.kernel_size) != (1, 1):
        raise InputError("only 1x1 convolutions commute with a bilinear resize")
    scale, shift = _batch_norm(norm)
    # (middle, I) and (O, middle) of the two 1x1 convolutions
    first = neck.weight.double().flatten(1)
    second = lateral.weight.double().flatten(1)
    # BatchNorm scales rows of the product: (O, I)
    weight = scale[:, None] * (second @ first)
    bias = scale * (second @ _bias(neck) + _bias(lateral)) + shift
    return weight.float(), bias.float()


def split_classifier(classifier: nn.Conv2d, levels: int) -> list[Affine]:
    """One 1x1 classifier per pyramid level.

    In place of one behind the sum of the enlarged levels.

    Exact for the same reason as ``merge_neck_lateral``; the bias is counted once, in the first level.

    Returns:
        Per level: weight OIHW and bias (O,).
    """
    import torch

    # (K, C, 1, 1), shared by all levels: the classifier of a sum is the sum of the classifiers
    weight = classifier.weight
    bias = _bias(classifier).float()
    return [(weight, bias if level == 0 else torch.zeros_like(bias)) for level in range(levels)]


def token_table(cls_token: Tensor, pos_embed: Tensor, patch_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Splits the learned positions into class token and patch offsets.

    What the class token is, and what every patch gets added.

    Args:
        cls_token: (1, 1, D).
        pos_embed: (1, 1 + patches, D), class token first.
        patch_bias: bias of the patch embedding (D,).

    Returns:
        The first token (1, 1, D) and the patches' offsets (1, patches, D), the embedding's bias included.
    """
    # (1, 1, D): the class token is constant, its position too
    first = cls_token.double() + pos_embed[:, :1].double()
    return first.float(), (pos_embed[:, 1:].double() + patch_bias.double()).float()


def bilinear_matrix(size: int, out: int) -> Tensor:
    """One axis of a bilinear resize as a matrix.

    Half-pixel centres, edges clamped, no antialiasing.

    ``rows @ x @ cols.T`` resizes the last two axes of x. For images with few channels two small products are
    many times faster than the engines' resize kernels, which vectorise over channels (one channel, 56x56 to
    224x224, one busy Zen 5 core: 0.78 ms with OpenVINO 2026.4 in bf16, 0.07 ms as products).

    Args:
        size: samples along the axis.
        out: samples wanted.

    Returns:
        Float32 (out, size); rows sum to one.
    """
    import torch

    # where each output sample lies between the input's samples, half-pixel centres
    centre = ((torch.arange(out, dtype=torch.float64) + 0.5) * (size / out) - 0.5).clamp(0, size - 1)
    low = centre.floor().long().clamp(max=max(size - 2, 0))
    high = (low + 1).clamp(max=size - 1)
    # weight of the upper neighbour, 0..1
    share = centre - low
    rows = torch.arange(out)
    matrix = torch.zeros(out, size, dtype=torch.float64)
    # += since both neighbours are the same sample where the axis has only one
    matrix[rows, low] += 1.0 - share
    matrix[rows, high] += share
    return matrix.float()


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    import torch

    if layer.bias is None:
        return torch.zeros(layer.weight.shape[0], dtype=torch.float64)
    return layer.bias.double()


def _batch_norm(norm: nn.BatchNorm2d) -> Affine:
    if norm.running_mean is None or norm.running_var is None:
        raise InputError("a BatchNorm without running statistics cannot be folded")
    # y = scale x + shift, per channel (O,)
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return scale, norm.bias.double() - norm.running_mean.double() * scale


__all__ = [
    "Affine",
    "bilinear_matrix",
    "fold_batch_norm",
    "fold_grey",
    "fold_layer_norm",
    "fold_query_scale",
    "merge_neck_lateral",
    "split_classifier",
    "token_table",
]
