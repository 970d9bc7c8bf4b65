"""What depends on stored tensors alone is computed once: position tables, masks of windows, biases of attention."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.making import Made, keep
from mirrormask.runtime.graph.passes import changed_by, given_out
from mirrormask.runtime.graph.program import Unstorable, Written, steps_of

__all__ = ["fold_constants"]

aten = torch.ops.aten
#: Operations that look at the type and the place of their input alone, and those that are told the type.
LIKE = {
    aten.new_zeros.default: aten.zeros.default,
    aten.new_ones.default: aten.ones.default,
    aten.new_full.default: aten.full.default,
    aten.new_empty.default: aten.empty.memory_format,
}
#: Numbers of the largest tensor that is kept in place of what made it.
MOST = 1 << 24


def fold_constants(module: fx.GraphModule) -> None:
    """Replace, in place, values that no input has a part in by what they are."""
    graph = module.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    values: dict[fx.Node, Any] = {}
    made: set[fx.Node] = set()
    random = torch.Tag.nondeterministic_seeded
    for node in graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            values[node] = getattr(module.get_submodule(owner), name)
        elif node.op == "call_function" and not (
            isinstance(node.target, torch._ops.OpOverload) and random in node.target.tags
        ):
            args, kwargs = node.args, node.kwargs
            if node.target in LIKE and isinstance(args[0], fx.Node):
                like = args[0].meta.get("val")
                if isinstance(like, Tensor) and args[0] not in values:
                    args = (torch.empty(0, dtype=like.dtype), *args[1:])
            if not all(arg in values for arg in _nodes((args, kwargs))) or _changes_input(node, made):
                if _mutable(node) and not made.isdisjoint(changed_by(node)):
                    return  # something is written into what would be kept
                continue
            if not _nodes((args, kwargs)) and args is node.args and not _makes_tensor(node):
                continue
            with contextlib.suppress(Exception):  # whatever an operation raises: then it stays
                given, named = fx.map_arg((args, kwargs), lambda arg: values[arg])
                values[node] = node.target(*given, **named)
                made.add(node)
    for node in made:
        if _mutable(node):
            readers = {user for one in changed_by(node) for user in one.users if order[user] < order[node]}
            if readers - made:
                return  # they read what was there before
    _replace(module, values, made)


def _nodes(value: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.map_arg(value, found.append)
    return found


def _mutable(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _makes_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), Tensor)


def _changes_input(node: fx.Node, made: set[fx.Node]) -> bool:
    """Whether an operation changes what was not made here: a parameter or buffer."""
    if not _mutable(node):
        return False
    first = node.args[0] if node.args else None
    while isinstance(first, fx.Node) and first in made:
        if not first.args or not isinstance(first.args[0], fx.Node) or first.args[0] not in made:
            return False
        first = first.args[0]
    return True


def _replace(module: fx.GraphModule, values: dict[fx.Node, Any], made: set[fx.Node]) -> None:
    """Stored tensors in place of the values that something else reads."""
    graph = module.graph
    order = {node: number for number, node in enumerate(graph.nodes)}
    lent = given_out(graph)  # each call makes these anew
    for node in list(graph.nodes):
        if node not in made or node in lent or not isinstance(values[node], Tensor):
            continue
        users = [user for user in node.users if user not in made]
        if not users or values[node].numel() > MOST:
            continue
        told = None
        with contextlib.suppress(Unstorable):
            told = _told(node, values, order)
        with graph.inserting_before(node):
            kept = keep(module, "folded", values[node], told)
        for user in users:
            user.replace_input_with(node, kept)
    for node in reversed(list(graph.nodes)):
        if node in made and not node.users:
            graph.erase_node(node)


def _told(node: fx.Node, values: dict[fx.Node, Any], order: dict[fx.Node, int]) -> Made:
    """The steps that made a value, those that wrote into it or into what it was made of included.

    Raises:
        Unstorable: plain values cannot say them.
    """
    found, left = {node}, [node]
    instead: dict[fx.Node, Written] = {}
    writers = [one for one in values if one.op == "call_function" and _mutable(one)]
    while left:
        one = left.pop()
        if one.target in LIKE and isinstance(one.args[0], fx.Node) and one.args[0] not in values:
            kind = one.kwargs.get("dtype") or one.args[0].meta["val"].dtype
            instead[one] = LIKE[one.target], one.args[1:], {"dtype": kind}
        for source in one.all_input_nodes:
            if one in instead and source is one.args[0]:
                continue
            if source not in values:
                raise Unstorable(source)
            if source not in found:
                found.add(source)
                left.append(source)
        if not left:
            left = [writer for writer in writers if writer not in found and not found.isdisjoint(_views(writer))]
            found.update(left)
    steps = sorted(found, key=lambda one: order[one])
    if steps[-1] is not node:
        raise Unstorable(node)  # written into after it was made
    return Made(steps_of(steps, instead), {str(one.target): values[one] for one in steps if one.op == "get_attr"})


def _views(writer: fx.Node) -> set[fx.Node]:
    """What an operation writes into, and what that may be a view of."""
    seen, at = set[fx.Node](), writer.args[0] if writer.args else None
    while isinstance(at, fx.Node):
        seen.add(at)
        at = at.args[0] if at.args else None
    return seen
