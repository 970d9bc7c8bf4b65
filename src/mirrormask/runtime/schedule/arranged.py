"""Views of maps, stored maps and attention between the columns of maps, as ops."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.kernels.attention import ATTENTION, AttentionSpec
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.kernels.layout import Layout, map_layout
from mirrormask.runtime.kernels.place import PLACE, PlaceSpec
from mirrormask.runtime.kernels.rows import width_step
from mirrormask.runtime.schedule.places import Places, as_map, one_channel
from mirrormask.runtime.schedule.problem import Fused

__all__ = ["Arranged"]

Ints = npt.NDArray[np.int64]
Runs = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int32]]


class Arranged(Places):
    """Numbers in other places."""

    def _arrange(self, node: Node, fused: Fused) -> None:
        channels, name = node.shape[0], node.inputs[0]
        shape = as_map(self._shape(name))
        first, second = (np.array(part, np.int64) for part in (node.span[:channels], node.span[channels:]))
        there = second >= 0
        column = int(there.argmax())
        # Channels that are made of different rows lie alike only where rows share no vectors.
        for source in dict.fromkeys((self._layout(name), self._apart(name))):
            lies = _addresses(source, shape)[np.maximum(first[:, None] + second, 0)]
            base = lies[:, column] - lies[0, column]
            if not ((base[:, None] + lies[0]) != lies)[:, there].any() and base.min(initial=0) >= 0:
                break
        else:
            raise ValueError(f"{node.layer!r} moves numbers between channels and positions")
        held = self._in(name, source)
        self._placed(node, held, base, np.where(there, lies[0], -1), None)

    def _stored(self, node: Node, fused: Fused) -> None:
        assert node.gain is not None
        channels, count = node.shape[0], node.gain.size // node.shape[0]
        numbers = np.ascontiguousarray(node.gain.reshape(-1), self.target.dtype)
        self._placed(node, 0, np.arange(channels) * count, np.arange(count), numbers)

    def _join(self, node: Node, fused: Fused) -> None:
        """Each part goes to its place."""
        out, place = self._new(node.name)
        (axis,), done = node.span, 0
        for name in node.inputs:
            source, shape = self._layout(name), as_map(self._shape(name))
            held = self._in(name, source)
            second = _addresses(source, (1, *shape[1:]))
            stores = [(row, to + (done if axis == 1 else 0)) for row, to in _stores(out, as_map(node.shape))]
            if axis == 0:
                stores = [(row - done, to) for row, to in stores if done <= row < done + shape[1]]
            first = np.arange(out.channels) * source.plane
            done += shape[1 + axis]
            tail = 0 if axis == 1 and done < node.shape[2] else _tail(out, self.target.lanes)
            runs = _runs(second, stores, shape[2], tail)
            self._put(node, PlaceSpec(self.target, False), held, place, out, first, runs)

    def _put(
        self, node: Node, spec: PlaceSpec, held: int, place: int, out: Layout, first: Ints, runs: Runs, **args: Any
    ) -> None:
        sources, places, lengths = runs
        args |= {"x": held, "out": place, "first": first.astype(np.int32), "pitch": out.plane}
        args |= {"sources": sources, "places": places, "lengths": lengths, "runs": len(lengths)}
        self.ops.append(Op(PLACE, spec, args, out.channels, node.name))

    def _placed(
        self, node: Node, held: int, first: Ints, second: Ints, numbers: npt.NDArray[np.float32] | None
    ) -> None:
        out, place = self._new(node.name)
        shape = as_map(node.shape)
        runs = _runs(second, _stores(out, shape), shape[2], _tail(out, self.target.lanes))
        spec, extra = PlaceSpec(self.target, numbers is not None), {} if numbers is None else {"numbers": numbers}
        self._put(node, spec, held, place, out, first, runs, **extra)

    def _attend(self, node: Node, fused: Fused) -> None:
        names = [*node.inputs[:3]]
        layouts = [self._apart(name) for name in names]
        out = self._apart(node.name)
        query, key, value = (self._in(name, layout) for name, layout in zip(names, layouts, strict=True))
        _, place = self._new(node.name, out)
        rows = as_map(node.shape)[1]
        spec = AttentionSpec(
            self.target,
            one_channel(out),
            *node.kernel,
            node.values[0],
            node.kind == "causal",
            False,
            one_channel(layouts[1]),
            rows,
            node.gain is not None,
        )
        if one_channel(layouts[0]) != one_channel(out) or one_channel(layouts[1]) != one_channel(layouts[2]):
            raise ValueError(f"{node.layer!r} has a query, keys and values of different layouts")
        args: dict[str, Any] = {
            "query": query,
            "key": key,
            "value": value,
            "out": place,
            "heads": node.groups,
            "mask": 0,
        }
        args |= self._bias(node, out.width, layouts[1].width)
        self.ops.append(Op(ATTENTION, spec, {**args, "starts": np.array(node.span, np.int32)}, node.groups, node.name))

    def _apart(self, name: str) -> Layout:
        """The layout of a map whose rows share no vectors."""
        layout, shape = self._map_layout(name), as_map(self._shape(name))
        if layout.segments == 1:
            return layout
        return map_layout(*shape, self.target.lanes, halo=0, gap=1)

    def _bias(self, node: Node, queries: int, keys: int) -> dict[str, Any]:
        """The bias as ``[rows, heads, keys, queries]``, in whole vectors of queries, and its steps."""
        if node.gain is None:
            return {}
        lanes = self.target.lanes
        rows, heads = node.stride
        wide = -(-queries // lanes) * lanes
        table = np.zeros((rows, heads, keys, wide), np.float32)
        table[..., :queries] = node.gain.reshape(rows, heads, queries, keys).transpose(0, 1, 3, 2)
        one = keys * wide
        steps = {"bias_row": heads * one if rows > 1 else 0, "bias_head": one if heads > 1 else 0}
        return {"bias": table.reshape(-1), **steps}


def _addresses(layout: Layout, shape: tuple[int, int, int]) -> Ints:
    """Where each number of a map lies, one after the other as in a tensor."""
    if layout.flat:
        return np.arange(math.prod(shape))
    rows = np.array([layout.address(0, row, 0) for row in range(shape[1])])
    plane = (rows[:, None] + np.arange(shape[2])).reshape(-1)
    places: Ints = (np.arange(shape[0])[:, None] * layout.plane + plane).reshape(-1)
    return places


def _stores(layout: Layout, shape: tuple[int, int, int]) -> list[tuple[int, int]]:
    """(row, place) of every place where a row of a plane is stored, copies included."""
    if layout.flat:
        return [(0, 0)]
    found = []
    for group in range(-layout.halo, layout.groups + layout.halo):
        for segment in range(layout.segments):
            row = group + segment * layout.groups
            if 0 <= row < shape[1]:
                found.append((row, layout.origin + group * layout.pitch + segment * layout.stride))
    return found


def _tail(layout: Layout, lanes: int) -> int:
    """Zeros that whoever writes a row puts behind it, to the end of its last vector."""
    if layout.flat:
        return 0
    step = width_step(layout, lanes)
    return -(-layout.width // step) * step - layout.width


def _runs(second: Ints, stores: list[tuple[int, int]], width: int, tail: int) -> Runs:
    """Runs of neighbouring numbers: where they come from, counted from 1 (0 for zeros), where they go, how many."""
    table = second.reshape(-1, width)
    sources, places, lengths = [], [], []
    for row, place in stores:
        line = np.concatenate([table[row], np.full(tail, -1)])
        step = np.diff(line)
        cut = np.flatnonzero(~(((step == 1) & (line[:-1] >= 0)) | ((line[:-1] < 0) & (line[1:] < 0)))) + 1
        begin = np.concatenate([[0], cut])
        sources.append(np.maximum(line[begin], -1) + 1)
        places.append(place + begin)
        lengths.append(np.diff(np.concatenate([begin, [line.size]])))
    one, two, three = (np.concatenate(part).astype(np.int32) for part in (sources, places, lengths))
    return one, two, three
