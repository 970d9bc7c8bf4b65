"""``mirrormask info``: the installation, the methods, a run, or a model's file."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path

from mirrormask import environment

__all__ = ["main"]

USAGE = """usage: mirrormask info [methods | FOLDER | FILE]

  (nothing)  versions, processor, instruction sets and extras
  methods    the methods that mirrormask train --method takes
  FOLDER     what a run came to, and its model's file
  FILE       what a model's file holds, and its sizes

Example: mirrormask info runs/last"""


def main(arguments: Sequence[str]) -> int:
    """Run ``mirrormask info`` with these arguments; the exit status.

    Raises:
        ValueError: more than one argument, or one that is neither known nor a file.
    """
    if len(arguments) > 1:
        raise ValueError(f"info takes one argument, not {len(arguments)}\n{USAGE}")
    if not arguments:
        print(installation())
    elif arguments[0] in ("-h", "--help"):
        print(USAGE)
    elif arguments[0] == "methods":
        print(methods())
    else:
        file = Path(arguments[0])
        if file.is_dir():
            print(run(file))
            file = file / "model.safetensors"
        if not file.is_file():
            raise ValueError(f"{arguments[0]!r} is neither 'methods' nor a run's folder nor a file\n{USAGE}")
        commands = importlib.import_module("mirrormask.storage.commands")
        commands.info(file)
    return 0


def installation() -> str:
    """Versions, processor, instruction sets and extras, as lines."""
    tree = environment.describe()
    versions = environment.versions()
    sets = " ".join(environment.instruction_sets()) or "unknown without mirrormask[runtime]"
    lines = [
        f"mirrormask        {versions['mirrormask']}",
        f"python            {tree['python']} on {tree['platform']}",
        f"processor         {tree['processor']}, {tree['cores']} cores, {tree['threads']} threads",
        f"instruction sets  {sets}",
        f"gpu               {tree['gpu'] or 'none'}",
    ]
    lines += [f"{name:<17} {versions[name]}" for name in ("torch", "numpy", "safetensors")]
    for extra, packages in environment.EXTRAS.items():
        missing = [package for package in packages if versions[package] is None]
        state = ", ".join(f"{package} {versions[package]}" for package in packages if versions[package])
        if missing:
            state = f"missing {', '.join(missing)}: pip install 'mirrormask[{extra}]'"
        lines.append(f"[{extra}]{'':<{15 - len(extra)}} {state}")
    return "\n".join(lines)


def run(folder: Path) -> str:
    """A finished run, in a few lines.

    Raises:
        ValueError: the folder holds none.
    """
    runs = importlib.import_module("mirrormask.train.run_folder")
    result = runs.RunResult.read(folder)
    recipe = result.recipe
    return "\n".join(
        [
            f"{folder}: {recipe['model']['name']} on {recipe['data']['name']} with {result.method}, seed {result.seed}",
            f"  test accuracy {100 * result.test_accuracy:.2f}% after {result.epochs} epochs ({result.seconds:.1f} s)",
            f"  {result.nonzeros:,} of {result.numel:,} weights are not zero: sparsity {100 * result.sparsity:.3f}%",
        ]
    )


def methods() -> str:
    """The methods, a line each, with their references."""
    import mirrormask as mm

    rows = mm.methods.table()
    width, line = max(len(row.name) for row in rows), max(len(row.line) for row in rows)
    return "\n".join(f"{row.name:<{width}}  {row.line:<{line}}  {row.reference}" for row in rows)
