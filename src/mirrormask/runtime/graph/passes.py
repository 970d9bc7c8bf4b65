"""What is done to an exported program before regions are looked for: operations in place, and those that do nothing."""

from __future__ import annotations

import sys
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import argument, source_of
from mirrormask.runtime.graph.convert import writes_in_place

__all__ = ["once", "operations_beside", "out_of_place", "without_identities", "works_in_place", "written"]

aten = torch.ops.aten

#: Operations whose result may share memory with what they read.
VIEWS = {
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.transpose.int,
    aten.permute.default,
    aten.t.default,
    aten.expand.default,
    aten.expand_as.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.contiguous.default,
    aten.detach.default,
    aten.detach_.default,
    aten.alias.default,
    aten.dropout.default,
    aten.feature_dropout.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.view_as.default,
    aten.movedim.int,
    aten.swapaxes.default,
    aten.diagonal.default,
    aten.as_strided.default,
    aten.unfold.default,
    aten.real.default,
    aten.imag.default,
}

#: Conversions to a type, which may be the one that is there.
TYPED = {aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.type_as.default, aten._to_copy.default}


def out_of_place(graph: fx.Graph) -> None:
    """Replace operations in place by those that make a new tensor, where nobody can tell the difference.

    That is where no operation after it reads the tensor that it changes, nor any view of its memory.
    """
    order = {node: number for number, node in enumerate(graph.nodes)}
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or not isinstance(node.target, torch._ops.OpOverload)
            or not writes_in_place(node)
        ):
            continue
        made = _functional(node.target)
        if made is not None and _alone(node, order):
            node.target = made


def _alone(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether nobody reads what an operation in place changes after it, by whatever view."""
    reader, source = node, node.args[0] if node.args else None
    while isinstance(source, fx.Node) and source.target in VIEWS and list(source.users) == [reader]:
        reader, source = source, source.args[0]  # a view for this operation alone
    if not isinstance(source, fx.Node) or not _fresh(source):
        return False
    return not any(order[user] > order[node] or _views(user) for user in source.users if user is not reader)


def written(graph: fx.Graph) -> set[str]:
    """The names of what makes or reads memory that some operation changes in place: its order is not that of values."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if not _in_place(node):
            continue
        source = node.args[0] if node.args else None
        while isinstance(source, fx.Node) and _views(source) and source.args and source.op == "call_function":
            source = source.args[0]
        reached = [node, source] if isinstance(source, fx.Node) else [node]
        while reached:
            one = reached.pop()
            if one in found:
                continue
            found.add(one)
            for user in one.users:
                if user.op == "call_function" and (_views(user) or _in_place(user)):
                    reached.append(user)
                else:
                    found.add(user)
    return {node.name for node in found}


def _functional(target: torch._ops.OpOverload) -> Any:
    packet = getattr(aten, target._schema.name.partition("::")[2].removesuffix("_"), None)
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _fresh(node: fx.Node) -> bool:
    """Whether a node makes a tensor of its own."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not _views(node)


def _views(node: fx.Node) -> bool:
    return node.target in VIEWS or not isinstance(node.target, torch._ops.OpOverload)


def without_identities(graph: fx.Graph) -> None:
    """Leave out what gives its input back: dropout in evaluation, ``detach``, slices of all, copies to no end."""
    written = any(_in_place(node) for node in graph.nodes)
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node in list(graph.nodes):
        if (
            node.op != "call_function"
            or not _identity(node, written)
            or (output in node.users and node.target is aten.clone.default)
        ):
            continue
        node.replace_all_uses_with(source_of(node))
        graph.erase_node(node)


def once(graph: fx.Graph) -> None:
    """Compute once what several layers each compute of the same: masks, and tables of positions.

    Not what is returned, as the caller may want each for itself; nor where anything is changed in place.
    """
    if any(_in_place(node) for node in graph.nodes):
        return
    found: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
            continue
        if any(user.op == "output" for user in node.users) or not isinstance(node.meta.get("val"), Tensor):
            continue
        key = repr((str(target), node.args, sorted(node.kwargs.items())))
        first = found.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)


def works_in_place(graph: fx.Graph) -> bool:
    """Whether an operation writes into what it reads: who shares memory with whom matters then."""
    return any(map(_in_place, graph.nodes))


def operations_beside(graph: fx.Graph, targets: Container[Any]) -> list[fx.Node]:
    """The operations that make tensors, in order; none where none of these is among them, or one works in place."""
    if not any(node.target in targets for node in graph.nodes) or works_in_place(graph):
        return []
    return [node for node in graph.nodes if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor)]


def _in_place(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and writes_in_place(node)


def _identity(node: fx.Node, written: bool) -> bool:
    if node.target in (aten.dropout.default, aten.dropout_.default, aten.feature_dropout.default):
        return not argument(node, 2, "train", True)
    if node.target in (aten.detach.default, aten.detach_.default, aten.alias.default):
        return True
    if node.target is aten.slice.Tensor:  # x[:, :2] is two slices, of which the first takes all
        start, end, step = argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)
        return start in (None, 0) and (end is None or (isinstance(end, int) and end >= sys.maxsize)) and step == 1
    if node.target in TYPED and not written:
        return _typed_alike(node, source_of(node))
    return node.target is aten.clone.default and not written


def _typed_alike(node: fx.Node, source: fx.Node) -> bool:
    """Whether a conversion finds the type and the place that it makes."""
    found, made = source.meta.get("val"), node.meta.get("val")
    if not isinstance(found, Tensor) or not isinstance(made, Tensor):
        return False
    return (found.dtype, found.device, found.layout) == (made.dtype, made.device, made.layout)
