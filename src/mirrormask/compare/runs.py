"""Runs on a disk: found below folders, read, and each thing that is not one named with its reason."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrormask.train import recipe_file, schema
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunFolder, RunResult

__all__ = ["Runs", "Skipped", "by_setting", "held_out_accuracy", "labels", "load_runs", "measured", "setting"]

#: What a comparison and a report leave beside runs; anything else that lies there is named as foreign.
OWN = ("comparison.json", "comparison.csv", "comparison.md", "report.html", "last")
#: What a cell of a comparison holds after its training failed.
ERROR = "error.txt"


@dataclass(frozen=True)
class Skipped:
    """Something in a folder of runs that is not a finished run, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Runs:
    """The finished runs below some folders, in the order of their paths, and what was passed over."""

    results: tuple[RunResult, ...]
    skipped: tuple[Skipped, ...]


def load_runs(folders: Sequence[str | Path]) -> Runs:
    """Every finished run at or below these folders, ``.dense/`` and linked folders included.

    Nothing that lies there can make this fail: what is damaged, unfinished or foreign is skipped and named. A run that
    is met twice, by a link or as a copy with the same recipe, is counted once.

    Args:
        folders: run folders, or folders that hold some at any depth.

    Example:
        >>> load_runs(["nowhere"]).skipped
        (Skipped(path='nowhere', reason='does not exist'),)
    """
    search = _Search()
    for folder in folders:
        search.enter(Path(folder))
    while search.links:
        search.enter(search.links.pop(0))
    return Runs(tuple(search.results), tuple(search.skipped))


def measured(result: RunResult) -> dict[str, Any] | None:
    """What ``mirrormask bench`` measured of a run, as its ``bench.json`` holds it; None where it did not, or damaged.

    ``measured(result)["seconds"]["mirrormask"]`` is the median time of a call in seconds; ``threads``, ``shape`` (of
    the batch) and ``processor`` say under what conditions.
    """
    try:
        bench = schema.read(Path(result.folder) / "bench.json", schema.Bench)
        seconds = bench.seconds["mirrormask"]
    except (OSError, ValueError, KeyError):
        return None
    good = _is_number(seconds) and seconds > 0
    return {key: value for key, value in schema.plain(bench).items() if value is not None} if good else None


def held_out_accuracy(result: RunResult) -> float:
    """The accuracy that a comparison is about: on the validation split where the recipe has one, else the test's."""
    return result.test_accuracy if result.validation_accuracy is None else result.validation_accuracy


def setting(recipe: Recipe) -> str:
    """What runs must share to be compared, as a string: all of the recipe but method, sparsity, seed and threads."""
    tree = recipe.identity()
    # The number of threads changes the order of sums and nothing else; a cluster's may differ.
    for name in ("method", "sparsity", "seed", "threads"):
        del tree[name]
    return json.dumps(tree, sort_keys=True, default=str)


def by_setting(results: Iterable[RunResult]) -> dict[str, list[RunResult]]:
    """Results that may be compared with each other, under their :func:`setting`; the largest group first."""
    groups: dict[str, list[RunResult]] = {}
    for result in results:
        groups.setdefault(setting(recipe_file.from_dict(result.recipe)), []).append(result)
    return dict(sorted(groups.items(), key=lambda item: -len(item[1])))


def labels(results: Sequence[RunResult], known: Mapping[str, tuple[str, Mapping[str, Any]]] | None = None) -> list[str]:
    """A name for the method of each result: its own, with the options that tell it from others of the same name.

    Args:
        results: of one comparison.
        known: label -> (method, options), for labels that a comparison was given; an option ``lr`` stands for the
            optimizer's.
    """
    given = {_key(name, options): label for label, (name, options) in (known or {}).items()}
    methods = [result.recipe["method"] for result in results]
    variants: dict[str, list[Mapping[str, Any]]] = {}
    for method in methods:
        seen = variants.setdefault(method["name"], [])
        if method["options"] not in seen:
            seen.append(method["options"])
    taken = set(given.values())
    result = []
    for run, method in zip(results, methods, strict=True):
        name, options = method["name"], method["options"]
        rate = {"lr": run.recipe.get("optimizer", {}).get("lr")}
        label = given.get(_key(name, {**options, **rate}), given.get(_key(name, options)))
        if label is None:
            varied = [key for key in options if any(o.get(key, ...) != options[key] for o in variants[name])]
            plain = len(variants[name]) == 1 and name not in taken
            label = name if plain else " ".join([name, *(f"{key}={options[key]}" for key in varied or options)])
        result.append(label)
    return result


