"""Operations over the features of each row, or the channels of maps, as ops: norms, softmax, sums and their kin."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.kernels.attention import ATTENTION, AttentionSpec
from mirrormask.runtime.kernels.base import Kernel, Op
from mirrormask.runtime.kernels.group_norm import GROUP_NORM, GroupNormSpec
from mirrormask.runtime.kernels.layout import Layout
from mirrormask.runtime.kernels.norm import NORM, NormSpec
from mirrormask.runtime.kernels.reduce import REDUCE, ReduceSpec
from mirrormask.runtime.kernels.softmax import SOFTMAX, SoftmaxSpec
from mirrormask.runtime.schedule.places import Places, one_channel
from mirrormask.runtime.schedule.problem import Fused

__all__ = ["Rowwise"]


class Rowwise(Places):
    """Across the features of rows."""

    def _norm(self, node: Node, fused: Fused) -> None:
        features, layout = node.shape[0], one_channel(self._layout(node.name))
        maps = not self.graph.rows and not layout.flat
        spec = NormSpec(self.target, layout, features, maps, node.values[0], node.kind)
        args = {"gain": self._numbers(node.gain, 1.0, features), "shift": self._numbers(node.bias, 0.0, features)}
        self._across(node, NORM, spec, args)

    def _group_norm(self, node: Node, fused: Fused) -> None:
        layout = self._map_layout(node.name)
        x = self._in(node.inputs[0], layout)
        _, place = self._new(node.name, layout)
        each = node.shape[0] // node.groups
        spec = GroupNormSpec(self.target, one_channel(layout), each, node.values[0])
        args = {"x": x, "out": place, "inside": _inside(layout)}
        args |= {"gain": self._numbers(node.gain, 1.0, node.shape[0])}
        args |= {"shift": self._numbers(node.bias, 0.0, node.shape[0])}
        self.ops.append(Op(GROUP_NORM, spec, args, node.groups, node.name))

    def _softmax(self, node: Node, fused: Fused) -> None:
        features, layout = node.shape[0], one_channel(self._layout(node.name))
        maps = not self.graph.rows and not layout.flat
        self._across(node, SOFTMAX, SoftmaxSpec(self.target, layout, features, maps, node.kind == "log_softmax"), {})

    def _reduce(self, node: Node, fused: Fused) -> None:
        features, layout = self._shape(node.inputs[0])[0], one_channel(self._layout(node.name))
        maps = not self.graph.rows and not layout.flat
        self._across(node, REDUCE, ReduceSpec(self.target, layout, features, maps, node.kind), {})

    def _attention(self, node: Node, fused: Fused) -> None:
        layout = self._layout(node.name)
        query, key, value = (self._in(name, self._layout(name)) for name in node.inputs[:3])
        _, place = self._new(node.name, layout)
        masked = len(node.inputs) > 3
        spec = AttentionSpec(
            self.target, one_channel(layout), *node.kernel, node.values[0], node.kind == "causal", masked
        )
        args = {"query": query, "key": key, "value": value, "out": place, "heads": node.groups}
        args["mask"] = self.graph.inputs.index(node.inputs[3]) if masked else 0
        starts = np.array(node.span, np.int32)
        self.ops.append(Op(ATTENTION, spec, {**args, "starts": starts}, node.groups, node.name))

    def _across(self, node: Node, kernel: Kernel, spec: Any, args: dict[str, Any]) -> None:
        layout = self._layout(node.name)
        held = self._in(node.inputs[0], self._layout(node.inputs[0]))
        _, place = self._new(node.name, layout)
        units = 1 if layout.flat else -(-layout.width // layout.lanes)
        if spec.maps:
            units, args = layout.plane // layout.lanes, {**args, "inside": _inside(layout)}
        self.ops.append(Op(kernel, spec, {"x": held, "out": place, **args}, units, node.name))

    def _numbers(self, given: npt.NDArray[np.float32] | None, default: float, features: int) -> npt.NDArray[np.float32]:
        """One number per feature, and as many more as the last vector reads."""
        numbers = np.full(features + self.target.lanes, default, np.float32)
        if given is not None:
            numbers[:features] = given
        return numbers


def _inside(layout: Layout) -> npt.NDArray[np.float32]:
    """1 where a plane holds a number of its map, or a copy of one, and 0 around."""
    plane = np.zeros(layout.plane, np.float32)
    for group in range(-layout.halo, layout.groups + layout.halo):
        for segment in range(layout.segments):
            if 0 <= group + segment * layout.groups < layout.height:
                start = layout.origin + group * layout.pitch + segment * layout.stride
                plane[start : start + layout.width] = 1
    return plane
