"""Checks of arguments, in one place, so that every message says what it got, what is allowed and what to do."""

from __future__ import annotations

import argparse
import difflib
import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any, NoReturn

__all__ = [
    "Parser",
    "callers_level",
    "check_int",
    "check_known",
    "check_number",
    "check_options",
    "check_sparsity",
    "few",
    "one_line",
    "printable",
    "require",
]


def check_number(
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    hint: str = "",
) -> float:
    """Return ``value`` as a float if it is a finite number in the interval, else raise.

    Raises:
        TypeError: ``value`` is not a real number (``bool`` is refused too).
        ValueError: it is not finite or lies outside the interval.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not a number{_dash(hint)}")
    below = value <= low if open_low else value < low
    above = value >= high if open_high else value > high
    if not math.isfinite(value) or below or above:
        interval = f"{'(' if open_low or low == -math.inf else '['}{low:g}, {high:g}"
        interval += ")" if open_high or high == math.inf else "]"
        raise ValueError(f"{name}={value!r} is outside {interval}{_dash(hint)}")
    return float(value)


#: The largest integer that a file of a run holds: 64 bits with a sign.
LARGEST = 2**63 - 1


def check_int(name: str, value: int, *, low: int, high: int = LARGEST, hint: str = "") -> int:
    """Return ``value`` if it is an integer from ``low`` to ``high``, else raise TypeError or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r} is a {type(value).__name__}, not an integer{_dash(hint)}")
    if value < low:
        raise ValueError(f"{name}={value!r} is below {low}{_dash(hint)}")
    if value > high:
        raise ValueError(f"{name} is above {high:,}{_dash(hint)}")
    return value


def check_sparsity(value: float, name: str = "sparsity") -> float:
    """Return ``value`` if it is a sparsity, the fraction of zeros in [0, 1), else raise."""
    hint = "sparsity is the fraction of zeros; leave a layer out if you meant to drop it"
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 2 <= value < 100:
        hint = f"sparsity is the fraction of zeros; did you mean {value / 100:g}?"
    return check_number(name, value, low=0.0, high=1.0, open_high=True, hint=hint)


def check_known(kind: str, name: str, known: Iterable[str]) -> str:
    """Return ``name`` if it is one of ``known``, else raise a ValueError that lists the known ones."""
    names = sorted(known)
    if name in names:
        return name
    close = difflib.get_close_matches(str(name), names, n=1)
    guess = f"; did you mean {close[0]!r}?" if close else "."
    raise ValueError(f"unknown {kind} {name!r}{guess} Known: {', '.join(names)}")


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are errors, for the command line to turn into its one message."""

    def error(self, message: str) -> NoReturn:
        """Raise what argparse would print."""
        raise ValueError(message)


def known_options(arguments: Iterable[str], known: Iterable[str]) -> list[str]:
    """Command-line arguments with each option as ``known`` has it, else raise a ValueError with the nearest one.

    Example:
        >>> known_options(["a", "--max_batch=4"], ["-h", "--max-batch"])
        ['a', '--max-batch=4']
        >>> known_options(["--max-bath", "4"], ["-h", "--max-batch"])
        Traceback (most recent call last):
        ValueError: unknown option --max-bath; did you mean --max-batch? --help lists them all
    """
    names = {option.replace("_", "-"): option for option in known if option.startswith("--")}
    result = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.startswith("--") and len(option) > 2:
            key = option.replace("_", "-")
            if key not in names:
                close = difflib.get_close_matches(key, names, n=1)
                guess = f"; did you mean {names[close[0]]}?" if close else "."
                raise ValueError(f"unknown option {option}{guess} --help lists them all")
            option = names[key]
        result.append(option + equals + value)
    return result


def check_options(kind: str, name: str, function: Callable[..., Any], options: Iterable[str]) -> None:
    """Raise a TypeError that lists what is allowed, unless ``function`` takes every one of ``options`` as a keyword.

    Its positional parameters that have no default are the caller's affair and are neither listed nor allowed.
    """
    parameters = inspect.signature(function).parameters.values()
    allowed = [p.name for p in parameters if p.default is not p.empty or p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in allowed:
            has = f"its options: {', '.join(allowed)}" if allowed else "it has no options"
            raise TypeError(f"{kind} {name!r} does not take the option {option!r}; {has}")


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Import an optional dependency, or raise an ImportError that names the extra to install."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{purpose} needs {module.split('.')[0]}, which is not installed; run: pip install 'mirrormask[{extra}]'"
        ) from error


def callers_level() -> int:
    """The ``stacklevel`` that makes a warning of the function that asks point at the user's own line.

    For ``warnings.warn(message, stacklevel=callers_level())``: frames of mirrormask and torch are passed over.
    """
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("mirrormask", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def printable(text: str) -> str:
    """A text for a terminal: what it would act on, and bytes of a file's name that are no text, are escaped.

    Example:
        >>> printable("a\\x1b[2J\\nb")
        'a\\\\x1b[2J\\nb'
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


def one_line(text: str, most: int = 200) -> str:
    """A text that someone else chose, for a line or a cell of a table: printable, without breaks, and cut.

    Example:
        >>> one_line("a\\nb" + 300 * "c", 5)
        'a\\\\nbcc...'
    """
    cut = text if len(text) <= most else text[:most] + "..."
    return printable(cut).replace("\n", "\\n").replace("\t", "\\t")


def few(names: Sequence[str]) -> str:
    """Names for a message, as many as one reads.

    Example:
        >>> few(["a", "b", "c", "d", "e", "f", "g"])
        'a, b, c, d, e and 2 more'
    """
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _dash(hint: str) -> str:
    return f"; {hint}" if hint else ""
