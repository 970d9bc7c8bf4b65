"""Operations that change the size of maps: pools, padding, crops, interpolation."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.aten import (
    Context,
    Unsupported,
    argument,
    item_shape,
    one_dimensional,
    pair,
    shape_of,
    source_of,
)
from mirrormask.runtime.graph.channels import channel_slice
from mirrormask.runtime.graph.functions import by_mean, largest, map_norm
from mirrormask.runtime.graph.ir import Node, Origin

__all__ = ["SPATIAL", "slice_"]

aten = torch.ops.aten


def _pool(kind: str) -> Callable[[Context, fx.Node], Node]:
    def convert_pool(context: Context, node: fx.Node) -> Node:
        one = one_dimensional(node)
        kernel = pair(argument(node, 1, "kernel_size"), one=one)
        stride = pair(argument(node, 2, "stride") or argument(node, 1, "kernel_size"), one=one)
        padding = pair(argument(node, 3, "padding", 0), one=one, fill=0)
        if kind == "max" and pair(argument(node, 4, "dilation", 1), one=one) != (1, 1):
            raise Unsupported("its windows are dilated")
        if kind == "mean" and argument(node, 6, "divisor_override") is not None:
            raise Unsupported("its divisor is overridden")
        count = bool(argument(node, 5, "count_include_pad", True)) if kind == "mean" else True
        return Node(
            "pool",
            node.name,
            [source_of(node).name],
            item_shape(context, node),
            layer=node.name,
            kind=kind,
            kernel=kernel,
            stride=stride,
            padding=padding,
            count_padding=count,
            ceil=bool(argument(node, 5 if kind == "max" else 4, "ceil_mode", False)),
        )

    return convert_pool


def _adaptive(kind: str) -> Callable[[Context, fx.Node], Node]:
    def convert_adaptive(context: Context, node: fx.Node) -> Node:
        if kind == "mean":
            one_dimensional(node)
        elif len(shape_of(node)) != 4:
            raise Unsupported("its input has no batch dimension")
        shape, source = item_shape(context, node), source_of(node).name
        if kind == "mean" and shape[1:] == (1, 1):
            return Node("mean", node.name, [source], shape, layer=node.name)
        sizes: Any = argument(node, 1, "output_size")
        whole = all(isinstance(size, int) for size in ([sizes] if isinstance(sizes, int) else sizes))
        # Sizes that are read from some tensor hold for this one only.
        captured = () if whole else item_shape(context, source_of(node))[1:]
        return Node("adaptive", node.name, [source], shape, layer=node.name, kind=kind, captured=captured)

    return convert_adaptive


def _map_norm(context: Context, node: fx.Node) -> Node:
    if context.rows:
        raise Unsupported("it works on maps")
    return Node("mean", node.name, [source_of(node).name], item_shape(context, node), layer=node.name, kind="norm")


def _by_mean(context: Context, node: fx.Node) -> Node:
    shape = item_shape(context, node)
    if context.rows or shape[1:] not in ((), (1, 1)):
        raise Unsupported("it works on one number per channel")
    eps: Any = node.args[1]
    return Node("norm", node.name, [source_of(node).name], shape, layer=node.name, kind="mean", values=(float(eps),))


def _group_norm(context: Context, node: fx.Node) -> Node:
    one = "instance" in str(node.target)
    source, shape = source_of(node), item_shape(context, node)
    if context.rows or len(shape) != 3:
        raise Unsupported("it normalises rows, not maps")
    if one and not argument(node, 5, "use_input_stats"):
        raise Unsupported("it normalises by stored statistics")
    first = 1 if one else 2
    weight, bias = (context.constant(argument(node, first + i, name)) for i, name in enumerate(("weight", "bias")))
    groups: Any = shape[0] if one else node.args[1]
    eps = argument(node, 7, "eps") if one else argument(node, 4, "eps", 1e-5)
    layer, origin = context.layer(argument(node, first, "weight")) or node.name, Origin(weight[0], bias[0])
    return Node(
        "group_norm", node.name, [source.name], shape, layer, values=(float(eps),), groups=int(groups), origin=origin
    )


def _pad(context: Context, node: fx.Node) -> Node:
    source, rank = source_of(node), len(shape_of(node))
    sizes: Any = argument(node, 1, "pad")
    mode = argument(node, 2, "mode", "constant") if "pad.default" in str(node.target) else "constant"
    value: Any = argument(node, 3, "value") if "pad.default" in str(node.target) else argument(node, 2, "value", 0)
    given = [*sizes, *[0] * 8]
    if any(not isinstance(size, int) for size in sizes) or any(given[2 * (rank - 2) :]) or rank < 3:
        raise Unsupported("it pads other dimensions than a map's rows and columns")
    if mode not in ("constant", "reflect", "replicate", "circular"):
        raise Unsupported(f"it pads by {mode}")
    span = tuple(int(size) for size in given[: 2 * (rank - 2)]) + ((0, 0) if rank == 3 else ())
    values = (float(value or 0),)
    shape = item_shape(context, node)
    return Node("pad", node.name, [source.name], shape, layer=node.name, kind=str(mode), span=span, values=values)


def slice_(context: Context, node: fx.Node) -> Node:
    """Some channels, rows or columns."""
    source = source_of(node)
    rank = len(shape_of(source))
    dim = int(argument(node, 1, "dim", 0)) % rank
    if dim == 0 or (context.rows and dim != rank - 1):
        raise Unsupported("it takes other parts than features, or channels, rows or columns of maps")
    if context.rows or dim == 1:
        return channel_slice(context, node)
    given: list[Any] = [argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)]
    if any(value is not None and not isinstance(value, int) for value in given):
        raise Unsupported("its bounds depend on the input")
    start, stop = (0 if given[0] is None else given[0]), (sys.maxsize if given[1] is None else given[1])
    before, shape = item_shape(context, source), item_shape(context, node)
    # An end may have been read from another tensor's size: it holds for this one only.
    sizes = before[1:] if 0 <= stop < sys.maxsize else ()
    span = (dim - 2 if rank == 4 else 1, start, stop, given[2])
    return Node("crop", node.name, [source.name], shape, layer=node.name, span=span, captured=sizes)


def _resample(kind: str) -> Callable[[Context, fx.Node], Node]:
    def convert_resample(context: Context, node: fx.Node) -> Node:
        source = source_of(node)
        before, shape = item_shape(context, source), item_shape(context, node)
        corners = kind == "linear" and bool(argument(node, 2, "align_corners", False))
        scales: Any = argument(node, 3 if kind == "linear" else 2, "scale_factors")
        if len(shape_of(source)) != 4 or any(not isinstance(s, (int, float)) for s in scales or ()):
            raise Unsupported("it interpolates otherwise than over rows and columns")
        values = tuple(float(s) for s in scales or ())
        # A size may have been read from another tensor: it holds for this one only.
        captured = () if values else before[1:]
        how = "corners" if corners else kind
        return Node("resample", node.name, [source.name], shape, node.name, values=values, kind=how, captured=captured)

    return convert_resample


SPATIAL: dict[Any, Callable[[Context, fx.Node], Node]] = {
    aten.max_pool1d.default: _pool("max"),
    aten.max_pool2d.default: _pool("max"),
    aten.avg_pool1d.default: _pool("mean"),
    aten.avg_pool2d.default: _pool("mean"),
    aten.adaptive_avg_pool1d.default: _adaptive("mean"),
    aten.adaptive_avg_pool2d.default: _adaptive("mean"),
    largest: _adaptive("max"),
    map_norm: _map_norm,
    by_mean: _by_mean,
    aten.group_norm.default: _group_norm,
    aten.instance_norm.default: _group_norm,
    aten.pad.default: _pad,
    aten.constant_pad_nd.default: _pad,
    aten.upsample_nearest2d.vec: _resample("nearest"),
    aten.upsample_bilinear2d.vec: _resample("linear"),
}
