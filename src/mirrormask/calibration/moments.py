"""The inputs of a model's layers: in which order they come, whether they can be used, and their second moments."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.calibration.batches import Forward, check_devices, feed, looks
from mirrormask.calibration.layers import Layer, agrees
from mirrormask.checks import few

__all__ = ["Moment", "Stage", "moment_of", "survey"]


@dataclass(frozen=True)
class Moment:
    """``H = X Xᵀ``, summed over all places of all batches.

    Attributes:
        matrix: H, of shape ``(groups, inputs, inputs)``, float32 or, for float64 weights, float64.
        places: how many columns X has: tokens, or pixels of the layer's output.
    """

    matrix: Tensor
    places: int

    @property
    def norms(self) -> Tensor:
        """The L2 norm of each input over all places, ``(groups, inputs)``."""
        return self.matrix.diagonal(dim1=1, dim2=2).clamp_min(0.0).sqrt()


@dataclass(frozen=True)
class Stage:
    """Layers that are given the very same inputs, as queries, keys and values are, and so have one second moment.

    Attributes:
        layers: one or more.
        calls: how often the first of them is called in each batch.
    """

    layers: tuple[Layer, ...]
    calls: tuple[int, ...]


@dataclass(frozen=True)
class _Given:
    """The last input that a layer was given, and the first of the layers in a row that were given it."""

    x: Tensor | None = None
    version: int = 0
    head: str = ""


class _Refused(ValueError):
    """An error of ours that passes through the model's forward pass; what the model itself raises is explained."""


class _Enough(BaseException):
    """Ends a forward pass whose rest nobody needs; no ``except Exception`` of a model shall catch it."""


