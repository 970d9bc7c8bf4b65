"""What a person sees while a grid trains: one live line on a terminal, a plain line a cell elsewhere."""

from __future__ import annotations

import time
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from mirrormask import checks, outcome
from mirrormask.compare.grid import Cell
from mirrormask.compare.runs import held_out_accuracy
from mirrormask.train.run_folder import RunResult

__all__ = ["Progress"]


class Progress:
    """Counts cells done, running and left, and estimates the time to go from the work that is done.

    Every cell has the same budget, so a cell is the unit of work, and what runs counts as far as it has come.

    Args:
        console: where to print.
        cells: those to train.
        already: how many more are finished already.
    """

    def __init__(self, console: Console, cells: Sequence[Cell], already: int = 0) -> None:
        self.console, self.total, self.already = console, len(cells) + already, already
        self.cells = len(cells)
        self.done = self.failures = 0
        self.running: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.start = time.perf_counter()
        self.bar: Bar | None = None
        if console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=console, transient=True)
            self.task = self.bar.add_task(self.state(), total=self.cells)
            self.bar.start()

    def started(self, cell: Cell) -> None:
        """A cell begins, or goes on."""
        self.running[cell.name] = 0.0
        self._show()

    def progressed(self, cell: Cell, fraction: float) -> None:
        """A cell has come this far; what an earlier start of it had done is not this one's work."""
        if not self.first:
            self.start = time.perf_counter()  # starting up the workers is not work
        self.first.setdefault(cell.name, fraction)
        self.running[cell.name] = fraction
        self._show()

    def finished(self, cell: Cell, result: RunResult) -> None:
        """A cell has its result."""
        self._ended(cell)
        self._line(f"{cell.name}: {100 * held_out_accuracy(result):.2f}% in {result.seconds:.1f} s")

    def failed(self, cell: Cell, error: str) -> None:
        """A cell has none."""
        self.failures += 1
        self._ended(cell)
        text = f"{cell.name} failed: {checks.printable(error)}"
        outcome.warn(text, self._line, text)

    def stop(self) -> None:
        """Take the live line away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def state(self) -> str:
        """Done, running, left, failed, and the time to go."""
        left = self.cells - self.done - len(self.running)
        parts = [f"{self.done + self.already} of {self.total} done", f"{len(self.running)} running", f"{left} left"]
        if self.failures:
            parts.append(f"{self.failures} failed")
        seconds = self.seconds_to_go()
        if seconds is not None and self.done < self.cells:
            parts.append(f"{duration(seconds)} to go")
        return ", ".join(parts)

    def seconds_to_go(self) -> float | None:
        """The work that is left over the speed so far; None before anything is known."""
        # Where a cell went on from a checkpoint, only what is trained now tells the speed.
        made = self.done + sum(self.running.values()) - sum(self.first.values())
        left = self.cells - self.done - sum(self.running.values())
        return left * (time.perf_counter() - self.start) / made if made > 0 else None

    def _ended(self, cell: Cell) -> None:
        self.running.pop(cell.name, None)
        self.done += 1

    def _line(self, text: str) -> None:
        if self.bar is None:
            self.console.print(f"[{self.done + self.already}/{self.total}] {text}; {self.state()}", markup=False)
        else:
            self.bar.console.print(escape(text))
        self._show()

    def _show(self) -> None:
        if self.bar is not None:
            work = self.done + sum(self.running.values())
            self.bar.update(self.task, completed=work, description=escape(self.state()))


def duration(seconds: float) -> str:
    """Seconds for people.

    Example:
        >>> duration(12), duration(125), duration(7300)
        ('12 s', '2 min 5 s', '2 h 1 min')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60)} min"
