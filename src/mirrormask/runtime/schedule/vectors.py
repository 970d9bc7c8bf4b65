"""A linear layer on a single vector: the choices there are for it, and the op that a choice becomes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.machine.jit import host_features
from mirrormask.machine.targets import Target, best_target
from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.graph.levels import are_halves, levels_of
from mirrormask.runtime.kernels import shared, vector
from mirrormask.runtime.kernels.base import Kernel, Op
from mirrormask.runtime.kernels.layout import flat_layout
from mirrormask.runtime.schedule.memory import MARGIN, aligned_array
from mirrormask.runtime.schedule.nonzeros import nonzeros, panels, row_counts, row_parts
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.problem import Alone, Choice, Fused, sampled

__all__ = ["VectorProblem"]

#: Slices per nonzero of a row, in percent, that are tried for shared windows.
SLICES = (120, 130, 150, 175, 200, 250, 300, 400)
#: Groups of rows in a block with shared windows, and vectors of rows in a dense panel, at most.
GROUPS = 8
#: Parts in which a layer with shared windows is packed.
MOST_PARTS = 8


class VectorProblem:
    """A ``linear`` node that takes one row; the counterpart of :class:`mirrormask.runtime.schedule.maps.MapProblem`."""

    def __init__(self, node: Node, fused: Fused, target: Target) -> None:
        assert node.weight is not None
        self.node, self.fused, self.target, self.weight = node, fused, target, node.weight
        self.outputs, self.terms = self.weight.shape

    @property
    def key(self) -> str:
        """What the choice depends on, apart from the processor and where the nonzeros are."""
        kind = " int8" if self.levels is not None else " fp16" if self.halves else ""
        return f"{self.target.name} vector {self.weight.shape} {self.weight.nonzeros}{kind}"

    @cached_property
    def levels(self) -> tuple[list[npt.NDArray[np.int8]], npt.NDArray[np.float32]] | None:
        """The weights as levels of 8 bits in the parts of :func:`nonzeros`, with the outputs' scales, if they are."""
        if self.target.half or self.weight.gaps is None:
            return None
        return levels_of(((position // self.terms, values) for position, values in nonzeros(self.weight)), self.outputs)

    @cached_property
    def halves(self) -> bool:
        """Whether the weights are numbers of half precision, and this processor converts those."""
        if self.target.half or self.weight.gaps is None or self.target != best_target() or self.target.lanes == 1:
            return False
        return (self.target.machine != "x86_64" or "f16c" in host_features()) and are_halves(self.weight.values)

    def candidates(self) -> Iterator[Choice]:
        """The choices worth measuring, best guess first."""
        sparsity, small = self.weight.sparsity, self.terms < 1 << 16  # sparse kernels' indices have 16 bits
        avx512 = self.target.name.startswith("avx512")
        kernel = "shared" if avx512 else "sell"
        found = [Choice("panel")]
        if small and sparsity > 0.4:
            likely = 120 if sparsity < 0.85 else 175 if sparsity < 0.96 else 250
            slices = sorted(SLICES, key=lambda n: abs(n - likely)) if avx512 else [0]
            sparse = [Choice(kernel, block=n) for n in slices]
            found = [*sparse, *found] if sparsity > 0.6 else [*found, *sparse]
            if sparsity > 0.85:
                found.remove(Choice("panel"))
            if self.levels is not None:
                found.insert(0, Choice("levels"))
            elif self.halves:
                found.insert(0, Choice("halves"))
        yield from found

    def op(self, choice: Choice, x: int, out: int) -> Op:
        """The op of a choice, reading ``terms`` numbers at ``x``."""
        kinds = {
            "panel": self._panel,
            "sell": self._sell,
            "levels": self._levels,
            "halves": self._halves,
            "shared": self._shared,
        }
        make = kinds[choice.kernel]
        kernel, spec, args, units, height = make(choice)
        bias = aligned_array(units * height + 64, self.target.dtype)
        if self.node.bias is not None:
            bias[: self.outputs] = self.node.bias
        if "rows" in args:
            bias[: units * height] = bias[args["rows"]]
        args |= {"x": x, "out": out, "bias": bias}
        return Op(kernel, spec, args, units, self.fused.out)

    def direct(self, choice: Choice) -> Choice:
        """``choice``: every kernel here reads what its weights name, and no more."""
        return choice

    def trial(self, choice: Choice) -> Alone:
        """The layer alone, with this choice; of a large one, some outputs."""
        if self._sample is not self:
            return self._sample.trial(choice)
        out = MARGIN + flat_layout(self.terms).size
        numbers = out + flat_layout(self.outputs).size + 4096
        plan = Plan([self.op(choice, MARGIN, out)], numbers, [0], [], 1, self.target.dtype)
        return Alone(plan, slice(MARGIN, MARGIN + self.terms))

    def _panel(self, choice: Choice) -> tuple[Kernel, Any, dict[str, Any], int, int]:
        lanes, weight = self.target.lanes, self.weight
        vectors = min(GROUPS, -(-self.outputs // lanes))
        height = vectors * lanes
        units = -(-self.outputs // height)
        weights = weight.values
        if weight.panel != height or weights.ctypes.data % 64 or weights.dtype != self.target.dtype:
            # (a copied model's arrays lie anywhere)
            weights = aligned_array(units * height * self.terms, self.target.dtype)
            panels(weight, height, weights)
        spec = vector.VectorSpec(self.target, self.fused.activation, vectors)
        return vector.PANEL, spec, {"weights": weights, "terms": self.terms}, units, height

    def _sell(self, choice: Choice) -> tuple[Kernel, Any, dict[str, Any], int, int]:
        lanes = self.target.lanes
        parts = ((*np.divmod(position, self.terms), values) for position, values in nonzeros(self.weight))
        args = vector.pack_sell(row_counts(self.weight), parts, lanes, self._array)
        units = len(args["rows"]) // lanes
        return vector.SELL, vector.VectorSpec(self.target, self.fused.activation), args, units, lanes

    def _halves(self, choice: Choice) -> tuple[Kernel, Any, dict[str, Any], int, int]:
        lanes = self.target.lanes
        parts = ((*np.divmod(position, self.terms), values) for position, values in nonzeros(self.weight))
        counts = row_counts(self.weight)
        args = vector.pack_sell(counts, parts, lanes, lambda size: aligned_array(max(1, size), np.dtype(np.float16)))
        spec = vector.VectorSpec(self.target, self.fused.activation, weights="fp16")
        return vector.SELL, spec, args, len(args["rows"]) // lanes, lanes

    def _levels(self, choice: Choice) -> tuple[Kernel, Any, dict[str, Any], int, int]:
        assert self.levels is not None
        lanes, (found, scales) = self.target.lanes, self.levels
        places = (np.divmod(position, self.terms) for position, _ in nonzeros(self.weight) if len(position))
        parts = ((row, column, level) for (row, column), level in zip(places, found, strict=True))
        counts = row_counts(self.weight)
        args = vector.pack_sell(counts, parts, lanes, lambda size: aligned_array(max(1, size), np.dtype(np.int8)))
        units = len(args["rows"]) // lanes
        each = aligned_array(units * lanes + 64, np.dtype(np.float32))
        each[: self.outputs] = scales
        each[: units * lanes] = each[args["rows"]]
        spec = vector.VectorSpec(self.target, self.fused.activation, weights="int8")
        return vector.SELL, spec, {**args, "scales": each}, units, lanes

    def _shared(self, choice: Choice) -> tuple[Kernel, Any, dict[str, Any], int, int]:
        lanes = self.target.lanes
        packed = shared.packed(self.target)
        groups = min(GROUPS, -(-self.outputs // lanes // packed) * packed)
        height = groups * lanes
        slices = choice.block / 100
        sizes = shared.slices_of(row_counts(self.weight), height, slices)
        # Few parts: packing goes step by step through the inputs of all rows of a part at once.
        parts = (shared.pack(rows, lanes, groups, slices) for _, rows in row_parts(self.weight, height, MOST_PARTS))
        args: dict[str, Any] = shared.joined(parts, sizes, height, self._array)
        args["terms"] = self.terms
        return (
            shared.SHARED,
            shared.SharedSpec(self.target, self.fused.activation, groups),
            args,
            (-(-self.outputs // height)),
            height,
        )

    def _array(self, size: int) -> npt.NDArray[Any]:
        """Zeros of the kind that kernels read."""
        return aligned_array(max(1, size), self.target.dtype)

    @cached_property
    def _sample(self) -> VectorProblem:
        """What is measured, see :func:`sampled`."""
        node = sampled(self.node)
        return self if node is self.node else VectorProblem(node, self.fused, self.target)
