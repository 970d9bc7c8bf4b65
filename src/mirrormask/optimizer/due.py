"""What does not happen at every step: changes of the mask, what the decay observes, rounds, snapping."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from mirrormask.optimizer import diagnostics
from mirrormask.optimizer.parts import Parts

__all__ = ["change_masks", "gradients_for_growth", "is_change_due", "keep_if_due", "observe", "recur", "watch"]

#: How many steps pass between two rounds of snapping, and so how long a denormal number can live; a step that
#: snaps by itself needs no such round, which passes over memory as often as three steps.
SNAP_EVERY = 64


def gradients_for_growth(parts: Parts) -> list[Tensor | None] | None:
    """Copies of the weights' gradients if the mask regrows after this step: the base may overwrite gradients."""
    mask, training = parts.method.mask, parts.training
    if not mask.regrows or training.finalized or not mask.regrow_at(training.clock.next):
        return None
    return [None if x.grad is None else x.grad.clone() for x in parts.weights.values()]


def is_change_due(parts: Parts) -> bool:
    """Whether the masks change after the step just taken, unless they are final already.

    All processes compare themselves then. One that has been finalized alone does so too: the others wait for it.
    """
    mask, clock = parts.method.mask, parts.training.clock
    return mask.sparsity_at(clock) is not None or (mask.regrows and bool(mask.regrow_at(clock)))


def change_masks(parts: Parts, dense: Sequence[Tensor | None] | None) -> str | None:
    """Change the masks if that is due after the step just taken.

    Args:
        parts: of the training.
        dense: the gradients of this step, where :func:`gradients_for_growth` copied them.

    Returns:
        What happened: None, "changed", or "round" where another round of training began.
    """
    training, mask = parts.training, parts.method.mask
    clock = training.clock
    target = mask.sparsity_at(clock)
    if target is not None:
        parts.freezing.before_pruning()
        parts.masks.prune(target, clock)
        if training.rounds is None:
            return "changed"
        training.rounds.start_again(parts.weights, parts.base, training.decay, clock)
        return "round"
    if dense is None:
        return None
    parts.masks.exchange(mask.regrow_at(clock), dense, clock)
    return "changed"


def keep_if_due(parts: Parts) -> None:
    """Remember what the next round of training goes back to."""
    training = parts.training
    if training.rounds is not None and parts.method.mask.keep_at(training.steps) == training.step:
        training.rounds.keep(parts.weights, parts.base, training.decay)


def observe(parts: Parts) -> None:
    """Show the decay what it asks to see, at the steps at which it asks."""
    training, decay, clock = parts.training, parts.method.decay, parts.training.clock
    if not decay.observes or clock.step % max(round(decay.observes * clock.steps), 1):
        return
    watch(parts)
    if decay.reads_rho:
        rho = parts.masks.removed_share(parts.method.mask.sparsity_ahead(clock), clock)
        decay.observe(training.decay.state, clock, rho=rho)


def watch(parts: Parts) -> None:
    """Show the decay how large the weights are, if it wants to know."""
    decay, training = parts.method.decay, parts.training
    if decay.watches:
        own, shards = list(parts.weights.values()), parts.weights.shards
        sizes = [diagnostics.log_size(x, shards.held([x])) for x in own]
        decay.watch(training.decay.state, training.clock, sizes, [shards.size(x) for x in own])


def recur(parts: Parts, *, snapped: bool) -> None:
    """New latents where the geometry wants them, and zeros for what is on its way to denormal numbers."""
    clock = parts.training.clock
    if parts.weights.geometry.at(clock).refresh_due(clock):
        parts.masks.refresh(clock)
    if clock.step % SNAP_EVERY == 0 and not snapped:
        parts.masks.snap(clock)
