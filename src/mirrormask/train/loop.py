"""One training run: a recipe in, a finished folder out."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mirrormask as mm
from mirrormask import environment
from mirrormask.masks import keep_count
from mirrormask.train import checkpoint, figure, models, named, predictions, recipe_file
from mirrormask.train.data import Splits
from mirrormask.train.distributions import Distributions
from mirrormask.train.log import Log
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunFolder, RunResult
from mirrormask.train.session import Session, Totals

__all__ = ["Observer", "load_model", "run"]

DIAGNOSTICS = ("alpha", "decay_integral", "median_a", "l1_norm", "sparsity", "below_threshold", "sign_flips")


class Observer:
    """Is told how a run goes on; this one keeps silent. Override what is of interest."""

    def started(self, recipe: Recipe, steps: int, step: int) -> None:
        """A run of ``steps`` steps begins, or goes on at ``step``."""

    def noted(self, text: str) -> None:
        """Something about how the run begins that a person should know."""

    def stepped(self, step: int) -> None:
        """A step was made; called for each, so do little."""

    def logged(self, record: dict[str, Any]) -> None:
        """A record was written to the log."""

    def finished(self, result: RunResult) -> None:
        """The run is complete."""


def run(
    recipe: Recipe,
    *,
    resume: bool = False,
    overwrite: bool = False,
    wait: bool = False,
    observer: Observer | None = None,
    splits: Splits | None = None,
) -> RunResult:
    """Train as the recipe says, in the recipe's folder.

    Everything that the recipe gets wrong is found before anything is written. The folder gets a checkpoint every
    epoch and, last of all, ``result.json``, which marks a finished run. Global random state and torch's number
    of threads are left as they were.

    Args:
        recipe: the run; ``recipe.out`` is its folder.
        resume: go on after the last checkpoint that the folder holds, if any; the result is, bit for bit, that of a run
            without interruption. A finished run is not run again: its result is returned.
        overwrite: remove an older run's files first.
        wait: where another process is training in this folder, wait for it instead of raising.
        observer: is told of every step, record and of the end.
        splits: the recipe's data, where the caller has read it for several runs.

    Returns:
        The result, as ``result.json`` holds it.

    Raises:
        TypeError, ValueError: the recipe does not fit, or the folder holds another run.
        FloatingPointError: the loss was not finite in a whole epoch.
    """
    folder, observer = RunFolder(recipe.out), observer or Observer()
    folder.check(recipe, resume=resume, overwrite=overwrite)
    if resume and folder.finished:
        return RunResult.read(folder.path)
    with isolated(recipe.threads):
        session = Session(recipe, splits)
        with contextlib.ExitStack() as stack:
            # No process may find a folder that another one has begun to fill.
            session.accelerator.wait_for_everyone()
            if session.accelerator.is_main_process:
                stack.enter_context(folder.locked(wait=wait))
                if not (resume and folder.finished):
                    folder.prepare(recipe, overwrite=overwrite)
            session.accelerator.wait_for_everyone()
            if resume and folder.finished:  # by the process that was waited for
                return RunResult.read(folder.path)
            return _Run(session, folder, observer).complete()


class _Run:
    """The loop over epochs, with its log and its clock."""

    def __init__(self, session: Session, folder: RunFolder, observer: Observer) -> None:
        self.session, self.folder, self.observer = session, folder, observer
        self.main = session.accelerator.is_main_process
        # Before the checkpoint is loaded: a run that goes on makes the weights of its start again.
        self.distributions = Distributions(session.optimizer)
        state = checkpoint.load(folder / "checkpoint.pt", session.recipe)
        offset, earlier = 0, 0.0
        self.last: dict[str, float] = {}
        if state is not None:
            session.load_state_dict(state["session"])
            offset, earlier, self.last = state["log_bytes"], state["seconds"], state["last"]
        self.log = Log(folder.path, offset=offset, step=session.step) if self.main else None
        self.start = time.perf_counter() - earlier
        self.window, self.whole = Totals(session.accelerator.device), Totals(session.accelerator.device)

    def complete(self) -> RunResult:
        session = self.session
        self.observer.started(session.recipe, session.steps, session.step)
        if session.note and not session.step:
            self.observer.noted(session.note)
        try:
            while session.epoch < session.recipe.epochs:
                self._epoch()
            return self._finish()
        finally:
            if self.log is not None:
                self.log.close()

    def _epoch(self) -> None:
        session = self.session
        self.whole.sums.zero_()
        session.train_epoch(self.window, self._after_step)
        self.whole.take(self.window)
        loss, accuracy = self.whole.means(session.accelerator)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss was not finite in any step of epoch {session.epoch}; lower optimizer.lr "
                f"(it is {session.recipe.optimizer.lr:g}) or use precision fp32"
            )
        session.optimizer.epoch_end(score=accuracy)
        self.last = {"loss": loss, "train_accuracy": accuracy, **self._held_out()}
        self._record("epoch", self.last)
        if self.main and self.log is not None:
            self.log.sync()
            checkpoint.save(
                self.folder / "checkpoint.pt",
                session.recipe,
                {
                    "session": session.state_dict(),
                    "log_bytes": self.log.offset,
                    "seconds": self._seconds(),
                    "last": self.last,
                },
            )
        session.accelerator.wait_for_everyone()

    def _after_step(self) -> None:
        self.observer.stepped(self.session.step)
        if self.session.step % self.session.recipe.log_every == 0:
            loss, accuracy = self.window.means(self.session.accelerator)
            self._record("step", {"loss": loss, "train_accuracy": accuracy})
            self.whole.take(self.window)

    def _held_out(self) -> dict[str, float]:
        # With a validation split, the test images are looked at once, at the end.
        session = self.session
        if session.validation is not None:
            return {"validation_accuracy": session.evaluate(session.validation)[1]}
        return {"test_accuracy": session.evaluate(session.test)[1]}

    def _record(self, event: str, values: dict[str, Any]) -> None:
        session = self.session
        state = session.optimizer.diagnostics()
        record = {
            "event": event,
            "step": session.step,
            # The epoch under way; during "epoch" and "final" the number of epochs that are complete.
            "epoch": session.epoch + (event == "step"),
            "epoch_progress": session.step / len(session.train),
            **values,
            "lr": session.optimizer.param_groups[0]["lr"],
            **{name: state[name] for name in DIAGNOSTICS},
            "skipped_steps": state["skipped_steps"],
            "seconds": self._seconds(),
        }
        if self.log is not None:
            self.log.write(record)
            self.observer.logged(record)

    def _finish(self) -> RunResult:
        session, recipe = self.session, self.session.recipe
        self.distributions.trained()
        session.finish()
        counted = mm.sparsity(session.model)
        test = session.evaluate(session.test)[1]
        validation = session.evaluate(session.validation)[1] if session.validation is not None else None
        accuracies = {"test_accuracy": test, **({} if validation is None else {"validation_accuracy": validation})}
        self._record("final", {"loss": self.last["loss"], "train_accuracy": self.last["train_accuracy"], **accuracies})
        path = self.folder / "model.safetensors"
        if self.main:
            metadata = {"method": recipe.method.name, "sparsity": f"{recipe.sparsity:g}", "seed": str(recipe.seed)}
            mm.save(session.model, path, metadata=metadata)
        session.accelerator.wait_for_everyone()
        result = RunResult(
            folder=str(self.folder.path),
            method=recipe.method.name,
            seed=recipe.seed,
            sparsity_asked=recipe.sparsity,
            nonzeros_asked=keep_count(counted.numel, recipe.sparsity),
            nonzeros=counted.nonzeros,
            numel=counted.numel,
            test_accuracy=test,
            validation_accuracy=validation,
            unpruned_accuracy=self.last["test_accuracy" if validation is None else "validation_accuracy"],
            train_accuracy=self.last["train_accuracy"],
            train_loss=self.last["loss"],
            epochs=session.epoch,
            steps=session.step,
            seconds=self._seconds(),
            skipped_steps=int(session.optimizer.diagnostics()["skipped_steps"]),
            file_bytes=path.stat().st_size,
            input_shape=session.splits.shape,
            classes=len(session.splits.classes),
            layers=counted.layers,
            recipe=recipe_file.to_dict(recipe),
            environment=environment.describe(),
        )
        if self.main:
            self.distributions.write(self.folder.path)
            predictions.write(self.folder.path, session)
            if recipe.figure:
                figure.draw(self.folder.path, result)
            result.write()
            self.observer.finished(result)
        session.accelerator.wait_for_everyone()
        return result

    def _seconds(self) -> float:
        return time.perf_counter() - self.start


def load_model(folder: str | Path, *, allow_code: bool = False) -> nn.Module:
    """The final model of a finished run, in evaluation mode.

    Args:
        folder: the run's folder; ``RunResult.read(folder).input_shape`` is what the model takes.
        allow_code: import what makes the model where that is code of the user's (``FILE.py:NAME``).

    Raises:
        ValueError: the folder holds no finished run, or its model is made by code that is not allowed.
    """
    result = RunResult.read(folder)
    recipe = recipe_file.from_dict(result.recipe)
    named.check_allowed([recipe.model.name], allow_code=allow_code)
    with torch.random.fork_rng():
        model = models.build(recipe.model.name, result.input_shape, result.classes, **recipe.model.options)
    return mm.load(Path(folder) / "model.safetensors", model).eval()


@contextlib.contextmanager
def isolated(threads: int | None) -> Iterator[None]:
    """Give the random state and the number of threads back as they were."""
    before = torch.get_num_threads()
    with torch.random.fork_rng():
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)
