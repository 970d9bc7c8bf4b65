"""Instruction sets that kernels are generated for: vector width, registers and LLVM features."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import numpy as np

from mirrormask.checks import check_known
from mirrormask.machine.jit import host_features

__all__ = ["EMULATED_FP16", "FP16", "TARGETS", "Target", "available_targets", "best_target", "fp16_target"]


@dataclass(frozen=True)
class Target:
    """One instruction set.

    Attributes:
        name: how users and reports call it.
        lanes: numbers per vector register.
        registers: vector registers; a tile that needs more would spill.
        needs: LLVM feature names that the processor must have; a kernel for this target uses nothing beyond them.
        half: whether numbers are 16 bits wide.
        machine: the processor family it exists on (``"x86_64"``, ``"aarch64"``), or ``""`` for any.
        watched: whether kernels note results that are not finite, as those out of half precision's range become.
    """

    name: str
    lanes: int
    registers: int
    needs: tuple[str, ...]
    machine: str
    half: bool = False
    watched: bool = False

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of numbers inside a plan."""
        return np.dtype(np.float16 if self.half else np.float32)

    @property
    def precision(self) -> str:
        """``"fp16"`` or ``"fp32"``."""
        return "fp16" if self.half else "fp32"

    @property
    def features(self) -> str:
        """The LLVM feature string of this target."""
        return ",".join(f"+{name}" for name in self.needs)


AVX512 = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512vl", "avx512dq", "avx512bw")
TARGETS = {
    target.name: target
    for target in (
        Target("avx512", 16, 32, AVX512, "x86_64"),
        Target("avx2", 8, 16, ("sse4.2", "avx", "avx2", "fma"), "x86_64"),
        Target("neon", 4, 32, ("neon",), "aarch64"),
        # One lane: LLVM's plain scalar instructions, on whatever processor there is.
        Target("scalar", 1, 16, (), ""),
    )
}

#: fp16 arithmetic: twice the lanes. Asked for by precision, not by name.
FP16 = Target("avx512fp16", 32, 32, (*AVX512, "avx512fp16"), "x86_64", half=True)

#: The same numbers on a processor without AVX512-FP16, many times slower: every operation converts to 32 bits and back.
#: For checking what fp16 plans compute; nothing chooses it.
EMULATED_FP16 = Target("avx512fp16-emulated", 32, 32, (*AVX512, "f16c"), "x86_64", half=True)


def machine() -> str:
    """This machine's processor family in LLVM's spelling."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def available_targets() -> tuple[Target, ...]:
    """The instruction sets that this machine can run, best first."""
    family, features = machine(), host_features()
    return tuple(
        target
        for target in TARGETS.values()
        if target.machine in ("", family) and (features.issuperset(target.needs) or target.name == "neon")
    )


def fp16_target() -> Target | None:
    """The instruction set for fp16 arithmetic, if this machine has it."""
    has = machine() == FP16.machine and host_features().issuperset(FP16.needs)
    return FP16 if has else None


def best_target(name: str | None = None) -> Target:
    """The best instruction set of this machine, or the one called ``name``.

    Raises:
        ValueError: ``name`` is unknown, or this machine cannot run it.
    """
    runnable = available_targets()
    if name is None:
        return runnable[0]
    check_known("instruction set", name, TARGETS)
    if TARGETS[name] not in runnable:
        names = ", ".join(target.name for target in runnable)
        raise ValueError(f"this machine cannot run {name!r}; it runs: {names}")
    return TARGETS[name]
