"""The forms of one writer: what it makes of each kind of node of a graph.

A graph of net.py has six kinds of fx nodes. Placeholders, constants and the output are each writer's own; layers,
methods and functions are looked up by name in the writer's ``NodeForms``. It does not know what a form writes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from tinyusfm_runtime.errors import UnsupportedError

if TYPE_CHECKING:
    from torch.fx import Node

_Form = TypeVar("_Form")


@dataclass(frozen=True, kw_only=True)
class NodeForms(Generic[_Form]):
    """The forms of one writer.

    Attributes:
        writer: its name, for messages.
        file: where a missing form is to be added, for messages.
        layers: class name of a torch layer -> form.
        methods: name of a tensor's method -> form.
        functions: name of a function -> form.
    """

    writer: str
    file: str
    layers: Mapping[str, _Form]
    methods: Mapping[str, _Form]
    functions: Mapping[str, _Form]

    def of(self, node: Node, module: Any) -> tuple[_Form, Any]:
        """Finds the form of a layer, a method or a function.

        Args:
            node: of the graph.
            module: the graph's module, which holds the layers.

        Returns:
            The form, and the torch layer or None.

        Raises:
            UnsupportedError: the writer has no form for it.
        """
        layer, form = None, None
        if node.op == "call_module":
            layer = module.get_submodule(str(node.target))
            form = self.layers.get(type(layer).__name__)
        elif node.op == "call_method":
            form = self.methods.get(str(node.target))
        elif node.op == "call_function":
            form = self.functions.get(getattr(node.target, "__name__", ""))
        if form is None:
            raise UnsupportedError(
                f"the {self.writer} writer has no form for {node.op} {node.target}: add it to {self.file}"
            )
        return form, layer


__all__ = ["NodeForms"]
