"""Changing the mask of a SparseOptimizer: choose, prune, revive, exchange."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mirrormask.masks import Regrow, keep_count, largest, protect, select
from mirrormask.masks.scores import SCORES

if TYPE_CHECKING:
    from mirrormask.optimizer.sparse_optimizer import SparseOptimizer

__all__ = ["choose", "exchange", "is_reached", "prune", "removed_share", "report_empty", "set_masks"]


def choose(optimizer: SparseOptimizer, sparsity: float) -> list[Tensor]:
    """The masks for ``sparsity``; a weight that is dead stays dead, unless the method revives."""
    rule = optimizer.method.mask
    scores = []
    for index, (x, state) in enumerate(_states(optimizer)):
        score = optimizer.geometry.importance(optimizer.latents_of(x))
        if score is None:
            measured = state.get("score")
            score = SCORES[rule.score](x, _generator(optimizer, index)) if measured is None else measured.clone()
        if "mask" in state and not rule.revives:
            score.masked_fill_(~state["mask"], -math.inf)
        scores.append(score if rule.pattern is None else protect(score, rule.pattern))
    return select(scores, sparsity, rule.allocation)


def is_reached(optimizer: SparseOptimizer, sparsity: float) -> bool:
    """Whether the masks have exactly this sparsity already."""
    states = [state for _, state in _states(optimizer)]
    if not all("mask" in state for state in states):
        return False
    living = sum(int(state["mask"].sum()) for state in states)
    return living == keep_count(sum(state["mask"].numel() for state in states), sparsity)


@torch.no_grad()
def prune(optimizer: SparseOptimizer, sparsity: float) -> None:
    """Prune (or, where the method revives, revive) to ``sparsity``.

    A geometry that makes zeros of its own is only steered there, and its mask is fixed when the last sparsity is due;
    where the mask revives or training comes in rounds, already at the first one. From then on its weights are ordinary.
    """
    rule = optimizer.method.mask
    final = sparsity >= rule.sparsity or rule.revives or rule.replays
    if optimizer.geometry.sparsifies:
        if sparsity > 0:
            _reach(optimizer, sparsity)
        if not final:
            return
    set_masks(optimizer, choose(optimizer, sparsity))
    if optimizer.geometry.sparsifies:
        for x, _ in _states(optimizer):
            optimizer.geometry.settle(x, optimizer.latents_of(x))


def _reach(optimizer: SparseOptimizer, sparsity: float) -> None:
    """Shift importances so that those above 0 are exactly the weights that ``sparsity`` keeps (up to ties)."""
    masks = choose(optimizer, sparsity)
    spans = []
    for x, mask in zip(optimizer.weights.values(), masks, strict=True):
        score = optimizer.geometry.importance(optimizer.latents_of(x))
        if score is None:  # settled
            return
        kept, dropped = score[mask], score[~mask]
        low = float(dropped.max()) if dropped.numel() else -math.inf
        spans.append((low, float(kept.min()) if kept.numel() else math.inf))
    if optimizer.method.mask.allocation == "global" and optimizer.method.mask.pattern is None:
        spans = [(max(low for low, _ in spans), min(high for _, high in spans))] * len(spans)
    for x, (low, high) in zip(optimizer.weights.values(), spans, strict=True):
        if math.isinf(low):
            shift = min(high, 0.0) - (high <= 0)
        else:
            shift = low if math.isinf(high) else (low + high) / 2
        optimizer.geometry.reach(optimizer.latents_of(x), shift)
    optimizer.push_all()


@torch.no_grad()
def set_masks(optimizer: SparseOptimizer, masks: Sequence[Tensor], values: Sequence[Tensor] | None = None) -> None:
    """Put ``masks`` in force: what dies is zero with all its state, what comes back starts anew.

    Args:
        optimizer: whose masks.
        masks: one bool tensor a weight.
        values: what the weights that come back start from; None for 0.
    """
    geometry, revives = optimizer.geometry, optimizer.method.mask.revives
    befores = [state.get("mask") for _, state in _states(optimizer)]
    if not revives:
        masks = [mask if old is None else mask & old for mask, old in zip(masks, befores, strict=True)]
    empty = [
        name
        for name, mask, old in zip(optimizer.weights, masks, befores, strict=True)
        if not mask.any() and (old is None or old.any())
    ]
    report_empty(empty, optimizer.on_empty)  # before anything changes
    for index, (x, state) in enumerate(_states(optimizer)):
        mask, before = masks[index], befores[index]
        latents, keep = optimizer.latents_of(x), mask
        if before is not None and revives:
            new = mask & ~before
            value = None if values is None else values[index]
            geometry.prune(latents, before)  # what drifted while dead
            geometry.revive(latents, before, new, value)
            if not latents and value is not None:
                x.copy_(torch.where(new, value, x))
            keep = mask & ~new
        state["mask"] = mask
        geometry.prune(latents, mask)
        for held in latents.values() if latents else (x,):
            for tensor in optimizer.base_tensors(held):
                if tensor.shape == keep.shape:
                    tensor.mul_(keep)
        x.masked_fill_(~mask, 0.0)
    if geometry.latents:
        optimizer.push_all()


@torch.no_grad()
def exchange(optimizer: SparseOptimizer, fraction: float, grads: Sequence[Tensor | None]) -> None:
    """Drop ``fraction`` of the living weights of each layer, the smallest, and grow as many others.

    Args:
        optimizer: whose method's mask regrows.
        fraction: in (0, 1).
        grads: the gradient of each weight, for growth where it is largest; None counts as zeros.
    """
    rule = optimizer.method.mask
    assert isinstance(rule, Regrow)
    masks, values = [], []
    for index, (x, state) in enumerate(_states(optimizer)):
        generator, alive = _generator(optimizer, index), state["mask"]
        count = int(alive.sum())
        dropped = min(round(fraction * count), alive.numel() - count)
        kept = largest(x.abs().float().masked_fill_(~alive, -1.0), count - dropped)
        grad = grads[index]
        if rule.grow == "random":
            wish = torch.rand(x.shape, generator=generator).to(x.device)
        else:
            wish = torch.zeros_like(x, dtype=torch.float32) if grad is None else grad.abs().float()
        grown = largest(wish.masked_fill_(kept, -1.0), dropped)
        masks.append(kept | grown)
        if rule.spread:
            rms = x[alive].float().square().mean().sqrt() if count else x.new_zeros(())
            noise = torch.randn(x.shape, generator=generator).to(x.device)
            values.append((noise * rms * rule.spread).to(x.dtype))
    set_masks(optimizer, masks, values or None)


def report_empty(names: Sequence[str], on_empty: str) -> None:
    """Warn of weights that lose their last element, raise, or do nothing, as the user asked."""
    if not names or on_empty == "ignore":
        return
    message = (
        f"this sparsity leaves nothing of {', '.join(names)}; leave the layer out with weights=, lower the sparsity, "
        "choose another allocation, or pass on_empty='ignore' to mm.sparsify"
    )
    if on_empty == "error":
        raise ValueError(message)
    warnings.warn(message, stacklevel=_callers_level())


def _callers_level() -> int:
    """The ``stacklevel`` that makes a warning of this module's functions point at the user's own line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("mirrormask", "torch"):
        level, frame = level + 1, frame.f_back
    return level


def _states(optimizer: SparseOptimizer) -> list[tuple[Tensor, dict[str, Tensor]]]:
    return [(x, optimizer.state[x]) for x in optimizer.weights.values()]


def _generator(optimizer: SparseOptimizer, index: int) -> torch.Generator:
    """The random numbers of one weight at this step: a function of seed and step, so that there is no state to save."""
    words = [optimizer.method.mask.seed, optimizer.step_count, index]
    seed = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def removed_share(optimizer: SparseOptimizer, sparsity: float) -> float:
    """``rho``: the share of the weights' L2 norm that pruning to ``sparsity`` would remove now, in [0, 1]."""
    removed = kept = 0.0
    for x, mask in zip(optimizer.weights.values(), choose(optimizer, sparsity), strict=True):
        square = x.double().square()
        kept += float((square * mask).sum())
        removed += float((square * ~mask).sum())
    total = removed + kept
    return float((removed / total) ** 0.5) if total > 0 else 0.0
