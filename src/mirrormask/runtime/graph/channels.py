"""Operations that put channels together, take some of them, or change their order."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.aten import Context, Unsupported, argument, item_shape, shape_of, source_of
from mirrormask.runtime.graph.ir import Node

__all__ = ["CHANNELS", "channel_slice"]

aten = torch.ops.aten


def _concat(context: Context, node: fx.Node) -> Node:
    parts = argument(node, 0, "tensors")
    shape = shape_of(node)
    dim = int(argument(node, 1, "dim", 0)) % max(1, len(shape))
    if not isinstance(parts, (list, tuple)) or len(shape) < 2 or (context.rows and dim != len(shape) - 1):
        raise Unsupported("it puts rows together")
    if any(not isinstance(part, fx.Node) or len(shape_of(part)) != len(shape) for part in parts):
        raise Unsupported("it puts something together that is not maps")
    if dim == 0:
        raise Unsupported("it puts items together")
    if dim > 1 and not context.rows:
        made = item_shape(context, node)
        span = (dim - 2 if len(shape) == 4 else 1,)
        return Node("join", node.name, [part.name for part in parts], made, layer=node.name, span=span)
    return Node("concat", node.name, [part.name for part in parts], item_shape(context, node), layer=node.name)


def channel_slice(context: Context, node: fx.Node) -> Node:
    """Some channels, ``[start, stop)`` of them in steps."""
    source = source_of(node)
    shape, channels = item_shape(context, node), item_shape(context, source)[0]
    start, stop, step = _span(node, channels)
    if step != 1:
        return _gather(node, source, shape, tuple(range(start, stop, step)))
    return Node("slice", node.name, [source.name], shape, layer=node.name, span=(start, stop))


def _span(node: fx.Node, size: int) -> tuple[int, int, int]:
    given = (argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1))
    if any(value is not None and not isinstance(value, int) for value in given):
        raise Unsupported("its bounds depend on the input")
    return slice(*given).indices(size)


def _gather(node: fx.Node, source: fx.Node, shape: tuple[int, ...], order: tuple[int, ...]) -> Node:
    return Node("gather", node.name, [source.name], shape, layer=node.name, span=order)


def _shuffle(context: Context, node: fx.Node) -> Node:
    """Channel ``i`` is number ``i // groups`` of group ``i % groups``."""
    if context.rows or len(shape_of(node)) < 3:
        raise Unsupported("it shuffles rows")
    source, shape, groups = source_of(node), item_shape(context, node), int(argument(node, 1, "groups"))
    order = tuple(i % groups * (shape[0] // groups) + i // groups for i in range(shape[0]))
    return _gather(node, source, shape, order)


def _flip(context: Context, node: fx.Node) -> Node:
    shape = item_shape(context, node)
    if context.rows or [d % len(shape_of(node)) for d in argument(node, 1, "dims")] != [1]:
        raise Unsupported("it turns maps around")
    return _gather(node, source_of(node), shape, tuple(range(shape[0]))[::-1])


CHANNELS: dict[Any, Any] = {
    aten.cat.default: _concat,
    aten.concat.default: _concat,
    aten.channel_shuffle.default: _shuffle,
    aten.flip.default: _flip,
}
