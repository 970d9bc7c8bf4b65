"""From a graph to a plan: layouts, fusion, memory, and which kernel each layer gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.ir import Graph, Node, Weight
from mirrormask.runtime.kernels.activation import Activation, moves_zero
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.kernels.clear import CLEAR, ClearSpec
from mirrormask.runtime.kernels.elementwise import ELEMENTWISE, REVERSED, ElementwiseSpec
from mirrormask.runtime.kernels.gather import GATHER, GatherSpec
from mirrormask.runtime.kernels.layout import Layout, flat_layout, map_layout
from mirrormask.runtime.kernels.planes import PLANES, PlanesSpec
from mirrormask.runtime.kernels.pool import MEAN, POOL, MeanSpec, PoolSpec
from mirrormask.runtime.kernels.relayout import RELAYOUT, RelayoutSpec, plain_layout
from mirrormask.runtime.kernels.resample import RESAMPLE, ResampleSpec
from mirrormask.runtime.kernels.vector import PANEL
from mirrormask.runtime.kernels.windows import WINDOWS, WindowsSpec
from mirrormask.runtime.schedule.maps import MapProblem
from mirrormask.runtime.schedule.memory import MARGIN, Memory
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.problem import Choice, Fused, Problem
from mirrormask.runtime.schedule.rooms import Home, Room, homes
from mirrormask.runtime.schedule.sampling import picks, windows
from mirrormask.runtime.schedule.taps import Taps
from mirrormask.runtime.schedule.vectors import VectorProblem

__all__ = ["lower"]


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


def lower(graph: Graph, target: Target, threads: int, choose: Chooser, tokens: int = 1) -> Plan:
    """The plan of a region.

    Args:
        choose: picks the kernel of each convolution or linear layer over tokens.
        tokens: rows per item of a region over rows: 1, or a multiple of ``target.lanes``.

    Raises:
        ValueError: ``tokens`` is neither.
        IndexError: a constant is out of bounds, which would be an error of this library.
    """
    if tokens != 1 and tokens % target.lanes:
        raise ValueError(f"{tokens} tokens are not whole vectors of {target.lanes}")
    return _Lowering(graph, target, threads, choose, tokens).plan()


class _Lowering:
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
        planes = {node.name for node in graph.nodes if not self._layout(node.name).flat}
        self.homes = homes(graph, planes)
        self.rooms: dict[str, Room] = {}
        for name, home in self.homes.items():
            room = self.rooms.setdefault(home.room, Room(self._map_layout(home.room)))
            room.members.add(name)

    def plan(self) -> Plan:
        graph = self.graph
        strides = []
        for number, name in enumerate(graph.inputs):
            self.values[name] = Value(self._shape(name), external=number)
            strides.append(int(np.prod(self._shape(name))))
        done: set[str] = set()
        for node in graph.nodes:
            if node.op == "input" or node.name in done:
                continue
            fused = self._fuse(node, done)
            done |= {node.name, fused.out}
            getattr(self, f"_{node.op}")(node, fused)
            self._release(done)
        for number, name in enumerate(graph.outputs):
            self._export(name, len(graph.inputs) + number)
            strides.append(int(np.prod(self._shape(name))))
        self._clear_disturbed()
        shapes = [graph.shapes[name] for name in graph.outputs]
        numbers = self.memory.size + 4096
        return Plan(self.ops, numbers, strides, shapes, self.threads, self.target.dtype, self.panels)

    # -- shapes and layouts -----------------------------------------------------------------------------------------

    def _shape(self, name: str) -> tuple[int, ...]:
        """The shape of a value, tokens being the columns of a map of one row."""
        shape = self.nodes[name].shape
        return (shape[0], 1, self.tokens) if self.graph.rows and self.tokens > 1 else shape

    def _needs(self) -> dict[tuple[int, int], tuple[int, int]]:
        """(halo, gap) of each map size: what the layers that read maps of this size unsplit need."""
        needs: dict[tuple[int, int], tuple[int, int]] = {}
        for node in self.graph.nodes:
            if node.op != "conv" or node.stride != (1, 1):
                continue
            source = _map(self._shape(node.inputs[0]))
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
        shape = _map(self._shape(name))
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
        spec = RelayoutSpec(self.target, _one(source), _one(out), outside, False, step, phases, transposed)
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
        channels, height, width = _map(shape)
        return plain_layout(channels, height, width) if len(shape) == 3 else plain_layout(1, 1, channels)

    def _export(self, name: str, number: int) -> None:
        value, shape = self.values[self._resolve(name)], self._shape(name)
        if value.external is not None:  # an input that is given back: rows stay rows
            whole = plain_layout(1, 1, int(np.prod(value.shape)))
            spec = RelayoutSpec(self.target, whole, whole, True, True)
            self.ops.append(Op(RELAYOUT, spec, {"x": value.external, "out": number}, 1, name))
            return
        source, held = self._source(value, shape)
        transposed = shape[0] if self.graph.rows and self.tokens > 1 else 0
        out = self._plain(shape)
        spec = RelayoutSpec(self.target, _one(source), _one(out), False, True, transposed=transposed)
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
            spec = ClearSpec(self.target, _one(layout), taken.partly and (gap or missing), MARGIN)
            op = Op(CLEAR, spec, {"out": taken.place}, layout.channels, "padding")
            self.ops.insert(taken.step, op)

    # -- fusion -----------------------------------------------------------------------------------------------------

    def _fuse(self, node: Node, done: set[str]) -> Fused:
        """Follow a layer through an addition (of a value that is ready) and activations, if nothing else reads it."""
        fused = Fused(node.name)
        if node.op == "act":
            fused = Fused(node.name, activation=(_activation(node),))
        elif node.op not in ("conv", "linear", "add", "combine"):
            return fused
        after = self._only_user(node.name)
        if after is not None and after.op == "add" and node.op in ("conv", "linear") and self._is_map(node):
            other = next((i for i in after.inputs if i != node.name), "")
            if other and self._ready(other, node):
                fused = Fused(after.name, other)
                done.add(after.name)
                after = self._only_user(after.name)
        while after is not None and after.op == "act":
            fused = replace(fused, out=after.name, activation=(*fused.activation, _activation(after)))
            done.add(after.name)
            after = self._only_user(after.name)
        return fused

    def _is_map(self, node: Node) -> bool:
        """Whether a layer computes maps, rather than one vector."""
        return len(self._shape(node.name)) == 3 and not self._is_vector(node)

    def _is_vector(self, node: Node) -> bool:
        """Whether a convolution takes one number per channel, and is a linear layer then."""
        whole = node.op == "conv" and node.groups == 1 and node.kernel == (1, 1) and node.padding == (0, 0)
        return whole and self._shape(node.inputs[0])[1:] == self._shape(node.name)[1:] == (1, 1)

    def _only_user(self, name: str) -> Node | None:
        users = self.users[name]
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def _ready(self, name: str, node: Node) -> bool:
        return self._resolve(name) in self.values and self.order[name] < self.order[node.name]

    # -- one method per operation -----------------------------------------------------------------------------------

    def _conv(self, node: Node, fused: Fused) -> None:
        if self._is_vector(node):
            assert node.weight is not None
            matrix = replace(node.weight, shape=node.weight.shape[:2])
            self._vector(replace(node, weight=matrix), fused)
            return
        source = _map(self._shape(node.inputs[0]))
        taps = Taps.of(replace(node, shape=self._shape(node.name)), source)
        name = node.inputs[0]
        problem = MapProblem(node, taps, self._map_layout(fused.out), fused, self.target, self.threads)
        choice = self.choose(problem)
        x = self._input_for(name, taps, problem, choice)
        out = problem.out
        if choice.kernel != "aligned" and out.segments > 1:
            # Unaligned loads cannot fill vectors that hold distant rows: go through a plain layout.
            out = map_layout(*taps.out, self.target.lanes, halo=0, gap=1)
        residual = self._in(fused.residual, out) if fused.residual else 0
        place_x = self._in(name, x, None if node.stride == (1, 1) else taps)
        plain = problem.into(out)
        between = plain.between(choice, x)
        place_between = 0 if between is None else self.memory.take(between, len(self.ops), partly=False)
        # What lies between is written by one op, the result by the next.
        _, place = self._new(fused.out, out, partly=False)
        self.ops += plain.ops(choice, x, place_x, place, residual, place_between)
        if between is not None:
            self.memory.give(between, place_between)
        if out != problem.out:
            self._in(fused.out, problem.out)
            self.memory.give(out, self.values[fused.out].places.pop(out))

    def _input_for(self, name: str, taps: Taps, problem: MapProblem, choice: Choice) -> Layout:
        """The layout to read: one that exists if it fits, else the one that the choice asks for."""
        if taps.stride == (1, 1):
            for layout in [*self.values[self._resolve(name)].places, self._map_layout(name)]:
                if layout.flat or (layout.channels, layout.height, layout.width) != taps.source:
                    continue
                aligned = choice.kernel == "aligned"
                if aligned and taps.fits_aligned(layout, problem.out, 99):
                    return layout
                if not aligned and problem.out.segments == 1 and taps.fits_direct(layout, problem.out):
                    return layout
        return problem.input_layout(choice)

    def _linear(self, node: Node, fused: Fused) -> None:
        if len(self._shape(node.name)) == 3:
            self._conv(node, fused)
        else:
            self._vector(node, fused)

    def _vector(self, node: Node, fused: Fused) -> None:
        problem = VectorProblem(node, fused, self.target)
        choice = self.choose(problem)
        x = self._in(node.inputs[0], flat_layout(problem.terms))
        _, place = self._new(fused.out, flat_layout(problem.outputs))
        op = problem.op(choice, x, place)
        if op.kernel is PANEL and node.op == "linear" and not self.target.half:
            # From here on the graph keeps the panels, rather than the same numbers twice.
            panel = op.spec.panel * self.target.lanes
            self.panels[node.name] = Weight(problem.weight.shape, None, op.args["weights"], panel)
        self.ops.append(op)

    def _act(self, node: Node, fused: Fused) -> None:
        self._elementwise(node.inputs, "", fused)

    def _add(self, node: Node, fused: Fused) -> None:
        self._elementwise(node.inputs, "add", fused)

    def _combine(self, node: Node, fused: Fused) -> None:
        kind, (x, other) = node.kind, node.inputs
        if self._shape(x) != self._shape(node.name):
            kind, x, other = REVERSED.get(kind, kind), other, x
        if self._shape(other) == self._shape(x):
            self._elementwise([x, other], kind, fused)
        elif self._shape(other)[1:] == (1, 1):
            self._planes(x, self._in(other, flat_layout(self._shape(other)[0])), "numbers", kind, fused)
        else:
            self._planes(x, self._in(other, replace(self._layout(x), channels=1)), "map", kind, fused)

    def _elementwise(self, names: list[str], kind: str, fused: Fused) -> None:
        layout = self._layout(fused.out)
        places = [self._in(name, layout) for name in names]
        if not layout.flat and (moves_zero(fused.activation) or kind in ("div", "rdiv")):
            self._planes(names[0], places[-1], "maps", kind, fused)
            return
        _, place = self._new(fused.out)
        floats = layout.channels * layout.plane
        args = {"x": places[0], "other": places[-1], "out": place}
        spec = ElementwiseSpec(self.target, kind, fused.activation)
        self.ops.append(Op(ELEMENTWISE, spec, args, -(-floats // self.target.lanes), fused.out))

    def _planes(self, x: str, other: int, role: str, kind: str, fused: Fused) -> None:
        """``x`` with maps or numbers that lie at ``other``, row by row."""
        layout = self._layout(fused.out)
        held = self._in(x, layout)
        _, place = self._new(fused.out)
        spec = PlanesSpec(self.target, _one(layout), kind, role if kind else "", fused.activation)
        self.ops.append(Op(PLANES, spec, {"x": held, "other": other, "out": place}, layout.channels, fused.out))

    def _concat(self, node: Node, fused: Fused) -> None:
        """Copies of what is not in its place already."""
        whole, base = self._new(node.name)
        channel = 0
        for name in node.inputs:
            shape = self._shape(name)
            step = shape[0]
            place = base + channel * whole.plane
            value = self.values[self._resolve(name)]
            if whole.flat:
                held = self._in(name, flat_layout(step))
                self._copy(plain_layout(1, 1, step), held, plain_layout(1, 1, step), place, node.name)
            elif value.places.get(replace(whole, channels=step)) != place:
                source, held = self._source(value, shape)
                self._copy(source, held, whole, place, node.name, outside=value.external is not None)
            channel += step

    def _copy(self, source: Layout, held: int, out: Layout, place: int, name: str, *, outside: bool = False) -> None:
        spec = RelayoutSpec(self.target, _one(source), _one(out), outside, False)
        self.ops.append(Op(RELAYOUT, spec, {"x": held, "out": place}, source.channels, name))

    def _slice(self, node: Node, fused: Fused) -> None:
        """Some of the planes of what is there; of numbers, a copy, since vectors begin at whole ones."""
        start, stop = node.span
        layout = self._layout(node.inputs[0])
        held = self._in(node.inputs[0], layout)
        if layout.flat:
            _, place = self._new(node.name)
            plain = plain_layout(1, 1, stop - start)
            self._copy(plain, held + start, plain, place, node.name)
            return
        part = replace(layout, channels=stop - start)
        value = Value(self._shape(node.name), {part: held + start * layout.plane}, borrowed={part})
        self.values[node.name] = replace(value, parent=self._resolve(node.inputs[0]))

    def _gather(self, node: Node, fused: Fused) -> None:
        layout = self._map_layout(node.inputs[0])
        held = self._in(node.inputs[0], layout)
        out, place = self._new(node.name, replace(layout, channels=len(node.span)))
        args = {"x": held, "out": place, "order": np.array(node.span, np.int32)}
        self.ops.append(Op(GATHER, GatherSpec(self.target, _one(layout)), args, out.channels, node.name))

    def _pool(self, node: Node, fused: Fused) -> None:
        source = self._map_layout(node.inputs[0])
        floor = [
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip((source.height, source.width), node.padding, node.kernel, node.stride, strict=True)
        ]
        if node.kind == "mean" and node.ceil and tuple(floor) != self._shape(node.name)[1:]:
            self._windows(node)
            return
        x = self._in(node.inputs[0], source)
        out, place = self._new(node.name, self._map_layout(node.name))
        spec = PoolSpec(
            self.target,
            _one(source),
            _one(out),
            node.kernel,
            node.stride,
            node.padding,
            node.kind == "mean",
            node.count_padding,
        )
        self.ops.append(Op(POOL, spec, {"x": x, "out": place}, out.channels, node.name))

    def _adaptive(self, node: Node, fused: Fused) -> None:
        """An ordinary pool where all windows have one size."""
        source, shape = _map(self._shape(node.inputs[0])), _map(self._shape(node.name))
        if source == shape and source[1:] != (1, 1):
            self.alias[node.name] = self._resolve(node.inputs[0])
        elif source[1] % shape[1] or source[2] % shape[2] or max(source[1:]) > 64 or shape[1:] == (1, 1):
            self._windows(node)
        else:
            step = (source[1] // shape[1], source[2] // shape[2])
            self._pool(replace(node, kernel=step, stride=step), fused)

    def _windows(self, node: Node) -> None:
        source, shape = self._map_layout(node.inputs[0]), _map(self._shape(node.name))
        x = self._in(node.inputs[0], source)
        out, place = self._new(node.name)
        if out.flat:
            out = plain_layout(*shape)
        args = windows(node, (source.height, source.width), shape[1:], self.target.dtype)
        spec = WindowsSpec(self.target, _one(source), _one(out), node.kind == "mean")
        self.ops.append(Op(WINDOWS, spec, {"x": x, "out": place, **args}, shape[0], node.name))

    def _pad(self, node: Node, fused: Fused) -> None:
        self._picked(node, fill=node.values[0] if node.kind == "constant" else 0.0)

    def _crop(self, node: Node, fused: Fused) -> None:
        self._picked(node)

    def _resample(self, node: Node, fused: Fused) -> None:
        self._picked(node)

    def _picked(self, node: Node, fill: float = 0.0) -> None:
        """Rows and columns of another map."""
        source = self._map_layout(node.inputs[0])
        x = self._in(node.inputs[0], source)
        out, place = self._new(node.name, self._map_layout(node.name))
        args = picks(node, (source.height, source.width), (out.height, out.width), self.target.dtype)
        spec = ResampleSpec(self.target, _one(source), _one(out), "row_weight" in args, fill)
        self.ops.append(Op(RESAMPLE, spec, {"x": x, "out": place, **args}, out.channels, node.name))

    def _mean(self, node: Node, fused: Fused) -> None:
        source = self._map_layout(node.inputs[0])
        x = self._in(node.inputs[0], source)
        flat, place = self._new(node.name, flat_layout(node.shape[0]))
        spec = MeanSpec(self.target, _one(source))
        self.ops.append(Op(MEAN, spec, {"x": x, "out": place}, flat.channels, node.name))

    def _flatten(self, node: Node, fused: Fused) -> None:
        """The same numbers under another shape: another name, or a contiguous copy of a map's."""
        source = self._resolve(node.inputs[0])
        value, before, after = self.values[source], self._shape(node.inputs[0]), self._shape(node.name)
        # What lies one number after the other is of any shape.
        plain = value.external is not None or next(iter(value.places)).flat
        if before == after or (plain and not self._tokens_outside(value)):
            self.alias[node.name] = source
            return
        layout, held = self._source(value, before)
        _, place = self._new(node.name, flat_layout(int(np.prod(after))))
        spec = RelayoutSpec(self.target, _one(layout), _one(self._plain(before)), False, False)
        self.ops.append(Op(RELAYOUT, spec, {"x": held, "out": place}, layout.channels, node.name))


def _map(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)


def _activation(node: Node) -> Activation:
    return Activation(node.kind, node.values)


def _one(layout: Layout) -> Layout:
    """The layout without its number of channels, which no kernel's code depends on."""
    return replace(layout, channels=1)
