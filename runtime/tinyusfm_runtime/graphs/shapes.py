"""Rules: from the shapes that go into an operator to those that come out.

One function per family of operators.

Whole numbers that decide on shapes (the target of a reshape) are followed through the graph as long as they are few. A
rule raises ValueError where the shapes do not fit. It knows no format; ``budget`` adds up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from tinyusfm_runtime.graphs.tensors import FOLLOWED, Node, Shape, Tensor, axis_of, broadcast, known


def same(node: Node) -> list[Tensor]:
    """As the first input; further inputs are parameters that must not be larger."""
    first = node.tensor(0)
    for other in node.inputs[1:]:
        if other is not None and other.elements > max(first.elements, 1):
            raise ValueError("a parameter is larger than what it is applied to")
    return [Tensor(first.shape, node.get("dtype", first.dtype))]


def cast(node: Node) -> list[Tensor]:
    """Another type."""
    first, dtype = node.tensor(0), node.get("dtype", "float32")
    value = first.value.astype(dtype) if first.value is not None and dtype in ("int64", "int32") else None
    return [Tensor(first.shape, dtype, value)]


def elementwise(node: Node) -> list[Tensor]:
    """Operators on two or more tensors of one common shape."""
    tensors = [tensor for tensor in node.inputs if tensor is not None]
    shape = broadcast(*(tensor.shape for tensor in tensors))
    first = tensors[-1] if node.get("selects", False) else tensors[0]
    return [Tensor(shape, node.get("dtype", first.dtype), _computed(node, tensors))]


def _computed(node: Node, tensors: Sequence[Tensor]) -> np.ndarray | None:
    work: dict[str, Callable[..., np.ndarray]] = {
        "add": np.add, "subtract": np.subtract, "multiply": np.multiply, "divide": np.floor_divide,
    }  # fmt: skip
    does, values = work.get(str(node.get("does", ""))), [tensor.value for tensor in tensors]
    if does is None or len(values) != 2 or values[0] is None or values[1] is None:
        return None
    if values[0].dtype.kind != "i" or values[1].dtype.kind != "i":
        return None
    if does is np.floor_divide and not (np.all(values[1] > 0) and np.all(values[0] >= 0)):
        return None
    with np.errstate(over="ignore"):
        found = does(values[0], values[1])
    return found if found.size <= FOLLOWED else None


def matmul(node: Node) -> list[Tensor]:
    """Matrix products, batched as NumPy's."""
    a, b = node.tensor(0).shape, node.tensor(1).shape
    if not a or not b:
        raise ValueError("a scalar in a matrix product")
    if len(a) > 1 and node.get("transpose_a", False):
        a = (*a[:-2], a[-1], a[-2])
    if len(b) > 1 and node.get("transpose_b", False):
        b = (*b[:-2], b[-1], b[-2])
    row = len(a) == 1
    column = len(b) == 1
    a, b = ((1, *a) if row else a), ((*b, 1) if column else b)
    if a[-1] != b[-2]:
        raise ValueError(f"{a[-1]} columns times {b[-2]} rows")
    sides = (() if row else (a[-2],)) + (() if column else (b[-1],))
    return [Tensor((*broadcast(a[:-2], b[:-2]), *sides), node.get("dtype", node.tensor(0).dtype))]


def conv(node: Node) -> list[Tensor]:
    """Convolutions; weights OIHW, or of ``group_conv`` GOIHW."""
    data, weight = node.tensor(0).shape, node.tensor(1).shape
    groups = int(node.get("groups", 1))
    if node.kind == "group_conv":
        groups, weight = weight[0], (weight[0] * weight[1], *weight[2:])
    if len(data) != len(weight) or len(data) < 3 or groups < 1 or weight[1] * groups != data[1] or weight[0] % groups:
        raise ValueError(f"{list(weight)} weights in {groups} groups on {list(data)}")
    sides = _slid(data[2:], weight[2:], node)
    return [Tensor((data[0], weight[0], *sides), node.get("dtype", node.tensor(0).dtype))]


