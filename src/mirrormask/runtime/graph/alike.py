"""What depends on the number of items alone, and is the same for each of them, is computed once, for one item.

Tables of positions that are made for a batch, as ``torch.zeros(batch, height, width).cumsum(1)`` and all that follows.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.fold import MOST
from mirrormask.runtime.graph.making import Made, keep
from mirrormask.runtime.graph.passes import given_out, written
from mirrormask.runtime.graph.program import Unstorable, steps_of

__all__ = ["fold_items"]

aten = torch.ops.aten
#: Numbers of items that it is tried with: alike for these, it is alike for all.
TRIED = (1, 2, 3)
#: How far items may be from each other, over the largest number: PyTorch's layers sum in an order of each batch size.
CLOSE = 1e-6


def fold_items(module: fx.GraphModule) -> None:
    """Replace, in place, such values by one item that is repeated."""
    graph = module.graph
    sizes = {node: node.meta["val"] for node in graph.nodes if isinstance(node.meta.get("val"), torch.SymInt)}
    symbols = {symbol for size in sizes.values() for symbol in size.node.expr.free_symbols}
    batch = [node for node, size in sizes.items() if len(symbols) == 1 and size.node.expr in symbols]
    if not batch:
        return
    (symbol,) = symbols
    values: dict[fx.Node, list[Any]] = {
        node: [int(size.node.expr.subs({symbol: count})) for count in TRIED] for node, size in sizes.items()
    }
    counted, order = set(sizes), {node: number for number, node in enumerate(graph.nodes)}
    changed, lent = written(graph), given_out(graph)
    for node in graph.nodes:
        if node.name not in changed:
            _run(node, values, counted)
    for node in reversed(list(graph.nodes)):  # what is no such value stays, and reads those before it
        if node in counted - set(sizes) and any(user not in values for user in node.users) and not _alike(values[node]):
            del values[node]
    for node in list(graph.nodes):
        found = values.get(node)
        users = [user for user in node.users if user not in values]
        if found is None or node in sizes or node not in counted or not users:
            continue
        if node in lent or order[batch[0]] > order[users[0]]:
            continue
        told = None
        with contextlib.suppress(Unstorable):
            told = _told(node, values, order)
        with graph.inserting_before(users[0]):
            kept = keep(module, "alike", found[0], told)
            made = graph.call_function(aten.expand.default, (kept, [batch[0], *[-1] * (found[0].dim() - 1)]))
            made.meta = dict(node.meta)
        for user in users:
            user.replace_input_with(node, made)
    graph.eliminate_dead_code()


def _run(node: fx.Node, values: dict[fx.Node, list[Any]], counted: set[fx.Node]) -> None:
    """The values of an operation on such values, which may be the module's own tensors."""
    if node in values:
        return
    if node.op == "get_attr":
        module = node.graph.owning_module
        assert module is not None
        owner, _, name = str(node.target).rpartition(".")
        values[node] = [getattr(module.get_submodule(owner), name)] * len(TRIED)
        return
    target, inputs = node.target, node.all_input_nodes
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return
    if target._schema.is_mutable or torch.Tag.nondeterministic_seeded in target.tags:
        return
    if not all(source in values for source in inputs):
        return
    depends = any(source in counted for source in inputs)
    with contextlib.suppress(Exception):  # whatever an operation raises: then it stays
        found = []
        for number in range(len(TRIED) if depends else 1):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda arg: values[arg][number])  # noqa: B023
            found.append(target(*args, **kwargs))
            if not isinstance(found[-1], Tensor) or found[-1].numel() > MOST:
                return
        values[node] = found if depends else found * len(TRIED)
        if depends:
            counted.add(node)


def _alike(found: list[Tensor]) -> bool:
    """Whether the first dimension counts items, all of which are equal but for rounding."""
    one = found[0]
    if one.dtype != torch.float32 or not one.dim() or not one.numel():
        return False
    near = CLOSE * float(one.abs().max())
    return all(
        made.shape == (count, *one.shape[1:]) and torch.allclose(made, one.expand_as(made), rtol=0, atol=near)
        for count, made in zip(TRIED, found, strict=True)
    )


def _told(node: fx.Node, values: dict[fx.Node, list[Any]], order: dict[fx.Node, int]) -> Made:
    """The steps that made one item.

    Raises:
        Unstorable: plain values cannot say them.
    """
    found, left = {node}, [node]
    while left:
        fresh = {source for source in left.pop().all_input_nodes if isinstance(values[source][0], Tensor)} - found
        found |= fresh
        left += fresh
    copy, made = fx.Graph(), dict[fx.Node, fx.Node]()
    for one in sorted(found, key=lambda one: order[one]):
        args, kwargs = fx.map_arg((one.args, one.kwargs), lambda arg: made.get(arg, values[arg][0]))
        made[one] = copy.create_node(one.op, one.target, args, kwargs, one.name)
    stored = {str(one.target): values[one][0] for one in found if one.op == "get_attr"}
    return Made(steps_of(list(copy.nodes)), stored)
