"""``mirrormask train``: options to recipes, runs to a table."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mirrormask import checks, outcome
from mirrormask.train import named, recipe_file
from mirrormask.train.arguments import formatter
from mirrormask.train.recipe import Recipe
from mirrormask.train.signals import heeded

__all__ = ["main", "recipes"]

DESCRIPTION = """Train a network to an exact sparsity, and compare it with its dense run.

begin with:
  mirrormask train                                      digits, an MLP, 95%
  mirrormask train --sparsity 0.98 --method gmp,mirror
  mirrormask train recipes/digits-mlp.yaml --out runs/mine
  mirrormask train --data PATH --size 96 --model timm:efficientnet_lite0 \\
      --init pretrained --sparsity 0.8 --epochs 5"""
EPILOG = """Short names: --lr, --momentum, --weight-decay, --warmup, --temperature, --init,
--root, --size, --crop, --flip, --validation. Dashes and underscores are the
same. Stopped by a signal it ends with status 75: the same command with
--resume true goes on."""


def main(arguments: Sequence[str]) -> int:
    """Run ``mirrormask train`` with these arguments; the exit status.

    Raises:
        TypeError, ValueError: anything in the arguments, the recipe, the data or the folders that does not fit.
    """
    values = parse(arguments)
    runs, shared = recipes(values)
    resume, overwrite = values["resume"], values["overwrite"]

    # Everything that can be checked without training is, for every run, before the first one starts.
    from mirrormask.train.run_folder import RunFolder
    from mirrormask.train.session import make_method

    for recipe in runs:
        make_method(recipe)
        RunFolder(recipe.out).check(recipe, resume=resume, overwrite=overwrite)
    with heeded():  # around all runs: a signal at the end of one must not let the next begin
        return _train(runs, shared, resume=resume, overwrite=overwrite)


def parse(arguments: Sequence[str]) -> dict[str, Any]:
    """The options as a tree, those of the recipe file among them."""
    jsonargparse = checks.require("jsonargparse", "train", "mirrormask train")
    parser = jsonargparse.ArgumentParser(
        prog="mirrormask train",
        exit_on_error=False,
        allow_abbrev=False,
        usage="mirrormask train [RECIPE.yaml] [options]",
        formatter_class=formatter(jsonargparse.DefaultHelpFormatter),
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    parser.add_argument("file", nargs="?", help="a recipe: a YAML file; options override what it says")
    recipe_file.add_recipe_arguments(parser)
    parser.add_argument("--resume", type=bool, default=False, help="go on with runs that lie in the folder")
    parser.add_argument("--overwrite", type=bool, default=False, help="replace runs that lie in the folder")
    parser.add_argument("--allow_code", type=bool, default=False, help="import the code that a recipe file names")
    # The file is found first, so that --print_config prints what it says too.
    values = recipe_file.parse_arguments(parser, {}, [one for one in arguments if not one.startswith("--print_config")])
    if values["file"] is None:
        values = recipe_file.parse_arguments(parser, {}, arguments)
    else:
        values = recipe_file.parse_arguments(parser, recipe_file.read(values["file"]), arguments)
    names = [values[section]["name"] for section in ("model", "data")]
    named.check_allowed(names, typed=arguments, allow_code=values["allow_code"])
    return values


def recipes(values: dict[str, Any]) -> tuple[list[Recipe], Path]:
    """One recipe a method, each in its own folder below ``out``, and the folder that all outputs share.

    Raises:
        ValueError: a method is named twice or not at all.
    """
    whole = recipe_file.from_namespace(values)
    names = [name.strip() for name in whole.method.name.split(",")]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError(f"--method {whole.method.name!r} must name each method once, joined by commas")
    out = Path(whole.out)
    runs = []
    for name in names:
        method = dataclasses.replace(whole.method, name=name)
        runs.append(dataclasses.replace(whole, method=method, out=str(out / name)))
    return runs, out.parent


def _train(runs: Sequence[Recipe], shared: Path, *, resume: bool, overwrite: bool) -> int:
    from mirrormask.train.loop import Observer, run
    from mirrormask.train.progress import ProgressObserver
    from mirrormask.train.reference import dense_folder, dense_run
    from mirrormask.train.table import print_tables

    console = _console()
    observer = ProgressObserver(console) if outcome.is_first() else Observer()
    sparse = [recipe for recipe in runs if recipe.method.name != "dense"]
    asked = [recipe for recipe in runs if recipe.method.name == "dense"]
    try:
        reused = not asked and dense_folder(runs[0], shared).finished
        if asked:
            first = run(asked[0], resume=resume, overwrite=overwrite, observer=observer)
        else:
            first = dense_run(runs[0], shared, observer=observer)
        results = [first]
        for recipe in sparse:
            results.append(run(recipe, resume=resume, overwrite=overwrite, observer=observer))
    finally:
        if isinstance(observer, ProgressObserver):
            observer.stop()
    if outcome.is_first():
        print_tables(console, results, reused=reused)
        _point_at(shared / "last", results[-1].folder)
        outcome.tell({"folder": Path(runs[0].out).parent, "runs": results})
    return 0


def _console() -> Any:
    from rich.console import Console

    console = Console(highlight=False)
    # Where nobody watches, lines must not be cut at the 80 columns that rich assumes.
    return console if console.is_terminal else Console(highlight=False, width=max(console.width, 140), soft_wrap=True)


def _point_at(link: Path, folder: str) -> None:
    """Let ``runs/last`` stand for the newest run, unless something else has that name or links are not to be had."""
    with contextlib.suppress(OSError):
        if link.is_symlink():
            link.unlink()
        os.symlink(os.path.relpath(folder, link.parent), link)
