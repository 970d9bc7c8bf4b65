"""The state of a recurrent layer, and its steps from moment to moment, as ops."""

from __future__ import annotations

from dataclasses import replace

from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.kernels.layout import flat_layout
from mirrormask.runtime.kernels.moments import MOMENT, MomentSpec
from mirrormask.runtime.schedule.places import Places, Value
from mirrormask.runtime.schedule.plan import State
from mirrormask.runtime.schedule.problem import Fused

__all__ = ["Moments"]


class Moments(Places):
    """Items are moments; the state lies in the plan's memory, which no other value gets."""

    state: State | None = None

    def _state(self, node: Node, fused: Fused) -> None:
        layout, (features,) = self._layout(node.name), node.span
        whole = flat_layout(features) if layout.flat else replace(layout, channels=features)
        place = self.memory.take(whole, len(self.ops))
        self.values[node.name] = Value(self._shape(node.name), {layout: place}, borrowed={layout})
        self.state = State(place, features, 1 if layout.flat else layout.plane, self.tokens)

    def _moments(self, node: Node, fused: Fused) -> None:
        assert self.state is not None
        pre, past, before = node.inputs
        layout = self._layout(before)
        width = self.nodes[before].shape[0] * layout.plane
        args = {name: self._in(value, self._layout(value)) for name, value in (("pre", pre), ("past", past))}
        units, place = -(-width // self.target.lanes), self.state.place
        spec = MomentSpec(self.target, node.kind, width % self.target.lanes != 0)
        self.ops.append(Op(MOMENT, spec, {**args, "state": place, "width": width}, units, node.name))
        made = self._layout(node.name)
        self.values[node.name] = Value(self._shape(node.name), {made: place}, borrowed={made})
