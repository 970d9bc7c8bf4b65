"""Chains of views: which number of a tensor each number of a view of it is, found by trying it out.

A chain of reshapes, transposes, slices and their kin moves numbers and computes nothing. Run on 0, 1, 2 and so
on, it says where each of its results comes from. Sizes that a capture leaves open are tried at two values each,
different for each size: what these operations do is linear in every size, so that what holds for both holds for all.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.frames import as_frames, as_volume

__all__ = [
    "MOVES",
    "TRIED",
    "Known",
    "came_from",
    "chain_key",
    "concrete",
    "is_move",
    "moved",
    "open_shape",
    "root_of",
    "sizes",
    "sources",
    "steps_from",
    "stored_value",
    "symbols",
]

aten = torch.ops.aten

#: Operations that give numbers other places, and nothing else; ``reshape`` stands for what may or may not copy.
MOVES: dict[Any, Callable[..., Any]] = {
    aten.view.default: torch.reshape,
    aten.reshape.default: torch.reshape,
    aten.contiguous.default: lambda x, **_: x,
    aten.clone.default: lambda x, **_: x,
    aten.pad.default: lambda x, sizes, mode="constant", value=None: _padded(x, sizes, mode, value),
    aten.constant_pad_nd.default: lambda x, sizes, value=0: _padded(x, sizes, "constant", value),
    as_frames: as_frames,
    as_volume: as_volume,
    **{
        target: target
        for target in (
            aten.flatten.using_ints,
            aten.unflatten.int,
            aten.transpose.int,
            aten.permute.default,
            aten.expand.default,
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
            aten.movedim.int,
            aten.swapaxes.default,
            aten.repeat_interleave.self_int,
            aten.roll.default,
            aten.flip.default,
            aten.mT.default,
            aten.t.default,
            aten.pixel_shuffle.default,
            aten.pixel_unshuffle.default,
        )
    },
}


def _padded(x: Tensor, sizes: list[int], mode: str, value: float | None) -> Tensor:
    """Numbers that are there, and -1 for zeros around them."""
    if mode != "constant" or value:
        raise ValueError("it pads with other numbers than zeros")
    return torch.nn.functional.pad(x, sizes, value=-1)


Found = list[tuple[tuple[int, ...], Tensor]] | None
Known = dict[str, Found]
#: What open sizes are tried at, one column each.
TRIED = ((2, 5, 3, 7, 11), (3, 2, 7, 5, 4))


def open_shape(node: Any) -> tuple[Any, ...]:
    """The shape of a tensor, open sizes as their formulas: they may be compared, and nothing is decided by it.

    To compare PyTorch's own open sizes is to decide: a program that was rewritten so holds for fewer sizes than its
    guards say. Empty for what is no tensor.
    """
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor):
        return ()
    return tuple(size.node.expr if isinstance(size, torch.SymInt) else int(size) for size in value.shape)


def sizes(node: fx.Node) -> tuple[str, ...]:
    """The sizes of a tensor, those that are left open by their names; empty for what is no tensor."""
    return tuple(str(size) for size in open_shape(node))


def is_move(node: Any) -> bool:
    """Whether a node is a view, or one of several that another node gives."""
    if not isinstance(node, fx.Node) or not node.args:
        return False
    if node.target is operator.getitem:
        return is_move(node.args[0])
    return node.target in MOVES


def root_of(node: fx.Node) -> fx.Node:
    """What a chain of views begins with."""
    while is_move(node):
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
    return node


def stored_value(node: fx.Node) -> Tensor:
    """The tensor that a node fetches: what the program says of it may be without numbers."""
    module, (owner, _, name) = node.graph.owning_module, str(node.target).rpartition(".")
    assert module is not None
    found: Tensor = getattr(module.get_submodule(owner), name)
    return found.detach()


def sources(node: fx.Node) -> Iterator[fx.Node]:
    """What a node is a view of: what its chain of views reads, from near to far, tensors alone."""
    while is_move(node):
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
        if isinstance(node.meta.get("val"), Tensor):
            yield node


def symbols(*nodes: fx.Node) -> list[Any]:
    """The sizes that are left open in tensors of these shapes, in order."""
    found: dict[Any, None] = {}
    for node in nodes:
        value = node.meta.get("val")
        for size in value.shape if isinstance(value, Tensor) else ():
            if isinstance(size, torch.SymInt):
                found |= dict.fromkeys(sorted(size.node.expr.free_symbols, key=str))
    return list(found)


def came_from(node: fx.Node, source: fx.Node, known: Known) -> Found:
    """For each of the tried sizes the shape of ``source``, and of which of its numbers ``node`` is made.

    None where a view cannot be followed. ``known`` remembers what was found: the layers of a model are alike.
    """
    key = chain_key(node, source)
    if key not in known:
        known[key] = _follow(steps_from(node, source), source)
    return known[key]


def chain_key(node: fx.Node, source: fx.Node) -> str:
    """What a chain of views does, in words."""
    steps = steps_from(node, source)
    return repr([sizes(source), *((str(s.target), _plain(s.args[1:]), _plain(dict(s.kwargs))) for s in steps)])


def steps_from(node: fx.Node, source: fx.Node) -> list[fx.Node]:
    """The views between a tensor and what it is a view of, in order."""
    steps: list[fx.Node] = []
    while node is not source:
        steps.append(node)
        before = node.args[0]
        assert isinstance(before, fx.Node)
        node = before
    return steps[::-1]


def _plain(value: Any) -> Any:
    """An argument with sizes by their names."""
    if isinstance(value, fx.Node):
        return _plain(value.meta.get("val"))
    if isinstance(value, torch.SymInt):
        return str(value.node.expr)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _follow(steps: list[fx.Node], source: fx.Node) -> Found:
    open_sizes = symbols(source)
    found = []
    for tried in TRIED:
        if len(open_sizes) > len(tried):
            return None
        known = dict(zip(open_sizes, tried, strict=False))
        try:
            shape = tuple(concrete(size, known) for size in source.meta["val"].shape)
            value: Any = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)
            value = moved(steps, value, known)
        except (RuntimeError, TypeError, ValueError, IndexError):  # sizes that these views cannot have
            return None
        found.append((shape, value))
    return found


def moved(steps: list[fx.Node], value: Any, known: dict[Any, int]) -> Any:
    """What the views make of a tensor, with these sizes.

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: they cannot be followed.
    """
    for step in steps:
        args, kwargs = (concrete(part, known) for part in (list(step.args[1:]), dict(step.kwargs)))
        function = operator.getitem if step.target is operator.getitem else MOVES[step.target]
        value = function(value, *args, **kwargs)
    return value


def concrete(value: Any, known: dict[Any, int]) -> Any:
    """An argument with numbers for the open sizes.

    Raises:
        ValueError: it is made of others.
    """
    if isinstance(value, fx.Node):
        return concrete(value.meta.get("val"), known)
    if isinstance(value, torch.SymInt):
        return int(value.node.expr.subs(known))
    if isinstance(value, (list, tuple)):
        return [concrete(item, known) for item in value]
    if isinstance(value, dict):
        return {key: concrete(item, known) for key, item in value.items()}
    if isinstance(value, Tensor):
        raise ValueError("a view by a tensor")
    return value
