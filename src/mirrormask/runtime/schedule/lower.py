"""From a graph to a plan: layouts, fusion, memory, and which kernel each layer gets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.ir import Graph, Node, Weight
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.kernels.clear import CLEAR, ClearSpec
from mirrormask.runtime.kernels.elementwise import ELEMENTWISE, ElementwiseSpec
from mirrormask.runtime.kernels.layout import Layout, flat_layout, map_layout
from mirrormask.runtime.kernels.pool import MEAN, POOL, MeanSpec, PoolSpec
from mirrormask.runtime.kernels.relayout import RELAYOUT, RelayoutSpec, plain_layout
from mirrormask.runtime.schedule.maps import MapProblem
from mirrormask.runtime.schedule.memory import MARGIN, Memory
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.problem import Choice, Fused, Problem
from mirrormask.runtime.schedule.taps import Taps
from mirrormask.runtime.schedule.vectors import VectorProblem

__all__ = ["lower"]


@dataclass
class Value:
    """Where a value lies: its place in each layout, or its number if it is a tensor; and its phase maps, by stride."""

    shape: tuple[int, ...]
    places: dict[Layout, int] = field(default_factory=dict)
    phases: dict[tuple[Layout, Any], int] = field(default_factory=dict)
    external: int | None = None


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
            source = self._shape(node.inputs[0])
            taps = Taps.of(node, source)
            halo, gap = needs.get((source[1], source[2]), (0, 0))
            if self.target.lanes == 1:
                gap = max(gap, taps.direct_layout(1).stride - source[2])
            needs[source[1], source[2]] = (max(halo, taps.halo(source[1])), gap)
        return needs

    def _layout(self, name: str) -> Layout:
        """The layout in which a value is made."""
        shape = self._shape(name)
        if len(shape) == 1:
            return flat_layout(shape[0])
        halo, gap = self.needs.get((shape[1], shape[2]), (0, 0))
        return map_layout(shape[0], shape[1], shape[2], self.target.lanes, halo=halo, gap=gap)

    def _new(self, name: str, layout: Layout | None = None, *, partly: bool = True) -> tuple[Layout, int]:
        layout = layout or self._layout(name)
        place = self.memory.take(layout, len(self.ops), partly=partly)
        self.values.setdefault(name, Value(self._shape(name))).places[layout] = place
        return layout, place

    def _resolve(self, name: str) -> str:
        while name in self.alias:
            name = self.alias[name]
        return name

    def _in(self, name: str, layout: Layout, taps: Taps | None = None) -> int:
        """The place of a value in ``layout`` (the phases of ``taps``), copied there if it is not yet."""
        name = self._resolve(name)
        value = self.values[name]
        step = (1, 1) if taps is None else taps.stride
        phases = ((0, 0),) if taps is None else taps.phases
        if taps is None and layout in value.places:
            return value.places[layout]
        if (layout, (step, phases)) in value.phases:
            return value.phases[layout, (step, phases)]
        place = self.memory.take(layout, len(self.ops))
        if taps is None:
            value.places[layout] = place
        else:
            value.phases[layout, (step, phases)] = place
        source, held = self._source(value)
        out = self._plain(value.shape) if layout.flat else layout
        transposed = value.shape[0] if self._tokens_outside(value) else 0
        outside = value.external is not None
        spec = RelayoutSpec(self.target, _one(source), _one(out), outside, False, step, phases, transposed)
        self.ops.append(Op(RELAYOUT, spec, {"x": held, "out": place}, max(source.channels, transposed), name))
        return place

    def _source(self, value: Value) -> tuple[Layout, int]:
        """A layout that a value exists in, and its place there."""
        if value.external is not None:
            return self._plain(value.shape), value.external
        layout, place = next(iter(value.places.items()))
        return (self._plain(value.shape) if layout.flat else layout), place

    def _tokens_outside(self, value: Value) -> bool:
        return self.graph.rows and self.tokens > 1 and value.external is not None

    def _plain(self, shape: tuple[int, ...]) -> Layout:
        """A contiguous tensor of ``shape``; one row when it has no rows of its own."""
        channels, height, width = _map(shape)
        return plain_layout(channels, height, width) if len(shape) == 3 else plain_layout(1, 1, channels)

    def _export(self, name: str, number: int) -> None:
        value = self.values[self._resolve(name)]
        if value.external is not None:  # an input that is given back: rows stay rows
            whole = plain_layout(1, 1, int(np.prod(value.shape)))
            spec = RelayoutSpec(self.target, whole, whole, True, True)
            self.ops.append(Op(RELAYOUT, spec, {"x": value.external, "out": number}, 1, name))
            return
        source, held = self._source(value)
        shape = self._shape(name)
        transposed = shape[0] if self.graph.rows and self.tokens > 1 else 0
        out = self._plain(shape if len(value.shape) == len(shape) else value.shape)
        spec = RelayoutSpec(self.target, _one(source), _one(out), False, True, transposed=transposed)
        self.ops.append(Op(RELAYOUT, spec, {"x": held, "out": number}, max(source.channels, transposed), name))

    def _release(self, done: set[str]) -> None:
        """Give back the memory of values that nothing will read any more."""
        for name, value in list(self.values.items()):
            names = [name, *(a for a in self.alias if self._resolve(a) == name)]
            if value.external is not None or any(a in self.outputs for a in names):
                continue
            if all(user.name in done for a in names for user in self.users[a]):
                for layout, place in value.places.items():
                    self.memory.give(layout, place)
                for (layout, _), place in value.phases.items():
                    self.memory.give(layout, place)
                del self.values[name]

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
        """Follow a layer through an addition (of a value that is ready) and an activation, if nothing else reads it."""
        fused = Fused(node.name)
        if node.op not in ("conv", "linear", "add"):
            return fused
        after = self._only_user(node.name)
        if after is not None and after.op == "add" and node.op != "add" and len(self._shape(node.name)) == 3:
            other = next((i for i in after.inputs if i != node.name), "")
            if other and self._ready(other, node):
                fused = Fused(after.name, other)
                done.add(after.name)
                after = self._only_user(after.name)
        if after is not None and after.op == "act":
            fused = replace(fused, out=after.name, activation=after.kind)
            done.add(after.name)
        return fused

    def _only_user(self, name: str) -> Node | None:
        users = self.users[name]
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def _ready(self, name: str, node: Node) -> bool:
        return self._resolve(name) in self.values and self.order[name] < self.order[node.name]

    # -- one method per operation -----------------------------------------------------------------------------------

    def _conv(self, node: Node, fused: Fused) -> None:
        source = self._shape(node.inputs[0])
        taps = Taps.of(replace(node, shape=self._shape(node.name)), source)
        name = self._resolve(node.inputs[0])
        problem = MapProblem(node, taps, self._layout(fused.out), fused, self.target, self.threads)
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
            for layout in [*self.values[name].places, self._layout(name)]:
                if layout.flat:
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
            return
        problem = VectorProblem(node, fused, self.target)
        choice = self.choose(problem)
        x = self._in(node.inputs[0], flat_layout(problem.terms))
        _, place = self._new(fused.out)
        op = problem.op(choice, x, place)
        if op.kind == "vector_dense" and not self.target.half:
            # From here on the graph keeps the panels, rather than the same numbers twice.
            panel = op.spec.panel * self.target.lanes
            self.panels[node.name] = Weight(problem.weight.shape, None, op.args["weights"], panel)
        self.ops.append(op)

    def _act(self, node: Node, fused: Fused) -> None:
        self._elementwise(node, fused.out, node.kind)

    def _add(self, node: Node, fused: Fused) -> None:
        self._elementwise(node, fused.out, fused.activation)

    def _elementwise(self, node: Node, out: str, activation: str) -> None:
        layout = self._layout(out)
        places = [self._in(name, layout) for name in node.inputs]
        _, place = self._new(out)
        lanes = self.target.lanes
        floats = layout.channels * layout.plane
        args = {"x": places[0], "other": places[-1], "out": place}
        spec = ElementwiseSpec(self.target, len(places) == 2, activation)
        self.ops.append(Op(ELEMENTWISE, spec, args, -(-floats // lanes), out))

    def _pool(self, node: Node, fused: Fused) -> None:
        source = self._layout(self._resolve(node.inputs[0]))
        x = self._in(node.inputs[0], source)
        out, place = self._new(node.name)
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

    def _mean(self, node: Node, fused: Fused) -> None:
        source = self._layout(self._resolve(node.inputs[0]))
        x = self._in(node.inputs[0], source)
        flat, place = self._new(node.name, flat_layout(node.shape[0]))
        spec = MeanSpec(self.target, _one(source))
        self.ops.append(Op(MEAN, spec, {"x": x, "out": place}, flat.channels, node.name))

    def _flatten(self, node: Node, fused: Fused) -> None:
        """The same numbers under another shape: another name, or a contiguous copy of a map's."""
        source = self._resolve(node.inputs[0])
        before, after = self.values[source].shape, self._shape(node.name)
        if before == after or (int(np.prod(before[1:])) == 1 and flat_layout(after[0]) in self.values[source].places):
            self.alias[node.name] = source
            return
        value = self.values[source]
        layout, held = self._source(value)
        _, place = self._new(node.name, flat_layout(after[0]))
        outside = value.external is not None
        spec = RelayoutSpec(self.target, _one(layout), _one(self._plain(before)), outside, False)
        self.ops.append(Op(RELAYOUT, spec, {"x": held, "out": place}, layout.channels, node.name))


def _map(shape: tuple[int, ...]) -> tuple[int, int, int]:
    return (shape[0], shape[1], shape[2]) if len(shape) == 3 else (shape[0], 1, 1)


def _one(layout: Layout) -> Layout:
    """The layout without its number of channels, which no kernel's code depends on."""
    return replace(layout, channels=1)
