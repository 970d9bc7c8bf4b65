"""What a method reads: options as the fields of frozen dataclasses, which combine by inheritance."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

from mirrormask.methods.base import Method

__all__ = ["Options", "reads"]

P = ParamSpec("P")
Read = TypeVar("Read", bound="Options")
T = TypeVar("T")


@dataclass(frozen=True)
class Options:
    """What every method reads; each group of options in :mod:`mirrormask.methods.groups` extends it.

    A group's docstring has the line of each of its options, its fields have their types and defaults. A class that
    extends several groups has the options of all.

    Args:
        sparsity: the fraction of zeros, in [0, 1).
    """

    sparsity: float

    def part(self, kind: type[T], **given: Any) -> T:
        """A part of the method: ``kind`` with every option that has the name of one of its fields.

        Args:
            kind: a geometry, a decay, a mask or a correction; a dataclass.
            given: fields that no option of this name is for; they come before options.

        Example:
            >>> from mirrormask.masks import AtStart
            >>> from mirrormask.methods.groups import Seed
            >>> Seed(0.9, seed=3).part(AtStart, score="random")
            AtStart(sparsity=0.9, score='random', allocation='global', pattern=None, seed=3, floor=0.3)
        """
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields: tuple[dataclasses.Field[Any], ...] = dataclasses.fields(kind)  # type: ignore[arg-type]
        return kind(**{field.name: own[field.name] for field in fields if field.name in own} | given)


def reads(options: Callable[P, Read]) -> Callable[[Callable[[Read], Method]], Callable[P, Method]]:
    """Turn a function of ``options`` into one that is called with them one by one, as users call a method.

    Signature and docstring list every option, with its default and its line, those of the most special group first.

    Args:
        options: a class that extends :class:`Options`.

    Example:
        >>> from mirrormask.decay import ConstantDecay
        >>> from mirrormask.geometry import Euclidean
        >>> from mirrormask.masks import AtStart
        >>> from mirrormask.methods.groups import Seed
        >>> @reads(Seed)
        ... def drawn(options):
        ...     return Method(Euclidean(), ConstantDecay(), options.part(AtStart, score="random"), "drawn")
        >>> print(inspect.signature(drawn))
        (sparsity: 'float', *, seed: 'int' = 0) -> 'Method'
        >>> drawn(0.9, seed=3).mask.seed
        3
    """
    kind: Any = options
    groups = [Options, *(group for group in kind.__mro__ if group not in (Options, object))]
    signature = _signature(kind, groups)

    def decorate(function: Callable[[Read], Method]) -> Callable[P, Method]:
        @functools.wraps(function)
        def method(*args: P.args, **kwargs: P.kwargs) -> Method:
            try:
                signature.bind(*args, **kwargs)
            except TypeError as error:
                raise TypeError(f"{function.__name__}(): {error}") from None
            return function(options(*args, **kwargs))

        method.__signature__ = signature  # type: ignore[attr-defined]
        method.__annotations__ = {name: p.annotation for name, p in signature.parameters.items()} | {"return": "Method"}
        method.__doc__ = _documented(inspect.getdoc(function) or "", groups)
        return method

    return decorate


def _signature(kind: type[Options], groups: list[type]) -> inspect.Signature:
    order: dict[str, None] = {}
    for group in groups:
        for name in inspect.get_annotations(group):
            order.pop(name, None)  # a group that only gives another default leaves an option in its place
            order[name] = None
    parameters = inspect.signature(kind).parameters
    return inspect.Signature([parameters[name] for name in order], return_annotation="Method")


def _documented(text: str, groups: list[type]) -> str:
    """The method's own docstring with the lines of its options before its ``Raises:``, ``Example:`` or ``Source:``."""
    docs = [inspect.cleandoc(vars(group)["__doc__"] or "") for group in groups]
    lines = [lines for doc in docs if (lines := doc.partition("Args:\n")[2].partition("\n\n")[0])]
    found = [text.find(f"\n\n{section}:") for section in ("Raises", "Example", "Source")]
    at = min((place for place in found if place >= 0), default=len(text))
    return text[:at] + "\n\n" + "\n".join(["Args:", *lines]) + text[at:]
