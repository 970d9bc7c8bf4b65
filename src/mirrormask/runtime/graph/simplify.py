"""A captured graph with other operations for the same thing: one per value, where a pattern of several stood.

What makes several tensors is not a value of a region, nor is a tensor of five dimensions on the way of a shuffle.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Container
from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.chains import open_shape, stored_value
from mirrormask.runtime.graph.functions import largest, numbered
from mirrormask.runtime.graph.making import Making, keep
from mirrormask.runtime.graph.patterns import PATTERN_PARTS, Found, response_norm, rms_norm, tanh_gelu
from mirrormask.runtime.graph.program import Unstorable

__all__ = ["simplify"]

aten = torch.ops.aten
#: What an expanded tensor may as well be read by before it is expanded.
BROADCASTS = {aten.mul.Tensor, aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor}
#: How many stored places are looked at.
MOST_PLACES = 1 << 12
RESHAPES = {aten.view.default, aten.reshape.default, aten.flatten.using_ints}


def simplify(module: fx.GraphModule, changed: Container[str] = ()) -> None:
    """Rewrite what the patterns of this file match, in place.

    Args:
        changed: the names of what operations in place change; later it may be something else than a pattern began with.
    """
    for node in list(module.graph.nodes):
        if node.target is operator.getitem and not node.users:
            node.graph.erase_node(node)
    for node in list(module.graph.nodes):
        if node.target is aten._assert_tensor_metadata.default:
            node.graph.erase_node(node)  # what an input's type is, a compiled model checks itself
        elif node.op == "call_function":
            for pattern in PATTERNS:
                found = pattern(node)
                if found is not None and not any(name in changed for name in _names(found[1])):
                    _replace(node, *found)
                    break
    module.graph.lint()


def _names(args: Any) -> list[str]:
    found: list[str] = []
    fx.map_arg(args, lambda node: found.append(node.name))
    return found


def _replace(node: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        made = graph.call_function(target, args, kwargs)
    made.meta = dict(node.meta)
    node.replace_all_uses_with(made)
    _erase(node)


def _erase(node: fx.Node) -> None:
    """Remove a node that nobody reads, and what only it read."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        if source.op == "call_function" and not source.users and source.target in REMOVABLE:
            _erase(source)


def _part(node: fx.Node) -> Found:
    """One of the pieces of a split: a slice."""
    source = node.args[0] if node.args else None
    if node.target is not operator.getitem or not isinstance(source, fx.Node) or source.target not in SPLITS:
        return None
    x = source.args[0]
    pieces = source.meta.get("val")
    if not isinstance(pieces, (tuple, list)):
        return None
    dim = int(_argument(source, 2, "dim", 0)) % max(1, len(open_shape(x)))
    sizes = [piece.shape[dim] for piece in pieces]
    if any(not isinstance(size, int) for size in sizes):
        return None
    index = int(node.args[1]) % len(sizes)  # type: ignore[arg-type]
    start = sum(sizes[:index])
    return aten.slice.Tensor, (x, dim, start, start + sizes[index])


def _narrow(node: fx.Node) -> Found:
    if node.target is not aten.narrow.default or not all(isinstance(a, int) for a in node.args[1:]):
        return None
    x, dim, start, length = node.args
    return aten.slice.Tensor, (x, dim, start, start + length)  # type: ignore[operator]


def _indexed(node: fx.Node) -> Found:
    """Stored places along one dimension that follow each other: a slice."""
    if node.target is not aten.index.Tensor or node.kwargs:
        return None
    x, places = node.args
    given = [dim for dim, one in enumerate(places) if one is not None]  # type: ignore[arg-type, union-attr]
    stored = places[given[0]] if len(given) == 1 else None  # type: ignore[index]
    if not isinstance(stored, fx.Node) or stored.op != "get_attr":
        return None
    value, size = stored_value(stored), open_shape(x)[given[0]]
    if value.dtype != torch.int64 or value.dim() != 1 or not 1 <= value.numel() <= MOST_PLACES:
        return None
    if not isinstance(size, int):
        return None  # a place that is not there is an error, and the end of a slice
    numbers = value.tolist()
    found = [number + size if number < 0 else number for number in numbers]
    start = found[0]
    if start < 0 or found[-1] >= size or found != list(range(start, start + len(found))):
        return None
    making, module = Making(), node.graph.owning_module
    assert module is not None
    with contextlib.suppress(Unstorable):
        keep(module, "places", value, making.decided(making.do(numbered, making.fetch(stored), numbers)))
        return aten.slice.Tensor, (x, given[0], start, start + len(found))
    return None


def _selected(node: fx.Node) -> Found:
    """One channel, with its dimension put back: a slice."""
    select = node.args[0] if node.args else None
    if node.target is not aten.unsqueeze.default or not isinstance(select, fx.Node):
        return None
    if select.target is not aten.select.int or len(select.users) > 1:
        return None
    x, dim, index = select.args
    if not isinstance(dim, int) or not isinstance(index, int) or dim < 0 or index < 0 or node.args[1] != dim:
        return None
    return aten.slice.Tensor, (x, dim, index, index + 1)


