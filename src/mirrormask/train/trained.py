"""The network of a finished run, and the one that a recipe names as its teacher."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

import mirrormask as mm
from mirrormask.checks import callers_level
from mirrormask.distillation import logits
from mirrormask.train import init, models, named, recipe_file
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunResult

__all__ = ["load_model", "load_teacher"]


def load_model(folder: str | Path, *, allow_code: bool = False) -> nn.Module:
    """The final model of a finished run, in evaluation mode.

    Args:
        folder: the run's folder; ``RunResult.read(folder).input_shape`` is what the model takes.
        allow_code: import what makes the model where that is code of the user's (``FILE.py:NAME``).

    Raises:
        ValueError: the folder holds no finished run, or its model is made by code that is not allowed.
    """
    result = RunResult.read(folder)
    recipe = recipe_file.from_dict(result.recipe)
    named.check_allowed([recipe.model.name], allow_code=allow_code)
    with torch.random.fork_rng():
        model = models.build(recipe.model.name, result.input_shape, result.classes, **recipe.model.options)
    return mm.load(Path(folder) / "model.safetensors", model).eval()


def load_teacher(recipe: Recipe, shape: tuple[int, ...], classes: int, device: torch.device) -> nn.Module | None:
    """The teacher of a recipe, in evaluation mode and without gradients; None where the recipe names none.

    Args:
        recipe: a run's folder says itself which model it is of; a file is of the recipe's own model.
        shape: of one image.
        classes: how many classes the student tells apart.
        device: where to put it.

    Raises:
        ValueError: there is no such folder or file, it does not fit the model, or its outputs are of another shape
            than (batch, classes) for images of this shape; or what is in the file is no network's weights.

    Warns:
        UserWarning: the run was on other data.
    """
    source = recipe.teacher.name
    if source is None:
        return None
    if Path(source).is_dir():
        result = RunResult.read(Path(source))
        if tuple(result.input_shape) != tuple(shape):
            raise ValueError(
                f"teacher {source!r} takes images of {tuple(result.input_shape)}, this run's are {tuple(shape)}; name "
                "a run on the same data"
            )
        own = recipe_file.from_dict(result.recipe)
        if _place(own.data.name) != _place(recipe.data.name):
            warnings.warn(
                f"teacher {source!r} was trained on {own.data.name!r}, and this run's data is {recipe.data.name!r}: it "
                "teaches nonsense unless both have the same classes in the same order",
                stacklevel=callers_level(),
            )
        teacher = load_model(source, allow_code=own.model.name == recipe.model.name)
    else:
        if not Path(source).is_file():
            raise ValueError(f"teacher {source!r} is neither a run's folder nor a file (here: {Path.cwd()})")
        tensors = init.read(Path(source))
        with torch.random.fork_rng():
            teacher = models.build(recipe.model.name, shape, classes, **recipe.model.options)
        matched = init.match(tensors, teacher.state_dict(), classes=classes, source=source)
        if matched.fresh:
            raise ValueError(
                f"teacher {source!r} has no {', '.join(matched.fresh)} for {classes} classes: its own head would be "
                "random; name a network that was trained on these classes"
            )
        init.check_values(matched.tensors, teacher.state_dict(), source)
        teacher.load_state_dict(matched.tensors, strict=False)
    teacher.to(device).eval().requires_grad_(False)
    with torch.no_grad():
        output = logits(teacher(torch.zeros(2, *shape, device=device)), "teacher")
    if output.shape != (2, classes):
        raise ValueError(
            f"teacher {source!r} gives {tuple(output.shape[1:])} outputs an image, this run has {classes} classes; "
            "name a network that was trained on the same classes"
        )
    return teacher


def _place(data: str) -> str:
    """A name of data as two runs may compare it, whatever folder each was started in."""
    kind, colon, path = data.partition(":")
    return f"{kind}:{Path(path).resolve()}" if colon and kind in ("folder", "datasets") else data
