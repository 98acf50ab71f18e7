"""The vocabulary of the export graph: twenty-one kinds of nodes.

Static shapes, and a name for every tensor.

``Net`` records calls as a torch.fx graph whose submodules hold the weights. The result is an ordinary ``nn.Module``
(eager, hooks, torch.export) and the ONNX writer covers exactly the same kinds, so there is one graph in several forms.
Recording by hand, instead of tracing or torch.onnx, keeps the names a quantization decision refers to stable:
``blocks.3.mlp.fc1`` is the layer, ``blocks.3.mlp.fc1.input`` the activation it reads.

It knows nothing of students, weights' origin or engines.

Shapes are static and written by the recorder into ``node.meta["shape"]``: tokens B N D, maps N C H W, linear weights
O I, convolution weights O I k k. Two names per node: ``label`` is what it computes, ``path`` is its tensor.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import Node


def as_array(value: Any) -> np.ndarray:
    """A torch tensor's values, or an array as it is."""
    return value.detach().numpy() if hasattr(value, "detach") else np.asarray(value)


def take_tokens(x: Tensor, index: tuple[int, ...]) -> Tensor:
    """Rows of the token axis 1 by their numbers, in the order given.

    Args:
        x: tokens B N D.
        index: of each row that is wanted, from 0; a row may be wanted twice.
    """
    return x[:, list(index)]


