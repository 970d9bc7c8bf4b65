"""When a run is written down: at the end of an epoch, every so often, and when it is asked to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mirrormask.train import intervals
from mirrormask.train.checkpoint import Checkpoints
from mirrormask.train.session import Session
from mirrormask.train.signals import Request, Stopped

__all__ = ["Keeper"]

#: Several processes ask each other whether one of them wants a checkpoint at every so manieth step.
AGREE_EVERY = 16


class Keeper:
    """Writes the checkpoints of a run.

    Args:
        session: of the run.
        checkpoints: where they go.
        state: gives what is to be written; every process must ask for it, and the main one writes it.
        request: whether the run is asked to stop.
    """

    def __init__(
        self, session: Session, checkpoints: Checkpoints, state: Callable[[], dict[str, Any]], request: Request
    ) -> None:
        self.session, self.checkpoints, self.state, self.request = session, checkpoints, state, request
        self.timer = intervals.Timer(intervals.parse(session.recipe.checkpoint_every))
        self.world = session.accelerator.num_processes

    def after_step(self, *, sound: bool) -> None:
        """Write a checkpoint if one is due, and stop if that is asked.

        Args:
            sound: whether the last step was a good one; what comes of another is written only before stopping.

        Raises:
            Stopped: the checkpoint is written.
        """
        session = self.session
        # The end of the epoch writes one anyway.
        due = sound and session.done < len(session.train) and self.timer.due(session.step)
        stop, due = self._agreed(bool(self.request), due)
        if stop or due:
            self.save()
        if stop:
            raise Stopped(self._where("saved"))

    def between(self, *, save: bool) -> None:
        """Stop between two batches of an evaluation, if that is asked.

        Args:
            save: write a checkpoint before.

        Raises:
            Stopped: as asked.
        """
        # Processes evaluate shares of different lengths: together they stop at a step only.
        if self.request and self.world == 1:
            if save:
                self.save()
            raise Stopped(self._where("saved" if save else "as the last checkpoint has it"))

    def save(self, *, best: bool = False) -> None:
        """Write a checkpoint now; every process must call this."""
        state = self.state()
        if self.session.accelerator.is_main_process:
            self.checkpoints.save(self.session.step, state, best=best)
        self.session.accelerator.wait_for_everyone()
        self.timer.restart()

    def _agreed(self, stop: bool, due: bool) -> tuple[bool, bool]:
        if self.world == 1:
            return stop, due
        timed, session = self.timer.interval.seconds is not None, self.session
        if session.step % AGREE_EVERY and session.done < len(session.train):
            return False, due and not timed
        wishes = torch.tensor([stop, due], dtype=torch.float32, device=session.accelerator.device)
        stop, due = (bool(value > 0) for value in session.accelerator.reduce(wishes, "sum").tolist())
        return stop, due

    def _where(self, how: str) -> str:
        session = self.session
        return f"stopped by {self.request.name or 'another process'} at step {session.step} of {session.steps}, {how}"
