"""The vocabulary of the export graph: twenty kinds of nodes, static shapes, and a name for every tensor.

``Net`` records calls as a torch.fx graph whose submodules hold the weights. The result is an ordinary ``nn.Module``
(eager, hooks, torch.export) and the ONNX writer covers exactly the same kinds, so there is one graph in several forms.
Recording by hand, instead of tracing or torch.onnx, keeps the names a quantization decision refers to stable:
``blocks.3.mlp.fc1`` is the layer, ``blocks.3.mlp.fc1.input`` the activation it reads.

It knows nothing of students, weights' origin or engines.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.fx import Node


class Net:
    """Records an export graph, node by node; every method takes and returns fx nodes.

    Args:
        shape: static NCHW shape of the input ``image``, codes 0..255.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        from torch import fx

        self.graph = fx.Graph()
        self.modules: dict[str, Any] = {}
        self.linear_inputs: dict[str, str] = {}
        self.image = self.graph.placeholder("image")
        self._mark(self.image, "image", shape)

    def finish(self, outputs: dict[str, Node]) -> nn.Module:
        """Closes the graph; the module returns the outputs as a tuple in this order."""
        from torch import fx

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

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        return self._layer(path, x, layer, (weight, bias), (*shape_of(x)[:-1], weight.shape[0]), quantizable)

    def conv(
        self, path: str, x: Node, weight: Tensor, bias: Tensor, *, groups: int = 1, quantizable: bool = True
    ) -> Node:
        """Convolution with stride 1 and the padding that keeps the size; weight OIHW, odd square kernel."""
        from torch import nn

        out, _, kernel, _ = weight.shape
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
        """Mean of 2x2 pixels, an odd last row or column dropped: bilinear scaling by 1/2 without antialiasing."""
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
        """Resize of few channels as two products with constant matrices (out, in); the same size is no node."""
        n, c, h, w = shape_of(x)
        if rows.shape[0] == h and cols.shape[0] == w:
            return x
        left, right = self.constant(f"{path}.rows", rows), self.constant(f"{path}.cols", cols.T)
        half = self._product(f"{path}.half", left, x, (n, c, rows.shape[0], w))
        return self._product(path, half, right, (n, c, rows.shape[0], cols.shape[0]))

    def constant(self, path: str, value: Tensor) -> Node:
        """A stored tensor."""
        from torch import nn

        name = path.replace(".", "_")
        self.modules[name] = nn.Parameter(value.detach().clone(), requires_grad=False)
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
        parts = self._mark(self.graph.call_function(torch.chunk, (x, 3, -1)), path, shape_of(x))
        shape = (*head, width // 3)
        q, k, v = (
            self._mark(self.graph.call_function(operator.getitem, (parts, i)), f"{path}.{i}", shape) for i in range(3)
        )
        return q, k, v

    def tail(self, path: str, x: Node) -> Node:
        """Every token but the first (axis 1)."""
        n, rows, width = shape_of(x)
        index = (slice(None), slice(1, None))
        return self._mark(self.graph.call_function(operator.getitem, (x, index)), path, (n, rows - 1, width))

    def mean_token(self, path: str, x: Node) -> Node:
        """Mean over the token axis 1, which is dropped."""
        import torch

        n, _, width = shape_of(x)
        return self._mark(self.graph.call_function(torch.mean, (x, 1)), path, (n, width))

    def peak(self, path: str, x: Node) -> Node:
        """Largest absolute value of a whole tensor, shape (1,): the batch axis stays."""
        import torch

        size = self._mark(self.graph.call_function(torch.abs, (x,)), f"{path}.abs", shape_of(x))
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
                getattr(layer, name).data.copy_(value)
        self.modules[path] = layer
        if quantizable:
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


__all__ = ["Net", "shape_of"]
