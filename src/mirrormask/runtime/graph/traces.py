"""From where in the items of a map the numbers of a view come, and whether channels and positions tell it apart.

A view of ``[batch, channels, height, width]`` is of use to a plan over maps if each item's part of it is made of that
item alone, alike for every item, whatever the batch is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.chains import (
    TRIED,
    came_from,
    chain_key,
    concrete,
    moved,
    root_of,
    sizes,
    steps_from,
    symbols,
)

__all__ = ["Spread", "Traced", "spread", "stored_index", "trace"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Traced:
    """What a value is made of.

    Attributes:
        root: the tensor that it is a view of.
        channels, size: an item of the root: channels, and the rows and columns of a map.
        index: of each number of an item of the value, its place in an item of the root; -1 for a zero.
        batch: which dimension counts items: 0, perhaps with others of each item behind it in it; 1; or -1 for the
            first one with others before it in it, as in ``[length * batch, features]``.
    """

    root: fx.Node
    channels: int
    size: tuple[int, int]
    index: Ints
    batch: int = 0

    def lead(self, node: fx.Node) -> list[int] | None:
        """The leading dimensions of rows within one item; None where their sizes are open."""
        shape = sizes(node)
        if len(shape) < 2:
            return None
        rest = list(shape[1:]) if self.batch < 1 else [shape[0], *shape[2:]]
        if not all(size.isdigit() and size != "0" for size in rest):
            return None
        found = [int(size) for size in rest[:-1]]
        if self.batch == 1:
            return found
        each = int(rest[-1]) * math.prod(found)
        return None if self.index.size % each else [self.index.size // each, *found]


@dataclass(frozen=True)
class Spread:
    """``index[c, p] = first[c] + second[p]``, and nothing where ``second`` is negative."""

    first: Ints
    second: Ints

    def keeps_channels(self, traced: Traced) -> bool:
        """Whether channel ``c`` is made of channel ``c``, and nothing is left out."""
        each = math.prod(traced.size)
        return np.array_equal(self.first, np.arange(traced.channels) * each) and int(self.second.max()) < each

    def is_all(self, traced: Traced) -> bool:
        """Whether it is the root as it is."""
        return self.keeps_channels(traced) and np.array_equal(self.second, np.arange(math.prod(traced.size)))


def item_sizes(node: fx.Node) -> tuple[int, tuple[int, int]] | None:
    """Channels, rows and columns of an item of a map; None for what is none, or whose sizes are open."""
    shape = sizes(node)
    value: Any = node.meta.get("val")
    if not 2 <= len(shape) <= 4 or not all(size.isdigit() for size in shape[1:]) or value.dtype != torch.float32:
        return None
    channels, *rest = (int(size) for size in shape[1:])
    if not channels or 0 in rest:
        return None
    return channels, (rest[0] if len(rest) == 2 else 1, rest[-1] if rest else 1)


def trace(node: fx.Node, known: dict[str, tuple[Ints, int] | None]) -> Traced | None:
    """Of which items' numbers a value is made; None if that is not the same for every item.

    Args:
        known: what was found of chains of views so far: the layers of a model are alike.
    """
    root = root_of(node)
    item = item_sizes(root)
    if item is None or not isinstance(node.meta.get("val"), Tensor):
        return None
    channels, size = item
    key = chain_key(node, root)
    if key not in known:
        known[key] = _followed(node, root, channels * math.prod(size))
    found = known[key]
    return None if found is None else Traced(root, channels, size, *found)


def _followed(node: fx.Node, root: fx.Node, each: int) -> tuple[Ints, int] | None:
    """The places of an item, and where the batch is."""
    tried = came_from(node, root, {}) or []
    for batch in (0, 1, -1):
        found = [_items(index, shape[0], each, batch) for shape, index in tried]
        first = found[0] if found else None
        if first is not None and all(one is not None and np.array_equal(one, first) for one in found[1:]):
            return first.astype(np.int64), batch
    return None


def _items(places: Tensor, count: int, each: int, batch: int) -> Ints | None:
    """The places of an item, in an item, if they are alike for all."""
    if batch == 1:
        if places.dim() < 3 or places.shape[1] != count:
            return None
        places = places.movedim(1, 0)
    elif batch == -1 and places.dim() and places.shape[0] % count == 0:
        places = places.reshape(-1, count, *places.shape[1:]).movedim(1, 0)
    if not places.numel() or places.numel() % count:
        return None
    index = places.reshape(count, -1).numpy()
    one: Ints = index[0]
    there = one >= 0
    for item in range(1, count):
        moved = one + item * each
        if not np.array_equal(index[item], moved if there.all() else np.where(there, moved, one)):
            return None
    return one


def spread(index: Ints) -> Spread | None:
    """``index[channels, positions]`` told apart, if it can be."""
    there = (index >= 0).any(0)
    if not there.any() or ((index >= 0) != there).any():
        return None
    column = int(there.argmax())
    first = index[:, column] - index[0, column]
    second = np.where(there, index[0], -1)
    made = first[:, None] + second[None]
    if np.where(there, made - index, 0).any() or int(first.min()) < 0:
        return None
    return Spread(first, second)


def stored_index(node: Any, like: fx.Node, batch: fx.Node) -> Ints | None:
    """Of each number of an item of ``like``, which number of a stored tensor ``node`` has there, if it is a view of
    one, alike for each item; repeated to the shape of ``like`` as PyTorch does.

    Args:
        batch: a tensor with one item for each of the batch.
    """
    if not isinstance(node, fx.Node) or not isinstance(node.meta.get("val"), Tensor):
        return None
    root = root_of(node)
    value = root.meta.get("val")
    if root.op != "get_attr" or not isinstance(value, Tensor) or value.dtype != torch.float32 or not value.numel():
        return None
    found: Ints | None = None
    for shape, items, numbers in tries(node, root, like, batch):
        try:
            index = numbers.expand(shape).reshape(items, -1).numpy().astype(np.int64)
        except RuntimeError:
            return None
        if (index != index[:1]).any() or (found is not None and not np.array_equal(found, index[0])):
            return None
        found = index[0].copy()
    return None if found is None or (found < 0).any() else found


def tries(node: fx.Node, root: fx.Node, like: fx.Node, batch: fx.Node) -> Iterator[tuple[tuple[int, ...], int, Tensor]]:
    """For two sizes of the batch the shape of ``like``, the batch, and what ``node`` has of the root's numbers."""
    steps = steps_from(node, root)
    open_sizes = symbols(batch, like, *steps)
    for tried in TRIED:
        known = dict(zip(open_sizes, tried, strict=False))
        try:
            shape = tuple(concrete(size, known) for size in like.meta["val"].shape)
            items = concrete(batch.meta["val"].shape[0], known)
            whole = torch.arange(root.meta["val"].numel(), dtype=torch.int32).reshape(root.meta["val"].shape)
            value = moved(steps, whole, known)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return
        yield shape, items, value