class Net:
    """Records an export graph, node by node; every method takes and returns fx nodes.

    ``tensors`` holds the weights as they came, by the names they have in the module, so that gradients can pass.

    Args:
        shape: static NCHW shape of the input ``image``, codes 0..255.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        from torch import fx

        self.graph = fx.Graph()
        self.modules: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.linear_inputs: dict[str, str] = {}
        self.image = self.graph.placeholder("image")
        self._mark(self.image, "image", shape)

    def finish(self, outputs: dict[str, Node]) -> nn.Module:
        """Closes the graph; the module returns the outputs as a tuple in this order."""
        from torch import fx

        # an output is known by its public name from here on, whatever computed it
        for name, node in outputs.items():
            node.meta["path"] = name
        self.graph.output(tuple(outputs.values()))
        self.graph.lint()
        return fx.GraphModule(self.modules, self.graph, "ExportGraph").eval().requires_grad_(False)

    def cast(self, x: Node) -> Node:
        """Codes to float32; float32 stays as it is."""
        import torch

        return self._mark(self.graph.call_method("to", (x, torch.float32)), "codes", shape_of(x))

    def linear(self, path: str, x: Node, weight: Tensor, bias: Tensor | None, *, quantizable: bool = True) -> Node:
        """Affine map of the last axis; weight (O, I)."""
        from torch import nn

        # (..., I) -> (..., O)
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        return self._layer(path, x, layer, (weight, bias), (*shape_of(x)[:-1], weight.shape[0]), quantizable)

    def conv(
        self, path: str, x: Node, weight: Tensor, bias: Tensor, *, groups: int = 1, quantizable: bool = True
    ) -> Node:
        """Convolution with stride 1 and the padding that keeps the size.

        Weight OIHW, odd square kernel.
        """
        from torch import nn

        out, _, kernel, _ = weight.shape
        # (1, I, h, w) -> (1, O, h, w)
        layer = nn.Conv2d(shape_of(x)[1], out, kernel, padding=kernel // 2, groups=groups)
        return self._layer(path, x, layer, (weight, bias), (1, out, *shape_of(x)[2:]), quantizable)

    def normalise(self, path: str, x: Node, eps: float, affine: tuple[Tensor, Tensor] | None = None) -> Node:
        """LayerNorm over the last axis, kept as one node."""
        from torch import nn

        width = shape_of(x)[-1]
        norm = nn.LayerNorm(width, eps=eps, elementwise_affine=affine is not None)
        return self._layer(path, x, norm, affine or (), shape_of(x), False)

    def gelu(self, path: str, x: Node) -> Node:
        """GELU with erf."""
        from torch import nn

        return self._layer(path, x, nn.GELU(), (), shape_of(x), False)

    def relu(self, path: str, x: Node) -> Node:
        """max(x, 0)."""
        from torch import nn

        return self._layer(path, x, nn.ReLU(), (), shape_of(x), False)

    def softmax(self, path: str, x: Node) -> Node:
        """Softmax over the last axis, kept as one node."""
        from torch import nn

        return self._layer(path, x, nn.Softmax(-1), (), shape_of(x), False)

    def halve(self, path: str, x: Node) -> Node:
        """Mean of 2x2 pixels, an odd last row or column dropped.

        It is bilinear scaling by 1/2 without antialiasing.
        """
        from torch import nn

        n, c, h, w = shape_of(x)
        return self._layer(path, x, nn.AvgPool2d(2), (), (n, c, h // 2, w // 2), False)

    def resize(self, path: str, x: Node, size: tuple[int, int]) -> Node:
        """Bilinear resize with half-pixel centres; the same size is no node."""
        import torch.nn.functional as F

        n, c, h, w = shape_of(x)
        if (h, w) == size:
            return x
        options: dict[str, Any] = {"size": size, "mode": "bilinear", "align_corners": False}
        return self._mark(self.graph.call_function(F.interpolate, (x,), options), path, (n, c, *size))

    def resize_thin(self, path: str, x: Node, rows: Tensor, cols: Tensor) -> Node:
        """Resize of few channels as two products with constant matrices (out, in).

        The same size is no node.
        """
        n, c, h, w = shape_of(x)
        if rows.shape[0] == h and cols.shape[0] == w:
            return x
        # rows (out, h) from the left, columns transposed (w, out) from the right
        left, right = self.constant(f"{path}.rows", rows), self.constant(f"{path}.cols", cols.T)
        # (n, c, out rows, w), then (n, c, out rows, out columns)
        half = self._product(f"{path}.half", left, x, (n, c, rows.shape[0], w))
        return self._product(path, half, right, (n, c, rows.shape[0], cols.shape[0]))

    def constant(self, path: str, value: Tensor) -> Node:
        """A stored tensor."""
        from torch import nn

        # fx attributes and submodules share one namespace, and a dot means a submodule there
        name = path.replace(".", "_")
        self.modules[name] = nn.Parameter(value.detach().clone(), requires_grad=False)
        self.tensors[name] = value
        return self._mark(self.graph.get_attr(name), path, tuple(value.shape))

    def add(self, path: str, a: Node, b: Node) -> Node:
        """Sum with broadcasting of ``b``."""
        return self._mark(self.graph.call_function(operator.add, (a, b)), path, shape_of(a))

    def matmul(self, path: str, a: Node, b: Node) -> Node:
        """Batched matrix product."""
        return self._product(path, a, b, (*shape_of(a)[:-1], shape_of(b)[-1]))

    def cat(self, path: str, a: Node, b: Node) -> Node:
        """Concatenation along the token axis 1."""
        import torch

        n, rows, width = shape_of(a)
        return self._mark(self.graph.call_function(torch.cat, ([a, b], 1)), path, (n, rows + shape_of(b)[1], width))

    def reshape(self, path: str, x: Node, shape: tuple[int, ...]) -> Node:
        """Reshape in row-major order."""
        import torch

        return self._mark(self.graph.call_function(torch.reshape, (x, shape)), path, shape)

    def permute(self, path: str, x: Node, axes: tuple[int, ...]) -> Node:
        """Permutation of axes."""
        import torch

        shape = tuple(shape_of(x)[a] for a in axes)
        return self._mark(self.graph.call_function(torch.permute, (x, axes)), path, shape)

    def chunk3(self, path: str, x: Node) -> tuple[Node, Node, Node]:
        """Three equal parts of the last axis."""
        import torch

        *head, width = shape_of(x)
        # fx has no node with three outputs: chunk gives a tuple, getitem its parts
        parts = self._mark(self.graph.call_function(torch.chunk, (x, 3, -1)), path, shape_of(x))
        shape = (*head, width // 3)
        q, k, v = (
            self._mark(self.graph.call_function(operator.getitem, (parts, i)), f"{path}.{i}", shape) for i in range(3)
        )
        return q, k, v

    def tail(self, path: str, x: Node) -> Node:
        """Every token but the first (axis 1)."""
        n, rows, width = shape_of(x)
        # x[:, 1:]
        index = (slice(None), slice(1, None))
        return self._mark(self.graph.call_function(operator.getitem, (x, index)), path, (n, rows - 1, width))

    def take(self, path: str, x: Node, index: tuple[int, ...]) -> Node:
        """Tokens by their numbers, see ``take_tokens``."""
        n, _, width = shape_of(x)
        return self._mark(self.graph.call_function(take_tokens, (x, index)), path, (n, len(index), width))

    def mean_token(self, path: str, x: Node) -> Node:
        """Mean over the token axis 1, which is dropped."""
        import torch

        n, _, width = shape_of(x)
        return self._mark(self.graph.call_function(torch.mean, (x, 1)), path, (n, width))

    def peak(self, path: str, x: Node) -> Node:
        """Largest absolute value of a whole tensor, shape (1,): the batch axis stays."""
        import torch

        size = self._mark(self.graph.call_function(torch.abs, (x,)), f"{path}.abs", shape_of(x))
        # the batch axis stays, so that a batch of calibration frames gives one peak each
        axes = tuple(range(1, len(shape_of(x))))
        return self._mark(self.graph.call_function(torch.amax, (size, axes)), path, (1,))

    def _product(self, path: str, a: Node, b: Node, shape: tuple[int, ...]) -> Node:
        import torch

        return self._mark(self.graph.call_function(torch.matmul, (a, b)), path, shape)

    def _layer(
        self,
        path: str,
        x: Node,
        layer: nn.Module,
        weights: tuple[Tensor | None, ...],
        shape: tuple[int, ...],
        quantizable: bool,
    ) -> Node:
        """Stores a module with its weight and bias under its path and calls it."""
        for name, value in zip(("weight", "bias"), weights, strict=False):
            if value is not None:
                # the module holds a copy; ``tensors`` keeps the original, through which gradients flow
                getattr(layer, name).data.copy_(value.detach())
                self.tensors[f"{path}.{name}"] = value
        self.modules[path] = layer
        if quantizable:
            # the tensor that is read gets the reader's name: this is the name of a quantization decision
            x.meta["path"] = f"{path}.input"
            self.linear_inputs[x.meta["path"]] = path
        return self._mark(self.graph.call_module(path, (x,)), path, shape)

    def _mark(self, node: Node, path: str, shape: tuple[int, ...]) -> Node:
        node.meta["label"], node.meta["path"] = path, path
        node.meta["shape"] = tuple(int(s) for s in shape)
        return node


def shape_of(node: Node) -> tuple[int, ...]:
    """Static shape of a node's value."""
    shape: tuple[int, ...] = node.meta["shape"]
    return shape


__all__ = ["Net", "as_array", "shape_of", "take_tokens"]
