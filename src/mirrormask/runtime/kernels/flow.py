"""The function that a kernel is, as ``llvmlite.ir``: arguments, integers, addresses, loops, branches, types."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from llvmlite import ir

from mirrormask.machine.targets import Target
from mirrormask.runtime.kernels import facts

__all__ = ["FLOAT", "HALF", "I1", "I8", "I16", "I32", "I64", "POINTER", "Flow", "Value", "bytes_of", "suffix"]

Value = Any
FLOAT, HALF, POINTER = ir.FloatType(), ir.HalfType(), ir.PointerType()
I1, I8, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))


class Flow:
    """One function to be emitted: ``void name(i64 *args, float *arena, float **io, i64 low, i64 high)``.

    Args:
        target: the instruction set; it says how wide vectors are and which :attr:`number` they hold.
        name: the function's name.
        fields: the names of the slots of ``args``, in order; :meth:`field` reads one.

    Inside the arena and the constants, numbers are :attr:`number`; tensors outside are always 32-bit floats.

    ``args`` holds 64-bit integers: sizes, indices into the arena (in numbers) and addresses of constants. ``low`` and
    ``high`` bound the work units (output channels) of this call, which is how threads share a kernel.
    """

    def __init__(self, target: Target, name: str, fields: Sequence[str]) -> None:
        self.target = target
        self.lanes = target.lanes
        self.number = HALF if target.half else FLOAT
        self.module = ir.Module(name)
        kind = ir.FunctionType(ir.VoidType(), [POINTER, POINTER, POINTER, I64, I64])
        self.function = ir.Function(self.module, kind, name)
        self._args, self.arena, self.io, self.low, self.high = self.function.args
        for pointer in (self._args, self.io):
            pointer.add_attribute("noalias")
        self.b = ir.IRBuilder(self.function.append_basic_block("entry"))
        self._fields = {
            name: self.b.load(self.b.gep(self._args, [self.whole(i)], source_etype=I64), typ=I64)
            for i, name in enumerate(fields)
        }

    def finish(self) -> str:
        """End the function and return its textual IR."""
        self.b.ret_void()
        return str(self.module)

    # -- integers and addresses -------------------------------------------------------------------------------------

    def whole(self, value: int) -> Value:
        """A 64-bit constant."""
        return ir.Constant(I64, int(value))

    def field(self, name: str) -> Value:
        """The 64-bit value of a slot of ``args``."""
        return self._fields[name]

    def constants(self, name: str) -> Value:
        """The pointer whose address a slot of ``args`` holds."""
        return self.b.inttoptr(self.field(name), POINTER)

    def buffer(self, name: str) -> Value:
        """The pointer into the arena whose index a slot of ``args`` holds."""
        return self.at(self.arena, self.field(name))

    def external(self, name: str) -> Value:
        """The pointer to the input or output tensor whose number a slot of ``args`` holds."""
        slot = self.b.gep(self.io, [self.field(name)], source_etype=POINTER)
        return self.b.load(slot, typ=POINTER)

    def fact(self, name: str) -> Value:
        """What :mod:`mirrormask.runtime.kernels.facts` says of the buffer at hand."""
        return self.b.load(self._fact(name), typ=I64)

    def _fact(self, name: str) -> Value:
        slot = self.b.gep(self.io, [self.whole(facts.SLOT)], source_etype=POINTER)
        place = self.b.load(slot, typ=POINTER)
        if name not in facts.STEPS:
            return self.at(place, facts.FACTS.index(name), I64)
        # The steps of a mask lie in a table of the call, four for each tensor outside.
        table = self.b.inttoptr(self.b.load(self.at(place, facts.FACTS.index("masks"), I64), typ=I64), POINTER)
        return self.at(table, self.add(self.mul(self.field("mask"), 4), facts.STEPS.index(name)), I64)

    def at(self, pointer: Value, index: Value | int, kind: Any = None) -> Value:
        """``pointer + index`` elements of ``kind``, :attr:`number` by default."""
        index = self.whole(index) if isinstance(index, int) else index
        return self.b.gep(pointer, [index], source_etype=kind or self.number)

    def mul(self, a: Value, b: Value | int) -> Value:
        """The product of two 64-bit integers."""
        return self.b.mul(a, self.whole(b) if isinstance(b, int) else b)

    def add(self, a: Value, b: Value | int) -> Value:
        """The sum of two 64-bit integers."""
        return self.b.add(a, self.whole(b) if isinstance(b, int) else b)

    def minimum(self, a: Value, b: Value) -> Value:
        """The smaller of two signed 64-bit integers."""
        return self.b.select(self.b.icmp_signed("<", a, b), a, b)

    def maximum(self, a: Value, b: Value) -> Value:
        """The larger of two signed 64-bit integers."""
        return self.b.select(self.b.icmp_signed(">", a, b), a, b)

    def scratch(self, floats: int) -> Value:
        """Uninitialised stack memory of this call."""
        memory = self.b.alloca(ir.ArrayType(self.number, floats))
        memory.type = POINTER  # as every other pointer here: without the type that it points to
        return memory

    def load_int(self, pointer: Value, index: Value, kind: Any = I32) -> Value:
        """Element ``index`` of an array of unsigned integers, as 64 bits."""
        return self.b.zext(self.b.load(self.at(pointer, index, kind), typ=kind), I64)

    # -- control flow -----------------------------------------------------------------------------------------------

    def loop(
        self,
        low: Value | int,
        high: Value | int,
        body: Callable[[Value, list[Value]], Sequence[Value] | None],
        carried: Sequence[Value] = (),
        step: int = 1,
    ) -> list[Value]:
        """``for i in range(low, high, step): carried = body(i, carried)``; returns the last ``carried``."""
        low, high = (self.whole(x) if isinstance(x, int) else x for x in (low, high))
        before = self.b.block
        head, inside, after = (self.function.append_basic_block(n) for n in ("head", "body", "after"))
        self.b.branch(head)
        self.b.position_at_end(head)
        index = self.b.phi(I64)
        phis = [self.b.phi(value.type) for value in carried]
        self.b.cbranch(self.b.icmp_signed("<", index, high), inside, after)
        self.b.position_at_end(inside)
        results = list(body(index, phis) or ())
        index.add_incoming(low, before)
        index.add_incoming(self.add(index, step), self.b.block)
        for phi, first, result in zip(phis, carried, results, strict=True):
            phi.add_incoming(first, before)
            phi.add_incoming(result, self.b.block)
        self.b.branch(head)
        self.b.position_at_end(after)
        return phis

    def either(
        self, condition: Value, then: Callable[[], Sequence[Value]], otherwise: Callable[[], Sequence[Value]]
    ) -> list[Value]:
        """``then() if condition else otherwise()``, value by value."""
        yes, no, join = (self.function.append_basic_block(n) for n in ("then", "else", "join"))
        self.b.cbranch(condition, yes, no)
        ends = []
        for block, branch in ((yes, then), (no, otherwise)):
            self.b.position_at_end(block)
            values = list(branch())
            ends.append((values, self.b.block))
            self.b.branch(join)
        self.b.position_at_end(join)
        merged = []
        for pair in zip(ends[0][0], ends[1][0], strict=True):
            phi = self.b.phi(pair[0].type)
            for value, (_, block) in zip(pair, ends, strict=True):
                phi.add_incoming(value, block)
            merged.append(phi)
        return merged

    def when(self, condition: Value, then: Callable[[], object]) -> None:
        """``if condition: then()``."""
        self.either(condition, lambda: (then() and ()) or (), lambda: ())

    # -- types

    def vector_type(self, lanes: int | None = None, number: Any = None) -> Any:
        """The type of a vector of ``lanes`` numbers (the target's width by default)."""
        return ir.VectorType(number or self.number, lanes or self.lanes)

    @contextlib.contextmanager
    def numbers(self, number: Any) -> Iterator[None]:
        """Inside, :attr:`number` is another type."""
        before, self.number = self.number, number
        yield
        self.number = before

    def floats(self) -> contextlib.AbstractContextManager[None]:
        """Inside, :attr:`number` is the 32-bit float: for arithmetic that needs its precision or range."""
        return self.numbers(FLOAT)

    def converted(self, value: Value, number: Any = None) -> Value:
        """The number or vector with elements of another type, :attr:`number` by default."""
        number = number or self.number
        vector = isinstance(value.type, ir.VectorType)
        kind = ir.VectorType(number, value.type.count) if vector else number
        if value.type == kind:
            return value
        return self.b.fpext(value, kind) if number is FLOAT else self.b.fptrunc(value, kind)

    def _intrinsic(self, name: str, kind: Any, values: Sequence[Value]) -> Value:
        return self.b.call(self._declare(f"{name}.{suffix(kind)}", kind, [kind] * len(values)), values)

    def _declare(self, name: str, result: Any, arguments: Sequence[Any]) -> Any:
        if name in self.module.globals:
            return self.module.globals[name]
        return ir.Function(self.module, ir.FunctionType(result, list(arguments)), name)


def bytes_of(number: Any) -> int:
    """Bytes of a number."""
    return 2 if number is HALF or isinstance(number, ir.HalfType) else 4


def suffix(kind: Any) -> str:
    """How intrinsics spell a type: ``v16f32``."""
    if isinstance(kind, ir.VectorType):
        return f"v{kind.count}{suffix(kind.element)}"
    return "f16" if isinstance(kind, ir.HalfType) else "f32"
