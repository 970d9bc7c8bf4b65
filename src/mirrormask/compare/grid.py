"""The grid of a comparison: methods, sparsities and seeds around one recipe, checked before anything trains."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrormask import checks
from mirrormask.compare.statistics import DENSE
from mirrormask.train.recipe import Method, Recipe
from mirrormask.train.run_folder import RunFolder

__all__ = ["Cell", "Grid", "check_cells", "describe", "method_of"]

#: A label: a method's name, and after a slash or a space what tells it from its other rows in the table.
LABEL = re.compile(r"[\w.-]+([/ ][\w.,:=+\-/ \[\]()]*)?")
#: Longer names of folders are cut, with a hash of the whole.
NAME_LENGTH = 120


@dataclass(frozen=True)
class Cell:
    """One training run of a comparison: the label of its row, and its recipe, whose ``out`` is its folder."""

    label: str
    recipe: Recipe

    @property
    def name(self) -> str:
        """For people: ``mirror 95% seed 0``."""
        level = "" if self.recipe.method.name == DENSE else f" {100 * self.recipe.sparsity:g}%"
        return f"{self.label}{level} seed {self.recipe.seed}"


@dataclass(frozen=True)
class Grid:
    """Every method at every sparsity with every seed; the dense method once a seed.

    Args:
        base: what all runs share; its method, sparsity and seed are not read, and its ``out`` is the folder in which
            the cells' folders lie.
        methods: label -> options of the method. A label is the method's name, or ``NAME/VARIANT``. The option ``lr`` is
            not the method's: it replaces the optimizer's learning rate for this label.
        sparsities: of each method but the dense one.
        seeds: label -> its seeds; the key ``""`` for all others.

    Raises:
        ValueError: nothing to train, a sparsity or a seed twice, an unknown method, two labels for the same run.
        TypeError: an option that its method does not take.

    Example:
        >>> grid = Grid(Recipe(out="runs/a"), {"dense": {}, "gmp": {"end_at": 0.5}}, (0.9, 0.95), {"": (0,)})
        >>> [cell.recipe.out for cell in grid.cells()]
        ['runs/a/dense-0-0', 'runs/a/gmp-end_at=0.5-0.9-0', 'runs/a/gmp-end_at=0.5-0.95-0']
    """

    base: Recipe
    methods: Mapping[str, Mapping[str, Any]]
    sparsities: tuple[float, ...]
    seeds: Mapping[str, tuple[int, ...]]

    def __post_init__(self) -> None:
        if not self.methods:
            raise ValueError("the grid is empty: name at least one method, for instance --methods dense,gmp,mirror")
        for label in self.methods:
            if not LABEL.fullmatch(label):
                raise ValueError(f"the label {label!r} is not the name of a method, or NAME/VARIANT")
        if not self.sparsities and any(method_of(label) != DENSE for label in self.methods):
            raise ValueError("the grid is empty: give at least one sparsity, for instance --sparsity 0.9,0.95")
        _refuse_doubles("sparsity", self.sparsities)
        for label, seeds in self.seeds.items():
            if label:
                checks.check_known("method in seeds:", label, self.methods)
            if not seeds:
                raise ValueError(f"the grid is empty: no seeds{f' for {label!r}' if label else ''}; write --seeds 3")
            _refuse_doubles("seed", seeds)
        check_cells(self.cells())

    def cells(self) -> tuple[Cell, ...]:
        """All cells, seed after seed, so that what is done early is a whole comparison with fewer seeds."""
        seeds = {label: self.seeds.get(label, self.seeds.get("", ())) for label in self.methods}
        cells = []
        for seed in dict.fromkeys(seed for group in seeds.values() for seed in group):
            for i, sparsity in enumerate(self.sparsities or (0.0,)):
                for label in self.methods:
                    # The dense method is the same at every sparsity.
                    if seed in seeds[label] and (i == 0 or method_of(label) != DENSE):
                        cells.append(self.cell(label, sparsity, seed))
        return tuple(cells)

    def cell(self, label: str, sparsity: float, seed: int) -> Cell:
        """One cell, with its recipe."""
        options = dict(self.methods[label])
        optimizer = dataclasses.replace(self.base.optimizer, lr=options.pop("lr", self.base.optimizer.lr))
        method = Method(method_of(label), options)
        level = 0.0 if method.name == DENSE else sparsity
        name = _folder_name(f"{describe(label.partition(' ')[0], self.methods[label])}-{level:g}-{seed}")
        out = str(Path(self.base.out) / name)
        recipe = dataclasses.replace(self.base, method=method, optimizer=optimizer, sparsity=level, seed=seed, out=out)
        return Cell(label, recipe)

    @property
    def known(self) -> dict[str, tuple[str, Mapping[str, Any]]]:
        """Label -> method and options, as :func:`mirrormask.compare.labels` takes them."""
        return {label: (method_of(label), options) for label, options in self.methods.items()}


def method_of(label: str) -> str:
    """The method of a label: what is before the first slash or space.

    Example:
        >>> method_of("pilot/literal"), method_of("gmp end_at=0.5")
        ('pilot', 'gmp')
    """
    return re.split("[/ ]", label, maxsplit=1)[0]


def describe(label: str, options: Mapping[str, Any]) -> str:
    """A label and what differs from its method's defaults.

    Example:
        >>> describe("gmp", {"end_at": 0.5})
        'gmp end_at=0.5'
    """
    return " ".join([label, *(f"{key}={value}" for key, value in options.items())])


def check_cells(cells: Sequence[Cell]) -> None:
    """Refuse what can be seen without reading data: unknown methods and options, the same run in two cells.

    Raises:
        TypeError, ValueError: naming the cells.
    """
    from mirrormask.train.session import make_method

    if not cells:
        raise ValueError("the grid is empty: there is no cell to train")
    seen: dict[str, Cell] = {}
    for cell in cells:
        try:
            make_method(cell.recipe)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{cell.name}: {error}") from error
        for key in (cell.recipe.fingerprint(), cell.recipe.out):
            other = seen.setdefault(key, cell)
            if other is not cell:
                raise ValueError(f"{other.name!r} and {cell.name!r} are the same run; leave one out")


def check_folders(cells: Iterable[Cell]) -> None:
    """Refuse folders that hold other runs than these cells'.

    Raises:
        ValueError: naming what differs.
    """
    for cell in cells:
        RunFolder(cell.recipe.out).check(cell.recipe, resume=True, overwrite=False)


def _refuse_doubles(kind: str, values: Sequence[float]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ValueError(f"the {kind} {value:g} is given twice; name each once")


def _folder_name(name: str) -> str:
    name = re.sub(r"[ /]", "-", name)
    if len(name.encode()) <= NAME_LENGTH:
        return name
    return f"{name[: NAME_LENGTH // 2]}-{hashlib.sha256(name.encode()).hexdigest()[:12]}"
