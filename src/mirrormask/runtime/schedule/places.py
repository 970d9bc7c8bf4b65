"""Where each value of a region lies: layouts, memory, rooms, and the copies between layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.ir import Graph, Weight
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.kernels.clear import CLEAR, ClearSpec
from mirrormask.runtime.kernels.layout import Layout, flat_layout, map_layout
from mirrormask.runtime.kernels.relayout import RELAYOUT, RelayoutSpec, plain_layout
from mirrormask.runtime.schedule.memory import MARGIN, Memory
from mirrormask.runtime.schedule.problem import Choice, Problem
from mirrormask.runtime.schedule.rooms import Home, Room, homes
from mirrormask.runtime.schedule.taps import Taps

__all__ = ["Chooser", "Places", "Value", "as_map", "one_channel"]


@dataclass
class Value:
    """Where a value lies: its place in each layout, or its number if it is a tensor; and its phase maps, by stride.

    What lies in a layout of ``borrowed`` is memory of ``parent`` or of a room.
    """

    shape: tuple[int, ...]
    places: dict[Layout, int] = field(default_factory=dict)
    phases: dict[tuple[Layout, Any], int] = field(default_factory=dict)
    external: int | None = None
    borrowed: set[Layout] = field(default_factory=set)
    parent: str = ""


Chooser = Callable[[Problem], Choice]


def as_map(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """One number per channel is a map of one row and column."""
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)


def one_channel(layout: Layout) -> Layout:
    """The layout without its number of channels, which no kernel's code depends on."""
    return replace(layout, channels=1)


