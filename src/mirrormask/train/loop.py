"""One training run: a recipe in, a finished folder out."""

from __future__ import annotations

import contextlib
import math
import os
import time
import warnings
from typing import Any

import mirrormask as mm
from mirrormask import checks, environment
from mirrormask.masks import keep_count
from mirrormask.train import figure, origin, parallel, predictions, recipe_file
from mirrormask.train.checkpoint import Checkpoints
from mirrormask.train.data import Splits
from mirrormask.train.distributions import Distributions
from mirrormask.train.health import Health
from mirrormask.train.keeper import Keeper
from mirrormask.train.log import Log
from mirrormask.train.randomness import deterministic, isolated
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunFolder, RunResult
from mirrormask.train.session import Session, Totals
from mirrormask.train.signals import Request, Stopped, heeded

__all__ = ["Observer", "run"]

DIAGNOSTICS = ("alpha", "decay_integral", "median_a", "l1_norm", "sparsity", "below_threshold", "sign_flips")


class Observer:
    """Is told how a run goes on; this one keeps silent. Override what is of interest.

    Where several processes train, all but ``stepped`` is told to the observer of the main one alone.
    """

    def started(self, recipe: Recipe, steps: int, step: int) -> None:
        """A run of ``steps`` steps begins, or goes on at ``step``."""

    def noted(self, text: str) -> None:
        """Something about how the run begins that a person should know."""

    def stepped(self, step: int) -> None:
        """A step was made; called for each, so do little."""

    def logged(self, record: dict[str, Any]) -> None:
        """A record was written to the log."""

    def warned(self, text: str) -> None:
        """Something is wrong and the run goes on; this one warns."""
        warnings.warn(text, stacklevel=2)

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

    Everything that the recipe gets wrong is found before anything is written. The folder gets a checkpoint at the end
    of every epoch, every ``recipe.checkpoint_every`` and when a signal (SIGTERM, SIGINT, SIGUSR1) asks the run to stop;
    and, last of all, ``result.json``, which marks a finished run. Global random states and torch's number of threads
    are left as they were.

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
        CheckpointError: a ValueError: no checkpoint of the folder can be used.
        FloatingPointError: the loss or gradients were not finite in ``recipe.stop_after`` steps in a row or in a whole
            epoch, a factor passed all bounds, or the network died.
        OSError: a file cannot be written; the last checkpoint is whole. As a :class:`LostProcess`: another process of
            this run has ended in its middle.
        Stopped: a signal asked for it; the run can go on.
    """
    folder, observer = RunFolder(recipe.out), observer or Observer()
    folder.check(recipe, resume=resume, overwrite=overwrite)
    if resume and folder.finished and parallel.launched() == 1:  # several must all see it at the same time
        return RunResult.read(folder.path)
    with isolated(recipe.threads), deterministic(recipe.deterministic), heeded() as request:
        try:
            session = Session(recipe, splits)
            with contextlib.ExitStack() as stack:
                # No process may find a folder that another one has begun to fill.
                session.accelerator.wait_for_everyone()

                def enter() -> RunResult | None:
                    _lock(stack, folder, wait, request)
                    if resume and folder.finished:  # perhaps by the process that was waited for
                        return RunResult.read(folder.path)
                    folder.prepare(recipe, overwrite=overwrite)
                    return None

                finished: RunResult | None = parallel.shared(enter)
                return finished or _Run(session, folder, observer, request).complete()
        except RuntimeError as error:
            if not parallel.lost(error):
                raise
            newest = next(iter(Checkpoints(folder.path, recipe)), None)
            last = f"the last checkpoint is {str(newest)!r}" if newest else "there is no checkpoint yet"
            raise parallel.LostProcess(
                f"another process of this run has ended in its middle: what it said stands elsewhere in the output, or "
                f"it was killed (for want of memory?); {last}; go on with --resume true, with any number of processes"
            ) from error


def _lock(stack: contextlib.ExitStack, folder: RunFolder, wait: bool, request: Request) -> None:
    try:
        stack.enter_context(folder.locked(wait=wait, given_up=lambda: bool(request)))
    except ValueError as error:
        if request:
            raise Stopped(f"stopped by {request.name} while another process trains in {str(folder.path)!r}") from error
        raise


class _Run:
    """The loop over epochs, with its log and its clock."""

    def __init__(self, session: Session, folder: RunFolder, observer: Observer, request: Request) -> None:
        self.session, self.folder, self.observer = session, folder, observer
        self.main = session.accelerator.is_main_process
        self.world = session.accelerator.num_processes
        #: How many processes the log says that there are.
        self.logged_world = 1
        # Before the checkpoint is loaded: a run that goes on makes the weights of its start again.
        self.distributions = Distributions(session.optimizer)
        self.window, self.whole = Totals(session.accelerator.device), Totals(session.accelerator.device)
        self.last: dict[str, float] = {}
        self.best: float | None = None
        self.earlier, self.offset = 0.0, 0
        self.digest: str | None = None
        self.origin = origin.origin(session.splits.digest, session.teacher_digest)
        self.moved = ""
        self.health = Health(session, self._fault)
        self.checkpoints = Checkpoints(folder.path, session.recipe)
        self.keeper = Keeper(session, self.checkpoints, self._state, request)
        self.came_from, damaged = self.checkpoints.load(self._use, parallel.shared)
        session.accelerator.wait_for_everyone()
        if self.main:
            self.checkpoints.set_aside(damaged)
            for fault in damaged:
                went_on = "the start" if self.came_from is None else f"{self.came_from.name!r}"
                observer.warned(f"{fault}; it is set aside, and the run goes on from {went_on}")
            if self.moved:
                observer.warned(self.moved)
        self.start = time.perf_counter() - self.earlier
        self.log: Log | None = None
        if self.main:
            self.log = Log(folder.path, offset=self.offset, digest=self.digest, step=session.step)

    def complete(self) -> RunResult:
        session = self.session
        if self.main:
            self.observer.started(session.recipe, session.steps, session.step)
            if session.note and not session.step:
                self.observer.noted(session.note)
            few = parallel.too_few(self.world)
            if few:
                self.observer.warned(few)
            if self.world > 1:
                self.observer.noted(f"{self.world} processes, {session.kind}")
        try:
            if self.log is not None and self.world != self.logged_world:
                about = {"processes": self.world, "parallel": session.kind}
                self.log.write({"event": "processes", "step": session.step, "epoch": session.epoch + 1, **about})
            if self.log is not None and self.moved:
                about = {"step": session.step, "epoch": session.epoch + 1, "what": self.moved}
                self.log.write({"event": "environment", **about})
            self.logged_world = self.world
            while session.epoch < session.recipe.epochs:
                self._epoch()
            return self._finish()
        except OSError as error:
            if error.errno is None:
                raise
            if not self.folder.path.is_dir():
                raise FileNotFoundError(
                    2, "the run's folder is gone, and what it held", str(self.folder.path)
                ) from error
            reason = f"{error.strerror}; {self._remedy('make room or give access, and go on with --resume true')}"
            raise type(error)(error.errno, reason, os.fsdecode(error.filename or self.folder.path)) from error
        except FloatingPointError as error:
            rate = f"lower optimizer.lr (it is {session.recipe.optimizer.lr:g}) or use precision fp32"
            raise FloatingPointError(f"{error}; {rate}; {self._remedy('no more of it is of use')}") from error
        finally:
            if self.log is not None:
                self.log.close()

    def _remedy(self, what: str) -> str:
        newest = next(iter(self.checkpoints), None)
        return f"{what}; the last good checkpoint is {str(newest)!r}" if newest else f"{what}; there is no checkpoint"

    def _epoch(self) -> None:
        session = self.session
        if not session.done:
            self.whole.sums.zero_()
        session.train_epoch(self.window, self.health.look, self._after_step)
        self.whole.take(self.window)
        loss, accuracy = self.whole.means(session.accelerator)
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss was not finite in any step of epoch {session.epoch + 1}")
        # First, as long as the epoch can be gone on from.
        held_out = self._held_out()
        session.optimizer.epoch_end(score=accuracy)
        session.epoch += 1
        self.health.epoch_end()
        self.last = {"loss": loss, "train_accuracy": accuracy, **held_out}
        self._record("epoch", self.last)
        reached = next(iter(held_out.values()))
        best = self.best is None or reached >= self.best
        self.best = reached if best else self.best
        self.keeper.save(best=best)

    def _after_step(self) -> None:
        self.observer.stepped(self.session.step)
        if self.session.step % self.session.recipe.log_every == 0:
            loss, accuracy = self.window.means(self.session.accelerator)
            self._record("step", {"loss": loss, "train_accuracy": accuracy})
            self.whole.take(self.window)
        self.keeper.after_step(sound=not self.health.row)

    def _held_out(self) -> dict[str, float]:
        # With a validation split, the test images are looked at once, at the end.
        session = self.session

        def heed() -> None:
            self.keeper.between(save=True)

        if session.validation is not None:
            return {"validation_accuracy": session.evaluate(session.validation, heed)[1]}
        return {"test_accuracy": session.evaluate(session.test, heed)[1]}

    def _state(self) -> dict[str, Any]:
        """All that a run goes on from."""
        if self.log is not None:
            self.log.sync()
        session = self.session
        own = {**session.position_dict(), "window": self.window.sums, "whole": self.whole.sums}
        return {
            "session": session.state_dict(),
            "processes": [own] if self.world == 1 else _gathered(own),
            "world": self.logged_world,
            "origin": self.origin,
            "log": None if self.log is None else [self.log.offset, self.log.digest],
            "seconds": self._seconds(),
            "last": dict(self.last),
            "best": self.best,
            "health": self.health.state_dict(),
        }

    def _use(self, state: dict[str, Any]) -> None:
        session, processes = self.session, state["processes"]
        own = (
            processes[session.accelerator.process_index]
            if len(processes) == self.world
            else self._shared_out(processes)
        )
        offset, digest = state["log"]
        checks.check_int("log", offset, low=0)
        last = {str(key): checks.check_number(str(key), value) for key, value in state["last"].items()}
        best = None if state["best"] is None else checks.check_number("best", state["best"], low=0.0, high=1.0)
        earlier = checks.check_number("seconds", state["seconds"], low=0.0)
        if state["session"]["epoch"] and not {"loss", "train_accuracy"} < last.keys():
            raise ValueError("it lacks what the last epoch gave")
        there = state.get("origin", {})
        origin.check(there, self.origin)
        self.moved = origin.changed_software(there, self.origin)
        session.load_state_dict(state["session"], own)
        self.health.load_state_dict(state["health"])
        self.window.sums.copy_(own["window"])
        self.whole.sums.copy_(own["whole"])
        # Checkpoints of before this was written down say nothing, as their logs do.
        self.logged_world = state.get("world", self.world)
        self.last, self.best, self.earlier, self.offset, self.digest = last, best, earlier, offset, str(digest)

    def _shared_out(self, processes: list[dict[str, Any]]) -> dict[str, Any]:
        """What this process goes on from where another number of them was: what they had counted, together, is once."""
        sums = {key: sum(one[key] for one in processes) * self.main for key in ("window", "whole")}
        return {"random": None, "order": processes[0]["order"], **sums}

    def _fault(self, what: str) -> None:
        step = self.session.step + 1
        if self.log is not None:
            self.observer.warned(f"step {step}: {what}")
            self.log.write({"event": "fault", "step": step, "epoch": self.session.epoch + 1, "what": what})

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
        try:
            session.finish()
        except RuntimeError as error:
            if parallel.lost(error):
                raise
            raise FloatingPointError(str(error)) from error

        def heed() -> None:
            self.keeper.between(save=False)

        counted = mm.sparsity(session.model)
        test = session.evaluate(session.test, heed)[1]
        validation = session.evaluate(session.validation, heed)[1] if session.validation is not None else None
        accuracies = {"test_accuracy": test, **({} if validation is None else {"validation_accuracy": validation})}
        self._record("final", {"loss": self.last["loss"], "train_accuracy": self.last["train_accuracy"], **accuracies})
        path = self.folder / "model.safetensors"
        model = session.whole_model()
        self.distributions.final()
        if not self.main or model is None:
            return self._shared_result(None)
        metadata = {"method": recipe.method.name, "sparsity": f"{recipe.sparsity:g}", "seed": str(recipe.seed)}
        mm.save(model, path, metadata=metadata)
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
            skipped_steps=int(session.optimizer.skipped_steps),
            file_bytes=path.stat().st_size,
            input_shape=session.splits.shape,
            classes=len(session.splits.classes),
            layers=counted.layers,
            recipe=recipe_file.to_dict(recipe),
            environment=environment.describe(),
            processes=self.world,
            parallel=session.kind,
            class_names=session.splits.classes,
            pixel_mean=tuple(session.mean.flatten().tolist()),
            pixel_std=tuple(session.std.flatten().tolist()),
        )
        self.distributions.write(self.folder.path)
        predictions.write(self.folder.path, session, model)
        if recipe.figure:
            figure.draw(self.folder.path, result)
        result.write()
        self.observer.finished(result)
        return self._shared_result(result)

    def _shared_result(self, result: RunResult | None) -> RunResult:
        """The main process's result, on all; the folder need not be where the others can see it."""
        whole: RunResult = parallel.shared(lambda: result)
        return whole

    def _seconds(self) -> float:
        return time.perf_counter() - self.start


def _gathered(own: dict[str, Any]) -> list[dict[str, Any]]:
    """What every process has of its own, in the order of their ranks."""
    from accelerate.utils import gather_object

    return list(gather_object([own]))
