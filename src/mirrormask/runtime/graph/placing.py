"""Views of maps as maps: which places of which map a view shows, and that map with channels first."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.chains import root_of, sizes
from mirrormask.runtime.graph.functions import arrange, stored
from mirrormask.runtime.graph.traces import Ints, Spread, Traced, spread, trace

__all__ = ["Placing", "item_of", "last_of", "shape_of", "size_of"]

aten = torch.ops.aten


class Placing:
    """What is known of the maps of a program, and the nodes that show them in other places."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.known: dict[str, tuple[Ints, int] | None] = {}
        self.native: set[fx.Node] = set()
        """What is made of convolutions' maps, channels first."""
        self.made: dict[Any, fx.Node] = {}

    def traced(self, node: Any) -> Traced | None:
        """Of which map a value is made, if it is one."""
        if not isinstance(node, fx.Node) or root_of(node) not in self.native:
            return None
        return trace(node, self.known)

    def placed(self, traced: Traced, found: Spread, size: tuple[int, ...]) -> fx.Node:
        """The map of these places: the root itself, if it is that."""
        root = traced.root
        if found.is_all(traced) and tuple(root.meta["val"].shape[2:]) == size:
            return root
        if found.is_all(traced) and not size:
            flat = self.view(aten.flatten.using_ints, root, 1)
            self.native.add(flat)
            return flat
        key = (root, found.first.tobytes(), found.second.tobytes(), size)
        if key not in self.made:
            first, second = tuple(found.first.tolist()), tuple(found.second.tolist())
            self.made[key] = self.put(arrange, (root, first, second, size), (len(first), *size), root)
        return self.made[key]

    def put(self, target: Any, args: tuple[Any, ...], item: tuple[int, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new map with items of this shape."""
        made = self.graph.call_function(target, args, kwargs)
        value = like.meta["val"]
        made.meta = {"val": value.new_empty((value.shape[0], *item))}
        self.native.add(made)
        return made

    def rows(self, node: Any) -> fx.Node | None:
        """A view whose last dimension is that of rows, as a map whose channels are these."""
        traced = self.traced(node)
        if traced is None:
            return None
        lead = traced.lead(node)
        if lead is None:
            return None
        found = spread(traced.index.reshape(-1, last_of(node)).T)
        return None if found is None else self.placed(traced, found, size_of(lead))

    def maps(self, node: Any) -> fx.Node | None:
        """A view as the map whose channels are its second dimension."""
        traced, shape = self.traced(node), sizes(node)
        if traced is None or traced.batch or not 2 <= len(shape) <= 4 or not all(size.isdigit() for size in shape[1:]):
            return None
        item = [int(size) for size in shape[1:]]
        if math.prod(item) != traced.index.size:
            return None
        found = spread(traced.index.reshape(item[0], -1))
        return None if found is None else self.placed(traced, found, tuple(item[1:]))

    def back(self, made: fx.Node, node: fx.Node, source: Any) -> fx.Node:
        """A map with channels first as ``node`` has its rows, whose batch is where that of ``source`` is."""
        shape, dims = sizes(node), len(sizes(made))
        traced = self.traced(source)
        assert traced is not None
        last = made
        if dims > 2:
            last = self.view(aten.permute.default, made, [0, *range(2, dims), 1])
        if traced.batch:
            lead = traced.lead(node) or [1]
            wide = self.view(aten.reshape.default, last, [-1, *lead, last_of(node)])
            last = self.view(aten.transpose.int, wide, 0, 1)
            if traced.batch == 1:
                return last
        return last if sizes(last) == shape else self.view(aten.reshape.default, last, shape_of(node))

    def view(self, target: Any, node: fx.Node, *args: Any) -> fx.Node:
        """A view of a node."""
        made = self.graph.call_function(target, (node, *args))
        made.meta = {"val": target(node.meta["val"], *args)}
        return made

    def form(self, node: Any) -> tuple[fx.Node, bool] | None:
        """A view as a map with the channels of its root, and whether they are its last dimension."""
        traced = self.traced(node)
        if traced is None:
            return None
        lead = traced.lead(node)
        if lead is not None:
            found = spread(traced.index.reshape(-1, last_of(node)).T)
            if found is not None and found.keeps_channels(traced):
                return self.placed(traced, found, size_of(lead)), True
        shape = sizes(node)
        if not traced.batch and 2 <= len(shape) <= 4 and all(size.isdigit() for size in shape[1:]):
            item = [int(size) for size in shape[1:]]
            found = spread(traced.index.reshape(item[0], -1)) if math.prod(item) == traced.index.size else None
            if found is not None and found.keeps_channels(traced):
                return self.placed(traced, found, tuple(item[1:])), False
        return None

    def stored(self, numbers: fx.Node, found: Spread, size: tuple[int, ...], like: fx.Node) -> fx.Node:
        """Stored numbers as a map, one for each item of ``like``."""
        first, second = tuple(found.first.tolist()), tuple(found.second.tolist())
        return self.put(stored, (like, numbers, first, second, size), (len(first), *size), like)

    def named(self, made: fx.Node, node: fx.Node) -> None:
        """Say that a new node is what the model's code calls ``node``."""
        made.meta |= {name: value for name, value in node.meta.items() if name == "nn_module_stack"}


def item_of(node: fx.Node) -> tuple[int, ...]:
    """The shape of an item."""
    return tuple(int(size) for size in sizes(node)[1:])


def last_of(node: fx.Node) -> int:
    """The last size."""
    return int(sizes(node)[-1])


def shape_of(node: fx.Node) -> list[int]:
    """The shape of a node, its first size as what remains."""
    return [-1, *(int(size) for size in sizes(node)[1:])]


def size_of(lead: list[int]) -> tuple[int, ...]:
    """Rows and columns for the leading dimensions of an item; none for a single row."""
    if lead == [1]:
        return ()
    return (math.prod(lead[:-1]), lead[-1])
