"""The network of a finished run, and the one that a recipe names as its teacher."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.checks import callers_level
from mirrormask.distillation import logits
from mirrormask.train import init, models, named, recipe_file
from mirrormask.train.recipe import Recipe
from mirrormask.train.run_folder import RunResult

__all__ = ["OnPixels", "load_model", "load_teacher"]


class OnPixels(nn.Module):
    """A network behind the normalisation of its training: ``model((pixels - mean) / std)``.

    Args:
        model: from normalised images.
        mean, std: a number for each channel, ``std`` positive.

    Shape:
        pixels: (batch, channels, height, width), float; the values of the images' files, 0 to 255 for 8 bits.

    Example:
        >>> OnPixels(nn.Identity(), [2.0], [4.0])(torch.full((1, 1, 1, 1), 10.0)).item()
        2.0
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.model = model
        scale = 1.0 / torch.tensor(std).view(-1, 1, 1)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", -torch.tensor(mean).view(-1, 1, 1) * scale)
        self.train(model.training)

    def forward(self, pixels: Tensor) -> Any:
        """What the network says of the images."""
        return self.model(pixels * self.scale + self.shift)


def load_model(folder: str | Path, *, allow_code: bool = False, pixels: bool = False) -> nn.Module:
    """The final model of a finished run, in evaluation mode.

    Args:
        folder: the run's folder; ``RunResult.read(folder).input_shape`` is what the model takes, and ``class_names``
            what its outputs stand for.
        allow_code: import what makes the model where that is code of the user's (``FILE.py:NAME``).
        pixels: put the normalisation of the training in front (:class:`OnPixels`): the model takes the values of the
            images as they are. Without, it takes ``(pixels - pixel_mean) / pixel_std``.

    Raises:
        ValueError: the folder holds no finished run, its model is made by code that is not allowed, or its
            normalisation was not kept.
    """
    result = RunResult.read(folder)
    recipe = recipe_file.from_dict(result.recipe)
    named.check_allowed([recipe.model.name], allow_code=allow_code)
    with torch.random.fork_rng():
        model = models.build(recipe.model.name, result.input_shape, result.classes, **recipe.model.options)
    model = mm.load(Path(folder) / "model.safetensors", model).eval()
    if not pixels:
        return model
    if not result.pixel_mean:
        raise ValueError(
            f"{str(folder)!r} does not say how its images were normalised: an older version trained it; leave out "
            "pixels, and normalise them with the mean and deviation of your training images"
        )
    return OnPixels(model, result.pixel_mean, result.pixel_std)


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
