"""Which tensors of a model may become sparse, and how sparse they are."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask import selection_notes as notes
from mirrormask.checks import callers_level
from mirrormask.flats import count_each
from mirrormask.matrices import Candidate, candidates, check_module, defaults
from mirrormask.resharding import reshard

__all__ = ["LayerSparsity", "Sparsity", "Weights", "count_zeros", "select_weights", "sparsity"]

#: How a caller selects weights: glob patterns over parameter names, or a predicate ``(name, module) -> bool``.
Weights = str | Sequence[str] | Callable[[str, nn.Module], bool]


def select_weights(
    model: nn.Module, weights: Weights | None = None, *, frozen: bool = False
) -> dict[str, nn.Parameter]:
    """The parameters of ``model`` that may become sparse, by name, in the order of ``named_parameters``.

    By default these are the matrices of its layers: ``weight`` of Linear, Conv, ConvTranspose, Bilinear and Hugging
    Face's Conv1D, ``in_proj_weight`` or ``q/k/v_proj_weight`` of MultiheadAttention, ``weight_ih``, ``weight_hh`` and
    ``weight_hr`` of recurrent layers and cells; never biases, norms, embeddings or a head that is tied to one
    (``docs/selection.md``). Of a layer under weight norm it is ``v``, under spectral norm the original. Frozen
    parameters are left out unless asked for.

    Args:
        model: any module.
        weights: ``None`` for the default; glob patterns over parameter names (``"layer4.*.weight"``); or a predicate
            ``(name, module) -> bool`` that is asked for every parameter, with the module that owns it. A tied tensor
            goes by all its names and owners: one that a pattern matches or the predicate wants is enough.
        frozen: whether the default takes parameters with ``requires_grad=False`` too.

    Returns:
        name -> parameter. A tied weight appears once, under its first name.

    Raises:
        TypeError: ``model`` is no module, or ``weights`` is of another kind.
        ValueError: a pattern matches no parameter, or nothing at all is selected; what is selected is no tensor of
            real floating numbers, has no values (meta device) or no shape yet (a lazy layer before its first batch).

    Warns:
        UserWarning: the default takes less than half of the elements of all trainable parameters with two or more
            dimensions, embeddings aside; it names the largest left out and the ``weights=`` that takes them in.
            Or it leaves out a layer's matrix because of a parametrization that does not keep zeros, or takes one
            under weight norm; or a pattern chooses a tensor by the later of two tied names.

    Example:
        >>> from torch import nn
        >>> list(select_weights(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))))
        ['0.weight', '2.weight']
        >>> list(select_weights(nn.LSTM(4, 3)))
        ['weight_ih_l0', 'weight_hh_l0']
    """
    listed = candidates(model)
    weights = _checked(weights)
    chosen = _choose(model, listed, weights, frozen=frozen)
    if weights is None:
        said = notes.on_default(model, listed, chosen)
    else:
        said = [] if callable(weights) else notes.on_ties(listed, [weights] if isinstance(weights, str) else weights)
    for note in said:
        warnings.warn(note, stacklevel=callers_level())
    return {c.name: c.parameter for c in chosen}


def _checked(weights: Weights | None) -> Weights | None:
    """``weights`` if it is of its kind, patterns as a list; else a TypeError with the remedy."""
    if weights is None or isinstance(weights, str):
        return weights
    remedy = "; pass names or patterns, such as ['0.weight', '*.fc?.weight'], or a predicate (name, module) -> bool"
    kind = type(weights).__name__
    if isinstance(weights, Mapping):
        raise TypeError(f"weights is a {kind}; the sparsity is one of all weights together{remedy}")
    if isinstance(weights, (bytes, torch.Tensor, nn.Module)) or not isinstance(weights, (Callable, Iterable)):  # type: ignore[arg-type]
        raise TypeError(f"weights is a {kind}, not a choice of names{remedy}")
    if callable(weights):
        return weights
    patterns = list(weights)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"weights= holds a {type(pattern).__name__}, not names alone{remedy}")
    return patterns


def _choose(model: nn.Module, listed: list[Candidate], weights: Weights | None, *, frozen: bool) -> list[Candidate]:
    """What ``weights`` selects, checked; with ``frozen``, the default takes frozen weights too."""
    if weights is None:
        chosen = defaults(listed, frozen=frozen)
    elif callable(weights):
        chosen = [c for c in listed if any(map(weights, c.names, c.owners))]
    else:
        patterns = [weights] if isinstance(weights, str) else weights
        for pattern in patterns:
            if not any(notes.matches(c, pattern) for c in listed):
                raise ValueError(notes.of_no_match(model, listed, pattern))
        chosen = [c for c in listed if any(notes.matches(c, pattern) for pattern in patterns)]
    if not chosen:
        if weights is None:
            remedy = notes.of_nothing(listed)
        elif callable(weights):
            remedy = "the predicate weights= returned False for every parameter"
        else:
            remedy = "weights= holds no pattern"
        raise ValueError(f"{type(model).__name__} has no sparsifiable weight; {remedy}")
    for candidate in chosen:
        problem = notes.problem(candidate)
        if problem:
            raise ValueError(problem)
    return chosen


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

    ``str()`` gives a table, with the share of the model's parameters that it speaks of above it; ``float()`` gives
    the total.

    Attributes:
        layers: the weights that were counted.
        parameters: the number of elements of all the model's parameters, biases and embeddings included; 0 if unknown.
    """

    layers: tuple[LayerSparsity, ...]
    parameters: int = 0

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

    @property
    def share(self) -> float:
        """The fraction of the model's parameters that were counted."""
        return self.numel / self.parameters if self.parameters else 0.0

    def __float__(self) -> float:
        return self.total

    def __str__(self) -> str:
        rows = [(layer.name, layer.numel, layer.nonzeros, layer.sparsity) for layer in self.layers]
        rows.append(("total", self.numel, self.nonzeros, self.total))
        width = max(len("weight"), *(len(row[0]) for row in rows))
        lines = []
        if self.parameters:
            of = f"{self.numel:,} of the model's {self.parameters:,} parameters ({100 * self.share:.1f}%)"
            lines.append(f"zeros among {of}")
        lines += [f"{'weight':<{width}}  {'elements':>12}  {'nonzeros':>12}  {'sparsity':>9}"]
        lines += [f"{name:<{width}}  {n:>12,}  {nnz:>12,}  {100 * s:>8.3f}%" for name, n, nnz, s in rows]
        return "\n".join(lines)


