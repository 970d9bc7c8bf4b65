"""What a command made, as values: a command tells it, and the command line prints it where ``--json`` asks for it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

__all__ = ["apart", "is_first", "is_quiet", "plain", "take", "tell", "warn"]

_results: list[Any] = []
_quiet = [False]


def tell(result: Any) -> None:
    """Hand over what the command made; a command that calls another tells last, and its word counts."""
    _results[:] = [result]


def take() -> Any:
    """What the last command told, as :func:`plain` values; None where it told nothing. It is forgotten here."""
    return plain(_results.pop()) if _results else None


def is_quiet() -> bool:
    """Whether ``--quiet`` was said: for what would be printed on standard error and is no warning."""
    return _quiet[0]


def warn(text: str, show: Callable[..., object], *shown: object) -> None:
    """A warning: ``show(*shown)`` puts it where all else is shown; with ``--quiet`` it goes to standard error."""
    if is_quiet():
        print(text, file=sys.stderr)
    else:
        show(*shown)


def is_first() -> bool:
    """Whether this process is the one that speaks; asked before there is any other that it could ask."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
    ranks = [os.environ[name] for name in names if os.environ.get(name, "").isdecimal()]
    return not ranks or int(ranks[0]) == 0


@contextlib.contextmanager
def apart(*, quiet: bool, aside: bool) -> Iterator[None]:
    """Send standard output nowhere (``quiet``) or to standard error (``aside``); that of child processes too."""
    if not quiet and not aside:
        yield
        return
    with contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(os.devnull, "w", encoding="utf-8")) if quiet else sys.stderr
        stack.enter_context(_descriptor(sink))
        stack.enter_context(contextlib.redirect_stdout(sink))
        _quiet[0] = quiet
        stack.callback(_quiet.__setitem__, 0, False)
        yield


@contextlib.contextmanager
def _descriptor(sink: Any) -> Iterator[None]:
    """Point file descriptor 1 at ``sink``, where standard output is that descriptor and not, as in a test, a text."""
    try:
        ours, there = sys.stdout.fileno() == 1, sink.fileno()
    except (AttributeError, OSError, ValueError):
        ours, there = False, -1
    if not ours:
        yield
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(there, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def plain(value: Any) -> Any:
    """Values as JSON has them: a path is a string, and a number that is not finite is null.

    Example:
        >>> from pathlib import Path
        >>> plain({"folder": Path("runs"), "loss": float("nan"), "shape": (2, 3)})
        {'folder': 'runs', 'loss': None, 'shape': [2, 3]}
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(dataclasses.asdict(value))
    return str(value)
