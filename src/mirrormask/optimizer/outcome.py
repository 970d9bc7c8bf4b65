"""Steps that come to nothing, and what the last one leaves: skipping, and the end of a training."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mirrormask.checks import callers_level
from mirrormask.optimizer.base_groups import Group
from mirrormask.optimizer.parts import Parts

__all__ = ["finish", "skip"]

#: After so many skipped steps in a row a warning says so.
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


def finish(parts: Parts) -> None:
    """As ``SparseOptimizer.finalize()`` says: the mask of the last sparsity in what the model holds now."""
    training, sparsity = parts.training, parts.method.sparsity
    parts.presence.check()
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
            parts.masks.prune(sparsity, training.clock)
        parts.masks.enforce(sparsity)
    parts.edits.note()
    training.finalized = True


def _counts_on_device(parts: Parts) -> bool:
    """Whether skipped steps are among those that were taken, with zeros for gradients."""
    return any(x.device.type != "cpu" for x in parts.weights.values())
