"""What a fused update consists of, and the LLVM IR around its loop body."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from torch import Tensor

from mirrormask.fused.team import TEAM
from mirrormask.geometry import Geometry
from mirrormask.geometry.base import steps_like
from mirrormask.momentum import momentum_buffer

if TYPE_CHECKING:
    from mirrormask.fused.table import Table
    from mirrormask.optimizer import SparseOptimizer

__all__ = ["SNAP", "STATE_SNAP", "Update", "float_literal"]

#: Latents below this are set to zero, so that no product of two of them, and no weight, is a denormal number (which
#: a processor computes up to a hundred times slower): x = m w stays at or above 2**-126, the least normal float32.
SNAP = 2.0**-63
#: State of the base optimizer (momentum, say) below this is set to zero: it could not move a latent any more.
STATE_SNAP = 2.0**-100

#: The loop over one piece. No two of its arrays overlap (noalias), so LLVM turns it into vector code by itself.
PIECE = """
declare float @llvm.fma.f32(float, float, float)
declare float @llvm.fabs.f32(float)
declare float @llvm.rint.f32(float)
declare float @llvm.minnum.f32(float, float)
declare float @llvm.maxnum.f32(float, float)

define internal void @{name}_piece({parameters}) noinline {{
entry:
  br label %head
head:
  %i = phi i64 [0, %entry], [%next, %body]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %done
body:
{body}
  %next = add nuw nsw i64 %i, 1
  br label %head
done:
  ret void
}}
"""

#: Whether an array holds an infinity or a NaN: a magnitude whose exponent has all bits set.
CHECK = """
define internal void @{name}_check_piece(ptr noalias %grad, i64 %count, ptr noalias %bad) noinline {{
entry:
  br label %head
head:
  %i = phi i64 [0, %entry], [%next, %body]
  %any = phi i32 [0, %entry], [%any.1, %body]
  %more = icmp slt i64 %i, %count
  br i1 %more, label %body, label %done
body:
  %p = getelementptr i32, ptr %grad, i64 %i
  %bits = load i32, ptr %p
  %magnitude = and i32 %bits, 2147483647
  %is = icmp uge i32 %magnitude, 2139095040
  %one = zext i1 %is to i32
  %any.1 = or i32 %any, %one
  %next = add nuw nsw i64 %i, 1
  br label %head
done:
  store i32 %any, ptr %bad
  ret void
}}
"""

#: The loop over the rows of a table.
TABLE = """
define void @{name}(ptr %rows, i64 %total) {{
entry:
  br label %head
head:
  %r = phi i64 [0, %entry], [%next, %body]
  %more = icmp slt i64 %r, %total
  br i1 %more, label %body, label %done
body:
  %offset = mul i64 %r, {row_size}
  %row = getelementptr i8, ptr %rows, i64 %offset
{loads}
  call void @{name}_piece({arguments})
  %next = add i64 %r, 1
  br label %head
done:
  ret void
}}
"""


class Update(ABC):
    """The update of one geometry under SGD: its arrays, its numbers and its loop body."""

    #: A name for symbols.
    name: ClassVar[str]
    #: Whose update it is.
    geometry: ClassVar[type[Geometry]]
    #: The arrays: x, its gradient, then the latents and their momenta, ``"b" + latent``.
    arrays: ClassVar[tuple[str, ...]]
    #: The numbers of a piece beside ``lr`` (that of the latents) and ``momentum``.
    numbers: ClassVar[tuple[str, ...]]
    #: The latents that are stepped; none where x is stepped itself.
    latents: ClassVar[tuple[str, ...]] = ()

    def serves(self, geometry: Geometry) -> bool:
        """Whether this is the update of a geometry: :attr:`geometry`, or what changes nothing of its step."""
        return steps_like(geometry, self.geometry)

    @abstractmethod
    def body(self, *, nesterov: bool, masked: bool) -> str:
        """The IR that updates element ``%i``."""

    @abstractmethod
    def fill(self, table: Table, optimizer: SparseOptimizer) -> None:
        """Put :attr:`numbers` into the table's rows for this step."""

    def masks(self, optimizer: SparseOptimizer) -> list[Tensor] | None:
        """The masks that the loop must apply, one a weight; None for none."""
        return None

    def row(self) -> np.dtype[Any]:
        """One row a piece: where the arrays are, how long they are, and the numbers of the update."""
        return np.dtype(
            [(name, np.int64) for name in (*self.arrays, "mask", "count")]
            + [(name, np.float32) for name in ("lr", "momentum", *self.numbers)]
            + [("bad", np.int32)]
        )

    def tensors(self, optimizer: SparseOptimizer, parameters: list[Tensor]) -> dict[str, list[Tensor]]:
        """The arrays that stay where they are between steps, each with a tensor for each of the parameters."""
        found = {"x": parameters}
        for name in self.latents or ("x",):
            held = [optimizer.state[p][name] for p in parameters] if self.latents else parameters
            found[name] = held
            found["b" + name] = [momentum_buffer(optimizer, tensor) for tensor in held]
        return found

    def ir(self, name: str, *, nesterov: bool, masked: bool) -> str:
        """LLVM IR of the function ``name(rows, count)``, the update of every element of every row of a table.

        ``name_check(rows, count)`` sets ``bad`` of each row to whether its gradient is not all finite.
        ``name_team(task)`` and ``name_check_team(task)`` are what a thread of a team does of it, see
        :data:`mirrormask.fused.team.TEAM`.
        """
        kind = self.row()
        fields: Mapping[str, Any] = kind.fields or {}
        kinds = {field: "float" if entry[0] == np.float32 else "i64" for field, entry in fields.items()}
        kinds.update(dict.fromkeys((*self.arrays, "mask"), "ptr"))
        del kinds["bad"]
        loads = {
            field: f"  %{field}.p = getelementptr i8, ptr %row, i64 {fields[field][1]}\n"
            f"  %{field} = load {of}, ptr %{field}.p"
            for field, of in kinds.items()
        }
        bad = f"  %bad = getelementptr i8, ptr %row, i64 {fields['bad'][1]}"
        parameters = ", ".join(f"{of}{' noalias' * (of == 'ptr')} %{field}" for field, of in kinds.items())
        arguments = ", ".join(f"{of} %{field}" for field, of in kinds.items())
        size = kind.itemsize
        return "\n".join(
            (
                PIECE.format(name=name, parameters=parameters, body=self.body(nesterov=nesterov, masked=masked)),
                TABLE.format(name=name, row_size=size, loads="\n".join(loads.values()), arguments=arguments),
                TEAM.format(name=name, row_size=size),
                CHECK.format(name=name),
                TABLE.format(
                    name=f"{name}_check",
                    row_size=size,
                    loads="\n".join((loads["grad"], loads["count"], bad)),
                    arguments="ptr %grad, i64 %count, ptr %bad",
                ),
                TEAM.format(name=f"{name}_check", row_size=size),
            )
        )


def float_literal(value: float) -> str:
    """A float as LLVM writes it: the hexadecimal digits of the double that it is exactly."""
    return f"0x{np.float64(np.float32(value)).view(np.uint64):016X}"
