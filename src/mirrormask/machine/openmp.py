"""The threads that torch computes with: its OpenMP team, which waits, spinning, for the next region.

Threads of our own would share cores with torch's workers, which go on spinning for a while after each of its
operations, and would take tens of microseconds to wake.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

__all__ = ["OpenMP", "openmp"]


class OpenMP(NamedTuple):
    """The OpenMP runtime of torch.

    Attributes:
        run: ``run(function, argument, threads)``: call the function at an address, with the argument, on each thread of
            a team of (at most) that size; returns when all are done. With another number than torch's the runtime
            would end threads, or start them.
        entries: for generated code, the address of the addresses of ``GOMP_parallel(function, argument, threads,
            flags)``, which does it, and of the next two. The first is null in a forked process.
        thread_num: the address of ``omp_get_thread_num``.
        num_threads: the address of ``omp_get_num_threads``.
    """

    run: Callable[[int, int, int], None]
    entries: int
    thread_num: int
    num_threads: int


def openmp() -> OpenMP | None:
    """The runtime that this torch is linked with; None where it has none or one without ``GOMP_parallel``.

    GNU's OpenMP has that entry, and LLVM's for its sake. None where this process has not imported torch, and in a
    forked one, which has none of the threads that the runtime thinks it has.
    """
    torch = sys.modules.get("torch")  # not imported here: where it is not, nothing waits for its threads
    return None if _forked or torch is None or not hasattr(torch, "_C") else _load(torch)


@functools.cache
def _load(torch: ModuleType) -> OpenMP | None:
    if not torch._C.has_openmp or torch.__file__ is None or not sys.platform.startswith("linux"):
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # loaded already
        region, own, size = (
            ctypes.cast(library[symbol], ctypes.c_void_p).value
            for symbol in ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
        )
    except (OSError, AttributeError):
        return None
    if not region or not own or not size:
        return None
    call = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(region)
    _entries[:] = [region, own, size]
    entries = ctypes.addressof(_entries)
    return OpenMP(lambda function, argument, threads: call(function, argument, threads, 0), entries, own, size)


_entries = (ctypes.c_void_p * 3)()
_forked = False


def _fork() -> None:
    global _forked
    _forked, _entries[0] = True, None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_fork)
