"""``mirrormask info``: the installation, the methods, a run, or a model's file."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mirrormask import checks, environment, outcome

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
        _show(installation(), installation_text)
    elif arguments[0] in ("-h", "--help"):
        print(USAGE)
    elif arguments[0] == "methods":
        _show(methods(), methods_text)
    else:
        file, result = Path(arguments[0]), {}
        if file.is_dir():
            result["run"] = run(file)
            print(run_text(result["run"]))
            file = file / "model.safetensors"
        if not file.is_file():
            raise ValueError(f"{arguments[0]!r} is neither 'methods' nor a run's folder nor a file\n{USAGE}")
        commands = importlib.import_module("mirrormask.storage.commands")
        result["file"] = commands.info(file)
        outcome.tell(result)
    return 0


def _show(values: Any, text: Callable[[Any], str]) -> None:
    print(text(values))
    outcome.tell(values)


def installation() -> dict[str, Any]:
    """Versions, processor, instruction sets and extras."""
    tree = environment.describe()
    versions = environment.versions()
    return {
        "mirrormask": versions["mirrormask"],
        **{name: tree[name] for name in ("python", "platform", "processor", "cores", "threads")},
        "instruction_sets": environment.instruction_sets(),
        "gpu": tree["gpu"],
        "packages": {name: versions[name] for name in ("torch", "numpy", "safetensors")},
        "extras": {extra: {name: versions[name] for name in names} for extra, names in environment.EXTRAS.items()},
    }


def installation_text(values: dict[str, Any]) -> str:
    """What :func:`installation` gives, as lines."""
    sets = " ".join(values["instruction_sets"]) or "unknown without mirrormask[runtime]"
    lines = [
        f"mirrormask        {values['mirrormask']}",
        f"python            {values['python']} on {values['platform']}",
        f"processor         {values['processor']}, {values['cores']} cores, {values['threads']} threads",
        f"instruction sets  {sets}",
        f"gpu               {values['gpu'] or 'none'}",
    ]
    lines += [f"{name:<17} {version}" for name, version in values["packages"].items()]
    for extra, packages in values["extras"].items():
        missing = [name for name, version in packages.items() if version is None]
        state = ", ".join(f"{name} {version}" for name, version in packages.items() if version)
        if missing:
            state = f"missing {', '.join(missing)}: pip install 'mirrormask[{extra}]'"
        lines.append(f"[{extra}]{'':<{15 - len(extra)}} {state}")
    return "\n".join(lines)


def run(folder: Path) -> dict[str, Any]:
    """What a finished run came to.

    Raises:
        ValueError: the folder holds none.
    """
    result = importlib.import_module("mirrormask.train.run_folder").RunResult.read(folder)
    names = ("method", "seed", "test_accuracy", "epochs", "seconds", "nonzeros", "numel", "sparsity")
    about = {"model": result.recipe["model"]["name"], "data": result.recipe["data"]["name"]}
    about |= {name: getattr(result, name) for name in ("class_names", "pixel_mean", "pixel_std")}
    return {"folder": str(folder), **about, **{name: getattr(result, name) for name in names}}


def run_text(values: dict[str, Any]) -> str:
    """What :func:`run` gives, in a few lines."""
    classes = checks.few([checks.one_line(name, 40) for name in values["class_names"]])
    about = [f"  {len(values['class_names'])} classes: {classes}"] if classes else []
    if values["pixel_mean"]:
        mean, std = (", ".join(f"{number:.4g}" for number in values[f"pixel_{of}"]) for of in ("mean", "std"))
        about.append(f"  images are taken as (pixels - [{mean}]) / [{std}]")
    return "\n".join(
        [
            "{folder}: {model} on {data} with {method}, seed {seed}".format(**values),
            f"  test accuracy {100 * values['test_accuracy']:.2f}% after {values['epochs']} epochs "
            f"({values['seconds']:.1f} s)",
            f"  {values['nonzeros']:,} of {values['numel']:,} weights are not zero: "
            f"sparsity {100 * values['sparsity']:.3f}%",
            *about,
        ]
    )


def methods() -> list[dict[str, str]]:
    """The methods: their names, what they do in a line, and their references."""
    import mirrormask as mm

    return [{"name": row.name, "line": row.line, "reference": row.reference} for row in mm.methods.table()]


def methods_text(values: list[dict[str, str]]) -> str:
    """What :func:`methods` gives, a line each."""
    width, line = (max(len(row[key]) for row in values) for key in ("name", "line"))
    return "\n".join(f"{row['name']:<{width}}  {row['line']:<{line}}  {row['reference']}" for row in values)