def survey(
    model: nn.Module,
    layers: Sequence[Layer],
    batches: Sequence[Any],
    forward: Forward | None = None,
    *,
    some: bool = False,
) -> list[Stage]:
    """Run all batches once and say in which order the layers come.

    Args:
        model: in evaluation mode.
        layers: the layers in question.
        batches: of inputs, as :func:`feed` takes them.
        forward: as in :func:`feed`.
        some: leave out layers that no batch reaches, unless that is so of all, and those that do not compute what
            their kind computes.

    Raises:
        ValueError: the model does not take a batch, a layer is reached by none, or does not compute what its kind
            computes, or an input of one is not finite.
    """
    if forward is None:
        check_devices(model, batches)
    order: dict[str, int] = {}
    reached: set[str] = set()
    looked: set[nn.Module] = set()  # at what they put out
    others: set[str] = set()  # that compute something else
    calls = {layer.name: [0] * len(batches) for layer in layers}
    heads: dict[str, set[str]] = {layer.name: set() for layer in layers}  # the first of those in a row with its input
    number, before = 0, _Given()

    def enter(layer: Layer, module: nn.Module, x: Tensor) -> None:
        nonlocal before
        if not bool(x.isfinite().all()):
            raise _Refused(
                f"the input of {layer.name!r} in batch {number} is not finite; the model or the batch holds NaN or "
                "inf, or its dtype is too small for them"
            )
        if layer.name not in order:
            order[layer.name] = len(order)
        if x.numel():  # not so for an expert to which no token was sent
            reached.add(layer.name)
        calls[layer.name][number] += 1
        version = 0 if x.is_inference() else x._version
        conv = isinstance(module, nn.modules.conv._ConvNd)  # each has windows of its own
        if conv or before.x is not x or before.version != version:
            before = _Given(None if conv else x, version, layer.name)
        heads[layer.name].add(before.head)

    def leave(layer: Layer, module: nn.Module, x: Tensor, y: Any) -> None:
        if number and module in looked:
            return
        if x.numel():
            looked.add(module)
        if not agrees(layer, module, x, y):
            if some:
                others.add(layer.name)
                return
            raise _Refused(
                f"{layer.name!r} is of a {type(module).__name__}, whose output is not its weight times its inputs as a "
                f"{_kind(module)}'s is; leave it out with weights="
            )

    with _watched(layers, enter, leave):
        for number, batch in enumerate(batches):  # the hooks read the number
            before = _Given()
            try:
                feed(model, batch, forward)
            except _Refused:
                raise
            except Exception as error:
                raise ValueError(
                    f"the model does not take batch {number}, {looks(batch)}: {type(error).__name__}: {error}; give it "
                    "what the model takes, or say how with forward=lambda model, batch: ..."
                ) from error
    missing = [layer for layer in layers if layer.name not in reached]
    if some and len(missing) < len(layers):
        layers, missing = [layer for layer in layers if layer.name in reached - others], []
    if missing:
        parts = {id(m.out_proj) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
        attention = any(id(module) in parts for layer in missing for module in layer.modules)
        why = "; nn.MultiheadAttention uses out_proj without calling it" if attention else ""
        raise ValueError(
            f"no batch reaches {few([layer.name for layer in missing])}{why}; give batches that do"
            + ("" if some else f", or leave {'it' if len(missing) == 1 else 'them'} out with weights=")
        )
    stages: list[Stage] = []
    for layer in sorted(layers, key=lambda layer: order[layer.name]):
        of_layer, last = tuple(calls[layer.name]), stages[-1] if stages else None
        if last and heads[layer.name] == {last.layers[0].name} and of_layer == last.calls and max(of_layer) == 1:
            stages[-1] = Stage((*last.layers, layer), of_layer)
        else:
            stages.append(Stage((layer,), of_layer))
    return stages


def moment_of(model: nn.Module, stage: Stage, batches: Sequence[Any], forward: Forward | None = None) -> Moment:
    """The second moment of a stage's inputs, as the model is now; it runs no further than there.

    Raises:
        ValueError: an input is not finite, or none comes.
    """
    layer = stage.layers[0]
    weight = layer.weight
    groups, _, inputs = layer.matrix().shape
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total, places, left = torch.zeros(groups, inputs, inputs, dtype=dtype, device=weight.device), 0, 0

    def enter(layer: Layer, module: nn.Module, x: Tensor) -> None:
        nonlocal places, left
        for part in layer.columns(x):
            part = part.to(device=total.device, dtype=dtype)
            total.baddbmm_(part.transpose(1, 2), part)
            places += part.shape[1]
        left -= 1
        if left <= 0:
            raise _Enough

    with _watched([layer], enter, None):
        for batch, left in zip(batches, stage.calls, strict=True):  # the hooks count down
            if left:
                with suppress(_Enough):
                    feed(model, batch, forward)
    if not places:
        raise ValueError(
            f"no example reaches {layer.name!r} any more, since the layers before it are pruned; give more batches, "
            "leave it out with weights=, lower the sparsity, or use a method that changes less"
        )
    if not bool(total.isfinite().all()):
        raise ValueError(
            f"the inputs of {layer.name!r} are not finite, or too large to be squared; the layers before it are pruned "
            "by now: lower the sparsity, or use a method that changes less"
        )
    return Moment(total, places)


@contextmanager
def _watched(
    layers: Sequence[Layer],
    enter: Callable[[Layer, nn.Module, Tensor], None],
    leave: Callable[[Layer, nn.Module, Tensor, Any], None] | None,
) -> Iterator[None]:
    """Hooks on the layers' modules, and none afterwards."""
    handles = []
    for layer in layers:

        def before(module: nn.Module, args: Any, kwargs: Any, *, layer: Layer = layer) -> None:
            enter(layer, module, _input(args, kwargs))

        def after(module: nn.Module, args: Any, kwargs: Any, output: Any, *, layer: Layer = layer) -> None:
            if leave is not None:
                leave(layer, module, _input(args, kwargs), output)

        for module in layer.modules:
            handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
            # Before the user's own hooks: those may change an output, and what they make is not the layer's.
            handles.append(module.register_forward_hook(after, prepend=True, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input(args: Any, kwargs: Any) -> Tensor:
    found: Tensor = args[0] if args else next(iter(kwargs.values()))
    return found


def _kind(module: nn.Module) -> str:
    names = [kind.__name__ for kind in type(module).__mro__]
    return next(name for name in names if name in ("Linear", "Conv1d", "Conv2d", "Conv3d", "Conv1D"))