def _shuffle(node: fx.Node) -> Found:
    """``[n, c, ...]`` seen as ``[n, groups, c / groups, ...]``, transposed, and seen as before."""
    inner = node.args[0] if node.args else None
    chain: list[fx.Node] = []
    while isinstance(inner, fx.Node) and len(inner.users) == 1 and inner.target in (*MOVES, *RESHAPES):
        chain.append(inner)
        inner = inner.args[0] if inner.args else None
        if chain[-1].target in RESHAPES:
            break
    targets = [step.target for step in chain if step.target not in (aten.contiguous.default, aten.clone.default)]
    if node.target not in RESHAPES or len(targets) != 2 or targets[0] is not aten.transpose.int:
        return None
    transpose = next(step for step in chain if step.target is aten.transpose.int)
    wide, before = open_shape(chain[-1]), open_shape(inner)
    dims = {d % len(wide) if isinstance(d, int) and wide else d for d in transpose.args[1:]}
    if dims != {1, 2} or open_shape(node) != before or wide[:1] != before[:1] or wide[3:] != before[2:]:
        return None
    if not isinstance(wide[1], int):
        return None
    return aten.channel_shuffle.default, (inner, wide[1])


def _unexpanded(node: fx.Node) -> Found:
    """A tensor that is expanded to the shape that it would be broadcast to anyway."""
    if node.target not in BROADCASTS or node.kwargs:
        return None
    args = list(node.args)
    for i, arg in enumerate(args):
        other = args[1 - i]
        if not isinstance(arg, fx.Node) or arg.target not in (aten.expand.default, aten.expand_as.default):
            continue
        source = arg.args[0]
        if open_shape(other) == open_shape(node) and len(open_shape(source)) == len(open_shape(node)):
            args[i] = source
            return node.target, tuple(args)
    return None


def _reshaped_as(node: fx.Node) -> Found:
    """The shape of another tensor, where its first size alone is open: that is what remains."""
    shape = open_shape(node)
    if node.target is not aten.reshape_as.default or not all(isinstance(size, int) and size for size in shape[1:]):
        return None
    return aten.reshape.default, (node.args[0], [-1, *shape[1:]])


def _largest(node: fx.Node) -> Found:
    """The adaptive maximum of which only the numbers are read, not their places."""
    source = node.args[0] if node.args else None
    if node.target is not operator.getitem or not isinstance(source, fx.Node):
        return None
    if source.target is not aten.adaptive_max_pool2d.default or node.args[1] != 0:
        return None
    return largest, (source.args[0], source.args[1])


def _maximum(node: fx.Node) -> Found:
    """The largest numbers along a dimension, of which only these are read, not their places."""
    source = node.args[0] if node.args else None
    if node.target is not operator.getitem or not isinstance(source, fx.Node) or len(source.users) > 1:
        return None
    if source.target is not aten.max.dim or node.args[1] != 0:
        return None
    return aten.amax.default, (source.args[0], [source.args[1]], _argument(source, 2, "keepdim", False))


def _kept(node: fx.Node) -> Found:
    """A dimension that a sum or its kin takes away, and that comes back: it is kept."""
    source = node.args[0] if node.args else None
    if node.target is not aten.unsqueeze.default or not isinstance(source, fx.Node) or len(source.users) > 1:
        return None
    if source.target not in REDUCTIONS or source.kwargs or any(source.args[2:]):
        return None
    x, dims = source.args[:2]
    rank = len(open_shape(x))
    if not isinstance(dims, (list, tuple)) or len(dims) != 1 or dims[0] % rank != node.args[1] % rank:  # type: ignore[operator]
        return None
    return source.target, (x, dims, True)


def _argument(node: fx.Node, index: int, name: str, default: Any) -> Any:
    return node.args[index] if len(node.args) > index else node.kwargs.get(name, default)


REDUCTIONS = {aten.mean.dim, aten.sum.dim_IntList, aten.amax.default}
SPLITS = {
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    aten.tensor_split.indices,
}
MOVES = {aten.transpose.int, aten.contiguous.default, aten.clone.default}
REMOVABLE = {
    *SPLITS,
    *MOVES,
    *RESHAPES,
    aten.select.int,
    aten.expand.default,
    aten.expand_as.default,
    aten.adaptive_max_pool2d.default,
    aten.max.dim,
    *REDUCTIONS,
    operator.getitem,
    *PATTERN_PARTS,
}
PATTERNS: tuple[Callable[[fx.Node], Found], ...] = (
    _part,
    _narrow,
    _indexed,
    _selected,
    _shuffle,
    _unexpanded,
    _reshaped_as,
    _largest,
    _maximum,
    _kept,
    rms_norm,
    tanh_gelu,
    response_norm,
)
