"""Concatenations as views: which values are made where they will be read together, in one buffer.

The later a concatenation, the more it holds, hence the last one that reads a value decides where it lies. Those before
it whose inputs then lie one after the other need no copies: that is how a DenseNet's growing lists share one buffer.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from mirrormask.runtime.graph.ir import Graph
from mirrormask.runtime.kernels.layout import Layout

__all__ = ["Home", "Room", "homes"]

#: Operations whose results are other values' memory.
BORROWERS = ("input", "slice", "flatten")


@dataclass(frozen=True)
class Home:
    """Where a value is made: in the buffer of the concatenation ``room``, from this channel on."""

    room: str
    channel: int


@dataclass
class Room:
    """A buffer of several values.

    Attributes:
        layout: of all of them together.
        place: in the arena, once it is taken.
        members: the values that live there, now or later.
    """

    layout: Layout
    place: int | None = None
    members: set[str] = field(default_factory=set)


def homes(graph: Graph, planes: Collection[str]) -> dict[str, Home]:
    """The home of each concatenation, and of what it can be made of in place.

    Args:
        planes: the names of the values that lie in planes.
    """
    found: dict[str, Home] = {}
    nodes = {node.name: node for node in graph.nodes}
    for node in reversed(graph.nodes):
        if node.op != "concat" or node.name not in planes:
            continue
        starts, channel = [], 0
        for name in node.inputs:
            starts.append(channel)
            channel += nodes[name].shape[0]
        first = found.get(node.inputs[0])
        if node.name not in found and first is not None:
            together = [Home(first.room, first.channel + start) for start in starts]
            if [found.get(name) for name in node.inputs] == together:
                found[node.name] = first
                continue
        home = found.setdefault(node.name, Home(node.name, 0))
        for name, start in zip(node.inputs, starts, strict=True):
            if name not in found and nodes[name].op not in BORROWERS and name in planes:
                found[name] = Home(home.room, home.channel + start)
    return found