def _key(name: str, options: Mapping[str, Any]) -> str:
    return json.dumps([name, dict(options)], sort_keys=True, default=str)


class _Search:
    """The walk: folders whose real path was seen are not entered again, links come after everything else."""

    def __init__(self) -> None:
        self.results: list[RunResult] = []
        self.skipped: list[Skipped] = []
        self.links: list[Path] = []
        self.entered: set[str] = set()
        self.fingerprints: dict[str, str] = {}

    def enter(self, path: Path) -> None:
        """A path that was given, or a link."""
        if not path.exists():
            self.skip(path, "a link to nothing" if path.is_symlink() else "does not exist")
        elif not path.is_dir():
            self.skip(path, "a file, not a folder")
        elif not self.walk(path):
            self.skip(path, "no run in it")

    def walk(self, path: Path, *, within_run: bool = False) -> bool:
        """Take every run at or below ``path``; whether there was any, be it a bad one."""
        real = os.path.realpath(path)
        if real in self.entered:
            return True
        self.entered.add(real)
        try:
            entries = sorted(path.iterdir())
        except OSError as error:
            self.skip(path, f"cannot be read: {error.strerror}")
            return True
        names = {entry.name for entry in entries}
        is_run = self.take(path, names)
        found, foreign = is_run, []
        for entry in entries:
            if entry.is_symlink() and entry.is_dir():
                self.links.append(entry)
                found = True
            elif entry.is_dir():
                if not (is_run and entry.name in RunFolder.NAMES):
                    inside = self.walk(entry, within_run=is_run or within_run)
                    found = found or inside
                    foreign += [] if inside else [entry]
            else:
                foreign.append(entry)
        if found and not is_run and not within_run:
            # Beside runs, each foreign thing is named; a folder without any is named as one by its parent.
            for entry in foreign:
                if entry.name not in OWN and not entry.name.startswith("."):
                    self.skip(entry, "not a run")
        return found

    def take(self, path: Path, names: set[str]) -> bool:
        """Read the run in this folder if it is one, or has been meant to be one."""
        if "result.json" not in names:
            if ERROR in names and names & {"recipe.yaml", ".lock"}:
                self.skip(path, f"failed: {_first_line(path / ERROR)}")
            elif names & {"checkpoints", "checkpoint.pt", "recipe.yaml", "log.jsonl"}:
                self.skip(path, "unfinished: it has no result.json")
            else:
                return False
            return True
        try:
            result = RunResult.read(path)
            problems = list(_problems(result))
            recipe = recipe_file.from_dict(result.recipe)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            self.skip(path, f"damaged: {error}")
            return True
        if problems:
            self.skip(path, f"damaged: result.json has {'; '.join(problems)}")
            return True
        first = self.fingerprints.setdefault(recipe.fingerprint(), str(path))
        if first == str(path):
            self.results.append(result)
        else:
            self.skip(path, f"the same run as {first}")
        return True

    def skip(self, path: Path, reason: str) -> None:
        self.skipped.append(Skipped(str(path), reason))


def _problems(result: RunResult) -> Iterator[str]:
    """What in a result is not what a training writes: JSON carries any type, and files are edited."""
    right: dict[str, Callable[[Any], bool]] = {
        "str": lambda value: isinstance(value, str),
        "int": lambda value: _is_number(value) and value == int(value) and value >= 0,
        "float": _is_number,
        "float | None": lambda value: value is None or _is_number(value),
        "dict[str, Any]": lambda value: isinstance(value, dict),
    }
    for field in dataclasses.fields(result):
        value, kind = getattr(result, field.name), str(field.type)
        good = right[kind](value) if kind in right else True
        if good and field.name.endswith("accuracy") and value is not None:
            good = 0 <= value <= 1
        if not good:
            yield f"{field.name}={value!r}"
        elif field.name == "numel" and not (_is_number(result.nonzeros) and 0 < result.nonzeros <= value):
            yield f"nonzeros={result.nonzeros!r} of {value!r}"
    for layer in result.layers:
        if not (isinstance(layer.name, str) and _is_number(layer.numel) and _is_number(layer.nonzeros)):
            yield f"layer {layer!r}"


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _first_line(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace").strip().partition("\n")[0] or "no error is given"
    except OSError:
        return "its error cannot be read"
