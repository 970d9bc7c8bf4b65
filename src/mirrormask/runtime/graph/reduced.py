"""Sums, means, maxima and norms: over all of a map, over one of its axes, or over channels or features."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.aten import Context, Unsupported, argument, item_shape, shape_of, source_of
from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.graph.pointwise import Converter

__all__ = ["REDUCED"]

aten = torch.ops.aten


def _reduced(kind: str, place: int = 1) -> Converter:
    """What makes one number of several; ``place`` is that of the dimensions among the arguments."""

    def convert_reduced(context: Context, node: fx.Node) -> Node:
        source, given = source_of(node), argument(node, place, "dim")
        rank, kept = len(shape_of(source)), bool(argument(node, place + 1, "keepdim", False))
        if argument(node, place + 2, "dtype") is not None or (kind == "norm" and argument(node, 1, "ord", 2) != 2):
            raise Unsupported("it makes another type, or is another norm than the root of the squares' sum")
        dims = {int(dim) % rank for dim in ([given] if isinstance(given, int) else given or range(rank))}
        if dims == ({rank - 1} if context.rows else {1}) and kept:
            made = item_shape(context, node)
            return Node("reduce", node.name, [source.name], made, layer=node.name, kind=kind)
        if not context.rows and kind != "norm":
            if dims == {3: {2}, 4: {2, 3}}.get(rank, set()):
                return _of_maps(source, node, kept, kind)
            if kind != "sum" and rank == 4 and len(dims) == 1 and dims < {2, 3} and kept:
                made, span = item_shape(context, node), (next(iter(dims)) - 2,)
                return Node("adaptive", node.name, [source.name], made, layer=node.name, kind=kind, span=span)
        raise Unsupported("it reduces other dimensions than those of a map, or its channels, or a row's features")

    return convert_reduced


def _of_maps(source: fx.Node, node: fx.Node, kept: bool, kind: str) -> Node:
    channels = shape_of(source)[1]
    shape = (channels, 1, 1) if kept else (channels,)
    if kind == "max":
        return Node("adaptive", node.name, [source.name], shape, layer=node.name, kind="max")
    return Node("mean", node.name, [source.name], shape, layer=node.name, kind="sum" if kind == "sum" else "")


REDUCED: dict[Any, Converter] = {
    aten.mean.dim: _reduced("mean"),
    aten.sum.dim_IntList: _reduced("sum"),
    aten.amax.default: _reduced("max"),
    aten.linalg_vector_norm.default: _reduced("norm", 2),
}
