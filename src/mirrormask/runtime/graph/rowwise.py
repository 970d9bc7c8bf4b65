"""Operations over the features of each row: norms and softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.aten import Context, Unsupported, argument, item_shape, shape_of, source_of
from mirrormask.runtime.graph.functions import attend, channel_norm, features
from mirrormask.runtime.graph.ir import Node, Origin
from mirrormask.runtime.graph.pointwise import Converter

__all__ = ["LEAST", "ROWWISE", "heads"]

aten = torch.ops.aten
#: What ``rms_norm`` takes for no ``eps``.
LEAST = torch.finfo(torch.float32).eps


def _norm(kind: str, places: tuple[int, int, int], eps: float) -> Converter:
    """A norm whose weight, bias and eps are the arguments in these places."""

    def convert_norm(context: Context, node: fx.Node) -> Node:
        source, over = source_of(node), argument(node, 1, "normalized_shape")
        if len(over) != 1:
            raise Unsupported("it normalises over several dimensions")
        if not context.rows and len(shape_of(node)) != 2:
            raise Unsupported("it normalises over the last dimension of maps")
        made = item_shape(context, node)
        weight, bias = (
            context.constant(argument(node, place, name) if place > 0 else None)[0]
            for place, name in zip(places, ("weight", "bias"), strict=False)
        )
        given = argument(node, places[2], "eps")
        number = float(eps if given is None else given)
        layer = context.layer(argument(node, places[0], "weight")) or node.name
        origin = Origin(weight, bias)
        return Node("norm", node.name, [source.name], made, layer, kind=kind, values=(number,), origin=origin)

    return convert_norm


def _channel_norm(context: Context, node: fx.Node) -> Node:
    if context.rows:
        raise Unsupported("it works on maps")
    weight, bias = (context.constant(node.args[i])[0] for i in (1, 2))
    layer, values = context.layer(node.args[1]) or node.name, (float(node.args[3]),)  # type: ignore[arg-type]
    made, origin = item_shape(context, node), Origin(weight, bias)
    kind = str(argument(node, 4, "kind", "layer"))
    return Node("norm", node.name, [source_of(node).name], made, layer, kind=kind, values=values, origin=origin)


def _softmax(kind: str) -> Converter:
    def convert_softmax(context: Context, node: fx.Node) -> Node:
        source, dim = source_of(node), int(argument(node, 1, "dim"))
        if argument(node, 2, "dtype") not in (None, torch.float32):
            raise Unsupported("it makes another type")
        rank = len(shape_of(node))
        if dim % rank != (rank - 1 if context.rows else 1):
            raise Unsupported("it is over another dimension than features or channels")
        return Node("softmax", node.name, [source.name], item_shape(context, node), layer=node.name, kind=kind)

    return convert_softmax


def _attention(context: Context, node: fx.Node) -> Node:
    query, key, value, mask, starts, width, scale, causal = node.args
    if not context.rows:
        raise Unsupported("it is attention over maps")
    names = [part.name for part in (query, key, value, mask) if isinstance(part, fx.Node)]
    return Node("attention", node.name, names, item_shape(context, node), **heads(node, starts, width, scale, causal))


def _features(context: Context, node: fx.Node) -> Node:
    if not context.rows:
        raise Unsupported("it works on rows")
    order: Any = node.args[1]
    signs: Any = node.args[2]
    names, made = [source_of(node).name], item_shape(context, node)
    if not signs and list(order) == list(range(order[0], order[0] + len(order))):
        return Node("slice", node.name, names, made, layer=node.name, span=(order[0], order[-1] + 1))
    return Node("gather", node.name, names, made, layer=node.name, span=tuple(order), values=tuple(signs))


def heads(node: fx.Node, starts: Any, width: Any, scale: Any, causal: Any) -> dict[str, Any]:
    """What a node says of attention, whatever its tokens lie in."""
    return {
        "layer": node.name,
        "groups": len(starts[0]),
        "kernel": tuple(width),
        "kind": "causal" if causal else "",
        "values": (float(scale),),
        "span": tuple(start for part in starts for start in part),
    }


ROWWISE: dict[Any, Converter] = {
    attend: _attention,
    channel_norm: _channel_norm,
    features: _features,
    aten.layer_norm.default: _norm("layer", (2, 3, 4), 1e-5),
    aten.rms_norm.default: _norm("rms", (2, 0, 3), LEAST),
    aten.softmax.int: _softmax("softmax"),
    aten._softmax.default: _softmax("softmax"),
    aten.log_softmax.int: _softmax("log_softmax"),
    aten._log_softmax.default: _softmax("log_softmax"),
}
