"""Views of maps, stored maps, and attention between the columns of maps, as :mod:`graph.arrange` puts them."""

from __future__ import annotations

from typing import Any

from torch import fx

from mirrormask.runtime.graph.aten import Context, Unsupported, item_shape, source_of
from mirrormask.runtime.graph.functions import arrange, attend_maps, per_channel, stored
from mirrormask.runtime.graph.ir import Node, Origin
from mirrormask.runtime.graph.pointwise import PER_CHANNEL, Converter, each_channel
from mirrormask.runtime.graph.rowwise import heads

__all__ = ["ARRANGED"]


def _maps_only(context: Context) -> None:
    if context.rows:
        raise Unsupported("it works on maps")


def _arrange(context: Context, node: fx.Node) -> Node:
    _maps_only(context)
    first, second = (tuple(part) for part in node.args[1:3])  # type: ignore[union-attr, arg-type]
    source, made = source_of(node), item_shape(context, node)
    before = item_shape(context, source)
    span: tuple[Any, ...] = (*first, *second)
    return Node("arrange", node.name, [source.name], made, layer=node.name, span=span, captured=before[1:])


def _stored(context: Context, node: fx.Node) -> Node:
    _maps_only(context)
    name, _ = context.constant(node.args[1])
    first, second = (tuple(part) for part in node.args[2:4])  # type: ignore[union-attr, arg-type]
    span: tuple[Any, ...] = (*first, *second)
    # It reads nothing; the input says only that it is one for each item.
    made = item_shape(context, node)
    return Node("stored", node.name, [], made, layer=name, span=span, origin=Origin(name))


def _per_channel(context: Context, node: fx.Node) -> Node:
    _maps_only(context)
    name, _ = context.constant(node.args[1])
    made, kind = item_shape(context, node), str(node.args[2])
    names, origin = [source_of(node).name], PER_CHANNEL[kind](name)
    return each_channel(node.name, names, made, name, origin)


def _attend(context: Context, node: fx.Node) -> Node:
    _maps_only(context)
    query, key, value, bias, starts, width, scale, causal = node.args
    name, shape = context.constant(bias)
    parts = [part for part in (query, key, value) if isinstance(part, fx.Node)]
    return Node(
        "attend",
        node.name,
        [part.name for part in parts],
        item_shape(context, node),
        captured=item_shape(context, parts[0])[1:],
        stride=(shape[0], shape[1]) if shape else (1, 1),
        origin=Origin(name),
        **heads(node, starts, width, scale, causal),
    )


ARRANGED: dict[Any, Converter] = {
    arrange: _arrange,
    stored: _stored,
    per_channel: _per_channel,
    attend_maps: _attend,
}
