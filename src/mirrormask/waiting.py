"""What a command is at, for whoever waits: one live line on a terminal, a plain line for each stage elsewhere."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator

from mirrormask import checks, outcome

__all__ = ["stages"]


@contextlib.contextmanager
def stages(command: str) -> Iterator[Callable[..., None]]:
    """Show on standard error what ``command`` is at: ``at("timing", "round 2 of 15")``, the second on a terminal only.

    The line is drawn by the call itself and by no thread, which times that are taken would be measured with.

    Raises:
        ImportError: the extra ``train`` is not installed.

    Example:
        >>> with stages("bench") as at:
        ...     at("compiling")
    """
    if outcome.is_quiet():
        yield lambda stage, detail="": None
        return
    checks.require("rich", "train", f"mirrormask {command}")
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(file=sys.stderr)
    if not console.is_terminal:
        said: list[str] = []

        def say(stage: str, detail: str = "") -> None:
            if said[-1:] != [stage]:
                said[:] = [stage]
                print(f"{command}: {checks.printable(stage)}", file=sys.stderr, flush=True)

        yield say
        return
    # What others print to standard output stays there: it may be read by a program.
    with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False) as live:

        def show(stage: str, detail: str = "") -> None:
            line = f"{command}: {stage}, {detail}" if detail else f"{command}: {stage}"
            live.update(Text(checks.printable(line), no_wrap=True, overflow="ellipsis"), refresh=True)

        yield show
