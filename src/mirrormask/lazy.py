"""Names of a package that are imported when they are first used: help on a command must not wait for torch."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping
from typing import Any

__all__ = ["lazily"]


def lazily(package: str, places: Mapping[str, str], modules: Collection[str] | None = None) -> Callable[[str], Any]:
    """A ``__getattr__`` for a package.

    Args:
        package: its name.
        places: public name -> the module that it is in.
        modules: those of its modules that are its attributes before anybody imports them; None for all.

    Raises:
        AttributeError: by what is returned, for a name that is not among them; the public ones are listed.

    Example:
        >>> get = lazily("xml", {"sqrt": "math"})
        >>> get("sqrt")(9.0), get("dom").__name__
        (3.0, 'xml.dom')
    """

    def get(name: str) -> Any:
        if name in places:
            return getattr(importlib.import_module(places[name]), name)
        known = modules is None or name in modules
        if known and not name.startswith("_") and importlib.util.find_spec(f"{package}.{name}") is not None:
            return importlib.import_module(f"{package}.{name}")  # as if the package had imported it
        raise AttributeError(f"module {package!r} has no attribute {name!r}; public names: {', '.join(sorted(places))}")

    return get
