"""Machine code for kernel specifications, made once each per process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numpy as np
import numpy.typing as npt

from mirrormask.machine import cache
from mirrormask.machine.jit import Engine, host_engine, host_features
from mirrormask.machine.targets import Target, best_target
from mirrormask.runtime.kernels import (
    clear,
    dense,
    driver,
    elementwise,
    pool,
    relayout,
    shared,
    sparse,
    vector,
    winograd,
)

__all__ = ["address_of", "aligned_array", "emit", "fields_of", "level_of", "run_functions", "yield_address"]

#: How each kind of specification is emitted, and the names of its arguments.
_KERNELS: dict[str, tuple[Callable[[Any, str], str], tuple[str, ...]]] = {
    "sparse": (sparse.emit, sparse.FIELDS),
    "dense": (dense.emit, dense.FIELDS),
    "transform": (winograd.emit_transform, winograd.TRANSFORM_FIELDS),
    "winograd": (winograd.emit, winograd.FIELDS),
    "relayout": (relayout.emit, relayout.FIELDS),
    "pool": (pool.emit, pool.FIELDS),
    "mean": (pool.emit_mean, pool.FIELDS),
    "clear": (clear.emit, clear.FIELDS),
    "elementwise": (elementwise.emit, elementwise.FIELDS),
    "vector_shared": (shared.emit, shared.FIELDS),
    "vector_sparse": (vector.emit_sparse, vector.SPARSE_FIELDS),
    "vector_dense": (vector.emit_dense, vector.DENSE_FIELDS),
}
#: LLVM's optimisation levels below 3. That unrolls loops of few rounds: for these kernels it takes three times as long
#: and gains nothing.
_LEVELS = {"transform": 2, "winograd": 2}


def fields_of(kind: str) -> tuple[str, ...]:
    """The names of a kernel's arguments, in order."""
    return _KERNELS[kind][1]


def emit(kind: str, spec: Any, name: str = "kernel") -> str:
    """The LLVM IR of a kernel."""
    return _KERNELS[kind][0](spec, name)


def level_of(kind: str) -> int:
    """LLVM's optimisation level for a kernel."""
    return _LEVELS.get(kind, 3)


@functools.cache
def _engine(target: Target) -> Engine:
    # The best target gets all that the processor has, and LLVM's model of it; the others exactly what they name.
    return host_engine() if target == best_target() else Engine(target.features)


@functools.cache
def address_of(kind: str, spec: Any) -> int:
    """The address of a kernel's machine code."""
    engine = _engine(spec.target)
    return engine.address(_load(engine, kind, repr(spec), lambda name: emit(kind, spec, name)))


@functools.cache
def run_functions() -> tuple[Any, Any]:
    """The generated functions that run a plan, on one thread and on a team, see :mod:`kernels.driver`; as ``ctypes``
    functions, which release the interpreter lock."""  # fmt: skip
    engine = host_engine()
    name = _load(engine, "run_plan", "", driver.emit)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    return kind(engine.address(name)), kind(engine.address(f"{name}_team"))


@functools.cache
def yield_address() -> int:
    """The address of the C function by which a waiting thread offers its core to others."""
    library: Any = ctypes.CDLL(None) if os.name == "posix" else ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    function = library.sched_yield if os.name == "posix" else library.SwitchToThread
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _load(engine: Engine, kind: str, facts: str, make: Callable[[str], str]) -> str:
    """Load a function's object code from the disk, or make it and keep it there; returns the function's name."""
    digest = hashlib.sha256(f"{kind} {facts} {_build()}".encode()).hexdigest()[:24]
    name = f"{kind}_{digest}"
    code = cache.load_bytes(name)
    if code is None:
        code = engine.object_code(make(name), level_of(kind))
        cache.store_bytes(name, code)
    engine.load(code)
    return name


@functools.cache
def _build() -> str:
    """What object code depends on besides its specification: the generator, LLVM and the processor."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    facts = (digest.hexdigest(), llvmlite.__version__, cache.processor_name(), sorted(host_features()), sys.platform)
    return repr(facts)


def aligned_array(size: int, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
    """A zeroed array that starts on a cache line."""
    item = np.dtype(dtype).itemsize
    raw = np.zeros(size * item + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + size * item].view(dtype)
