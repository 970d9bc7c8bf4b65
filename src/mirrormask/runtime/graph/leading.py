"""Operations over rows before the views of their leading dimensions, rather than after them.

A linear layer does not care in what order its rows come: ``linear(x.transpose(0, 1))`` is
``linear(x).transpose(0, 1)``. With all such views moved behind what computes, they meet others that undo them: a
transformer whose parts count tokens as ``[length, batch]``, as ``[batch * length]`` and as ``[batch, length]`` is one
stream of rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.attention import ByHand, split_heads
from mirrormask.runtime.graph.chains import Known, came_from, is_move, sizes, sources
from mirrormask.runtime.graph.functions import channel_norm, per_channel, pointwise, product, response
from mirrormask.runtime.graph.headwise import Heads
from mirrormask.runtime.graph.passes import works_in_place
from mirrormask.runtime.graph.pointwise import ACTIVATIONS, ARITHMETIC, KINDS

__all__ = ["views_last"]

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten.reshape.default}
#: Views that are the same for any last dimension, where they leave it alone.
UNCHANGED = {
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
}


LINEARS = {aten.linear.default, aten.mm.default, aten.matmul.default, aten.addmm.default, product}
#: The share of the weights before it up to which a layer on one token may as well take all of them.
MOST_AGAIN = 0.05


#: What works on channels as well as on rows.
CHANNELWISE = {aten.linear.default, aten.layer_norm.default, response, *ACTIVATIONS, *ARITHMETIC}


def views_last(module: fx.GraphModule) -> None:
    """Move views of leading dimensions behind operations over rows, find attention, and drop what undoes itself."""
    graph = module.graph
    if works_in_place(graph):
        return
    known: Known = {}
    heads, by_hand = Heads(graph, known), ByHand(known)
    for node in list(graph.nodes):
        if node.target is aten.view.default:
            node.target = aten.reshape.default  # which takes its input however it lies by then
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            continue
        if node.target is aten.scaled_dot_product_attention.default:
            if split_heads(node, known):
                graph.erase_node(node)  # which PyTorch takes for one with effects
        elif is_move(node):
            same = _same_as(node, known)
            if same is not None and not (same.op != "call_function" and _returned(node)):
                node.replace_all_uses_with(same)
            else:
                _straightened(node, known)
        elif not (by_hand.split_heads(node) or heads.on_rows(node)):
            _sink(node)
    graph.eliminate_dead_code()
    graph.lint()


def _same_as(node: fx.Node, known: Known) -> fx.Node | None:
    """The farthest tensor that a chain of views gives back as it is."""
    found = None
    for source in sources(node):
        if sizes(source) == sizes(node):
            moved = came_from(node, source, known)
            if moved and all(tuple(x.shape) == shape and _in_order(x) for shape, x in moved):
                found = source
    return found


def _returned(node: fx.Node) -> bool:
    """Whether a tensor is given to the caller, who may want one of its own."""
    return any(user.op == "output" for user in node.users)


def _in_order(index: Tensor) -> bool:
    return torch.equal(index.reshape(-1), torch.arange(index.numel(), dtype=index.dtype))


def _straightened(node: fx.Node, known: Known) -> None:
    """Where a chain of views exchanges the two leading dimensions of rows, and perhaps joins them: just that."""
    if node.target not in RESHAPES | {aten.contiguous.default} or len(sizes(node)) not in (2, 3):
        return
    before = node.args[0]
    if isinstance(before, fx.Node) and before.target is aten.transpose.int:
        return
    for source in sources(node):
        if len(sizes(source)) != 3 or sizes(source)[-1:] != sizes(node)[-1:]:
            continue
        moved = came_from(node, source, known)
        if not moved or not all(_exchanged(shape, x) for shape, x in moved):
            continue
        with node.graph.inserting_before(node):
            made = _made(node.graph, aten.transpose.int, (source, 0, 1))
            if sizes(made) != sizes(node):
                if node.target not in RESHAPES:
                    continue
                made = _made(node.graph, aten.reshape.default, (made, node.args[1]))
        node.replace_all_uses_with(made)
        return


def _exchanged(shape: tuple[int, ...], index: Tensor) -> bool:
    whole = torch.arange(torch.Size(shape).numel(), dtype=index.dtype).reshape(shape)
    return torch.equal(index.reshape(-1), whole.transpose(0, 1).reshape(-1))


def _made(graph: fx.Graph, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
    """A new node, and what it makes of what its arguments are known to be."""
    made = graph.call_function(target, args, kwargs or {})
    given, named = fx.map_arg((args, kwargs or {}), lambda n: n.meta["val"])
    made.meta["val"] = target(*given, **named)
    return made


def _sink(node: fx.Node) -> None:
    """Move the views that an operation over rows reads behind it, one after the other."""
    while True:
        rows = _rows_of(node)
        if rows is None or not all(_moves_rows(view) for view in rows):
            return
        views = [node.args[i] for i in _places(node)]
        first = views[0]
        assert isinstance(first, fx.Node)
        if any(not _alike(first, view) for view in views[1:]):
            return
        if first.target is aten.select.int and not _cheap(node, first):
            return
        graph, value = node.graph, node.meta["val"]
        args = list(node.args)
        for place, view in zip(_places(node), views, strict=True):
            args[place] = view.args[0]  # type: ignore[union-attr]
        first_channels = _is_channels_last(first)
        target, arguments, kwargs = _of_channels(node, args) if first_channels else _of_any_rank(node, args)
        with graph.inserting_before(node):
            inner = graph.call_function(target, tuple(arguments), kwargs)
            source = first.args[0]
            assert isinstance(source, fx.Node)
            shape = source.meta["val"].shape
            made = (shape[0], value.shape[-1], *shape[2:]) if first_channels else (*shape[:-1], value.shape[-1])
            inner.meta = {**node.meta, "val": value.new_empty(made)}
            if first.target in RESHAPES:
                given: Any = first.args[1]
                outer = _made(graph, aten.reshape.default, (inner, [*given[:-1], int(value.shape[-1])]))
            elif first.target in (aten.contiguous.default, aten.clone.default):
                outer = inner
            else:
                outer = _made(graph, first.target, (inner, *first.args[1:]), dict(first.kwargs))
        node.replace_all_uses_with(outer)
        node = inner


def _cheap(node: fx.Node, view: fx.Node) -> bool:
    """Whether to compute for all tokens what is wanted of one is little beside what is computed for all before."""
    before = view.args[0]
    assert isinstance(before, fx.Node)
    own = _weights(node)
    others = [n for n in node.graph.nodes if n.target in LINEARS and sizes(n)[:-1] == sizes(before)[:-1]]
    return own <= MOST_AGAIN * sum(map(_weights, others))


def _weights(node: fx.Node) -> int:
    stored = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"]
    return max((arg.meta["val"].numel() for arg in stored), default=0)


def _places(node: fx.Node) -> tuple[int, ...]:
    """Which arguments of an operation are rows."""
    if node.target in (aten.addmm.default, product):
        return (1,)
    if node.target in ARITHMETIC:
        varying = [i for i, arg in enumerate(node.args[:2]) if isinstance(arg, fx.Node) and arg.op != "get_attr"]
        return tuple(varying)
    return (0,)


def _rows_of(node: fx.Node) -> list[fx.Node] | None:
    """The rows that an operation reads, if it makes one row of each, however they lie."""
    target, value = node.target, node.meta["val"]
    stored = [arg for arg in node.args if isinstance(arg, fx.Node) and arg.op == "get_attr"]
    last = len(sizes(node)) - 1
    if target in LINEARS:
        weight: Any = node.args[2 if target in (aten.addmm.default, product) else 1]
        known = weight in stored and len(sizes(weight)) == 2 and not node.kwargs
    elif target in (aten.layer_norm.default, aten.rms_norm.default):
        known = len(node.args[1]) == 1  # type: ignore[arg-type]
    elif target in (aten.softmax.int, aten.log_softmax.int):
        known = int(node.args[1]) % (last + 1) == last  # type: ignore[arg-type]
    elif target in ACTIVATIONS:
        known = True
    elif target is response:
        known = bool(node.args[2]) and all(_is_channels_last(arg) for arg in node.all_input_nodes)
    elif target in ARITHMETIC:
        known = all(len(sizes(arg)) <= 1 for arg in stored)
    else:
        return None
    rows = [node.args[i] for i in _places(node)]
    channels = any(isinstance(row, fx.Node) and _is_channels_last(row) for row in rows)
    if channels and (target not in CHANNELWISE or (stored and not _by_channel(node, stored))):
        return None
    if target is aten.layer_norm.default and channels and len(node.args) < 5:
        return None
    if not known or not rows or not all(isinstance(row, fx.Node) for row in rows) or value.dim() < 1:
        return None
    found = [row for row in rows if isinstance(row, fx.Node)]
    if isinstance(value.shape[-1], torch.SymInt) or any(sizes(row)[:-1] != sizes(node)[:-1] for row in found):
        return None
    return found


def _by_channel(node: fx.Node, stored: list[fx.Node]) -> bool:
    """Whether an operation with stored tensors is one with a stored number for each of the last dimension."""
    if node.target not in ARITHMETIC:
        return True
    kind, last = KINDS.get(node.target), sizes(node)[-1]
    first = isinstance(node.args[0], fx.Node) and node.args[0].op == "get_attr"
    return kind is not None and len(stored) == 1 and sizes(stored[0]) == (last,) and not (first and kind == "div")


def _moves_rows(view: fx.Node) -> bool:
    """Whether a view leaves the last dimension, which is a row, as it is."""
    if not is_move(view) or not isinstance(view.args[0], fx.Node):
        return False
    before, after = sizes(view.args[0]), sizes(view)
    if _is_channels_last(view) and len(before) == 4:
        return after[-1].isdigit()
    if not before or not after or before[-1] != after[-1] or len(before) < 2 or len(after) < 1:
        return False
    last = len(before) - 1
    if not after[-1].isdigit():
        return False
    if view.target in RESHAPES or view.target in (aten.contiguous.default, aten.clone.default):
        return int(after[-1]) != 0
    if view.target in UNCHANGED:
        return int(after[-1]) > 1 and not _names_last(view, last)
    if view.target is aten.transpose.int:
        return all(int(dim) % (last + 1) != last for dim in view.args[1:])  # type: ignore[arg-type]
    if view.target is aten.select.int:
        return int(view.args[1]) % (last + 1) != last and last == 2  # type: ignore[arg-type]
    if view.target is aten.permute.default:
        return int(view.args[1][-1]) % (last + 1) == last  # type: ignore[index, arg-type]
    return False


def _names_last(view: fx.Node, last: int) -> bool:
    """Whether a flatten or its kin counts its dimensions from the end, or takes the last one."""
    if view.target is aten.flatten.using_ints:
        end = int(view.args[2]) if len(view.args) > 2 else -1  # type: ignore[arg-type]
        return end < 0 or end == last
    if view.target is aten.squeeze.default:
        return False
    given: Any = view.args[1]
    dims = given if isinstance(given, (list, tuple)) else [given]
    # What is put before the last dimension leaves it the last one.
    most = last if view.target is aten.unsqueeze.default else last - 1
    return any(int(dim) < 0 or int(dim) > most for dim in dims)


def _is_channels_last(view: fx.Node) -> bool:
    """Whether a view puts the channels of maps last, as what works on rows wants them."""
    return view.target is aten.permute.default and [int(dim) % 4 for dim in view.args[1]] == [0, 2, 3, 1]  # type: ignore[arg-type, union-attr]


def _of_channels(node: fx.Node, args: list[Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """The operation for rows that are the channels of maps."""
    if node.target is aten.linear.default:
        return pointwise, [*args[:2], args[2] if len(args) > 2 else None], {}
    if node.target is aten.layer_norm.default:
        return channel_norm, [args[0], *(args[i] if len(args) > i else None for i in (2, 3)), args[4]], {}
    if node.target is response:
        return response, [*args[:2], False], {}
    numbers = [arg for arg in args[:2] if isinstance(arg, fx.Node) and arg.op == "get_attr"]
    if node.target in ARITHMETIC and numbers:
        kind = KINDS[node.target]
        x = args[1] if args[0] is numbers[0] else args[0]
        kind = "rsub" if kind == "sub" and x is args[1] else kind
        return per_channel, [x, numbers[0], kind], {}
    return node.target, args, dict(node.kwargs)


def _alike(one: fx.Node, other: Any) -> bool:
    """Whether two views do the same to tensors of the same sizes."""
    if not isinstance(other, fx.Node) or one.target is not other.target:
        return False
    if not isinstance(one.args[0], fx.Node) or not isinstance(other.args[0], fx.Node):
        return False
    return (
        sizes(one.args[0])[:-1] == sizes(other.args[0])[:-1]
        and sizes(one)[:-1] == sizes(other)[:-1]
        and (one.target in RESHAPES or (one.args[1:], one.kwargs) == (other.args[1:], other.kwargs))
    )


def _of_any_rank(node: fx.Node, args: list[Any]) -> tuple[Any, list[Any], dict[str, Any]]:
    """The operation for rows with other leading dimensions."""
    if node.target is aten.addmm.default:
        return product, args, {}
    if node.target is aten.mm.default:
        return aten.matmul.default, args, {}
    if node.target in (aten.softmax.int, aten.log_softmax.int):
        return node.target, [args[0], -1, *args[2:]], dict(node.kwargs)
    return node.target, args, dict(node.kwargs)