class Places:
    """The values made so far, and the ops that make them."""

    def __init__(self, graph: Graph, target: Target, threads: int, choose: Chooser, tokens: int) -> None:
        self.graph, self.target, self.threads, self.choose, self.tokens = graph, target, threads, choose, tokens
        self.memory, self.ops = Memory(), list[Op]()
        self.values: dict[str, Value] = {}
        self.order = {node.name: i for i, node in enumerate(graph.nodes)}
        self.nodes = {node.name: node for node in graph.nodes}
        self.users = {node.name: graph.users(node.name) for node in graph.nodes}
        self.outputs = set(graph.outputs)
        self.alias: dict[str, str] = {}
        self.panels: dict[str, Weight] = {}
        self.needs = self._needs()
        planes = {node.name for node in graph.nodes if node.kind != "mask" and not self._layout(node.name).flat}
        self.homes = homes(graph, planes)
        self.rooms: dict[str, Room] = {}
        for name, home in self.homes.items():
            room = self.rooms.setdefault(home.room, Room(self._map_layout(home.room)))
            room.members.add(name)

    # -- shapes and layouts -----------------------------------------------------------------------------------------

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value, tokens being the columns of a map of one row."""
        shape = self.nodes[name].shape
        return (shape[0], 1, self.tokens) if self.graph.rows and self.tokens > 1 and shape else shape

    def _needs(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(halo, gap) of each map size: what the layers that read maps of this size unsplit need."""
        needs: dict[tuple[int, int], tuple[int, int]] = {}
        for node in self.graph.nodes:
            if node.op != "conv" or node.stride != (1, 1):
                continue
            source = as_map(self._shape(node.inputs[0]))
            taps = Taps.of(node, source)
            halo, gap = needs.get((source[1], source[2]), (0, 0))
            if self.target.lanes == 1:
                gap = max(gap, taps.direct_layout(1).stride - source[2])
            needs[source[1], source[2]] = (max(halo, taps.halo(source[1])), gap)
        return needs

    def _layout(self, name: str) -> Layout:
        """The layout in which a value is made: without planes for one number per channel."""
        shape = self._shape(name)
        return flat_layout(shape[0]) if len(shape) == 1 or shape[1:] == (1, 1) else self._map_layout(name)

    def _map_layout(self, name: str) -> Layout:
        """The layout of a value as planes."""
        shape = as_map(self._shape(name))
        halo, gap = self.needs.get((shape[1], shape[2]), (0, 0))
        return map_layout(shape[0], shape[1], shape[2], self.target.lanes, halo=halo, gap=gap)

    def _new(self, name: str, layout: Layout | None = None, *, partly: bool = True) -> tuple[Layout, int]:
        layout = layout or self._layout(name)
        self.values.setdefault(name, Value(self._shape(name)))
        return layout, self._place(name, layout, partly=partly)

    def _place(self, name: str, layout: Layout, *, partly: bool = True) -> int:
        """Memory for a value in this layout: in a room that it shares, if it has one."""
        value, home = self.values[name], self.homes.get(name)
        if home is not None and layout == self._map_layout(name):
            place = self._room(home)
            value.borrowed.add(layout)
        else:
            place = self.memory.take(layout, len(self.ops), partly=partly)
        value.places[layout] = place
        return place

    def _room(self, home: Home) -> int:
        """The place of a home, in its room, which is taken when it is first needed."""
        room = self.rooms[home.room]
        if room.place is None:
            room.place = self.memory.take(room.layout, len(self.ops))
        return room.place + home.channel * room.layout.plane

    def _resolve(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def _in(self, name: str, layout: Layout, taps: Taps | None = None) -> int:
        """The place of a value in ``layout`` (the phases of ``taps``), copied there if it is not yet."""
        shape = self._shape(name)
        name = self._resolve(name)
        value = self.values[name]
        step = (1, 1) if taps is None else taps.stride
        phases = ((0, 0),) if taps is None else taps.phases
        if taps is None and layout in value.places:
            return value.places[layout]
        if (layout, (step, phases)) in value.phases:
            return value.phases[layout, (step, phases)]
        source, held = self._source(value, shape)
        if taps is None:
            place = self._place(name, layout)
        else:
            place = self.memory.take(layout, len(self.ops))
            value.phases[layout, (step, phases)] = place
        out = self._plain(shape) if layout.flat else layout
        transposed = value.shape[0] if self._tokens_outside(value) else 0
        outside = value.external is not None
        layouts = one_channel(source), one_channel(out)
        some = self.graph.sequences and transposed > 0
        spec = RelayoutSpec(self.target, *layouts, outside, False, step, phases, transposed, some)
        self.ops.append(Op(RELAYOUT, spec, {"x": held, "out": place}, max(source.channels, transposed), name))
        return place

    def _source(self, value: Value, shape: tuple[int, ...]) -> tuple[Layout, int]:
        """A layout that a value exists in, and its place there; ``shape`` is what it is seen as where it is plain."""
        if value.external is not None:
            return self._plain(shape), value.external
        layout, place = next(iter(value.places.items()))
        return (self._plain(shape) if layout.flat else layout), place

    def _tokens_outside(self, value: Value) -> bool:
        return self.graph.rows and self.tokens > 1 and value.external is not None

    def _plain(self, shape: tuple[int, ...]) -> Layout:
        """A contiguous tensor of ``shape``; one row when it has no rows of its own."""
        channels, height, width = as_map(shape)
        return plain_layout(channels, height, width) if len(shape) == 3 else plain_layout(1, 1, channels)

    def _export(self, name: str, number: int) -> None:
        value, shape = self.values[self._resolve(name)], self._shape(name)
        if value.external is not None and self.graph.sequences:
            self._in(name, self._map_layout(name))  # how many of its rows there are is known at run time
            value = replace(value, external=None)
        if value.external is not None:  # an input that is given back: rows stay rows
            whole = plain_layout(1, 1, int(np.prod(value.shape)))
            spec = RelayoutSpec(self.target, whole, whole, True, True)
            self.ops.append(Op(RELAYOUT, spec, {"x": value.external, "out": number}, 1, name))
            return
        source, held = self._source(value, shape)
        transposed = shape[0] if self.graph.rows and self.tokens > 1 else 0
        out = self._plain(shape)
        layouts, some = (one_channel(source), one_channel(out)), self.graph.sequences
        spec = RelayoutSpec(self.target, *layouts, False, True, transposed=transposed, some=some)
        self.ops.append(Op(RELAYOUT, spec, {"x": held, "out": number}, max(source.channels, transposed), name))

    def _release(self, done: set[str]) -> None:
        """Give back the memory of values that nothing will read any more."""
        # Views come after what they are views of.
        for name, value in reversed(list(self.values.items())):
            names = [name, *(a for a in self.alias if self._resolve(a) == name)]
            if value.external is not None or any(a in self.outputs for a in names):
                continue
            if any(view.parent == name for view in self.values.values()):
                continue
            if all(user.name in done for a in names for user in self.users[a]):
                for layout, place in value.places.items():
                    if layout not in value.borrowed:
                        self.memory.give(layout, place)
                for (layout, _), place in value.phases.items():
                    self.memory.give(layout, place)
                del self.values[name]
                self._leave(name)

    def _leave(self, name: str) -> None:
        """A value is no longer in its room; the last one gives the room back."""
        if name in self.homes:
            room = self.rooms[self.homes[name].room]
            room.members.discard(name)
            if not room.members and room.place is not None:
                self.memory.give(room.layout, room.place)

    def _clear_disturbed(self) -> None:
        """Before each buffer whose zeros another one may have overwritten, an op that restores them."""
        for taken in reversed(self.memory.disturbed()):
            layout = taken.layout
            gap = layout.segments == 1 and layout.stride - layout.width >= layout.lanes
            missing = layout.segments > 1 and layout.groups * layout.segments != layout.height
            spec = ClearSpec(self.target, one_channel(layout), taken.partly and (gap or missing), MARGIN)
            op = Op(CLEAR, spec, {"out": taken.place}, layout.channels, "padding")
            self.ops.insert(taken.step, op)
