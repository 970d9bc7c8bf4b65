"""Arithmetic on images that are made into rows, as arithmetic on the rows.

Where a network without convolutions normalises its images first, no layer works on images, and the normalisation would
be no layer's neighbour: ``flatten(x * scale)`` is ``flatten(x) * flatten(scale)``, which is the linear layer's.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.chains import sizes
from mirrormask.runtime.graph.making import Made, Making, keep
from mirrormask.runtime.graph.partition import FLATTENS
from mirrormask.runtime.graph.passes import works_in_place
from mirrormask.runtime.graph.pointwise import ACTIVATIONS, ARITHMETIC

__all__ = ["flatten_first"]

aten = torch.ops.aten


def flatten_first(module: fx.GraphModule) -> None:
    """Move what makes rows of a model's inputs before the arithmetic on them, in place."""
    if works_in_place(module.graph):
        return
    for node in list(module.graph.nodes):
        if node.target in FLATTENS:
            _rise(module, node)
    module.graph.eliminate_dead_code()
    module.graph.lint()


def _rise(module: fx.GraphModule, flatten: fx.Node) -> None:
    """Put a flatten before all that is done to one input of the model before it."""
    steps = []
    x: Any = flatten.args[0]
    while isinstance(x, fx.Node) and len(x.users) == 1 and (before := _one_stream(x)) is not None:
        steps.append(x)
        x = before
    features = _features(x, flatten)
    if not steps or x.op != "placeholder" or features is None:
        return
    if any(sizes(step) != sizes(x) for step in steps):
        return
    fetched = [arg for step in steps for arg in step.all_input_nodes if arg.op == "get_attr"]
    stored = {arg: _row_of(arg, sizes(x)[1:], features) for arg in fetched}
    if any(row is None for row in stored.values()):
        return
    graph, shape = flatten.graph, flatten.meta["val"].shape
    with graph.inserting_before(flatten):
        rows = {x: graph.node_copy(flatten, lambda node: node)}
        rows[x].update_arg(0, x)
        for arg, row in stored.items():
            assert row is not None
            rows[arg] = keep(module, "row", *row)
        for step in reversed(steps):
            rows[step] = graph.node_copy(step, lambda node: rows.get(node, node))
            rows[step].meta["val"] = step.meta["val"].new_empty(shape)
    flatten.replace_all_uses_with(rows[steps[0]])


def _one_stream(node: fx.Node) -> fx.Node | None:
    """The tensor of which an operation makes each number alone, if there is one, beside stored tensors."""
    streams = [arg for arg in node.all_input_nodes if arg.op != "get_attr"]
    stored = [arg for arg in node.all_input_nodes if arg.op == "get_attr"]
    if len(streams) != 1 or (stored and (node.target not in ARITHMETIC or node.kwargs)):
        return None
    return streams[0] if node.target in ARITHMETIC or node.target in ACTIVATIONS else None


def _features(x: fx.Node, flatten: fx.Node) -> int | None:
    """How many features an item has where ``(items, ...)`` is made into ``(items, features)``, whatever is given."""
    value = flatten.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 2 or len(sizes(x)) < 3 or sizes(x)[0] != sizes(flatten)[0]:
        return None
    if sizes(flatten)[1].isdigit():
        return int(sizes(flatten)[1])
    # Height and width may be open, and their product what a layer takes.
    takes = {user.args[1].meta["val"].shape[1] for user in flatten.users if user.target is aten.linear.default}  # type: ignore[union-attr]
    return int(takes.pop()) if len(takes) == 1 else None


def _row_of(stored: fx.Node, item: tuple[str, ...], features: int) -> tuple[Tensor, Made] | None:
    """A stored tensor for each feature of an item, and how it was made; None where sizes left open decide which.

    With images of any height and width of one product, what there is a number of for each channel is a row for all.
    """
    making = Making()
    found = making.fetch(stored)
    shape = list(found.meta["val"].shape)
    shape = [1] * (len(item) - len(shape)) + shape
    if len(shape) > len(item) + 1 or shape[: len(shape) - len(item)] not in ([], [1]):
        return None
    shape = shape[-len(item) :]
    varied = [dim for dim, size in enumerate(shape) if size > 1]
    first, last = (varied[0], varied[-1] + 1) if varied else (0, 0)
    before, block, after = item[:first], item[first:last], item[last:]
    numbers = [math.prod(map(int, part)) if all(map(str.isdigit, part)) else None for part in (before, block, after)]
    if numbers[1] is None or numbers[0] is numbers[2] is None:
        return None
    there = numbers[0] if numbers[0] is not None else features // (numbers[1] * (numbers[2] or 1))
    made = making.do(aten.reshape.default, found, shape[first:last])
    made = making.do(aten.expand.default, made, [int(size) for size in block])
    made = making.do(aten.reshape.default, made, [1, numbers[1], 1])
    made = making.do(aten.expand.default, made, [there, -1, features // (there * numbers[1])])
    return making.done(making.do(aten.reshape.default, made, [features]))
