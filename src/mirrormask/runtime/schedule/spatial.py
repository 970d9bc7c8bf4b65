"""Operations that change the size of maps as ops: pools, padding, crops, interpolation, and flattening."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.kernels.activation import Activation
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.kernels.elementwise import ELEMENTWISE, ElementwiseSpec
from mirrormask.runtime.kernels.layout import flat_layout
from mirrormask.runtime.kernels.pool import MEAN, POOL, MeanSpec, PoolSpec
from mirrormask.runtime.kernels.relayout import RELAYOUT, RelayoutSpec, plain_layout
from mirrormask.runtime.kernels.resample import RESAMPLE, ResampleSpec
from mirrormask.runtime.kernels.windows import WINDOWS, WindowsSpec
from mirrormask.runtime.schedule.places import Places, as_map, one_channel
from mirrormask.runtime.schedule.problem import Fused
from mirrormask.runtime.schedule.sampling import picks, windows

__all__ = ["Spatial"]


class Spatial(Places):
    """Maps of other sizes."""

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
            one_channel(source),
            one_channel(out),
            node.kernel,
            node.stride,
            node.padding,
            node.kind == "mean",
            node.count_padding,
        )
        self.ops.append(Op(POOL, spec, {"x": x, "out": place}, out.channels, node.name))

    def _adaptive(self, node: Node, fused: Fused) -> None:
        """An ordinary pool where all windows have one size."""
        source, shape = as_map(self._shape(node.inputs[0])), as_map(self._shape(node.name))
        if source == shape and source[1:] != (1, 1):
            self.alias[node.name] = self._resolve(node.inputs[0])
        elif source[1] % shape[1] or source[2] % shape[2] or max(source[1:]) > 64 or shape[1:] == (1, 1):
            self._windows(node)
        else:
            step = (source[1] // shape[1], source[2] // shape[2])
            self._pool(replace(node, kernel=step, stride=step), fused)

    def _windows(self, node: Node) -> None:
        source, shape = self._map_layout(node.inputs[0]), as_map(self._shape(node.name))
        x = self._in(node.inputs[0], source)
        out, place = self._new(node.name)
        if out.flat:
            out = plain_layout(*shape)
        args = windows(node, (source.height, source.width), shape[1:], self.target.dtype)
        spec = WindowsSpec(self.target, one_channel(source), one_channel(out), node.kind == "mean")
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
        spec = ResampleSpec(self.target, one_channel(source), one_channel(out), "row_weight" in args, fill)
        self.ops.append(Op(RESAMPLE, spec, {"x": x, "out": place, **args}, out.channels, node.name))

    def _mean(self, node: Node, fused: Fused) -> None:
        source = self._map_layout(node.inputs[0])
        x = self._in(node.inputs[0], source)
        flat, place = self._new(node.name, flat_layout(node.shape[0]))
        spec = MeanSpec(self.target, one_channel(source), node.kind == "norm")
        self.ops.append(Op(MEAN, spec, {"x": x, "out": place}, flat.channels, node.name))
        if node.kind == "sum":
            count = Activation("affine", (float(source.height * source.width), 0.0))
            args, units = {"x": place, "other": place, "out": place}, -(-flat.channels // self.target.lanes)
            self.ops.append(Op(ELEMENTWISE, ElementwiseSpec(self.target, "", (count,)), args, units, node.name))

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
        spec = RelayoutSpec(self.target, one_channel(layout), one_channel(self._plain(before)), False, False)
        self.ops.append(Op(RELAYOUT, spec, {"x": held, "out": place}, layout.channels, node.name))
