"""One layer to be run: the choices there are for it, and the op that a choice becomes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from mirrormask.machine.targets import Target
from mirrormask.runtime import filtering
from mirrormask.runtime.geometry import Geometry
from mirrormask.runtime.graph import Node
from mirrormask.runtime.kernels import dense
from mirrormask.runtime.kernels.sparse import SparseSpec
from mirrormask.runtime.kernels.tile import Tile
from mirrormask.runtime.kernels.winograd import WinogradSpec
from mirrormask.runtime.layout import Layout
from mirrormask.runtime.native import aligned_array
from mirrormask.runtime.pack import Stream, offsets_of, pack
from mirrormask.runtime.plan import Op

__all__ = ["Choice", "Fused", "Problem"]


@dataclass(frozen=True)
class Choice:
    """How a layer runs.

    Attributes:
        kernel: ``aligned``, ``direct`` (sparse, unaligned loads), ``dense``, ``winograd`` (dense) or, for one vector,
            ``shared``, ``sell`` or ``panel`` (dense).
        rows, vectors: the tile.
        block: input planes per block (sparse), output channels per group (``dense``, ``winograd``), or slices per
            nonzero of a row in percent (``shared``).
    """

    kernel: str
    rows: int = 1
    vectors: int = 1
    block: int = 1


@dataclass(frozen=True)
class Fused:
    """What follows a layer and is computed as it stores: a tensor to add, an activation, and the value's final name."""

    out: str
    residual: str = ""
    activation: str = ""


class Problem:
    """One layer to be run: what a tuner needs to build candidates for it, and to measure them."""

    def __init__(self, node: Node, geometry: Geometry, out: Layout, fused: Fused, target: Target, threads: int) -> None:
        self.node, self.geometry, self.out, self.fused = node, geometry, out, fused
        self.target, self.threads = target, threads
        self._streams: dict[tuple[Layout, bool, int], Stream] = {}

    @property
    def key(self) -> str:
        """What the choice depends on, apart from the processor and the layer's nonzeros."""
        weight = self.node.weight
        assert weight is not None
        return (
            f"{self.target.name} {self.geometry.source} {self.geometry.out} k{self.node.kernel} s{self.node.stride} "
            f"g{self.node.groups} r{int(bool(self.fused.residual))} {weight.nonzeros}"
        )

    def input_layout(self, choice: Choice) -> Layout:
        """The layout that a choice reads."""
        lanes = self.target.lanes
        return self.geometry.aligned_layout(lanes) if choice.kernel == "aligned" else self.geometry.direct_layout(lanes)

    def between(self, choice: Choice, x: Layout) -> Layout | None:
        """The layout of what a choice computes before its result, if anything."""
        if choice.kernel != "winograd":
            return None
        return filtering.filtered_layout(self.geometry, x, self.target, choice.rows)

    def ops(
        self, choice: Choice, x: Layout, place: int, out_place: int, residual_place: int, between_place: int
    ) -> list[Op]:
        """The ops of a choice, reading ``x`` at ``place``; the last one writes the result."""
        if choice.kernel != "winograd":
            return [self._op(choice, x, place, out_place, residual_place)]
        spec = filtering.transform_spec(self.geometry, x, self.target, choice.rows)
        inputs = self.geometry.source[0]
        args = {"x": place + x.origin, "out": between_place}
        transform = Op("transform", spec, args, inputs, self.fused.out)
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
        weight, outputs = self.node.weight, self.geometry.out[0]
        assert weight is not None
        bias = aligned_array(outputs + 64, self.target.dtype)
        if self.node.bias is not None:
            bias[:outputs] = self.node.bias
        args["bias"] = bias
        if choice.kernel == "dense":
            offsets, base = offsets_of(self.geometry, x)
            packed = dense.pack(weight.dense().reshape(outputs, -1), choice.block).astype(self.target.dtype)
            args |= {
                "x": place + base,
                "weights": packed,
                "offsets": offsets,
                "terms": len(offsets),
                "channels": outputs,
            }
            spec: Any = dense.DenseSpec(self.target, tile, choice.block)
            return Op("dense", spec, args, -(-outputs // choice.block), self.fused.out)
        if choice.kernel == "winograd":
            transform = filtering.transform_spec(self.geometry, x, self.target, choice.rows)
            args |= {"x": place + self.geometry.left, "channels": outputs}
            args |= filtering.pack(self.geometry, weight, transform, choice.block)
            spec = WinogradSpec(self.target, replace(tile, pitch=transform.step), choice.block, transform.taps)
            return Op("winograd", spec, args, -(-outputs // choice.block), self.fused.out)
        stream = self._stream(x, choice)
        args |= {
            "x": place + stream.base,
            "weights": stream.weights.astype(self.target.dtype),
            "offsets": stream.offsets,
            "starts": stream.starts,
            "order": stream.order,
            "blocks": stream.blocks,
            "block_stride": choice.block * x.plane,
            "channels": outputs,
        }
        spec = SparseSpec(self.target, tile, stream.columns, choice.kernel == "aligned", stream.short)
        return Op("sparse", spec, args, outputs, self.fused.out, stream.bounds)

    def _stream(self, x: Layout, choice: Choice) -> Stream:
        """The packed weight, which choices that differ in their tile share: packing takes longer than measuring."""
        assert self.node.weight is not None
        aligned = choice.kernel == "aligned"
        key = (x, aligned, choice.block)
        if key not in self._streams:
            self._streams[key] = pack(
                self.geometry,
                self.node.weight,
                self.node.groups,
                x,
                aligned=aligned,
                block_planes=choice.block,
                threads=self.threads,
            )
        return self._streams[key]
