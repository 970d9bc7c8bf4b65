"""Recipes from YAML and from command-line overrides, with one set of checks for both."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

from mirrormask import checks, files
from mirrormask.train import named, plain_yaml, schema
from mirrormask.train.arguments import plain, spelled
from mirrormask.train.recipe import Data, Method, Model, Optimizer, Recipe, Schedule, Teacher

__all__ = ["SECTIONS", "add_recipe_arguments", "dump", "expand", "from_dict", "load", "to_dict"]

#: The parts of a recipe that have a name of their own: ``model: resnet20`` stands for ``model: {name: resnet20}``.
SECTIONS = {
    "data": Data,
    "model": Model,
    "method": Method,
    "optimizer": Optimizer,
    "schedule": Schedule,
    "teacher": Teacher,
}


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain dictionaries, lists, strings and numbers."""
    return dataclasses.asdict(recipe)


def dump(recipe: Recipe) -> str:
    """The recipe as YAML text; :func:`load` gives the same recipe back."""
    yaml = checks.require("yaml", "train", "writing a recipe")
    dumper = getattr(yaml, "CSafeDumper", yaml.SafeDumper)
    return str(yaml.dump(to_dict(recipe), Dumper=dumper, sort_keys=False))


def save(recipe: Recipe, path: Path) -> None:
    """Write the recipe to ``path`` as YAML, atomically."""
    files.write_text(path, dump(recipe))


def load(path: str | Path, overrides: Mapping[str, Any] | None = None, *, allow_code: bool = False) -> Recipe:
    """Read a recipe from a YAML file.

    Args:
        path: the file.
        overrides: values that replace the file's, by dotted key: ``{"sparsity": 0.9, "data.root": "/data"}``.
        allow_code: take a model or data that is code (``FILE.py:NAME``) from the file; from ``overrides`` it always is.

    Raises:
        ValueError: the file is not a YAML mapping, or a key or value is not allowed; names the file and the key.
    """
    arguments = [f"--{key}={_scalar(value)}" for key, value in (overrides or {}).items()]
    recipe = parse(read(path), arguments)
    named.check_allowed([recipe.model.name, recipe.data.name], typed=arguments, allow_code=allow_code)
    return recipe


def read(path: str | Path) -> dict[str, Any]:
    """The tree in a YAML file, its keys checked and shorthands expanded."""
    tree = read_tree(path)
    try:
        return expand(tree)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def read_tree(path: str | Path) -> dict[str, Any]:
    """The tree in a YAML file, as it is."""
    try:
        if not Path(path).is_file() and Path(path).exists():  # a pipe could block for ever
            raise OSError(0, "it is not a file")
        if Path(path).stat().st_size > 4 * plain_yaml.MAX_CHARACTERS:
            raise OSError(0, f"it has {Path(path).stat().st_size:,} bytes; a recipe is a page of text")
        text = Path(path).read_text("utf-8")
    except OSError as error:
        raise ValueError(f"cannot read the recipe {str(path)!r}: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"the recipe {str(path)!r} is not YAML: {error}") from error
    tree = plain_yaml.load(text, f"the recipe {str(path)!r}")
    if not isinstance(tree, dict):
        raise ValueError(f"the recipe {str(path)!r} holds a {type(tree).__name__}, not a mapping of keys to values")
    return tree


def expand(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Check every key of a recipe's tree, and write ``model: resnet20`` as ``model: {name: resnet20}``."""
    known = {field.name for field in dataclasses.fields(Recipe)}
    result: dict[str, Any] = {}
    for key, value in tree.items():
        checks.check_known("recipe key", _text(key, "recipe key"), known)
        section = SECTIONS.get(key)
        if section is not None:
            value = {"name": value} if isinstance(value, str) else value
            if not isinstance(value, dict):
                raise TypeError(f"recipe key {key!r} is a {type(value).__name__}, not a name or a mapping")
            names = [field.name for field in dataclasses.fields(section)]
            for name in value:
                checks.check_known(f"key of recipe section {key!r}:", _text(name, "key"), names)
        result[key] = value
    return result


def _text(key: Any, what: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"{what} {key!r} is a {type(key).__name__}, not a name")
    return key


def from_dict(tree: Mapping[str, Any]) -> Recipe:
    """Build a recipe from its tree; missing keys take their defaults.

    Raises:
        TypeError, ValueError: a key is unknown, or a value is not of its kind or outside its range.
    """
    parts: dict[str, Any] = {}
    for key, value in expand(tree).items():
        if key in SECTIONS:
            _check_kinds(SECTIONS[key], value, f"{key}.")
            parts[key] = SECTIONS[key](**value)
        else:
            _check_kinds(Recipe, {key: value})
            parts[key] = value
    return Recipe(**parts)


def _check_kinds(owner: type, values: Mapping[str, Any], prefix: str = "") -> None:
    """Refuse a value that is not of its field's kind, before anything is done with it."""
    kinds = _kinds(owner)
    for name, value in values.items():
        try:
            schema.convert(value, kinds[name])
        except (ValueError, RecursionError) as error:
            raise TypeError(f"recipe key {prefix + name!r}: {error}") from error


@functools.cache
def _kinds(owner: type) -> dict[str, Any]:
    return get_type_hints(owner)


def add_recipe_arguments(parser: Any, *, skip: Sequence[str] = ()) -> None:
    """Give a jsonargparse parser an option for every field of a recipe, but those to ``skip``."""
    parser.add_class_arguments(Recipe, None, as_group=False, skip=set(skip))
    # These follow from other fields; the parser would otherwise fix them to what they are in a default recipe.
    parser.set_defaults({"optimizer.lr": None, "optimizer.momentum": None, "out": ""})
    parser.add_argument("--recipe", action="config", help="a YAML file with a recipe")
    for action in parser._actions:
        if "--" + action.dest in action.option_strings and action.dest in SECTIONS:
            action.help, action.metavar = f"short for --{action.dest}.name", "NAME"
        elif isinstance(action.help, str):
            action.help = plain(action.help)


def parse(tree: Mapping[str, Any], arguments: Sequence[str] = ()) -> Recipe:
    """A recipe from a tree, with command-line arguments over it.

    Raises:
        ValueError: an option is unknown or its value has the wrong type.
    """
    jsonargparse = checks.require("jsonargparse", "train", "reading a recipe")
    parser = jsonargparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    add_recipe_arguments(parser)
    return from_namespace(parse_arguments(parser, tree, arguments))


def parse_arguments(parser: Any, tree: Mapping[str, Any], arguments: Sequence[str]) -> dict[str, Any]:
    """Run a parser that has :func:`add_recipe_arguments` on a tree and arguments; its errors become ValueErrors."""
    yaml = checks.require("yaml", "train", "reading a recipe")
    import argparse

    # From a file they have been checked; a text within an argument may hide as much.
    plain_yaml.check_strings([argument.partition("=")[2] or argument for argument in arguments], "an option")
    given = ["--recipe", yaml.safe_dump(dict(tree))] if tree else []
    try:
        return dict(parser.parse_args([*given, *spelled(arguments, parser._option_string_actions)]).as_dict())
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error


def from_namespace(values: Mapping[str, Any]) -> Recipe:
    """The recipe among parsed options; options that are not a recipe's are passed over."""
    names = {field.name for field in dataclasses.fields(Recipe)}
    return from_dict({key: value for key, value in values.items() if key in names})


def _scalar(value: Any) -> str:
    yaml = checks.require("yaml", "train", "reading a recipe")
    text = str(yaml.safe_dump(value, default_flow_style=True))
    return text.removesuffix("\n").removesuffix("...").strip()
