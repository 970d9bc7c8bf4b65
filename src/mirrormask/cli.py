"""The command line: finds the command, and turns what goes wrong into one message.

Nothing heavy is imported before a command needs it, so that ``mirrormask --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os
import select
import stat
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from mirrormask import checks, outcome
from mirrormask.stopping import EXIT_STATUS, Stopped

__all__ = ["COMMANDS", "main"]

#: Command -> the module that runs it, which of its functions, and what it does. ``main`` takes the arguments as they
#: are; any other function's signature becomes the command's options; ``*`` makes every public function a subcommand.
COMMANDS = {
    "demo": (
        "mirrormask.demo",
        "main",
        "the first thing to type: a small network, dense and sparse, and a page about it",
    ),
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
    "completion": ("mirrormask.completion", "main", "let bash, zsh or fish complete commands, options and files"),
}

#: Commands that run until they are stopped, or write what something else reads: they have no result to print.
RESULTLESS = ("serve", "completion")

#: What ``mirrormask --help`` says to begin with, and the examples of commands that are made of functions.
EXAMPLES = {
    "demo": "mirrormask demo",
    "train": "mirrormask train --data PATH --model timm:efficientnet_lite0 --init pretrained --sparsity 0.8 --epochs 5",
    "bench": "mirrormask bench runs/last",
    "flow": "mirrormask flow recovery --out figures",
}

#: What to do after an interruption.
GO_ON = {"train": "; go on with --resume true", "compare": "; run the same command again to go on"}

#: What every command takes -> what it does; ``main`` takes them out of the arguments.
FLAGS = {
    "--quiet": "print nothing but warnings and errors",
    "--json": "standard output is one JSON object: the command, its status, and its result or its error",
}

#: What a user can cause and mend; anything else is a bug and shows its traceback.
EXPECTED = (ValueError, TypeError, ImportError, OSError, FloatingPointError)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status.

    | status | meaning |
    |---|---|
    | 0 | done |
    | 1 | a cell of ``compare`` failed, the others are done: its ``error.txt`` says why |
    | 2 | a mistake of the user's, a full disk, damaged files: the message says which |
    | 75 | a signal asked it to stop; everything is saved: go on with ``--resume true`` |
    | 130 | interrupted where there was nothing to save |
    | 141 | whoever read the output, ``| head`` for one, had enough |

    ``--quiet`` and ``--json`` may stand anywhere after the command; ``--help`` says what they do.

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
    end = rest.index("--") if "--" in rest else len(rest)  # nothing behind it is an option
    own = rest[:end]
    rest = [*(one for one in own if one not in FLAGS), *rest[end:]]
    as_json = "--json" in own
    outcome.take()  # what a call before this one has left
    with outcome.apart(quiet="--quiet" in own, aside=as_json):
        try:
            status, message = _attempt(name, rest, as_json=as_json)
        except SystemExit as shown:  # a parser has shown its help
            if not as_json:
                raise
            status, message = shown.code if isinstance(shown.code, int) else int(shown.code is not None), ""
    result = outcome.take()
    if as_json and outcome.is_first():
        tree = {"command": name, "status": status, **({"error": message} if message else {"result": result})}
        try:
            print(json.dumps(tree, allow_nan=False), flush=True)
        except BrokenPipeError:
            if not _nobody_reads():
                raise
            return 141
    return status


def _attempt(name: str, arguments: Sequence[str], *, as_json: bool) -> tuple[int, str]:
    """Run one command; its exit status, and the message where it has not done what it should."""
    try:
        run = _command(name)
        if as_json and name in RESULTLESS:
            raise ValueError(f"{name} prints no result: leave out --json")
        return run(arguments), ""
    except EXPECTED as error:
        if os.environ.get("MIRRORMASK_TRACEBACK"):
            raise
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return 141, "nobody reads the output"
        where = f"mirrormask {name}" if name in COMMANDS else "mirrormask"
        status, message, where = 2, str(error), f"{where}: error"
    except Stopped as stopped:
        status, message, where = EXIT_STATUS, f"{stopped}{GO_ON.get(name, '')}", f"mirrormask {name}"
    except KeyboardInterrupt:
        status, message, where = 130, f"interrupted{GO_ON.get(name, '')}", f"mirrormask {name}"
    print(f"{where}: {checks.printable(message)}", file=sys.stderr)
    return status, message


def usage() -> str:
    """What ``mirrormask --help`` prints."""
    lines = ["usage: mirrormask COMMAND [options]", "", "commands:"]
    lines += [f"  {name:<10} {line}" for name, (_, _, line) in _present().items()]
    examples = [f"  {example}" for name, example in EXAMPLES.items() if name in _present() and name != "flow"]
    lines += ["", "begin with:", *examples] if examples else []
    lines += ["", "every command takes:", *(f"  {flag:<10} {line}" for flag, line in FLAGS.items())]
    lines += [
        "",
        "exit status: 0 done; 1 a cell of compare failed; 2 a mistake, which the message names; 75 stopped and saved,",
        "go on with --resume true; 130 interrupted with nothing to save.",
    ]
    return "\n".join([*lines, "", "mirrormask COMMAND --help tells more; mirrormask --version."])


def _nobody_reads() -> bool:
    """Whether standard output is a pipe that has been closed; then what is left for it goes nowhere."""
    poll = select.poll() if hasattr(select, "poll") else None
    if poll is None or not stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
        return False
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    closed = any(event & select.POLLERR for _, event in poll.poll(0))
    if closed:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return closed


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
    if function == "*":
        return partial(_one_of, name, {entry: getattr(module, entry) for entry in module.__all__})
    return partial(_call, name, getattr(module, function), EXAMPLES[name])


def _one_of(name: str, functions: dict[str, Callable[..., Any]], arguments: Sequence[str]) -> int:
    """Call the function that the first argument names."""
    if arguments and arguments[0] in ("-h", "--help"):
        lines = [f"usage: mirrormask {name} EXPERIMENT [options]", ""]
        lines += [f"  {entry:<9} {_line(function)}" for entry, function in functions.items()]
        print("\n".join([*lines, "", f"mirrormask {name} EXPERIMENT --help tells more.", f"Example: {EXAMPLES[name]}"]))
        return 0
    if not arguments:
        raise ValueError(f"which experiment? One of {', '.join(functions)}; --help says what they show")
    chosen = checks.check_known("experiment", arguments[0], functions)
    return _call(f"{name} {chosen}", functions[chosen], f"mirrormask {name} {chosen}", arguments[1:])


def _call(name: str, function: Callable[..., Any], example: str, arguments: Sequence[str]) -> int:
    """Call a function with command-line arguments for its parameters; what it returns is the command's result."""
    jsonargparse = checks.require("jsonargparse", "train", f"mirrormask {name}")
    parser = jsonargparse.ArgumentParser(
        prog=f"mirrormask {name}",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=importlib.import_module("mirrormask.train.arguments").formatter(
            jsonargparse.DefaultHelpFormatter
        ),
        description=_line(function),
        epilog=f"Example: {example}",
    )
    parser.add_function_arguments(function, as_group=False, as_positional=True)
    try:
        values = parser.parse_args(checks.known_options(arguments, parser._option_string_actions))
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    outcome.tell(function(**values.as_dict()))
    return 0


def _line(function: Callable[..., Any]) -> str:
    """The first line of a function's docstring."""
    return (inspect.getdoc(function) or "").partition("\n")[0]


if __name__ == "__main__":
    sys.exit(main())
