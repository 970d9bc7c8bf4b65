"""A linear layer on a single vector: the choices there are for it, and the op that a choice becomes."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.machine.jit import host_features
from mirrormask.machine.targets import Target, best_target
from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.graph.levels import are_halves, levels_of
from mirrormask.runtime.kernels import shared, tables, vector
from mirrormask.runtime.kernels.base import Kernel, Op
from mirrormask.runtime.kernels.layout import flat_layout
from mirrormask.runtime.schedule.memory import MARGIN, aligned_array
from mirrormask.runtime.schedule.nonzeros import nonzeros, panels, row_counts, row_parts
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.problem import Alone, Choice, Fused, sampled

__all__ = ["VectorProblem"]

Ints = npt.NDArray[np.int64]

#: Slices per nonzero of a row, in percent, that are tried for shared windows.
SLICES = (120, 130, 150, 175, 200, 250, 300, 400)
#: Groups of rows in a block with shared windows, and vectors of rows in a dense panel, at most.
GROUPS = 8
#: The sparsity from which on loading inputs one by one is a better guess than tables of them.
FEW = 0.965
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
            narrow = "levels" if self.levels is not None else "halves" if self.halves else ""
            if narrow:
                found.insert(0, Choice(narrow))
            if tables.serves(self.target):
                # Best where nonzeros lie close to each other; with AVX-512 (not measured) after windows of more inputs.
                names = [f"tables {narrow}", "tables"] if narrow else ["tables"]
                first = sparsity > 0.6 and (narrow or not avx512)
                at = 0 if first and sparsity < FEW else 1 if first else len(found)
                found[at:at] = [Choice(name) for name in names]
        yield from found

    def op(self, choice: Choice, x: int, out: int) -> Op:
        """The op of a choice, reading ``terms`` numbers at ``x``."""
        kinds = {
            "panel": self._panel,
            "sell": self._sell,
            "levels": self._sell,
            "halves": self._sell,
            "tables": self._tables,
            "tables levels": self._tables,
            "tables halves": self._tables,
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
        stored, lanes = _stored(choice), self.target.lanes
        args = vector.pack_sell(row_counts(self.weight), self._parts(stored), lanes, partial(self._zeros, stored))
        return self._in_groups(vector.SELL, stored, args, lanes)

    def _tables(self, choice: Choice) -> tuple[Kernel, Any, dict[str, Any], int, int]:
        stored = _stored(choice)
        parts, zeros = partial(self._parts, stored), partial(self._zeros, stored)
        args = tables.pack(row_counts(self.weight), parts, self.terms, zeros)
        return self._in_groups(tables.TABLES, stored, args, tables.LANES)

    def _in_groups(
        self, kernel: Kernel, stored: str, args: dict[str, Any], lanes: int
    ) -> tuple[Kernel, Any, dict[str, Any], int, int]:
        """What :meth:`op` wants of a kernel that takes so many sorted rows at a time."""
        units = len(args["rows"]) // lanes
        args["terms"] = self.terms
        if stored == "int8":
            assert self.levels is not None
            each = aligned_array(units * lanes + 64, np.dtype(np.float32))
            each[: self.outputs] = self.levels[1]
            each[: units * lanes] = each[args["rows"]]
            args["scales"] = each
        return kernel, vector.VectorSpec(self.target, self.fused.activation, weights=stored), args, units, lanes

    def _parts(self, stored: str) -> Iterator[tuple[Ints, Ints, npt.NDArray[Any]]]:
        """Row, column and value of the nonzeros, or their levels, a part at a time."""
        found = iter(self.levels[0]) if stored == "int8" and self.levels is not None else None
        for position, values in nonzeros(self.weight):
            if len(position):
                row, column = np.divmod(position, self.terms)
                yield row, column, values if found is None else next(found)

    def _zeros(self, stored: str, size: int) -> npt.NDArray[Any]:
        """Room for so many weights."""
        narrow: dict[str, np.dtype[Any]] = {"int8": np.dtype(np.int8), "fp16": np.dtype(np.float16)}
        return aligned_array(max(1, size), narrow.get(stored, self.target.dtype))

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


def _stored(choice: Choice) -> str:
    """What a choice's weights are stored as."""
    return {"levels": "int8", "halves": "fp16"}.get(choice.kernel.rpartition(" ")[2], "fp32")
