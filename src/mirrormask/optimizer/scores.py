"""What ranks the weights, where several processes hold parts of one: the scores that one process would have."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mirrormask.masks.scores import SCORES, balanced, magnitude
from mirrormask.optimizer.shards import Shards

__all__ = ["SPREAD_SCORES", "drawn", "scores_of"]

Draw = Callable[..., Tensor]
Generators = Sequence[torch.Generator]


def scores_of(
    name: str, weights: Sequence[Tensor], generators: Generators, shards: Shards, grown: float = 0.0
) -> list[Tensor]:
    """The score ``name`` of what this process holds of each weight.

    Args:
        name: a name in ``SCORES``; where parts are elsewhere, in :data:`SPREAD_SCORES`.
        weights: as they are here.
        generators: the random numbers of each.
        shards: what is elsewhere.
        grown: what ``balanced`` asks for, of the decay.
    """
    if name == "balanced":
        known = _sensitivity(weights, generators, shards) if shards.spread else [None] * len(weights)
        return [balanced(x, g, grown, full) for x, g, full in zip(weights, generators, known, strict=True)]
    own = SPREAD_SCORES[name] if shards.spread else None
    if own is not None:
        return own(weights, generators, shards)
    return [SCORES[name](x, generator) for x, generator in zip(weights, generators, strict=True)]


def drawn(draw: Draw, x: Tensor, generator: torch.Generator, shards: Shards) -> Tensor:
    """Random numbers by the index in the whole weight: what ``draw`` gives one process that holds all of it."""
    return shards.cut(x, draw(shards.shape(x), generator=generator)).to(x.device)


def _magnitude(weights: Sequence[Tensor], generators: Generators, shards: Shards) -> list[Tensor]:
    return [magnitude(x, generator) for x, generator in zip(weights, generators, strict=True)]


def _random(weights: Sequence[Tensor], generators: Generators, shards: Shards) -> list[Tensor]:
    return [drawn(torch.rand, x, generator, shards) for x, generator in zip(weights, generators, strict=True)]


def _sensitivity(weights: Sequence[Tensor], generators: Generators, shards: Shards) -> list[Tensor]:
    """Rows are summed over the processes that hold parts of them, those of all weights in one exchange."""
    sums = [_row_sums(x, shards) for x in weights]
    together = torch.split(shards.processes.sum(torch.cat([own.cpu() for own in sums])), [len(own) for own in sums])
    scores = []
    for x, generator, total in zip(weights, generators, together, strict=True):
        score, rows = magnitude(x, generator), shards.places(x, 0) if x.dim() else None
        if len(total) and bool(total.isfinite().all()):
            gradient = total.mul(len(total) / shards.size(x)).sqrt_()
            gradient = gradient if rows is None else gradient[rows]
            score = score * gradient.to(score).view(-1, *[1] * (x.dim() - 1))
        scores.append(score)
    return scores


def _row_sums(x: Tensor, shards: Shards) -> Tensor:
    """``Σ ∇f²`` of each row of the whole weight, as far as it is here; NaN without a gradient, no rows of a vector."""
    shape = shards.shape(x)
    if len(shape) < 2 or not shape.numel():
        return torch.zeros(0, dtype=torch.float64)
    sums = torch.zeros(shape[0], dtype=torch.float64, device=x.device)
    if x.grad is None:
        return sums.fill_(torch.nan)
    if shards.counts(x):
        own, rows = x.grad.double().square().sum(tuple(range(1, x.dim()))), shards.places(x, 0)
        sums[:] = own if rows is None else sums.index_copy(0, rows.to(x.device), own)
    return sums


#: The scores that need no more of a weight than what is here and a few sums.
SPREAD_SCORES: dict[str, Callable[[Sequence[Tensor], Generators, Shards], list[Tensor]]] = {
    "balanced": lambda weights, generators, shards: scores_of("balanced", weights, generators, shards),
    "magnitude": _magnitude,
    "random": _random,
    "sensitivity": _sensitivity,
}
