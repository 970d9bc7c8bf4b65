"""Momenta in bfloat16, rounded at random and right on average, in LLVM IR and in plain integers.

A momentum gains a tenth or less of its size in a step. Rounded to the nearest of 8 bits it would lose gains under a
256th of it for good; rounded up or down at random, up as likely as it is near, it has them on average. The bits come
from a counter, not from a generator with a state: of step t, tensor k and element i they are what they are, on
however many threads, and in a run that was resumed.
"""

from __future__ import annotations

__all__ = ["KEYS", "RANDOM", "key_halves", "load_narrow", "store_narrow"]

#: The numbers of a parameter that say which random bits are its own in this step: a key of 32 bits, in two halves,
#: since numbers are float32, which holds 24.
KEYS = ("key_low", "key_high")

#: ``random = mix(key + element)``: of its two halves one rounds a first momentum, the other a second one. The mix is a
#: bijection of 32 bits (multiply and shift, twice), which turns consecutive numbers into what looks random.
RANDOM = """
  %random.low = fptoui float %key_low to i32
  %random.upper = fptoui float %key_high to i32
  %random.high = shl i32 %random.upper, 16
  %random.key = or i32 %random.low, %random.high
  %random.at = add i64 %first, %i
  %random.at32 = trunc i64 %random.at to i32
  %random.0 = add i32 %random.at32, %random.key
  %random.1 = lshr i32 %random.0, 16
  %random.2 = xor i32 %random.0, %random.1
  %random.3 = mul i32 %random.2, 2146121005
  %random.4 = lshr i32 %random.3, 15
  %random.5 = xor i32 %random.3, %random.4
  %random.6 = mul i32 %random.5, 2221713035
  %random.7 = lshr i32 %random.6, 16
  %random = xor i32 %random.6, %random.7
"""
LOAD = """
  %{value}.p = getelementptr i16, ptr %{array}, i64 %i
  %{value}.kept = load i16, ptr %{value}.p
  %{value}.wide = zext i16 %{value}.kept to i32
  %{value}.bits = shl i32 %{value}.wide, 16
  %{value}.0 = bitcast i32 %{value}.bits to float
"""
#: bfloat16 is the upper half of float32. What is added to the lower half carries as often as that half is large.
STORE = """
  %{value}.exact = bitcast float {held} to i32
  %{value}.draw = {draw}
  %{value}.sum = add i32 %{value}.exact, %{value}.draw
  %{value}.half = lshr i32 %{value}.sum, 16
  %{value}.short = trunc i32 %{value}.half to i16
  store i16 %{value}.short, ptr %{value}.p
"""
DRAWS = ("and i32 %random, 65535", "lshr i32 %random, 16")


def load_narrow(value: str, array: str) -> str:
    """IR that loads element ``%i`` of an array of bfloat16 as a float, ``%value.0``, from ``%value.p``."""
    return LOAD.format(value=value, array=array)


def store_narrow(value: str, held: str, place: int) -> str:
    """IR that writes the float ``held`` to ``%value.p``, rounded with half 0 or 1 of ``%random``."""
    return STORE.format(value=value, held=held, draw=DRAWS[place])


def key_halves(step: int, tensor: int) -> tuple[int, int]:
    """The key of a tensor in a step, as :data:`KEYS`: SplitMix64 of both numbers, its upper 32 bits.

    Example:
        >>> key_halves(0, 0) == key_halves(0, 0), key_halves(1, 0) == key_halves(0, 1)
        (True, False)
    """
    z = ((step << 24) + tensor + 1) * 0x9E3779B97F4A7C15 & (1 << 64) - 1
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & (1 << 64) - 1
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & (1 << 64) - 1
    key = (z ^ (z >> 31)) >> 32
    return key & 0xFFFF, key >> 16
