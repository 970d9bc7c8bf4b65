"""Cells side by side on one machine: worker processes that keep the data, one cell at a time each.

The data is read once, by the parent, and laid into one file that every worker maps into its memory.
"""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import context as contexts
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import torch

from mirrormask import files
from mirrormask.compare import data_file
from mirrormask.compare.comparison import Failure
from mirrormask.compare.grid import Cell
from mirrormask.compare.runs import ERROR
from mirrormask.train.data import Splits
from mirrormask.train.loop import Observer, run
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunFolder, RunResult
from mirrormask.train.signals import Stopped

__all__ = ["DiskFull", "Watcher", "cores", "record_failure", "share", "train_cells"]

#: Seconds between two reports of a worker, and those that a worker gets to leave a run in order.
INTERVAL, GRACE = 0.5, 10.0
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
#: What a run imports, at once or at its first step; most of a worker's time, if the runs are short.
IMPORTS = ("mirrormask.compare.runner", "torch._dynamo", "accelerate", "torch.utils.tensorboard", "llvmlite.binding")


class DiskFull(OSError):
    """There is no room left for a run's files; further cells would fail likewise."""


class Watcher(Protocol):
    """Who is told how the cells go on."""

    def started(self, cell: Cell) -> None:
        """A cell begins, or goes on."""

    def progressed(self, cell: Cell, fraction: float) -> None:
        """A cell has come this far."""

    def finished(self, cell: Cell, result: RunResult) -> None:
        """A cell has its result."""

    def failed(self, cell: Cell, error: str) -> None:
        """A cell has none."""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share(cells: int, workers: int | None, threads: int | None) -> tuple[int, int]:
    """How many workers, and threads for each: as many of both as the cores allow, and no more workers than cells.

    Small networks gain more from a second cell beside them than from a second thread, so that a thread is one core
    of one cell unless ``threads`` says otherwise.

    Example:
        >>> workers, threads = share(1, None, None)
        >>> workers, threads == cores()
        (1, True)
    """
    workers = max(1, min(workers or cores() // (threads or 1), cells))
    return workers, threads or max(1, cores() // workers)


def train_cells(
    cells: Sequence[Cell], *, workers: int, threads: int, splits: Splits, scratch: Path, watcher: Watcher
) -> list[Failure]:
    """Train the cells, ``workers`` at a time; a cell that lies unfinished in its folder goes on from its checkpoint.

    A cell that fails, or whose process dies, leaves its error in ``error.txt`` in its folder, and the others go on.
    When this is interrupted the workers are ended first.

    Args:
        cells: to be trained, in this order.
        workers, threads: see :func:`share`.
        splits: the data of every one of them.
        scratch: a folder for the file that the workers read the data from; it is removed at the end.
        watcher: is told of every start, step forward and end.

    Returns:
        What failed.

    Raises:
        DiskFull: no cell was begun after one that could not be written; those that ran were waited for.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    path = scratch / data_file.NAME
    waiting, failures, full = deque(cells), [], False
    pool: list[_Worker] = []
    try:
        try:
            data_file.write(splits, path)
        except (OSError, RuntimeError) as error:
            if is_disk_full(error):
                raise DiskFull(f"the disk of {str(scratch)!r} is full: no room for the data set") from error
            raise
        for _ in range(min(workers, len(cells))):
            pool.append(_Worker(path, threads))
        for worker in pool:
            worker.give(waiting.popleft(), watcher)
        while busy := [worker for worker in pool if worker.cell is not None]:
            for connection in wait([worker.connection for worker in busy]):
                worker = next(worker for worker in busy if worker.connection is connection)
                kind, content = worker.receive()
                cell = worker.cell
                assert cell is not None  # it is busy
                if kind == "progress":
                    watcher.progressed(cell, content)
                    continue
                if kind == "finished":
                    (RunFolder(cell.recipe.out) / ERROR).unlink(missing_ok=True)
                    watcher.finished(cell, RunResult.read(cell.recipe.out))
                else:
                    failures.append(record_failure(cell, content))
                    watcher.failed(cell, failures[-1].reason)
                full = full or kind == "full"
                worker.cell = None
                if waiting and not full:
                    if kind == "died":
                        worker.end()
                        pool[pool.index(worker)] = worker = _Worker(path, threads)
                    worker.give(waiting.popleft(), watcher)
    finally:
        for worker in pool:
            worker.process.terminate()
        deadline = time.monotonic() + GRACE
        for worker in pool:
            worker.end(deadline)
        path.unlink(missing_ok=True)
    if full:
        names = ", ".join(failure.cell for failure in failures)
        raise DiskFull(
            f"the disk of {str(scratch)!r} is full: {names} could not be written, {len(waiting)} cells were not begun; "
            "every finished cell is kept: make room and run the same command again"
        )
    return failures


def record_failure(cell: Cell, error: str) -> Failure:
    """Write the error into the cell's folder, where there is room for it."""
    with contextlib.suppress(OSError):
        Path(cell.recipe.out).mkdir(parents=True, exist_ok=True)
        files.write_text(Path(cell.recipe.out) / ERROR, error)
    return Failure(cell.name, cell.recipe.out, error)


def explain(error: BaseException) -> str:
    """An error as one line, and below it where it came from."""
    line = " ".join(str(error).partition("\n")[0].split())
    return f"{type(error).__name__}: {line}\n\n{''.join(traceback.format_exception(error))}"


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error comes from a disk without room; torch wraps the system's into one of its own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in FULL:
            return True
        error = error.__cause__ or error.__context__
    return False


def processes() -> contexts.SpawnContext | contexts.ForkServerContext:
    """How workers are started: never as a fork of this process, whose threads may have run and whose GPU may be in use.

    On Linux they are forks of a server that has imported what a run needs and done nothing else. Elsewhere each is a
    new interpreter: macOS has the server, but its system libraries do not stand a fork.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTS))
    return context


class _Worker:
    """A process and the pipe to it."""

    def __init__(self, data: Path, threads: int) -> None:
        context = processes()
        self.connection, theirs = context.Pipe()
        # The server keeps the environment that it was started in.
        self.process = context.Process(target=_work, args=(theirs, str(data), threads, dict(os.environ)))
        self.process.start()
        theirs.close()
        self.cell: Cell | None = None

    def give(self, cell: Cell, watcher: Watcher) -> None:
        self.cell = cell
        with contextlib.suppress(BrokenPipeError):  # it died; receive() says so
            self.connection.send(cell.recipe)
        watcher.started(cell)

    def receive(self) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = self.connection.recv()
            return message
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode or 0
            how = f"was killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with {code}"
            hint = "; the system does that when memory runs out: use fewer --workers" if code == -9 else ""
            return "died", f"its process {how}{hint}"

    def end(self, deadline: float = 0.0) -> None:
        self.process.join(max(0.0, deadline - time.monotonic()))
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()


class _Reporter(Observer):
    """Sends how far a run is to the parent, now and then."""

    def __init__(self, send: Callable[[float], None]) -> None:
        self.send, self.last = send, 0.0

    def started(self, recipe: Recipe, steps: int, step: int) -> None:
        self.steps = steps
        self.send(step / steps)

    def stepped(self, step: int) -> None:
        now = time.monotonic()
        if now - self.last > INTERVAL:
            self.last = now
            self.send(step / self.steps)


def _work(connection: Connection, data: str, threads: int, environment: Mapping[str, str]) -> None:
    """What a worker does: cells from the pipe, until it closes."""
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # leaves temporary files and locks in order
    threading.Thread(target=_outlive_nobody, daemon=True).start()
    torch.set_num_threads(threads)
    splits = data_file.read(data)
    while True:
        try:
            recipe = connection.recv()
        except EOFError:
            return
        try:
            reporter = _Reporter(lambda fraction: connection.send(("progress", fraction)))
            run(recipe, resume=True, wait=True, observer=reporter, splits=splits)
        except Stopped:
            sys.exit(1)  # by SIGTERM; the run has its checkpoint
        except Exception as error:
            connection.send(("full" if is_disk_full(error) else "failed", explain(error)))
        else:
            connection.send(("finished", None))


def _outlive_nobody() -> None:
    """End this process with its parent, however that ended."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)
