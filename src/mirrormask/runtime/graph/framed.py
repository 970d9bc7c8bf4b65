"""Volumes of which :mod:`graph.volumes` made frames, as nodes: convolutions that read several frames, and orders."""

from __future__ import annotations

from typing import Any

from torch import fx

from mirrormask.runtime.graph.aten import (
    MOST_BESIDE,
    Context,
    Unsupported,
    argument,
    item_shape,
    pair,
    reaches_far,
    shape_of,
    source_of,
)
from mirrormask.runtime.graph.frames import as_frames, as_volume, channels_of, frames_conv, frames_norm
from mirrormask.runtime.graph.ir import Node, Origin
from mirrormask.runtime.graph.pointwise import Converter, each_channel

__all__ = ["FRAMED"]


def _maps_only(context: Context) -> None:
    if context.rows:
        raise Unsupported("it works on maps")


def _frames_conv(context: Context, node: fx.Node) -> Node:
    _maps_only(context)
    source, (weight, shape), (bias, _) = source_of(node), context.constant(node.args[1]), context.constant(node.args[2])
    frames: Any = node.args[3]
    stride, padding, dilation = (pair(node.args[i]) for i in (4, 5, 6))
    kernel = (shape[3], shape[4])
    if kernel[1] > MOST_BESIDE or reaches_far(padding[1], kernel[1], dilation[1]):
        raise Unsupported("its kernel or padding is wider than 48")
    return Node(
        "conv",
        node.name,
        [source.name],
        item_shape(context, node),
        layer=context.layer(node.args[1]),
        origin=Origin(weight, bias, transposed=bool(node.args[8])),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=int(node.args[7]),  # type: ignore[arg-type]
        kernel=kernel,
        span=tuple(frames),
    )


def _frames_norm(context: Context, node: fx.Node) -> Node:
    _maps_only(context)
    weight, bias, mean, variance = (context.constant(node.args[i])[0] for i in (1, 2, 3, 4))
    layer, eps = context.layer(node.args[3]) or node.name, float(argument(node, 5, "eps"))
    origin = Origin(weight, bias, mean, variance, eps)
    return each_channel(node.name, [source_of(node).name], item_shape(context, node), layer, origin)


def _channels_of(context: Context, node: fx.Node) -> Node:
    _maps_only(context)
    order, gains = (tuple(part) for part in node.args[1:3])  # type: ignore[union-attr, arg-type]
    made: tuple[int, ...] = item_shape(context, node)
    return Node("gather", node.name, [source_of(node).name], made, layer=node.name, span=order, values=gains)


def _turned_round(context: Context, node: fx.Node) -> Node:
    """Frames of a volume, or the volume of frames: both have their channels one after the other."""
    _maps_only(context)
    source = source_of(node)
    volume = shape_of(source if node.target is as_frames else node)
    channels, depth = volume[1:3]
    made = item_shape(context, node)
    if 1 in (channels, depth):
        return Node("flatten", node.name, [source.name], made, layer=node.name)
    inner, outer = (depth, channels) if node.target is as_frames else (channels, depth)
    order = tuple(j * inner + i for i in range(inner) for j in range(outer))
    return Node("gather", node.name, [source.name], made, layer=node.name, span=order)


FRAMED: dict[Any, Converter] = {
    frames_conv: _frames_conv,
    frames_norm: _frames_norm,
    channels_of: _channels_of,
    as_frames: _turned_round,
    as_volume: _turned_round,
}