@torch.no_grad()
def sparsity(model: nn.Module, weights: Weights | None = None) -> Sparsity:
    """Count the exact zeros of the sparsifiable weights of ``model``.

    ``s = zeros / elements``, over all those weights together. Of DTensors the zeros of all processes are counted, and
    all of them must call this.

    Args:
        model: any module.
        weights: which weights to count, as in :func:`select_weights`; by default its default, frozen weights included.
            After ``mm.sparsify(..., weights=mine)`` pass the same ``weights=mine``: the model does not remember them,
            and the sparsity that was asked for is that of these weights alone.

    Returns:
        A :class:`Sparsity`: ``.total`` in [0, 1], ``.layers``, ``.share`` of the model's parameters that it speaks of,
        and a table as its ``str``.

    Raises:
        TypeError, ValueError: as :func:`select_weights`. Nothing is warned of here: the share is part of the answer.

    Example:
        >>> from torch import nn
        >>> layer = nn.Linear(4, 1)
        >>> layer.weight.data = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
        >>> sparsity(layer).total
        0.75
        >>> sparsity(layer).share
        0.8
        >>> sparsity(layer, weights=["weight", "bias"]).numel
        5
    """
    check_module(model)
    reshard(model)
    listed = candidates(model)
    chosen = _choose(model, listed, _checked(weights), frozen=True)
    layers = count_zeros({c.name: c.parameter for c in chosen}).layers
    return Sparsity(layers, sum(c.numel for c in listed))


@torch.no_grad()
def count_zeros(weights: Mapping[str, Tensor]) -> Sparsity:
    """The :class:`Sparsity` of these tensors."""
    counts = _nonzeros(list(weights.values()))
    return Sparsity(
        tuple(
            LayerSparsity(name, tuple(x.shape), x.numel(), nonzeros)
            for (name, x), nonzeros in zip(weights.items(), counts, strict=True)
        )
    )


def _nonzeros(tensors: Sequence[Tensor]) -> list[int]:
    """How many elements of each are not zero; of DTensors on all processes, one exchange for those that lie alike."""
    kinds: dict[Any, list[int]] = {}
    for index, x in enumerate(tensors):
        own: Any = x
        if any(kind.__name__ == "DTensor" for kind in type(x).__mro__):
            along = tuple(not placement.is_replicate() for placement in own.placements)
            kinds.setdefault((own.device_mesh, along), []).append(index)
        else:
            kinds.setdefault(None, []).append(index)
    counts = [0] * len(tensors)
    for kind, members in kinds.items():
        here = count_each([getattr(tensors[i], "_local_tensor", tensors[i]) for i in members])
        for i, count in zip(members, here if kind is None else _summed(here, *kind), strict=True):
            counts[i] = count
    return counts


def _summed(counts: Sequence[int], mesh: Any, along: Sequence[bool]) -> list[int]:
    """Counts added up over the dimensions of a mesh along which tensors are cut; the others hold copies."""
    from torch.distributed.tensor import DTensor, Partial, Replicate  # takes a second, and is there where DTensors are

    here = torch.tensor(counts, device=mesh.device_type)
    placements = [Partial() if cut else Replicate() for cut in along]
    found: list[int] = DTensor.from_local(here, mesh, placements, run_check=False).full_tensor().tolist()
    return found
