"""What is done to an exported program before regions are looked for: operations in place, and those that do nothing."""

from __future__ import annotations

import operator
import sys
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import argument, source_of
from mirrormask.runtime.graph.convert import writes_in_place

__all__ = [
    "changed_by",
    "given_out",
    "in_order",
    "once",
    "operations_beside",
    "out_of_place",
    "views_of_results",
    "without_identities",
    "works_in_place",
    "written",
]

aten = torch.ops.aten

#: A note that a node, which was an operation in place, has a memory of its own.
OWN = "own_memory"
#: Operations whose result may share memory with what they read, beside those of which the trace shows it.
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
        if not _in_place(node):
            continue
        made = _functional(node.target)  # type: ignore[arg-type]
        if made is not None and _of_one_type(node) and _alone(node, order):
            node.target = made
            node.meta[OWN] = True


def _of_one_type(node: fx.Node) -> bool:
    """Whether what an operation in place reads cannot change the type of a new tensor, as it cannot that of its own."""
    values = [source.meta.get("val") for source in node.all_input_nodes]
    tensors = [value for value in values if isinstance(value, Tensor)]
    return bool(tensors) and all(x.dtype == tensors[0].dtype or x.dim() < min(1, tensors[0].dim()) for x in tensors)


def _alone(node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether nobody reads what an operation in place changes after it, by whatever view."""
    reader, source = node, node.args[0] if node.args else None
    while isinstance(source, fx.Node) and len(seen := _seen(source)) == 1 and list(source.users) == [reader]:
        reader, source = source, seen[0]  # a view for this operation alone
    if not isinstance(source, fx.Node) or not _fresh(source):
        return False
    return not any(order[user] > order[node] or source in _seen(user) for user in source.users if user is not reader)


def written(graph: fx.Graph) -> set[str]:
    """The names of what makes or reads memory that some operation changes in place: its order is not that of values."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if _in_place(node):
            reached = changed_by(node)
            found |= reached | {user for one in reached for user in one.users}
    return {node.name for node in found}


def changed_by(node: fx.Node) -> set[fx.Node]:
    """All tensors in whose memory an operation in place may write: what it is told to change, and views around that."""
    above, found = _roots(_written_arguments(node)), set[fx.Node]()
    reached = [node, *above]
    if any(one.op == "placeholder" for one in above):  # two arguments may be one tensor
        reached += [one for one in node.graph.nodes if one.op == "placeholder"]
    while reached:
        one = reached.pop()
        if one not in found:
            found.add(one)
            reached += [user for user in one.users if one in _seen(user) or _in_place(user)]
    return found


def given_out(graph: fx.Graph) -> set[fx.Node]:
    """What lies in the memory of results: whoever called may write into it."""
    return _roots(_results(graph))


def views_of_results(graph: fx.Graph) -> set[str]:
    """The names of views between two results, or of an input: who writes into one finds it in the other."""
    results, found = _results(graph), set[str]()
    others = {*results, *(node for node in graph.nodes if node.op == "placeholder")}
    for node in results:
        above = _roots([node]) - {node}
        if not above.isdisjoint(others):
            found |= {one.name for one in {node, *above} if not above.isdisjoint(_seen(one))}
    return found


def in_order(graph: fx.Graph) -> list[bool]:
    """Which results are tensors of their own whose numbers lie in order, for the example."""
    return [_fresh(node) and _lies_in_order(node.meta.get("val")) for node in _results(graph)]


def put_in_order(graph: fx.Graph, dense: list[bool]) -> None:
    """Results that were ``dense`` and have become views of what is computed before: the caller may view them."""
    (output,) = (node for node in graph.nodes if node.op == "output")
    for node, was in zip(_results(graph), dense, strict=True):
        if was and node.op == "call_function" and _seen(node) and node.target is not operator.getitem:
            with graph.inserting_before(output):
                made = graph.call_function(aten.contiguous.default, (node,))
            made.meta = dict(node.meta)
            output.replace_input_with(node, made)


def _results(graph: fx.Graph) -> list[fx.Node]:
    (output,) = (node for node in graph.nodes if node.op == "output")
    found: list[fx.Node] = []
    fx.map_arg(output.args, found.append)
    return found


def _lies_in_order(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return False
    step = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if _number(size) != 1 and _number(stride) != step:
            return False
        step *= _number(size)
    return True


def _number(size: Any) -> int:
    """A size as the example has it: to ask for it otherwise is to settle it."""
    return int(size.node.hint or 0) if isinstance(size, torch.SymInt) else int(size)


def _roots(nodes: list[fx.Node]) -> set[fx.Node]:
    """Nodes, and those in whose memory they may lie."""
    found, left = set[fx.Node](), list(nodes)
    while left:
        one = left.pop()
        if one not in found:
            found.add(one)
            left += _seen(one)
    return found


def _written_arguments(node: fx.Node) -> list[fx.Node]:
    """The tensors that an operation writes into: those that its schema marks."""
    assert isinstance(node.target, torch._ops.OpOverload)
    found: list[fx.Node] = []
    for number, one in enumerate(node.target._schema.arguments):
        if one.alias_info is not None and one.alias_info.is_write:
            fx.map_arg(argument(node, number, one.name), found.append)
    return found


def _functional(target: torch._ops.OpOverload) -> Any:
    name = target._schema.name.partition("::")[2]
    packet = getattr(aten, name.removesuffix("_"), None) if name.endswith("_") else None
    return getattr(packet, target._overloadname, None) if packet is not None else None


def _fresh(node: fx.Node) -> bool:
    """Whether a node makes a tensor of its own."""
    return node.op == "call_function" and isinstance(node.target, torch._ops.OpOverload) and not _seen(node)


def _seen(node: fx.Node) -> list[fx.Node]:
    """The tensors in whose memory the result of a node may lie: the trace says it, where it saw the operation."""
    if node.op != "call_function" or node.meta.get(OWN):
        return []
    memory = _memory(node)
    found = [source for source in node.all_input_nodes if not memory.isdisjoint(_memory(source))]
    first = node.args[0] if node.args else None
    known = node.target in VIEWS or not isinstance(node.target, torch._ops.OpOverload)
    if known and isinstance(first, fx.Node) and first not in found:
        found.append(first)
    return found


def _memory(node: fx.Node) -> set[int]:
    """What the tensors that a node makes lie in."""
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else [value]
    return {x.untyped_storage()._cdata for x in values if isinstance(x, Tensor) and x.layout is torch.strided}


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
    return node.op == "call_function" and writes_in_place(node)


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
