"""What a method is, and the table of the named ones."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, ParamSpec

from mirrormask.checks import check_known
from mirrormask.corrections import Correction
from mirrormask.decay import Decay
from mirrormask.geometry import Geometry
from mirrormask.masks import DATA_SCORES, Mask

__all__ = ["Method", "Row", "get", "named", "names", "table"]

P = ParamSpec("P")


@dataclass(frozen=True)
class Method:
    """A geometry, a decay and a mask, and what follows the optimizer's step; each combination works.

    Args:
        geometry: how a weight moves.
        decay: how strongly the implicit bias pulls on the latents; only a geometry that has latents can have one.
        mask: which weights live, and the target sparsity.
        name: for logs and tables.
        correction: a step after the optimizer's (HAM's mirror step, a proximal step); None for none.
        adaptive: the method where the base optimizer rescales gradients (Adam and its kin), if another one; it goes by
            this one's name.

    Raises:
        TypeError: a part is not of its kind.
        ValueError: a decay on a geometry without latents, a coupled one where there is nothing to couple it to, or
            another sparsity under an adaptive optimizer.

    Example:
        >>> from mirrormask.decay import ConstantDecay
        >>> from mirrormask.geometry import Hadamard
        >>> from mirrormask.masks import Never
        >>> Method(Hadamard(beta=1.0), ConstantDecay(alpha=1e-4), Never(sparsity=0.9)).sparsity
        0.9
    """

    geometry: Geometry
    decay: Decay
    mask: Mask
    name: str = "custom"
    correction: Correction | None = None
    adaptive: Method | None = None

    def __post_init__(self) -> None:
        kinds = {"geometry": Geometry, "decay": Decay, "mask": Mask, "correction": Correction, "adaptive": Method}
        for field, kind in kinds.items():
            value = getattr(self, field)
            if not isinstance(value, kind) and not (field in ("correction", "adaptive") and value is None):
                raise TypeError(f"{field}={value!r} is a {type(value).__name__}, not a {kind.__name__}")
        if not self.decay.off and not self.geometry.latents:
            raise ValueError(
                f"{self.decay!r} decays latents, but {type(self.geometry).__name__} has none; "
                "use ConstantDecay(0.0) here, or the base optimizer's weight_decay"
            )

        if self.decay.coupled and not self.geometry.couples:
            raise ValueError(
                f"{type(self.geometry).__name__} has no gradient for a coupled decay to join; "
                "leave out coupled=True, or use the geometry Hadamard"
            )
        if self.adaptive is not None and self.adaptive.sparsity != self.sparsity:
            raise ValueError(
                f"adaptive= asks for sparsity {self.adaptive.sparsity!r} where the method itself asks for "
                f"{self.sparsity!r}; give both the same"
            )

    def under(self, *, adaptive: bool) -> Method:
        """This method under a base optimizer that rescales gradients, or under one that does not."""
        chosen = self.adaptive if adaptive and self.adaptive is not None else self
        return dataclasses.replace(chosen, name=self.name, adaptive=None)

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that ``finalize()`` leaves."""
        return self.mask.sparsity

    @property
    def reads_data(self) -> bool:
        """Whether ``mm.sparsify`` needs ``batches=``."""
        return self.mask.score in DATA_SCORES or (self.adaptive is not None and self.adaptive.reads_data)


class Row(NamedTuple):
    """One line of the table of methods: its name, what it is, and where it comes from."""

    name: str
    line: str
    reference: str


_METHODS: dict[str, Callable[..., Method]] = {}
_REFERENCES: dict[str, str] = {}


def named(reference: str, name: str | None = None) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Put a function that returns a :class:`Method` into the table, under its own name or ``name``.

    Its docstring's first line says what the method is. Called with an option that it does not read, it raises a
    TypeError that lists those that it does.

    Args:
        reference: the paper, with its arXiv id where it has one.
        name: where the function's own name will not do.

    Raises:
        ValueError: the name is taken.
    """

    def register(function: Callable[P, Method]) -> Callable[P, Method]:
        key = name or function.__name__
        options = list(inspect.signature(function).parameters)
        if key in _METHODS:
            raise ValueError(f"a method named {key!r} exists already; choose another name")

        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> Method:
            unread = [option for option in kwargs if option not in options]
            if unread:
                raise TypeError(
                    f"the method {key!r} does not read {', '.join(unread)}; its options: {', '.join(options)}"
                )
            return function(*args, **kwargs)

        _METHODS[key] = checked
        _REFERENCES[key] = reference
        return checked

    return register


def names() -> dict[str, str]:
    """The known methods: name -> one line on what it is.

    Example:
        >>> names()["gmp"]
        'Gradual magnitude pruning by the cubic schedule.'
    """
    return {name: (inspect.getdoc(function) or "").splitlines()[0] for name, function in sorted(_METHODS.items())}


def table() -> list[Row]:
    """The known methods with their references, as ``mirrormask info methods`` prints them.

    Example:
        >>> [row.reference for row in table() if row.name == "gmp"]
        ['Zhu and Gupta 2017, arXiv 1710.01878']
    """
    return [Row(name, line, _REFERENCES[name]) for name, line in names().items()]


def get(name: str) -> Callable[..., Method]:
    """The function behind a name.

    Raises:
        ValueError: the name is unknown; the known ones are listed.

    Example:
        >>> get("mirror")(0.95).sparsity
        0.95
    """
    return _METHODS[check_known("method", name, _METHODS)]
