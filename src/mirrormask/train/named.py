"""Models and data of one's own, by name: ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``.

A name is code that will run. What a user types is imported; what a file says is not, unless the user allows it.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mirrormask import checks

__all__ = ["check_allowed", "fetch", "is_code"]

#: What stands before a colon for something else.
KINDS = ("datasets", "folder", "timm", "torchvision")
CODE = re.compile(r"(?P<where>.+\.py|[A-Za-z_]\w*(\.\w+)*):(?P<name>[A-Za-z_]\w*)")


def is_code(name: str) -> bool:
    """Whether a name of a model or a data set stands for code to import.

    Example:
        >>> [is_code(name) for name in ("nets.py:small", "package.nets:small", "timm:resnet18", "mlp")]
        [True, True, False, False]
    """
    return name.partition(":")[0] not in KINDS and CODE.fullmatch(name) is not None


def check_allowed(names: Iterable[str], *, typed: Sequence[str] = (), allow_code: bool = False) -> None:
    """Refuse to import what only a file asks for.

    Args:
        names: of a recipe's model and data.
        typed: the words that the user has given.
        allow_code: whether the user trusts the file.

    Raises:
        ValueError: one is code, and is neither among the words nor allowed.
    """
    words = {word for argument in typed for word in (argument, argument.partition("=")[2])}
    for name in names:
        if is_code(name) and name not in words and not allow_code:
            raise ValueError(
                f"{name!r} is code that would be imported and run, and only a file names it; if you trust that file, "
                "add --allow-code true (in Python: allow_code=True), or name it yourself on the command line"
            )


def fetch(target: str) -> Any:
    """What ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME`` stands for.

    Raises:
        ValueError: there is no such file, module or name.

    Example:
        >>> fetch("torch.nn:Linear").__name__
        'Linear'
    """
    found = CODE.fullmatch(target)
    if found is None:
        raise ValueError(f"{target!r} is neither FILE.py:NAME nor PACKAGE.MODULE:NAME")
    where, name = found["where"], found["name"]
    module = _from_file(Path(where)) if where.endswith(".py") else _from_package(where, target)
    if not hasattr(module, name):
        own = [key for key, value in vars(module).items() if not key.startswith("_") and callable(value)]
        checks.check_known(f"name in {where}:", name, own)
    return getattr(module, name)


def _from_file(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {str(path)!r} (here: {Path.cwd()})")
    # A name that no package has, the same for each process: dataclasses and pickle look their module up.
    name = f"mirrormask_file_{path.stem}_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _from_package(where: str, target: str) -> Any:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not (where == error.name or where.startswith(error.name + ".")):
            raise  # it is there, and lacks a module itself
        raise ValueError(
            f"cannot import {target!r}: there is no module {error.name!r} on Python's path; for a file, write "
            "FILE.py:NAME"
        ) from None
