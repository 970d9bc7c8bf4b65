"""Volumes as frames, as :mod:`graph.volumes` has them: those of a program, and new ones that are made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.frames import as_frames, channels_of

__all__ = ["Frames", "Framing", "is_stored", "item_of", "three"]


@dataclass(frozen=True)
class Frames:
    """A volume as maps.

    Attributes:
        node: ``[batch, depth * channels, height, width]``.
        depth, channels, size: of the volume; ``size`` is ``(height, width)``.
    """

    node: fx.Node
    depth: int
    channels: int
    size: tuple[int, int]

    @property
    def item(self) -> tuple[int, int, int, int]:
        """The shape of an item of the volume."""
        return (self.channels, self.depth, *self.size)


def item_of(node: Any) -> tuple[int, ...]:
    """The sizes of a volume of numbers, batch aside; empty for what is none, or whose sizes are open."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 5 or value.dtype != torch.float32:
        return ()
    sizes = tuple(value.shape[1:])
    return sizes if all(isinstance(size, int) and size for size in sizes) else ()


def three(value: Any) -> tuple[int, int, int]:
    """A setting of each dimension, of which one number may be given for all."""
    values = [value] if isinstance(value, int) else [*value]
    depth, height, width = values * 3 if len(values) == 1 else values
    return int(depth), int(height), int(width)


def is_stored(node: Any) -> bool:
    """Whether a node fetches a parameter or buffer."""
    return isinstance(node, fx.Node) and node.op == "get_attr"


class Framing:
    """The volumes of a program that are there as frames."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.found: dict[fx.Node, Frames] = {}

    def put(self, target: Any, args: tuple[Any, ...], item: Sequence[int], like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new node with items of this shape."""
        made = self.graph.call_function(target, args, kwargs)
        value = like.meta["val"]
        made.meta = {"val": value.new_empty((value.shape[0], *item))}
        return made

    def given(self, node: Any) -> Frames | None:
        """A volume that is there as frames already."""
        return self.found.get(node)

    def frames(self, node: Any) -> Frames | None:
        """A volume as frames, which are made of it where they are not there yet."""
        item = item_of(node)
        if not item:
            return None
        if node not in self.found:
            channels, depth, *size = item
            made = self.put(as_frames, (node,), (depth * channels, *size), node)
            self.found[node] = Frames(made, depth, channels, (size[0], size[1]))
        return self.found[node]

    def like(self, x: Frames, target: Any, *args: Any, **kwargs: Any) -> Frames:
        """A function of each number."""
        made = self.put(target, (x.node, *args), x.node.meta["val"].shape[1:], x.node, **kwargs)
        return Frames(made, x.depth, x.channels, x.size)

    def picked(self, x: Frames, frames: Sequence[int]) -> Frames:
        """These frames, in this order."""
        if list(frames) == list(range(x.depth)):
            return x
        order = tuple(frame * x.channels + c for frame in frames for c in range(x.channels))
        return self.ordered(x, order, len(frames), x.channels)

    def ordered(self, x: Frames, order: tuple[int, ...], depth: int, channels: int) -> Frames:
        """Other channels of all frames, in this order."""
        made = self.put(channels_of, (x.node, order, ()), (len(order), *x.size), x.node)
        return Frames(made, depth, channels, x.size)

    def together(self, target: Any, parts: list[Frames]) -> Frames:
        """Sums or maxima of frames with frames."""
        made = parts[0]
        for part in parts[1:]:
            made = self.like(made, target, part.node)
        return made
