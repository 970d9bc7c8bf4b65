"""A thin layer over ``llvmlite.ir``: typed loads and vectors. Kernels are written in its terms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

from mirrormask.runtime.kernels.flow import FLOAT, HALF, I1, I8, I16, I32, I64, POINTER, Flow, Value, bytes_of, suffix

__all__ = ["FLOAT", "HALF", "I1", "I8", "I16", "I32", "I64", "POINTER", "Emitter", "Value"]


class Emitter(Flow):
    """Emits one kernel; see :class:`mirrormask.runtime.kernels.flow.Flow` for its arguments."""

    # -- vectors ----------------------------------------------------------------------------------------------------

    def load(self, pointer: Value, lanes: int | None = None, *, aligned: bool = False) -> Value:
        """A vector of numbers."""
        kind = self.vector_type(lanes)
        return self.b.load(pointer, align=bytes_of(kind.element) * (kind.count if aligned else 1), typ=kind)

    def load_part(self, pointer: Value, valid: int, lanes: int | None = None) -> Value:
        """A vector whose first ``valid`` lanes are read; the others are zero, and their memory is not touched."""
        kind = self.vector_type(lanes)
        if valid >= kind.count:
            return self.load(pointer, lanes)
        if valid <= 0:
            return self.zero(lanes)
        mask = self._mask(valid, kind.count)
        load = self._declare(f"llvm.masked.load.{suffix(kind)}.p0", kind, [POINTER, I32, mask.type, kind])
        return self.b.call(load, [pointer, ir.Constant(I32, bytes_of(kind.element)), mask, self.zero(lanes)])

    def store(self, value: Value, pointer: Value, *, aligned: bool = False) -> None:
        """Write a vector of numbers."""
        kind = value.type
        self.b.store(value, pointer, align=bytes_of(kind.element) * (kind.count if aligned else 1))

    def store_part(self, value: Value, pointer: Value, valid: int) -> None:
        """Write the first ``valid`` lanes; the memory of the others is not touched."""
        kind = value.type
        if valid >= kind.count:
            self.store(value, pointer)
        elif valid > 0:
            mask = self._mask(valid, kind.count)
            name = f"llvm.masked.store.{suffix(kind)}.p0"
            store = self._declare(name, ir.VoidType(), [kind, POINTER, I32, mask.type])
            self.b.call(store, [value, pointer, ir.Constant(I32, bytes_of(kind.element)), mask])

    def store_below(self, value: Value, pointer: Value, count: Value) -> None:
        """Write the first lanes, as many as ``count`` says at run time, and touch no memory of the others."""
        kind = value.type
        below = ir.Constant(ir.VectorType(I32, kind.count), [kind.count] * kind.count)
        number = self.b.trunc(self.minimum(count, self.whole(kind.count)), I32)
        first = self.b.insert_element(below, number, ir.Constant(I32, 0))
        mask = self.b.icmp_signed(
            "<", self.ramp(self.whole(0), kind.count), self.shuffle(first, first, [0] * kind.count)
        )
        store = self._declare(f"llvm.masked.store.{suffix(kind)}.p0", ir.VoidType(), [kind, POINTER, I32, mask.type])
        self.b.call(store, [value, pointer, ir.Constant(I32, bytes_of(kind.element)), mask])

    def _mask(self, valid: int, lanes: int) -> Value:
        return ir.Constant(ir.VectorType(I1, lanes), [int(i < valid) for i in range(lanes)])

    def load_float(self, pointer: Value) -> Value:
        """One number."""
        return self.b.load(pointer, align=bytes_of(self.number), typ=self.number)

    def splat(self, value: Value | float, lanes: int | None = None) -> Value:
        """A vector with ``value`` in every lane."""
        number = self.number if isinstance(value, (int, float)) else value.type
        kind = self.vector_type(lanes, number)
        if isinstance(value, (int, float)):
            return ir.Constant(kind, [float(value)] * kind.count)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * kind.count)

    def splat_int(self, value: Value) -> Value:
        """A vector as wide as the target's with a 32-bit integer in every lane."""
        kind = ir.VectorType(I32, self.lanes)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), value, ir.Constant(I32, 0))
        return self.shuffle(first, first, [0] * self.lanes)

    def zero(self, lanes: int | None = None) -> Value:
        """A vector of zeros."""
        return self.splat(0.0, lanes)

    def values(self, values: Sequence[float]) -> Value:
        """A constant vector."""
        return ir.Constant(self.vector_type(len(values)), list(values))

    def real(self, value: float) -> Value:
        """A constant number."""
        return ir.Constant(self.number, value)

    def to_float(self, value: Value) -> Value:
        """A signed 64-bit integer as a number."""
        return self.b.sitofp(value, self.number)

    def insert(self, vector: Value, value: Value, lane: int) -> Value:
        """``vector`` with ``value`` in one lane."""
        return self.b.insert_element(vector, value, ir.Constant(I32, lane))

    def extract(self, vector: Value, lane: int) -> Value:
        """One lane."""
        return self.b.extract_element(vector, ir.Constant(I32, lane))

    def store_float(self, value: Value, pointer: Value) -> None:
        """Write one number."""
        self.b.store(value, pointer, align=bytes_of(value.type))

    def gather(self, base: Value, indices: Value, kind: Any) -> Value:
        """``base[indices[lane]]`` for every lane; the indices are unsigned and lie in memory.

        Lane by lane: what LLVM makes of its gather is extracted from vectors of addresses, or an instruction that on
        many processors is slower than the loads that it stands for.
        """
        a_word = I64.width // kind.width  # indices of one load: loads are what this takes
        places = []
        for lane in range(self.lanes):
            if self.lanes % a_word:
                places.append(self.load_int(indices, self.whole(lane), kind))
                continue
            if lane % a_word == 0:
                word = self.b.load(self.at(indices, lane, kind), align=kind.width // 8, typ=I64)
            shifted = self.b.lshr(word, self.whole(lane % a_word * kind.width))
            places.append(self.b.zext(self.b.trunc(shifted, kind), I64))
        # Four at a time: x86 has an instruction that loads a number into a lane of those.
        size = min(4, self.lanes)
        parts = []
        for first in range(0, self.lanes, size):
            part = ir.Constant(self.vector_type(size), ir.Undefined)
            for lane in range(size):
                part = self.insert(part, self.load_float(self.at(base, places[first + lane])), lane)
            parts.append(part)
        while len(parts) > 1:
            size *= 2
            parts = [self.shuffle(parts[i], parts[i + 1], range(size)) for i in range(0, len(parts), 2)]
        return parts[0]

    def permuted(self, low: Value, high: Value, indices: Value) -> Value:
        """Lane ``i`` is element ``indices[i]`` of ``low`` followed by ``high``, higher bits ignored. AVX-512 alone."""
        name, kind = ("hi", indices.type) if self.number is HALF else ("ps", low.type)
        permute = self._declare(f"llvm.x86.avx512.vpermi2var.{name}.512", kind, [kind, indices.type, kind])
        found = self.b.call(permute, [self.b.bitcast(low, kind), indices, self.b.bitcast(high, kind)])
        return self.b.bitcast(found, low.type)

    def picked(self, table: Value, indices: Value) -> Value:
        """Lane ``i`` is element ``indices[i]`` of a table of eight floats, higher bits ignored. AVX2 alone."""
        permute = self._declare("llvm.x86.avx2.permps", table.type, [table.type, indices.type])
        return self.b.call(permute, [table, indices])

    def scatter(self, value: Value, base: Value, indices: Value) -> None:
        """``base[indices[lane]] = value[lane]``; 32-bit indices in memory."""
        for lane in range(value.type.count):
            index = self.b.zext(self.b.load(self.at(indices, lane, I32), typ=I32), I64)
            self.store_float(self.extract(value, lane), self.at(base, index))

    def shuffle(self, a: Value, b: Value, lanes: Sequence[int]) -> Value:
        """Lane ``i`` of the result is lane ``lanes[i]`` of ``a`` followed by ``b``."""
        return self.b.shuffle_vector(a, b, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))

    def keep(self, value: Value, mask: Sequence[bool]) -> Value:
        """``value`` where ``mask`` is true and zero elsewhere."""
        if all(mask):
            return value
        constant = ir.Constant(ir.VectorType(I1, len(mask)), [int(x) for x in mask])
        return self.b.select(constant, value, ir.Constant(value.type, [0.0] * len(mask)))

    def keep_below(self, value: Value, start: Value, end: int) -> Value:
        """``value`` in the lanes ``i`` with ``start + i < end``, zero in the others; ``start`` is known at run time."""
        count = value.type.count
        index, bound = self.ramp(start, count), ir.Constant(ir.VectorType(I32, count), [end] * count)
        return self.b.select(self.b.icmp_signed("<", index, bound), value, self.zero(count))

    def ramp(self, start: Value, lanes: int, step: int = 1) -> Value:
        """The 32-bit integers ``start``, ``start + step``, ``start + 2 step``, ..."""
        kind = ir.VectorType(I32, lanes)
        first = self.b.insert_element(ir.Constant(kind, ir.Undefined), self.b.trunc(start, I32), ir.Constant(I32, 0))
        return self.b.add(self.shuffle(first, first, [0] * lanes), ir.Constant(kind, [i * step for i in range(lanes)]))

    def fma(self, a: Value, b: Value, c: Value) -> Value:
        """``a * b + c``, fused where the target can."""
        if self.number is HALF and "avx512fp16" not in self.target.needs:
            # One rounding, as the real instruction does: the product of two halves is exact in 32 bits.
            wide = [self.converted(value, FLOAT) for value in (a, b, c)]
            return self.converted(self._intrinsic("llvm.fmuladd", wide[0].type, wide))
        return self._intrinsic("llvm.fmuladd", a.type, [a, b, c])

    def fadd(self, a: Value, b: Value) -> Value:
        """The sum of two floats or vectors."""
        return self.b.fadd(a, b)

    def fmul(self, a: Value, b: Value) -> Value:
        """The product of two floats or vectors."""
        return self.b.fmul(a, b)

    def fdiv(self, a: Value, b: Value) -> Value:
        """The quotient of two floats or vectors."""
        return self.b.fdiv(a, b)

    def absolute(self, a: Value) -> Value:
        """``|a|``."""
        return self._intrinsic("llvm.fabs", a.type, [a])

    def root(self, a: Value) -> Value:
        """The square root."""
        return self._intrinsic("llvm.sqrt", a.type, [a])

    def rounded(self, a: Value) -> Value:
        """The nearest integer, as a float; ``|a|`` below 2^22.

        Adding and taking away 1.5 * 2^23 rounds to nearest on every target, without a library call.
        """
        magic = self.splat(12582912.0, a.type.count)
        return self.b.fsub(self.b.fadd(a, magic), magic)

    def scaled(self, a: Value, power: Value) -> Value:
        """``a * 2^power`` for an integer-valued ``power`` in [-126, 127]."""
        count = a.type.count
        whole = self.b.fptosi(power, ir.VectorType(I32, count))
        whole = self.b.select(self.b.fcmp_unordered("uno", power, power), ir.Constant(whole.type, [0] * count), whole)
        bias, shift = (ir.Constant(whole.type, [n] * count) for n in (127, 23))
        factor = self.b.bitcast(self.b.shl(self.b.add(whole, bias), shift), a.type)
        return self.b.fmul(a, factor)

    def larger(self, a: Value, b: Value) -> Value:
        """The larger, NaN if either is NaN."""
        return self._intrinsic("llvm.maximum", a.type, [a, b])

    def smaller(self, a: Value, b: Value) -> Value:
        """The smaller, NaN if either is NaN."""
        return self._intrinsic("llvm.minimum", a.type, [a, b])

    def above(self, bound: Value, value: Value) -> Value:
        """``max(value, bound)``, with NaN of ``value`` kept: one instruction on x86."""
        return self.b.select(self.b.fcmp_ordered(">", bound, value), bound, value)

    def below(self, bound: Value, value: Value) -> Value:
        """``min(value, bound)``, with NaN of ``value`` kept."""
        return self.b.select(self.b.fcmp_ordered("<", bound, value), bound, value)

    def total(self, value: Value) -> Value:
        """The sum of the lanes of a vector of 32-bit floats."""
        reduce = self._declare(f"llvm.vector.reduce.fadd.{suffix(value.type)}", FLOAT, [FLOAT, value.type])
        return self.b.call(reduce, [ir.Constant(FLOAT, -0.0), value], fastmath=("reassoc",))

    # -- numbers that are not finite

    def watch(self, value: Value) -> None:
        """If the target is watched: set the slot ``flag`` points at when a lane of ``value`` is not finite."""
        if self.target.watched:
            infinity = ir.Constant(value.type, [float("inf")] * value.type.count)
            self._raise_flag(self.b.fcmp_unordered(">=", self.absolute(value), infinity))

    def note_unless_finite(self, values: Sequence[Value]) -> None:
        """Set the slot ``flag`` points at when a lane of ``values`` is not finite, whatever the target.

        One multiply-add a vector, and one branch: a sum of zeros is NaN then.
        """
        nothing = self.zero(values[0].type.count)
        for value in values:
            nothing = self.fma(value, self.zero(value.type.count), nothing)
        self._raise_flag(self.b.fcmp_unordered("uno", nothing, nothing))

    def _raise_flag(self, lanes: Value) -> None:
        """Set the slot ``flag`` points at if any of these truth values is true."""
        reduce = self._declare(f"llvm.vector.reduce.or.v{lanes.type.count}i1", I1, [lanes.type])
        flag = self.constants("flag")
        self.when(self.b.call(reduce, [lanes]), lambda: self.b.store(self.whole(1), flag))