def conv_transpose(node: Node) -> list[Tensor]:
    """Transposed convolutions; weights IOHW."""
    data, weight = node.tensor(0).shape, node.tensor(1).shape
    groups, spatial = int(node.get("groups", 1)), len(data) - 2
    if len(data) != len(weight) or spatial < 1 or groups < 1 or weight[0] != data[1] or data[1] % groups:
        raise ValueError(f"{list(weight)} weights in {groups} groups on {list(data)}")
    strides, dilations = _many(node.get("strides", ()), spatial), _many(node.get("dilations", ()), spatial)
    begin, end = _pads(node, spatial)
    extra = [int(value) for value in node.get("output_padding", ()) or [0] * spatial]
    if any(not 0 <= value <= 64 for value in extra):
        raise ValueError("output padding out of range")
    sides = tuple(
        stride * (side - 1) + more + (kernel - 1) * dilation + 1 - front - back
        for side, kernel, stride, dilation, front, back, more in zip(
            data[2:], weight[2:], strides, dilations, begin, end, extra, strict=True
        )
    )
    return [Tensor((data[0], weight[1] * groups, *sides), node.tensor(0).dtype)]


def pool(node: Node) -> list[Tensor]:
    """Pooling over windows, or without a kernel over everything."""
    data = node.tensor(0).shape
    kernel = tuple(int(side) for side in node.get("kernel", ()))
    if len(data) < 3:
        raise ValueError("nothing to pool")
    sides = _slid(data[2:], kernel, node) if kernel else (1,) * (len(data) - 2)
    return [Tensor((*data[:2], *sides), node.tensor(0).dtype)] * max(1, node.outputs)


