"""Machine code for kernel specifications, made once each per process."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import sys
from collections.abc import Callable
from typing import Any

import llvmlite

from mirrormask.machine import cache, objects
from mirrormask.machine.jit import Engine, host_engine, host_features
from mirrormask.machine.targets import Target, best_target
from mirrormask.runtime.kernels import driver
from mirrormask.runtime.kernels.base import Kernel

__all__ = ["address_of", "run_functions", "yield_address"]


@functools.cache
def _engine(target: Target) -> Engine:
    # The best target gets all that the processor has, and LLVM's model of it; the others exactly what they name.
    return host_engine() if target == best_target() else Engine(target.features)


@functools.cache
def address_of(kernel: Kernel, spec: Any) -> int:
    """The address of a kernel's machine code."""
    engine = _engine(spec.target)
    name = _load(engine, kernel.kind, repr(spec), lambda name: kernel.emit(spec, name), kernel.level)
    return engine.address(name)


@functools.cache
def run_functions() -> tuple[Any, Any]:
    """The generated functions that run a plan, on one thread and on a team, see :mod:`kernels.driver`; as ``ctypes``
    functions, which release the interpreter lock."""  # fmt: skip
    engine = host_engine()
    name = _load(engine, "run_plan", "", driver.emit, 3)
    kind = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    return kind(engine.address(name)), kind(engine.address(f"{name}_team"))


@functools.cache
def yield_address() -> int:
    """The address of the C function by which a waiting thread offers its core to others."""
    library: Any = ctypes.CDLL(None) if os.name == "posix" else ctypes.WinDLL("kernel32")  # type: ignore[attr-defined]
    function = library.sched_yield if os.name == "posix" else library.SwitchToThread
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def _load(engine: Engine, kind: str, facts: str, make: Callable[[str], str], level: int) -> str:
    """Load a function's object code from the disk, or make it and keep it there; returns the function's name."""
    digest = hashlib.sha256(f"{kind} {facts} {_build()}".encode()).hexdigest()[:24]
    name = f"{kind}_{digest}"
    code = cache.load_bytes(name)
    if code is None or not objects.defines(code, name):
        code = engine.object_code(make(name), level)
        cache.store_bytes(name, code)
    engine.load(code)
    return name


@functools.cache
def _build() -> str:
    """What object code depends on besides its specification: the generator, LLVM and the processor."""
    facts = (cache.source_hash(), llvmlite.__version__, cache.processor_name(), sorted(host_features()), sys.platform)
    return repr(facts)
