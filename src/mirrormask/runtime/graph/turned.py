"""Transposed convolutions as convolutions over maps with zeros between; PReLU, gates and stacks of what is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import (
    MOST_BESIDE,
    Context,
    Unsupported,
    argument,
    item_shape,
    pair,
    reaches_far,
    source_of,
)
from mirrormask.runtime.graph.functions import by_mean, map_norm, per_channel, response, spaced, spaced_conv
from mirrormask.runtime.graph.ir import Node, Origin
from mirrormask.runtime.graph.pointwise import Converter

__all__ = ["TURNED", "respond", "turn"]

aten = torch.ops.aten


def turn(module: fx.GraphModule) -> None:
    """Rewrite transposed convolutions, PReLU, gates and stacks, in place."""
    for node in list(module.graph.nodes):
        made = None
        with module.graph.inserting_before(node):
            if node.target in (aten.conv_transpose1d.default, aten.conv_transpose2d.input):
                made = _turned(node)
            elif node.target is aten.prelu.default:
                made = _prelu(node)
            elif node.target is aten.stack.default:
                made = _stacked(node)
            elif node.target is aten.glu.default:
                made = _gated(node)
            elif node.target is aten.conv2d.default:
                made = _padded_first(node)
            elif node.target is aten.addcmul.default:
                made = _with_product(node)
        if made is not None:
            made.meta |= {name: value for name, value in node.meta.items() if name != "val"}
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)


def respond(module: fx.GraphModule) -> None:
    """Write out, in place, the response norms of maps whose channels come first."""
    for node in list(module.graph.nodes):
        if node.target is response and not node.args[2]:
            with module.graph.inserting_before(node):
                share = _put(node, by_mean, _put(node, map_norm, node.args[0]), node.args[1])
                made = _put(node, aten.mul.Tensor, node.args[0], share)
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)


def _put(like: fx.Node, target: Any, *args: Any) -> fx.Node:
    made = like.graph.call_function(target, args)
    given = fx.map_arg(args, lambda arg: arg.meta["val"])
    made.meta["val"] = target(*given)
    return made


def _is_stored(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _turned(node: fx.Node) -> fx.Node | None:
    x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
    one = node.target is aten.conv_transpose1d.default
    if not _is_stored(weight) or not isinstance(x, fx.Node) or len(x.meta["val"].shape) != (3 if one else 4):
        return None
    names = (("stride", 1), ("padding", 0), ("output_padding", 0))
    stride, padding, more = (
        pair(argument(node, 3 + i, name, fill), one=one, fill=fill) for i, (name, fill) in enumerate(names)
    )
    groups, dilation = int(argument(node, 6, "groups", 1)), pair(argument(node, 7, "dilation", 1), one=one)
    kernel = (1, *weight.meta["val"].shape[2:])[-2:]
    before = [d * (int(k) - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
    around = (before[1], before[1] + more[1], before[0], before[0] + more[0])
    wide = node.graph.call_function(spaced, (x, stride, around))
    value = x.meta["val"]
    beside = ((around[2], around[3]), around[:2])[-(value.dim() - 2) :]
    steps = stride[-(value.dim() - 2) :]
    # Shapes are told: to pad maps of open sizes would settle how many there are.
    sizes = [(n - 1) * s + 1 + sum(more) for n, s, more in zip(value.shape[2:], steps, beside, strict=True)]
    wide.meta["val"] = value.new_empty((*value.shape[:2], *sizes))
    made = node.graph.call_function(spaced_conv, (wide, weight, bias, dilation, groups))
    made.meta["val"] = node.meta["val"]
    return made


def _prelu(node: fx.Node) -> fx.Node | None:
    """``max(x, 0) - slope max(-x, 0)``."""
    x, slope = node.args
    value = x.meta.get("val") if isinstance(x, fx.Node) else None
    if not _is_stored(slope) or not isinstance(value, Tensor) or value.dim() < 3:
        return None
    below = _put(node, aten.relu.default, _put(node, aten.neg.default, x))
    return _put(node, aten.sub.Tensor, _put(node, aten.relu.default, x), _put(node, per_channel, below, slope, "mul"))


def _gated(node: fx.Node) -> fx.Node | None:
    """``a sigmoid(b)`` with the halves ``a`` and ``b``."""
    x: Any = node.args[0]
    value, half = x.meta["val"], node.meta["val"]
    dim = int(argument(node, 1, "dim", -1)) % value.dim()
    if not isinstance(half.shape[dim], int):
        return None
    size, parts = half.shape[dim], []
    for start in (0, size):
        parts.append(node.graph.call_function(aten.slice.Tensor, (x, dim, start, start + size)))
        parts[-1].meta["val"] = half.new_empty(half.shape)
    return _put(node, aten.mul.Tensor, parts[0], _put(node, aten.sigmoid.default, parts[1]))


def _padded_first(node: fx.Node) -> fx.Node | None:
    """A convolution whose padding is wider than the zeros beside rows, on maps that are padded before."""
    padding = argument(node, 4, "padding", 0)
    weight = node.args[1]
    if isinstance(padding, str) or not _is_stored(weight):
        return None
    sides, dilation = pair(padding), pair(argument(node, 5, "dilation", 1))
    kernel = int(weight.meta["val"].shape[3])  # type: ignore[union-attr]
    if kernel > MOST_BESIDE or not reaches_far(sides[1], kernel, dilation[1]):
        return None
    x: Any = node.args[0]
    # Shapes are told: to run a convolution of open sizes would settle some of them.
    wide = node.graph.call_function(aten.constant_pad_nd.default, (x, [sides[1], sides[1], 0, 0]))
    *lead, width = x.meta["val"].shape
    wide.meta["val"] = x.meta["val"].new_empty((*lead, width + 2 * sides[1]))
    bias, stride, groups = argument(node, 2, "bias"), argument(node, 3, "stride", 1), argument(node, 6, "groups", 1)
    given = [list(pair(stride)), [sides[0], 0], list(dilation)]
    made = node.graph.call_function(aten.conv2d.default, (wide, weight, bias, *given, groups))
    made.meta["val"] = node.meta["val"]
    return made


def _with_product(node: fx.Node) -> fx.Node | None:
    """``a + value b c``."""
    if argument(node, 3, "value", 1) != 1 or not all(isinstance(arg, fx.Node) for arg in node.args):
        return None
    return _put(node, aten.add.Tensor, _put(node, aten.mul.Tensor, *node.args[1:]), node.args[0])


def _stacked(node: fx.Node) -> fx.Node | None:
    """Tensors along a new dimension, put together along it."""
    parts: Any = node.args[0]
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != torch.float32:
        return None
    dim = int(argument(node, 1, "dim", 0)) % value.dim()
    return _put(node, aten.cat.default, [_put(node, aten.unsqueeze.default, part, dim) for part in parts], dim)


def _spaced(context: Context, node: fx.Node) -> Node:
    if context.rows:
        raise Unsupported("it works on maps")
    stride, around = node.args[1:3]
    given: Any = stride
    sides: Any = around
    made, names = item_shape(context, node), [source_of(node).name]
    return Node("pad", node.name, names, made, node.name, kind="spaced", span=tuple(sides), stride=tuple(given))


def _spaced_conv(context: Context, node: fx.Node) -> Node:
    if context.rows:
        raise Unsupported("it works on maps")
    (weight, shape), (bias, _) = context.constant(node.args[1]), context.constant(node.args[2])
    dilation, kernel = pair(node.args[3]), (1, *shape[2:])[-2:]
    if kernel[1] * dilation[1] > MOST_BESIDE:
        raise Unsupported("its kernel is wider than 48")
    return Node(
        "conv",
        node.name,
        [source_of(node).name],
        item_shape(context, node),
        layer=context.layer(node.args[1]),
        origin=Origin(weight, bias, transposed=True),
        dilation=dilation,
        groups=int(node.args[4]),  # type: ignore[arg-type]
        kernel=(kernel[0], kernel[1]),
    )


TURNED: dict[Any, Converter] = {spaced: _spaced, spaced_conv: _spaced_conv}
