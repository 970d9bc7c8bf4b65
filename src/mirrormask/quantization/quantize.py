"""mm.quantize: weights of a model rounded to 8 bits, in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mirrormask.calibration import Forward, Layer, Moment, evaluating, held, layers_of, moment_of, survey
from mirrormask.calibration.layers import can_be_seen, check_values
from mirrormask.checks import few
from mirrormask.matrices import check_module
from mirrormask.overlaps import check_memory
from mirrormask.pruning.solver import relative_error
from mirrormask.pruning.undo import all_or_nothing
from mirrormask.quantization.levels import levels, output_axes, per_output, rounded, scales
from mirrormask.quantization.rounding import round_together
from mirrormask.resharding import reshard

__all__ = ["QuantizeReport", "QuantizedLayer", "quantize"]


@dataclass(frozen=True)
class QuantizedLayer:
    """One weight.

    Attributes:
        name: of the weight.
        shape: of the weight.
        nearest: the share of its output's energy, ``‖(W - Ŵ)X‖² / ‖WX‖²``, that the nearest levels would cost; without
            batches that of the weights, ``‖W - Ŵ‖² / ‖W‖²``.
        error: the same of the levels that were taken.
    """

    name: str
    shape: tuple[int, ...]
    nearest: float
    error: float


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`mirrormask.quantize` did; ``str()`` gives a table.

    Attributes:
        layers: the weights that were rounded.
    """

    layers: tuple[QuantizedLayer, ...]

    def __str__(self) -> str:
        width = max([len(layer.name) for layer in self.layers], default=6)
        lines = [f"{'weight':<{width}}  {'nearest':>10}  {'error':>10}"]
        return "\n".join([*lines, *(f"{x.name:<{width}}  {x.nearest:>10.2e}  {x.error:>10.2e}" for x in self.layers)])


def quantize(
    model: nn.Module, batches: Iterable[Any] | None = None, *, forward: Forward | None = None
) -> QuantizeReport:
    """Round each weight to one of 255 levels, in place: ``x = s q`` with a scale ``s`` for each output of a layer.

    Symmetric, ``s = max |x| / 127`` as a bfloat16, ``q`` an integer in [-127, 127]; zeros stay exactly zero. The model
    keeps ordinary float weights, which now take 8 bits in a file (``mm.save(model, path, values="int8")``) without
    being changed once more.

    With ``batches``, layer by layer in the order of the forward pass, levels are chosen so that their errors cancel in
    the layer's output for the inputs that it gets. Layers whose inputs cannot be looked at (recurrent ones, embeddings,
    transposed convolutions, nn.MultiheadAttention, classes with a forward of their own), and those that no batch
    reaches, are rounded to the nearest level, as all are without batches.

    Args:
        model: any module; the matrices of its layers and its embeddings are rounded, vectors are not.
        batches: as for :func:`mirrormask.prune`.
        forward: for other batches, ``forward(model, batch)``.

    Returns:
        A :class:`QuantizeReport`.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: there is nothing to round, a weight is not finite, or sharded; or, as for
            :func:`mirrormask.prune`, what is wrong with the batches. The model is then as it was.

    Example:
        >>> layer = nn.Linear(3, 1, bias=False)
        >>> layer.weight.data = torch.tensor([[1.27, 0.004, -0.5]])
        >>> _ = quantize(layer)
        >>> (layer.weight.data / layer.weight.data.amax() * 127).round().tolist()
        [[127.0, 0.0, -50.0]]

    Source: for the objective with batches, Frantar et al. 2022, arXiv 2210.17323 (GPTQ), equation (1).

    Differs from the paper: levels are found by coordinate descent over the weights that are not zero.
    """
    check_module(model)
    if forward is not None and batches is None:
        raise ValueError("forward= says how a model is given its batches, and there are none; pass batches=")
    reshard(model)
    axes = output_axes(model)
    weights = {name: p for name, p in model.named_parameters() if name in axes}
    _check(model, weights)
    done: dict[str, QuantizedLayer] = {}
    with all_or_nothing(model) as keep:
        if batches is not None:
            read = held(batches)
            # Attention computes with the weight of its out_proj without calling it, so that nothing is seen there.
            uncalled = {id(m.out_proj.weight) for m in model.modules() if isinstance(m, nn.MultiheadAttention)}
            seen = {name: p for name, p in weights.items() if can_be_seen(model, p) and id(p) not in uncalled}
            with evaluating(model):
                for stage in survey(model, layers_of(model, seen), read, forward, some=True):
                    moment = moment_of(model, stage, read, forward)
                    for layer in stage.layers:
                        keep(layer.weight)
                        with torch.autocast(layer.weight.device.type, enabled=False):
                            done[layer.name] = _by_output(layer, axes[layer.name], moment)
        for name, weight in weights.items():
            if name not in done:
                keep(weight)
                done[name] = _nearest(name, weight, axes[name])
    return QuantizeReport(tuple(done.values()))


def _nearest(name: str, weight: nn.Parameter, axis: int) -> QuantizedLayer:
    x = weight.detach()
    scale = scales(x, axis)
    made = rounded(levels(x, scale, axis), scale, axis)
    energy = float(x.double().square().sum()) or 1.0
    error = float((made.double() - x.double()).square().sum()) / energy
    x.copy_(made)
    return QuantizedLayer(name, tuple(weight.shape), error, error)


def _by_output(layer: Layer, axis: int, moment: Moment) -> QuantizedLayer:
    x = layer.weight.detach()
    scale = scales(x, axis)
    nearest = levels(x, scale, axis)
    dtype = moment.matrix.dtype
    before, level = layer.matrix().to(dtype, copy=True), layer.matrix(nearest.to(dtype)).contiguous()
    spread = layer.matrix(per_output(scale.to(dtype), x.dim(), axis).expand_as(x))[..., 0]
    plain = relative_error(before, level * spread[..., None], moment.matrix)
    chosen = layer.weight_of(round_together(before, level, spread, moment.matrix)).to(torch.int8)
    x.copy_(rounded(chosen, scale, axis))
    error = relative_error(before, layer.matrix().to(dtype), moment.matrix)
    return QuantizedLayer(layer.name, tuple(x.shape), plain, error)


def _check(model: nn.Module, weights: dict[str, nn.Parameter]) -> None:
    if not weights:
        raise ValueError(
            f"{type(model).__name__} holds no matrix of a layer and no embedding; there is nothing to round"
        )
    check_values(weights, "quantize")
    check_memory(model, weights)
    large = [name for name, weight in weights.items() if not bool(weight.detach().float().isfinite().all())]
    if large:
        raise ValueError(f"{few(large)} passes {torch.finfo(torch.float32).max:g}, float32's largest number")
