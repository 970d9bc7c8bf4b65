"""Generated code on the threads that torch computes with: its OpenMP team, which waits, spinning, for the next region.

A thread of our own would share a core with a worker of torch's that goes on spinning after the backward pass.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

__all__ = ["TEAM", "OpenMP", "openmp"]

#: What each thread of a team does, in LLVM IR: the shares of a table's pieces whose number, modulo the size of the
#: team, is the thread's. See :data:`mirrormask.fused.update.TASK`.
TEAM = """
define void @{name}_team(ptr %task) {{
entry:
{loads}
  %own.32 = call i32 %thread_num()
  %own = sext i32 %own.32 to i64
  %size.32 = call i32 %num_threads()
  %size = sext i32 %size.32 to i64
  br label %head
head:
  %s = phi i64 [%own, %entry], [%next, %body]
  %more = icmp slt i64 %s, %shares
  br i1 %more, label %body, label %done
body:
  %first.p = getelementptr i64, ptr %bounds, i64 %s
  %first = load i64, ptr %first.p
  %last.p = getelementptr i64, ptr %first.p, i64 1
  %last = load i64, ptr %last.p
  call void @{name}(ptr %task, i64 %first, i64 %last)
  %next = add i64 %s, %size
  br label %head
done:
  ret void
}}
"""


class OpenMP(NamedTuple):
    """The OpenMP runtime of torch.

    Attributes:
        parallel: ``parallel(function, argument, threads)``: call the function at an address, with the argument, on
            each thread of a team of (at most) that size; returns when all are done.
        thread_num: the address of ``omp_get_thread_num``.
        num_threads: the address of ``omp_get_num_threads``.
    """

    parallel: Callable[[int, int, int], None]
    thread_num: int
    num_threads: int


@functools.cache
def openmp() -> OpenMP | None:
    """The runtime that this torch is linked with; None where it has none or one without ``GOMP_parallel``.

    GNU's OpenMP has that entry, and LLVM's for its sake.
    """
    if not torch._C.has_openmp or not sys.platform.startswith("linux"):
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
    return OpenMP(lambda function, argument, threads: call(function, argument, threads, 0), own, size)
