"""The networks that recipes name."""

from __future__ import annotations

import copy
import difflib
import inspect
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from mirrormask import checks
from mirrormask.buffers import kept_buffers
from mirrormask.train import named
from mirrormask.train.resnet import resnet20
from mirrormask.train.resnet7 import resnet7

__all__ = ["build", "names"]


def mlp(shape: tuple[int, ...], classes: int, *, hidden: Sequence[int] = (256, 128)) -> nn.Module:
    """A multilayer perceptron with ReLU between its layers; ``hidden`` holds the widths in between."""
    widths = [_numel(shape), *(checks.check_int("hidden", width, low=1) for width in hidden), classes]
    layers: list[nn.Module] = [nn.Flatten()]
    for i, (n_in, n_out) in enumerate(pairwise(widths)):
        layers += [nn.ReLU()] if i else []
        layers.append(nn.Linear(n_in, n_out))
    return nn.Sequential(*layers)


def lenet_300_100(shape: tuple[int, ...], classes: int) -> nn.Module:
    """LeNet-300-100 (LeCun et al., 1998): hidden layers of 300 and 100 units, with ReLU."""
    return mlp(shape, classes, hidden=(300, 100))


def resnet18_cifar(shape: tuple[int, ...], classes: int) -> nn.Module:
    """torchvision's ResNet-18 with the stem that small images need: a 3x3 convolution and no pooling."""
    model = _torchvision("resnet18", classes)
    model.conv1 = nn.Conv2d(shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet-300-100": lenet_300_100,
    "mlp": mlp,
    "resnet18-cifar": resnet18_cifar,
    "resnet20": resnet20,
    "resnet7": resnet7,
}


#: What a name may be beside those of :data:`MODELS`.
OTHERS = ("torchvision:NAME", "timm:NAME", "FILE.py:NAME", "PACKAGE.MODULE:NAME")


def names() -> list[str]:
    """The known models; ``torchvision:NAME`` stands for every classification model of torchvision, and so on."""
    return [*sorted(MODELS), *OTHERS]


def build(name: str, shape: tuple[int, ...], classes: int, **options: Any) -> nn.Module:
    """Make a network for images of ``shape`` (channels, height, width) and ``classes`` classes.

    Its first weights are drawn from torch's global generator.

    Args:
        name: one of :func:`names`. A function of one's own is given what it takes of ``shape``, ``classes`` (or
            ``num_classes``) and the options; a module of one's own is copied.
        shape: of one image.
        classes: number of outputs.
        options: keyword arguments of the model.

    Returns:
        A module from (batch, \\*shape) to (batch, classes), tried on a batch of zeros.

    Raises:
        TypeError: an option that the model does not take.
        ValueError: an unknown name (the known ones are listed), or images that do not fit the model.

    Example:
        >>> build("mlp", (1, 8, 8), 10, hidden=[16])(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 10])
    """
    if name.startswith("torchvision:"):
        model = _torchvision(name.removeprefix("torchvision:"), classes, **options)
    elif name.startswith("timm:"):
        model = _timm(name.removeprefix("timm:"), shape, classes, **options)
    elif named.is_code(name):
        model = _own(name, shape, classes, **options)
    else:
        make = MODELS[checks.check_known("model", name, [*MODELS, *OTHERS])]
        checks.check_options("model", name, make, options)
        model = make(shape, classes, **options)
    _try(name, model, shape, classes)
    return model


def _torchvision(name: str, classes: int, **options: Any) -> nn.Module:
    models = checks.require("torchvision.models", "train", f"the model {name!r}")
    known = [n for n in models.list_models() if "." not in n and "_rcnn" not in n and "raft" not in n]
    checks.check_known("torchvision model", name, known)
    try:
        model: nn.Module = models.get_model(name, num_classes=classes, **options)
    except TypeError as error:
        raise TypeError(
            f"torchvision:{name} does not take these options: {options}; torchvision says: {error}"
        ) from error
    return model


def _timm(name: str, shape: tuple[int, ...], classes: int, **options: Any) -> nn.Module:
    timm = checks.require("timm", "timm", f"the model 'timm:{name}'")
    if not timm.is_model(name):
        known = timm.list_models()
        close = [one for one in known if one.startswith(name)][:3] or difflib.get_close_matches(name, known, n=3)
        guess = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() has their names"
        raise ValueError(f"unknown timm model {name!r}; {guess}")
    try:
        model: nn.Module = timm.create_model(name, num_classes=classes, in_chans=shape[0], **options)
    except TypeError as error:
        raise TypeError(f"timm:{name} does not take these options: {options}; timm says: {error}") from error
    return model


def _own(name: str, shape: tuple[int, ...], classes: int, **options: Any) -> nn.Module:
    """A network of the user's: a module, or what makes one."""
    found = named.fetch(name)
    if isinstance(found, nn.Module):
        if options:
            raise TypeError(f"{name!r} is a module, which takes no options; leave out {', '.join(options)}")
        return copy.deepcopy(found)
    if not callable(found):
        raise TypeError(f"{name!r} is a {type(found).__name__}, neither a module nor a function that returns one")
    taken = inspect.signature(found).parameters
    known = {"shape": shape, "classes": classes, "num_classes": classes}
    given = {**{key: value for key, value in known.items() if key in taken}, **options}
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
        for option in options:
            if option not in taken:
                raise TypeError(f"{name!r} does not take the option {option!r}; it takes: {', '.join(taken) or 'none'}")
    model = found(**given)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name!r} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


@torch.no_grad()
def _try(name: str, model: nn.Module, shape: tuple[int, ...], classes: int) -> None:
    """A batch of zeros through the model in each mode, so that a misfit shows before anything is written.

    Some networks return other things while they train: the scores of auxiliary heads.
    """
    size = "x".join(map(str, shape))
    for mode, training in (("", False), (" in training", True)):
        model.train(training)
        restore_buffers = kept_buffers(model)
        try:
            # What dropout draws here is no part of a run; what a lazy layer draws at its first call is.
            with torch.random.fork_rng(devices=[], enabled=training):
                out = model(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, AssertionError) as error:
            raise ValueError(
                f"model {name!r} does not take images of {size} (channels x height x width){mode}: {error}; "
                "choose another model, or set data.channels or, for a folder, data.size"
            ) from error
        finally:
            model.train()
            restore_buffers()
        if not isinstance(out, torch.Tensor) or out.shape != (2, classes):
            made = f"a tensor {tuple(out.shape)}" if isinstance(out, torch.Tensor) else f"a {type(out).__name__}"
            raise ValueError(
                f"model {name!r} does not give one score a class for images of {size}: of two it makes {made}{mode}, "
                f"not a tensor (2, {classes}); choose another model or its options, or name a function that wraps it, "
                "as FILE.py:NAME"
            )


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
