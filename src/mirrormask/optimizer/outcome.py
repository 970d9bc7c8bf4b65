"""Steps that come to nothing, and what the last one leaves: skipping, and the end of a training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mirrormask import made_sparse
from mirrormask.checks import callers_level
from mirrormask.flats import count_each
from mirrormask.optimizer.base_groups import Group
from mirrormask.optimizer.parts import Parts

__all__ = ["finish", "note_gradients", "skip"]

#: After so many skipped steps in a row, or without a gradient, a warning says so.
WARN_AFTER = 10


def skip(parts: Parts, groups: Sequence[Group]) -> None:
    """A gradient is not finite: nothing happens, and after some such steps in a row it is said."""
    training = parts.training
    training.skipped += 1
    training.skipped_in_a_row += 1
    if training.skipped_in_a_row == WARN_AFTER:
        grads = [(p, parts.weights.shards.local(p).grad) for group in groups for p in group["params"]]
        found = [p for p, grad in grads if grad is not None and not bool(grad.isfinite().all())]
        bad = parts.presence.names(found) if found else "what another process holds"
        warnings.warn(
            f"{WARN_AFTER} steps in a row were skipped: the gradient is not finite in {bad}; lower the learning "
            "rate, clip gradients, or look for the layer where the loss overflows",
            stacklevel=callers_level(),
        )


def note_gradients(parts: Parts) -> None:
    """Steps in a row in which no weight that trains has a gradient: nothing happens in them, and it is said once."""
    training, shards = parts.training, parts.weights.shards
    own = parts.weights.values()
    if any(x.grad is not None for x in own) or not any(shards.whole(x).requires_grad for x in own):
        training.idle_in_a_row = 0
        return
    training.idle_in_a_row += 1
    if training.idle_in_a_row == WARN_AFTER:
        warnings.warn(
            f"{WARN_AFTER} steps in a row found no gradient in any weight that is to become sparse: the schedule goes "
            "on, and will prune weights that nobody trains; call backward() on a loss of this very model before "
            "step(), and zero_grad() after it",
            stacklevel=callers_level(),
        )


def _warn_of_early_end(parts: Parts) -> None:
    """Warn where the training ends before the schedule has come to the last sparsity, and weights go untrained."""
    training, masks, own = parts.training, parts.masks, list(parts.weights.values())
    if training.finalized or not 0 < training.step < training.steps:
        return
    nonzeros, total = sum(parts.weights.shards.count(count_each(own), own)), sum(map(parts.weights.shards.size, own))
    if nonzeros > masks.count(parts.method.sparsity):
        warnings.warn(
            f"training ended at step {training.step} of {training.steps}, when {100 * (1 - nonzeros / total):.1f}% of "
            f"the weights were zero; finalize() now removes the rest of the {100 * parts.method.sparsity:g}% at once, "
            "which costs accuracy that no metric so far has seen: evaluate again, stop early only once the mask is "
            "final, and give mm.sparsify as steps= how often step() is called (with accumulated gradients once for "
            "several batches)",
            stacklevel=callers_level(),
        )


def finish(parts: Parts) -> None:
    """As ``SparseOptimizer.finalize()`` says: the mask of the last sparsity in what the model holds now."""
    training, sparsity = parts.training, parts.method.sparsity
    parts.presence.check()
    parts.presence.check_memory()
    parts.weights.check_kept()
    if training.settle_count() > training.step - (training.skipped if _counts_on_device(parts) else 0):
        raise RuntimeError(
            f"{training.skipped} steps were skipped and {training.step} taken: gradients were not finite, and the "
            "model is hardly trained; lower the learning rate or clip gradients, and train again"
        )
    if not training.step and sparsity > 0:
        warnings.warn(
            "finalize() after no step: the weights are as mm.sparsify found them, but for what is pruned now; the "
            "training loop has to call step() of what mm.sparsify returned",
            stacklevel=callers_level(),
        )
    parts.presence.check_finite()
    parts.edits.adopt(training.clock, everywhere=True)
    if sparsity > 0:
        if not parts.masks.is_reached(sparsity):
            parts.freezing.before_pruning()
            _warn_of_early_end(parts)
            parts.masks.prune(sparsity, training.clock)
        parts.masks.enforce(sparsity)
        parts.presence.warn_of_makers()
        parts.freezing.look_for_new(parts.presence.model)
    parts.edits.note()
    made_sparse.note(map(parts.weights.shards.whole, parts.weights.values()))
    training.finalized = True


def _counts_on_device(parts: Parts) -> bool:
    """Whether skipped steps are among those that were taken, with zeros for gradients."""
    return any(x.device.type != "cpu" for x in parts.weights.values())
