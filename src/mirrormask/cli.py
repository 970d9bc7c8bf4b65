"""The command line: finds the command, and turns what goes wrong into one message.

Nothing heavy is imported before a command needs it, so that ``mirrormask --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mirrormask import checks
from mirrormask.stopping import EXIT_STATUS, Stopped

__all__ = ["COMMANDS", "main"]

#: Command -> the module that runs it, which of its functions, and what it does. ``main`` takes the arguments as they
#: are; any other function's signature becomes the command's options; ``*`` makes every public function a subcommand.
COMMANDS = {
    "train": (
        "mirrormask.train.command",
        "main",
        "train a network to an exact sparsity, and compare it with its dense run",
    ),
    "compare": ("mirrormask.compare.command", "main", "train a grid of methods and seeds, and test what differs"),
    "report": (
        "mirrormask.report.command",
        "main",
        "write one HTML page about finished runs: charts and tables",
    ),
    "bench": ("mirrormask.train.bench", "bench_run", "time a trained model in every engine against mm.compile"),
    "flow": ("mirrormask.flow.commands", "*", "check the theory: recovery, bias, depth, signs, rates, norm, all"),
    "export": ("mirrormask.train.export", "main", "turn a run's or a file's model into ONNX and other formats"),
    "serve": ("mirrormask.serve.command", "main", "serve a compiled model over HTTP (Open Inference Protocol)"),
    "info": (
        "mirrormask.info",
        "main",
        "the installation; info methods: the methods; info FOLDER or FILE: a run, a model's file",
    ),
}

#: What to do after an interruption.
GO_ON = {"train": "; go on with --resume true", "compare": "; run the same command again to go on"}

#: What a user can cause and mend; anything else is a bug and shows its traceback.
EXPECTED = (ValueError, TypeError, ImportError, OSError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    | status | meaning |
    |---|---|
    | 0 | done |
    | 2 | a mistake of the user's, a full disk, damaged files: the message says which |
    | 75 | a signal asked it to stop; everything is saved: go on with ``--resume true`` |
    | 130 | interrupted where there was nothing to save |

    Set the environment variable ``MIRRORMASK_TRACEBACK`` to see where an error came from.

    Args:
        arguments: without the program's name; those of the process by default.

    Example:
        >>> main(["--version"]).bit_length()
        mirrormask 0.1.0
        0
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    if not given or given[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if given[0] in ("-V", "--version"):
        from mirrormask import __version__

        print(f"mirrormask {__version__}")
        return 0
    name, rest = given[0], given[1:]
    try:
        run = _command(name)
        return run(rest)
    except EXPECTED as error:
        if os.environ.get("MIRRORMASK_TRACEBACK"):
            raise
        where = f"mirrormask {name}" if name in COMMANDS else "mirrormask"
        print(f"{where}: error: {checks.printable(str(error))}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"mirrormask {name}: {checks.printable(str(stopped))}{GO_ON.get(name, '')}", file=sys.stderr)
        return EXIT_STATUS
    except KeyboardInterrupt:
        print(f"mirrormask {name}: interrupted{GO_ON.get(name, '')}", file=sys.stderr)
        return 130


def usage() -> str:
    """What ``mirrormask --help`` prints."""
    lines = ["usage: mirrormask COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<10} {line}" for name, (_, _, line) in _present().items()]
    return "\n".join([*lines, "", "mirrormask COMMAND --help tells more; mirrormask --version."])


def _present() -> dict[str, tuple[str, str, str]]:
    """The commands whose module is installed, found without importing it."""
    root = Path(__file__).parent.parent
    return {
        name: entry
        for name, entry in COMMANDS.items()
        if root.joinpath(*entry[0].split(".")).with_suffix(".py").is_file()
    }


def _command(name: str) -> Callable[[Sequence[str]], int]:
    checks.check_known("command", name, _present())
    path, function, _ = COMMANDS[name]
    module = importlib.import_module(path)
    if function == "main":
        run: Callable[[Sequence[str]], int] = module.main
        return run
    functions = [getattr(module, entry) for entry in module.__all__] if function == "*" else getattr(module, function)
    return partial(_call, name, functions)


def _call(name: str, functions: Any, arguments: Sequence[str]) -> int:
    """Call one function, or one of several by its name, with command-line arguments for its parameters."""
    jsonargparse = checks.require("jsonargparse", "train", f"mirrormask {name}")
    try:
        jsonargparse.auto_cli(
            functions, args=[_underscored(word) for word in arguments], prog=f"mirrormask {name}", exit_on_error=False
        )
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return 0


def _underscored(word: str) -> str:
    """An option with underscores where it may have dashes; anything else as it is.

    Example:
        >>> _underscored("--input-shape=a-b"), _underscored("a-b")
        ('--input_shape=a-b', 'a-b')
    """
    option, equals, value = word.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value if option.startswith("--") else word


if __name__ == "__main__":
    sys.exit(main())
