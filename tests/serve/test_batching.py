"""The queue of a server: what is put together, how long it waits, and what becomes of one that fails."""

import asyncio
import threading
import time

import numpy as np
import pytest

from mirrormask.runtime.bundle.loaded import Port
from mirrormask.serve.batches import Batches, Full


class Model:
    """Doubles what it gets; remembers its batches; refuses sixes."""

    inputs = (Port("x", (None, 2), (1, 2)),)
    outputs = (Port("y", (None, 2), (1, 2)),)
    variants = (None,)

    def __init__(self):
        self.batches, self.gate = [], threading.Event()
        self.gate.set()

    def check(self, arrays):
        if arrays["x"].shape[1] > 3:
            raise ValueError("too wide")

    def run(self, arrays):
        self.gate.wait()
        self.batches.append(arrays["x"].shape)
        if (arrays["x"] == 6).any():
            raise ArithmeticError("a six")
        return {"y": 2 * arrays["x"]}


def x(value, rows=1, width=2):
    return {"x": np.full((rows, width), value, np.float32)}


def served(work, **options):
    async def main():
        model = Model()
        batches = Batches(model, **{"most": 8, "delay": 0.05, "room": 100, **options})
        task = asyncio.create_task(batches.run())
        try:
            return model, await work(model, batches)
        finally:
            batches.end()
            await task

    return asyncio.run(main())


def test_what_comes_together_runs_together():
    async def work(model, batches):
        return await asyncio.gather(*[batches.submit(x(i, rows)) for i, rows in enumerate((1, 2, 3, 1, 4, 1))])

    model, answers = served(work)
    assert [len(answer["y"]) for answer in answers] == [1, 2, 3, 1, 4, 1]
    assert all((answer["y"] == 2 * i).all() for i, answer in enumerate(answers))
    assert model.batches == [(8, 2), (4, 2)]  # 1+2+3+1 and the 1 behind the 4, which was too many


def test_other_shapes_wait_for_their_own_batch():
    async def work(model, batches):
        return await asyncio.gather(*[batches.submit(x(i, 1, 2 + i % 2)) for i in range(6)])

    model, answers = served(work)
    assert sorted(model.batches) == [(3, 2), (3, 3)]
    assert all((answer["y"] == 2 * i).all() for i, answer in enumerate(answers))


def test_one_alone_waits_no_longer_than_the_delay_and_a_full_batch_not_at_all():
    async def work(model, batches):
        start = time.monotonic()
        await batches.submit(x(1))
        alone = time.monotonic() - start
        start = time.monotonic()
        await asyncio.gather(*[batches.submit(x(1)) for _ in range(8)])
        return alone, time.monotonic() - start

    _, (alone, full) = served(work, delay=0.5)
    assert alone >= 0.5 and full < 0.45


def test_one_that_fails_fails_alone():
    async def work(model, batches):
        return await asyncio.gather(*[batches.submit(x(i)) for i in (5, 6, 7)], return_exceptions=True)

    _, (five, six, seven) = served(work)
    assert (five["y"] == 10).all() and (seven["y"] == 14).all() and isinstance(six, ArithmeticError)


def test_bad_ones_are_refused_before_they_wait_and_too_many_too():
    async def work(model, batches):
        with pytest.raises(ValueError, match="too wide"):
            await batches.submit(x(1, 1, 4))
        model.gate.clear()
        first = asyncio.create_task(batches.submit(x(0)))
        await asyncio.sleep(0.1)  # it runs, and the queue is empty
        others = [asyncio.create_task(batches.submit(x(i))) for i in (1, 2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Full, match="2 requests wait already"):
            await batches.submit(x(9))
        others[1].cancel()
        model.gate.set()
        return await asyncio.gather(first, *others, return_exceptions=True)

    _, (first, second, gone) = served(work, room=2, delay=0.0)
    assert (first["y"] == 0).all() and (second["y"] == 2).all() and isinstance(gone, asyncio.CancelledError)
