"""One layer to be run: the choices there are for it, and the op that a choice becomes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.kernels import dense
from mirrormask.runtime.kernels.base import Op
from mirrormask.runtime.kernels.dense import DENSE
from mirrormask.runtime.kernels.layout import Layout, map_layout
from mirrormask.runtime.kernels.sparse import SPARSE, SparseSpec
from mirrormask.runtime.kernels.tile import Tile
from mirrormask.runtime.kernels.winograd import TRANSFORM, WINOGRAD, WinogradSpec
from mirrormask.runtime.schedule import filtering
from mirrormask.runtime.schedule.memory import Memory, aligned_array
from mirrormask.runtime.schedule.nonzeros import panels
from mirrormask.runtime.schedule.pack import Stream, offsets_of, pack
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.problem import Alone, Choice, Fused, sampled
from mirrormask.runtime.schedule.taps import Taps
from mirrormask.runtime.schedule.tiles import MapLayer, map_candidates

__all__ = ["MapProblem"]

#: Bytes of packed weights that a problem keeps for other tiles.
MOST_KEPT = 1 << 23


class MapProblem:
    """One layer to be run: what a tuner needs to build candidates for it, and to measure them."""

    def __init__(self, node: Node, taps: Taps, out: Layout, fused: Fused, target: Target, threads: int) -> None:
        self.node, self.taps, self.out, self.fused = node, taps, out, fused
        self.target, self.threads = target, threads
        self._streams: dict[tuple[Layout, bool, int], Stream] = {}

    @property
    def key(self) -> str:
        """What the choice depends on, apart from the processor and the layer's nonzeros."""
        weight = self.node.weight
        assert weight is not None
        return (
            f"{self.target.name} {self.taps.source} {self.taps.out} k{self.node.kernel} s{self.node.stride} "
            f"g{self.node.groups} r{int(bool(self.fused.residual))} {weight.nonzeros}"
        )

    def input_layout(self, choice: Choice) -> Layout:
        """The layout that a choice reads."""
        lanes = self.target.lanes
        return self.taps.aligned_layout(lanes) if choice.kernel == "aligned" else self.taps.direct_layout(lanes)

    def between(self, choice: Choice, x: Layout) -> Layout | None:
        """The layout of what a choice computes before its result, if anything."""
        if choice.kernel != "winograd":
            return None
        return filtering.filtered_layout(self.taps, x, self.target, choice.rows)

    def ops(
        self, choice: Choice, x: Layout, place: int, out_place: int, residual_place: int, between_place: int
    ) -> list[Op]:
        """The ops of a choice, reading ``x`` at ``place``; the last one writes the result."""
        if choice.kernel != "winograd":
            return [self._op(choice, x, place, out_place, residual_place)]
        spec = filtering.transform_spec(self.taps, x, self.target, choice.rows)
        inputs = self.taps.source[0]
        args = {"x": place + x.origin, "out": between_place}
        transform = Op(TRANSFORM, spec, args, inputs, self.fused.out)
        return [transform, self._op(choice, x, between_place, out_place, residual_place)]

    def _op(self, choice: Choice, x: Layout, place: int, out_place: int, residual_place: int) -> Op:
        tile = Tile(
            choice.rows,
            choice.vectors,
            replace(self.out, channels=1),
            x.pitch,
            self.fused.activation,
            bool(self.fused.residual),
        )
        origin = self.out.origin
        args: dict[str, Any] = {"out": out_place + origin, "residual": residual_place + origin}
        weight, outputs = self.node.weight, self.taps.out[0]
        assert weight is not None
        bias = aligned_array(outputs + 64, self.target.dtype)
        if self.node.bias is not None:
            bias[:outputs] = self.node.bias
        args["bias"] = bias
        if choice.kernel == "dense":
            offsets, base = offsets_of(self.taps, x)
            groups = -(-outputs // choice.block)
            packed = np.zeros(groups * len(offsets) * choice.block, self.target.dtype)
            panels(weight, choice.block, packed)
            args |= {
                "x": place + base,
                "weights": packed,
                "offsets": offsets,
                "terms": len(offsets),
                "channels": outputs,
            }
            spec: Any = dense.DenseSpec(self.target, tile, choice.block)
            return Op(DENSE, spec, args, groups, self.fused.out)
        if choice.kernel == "winograd":
            transform = filtering.transform_spec(self.taps, x, self.target, choice.rows)
            args |= {"x": place + self.taps.left, "channels": outputs}
            args |= filtering.pack(self.taps, weight, transform, choice.block)
            spec = WinogradSpec(self.target, replace(tile, pitch=transform.step), choice.block, transform.taps)
            return Op(WINOGRAD, spec, args, -(-outputs // choice.block), self.fused.out)
        stream = self._stream(x, choice)
        args |= {
            "x": place + stream.base,
            "weights": stream.weights.astype(self.target.dtype, copy=False),
            "offsets": stream.offsets,
            "starts": stream.starts,
            "order": stream.order,
            "blocks": stream.blocks,
            "block_stride": choice.block * x.plane,
            "channels": outputs,
        }
        spec = SparseSpec(self.target, tile, stream.columns, choice.kernel == "aligned", stream.short)
        return Op(SPARSE, spec, args, outputs, self.fused.out, stream.bounds)

    def _stream(self, x: Layout, choice: Choice) -> Stream:
        """The packed weight, which choices that differ in their tile share: packing takes longer than measuring.

        Those of large layers are not all kept: beside the trials that are still in the race, they would be most of what
        a build takes.
        """
        assert self.node.weight is not None
        aligned = choice.kernel == "aligned"
        key = (x, aligned, choice.block)
        if key not in self._streams:
            self._streams[key] = pack(
                self.taps,
                self.node.weight,
                self.node.groups,
                x,
                aligned=aligned,
                block_planes=choice.block,
                threads=self.threads,
            )
        stream = self._streams[key]
        while sum(kept.nbytes for kept in self._streams.values()) > MOST_KEPT:
            self._streams.pop(next(iter(self._streams)))
        return stream

    def candidates(self) -> Iterator[Choice]:
        """The choices worth measuring, best guess first."""
        weight = self.node.weight
        assert weight is not None
        layer = MapLayer(self.taps, weight, self.node.groups, self.out, self._unshared, self.target)
        yield from map_candidates(layer)

    def direct(self, choice: Choice) -> Choice:
        """``choice``, or the best guess of those that do not filter rows."""
        return next(c for c in (choice, *self.candidates()) if c.kernel != "winograd")

    @property
    def _unshared(self) -> Layout:
        """The output's layout, or one without shared vectors for kernels that cannot fill those."""
        if self.out.segments == 1:
            return self.out
        return map_layout(*self.taps.out, self.target.lanes, halo=0, gap=1)

    def trial(self, choice: Choice) -> Alone:
        """The layer alone, with this choice; of a large one, some outputs."""
        if self._sample is not self:
            return self._sample.trial(choice)
        out = self.out if choice.kernel == "aligned" else self._unshared
        problem = self.into(out)
        x = problem.input_layout(choice)
        between = problem.between(choice, x)
        memory = Memory()
        places = [0 if layout is None else memory.take(layout) for layout in (x, out, out, between)]
        ops = problem.ops(choice, x, *places)
        for op in ops:
            op.bounds = (0, op.units)
        plan = Plan(ops, memory.size + 4096, [0], [], 1, self.target.dtype)
        # A layout of its own costs a copy; strided layers copy with every choice.
        copies = choice.kernel != "aligned" and self.taps.stride == (1, 1)
        return Alone(plan, slice(places[0], places[0] + x.size), x.size * 4 / 1e10 if copies else 0.0)

    def into(self, out: Layout) -> MapProblem:
        """The same layer, into another layout."""
        if out == self.out:
            return self
        return MapProblem(self.node, self.taps, out, self.fused, self.target, self.threads)

    def over(self, taps: Taps) -> MapProblem:
        """The same layer, of other maps."""
        return MapProblem(self.node, taps, self.out, self.fused, self.target, self.threads)

    @cached_property
    def _sample(self) -> MapProblem:
        """What is measured, see :func:`sampled`."""
        node = sampled(self.node)
        if node is self.node:
            return self
        taps = replace(self.taps, out=(node.shape[0], *self.taps.out[1:]))
        out = replace(self.out, channels=node.shape[0])
        return MapProblem(node, taps, out, self.fused, self.target, self.threads)
