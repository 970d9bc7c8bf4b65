"""Operations between values of one size as ops: number by number, and on whole channels."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.kernels.activation import moves_zero
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.kernels.elementwise import ELEMENTWISE, REVERSED, ElementwiseSpec
from mirrormask.runtime.kernels.gather import GATHER, GatherSpec
from mirrormask.runtime.kernels.layout import Layout, flat_layout
from mirrormask.runtime.kernels.planes import PLANES, PlanesSpec
from mirrormask.runtime.kernels.relayout import RELAYOUT, RelayoutSpec, plain_layout
from mirrormask.runtime.kernels.resample import RESAMPLE, ResampleSpec
from mirrormask.runtime.schedule.places import Places, Value, one_channel
from mirrormask.runtime.schedule.problem import Fused
from mirrormask.runtime.schedule.sampling import picks

__all__ = ["Channels"]


class Channels(Places):
    """Arithmetic, activations, and channels put together and apart."""

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
        elif self._layout(x).flat:
            self._elementwise([x, other], kind, fused, single=True)
        elif self._shape(other)[1:] == (1, 1):
            self._planes(x, self._in(other, flat_layout(self._shape(other)[0])), "numbers", kind, fused)
        elif self._shape(other)[0] == 1:
            self._planes(x, self._in(other, replace(self._layout(x), channels=1)), "map", kind, fused)
        else:
            self._along(x, other, kind, fused)

    def _along(self, x: str, other: str, kind: str, fused: Fused) -> None:
        """``x`` with a number for each row or column of each map, which is repeated to maps before."""
        layout, narrow = self._layout(x), self._map_layout(other)
        held = self._in(other, narrow)
        place = self.memory.take(layout, len(self.ops))
        repeated = Node("resample", other, [other], self._shape(x), kind="nearest")
        args = picks(repeated, (narrow.height, narrow.width), (layout.height, layout.width), self.target.dtype)
        spec = ResampleSpec(self.target, one_channel(narrow), one_channel(layout), False, 0.0)
        self.ops.append(Op(RESAMPLE, spec, {"x": held, "out": place, **args}, layout.channels, fused.out))
        self._planes(x, place, "maps", kind, fused)
        self.memory.give(layout, place)

    def _elementwise(self, names: list[str], kind: str, fused: Fused, *, single: bool = False) -> None:
        layout = self._layout(fused.out)
        places = [self._in(names[0], layout)]
        places += [self._in(name, flat_layout(1) if single else layout) for name in names[1:]]
        if not layout.flat and (moves_zero(fused.activation) or kind in ("div", "rdiv")):
            self._planes(names[0], places[-1], "maps", kind, fused)
            return
        _, place = self._new(fused.out)
        floats = layout.channels * layout.plane
        args = {"x": places[0], "other": places[-1], "out": place}
        spec = ElementwiseSpec(self.target, kind, fused.activation, single)
        self.ops.append(Op(ELEMENTWISE, spec, args, -(-floats // self.target.lanes), fused.out))

    def _planes(self, x: str, other: int, role: str, kind: str, fused: Fused) -> None:
        """``x`` with maps or numbers that lie at ``other``, row by row."""
        layout = self._layout(fused.out)
        held = self._in(x, layout)
        _, place = self._new(fused.out)
        spec = PlanesSpec(self.target, one_channel(layout), kind, role if kind else "", fused.activation)
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
            elif self._tokens_outside(value):  # rows there, columns here
                source = self._map_layout(name)
                self._copy(source, self._in(name, source), whole, place, node.name)
            elif value.places.get(replace(whole, channels=step)) != place:
                source, held = self._source(value, shape)
                self._copy(source, held, whole, place, node.name, outside=value.external is not None)
            channel += step

    def _copy(self, source: Layout, held: int, out: Layout, place: int, name: str, *, outside: bool = False) -> None:
        spec = RelayoutSpec(self.target, one_channel(source), one_channel(out), outside, False)
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
        layout = self._layout(node.inputs[0])
        held = self._in(node.inputs[0], layout)
        out, place = self._new(node.name, replace(layout, channels=len(node.span)))
        args = {"x": held, "out": place, "order": np.array(node.span, np.int32)}
        if node.values:
            args["gains"] = np.array(node.values, self.target.dtype)
        spec = GatherSpec(self.target, one_channel(layout), bool(node.values))
        self.ops.append(Op(GATHER, spec, args, out.channels, node.name))
