"""What the callbacks share: how the optimizer is wrapped, and how a training ends."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mirrormask.checks import callers_level, check_int
from mirrormask.masks.saliency import Loss
from mirrormask.methods import Method
from mirrormask.optimizer import SparseOptimizer
from mirrormask.optimizer.sparsify import sparsify
from mirrormask.selection import Weights

__all__ = ["Wrapping", "finish", "lost", "mask_print", "rate_again", "warn_of_rounds", "zero_share"]


@dataclass(frozen=True)
class Wrapping:
    """The arguments of :func:`mirrormask.sparsify` that a trainer does not know.

    Args:
        method: from :mod:`mirrormask.methods`.
        weights: which parameters, as in :func:`mirrormask.select_weights`.
        steps: where the trainer's own number will not do (manual optimization); None to ask it.
        score: called at the end of every epoch for the training accuracy, where the method's decay reads one.
        batches, loss_fn, fused, on_empty: as in :func:`mirrormask.sparsify`.

    Raises:
        TypeError: ``method`` is no Method.
        ValueError: the method's decay reads the training accuracy and there is no ``score``, or steps < 1.
    """

    method: Method
    weights: Weights | None = None
    steps: int | None = None
    score: Callable[[], float] | None = None
    batches: Iterable[Any] | None = None
    loss_fn: Loss | None = None
    fused: bool = True
    on_empty: str = "warn"

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"method={self.method!r} is a {type(self.method).__name__}, not a method; pass for example "
                "mm.methods.mirror(0.9)"
            )
        if self.steps is not None:
            check_int("steps", self.steps, low=1)
        both = [self.method, self.method.adaptive]
        if self.score is None and any(part is not None and part.decay.reads_score for part in both):
            raise ValueError(
                f"the decay of {self.method.name!r} reads the training accuracy at the end of every epoch, which no "
                "trainer computes by itself; pass score=, a function that returns it, or choose a method that does "
                "not read it, such as mirror"
            )

    def wrap(self, model: nn.Module, optimizer: Any, steps: int) -> SparseOptimizer:
        """``mm.sparsify`` with these arguments and as many steps."""
        return sparsify(
            model,
            optimizer,
            self.method,
            steps=steps,
            weights=self.weights,
            fused=self.fused,
            batches=self.batches,
            loss_fn=self.loss_fn,
            on_empty=self.on_empty,
        )

    def epoch_end(self, optimizer: SparseOptimizer) -> None:
        """Tell the method that an epoch is over, with its score where it reads one."""
        if optimizer.method.decay.reads_score and self.score is not None:
            optimizer.epoch_end(score=float(self.score()))


def warn_of_rounds(optimizer: SparseOptimizer) -> None:
    """Say how long a scheduler that the user has built must be, where the method plays its rates again and again."""
    if optimizer.round_steps < optimizer.steps:
        warnings.warn(
            f"{optimizer.method.name!r} trains in rounds, and in each plays the learning rates of the first again: the "
            f"scheduler must come to its end within {optimizer.round_steps} steps, not {optimizer.steps}; if it does "
            "already, never mind",
            stacklevel=callers_level(),
        )


def rate_again(optimizer: SparseOptimizer) -> float | None:
    """The learning rate of the last step, where a method that trains in rounds has overruled the scheduler."""
    training = optimizer.parts.training
    if training.rounds is None:
        return None
    last = dataclasses.replace(training.clock, step=max(training.step - 1, 0))
    rates = training.rounds.again(optimizer.method.mask, last)
    return rates[0] if rates else None


@torch.no_grad()
def zero_share(optimizer: SparseOptimizer) -> float:
    """The fraction of zeros in the weights as they are."""
    total = sum(x.numel() for x in optimizer.weights.values())
    return 1.0 - sum(int(x.count_nonzero()) for x in optimizer.weights.values()) / total


@torch.no_grad()
def lost(optimizer: SparseOptimizer) -> tuple[int, int]:
    """How many nonzeros the model holds where the mask has zeros, and how many it holds altogether."""
    removed = nonzeros = 0
    for name, mask in optimizer.weights.masks.items():
        x = optimizer.weights[name]
        removed += int((x != 0).logical_and_(~mask).sum())
        nonzeros += int(x.count_nonzero())
    return removed, nonzeros


def mask_print(optimizer: SparseOptimizer) -> str:
    """A hash of the masks: two moments with the same one may be compared by their metrics."""
    digest = hashlib.blake2b(digest_size=16)
    for mask in optimizer.weights.masks.values():
        digest.update(mask.cpu().numpy().tobytes())
    return digest.hexdigest()


@torch.no_grad()
def finish(optimizer: SparseOptimizer, *, put_back: str = "") -> None:
    """``finalize()`` on whatever the model holds now, and a warning where what was put back loses weights by it.

    Args:
        optimizer: what :func:`mirrormask.sparsify` returned.
        put_back: where weights may have come from that were written since the last step, for the warning.
    """
    for x in optimizer.weights.values():
        x.mul_(1)  # averages write through .data, which no version counter sees; now finalize() looks
    if optimizer.finalized and put_back:
        removed, nonzeros = lost(optimizer)
        if removed:
            warnings.warn(
                f"{put_back} holds weights from before the last mask: {removed:,} of their {nonzeros:,} nonzeros "
                f"({100 * removed / nonzeros:.1f}%) are removed now, so that the metric they were chosen by is not "
                "theirs any more; evaluate again, and choose among checkpoints that have the last mask",
                stacklevel=callers_level(),
            )
    optimizer.finalize()
