"""Operations that give the same numbers another shape, or none but their own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import Context, Unsupported, argument, item_shape, shape_of, source_of
from mirrormask.runtime.graph.ir import Node

__all__ = ["RESHAPES", "SAME"]

aten = torch.ops.aten


def _reshape(context: Context, node: fx.Node) -> Node:
    """From maps to rows, and from rows to maps or one number per channel."""
    source, shape = source_of(node), shape_of(node)
    before = shape_of(source)
    made = item_shape(context, node)
    if context.rows:
        raise Unsupported("it reshapes rows")
    if not before or shape[0] != before[0]:
        raise Unsupported("it reshapes otherwise than from maps to rows, or back")
    if shape == before or len(shape) == 2 or len(before) == 2 or (len(before) > 2 and _one_each(before, shape)):
        item_shape(context, source)
        return Node("flatten", node.name, [source.name], made, layer=node.name)
    raise Unsupported("it reshapes otherwise than from maps to rows, or back")


def _one_each(before: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Whether both hold one number per channel."""
    return before[1] == shape[1] and int(np.prod(before[2:])) == int(np.prod(shape[2:])) == 1


def _same(context: Context, node: fx.Node) -> Node:
    """What gives its input back."""
    if argument(node, 2, "train", False) is True and "dropout" in str(node.target):
        raise Unsupported("it is active dropout")
    source = source_of(node)
    if shape_of(source) != shape_of(node):
        raise Unsupported("it repeats what it reads")
    value: Any = source.meta.get("val")
    if isinstance(value, Tensor) and value.device.type != "cpu":
        raise Unsupported("it moves between devices")
    return Node("flatten", node.name, [source.name], item_shape(context, node), layer=node.name)


RESHAPES = dict.fromkeys(
    [
        aten.flatten.using_ints,
        aten.view.default,
        aten.reshape.default,
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.unflatten.int,
    ],
    _reshape,
)
SAME = dict.fromkeys(
    [
        aten.dropout.default,
        aten.dropout_.default,
        aten.feature_dropout.default,
        aten.alpha_dropout.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.detach.default,
        aten.detach_.default,
        aten.alias.default,
        aten.lift_fresh_copy.default,
        aten.to.dtype,
        aten.to.dtype_layout,
        aten.to.device,
        aten._to_copy.default,
        aten.expand.default,
        aten.expand_as.default,
        aten.type_as.default,
        aten.view_as.default,
    ],
    _same,
)
