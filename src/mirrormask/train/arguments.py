"""How options may be written: short names, dashes or underscores, and what was meant by one that is unknown."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

__all__ = ["SHORT", "formatter", "plain", "spelled", "told"]

#: The parts of a recipe whose name stands for their ``.name``.
SECTIONS = ("data", "model", "method", "optimizer", "schedule", "teacher")
#: Short names where nothing else could be meant -> the option.
SHORT = {
    "lr": "optimizer.lr",
    "learning_rate": "optimizer.lr",
    "momentum": "optimizer.momentum",
    "nesterov": "optimizer.nesterov",
    "weight_decay": "optimizer.weight_decay",
    "warmup": "schedule.warmup",
    "temperature": "teacher.temperature",
    "init": "model.init",
    "root": "data.root",
    "download": "data.download",
    "size": "data.size",
    "crop": "data.crop",
    "flip": "data.flip",
    "validation": "data.validation",
}
#: Options that hold keyword arguments of something else: what follows them is not known here.
FREE = ("method.options", "model.options", "optimizer.options", "options")


def spelled(arguments: Sequence[str], known: Iterable[str]) -> list[str]:
    """Command-line arguments with every option as the parser knows it.

    Args:
        arguments: as the user wrote them.
        known: the parser's options, with their dashes.

    Raises:
        ValueError: an option is unknown; the nearest one is suggested.

    Example:
        >>> known = ["--optimizer.lr", "--batch_size", "--model.name", "--method.options"]
        >>> spelled(["--lr=0.1", "--batch-size", "8", "--model", "mlp", "--method.options.end_at", "0.5"], known)
        ['--optimizer.lr=0.1', '--batch_size', '8', '--model.name', 'mlp', '--method.options.end_at', '0.5']
        >>> spelled(["--batchsize", "8"], known)
        Traceback (most recent call last):
        ValueError: unknown option --batchsize; did you mean --batch_size? --help lists them all
    """
    names = {option[2:] for option in known if option.startswith("--")}
    result = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if option.startswith("--") and len(option) > 2:
            option = "--" + _one(option[2:], names)
        result.append(option + equals + value)
    return result


#: What a parser made of signatures writes behind an option: its type in Python's words, and its default in YAML's.
KIND = re.compile(r"\s*\((?:(?:required, )?type: .*?(?:, default: (?P<default>.*))?|default: null)\)$", re.DOTALL)


def formatter(parent: type) -> type:
    """``parent``, a parser's writer of help, without Python's types; what frames the options stays as it is written."""

    def expand(self: Any, action: argparse.Action) -> str:
        return told(parent._expand_help(self, action))  # type: ignore[attr-defined]

    return type("Formatter", (argparse.RawDescriptionHelpFormatter, parent), {"_expand_help": expand})


def told(text: str) -> str:
    """An option's help, its type left out, and its default where it has one.

    Example:
        >>> told("images at a time. (type: int, default: 1)"), told("CPU threads. (type: int | null, default: null)")
        ('images at a time (default: 1)', 'CPU threads')
    """
    found = KIND.search(text)
    if found is None:
        return text
    default = {"True": "true", "False": "false"}.get(found["default"], found["default"])
    shown = f" (default: {default})" if default not in (None, "", "null", "{}") else ""
    return text[: found.start()].removesuffix(".") + shown


def plain(text: str) -> str:
    """A docstring's text as a terminal should show it, without marks for code and for links.

    Example:
        >>> plain("``fp32`` or a :class:`mirrormask.train.data.Splits`")
        'fp32 or a mirrormask.train.data.Splits'
    """
    return re.sub(r":\w+:`~?([\w.]+)`", r"\1", text).replace("``", "")


def _one(given: str, names: set[str]) -> str:
    key = given.replace("-", "_")
    for free in FREE:
        if key.startswith(free + ".") and free in names:
            return free + given[len(free) :]
    # A section's name comes first: for the parser its bare option is a file.
    long = f"{key}.name" if key in SECTIONS else SHORT.get(key, key)
    if long in names:
        return long
    if key in names:
        return key
    usable = {short for short, meant in SHORT.items() if meant in names}
    usable |= {section for section in SECTIONS if f"{section}.name" in names}
    leaves = [name for name in sorted(names) if name.rpartition(".")[2] == key]
    close = leaves or difflib.get_close_matches(key, sorted(names | usable), n=1)
    guess = f"; did you mean --{close[0]}?" if close else "."
    raise ValueError(f"unknown option --{given}{guess} --help lists them all")
