"""Timing calls: alone, and in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Literal, TypeVar

__all__ = ["SPINNING", "Watch", "in_turns", "median_seconds", "own_time"]

Key = TypeVar("Key")


def _fine(clock: Literal["thread_time"]) -> bool:
    return hasattr(time, clock) and time.get_clock_info(clock).resolution < 1e-6


#: The time of this thread alone, where the system keeps it finely: other processes do not lengthen it.
own_time: Callable[[], float] = time.thread_time if _fine("thread_time") else time.perf_counter


#: How much longer a thread waits than it works on a machine that is busy, and the least that it then waited: moments in
#: which the system does something are always there.
BUSY, LEAST_WAIT = 1.15, 0.01


class Watch:
    """Whether a thread that computes has the processor for itself: between ``with`` and its end, all added up.

    Others that take it in turns also empty its caches and its other half, of which the thread's own time says nothing.

    Attributes:
        wall, own: seconds that passed, and that the thread worked.
    """

    def __init__(self) -> None:
        self.wall = self.own = 0.0

    def __enter__(self) -> Watch:
        self.wall -= time.perf_counter()
        self.own -= own_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.own += own_time()
        self.wall += time.perf_counter()

    @property
    def busy(self) -> bool:
        """Whether others had the processor for much of the time."""
        return self.wall > BUSY * self.own and self.wall - self.own > LEAST_WAIT


def median_seconds(
    call: Callable[[], object],
    *,
    repeats: int = 5,
    budget: float = 0.25,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """The median time of ``call``, warmed up once; fewer repeats when they would exceed ``budget`` seconds."""
    times = []
    start = clock()
    call()
    for _ in range(repeats):
        before = clock()
        call()
        times.append(clock() - before)
        if times[-1] + before - start > budget:
            break
    return statistics.median(times)


#: Seconds for which threads of a runtime may go on spinning after their work, waiting for more.
SPINNING = 0.3


def in_turns(
    calls: Mapping[Key, Callable[[], object]],
    rounds: int,
    budget: float,
    clock: Callable[[], float] = time.perf_counter,
    *,
    pause: float = 0.0,
    limit: float = float("inf"),
    before_round: Callable[[int], object] = lambda number: None,
) -> dict[Key, list[float]]:
    """Seconds per call of each, once per round; a turn repeats a call for about ``budget`` seconds.

    Args:
        clock: ``time.process_time`` leaves out the moments in which other processes had the processor; it adds up the
            threads of this one, hence it is for a single thread.
        pause: seconds of rest before each turn; after :data:`SPINNING` the threads of whoever ran before are asleep,
            and do not take the cores. Since a core that rested is slow at first, the call then warms up for ``budget``.
        limit: seconds after which no further round begins.
        before_round: called with 0, 1, ..., as a round begins; what it does is not timed.
    """
    repeats = {}
    for name, call in calls.items():
        for _ in range(3):
            start = clock()
            call()
            once = clock() - start
        repeats[name] = max(1, int(budget / once))
    times: dict[Key, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for number in range(rounds):
        if number and time.perf_counter() - begun > limit:
            break
        before_round(number)
        for name, call in calls.items():
            time.sleep(pause)
            for _ in range(repeats[name] if pause else 1):
                call()  # after another, caches are cold
            start = clock()
            for _ in range(repeats[name]):
                call()
            times[name].append((clock() - start) / repeats[name])
    return times
