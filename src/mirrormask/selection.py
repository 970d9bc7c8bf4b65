"""Which tensors of a model may become sparse, and how sparse they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

__all__ = ["LayerSparsity", "Sparsity", "Weights", "select_weights", "sparsity"]

#: How a caller selects weights: glob patterns over parameter names, or a predicate ``(name, module) -> bool``.
Weights = str | Sequence[str] | Callable[[str, nn.Module], bool]

SPARSIFIABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def select_weights(model: nn.Module, weights: Weights | None = None) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that may become sparse, by name, in the order of ``named_parameters``.

    Args:
        model: any module.
        weights: ``None`` for the ``weight`` of every Linear and Conv1d/2d/3d; glob patterns over parameter
            names (``"layer4.*.weight"``); or a predicate ``(name, module) -> bool`` that is asked for every
            parameter, with the module that owns it. Frozen parameters are left out by default.

    Returns:
        name -> parameter. A tied weight appears once, under its first name.

    Raises:
        ValueError: a pattern matches no parameter, or nothing at all is selected.

    Example:
        >>> from torch import nn
        >>> list(select_weights(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
        ['0.weight', '2.weight']
    """
    named = list(_owned_parameters(model))
    if weights is None:
        chosen = {
            name: parameter
            for name, parameter, owner in named
            if isinstance(owner, SPARSIFIABLE) and name.split(".")[-1] == "weight" and parameter.requires_grad
        }
        remedy = "pass weights= with patterns or a predicate to choose other parameters"
    elif callable(weights):
        chosen = {name: parameter for name, parameter, owner in named if weights(name, owner)}
        remedy = "the predicate weights= returned False for every parameter"
    else:
        patterns = [weights] if isinstance(weights, str) else list(weights)
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name, _, _ in named):
                known = ", ".join(name for name, _, _ in named[:12]) + (", ..." if len(named) > 12 else "")
                raise ValueError(f"the pattern {pattern!r} matches no parameter of the model; it has: {known}")
        chosen = {
            name: parameter
            for name, parameter, _ in named
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        }
        remedy = "weights= holds no pattern"
    if not chosen:
        raise ValueError(f"{type(model).__name__} has no sparsifiable weight; {remedy}")
    return chosen


def _owned_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Module]]:
    owners = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        yield name, parameter, owners[name.rpartition(".")[0]]


@dataclass(frozen=True)
class LayerSparsity:
    """One weight: its name, shape, number of elements and of nonzeros."""

    name: str
    shape: tuple[int, ...]
    numel: int
    nonzeros: int

    @property
    def sparsity(self) -> float:
        """The fraction of exact zeros in this weight."""
        return 1.0 - self.nonzeros / self.numel if self.numel else 0.0


@dataclass(frozen=True)
class Sparsity:
    """The sparsity of a model: per layer and over all its sparsifiable weights together.

    ``str()`` gives a table; ``float()`` gives the total.
    """

    layers: tuple[LayerSparsity, ...]

    @property
    def numel(self) -> int:
        """The number of sparsifiable weights."""
        return sum(layer.numel for layer in self.layers)

    @property
    def nonzeros(self) -> int:
        """How many of them are not exactly zero."""
        return sum(layer.nonzeros for layer in self.layers)

    @property
    def total(self) -> float:
        """The fraction of exact zeros over all layers together."""
        return 1.0 - self.nonzeros / self.numel if self.numel else 0.0

    def __float__(self) -> float:
        return self.total

    def __str__(self) -> str:
        rows = [(layer.name, layer.numel, layer.nonzeros, layer.sparsity) for layer in self.layers]
        rows.append(("total", self.numel, self.nonzeros, self.total))
        width = max(len("weight"), *(len(row[0]) for row in rows))
        lines = [f"{'weight':<{width}}  {'elements':>12}  {'nonzeros':>12}  {'sparsity':>9}"]
        lines += [f"{name:<{width}}  {n:>12,}  {nnz:>12,}  {100 * s:>8.3f}%" for name, n, nnz, s in rows]
        return "\n".join(lines)


@torch.no_grad()
def sparsity(model: nn.Module, weights: Weights | None = None) -> Sparsity:
    """Count the exact zeros of the sparsifiable weights of ``model``.

    Args:
        model: any module.
        weights: which weights to count, as in :func:`select_weights`; frozen ones count too.

    Returns:
        A :class:`Sparsity`: ``.total`` in [0, 1], ``.layers``, and a table as its ``str``.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight.data = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        >>> sparsity(layer).total
        0.75
    """
    chosen = select_weights(model, _default_predicate if weights is None else weights)
    return Sparsity(tuple(_count(name, parameter) for name, parameter in chosen.items()))


def _default_predicate(name: str, module: nn.Module) -> bool:
    return isinstance(module, SPARSIFIABLE) and name.split(".")[-1] == "weight"


def _count(name: str, parameter: Tensor) -> LayerSparsity:
    nonzeros = int(torch.count_nonzero(parameter))
    return LayerSparsity(name, tuple(parameter.shape), parameter.numel(), nonzeros)
