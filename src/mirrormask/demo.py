"""``mirrormask demo``: the first thing to type."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Sequence

from mirrormask import checks, outcome

__all__ = ["main"]

#: Half of a recipe's 40 epochs: a minute in all, and both methods have settled.
RECIPE = ("--method", "gmp,mirror", "--sparsity", "0.95", "--epochs", "20", "--threads", "1", "--figure", "false")


def main(arguments: Sequence[str]) -> int:
    """Train a small network three times, write a page about it, and say what to type next; the exit status.

    Raises:
        ImportError: the extra ``train`` is not installed.
        OSError: the folder cannot be written.
    """
    parser = checks.Parser(
        prog="mirrormask demo",
        description="Train a small network on scikit-learn's digits: dense, and 95% sparse by two methods. "
        "Then write a page about the three. About a minute, and nothing is downloaded.",
        epilog="Example: mirrormask demo",
    )
    parser.add_argument("--out", default="runs/demo", help="the folder of the runs, replaced (default: %(default)s)")
    out = parser.parse_args(checks.known_options(arguments, parser._option_string_actions)).out
    train = importlib.import_module("mirrormask.train.command")
    report = importlib.import_module("mirrormask.report.command")
    page = f"{out}/report.html"
    status = int(train.main([*RECIPE, "--out", out, "--overwrite", "true"]))
    status = status or int(report.main([f"{out}/gmp", f"{out}/mirror", "--out", page]))
    if status == 0:
        run = shlex.quote(f"{out}/mirror")
        lines = {
            f"mirrormask info {run}": "accuracy, sizes, layer by layer",
            f"mirrormask export {run} --to mirror": "one file that runs without PyTorch",
            f"mirrormask bench {run}": "its time beside every engine that is installed",
            "mirrormask train --help": "your images, your network",
        }
        width = max(map(len, lines))
        print(f"\nOpen {page} in a browser. Then:")
        print("\n".join(f"  {command:<{width}}    {what}" for command, what in lines.items()))
        outcome.tell({"page": page, "folder": out})
    return status
