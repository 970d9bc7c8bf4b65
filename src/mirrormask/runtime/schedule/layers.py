"""Convolutions and linear layers as ops, with what follows them computed as they store."""

from __future__ import annotations

from dataclasses import replace

from mirrormask.runtime.graph.ir import Node, Weight
from mirrormask.runtime.kernels.activation import Activation
from mirrormask.runtime.kernels.layout import Layout, flat_layout, map_layout
from mirrormask.runtime.kernels.vector import PANEL
from mirrormask.runtime.schedule.frames import reads, weight_of
from mirrormask.runtime.schedule.maps import MapProblem
from mirrormask.runtime.schedule.places import Places, as_map
from mirrormask.runtime.schedule.problem import Choice, Fused
from mirrormask.runtime.schedule.taps import Taps
from mirrormask.runtime.schedule.vectors import VectorProblem

__all__ = ["Layers"]


class Layers(Places):
    """Layers that hold a weight."""

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
        plain = node.op == "conv" and node.groups == 1 and not node.span
        whole = plain and node.kernel == (1, 1) and node.padding == (0, 0)
        return whole and self._shape(node.inputs[0])[1:] == self._shape(node.name)[1:] == (1, 1)

    def _only_user(self, name: str) -> Node | None:
        users = self.users[name]
        return users[0] if len(users) == 1 and name not in self.outputs else None

    def _ready(self, name: str, node: Node) -> bool:
        return self._resolve(name) in self.values and self.order[name] < self.order[node.name]

    def _conv(self, node: Node, fused: Fused) -> None:
        if self._is_vector(node):
            assert node.weight is not None
            matrix = replace(node.weight, shape=node.weight.shape[:2])
            self._vector(replace(node, weight=matrix), fused)
            return
        if node.span:
            self._frames(node, fused)
            return
        source = as_map(self._shape(node.inputs[0]))
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

    def _frames(self, node: Node, fused: Fused) -> None:
        """A convolution over frames: for each frame of the result one over the frames that it reads.

        Those that read alike share their weight. All make the same choice: their input lies in one layout.
        """
        assert node.weight is not None
        name, (outputs, inputs) = node.inputs[0], (node.weight.shape[0], node.weight.shape[1] * node.groups)
        source, shape = as_map(self._shape(name)), as_map(self._shape(node.name))
        work = reads(node.span, node.weight.shape[2])
        out = self._map_layout(fused.out)
        whole = Taps(node.kernel, node.stride, node.padding, node.dilation, source, (outputs, *shape[1:]))
        problems = {}
        for read in dict.fromkeys(read for _, read in work):
            weight, groups, wide = weight_of(node.weight, node.groups, read)
            layer = replace(node, weight=weight, groups=groups, span=(), shape=whole.out)
            taps = replace(whole, source=(wide * inputs, *source[1:]))
            one = replace(out, channels=outputs)
            problems[read] = MapProblem(layer, taps, one, fused, self.target, self.threads)
        most = max(problems, key=[read for _, read in work].count)
        choice = self.choose(problems[most])
        x = self._input_for(name, whole, problems[most].over(whole), choice)
        if choice.kernel != "aligned" and out.segments > 1:
            out = map_layout(shape[0], *shape[1:], self.target.lanes, halo=0, gap=1)
        residual = self._in(fused.residual, out) if fused.residual else 0
        held = self._in(name, x, None if node.stride == (1, 1) else whole)
        _, place = self._new(fused.out, out, partly=False)
        made, taken = {}, []
        for read, problem in problems.items():
            plain = problem.into(replace(out, channels=outputs))
            part = replace(x, channels=problem.taps.source[0] * len(whole.phases))
            between = plain.between(choice, part)
            place_between = 0 if between is None else self.memory.take(between, len(self.ops), partly=False)
            taken += [] if between is None else [(between, place_between)]
            made[read] = plain.ops(choice, part, held, place, residual, place_between)
        for number, (first, read) in enumerate(work):
            into = number * outputs * out.plane
            ops = [replace(op, args=dict(op.args)) for op in made[read]]
            ops[0].args["x"] += first * inputs * len(whole.phases) * x.plane
            ops[-1].args["out"] += into
            ops[-1].args["residual"] += into
            self.ops += ops
        for between, place_between in taken:
            self.memory.give(between, place_between)
        if out != self._map_layout(fused.out):
            self._in(fused.out, self._map_layout(fused.out))
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


def _activation(node: Node) -> Activation:
    return Activation(node.kind, node.values)
