"""A comparison's grid from a YAML file and from command-line options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mirrormask import checks
from mirrormask.train import named, plain_yaml, recipe_file
from mirrormask.train.arguments import formatter
from mirrormask.train.recipe import Data, Model

if TYPE_CHECKING:
    from mirrormask.compare.grid import Grid

__all__ = ["load_grid", "parse"]

#: What a comparison has several of; a recipe's ``method`` and ``seed`` are written ``methods`` and ``seeds`` here.
PLURAL = {"method": "methods", "seed": "seeds"}
DESCRIPTION = """Train a grid of methods, sparsities and seeds, and say which differences are
more than chance.

begin with:
  mirrormask compare recipes/compare-digits.yaml
  mirrormask compare --methods dense,gmp,mirror --sparsity 0.9,0.95 --seeds 3 \\
      --out runs/mine"""
EPILOG = """Dashes and underscores are the same. The same command again goes on after an
interruption, and tries what failed once more (status 1)."""


def load_grid(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Grid:
    """The grid in a YAML file.

    Args:
        path: a recipe with ``methods`` (a list of names, or label -> options) and ``seeds`` (how many, a list, or
            label -> how many, with ``default``) in place of ``method`` and ``seed``, and one or more sparsities.
        overrides: values that replace the file's, by dotted key: ``{"data.root": "/data"}``.

    Raises:
        TypeError, ValueError: a key or value is not allowed, or the grid is not, see :class:`Grid`.
    """
    arguments = [str(path), *(f"--{key}={value}" for key, value in (overrides or {}).items())]
    grid = parse(arguments)[0]
    assert grid is not None  # a file always has one
    return grid


def parse(arguments: Sequence[str]) -> tuple[Grid | None, dict[str, Any]]:
    """The grid, or None where only finished runs are to be read, and all options.

    Raises:
        TypeError, ValueError: anything that does not fit.
    """
    parser = _parser()
    # The file is found first, so that --print_config prints what it says too.
    values = recipe_file.parse_arguments(parser, {}, [one for one in arguments if not one.startswith("--print_config")])
    tree: dict[str, Any] = {}
    if values["file"] is None:
        values = recipe_file.parse_arguments(parser, {}, arguments)
    else:
        tree = _read(values["file"])
        plain = {key: value for key, value in tree.items() if key not in ("methods", "sparsity", "seeds")}
        values = recipe_file.parse_arguments(parser, plain, arguments)
    imported = [folder for folder in (values["import"] or "").split(",") if folder]
    values["import"] = imported
    if not tree and not values["methods"]:
        if imported and not (values["sparsity"] or values["seeds"] or values["options"]):
            values["out"] = values["out"] or "runs/compare"
            return None, values
        raise ValueError("the grid is empty: give a recipe file, --methods, or finished runs with --import FOLDER")
    names = [values[section]["name"] for section in ("model", "data")]
    named.check_allowed(names, typed=arguments, allow_code=values["allow_code"])
    methods = _methods(values["methods"], values["options"] or {}, tree.get("methods"))
    sparsities = _numbers(values["sparsity"] or tree.get("sparsity", ()), float, "--sparsity")
    seeds = _seeds(values["seeds"] or tree.get("seeds", 3), methods)
    base = recipe_file.from_namespace({**values, "sparsity": 0.0, "out": values["out"] or _folder(values)})
    from mirrormask.compare.grid import Grid

    return Grid(base, methods, tuple(sparsities), seeds), values


def _parser() -> Any:
    jsonargparse = checks.require("jsonargparse", "train", "mirrormask compare")
    parser = jsonargparse.ArgumentParser(
        prog="mirrormask compare",
        exit_on_error=False,
        allow_abbrev=False,
        usage="mirrormask compare [GRID.yaml] [options]",
        formatter_class=formatter(jsonargparse.DefaultHelpFormatter),
        description=DESCRIPTION,
        epilog=EPILOG,
    )
    add = parser.add_argument
    add("file", nargs="?", help="a comparison's recipe: a YAML file; options override what it says")
    add("--methods", type=str, default="", help="names, joined by commas; of a file's labels, only these")
    add("--sparsity", type=str, default="", help="fractions of zeros, joined by commas: 0.9,0.95")
    add("--seeds", type=str, default="", help="how many seeds, from 0 on, 3 by default; or the seeds: 0,4,5")
    add("--options", type=dict, default=None, help='options by method: \'{"gmp": {"end_at": 0.5}}\'')
    add("--import", type=str, default="", help="folders, joined by commas, with runs made elsewhere: left as they are")
    add("--workers", type=int, default=None, help="cells trained side by side; by default cores // threads")
    add("--ray", type=str, default="", help="train on a Ray cluster: its address, host:port, or auto")
    add("--gpus", type=float, default=0.0, help="GPUs that a cell takes on a Ray cluster; may be a fraction")
    add("--bench", type=bool, default=False, help="afterwards, time each method and sparsity")
    add("--allow_code", type=bool, default=False, help="import the code that a recipe file names")
    recipe_file.add_recipe_arguments(parser, skip=["method", "sparsity", "seed"])
    # The report draws all runs together; a figure of each would take longer than many a run.
    # A network that a method has killed is a result there.
    parser.set_defaults({"figure": False, "stop_dead": False})
    return parser


def _read(path: str) -> dict[str, Any]:
    tree = recipe_file.read_tree(path)
    for single, plural in PLURAL.items():
        if single in tree:
            raise ValueError(f"{path}: a comparison has {plural!r}, not {single!r}; for one run use mirrormask train")
    own: dict[str, Any] = {key: tree.pop(key) for key in ("methods", "sparsity", "seeds") if key in tree}
    try:
        return {**recipe_file.expand(tree), **own}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _methods(names: str, options: Mapping[str, Any], held: Any) -> dict[str, Mapping[str, Any]]:
    """Label -> options: those of the file, or the named ones among them and others with their defaults."""
    if isinstance(held, str):
        held = _names(held)
    if isinstance(held, list):
        _refuse_twice([str(name) for name in held])
        held = {str(name): {} for name in held}
    if not isinstance(held, dict | None):
        raise TypeError(f"methods={held!r} is neither a list of names nor a mapping of labels to options")
    known = {str(label): given or {} for label, given in (held or {}).items()}
    chosen = _names(names) if names else list(known)
    _refuse_twice(chosen)
    methods: dict[str, Mapping[str, Any]] = {label: known.get(label, {}) for label in chosen}
    for label, given in [*methods.items(), *_nested(options).items()]:
        checks.check_known("method in --options:", label, methods)
        if not isinstance(given, dict):
            raise TypeError(f"the options of {label!r} are {given!r}, not a mapping of names to values")
        methods[label] = {**methods[label], **given}
    return methods


def _nested(options: Mapping[str, Any]) -> dict[str, Any]:
    """``--options.gmp.end_at 0.5`` comes as ``{"gmp.end_at": 0.5}``."""
    result: dict[str, Any] = {}
    for key, value in options.items():
        label, dot, option = key.partition(".")
        if dot:
            result[label] = {
                **result.get(label, {}),
                option: plain_yaml.load(value, f"the option {option!r}") if isinstance(value, str) else value,
            }
        else:
            result[key] = {**result.get(key, {}), **value} if isinstance(value, dict) else value
    return result


def _refuse_twice(names: Sequence[str]) -> None:
    for name in names:
        if list(names).count(name) > 1:
            raise ValueError(f"the method {name!r} is named twice; name each once, or NAME/VARIANT with its options")


def _seeds(given: Any, methods: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if isinstance(given, dict):
        counts = {("" if label == "default" else str(label)): n for label, n in given.items()}
        counts.setdefault("", 3)
        kept = {label: n for label, n in counts.items() if not label or label in methods}
        return {label: tuple(_count(n)) for label, n in kept.items()}
    if isinstance(given, int) or (isinstance(given, str) and "," not in given):
        return {"": tuple(_count(given))}
    return {"": tuple(_numbers(given, int, "--seeds"))}


def _count(given: Any) -> range:
    number = _numbers([given], int, "--seeds")[0]
    return range(checks.check_int("seeds", number, low=1, hint="the number of seeds, or a list of them"))


def _numbers(given: Any, kind: type, option: str) -> list[Any]:
    """Numbers from ``"0.9,0.95"``, a number, or a list of them."""
    parts = _names(given) if isinstance(given, str) else list(given) if isinstance(given, list | tuple) else [given]
    try:
        if any(isinstance(part, bool) or (kind is int and isinstance(part, float)) for part in parts):
            raise ValueError
        return [kind(part) for part in parts]
    except (TypeError, ValueError):
        what = "numbers" if kind is float else "whole numbers"
        raise ValueError(f"{option} {given!r} must be {what} joined by commas") from None


def _names(given: str) -> list[str]:
    names = [name.strip() for name in given.split(",")]
    if not all(names):
        raise ValueError(f"{given!r} has an empty name in it; join names by single commas")
    return names


def _folder(values: Mapping[str, Any]) -> str:
    return f"runs/compare-{Data(values['data']['name']).short}-{Model(values['model']['name']).short}"
