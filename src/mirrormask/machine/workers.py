"""A pool of threads that sleep in Python and work in native code (``ctypes`` releases the interpreter lock)."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence

__all__ = ["run_together"]

Job = Callable[[], object]


class _Worker:
    """One daemon thread that runs a job whenever it is given one."""

    def __init__(self) -> None:
        self._go, self._done = threading.Lock(), threading.Lock()
        self._go.acquire()
        self._done.acquire()
        self._job: Job = bool
        threading.Thread(target=self._serve, name="mirrormask", daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._go.acquire()
            try:
                self._job()
            finally:
                self._done.release()

    def start(self, job: Job) -> None:
        self._job = job
        self._go.release()

    def wait(self) -> None:
        self._done.acquire()


_workers: list[_Worker] = []
_busy = threading.Lock()


def _forget() -> None:
    """A forked child has none of its parent's threads."""
    global _busy
    _workers.clear()
    _busy = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def run_together(jobs: Sequence[Job]) -> bool:
    """Run all jobs at the same time, the first on this thread; ``False``, with nothing run, if others use the pool."""
    if not _busy.acquire(blocking=False):
        return False
    try:
        while len(_workers) < len(jobs) - 1:
            _workers.append(_Worker())
        helpers = _workers[: len(jobs) - 1]
        for worker, job in zip(helpers, jobs[1:], strict=True):
            worker.start(job)
        jobs[0]()
        for worker in helpers:
            worker.wait()
    finally:
        _busy.release()
    return True
