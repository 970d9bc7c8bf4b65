"""Requests put together: what waits at the same time, and fits each other, runs as one batch.

The first request of a batch waits for others at most a stated delay. While a batch runs, those that come wait for the
next one. Each is answered with its own rows; one that fails alone fails alone.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.bundle.loaded import LoadedModel

__all__ = ["Batches", "Full", "Waiting"]

Array = npt.NDArray[np.float32]
Arrays = dict[str, Array]


class Full(RuntimeError):
    """As many requests wait as may."""


@dataclass(eq=False)
class Waiting:
    """A request that waits.

    Attributes:
        rows: of its batch; 0 if it cannot be put together with others.
        key: requests with equal keys fit each other.
    """

    arrays: Arrays
    rows: int
    key: tuple[object, ...]
    answer: asyncio.Future[Arrays]
    since: float = field(default_factory=time.monotonic)


class Batches:
    """The queue of one model, and what empties it.

    Args:
        model: runs the batches, one after the other.
        most: rows of a batch; a larger request runs alone.
        delay: seconds that a request waits for others, at most.
        room: requests that may wait.
        ran: told of every batch: (requests, rows, seconds).
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        most: int,
        delay: float,
        room: int,
        ran: Callable[[int, int, float], None] = lambda *_: None,
    ) -> None:
        self.model, self.most, self.delay, self.room, self._ran = model, most, delay, room, ran
        self.queue: deque[Waiting] = deque()
        self._arrived, self._ending = asyncio.Event(), False
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="mirrormask-model")
        ports = (*model.inputs, *model.outputs)
        self._together = all(port.shape and port.shape[0] is None for port in ports) and len(model.variants) == 1

    async def submit(self, arrays: Arrays) -> Arrays:
        """The model's outputs for these inputs, once it is their turn.

        Raises:
            TypeError, ValueError: the model does not take them.
            Full: as many wait as may.
        """
        self.model.check(arrays)
        if len(self.queue) >= self.room or self._ending:
            raise Full(f"{len(self.queue)} requests wait already" if not self._ending else "the server is stopping")
        heads = {x.shape[0] for x in arrays.values() if x.ndim}
        rows = heads.pop() if self._together and len(heads) == 1 else 0
        key = tuple((name, arrays[name].shape[1:]) for name in sorted(arrays)) if rows else (object(),)
        waiting = Waiting(arrays, rows, key, asyncio.get_running_loop().create_future())
        self.queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def run(self) -> None:
        """Answer requests until :meth:`end`, and those that wait then."""
        loop = asyncio.get_running_loop()
        while True:
            while not self.queue and not self._ending:
                self._arrived.clear()
                await self._arrived.wait()
            if not self.queue:
                break
            await self._gather()
            batch = self._taken()
            if not batch:
                continue
            start = time.perf_counter()
            results = await loop.run_in_executor(self._pool, _answers, self.model, batch)
            self._ran(len(batch), sum(max(1, waiting.rows) for waiting in batch), time.perf_counter() - start)
            for waiting, result in zip(batch, results, strict=True):
                if waiting.answer.done():  # its client has gone
                    continue
                if isinstance(result, BaseException):
                    waiting.answer.set_exception(result)
                else:
                    waiting.answer.set_result(result)
        self._pool.shutdown(wait=False)

    def end(self) -> None:
        """Take no more, and let :meth:`run` end when all are answered."""
        self._ending = True
        self._arrived.set()

    async def _gather(self) -> None:
        """Wait until the first request has waited long enough, or a batch is full."""
        first = self.queue[0]
        while not self._ending and first.rows and self._rows_like(first) < self.most:
            left = first.since + self.delay - time.monotonic()
            if left <= 0:
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), left)
            except (asyncio.TimeoutError, TimeoutError):
                return

    def _rows_like(self, first: Waiting) -> int:
        return sum(waiting.rows for waiting in self.queue if waiting.key == first.key)

    def _taken(self) -> list[Waiting]:
        """The next batch: the first request, and those that fit it, in order."""
        batch: list[Waiting] = []
        rows, left = 0, deque[Waiting]()
        while self.queue:
            waiting = self.queue.popleft()
            if waiting.answer.done():
                continue
            fits = not batch or (waiting.rows and waiting.key == batch[0].key and rows + waiting.rows <= self.most)
            if fits:
                batch.append(waiting)
                rows += waiting.rows
            else:
                left.append(waiting)
        self.queue = left
        return batch


def _answers(model: LoadedModel, batch: list[Waiting]) -> list[Arrays | BaseException]:
    """The outputs of each request, or why there are none."""
    if len(batch) == 1:
        return [_alone(model, batch[0])]
    try:
        whole = {name: np.concatenate([waiting.arrays[name] for waiting in batch]) for name in batch[0].arrays}
        results = model.run(whole)
    except Exception:  # of one of them, which is found by running each
        return [_alone(model, waiting) for waiting in batch]
    ends = np.cumsum([waiting.rows for waiting in batch])
    starts = [0, *ends[:-1]]
    return [{name: x[low:high] for name, x in results.items()} for low, high in zip(starts, ends, strict=True)]


def _alone(model: LoadedModel, waiting: Waiting) -> Arrays | BaseException:
    try:
        return model.run(waiting.arrays)
    except Exception as error:  # the request's answer
        return error