def _slid(sides: Shape, kernel: Shape, node: Node) -> Shape:
    """Sides after a window has moved over them."""
    spatial = len(sides)
    if len(kernel) != spatial:
        raise ValueError("a kernel of another rank")
    strides, dilations = _many(node.get("strides", ()), spatial), _many(node.get("dilations", ()), spatial)
    if node.get("auto_pad", "") in ("SAME_UPPER", "SAME_LOWER", "same_upper", "same_lower"):
        return tuple(-(-side // stride) for side, stride in zip(sides, strides, strict=True))
    begin, end = _pads(node, spatial)
    up = bool(node.get("round_up", False))
    found = []
    for side, window, stride, dilation, front, back in zip(sides, kernel, strides, dilations, begin, end, strict=True):
        room = side + front + back - dilation * (window - 1) - 1
        if room < 0:
            raise ValueError("a kernel larger than what it moves over")
        found.append((-(-room // stride) if up else room // stride) + 1)
    return tuple(found)


def _many(values: Sequence[int], count: int) -> list[int]:
    found = [int(value) for value in values] or [1] * count
    if len(found) != count or any(not 1 <= value <= 1024 for value in found):
        raise ValueError("strides or dilations out of range")
    return found


def _pads(node: Node, count: int) -> tuple[list[int], list[int]]:
    begin = [int(value) for value in node.get("pads_begin", ()) or [0] * count]
    end = [int(value) for value in node.get("pads_end", ()) or [0] * count]
    if len(begin) != count or len(end) != count or any(not 0 <= value <= 4096 for value in begin + end):
        raise ValueError("paddings out of range")
    return begin, end


def reshape(node: Node) -> list[Tensor]:
    """Another shape of as many numbers.

    -1 is worked out, 0 keeps a side unless ``zero`` is False.
    """
    data, wanted = node.tensor(0), node.tensor(1).numbers("the target of a reshape")
    sides = list(wanted)
    for place, side in enumerate(wanted):
        if side == 0 and node.get("zero", True):
            sides[place] = data.shape[place]
    if sides.count(-1) > 1 or any(side < -1 for side in sides):
        raise ValueError(f"a reshape to {wanted}")
    if -1 in sides:
        rest = math.prod(side for side in sides if side != -1)
        if rest == 0 or data.elements % rest:
            raise ValueError(f"{list(data.shape)} to {wanted}")
        sides[sides.index(-1)] = data.elements // rest
    if math.prod(sides) != data.elements:
        raise ValueError(f"{list(data.shape)} to {wanted}")
    value = None if data.value is None else data.value.reshape(sides)
    return [Tensor(tuple(sides), data.dtype, value)]


def transpose(node: Node) -> list[Tensor]:
    """Axes in another order."""
    data = node.tensor(0)
    order = node.get("perm", None)
    if order is None:
        second = node.optional(1)
        order = list(range(len(data.shape)))[::-1] if second is None else second.numbers("the order of a transpose")
    if sorted(order) != list(range(len(data.shape))):
        raise ValueError(f"order {list(order)} of {list(data.shape)}")
    return [Tensor(tuple(data.shape[place] for place in order), data.dtype)]


def concat(node: Node) -> list[Tensor]:
    """Tensors one behind the other."""
    tensors = [node.tensor(index) for index in range(len(node.inputs))]
    first = tensors[0]
    axis = axis_of(int(node.get("axis", 0)), len(first.shape))
    rest = {(*tensor.shape[:axis], *tensor.shape[axis + 1 :]) for tensor in tensors}
    if len(rest) != 1 or len({len(tensor.shape) for tensor in tensors}) != 1:
        raise ValueError("shapes that do not fit one behind the other")
    side = sum(tensor.shape[axis] for tensor in tensors)
    values = [tensor.value for tensor in tensors]
    value = None
    if side <= FOLLOWED and all(part is not None for part in values):
        value = np.concatenate([part for part in values if part is not None], axis)
    return [Tensor((*first.shape[:axis], side, *first.shape[axis + 1 :]), first.dtype, value)]


def split(node: Node) -> list[Tensor]:
    """One tensor in parts along an axis.

    Equal ones, or as long as the last input says.
    """
    data = node.tensor(0)
    axis_tensor = node.optional(1) if node.get("axis_is_input", False) else None
    axis = int(node.get("axis", 0)) if axis_tensor is None else axis_tensor.numbers("the axis of a split")[0]
    axis = axis_of(axis, len(data.shape))
    lengths = node.optional(2 if node.get("axis_is_input", False) else 1)
    if lengths is not None:
        parts = lengths.numbers("the parts of a split")
        if parts.count(-1) == 1:
            parts[parts.index(-1)] = data.shape[axis] - sum(parts) - 1
    else:
        count = int(node.get("count", node.outputs))
        if not 1 <= count <= data.shape[axis]:
            raise ValueError(f"{count} parts of {data.shape[axis]}")
        longest = -(-data.shape[axis] // count)
        parts = [longest] * (count - 1) + [data.shape[axis] - longest * (count - 1)]
    if sum(parts) != data.shape[axis]:
        raise ValueError(f"parts {parts} of {data.shape[axis]}")
    values: list[np.ndarray | None] = [None] * len(parts)
    if data.value is not None and all(part >= 0 for part in parts):
        values = list(np.split(data.value, np.cumsum(parts)[:-1], axis))
    return [
        Tensor((*data.shape[:axis], part, *data.shape[axis + 1 :]), data.dtype, value)
        for part, value in zip(parts, values, strict=True)
    ]


def cut(node: Node) -> list[Tensor]:
    """A slice.

    Inputs data, starts, ends, axes, steps, or with ``steps_first`` starts, stops, steps, axes.
    """
    data = node.tensor(0)
    starts, ends = node.tensor(1).numbers("the start of a slice"), node.tensor(2).numbers("the end of a slice")
    third, fourth = node.optional(3), node.optional(4)
    axes_in, steps_in = (fourth, third) if node.get("steps_first", False) else (third, fourth)
    axes = list(range(len(starts))) if axes_in is None else axes_in.numbers("the axes of a slice")
    steps = [1] * len(starts) if steps_in is None else steps_in.numbers("the steps of a slice")
    if not len(starts) == len(ends) == len(axes) == len(steps) or 0 in steps:
        raise ValueError("a slice with lists of different lengths, or a step of 0")
    sides, cuts = list(data.shape), [slice(None)] * len(data.shape)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        place = axis_of(axis, len(sides))
        stop = None if step < 0 and end < -data.shape[place] else end
        cuts[place] = slice(start, stop, step)
        sides[place] = len(range(*cuts[place].indices(data.shape[place])))
    return [Tensor(tuple(sides), data.dtype, None if data.value is None else data.value[tuple(cuts)])]


def gather(node: Node) -> list[Tensor]:
    """Rows by number along an axis."""
    data, index = node.tensor(0), node.tensor(1)
    axis_tensor = node.optional(2)
    axis = int(node.get("axis", 0)) if axis_tensor is None else axis_tensor.numbers("the axis of a gather")[0]
    axis = axis_of(axis, len(data.shape))
    if (
        index.value is not None
        and not (-data.shape[axis] <= index.value).all() & (index.value < data.shape[axis]).all()
    ):
        raise ValueError(f"rows of {data.shape[axis]} that are not there")
    value = None
    if data.value is not None and index.value is not None:
        value = np.take(data.value, index.value, axis)
    return [Tensor((*data.shape[:axis], *index.shape, *data.shape[axis + 1 :]), data.dtype, value)]


def squeeze(node: Node) -> list[Tensor]:
    """Without sides of 1."""
    data, axes = node.tensor(0), _axes(node, "a squeeze")
    places = [p for p, side in enumerate(data.shape) if side == 1] if axes is None else axes
    places = [axis_of(place, len(data.shape)) for place in places]
    if any(data.shape[place] != 1 for place in places):
        raise ValueError("a side that is not 1")
    sides = tuple(side for place, side in enumerate(data.shape) if place not in places)
    return [Tensor(sides, data.dtype, None if data.value is None else data.value.reshape(sides))]


def unsqueeze(node: Node) -> list[Tensor]:
    """With further sides of 1."""
    data, axes = node.tensor(0), _axes(node, "an unsqueeze") or []
    rank = len(data.shape) + len(axes)
    places = sorted(axis_of(axis, rank) for axis in axes)
    if len(set(places)) != len(places):
        raise ValueError("one place twice")
    sides = list(data.shape)
    for place in places:
        sides.insert(place, 1)
    return [Tensor(tuple(sides), data.dtype, None if data.value is None else data.value.reshape(sides))]


def flatten(node: Node) -> list[Tensor]:
    """Two sides: everything before the axis, and the rest."""
    data = node.tensor(0)
    axis = int(node.get("axis", 1))
    axis = axis + len(data.shape) if axis < 0 else axis
    if not 0 <= axis <= len(data.shape):
        raise ValueError(f"axis {axis} of {len(data.shape)}")
    return [Tensor((math.prod(data.shape[:axis]), math.prod(data.shape[axis:])), data.dtype)]


def reduce(node: Node) -> list[Tensor]:
    """Sums, means, extremes over axes; over all of them where none are named."""
    data, axes = node.tensor(0), _axes(node, "a reduction")
    if not axes:
        if node.get("nothing_if_empty", False):
            return [Tensor(data.shape, data.dtype)]
        axes = list(range(len(data.shape)))
    places = {axis_of(axis, len(data.shape)) for axis in axes}
    keeps = bool(node.get("keeps", True))
    sides = tuple(1 if p in places else side for p, side in enumerate(data.shape) if keeps or p not in places)
    return [Tensor(sides, node.get("dtype", data.dtype))]


def _axes(node: Node, what: str) -> list[int] | None:
    listed = node.get("axes", None)
    if listed is not None:
        return [int(axis) for axis in listed]
    second = node.optional(1)
    return None if second is None else second.numbers(f"the axes of {what}")


def resize(node: Node) -> list[Tensor]:
    """Other sides, named one by one or by a factor for each."""
    data, sizes, scales = node.tensor(0), node.optional(3), node.optional(2)
    axes = list(node.get("axes", None) or range(len(data.shape)))
    sides = list(data.shape)
    if sizes is not None and sizes.shape != (0,):
        wanted = sizes.numbers("the size of a resize")
    elif scales is not None and scales.value is not None:
        factors = [float(factor) for factor in scales.value.reshape(-1).tolist()]
        if len(factors) != len(axes) or any(not 0 < factor <= 4096 for factor in factors):
            raise ValueError(f"factors {factors}")
        wanted = [int(sides[axis_of(a, len(sides))] * factor) for a, factor in zip(axes, factors, strict=True)]
    else:
        raise ValueError("neither a size nor factors that are constants")
    if len(wanted) != len(axes):
        raise ValueError("as many sides as axes are needed")
    for axis, side in zip(axes, wanted, strict=True):
        sides[axis_of(int(axis), len(sides))] = side
    return [Tensor(tuple(sides), data.dtype)]


def shape_of(node: Node) -> list[Tensor]:
    """The sides as a tensor."""
    return [known(np.asarray(node.tensor(0).shape, np.int64))]


def count_up(node: Node) -> list[Tensor]:
    """Whole numbers from one to another."""
    start, stop, step = (node.tensor(index).numbers("the bounds of a range")[0] for index in range(3))
    if step == 0 or len(range(start, stop, step)) > FOLLOWED:
        raise ValueError(f"a range of more than {FOLLOWED} numbers")
    return [known(np.arange(start, stop, step, dtype=np.int64))]


def spread(node: Node) -> list[Tensor]:
    """A tensor repeated to a larger shape."""
    data, wanted = node.tensor(0), node.tensor(1).numbers("the target of a broadcast")
    sides = broadcast(data.shape, tuple(wanted)) if node.get("both_ways", False) else tuple(wanted)
    if broadcast(data.shape, sides) != sides or math.prod(sides) > 1 << 40:
        raise ValueError(f"{list(data.shape)} to {wanted}")
    value = None
    if data.value is not None and math.prod(sides) <= FOLLOWED:
        value = np.broadcast_to(data.value, sides)
    return [Tensor(sides, data.dtype, value)]


def quantised(node: Node) -> list[Tensor]:
    """uint8 codes with their scale and zero point."""
    return [Tensor(node.tensor(0).shape, "uint8"), Tensor((), "float32"), Tensor((), "uint8")]


def normalised(node: Node) -> list[Tensor]:
    """As the first input, and mean and deviation where they are asked for."""
    first = node.tensor(0)
    return same(node) + [Tensor(first.shape, "float32")] * (node.outputs - 1)


def arg_extreme(node: Node) -> list[Tensor]:
    """Places of the largest or smallest along an axis."""
    data = node.tensor(0)
    axis = axis_of(int(node.get("axis", 0)), len(data.shape))
    side = (1,) if node.get("keeps", True) else ()
    return [Tensor((*data.shape[:axis], *side, *data.shape[axis + 1 :]), "int64")]


RULES: Mapping[str, Callable[[Node], list[Tensor]]] = {
    "same": same,
    "cast": cast,
    "elementwise": elementwise,
    "matmul": matmul,
    "conv": conv,
    "group_conv": conv,
    "conv_transpose": conv_transpose,
    "pool": pool,
    "reshape": reshape,
    "transpose": transpose,
    "concat": concat,
    "split": split,
    "cut": cut,
    "gather": gather,
    "squeeze": squeeze,
    "unsqueeze": unsqueeze,
    "flatten": flatten,
    "reduce": reduce,
    "resize": resize,
    "shape_of": shape_of,
    "count_up": count_up,
    "spread": spread,
    "quantised": quantised,
    "normalised": normalised,
    "arg_extreme": arg_extreme,
}
"""Name -> rule."""

__all__ = [
    "RULES",
    "arg_extreme",
    "cast",
    "concat",
    "conv",
    "conv_transpose",
    "count_up",
    "cut",
    "elementwise",
    "flatten",
    "gather",
    "matmul",
    "normalised",
    "pool",
    "quantised",
    "reduce",
    "reshape",
    "resize",
    "same",
    "shape_of",
    "split",
    "spread",
    "squeeze",
    "transpose",
    "unsqueeze",
]
