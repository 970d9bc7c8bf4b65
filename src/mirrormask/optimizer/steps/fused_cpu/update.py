"""What a fused update consists of, and the LLVM IR around its loop body."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mirrormask.geometry import Geometry
from mirrormask.geometry.base import steps_like
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.steps.base import Now
from mirrormask.optimizer.steps.fused_cpu.rounding import KEYS, RANDOM, load_narrow, store_narrow
from mirrormask.optimizer.steps.fused_cpu.stream import STREAMED_PIECE, block_fields
from mirrormask.optimizer.steps.fused_cpu.team import TEAM
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["Rows", "Update", "float_literal"]

#: The loop over one block. No two of its arrays overlap (noalias), so LLVM turns it into vector code by itself.
BLOCK = """
declare float @llvm.fma.f32(float, float, float)
declare float @llvm.fabs.f32(float)
declare float @llvm.rint.f32(float)

define internal void @{name}_block({parameters}) noinline {{
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

#: A piece whose x is written as it comes.
PIECE = """
define internal void @{name}_piece({parameters}, i64 %stream) {{
entry:
  call void @{name}_block({arguments})
  ret void
}}
"""

#: Whether an array holds an infinity or a NaN: a magnitude whose exponent has all bits set.
CHECK = """
define internal void @{name}_check_piece(ptr noalias %grad, i64 %count, ptr noalias %bad, i64 %stream) noinline {{
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

#: What generated code is given: addresses, and how many parameters and shares there are. ``arrays`` holds the addresses
#: of the parameters' arrays, one array after the other; ``numbers`` their numbers alike; ``pieces`` which parameter,
#: first element and count each piece is; ``bad`` takes a flag a piece; ``bounds`` has the first piece of each share;
#: ``stream`` is 1 where x is written past the caches.
TASK = ("arrays", "numbers", "pieces", "bad", "parameters", "bounds", "shares", "thread_num", "num_threads", "stream")
#: What a piece and a block are given at the end: of how many elements, the first of which is which of its parameter.
PLACE = (("i64", "count"), ("i64", "first"))
#: Those of them that are not addresses.
COUNTS = ("parameters", "shares", "stream")

#: The loop over the pieces [first, last) of a table.
TABLE = """
define void @{name}(ptr %task, i64 %from, i64 %to) {{
entry:
{loads}
  br label %head
head:
  %r = phi i64 [%from, %entry], [%next, %body]
  %more = icmp slt i64 %r, %to
  br i1 %more, label %body, label %done
body:
  %place = mul i64 %r, 3
  %of.p = getelementptr i64, ptr %pieces, i64 %place
  %of = load i64, ptr %of.p
  %first.p = getelementptr i64, ptr %of.p, i64 1
  %first = load i64, ptr %first.p
  %count.p = getelementptr i64, ptr %of.p, i64 2
  %count = load i64, ptr %count.p
  %bad.r = getelementptr i32, ptr %bad, i64 %r
{fields}
  call void @{name}_piece({arguments}, i64 %stream)
  %next = add i64 %r, 1
  br label %head
done:
  ret void
}}
"""
#: One array or number of a piece, the ``{index}``-th of its kind.
ARRAY = """
  %{field}.i = mul i64 %parameters, {index}
  %{field}.j = add i64 %{field}.i, %of
  %{field}.p = getelementptr i64, ptr %arrays, i64 %{field}.j
  %{field}.0 = load ptr, ptr %{field}.p
  %{field} = getelementptr {element}, ptr %{field}.0, i64 %first"""
NUMBER = """
  %{field}.i = mul i64 %parameters, {index}
  %{field}.j = add i64 %{field}.i, %of
  %{field}.p = getelementptr float, ptr %numbers, i64 %{field}.j
  %{field} = load float, ptr %{field}.p"""


class Rows(NamedTuple):
    """What an update steps: parameters of the model, and the parameter group of each."""

    parameters: Sequence[Tensor]
    groups: Sequence[int]


class Update(ABC):
    """The update of one geometry under SGD: its arrays, its numbers and its loop body.

    Args:
        narrow: whether momenta are kept in bfloat16, see :mod:`mirrormask.optimizer.steps.fused_cpu.rounding`.
    """

    #: A name for symbols.
    name: ClassVar[str]
    #: Whose update it is.
    geometry: ClassVar[type[Geometry]]
    #: The arrays: x, its gradient, then the latents and their momenta, ``"b" + latent``, which SGD without momentum has
    #: not.
    arrays: ClassVar[tuple[str, ...]]
    #: The numbers of a piece beside ``lr`` (that of the latents) and ``momentum``.
    numbers: ClassVar[tuple[str, ...]]
    #: The latents that are stepped; none where x is stepped itself.
    latents: ClassVar[tuple[str, ...]] = ()
    #: Whether x is only written, and so may be written past the caches.
    streams: ClassVar[bool] = False
    #: Whether it snaps latents and momenta to zero in every step.
    snaps: ClassVar[bool] = False

    def __init__(self, *, narrow: bool = False) -> None:
        self.narrow = narrow

    def serves(self, geometry: Geometry) -> bool:
        """Whether this is the update of a geometry: :attr:`geometry`, or what changes nothing of its step."""
        return steps_like(geometry, self.geometry)

    @abstractmethod
    def body(self, *, nesterov: bool, masked: bool, momenta: bool) -> str:
        """The IR that updates element ``%i``."""

    @abstractmethod
    def fill(self, rows: Rows, weights: SparseWeights, base: BaseOptimizer, now: Now) -> list[list[float]]:
        """:attr:`numbers` for this step, each with one value a parameter."""

    def masks(self, weights: SparseWeights) -> list[Tensor] | None:
        """The masks that the loop must apply, one a weight; None for none."""
        return None

    def tensors(
        self, parameters: list[Tensor], weights: SparseWeights, base: BaseOptimizer, *, momenta: bool
    ) -> dict[str, list[Tensor]]:
        """The arrays that stay where they are between steps, each with a tensor for each of the parameters."""
        found = {"x": parameters}
        for name in self.latents or ("x",):
            held = [weights.state(p)[name] for p in parameters] if self.latents else parameters
            found[name] = held
            if momenta:
                found["b" + name] = [base.momentum(tensor) for tensor in held]
        return found

    def columns(self, *, momenta: bool) -> tuple[str, ...]:
        """The arrays as they stand in a table, the mask last."""
        kept = self.momenta
        return (*(name for name in self.arrays if momenta or name not in kept), "mask")

    @property
    def momenta(self) -> tuple[str, ...]:
        """Which arrays are momenta."""
        return tuple("b" + name for name in self.latents or ("x",))

    def dtype(self, field: str) -> torch.dtype:
        """Of what an array is."""
        return torch.bfloat16 if self.narrow and field in self.momenta else torch.float32

    def element(self, field: str) -> str:
        """The same for LLVM."""
        return "i8" if field == "mask" else "i16" if self.dtype(field) == torch.bfloat16 else "float"

    def fields(self, *, momenta: bool) -> tuple[str, ...]:
        """All numbers of a piece."""
        return ("lr", "momentum", *self.numbers, *(KEYS if self.narrow and momenta else ()))

    def loads(self, arrays: dict[str, str]) -> list[str]:
        """IR that loads element ``%i`` of arrays, value -> array: ``%value.p`` is where it is, ``%value.0`` what it is.

        Where one is narrow, ``%random`` is what it will be rounded with.
        """
        narrow = {value: array for value, array in arrays.items() if self.element(array) == "i16"}
        wide = {value: array for value, array in arrays.items() if value not in narrow}
        lines = [f"  %{value}.p = getelementptr float, ptr %{array}, i64 %i" for value, array in wide.items()]
        lines += [f"  %{value}.0 = load float, ptr %{value}.p" for value in wide]
        return lines + [load_narrow(*pair) for pair in narrow.items()] + ([RANDOM] if narrow else [])

    def store(self, value: str, held: str, place: int = 0) -> str:
        """IR that writes a momentum ``held`` to where ``value`` came from; half ``place`` of ``%random`` rounds."""
        return store_narrow(value, held, place) if self.narrow else f"  store float {held}, ptr %{value}.p"

    def ir(self, name: str, *, nesterov: bool, masked: bool, momenta: bool = True) -> str:
        """LLVM IR of ``name(task, first, last)``, the update of every element of the pieces [first, last) of a table.

        ``name_check(task, first, last)`` sets ``bad`` of each piece to whether its gradient is not all finite.
        ``name_team(task)`` and ``name_check_team(task)`` are what a thread of a team does of it, see
        :data:`mirrormask.optimizer.steps.fused_cpu.team.TEAM`.
        """
        numbers, columns = self.fields(momenta=momenta), self.columns(momenta=momenta)
        fields = {
            field: ARRAY.format(field=field, index=index, element=self.element(field))
            for index, field in enumerate(columns)
        } | {field: NUMBER.format(field=field, index=index) for index, field in enumerate(numbers)}
        kinds = [("ptr noalias", field) for field in columns] + [("float", field) for field in numbers]
        parameters = ", ".join(f"{kind} %{field}" for kind, field in [*kinds, *PLACE])
        arguments = ", ".join(f"{kind.split()[0]} %{field}" for kind, field in [*kinds, *PLACE])
        task = {
            field: f"  %{field}.t = getelementptr i64, ptr %task, i64 {index}\n"
            f"  %{field} = load {'i64' if field in COUNTS else 'ptr'}, ptr %{field}.t"
            for index, field in enumerate(TASK)
        }
        table = "\n".join(task[field] for field in ("arrays", "numbers", "pieces", "bad", "parameters", "stream"))
        team = "\n".join(task[field] for field in ("bounds", "shares", "thread_num", "num_threads"))
        piece = STREAMED_PIECE if self.streams else PIECE
        body, check = self.body(nesterov=nesterov, masked=masked, momenta=momenta), f"{name}_check"
        return "\n".join(
            (
                BLOCK.format(name=name, parameters=parameters, body=body),
                piece.format(
                    name=name, parameters=parameters, arguments=arguments, **block_fields(kinds, self.element)
                ),
                TABLE.format(name=name, loads=table, fields="".join(fields.values()), arguments=arguments),
                TEAM.format(name=name, loads=team),
                CHECK.format(name=name),
                TABLE.format(
                    name=check, loads=table, fields=fields["grad"], arguments="ptr %grad, i64 %count, ptr %bad.r"
                ),
                TEAM.format(name=check, loads=team),
            )
        )


def float_literal(value: float) -> str:
    """A float as LLVM writes it: the hexadecimal digits of the double that it is exactly."""
    return f"0x{np.float64(np.float32(value)).view(np.uint64):016X}"
