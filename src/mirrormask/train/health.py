"""Whether a run still computes anything: steps without finite numbers, boundless factors, a dead network."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mirrormask import checks
from mirrormask.train.session import Session

__all__ = ["BOUND", "Health"]

#: Factors beyond this have left every scale that a network works on; their products are near float32's end.
BOUND = 1e18
#: Steps between two looks where a look waits for the device.
LOOK_EVERY = 25


class Health:
    """Counts steps in a row without a finite loss or gradient, says the first one, and stops a run that is lost.

    Args:
        session: of the run.
        told: is told what went wrong, the first time.
    """

    def __init__(self, session: Session, told: Callable[[str], None]) -> None:
        self.session, self.told = session, told
        self.row, self.first, self.named = 0, "", False
        self.skipped = self.taken = 0
        self.on_device = session.accelerator.device.type != "cpu"
        self.together = session.accelerator.num_processes > 1
        self.every = LOOK_EVERY if self.on_device or self.together else 1
        self.losses: list[Tensor] = []

    def state_dict(self) -> dict[str, Any]:
        """What it has counted."""
        return {"row": self.row, "first": self.first, "named": self.named}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting."""
        checks.check_int("row", state["row"], low=0)
        self.row, self.first, self.named = state["row"], str(state["first"]), bool(state["named"])
        self._count()

    def look(self, loss: Tensor) -> None:
        """Call after each step, while the gradients are still there.

        Raises:
            FloatingPointError: ``recipe.stop_after`` steps in a row had no finite loss or gradient.
        """
        self.losses.append(loss.detach())
        if len(self.losses) < self.every:
            return
        # Sums are finite where all losses are; each process must come to the same end.
        finite = self.session.accelerator.reduce(torch.stack(self.losses), "sum").isfinite().tolist()
        steps, self.losses = len(finite), []
        bad = steps - self._count()
        # Of the losses between two looks each is known, of the steps only how many were skipped.
        after = next((i for i, good in enumerate(reversed(finite)) if good), steps)
        fresh = max(after, bad if bad == steps else 0)
        self.row = self.row + steps if fresh == steps else fresh
        if not self.row:
            self.first = ""
            return
        if not self.first:
            self.first = f"{self._what()}, first at step {self.session.step + 1}"
        if not self.named:
            self.named = True
            self.told(f"{self.first}; such steps are skipped")
        limit = self.session.recipe.stop_after
        if self.row >= limit:
            raise FloatingPointError(
                f"{self.row} steps in a row had no finite loss and gradient (stop_after={limit}): {self.first}"
            )

    @torch.no_grad()
    def epoch_end(self) -> None:
        """Look at the weights.

        Raises:
            FloatingPointError: a weight or a factor is not finite or beyond :data:`BOUND`, or a layer of zeros keeps
                the network from telling any image from another.
        """
        weights = self.session.optimizer.weights
        found = {
            (name, what): _largest(held)
            for name, x in weights.items()
            for what, held in {"weight": x, **weights.latents_of(x)}.items()
        }
        largest = dict(zip(found, weights.shards.max(list(found.values())), strict=True))
        for (name, what), size in largest.items():
            if not size <= BOUND:
                raise FloatingPointError(f"{what!r} of {name!r} has reached {size:g}, beyond {BOUND:g}")
        dead = [name for name in weights if not largest[name, "weight"]]
        if not dead:
            return
        names = checks.few([repr(name) for name in dead])
        if self.session.recipe.stop_dead and self._same_for_all():
            raise FloatingPointError(
                f"the network is dead: all weights of {names} are zero, and every image gets the same scores"
            )
        if not self.named:
            self.named = True
            self.told(f"all weights of {names} are zero after epoch {self.session.epoch}")

    def _count(self) -> int:
        """How many steps were taken since the last call."""
        optimizer = self.session.optimizer
        skipped, taken = optimizer.skipped_steps, optimizer.step_count
        # On a device the skipped ones are among those taken; elsewhere, and under a scaler, they are not.
        among = skipped - self.skipped if self.on_device else 0
        good = taken - self.taken - among
        self.skipped, self.taken = skipped, taken
        return good

    def _what(self) -> str:
        named = list(self.session.model.named_parameters())
        bad = self._not_finite([(name, p.grad) for name, p in named])
        if bad:
            return f"the gradient is not finite in {checks.few(bad)}"
        bad = self._not_finite(named)
        return f"the loss is not finite, and neither is {checks.few(bad)}" if bad else "the loss is not finite"

    def _not_finite(self, named: Sequence[tuple[str, Tensor | None]]) -> list[str]:
        """The names of what is not finite, here or on another process."""
        local = [None if t is None else getattr(t, "_local_tensor", t) for _, t in named]
        bad = [float(t is not None and not bool(t.isfinite().all())) for t in local]
        found = self.session.optimizer.weights.shards.max(bad)
        return [repr(name) for (name, _), there in zip(named, found, strict=True) if there]

    def _same_for_all(self) -> bool:
        self.session.model.eval()
        x, _ = next(self.session.test.in_order(together=True))
        scores = self.session.model(x)
        same = len(scores) > 1 and bool((scores == scores[:1]).all())
        accelerator = self.session.accelerator
        agreed: Tensor = accelerator.reduce(torch.tensor([float(same)], device=accelerator.device), "sum")
        return int(agreed) == int(accelerator.num_processes)


def _largest(tensor: Tensor) -> float:
    """The largest absolute value; infinity for what is no number, which a maximum over processes would lose."""
    size = float(tensor.detach().abs().max()) if tensor.numel() else 0.0
    return math.inf if math.isnan(size) else size
