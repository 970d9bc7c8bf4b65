"""How much a weight matters to its layer's output, judged by the layer's inputs: Wanda, RIA, OBS; larger stays.

A score takes a layer's matrix ``x`` of shape ``(groups, outputs, inputs)`` and the second moment of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.calibration import Moment, evaluating, layers_of, moment_of, survey
from mirrormask.calibration.inverse import inverse_factor

__all__ = ["MOMENT_SCORES", "layer_magnitude", "obs", "of_inputs", "ria", "wanda"]


def layer_magnitude(x: Tensor, moment: Moment) -> Tensor:
    """``|x|``, whatever the inputs."""
    return x.abs()


def wanda(x: Tensor, moment: Moment) -> Tensor:
    """``|x_ij| ‖X_j‖₂``: the change of output i where x_ij alone becomes zero.

    Example:
        >>> moment = Moment(torch.diag(torch.tensor([1.0, 100.0]))[None], 5)
        >>> wanda(torch.tensor([[[3.0, -0.5]]]), moment).tolist()
        [[[3.0, 5.0]]]

    Source: Sun, Liu, Bair and Kolter 2023, arXiv 2306.11695, equation (1).
    """
    return x.abs() * moment.norms[:, None, :]


def ria(x: Tensor, moment: Moment) -> Tensor:
    """``(|x_ij| / Σ_i |x_ij| + |x_ij| / Σ_j |x_ij|) ‖X_j‖₂^½``: a weight's share of its input's and of its output's.

    Example:
        >>> moment = Moment(torch.eye(2)[None], 5)
        >>> ria(torch.tensor([[[3.0, 1.0], [1.0, 0.0]]]), moment).tolist()
        [[[1.5, 1.25], [1.25, 0.0]]]

    Source: Zhang et al. 2024, arXiv 2402.12419, equation (4), with the exponent a = 0.5.
    """
    size = x.abs()
    tiny = torch.finfo(size.dtype).tiny
    shares = size / size.sum(1, keepdim=True).clamp_min(tiny) + size / size.sum(2, keepdim=True).clamp_min(tiny)
    return shares * moment.norms[:, None, :].sqrt()


def obs(x: Tensor, moment: Moment) -> Tensor:
    """``x_ij² / [H⁻¹]_jj``: what is lost where x_ij becomes zero and the others of its output make up for it.

    H is damped as in :func:`mirrormask.calibration.inverse.inverse_factor`.

    Source: Hassibi and Stork 1993, Optimal Brain Surgeon; Frantar and Alistarh 2023, arXiv 2301.00774, equation (3).
    """
    factor = inverse_factor(moment.matrix.to(x.dtype))
    return x.square() / factor.square().sum(1)[:, None, :]


#: Scores of a layer's matrix, by name.
MOMENT_SCORES: Mapping[str, Callable[[Tensor, Moment], Tensor]] = {
    "magnitude": layer_magnitude,
    "obs": obs,
    "ria": ria,
    "wanda": wanda,
}


def of_inputs(name: str) -> Callable[..., list[Tensor]]:
    """The score ``name`` of a model's weights before training, as the table of scores that read data has them."""

    def score(
        model: nn.Module, weights: Mapping[str, Tensor], batches: Sequence[Any], loss_fn: Any, **_: Any
    ) -> list[Tensor]:
        layers = layers_of(model, weights)
        scores = {}
        with evaluating(model):
            for stage in survey(model, layers, batches):
                moment = moment_of(model, stage, batches)
                for layer in stage.layers:
                    matrix = layer.matrix().to(moment.matrix.dtype)
                    scores[layer.name] = layer.weight_of(MOMENT_SCORES[name](matrix, moment)).contiguous()
        return [scores[name] for name in weights]

    score.__doc__ = MOMENT_SCORES[name].__doc__
    return score
