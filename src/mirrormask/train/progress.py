"""What a person sees while a run trains: a live line on a terminal, a few plain lines elsewhere."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mirrormask import checks, outcome
from mirrormask.train.loop import Observer
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunResult

__all__ = ["ProgressObserver"]

#: Lines that a run prints where nobody watches.
LINES = 10
#: Seconds between two updates of the live line.
INTERVAL = 0.2


class ProgressObserver(Observer):
    """Shows epoch, step, throughput, time to go, loss, accuracy, sparsity and alpha of one run after another.

    Args:
        console: where to print; one that is not a terminal gets about ten lines a run and no live line.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress: Progress | None = None
        self.name = "train"

    def started(self, recipe: Recipe, steps: int, step: int) -> None:
        """Begin a line for this run."""
        self.recipe, self.steps = recipe, steps
        self.name = recipe.method.name if not recipe.sparsity else f"{recipe.method.name} {100 * recipe.sparsity:g}%"
        self.first_step, self.first_time, self.shown = step, time.perf_counter(), 0.0
        self.every = -(-recipe.epochs // LINES)
        if step:
            self.console.print(f"[bold]{self.name}[/]: goes on at step {step} of {steps}")
        if self.console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}[/]"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[state]}"),
            )
            self.progress = Progress(*columns, console=self.console, transient=True)
            self.task = self.progress.add_task(self.name, total=steps, completed=step, rate="", state="")
            self.progress.start()

    def noted(self, text: str) -> None:
        """Say how the run begins."""
        self.console.print(f"{self.name}: {text}", markup=False)

    def stepped(self, step: int) -> None:
        """Move the live line, now and then."""
        now = time.perf_counter()
        if self.progress is not None and now - self.shown > INTERVAL:
            self.shown = now
            self.progress.update(self.task, completed=step, rate=self._rate(step))

    def logged(self, record: dict[str, Any]) -> None:
        """Show the newest scalars."""
        state = _state(record)
        if self.progress is not None:
            self.progress.update(self.task, completed=record["step"], state=f"epoch {record['epoch']} {state}")
        elif record["event"] == "epoch" and (
            record["epoch"] % self.every == 0 or record["epoch"] == self.recipe.epochs
        ):
            left = (self.steps - record["step"]) / max(self._speed(record["step"]), 1e-9)
            where = f"epoch {record['epoch']}/{self.recipe.epochs} step {record['step']}"
            self.console.print(f"{self.name}: {where} {self._rate(record['step'])} {left:.0f} s to go {state}")

    def warned(self, text: str) -> None:
        """Say what is wrong."""
        text = checks.printable(text)
        outcome.warn(f"{self.name}: {text}", self.console.print, f"[bold]{self.name}[/]: {escape(text)}")

    def finished(self, result: RunResult) -> None:
        """Leave one line behind."""
        self.stop()
        self.console.print(
            f"[bold]{self.name}[/]: test accuracy {100 * result.test_accuracy:.2f}%, {result.nonzeros:,} of "
            f"{result.numel:,} weights, {result.seconds:.1f} s, in {result.folder}"
        )

    def stop(self) -> None:
        """Take the live line away, also where a run failed."""
        if self.progress is not None:
            self.progress.stop()
            self.progress = None

    def _speed(self, step: int) -> float:
        return (step - self.first_step) / max(time.perf_counter() - self.first_time, 1e-9)

    def _rate(self, step: int) -> str:
        return f"{self._speed(step) * self.recipe.batch_size:,.0f} images/s"


def _state(record: dict[str, Any]) -> str:
    parts = [f"loss {record['loss']:.4f}", f"train {100 * record['train_accuracy']:.2f}%"]
    parts += [
        f"{kind} {100 * record[f'{kind}_accuracy']:.2f}%"
        for kind in ("validation", "test")
        if f"{kind}_accuracy" in record
    ]
    parts += [f"sparsity {100 * record['sparsity']:.2f}%", f"alpha {record['alpha']:.2e}"]
    return " ".join(parts)
