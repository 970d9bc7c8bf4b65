"""Being asked to stop: SIGTERM, SIGINT and a scheduler's SIGUSR1 are noted, and heeded where the run can go on from."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mirrormask.stopping import Stopped

__all__ = ["Request", "Stopped", "heeded"]

NAMES = ("SIGTERM", "SIGINT", "SIGUSR1")


class Request:
    """Whether a signal has come; ``name`` is its name, or empty."""

    def __init__(self) -> None:
        self.name = ""

    def __bool__(self) -> bool:
        return bool(self.name)

    def note(self, number: int, _: FrameType | None) -> None:
        """The handler; a second Ctrl-C does not wait."""
        if self.name == "SIGINT" and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.name = signal.Signals(number).name


_current: Request | None = None


@contextlib.contextmanager
def heeded() -> Iterator[Request]:
    """Note the signals of :data:`NAMES` within the block instead of dying of them.

    Within another such block it is the same request. Outside the main thread, which alone may have handlers, nothing
    is noted. A signal that this process ignores (``nohup``, a worker whose parent decides) stays ignored.

    Raises:
        Stopped: at the end of the outermost block, if a signal came and nobody has said so.
    """
    global _current
    if _current is not None or threading.current_thread() is not threading.main_thread():
        yield Request() if _current is None else _current  # not `or`: one without a signal is false
        return
    request, before = Request(), dict[int, Any]()
    _current = request
    try:
        for name in NAMES:
            number = getattr(signal, name, None)  # Windows has no SIGUSR1
            if number is not None and signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, request.note)
        yield request
    finally:
        _current = None
        for number, handler in before.items():
            signal.signal(number, handler)
    if request:
        raise Stopped(f"stopped by {request.name}")
