"""Reading a captured graph: constants and their names, shapes per item, arguments by position or by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

__all__ = [
    "Context",
    "Unsupported",
    "argument",
    "item_shape",
    "one_dimensional",
    "open_shape",
    "pair",
    "reaches_far",
    "shape_of",
    "source_of",
]


#: Columns that a convolution reaches over with its padding.
MOST_BESIDE = 48


class Unsupported(Exception):
    """An operation that stays in PyTorch; the message says why."""


@dataclass
class Context:
    """What a converter may look at."""

    module: torch.nn.Module
    constants: dict[fx.Node, Tensor]
    names: dict[fx.Node, str]
    rows: bool

    def constant(self, node: Any) -> tuple[str, tuple[int, ...]]:
        """The name and the shape of a parameter or buffer; ``("", ())`` for ``None``."""
        if node is None:
            return "", ()
        if node not in self.constants:
            raise Unsupported("its weight is computed, not stored")
        tensor = self.constants[node]
        if tensor.dtype != torch.float32:
            raise Unsupported(f"its weight is {str(tensor.dtype).removeprefix('torch.')}, not float32")
        return self.names[node], tuple(tensor.shape)

    def layer(self, node: Any) -> str:
        """The name of the module that owns a parameter."""
        return self.names.get(node, "").rpartition(".")[0] or self.names.get(node, "")


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of the tensor a node makes."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise Unsupported("it does not make a single tensor")
    if value.dtype != torch.float32:
        raise Unsupported(f"it makes {str(value.dtype).removeprefix('torch.')}, not float32")
    return tuple(size_of(size) for size in value.shape)


def size_of(size: Any) -> int:
    """A size as the example had it, where the capture leaves it open."""
    if isinstance(size, torch.SymInt):
        if size.node.hint is None:
            raise Unsupported("a size depends on the data")
        return int(size.node.hint)
    return int(size)


def open_shape(node: fx.Node) -> tuple[str, ...]:
    """The sizes of the tensor that a node makes, those that are left open by their names."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise Unsupported("it does not make a single tensor")
    return tuple(str(size.node.expr) if isinstance(size, torch.SymInt) else str(int(size)) for size in value.shape)


def item_shape(context: Context, node: fx.Node) -> tuple[int, ...]:
    """The shape per item: channels, height, width of an image, or features of a row."""
    shape = shape_of(node)
    if context.rows:
        if not shape:
            raise Unsupported("it makes a scalar")
        return (shape[-1],)
    if len(shape) == 3:
        return (shape[1], 1, shape[2])
    if len(shape) == 5:  # a volume: what may read one is in ``convert.VOLUMES``
        return (shape[1] * shape[2], *shape[3:])
    if len(shape) not in (2, 4):
        raise Unsupported(f"it makes a tensor of {len(shape)} dimensions")
    return shape[1:]


def source_of(node: fx.Node) -> fx.Node:
    """The tensor that an operation reads first."""
    source = node.args[0] if node.args else None
    if not isinstance(source, fx.Node):
        raise Unsupported("its input is not a tensor of the graph")
    return source


def one_dimensional(node: fx.Node) -> bool:
    """Whether an operation over maps is of the 1-d kind; both kinds must have a batch dimension."""
    one = "1d" in str(node.target)
    if len(shape_of(node)) != (3 if one else 4):
        raise Unsupported("its input has no batch dimension")
    return one


def reaches_far(padding: int, kernel: int, dilation: int) -> bool:
    """Whether a convolution reads more zeros beside a row than there are: a few lie left and right of it."""
    return padding > MOST_BESIDE or (padding > 0 and kernel * dilation > MOST_BESIDE)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """An argument by position or by name."""
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


def pair(value: Any, *, one: bool = False, fill: int = 1) -> tuple[int, int]:
    """A row and a column setting; with ``one``, of a 1-d operation, which has columns only."""
    values = [int(value)] if isinstance(value, int) else [int(v) for v in value]
    if one:
        return (fill, values[0])
    return (values[0], values[-1])
