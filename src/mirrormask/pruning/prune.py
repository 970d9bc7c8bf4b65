"""mm.prune: from a model and some batches to a sparse model, without training."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask import made_sparse
from mirrormask.batchnorm import recalibrate
from mirrormask.calibration import Forward, Layer, Moment, evaluating, held, layers_of, moment_of, survey
from mirrormask.calibration.inverse import DAMPING, is_singular
from mirrormask.calibration.layers import check_values
from mirrormask.calibration.moments import Stage
from mirrormask.checks import callers_level, check_known, check_number, few
from mirrormask.masked import count_true
from mirrormask.masks import AtStart, allocate, select
from mirrormask.masks.calibrated import MOMENT_SCORES
from mirrormask.matrices import check_module
from mirrormask.overlaps import check_memory
from mirrormask.pruning.choice import choose
from mirrormask.pruning.report import PrunedLayer, PruneReport
from mirrormask.pruning.solver import reconstruct, relative_error
from mirrormask.pruning.undo import all_or_nothing
from mirrormask.resharding import reshard
from mirrormask.selection import Weights, select_weights

__all__ = ["prune"]

#: Whose weights compete where ``compare`` is not given.
COMPARE = {"magnitude": "layer", "obs": "layer", "ria": "layer", "wanda": "row"}


def prune(
    model: nn.Module,
    batches: Iterable[Any],
    sparsity: float,
    method: str = "obs",
    *,
    allocation: str = "uniform",
    pattern: str | None = None,
    weights: Weights | None = None,
    compare: str | None = None,
    damping: float = DAMPING,
    batch_norm: bool = True,
    forward: Forward | None = None,
) -> PruneReport:
    """Set weights of ``model`` to zero, in place, exactly as many as asked, without training.

    Layer by layer in the order of the forward pass: the model, pruned so far, runs on the batches up to the layer,
    whose inputs X are summed up in ``H = X Xᵀ``; then its weights go by their score. Batch norm is recalibrated in the
    end.

    | method | score | the weights that stay |
    |---|---|---|
    | ``"obs"`` | ``x_ij² / [H⁻¹]_jj``, as it changes on the way | make up for those that went: SparseGPT's solver |
    | ``"wanda"`` | ``|x_ij| ‖X_j‖`` | as they were |
    | ``"ria"`` | a weight's share of its row and its column, times ``‖X_j‖^½`` | as they were |
    | ``"magnitude"`` | ``|x_ij|`` | as they were |

    One H is in memory at a time. The model runs once for each layer (layers with the very same input share a run), and
    each run ends at the layer, so that the time grows with the square of the depth. Pruned weights stay zero in later
    training with :func:`mirrormask.keep_zeros`.

    Args:
        model: an ordinary network; modes, gradients, hooks, dtypes and devices are afterwards as they were.
        batches: a list, or a data loader: inputs, tuples whose first element is the input, or mappings of keyword
            arguments, on the model's device. Some hundred examples will do; they are held in a list.
        sparsity: the fraction of zeros over all chosen weights together, in [0, 1).
        method: one of the table.
        allocation: how the sparsity is shared over layers: ``"uniform"``, ``"erk"``, or ``"global"``, which compares
            the scores of all layers of the dense model.
        pattern: ``"N:M"`` to leave N of every M weights along the input dimension; then sparsity must be ``1 - N/M``.
        weights: which parameters, as in :func:`mirrormask.select_weights`; by default frozen ones too.
        compare: whose weights compete: ``"row"``, all of one output, or ``"layer"``; None for ``"row"`` with wanda and
            ``"layer"`` otherwise. With obs, within 128 columns at a time.
        damping: of obs: what is added to the diagonal of H, as a share of its mean, in [0, inf).
        batch_norm: whether statistics of batch norm are estimated anew in the end; False where the batches are few, or
            not such as the network was trained on: it would lose more by them than by its zeros.
        forward: for other batches or models, ``forward(model, batch)``.

    Returns:
        A :class:`PruneReport`: for each layer its sparsity and its output's error; ``print`` it.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: an argument is out of its range or unknown; a weight is of no Linear, Conv or Hugging Face Conv1D
            layer, or not finite; a pattern does not divide it; batches are empty or elsewhere, the model does not take
            one, a layer is reached by none, or an input is not finite. The model is then as it was.

    Warns:
        UserWarning: H of some layers has no inverse, since there are fewer tokens or pixels than inputs, or inputs that
            are always zero; nothing is left of a layer; or a weight that the mask keeps was zero already.

    Example:
        >>> model = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10))
        >>> report = prune(model, [torch.randn(64, 20) for _ in range(2)], 0.5)
        >>> [layer.nonzeros for layer in report.layers]
        [300, 150]

    Source: Frantar and Alistarh 2023, arXiv 2301.00774 (obs); Sun et al. 2023, arXiv 2306.11695 (wanda); Zhang et al.
    2024, arXiv 2402.12419 (ria).

    Differs from the papers: convolutions are unfolded, other allocations than the uniform one, and inputs that are
    always zero do not cost weights beyond the sparsity.
    """
    check_module(model)
    reshard(model)
    check_known("method", method, MOMENT_SCORES)
    by_row = check_known("compare", COMPARE[method] if compare is None else compare, ("layer", "row")) == "row"
    check_number("damping", damping, low=0.0)
    rule = AtStart(sparsity, allocation=allocation, pattern=pattern)
    if forward is not None and not callable(forward):
        raise TypeError(f"forward={forward!r} is a {type(forward).__name__}, not a function (model, batch)")
    layers = layers_of(model, select_weights(model, weights, frozen=True))
    weights_by_name = {layer.name: layer.weight for layer in layers}
    check_values(weights_by_name, "prune")
    check_memory(model, weights_by_name)
    empty = rule.check_weights({layer.name: layer.shape for layer in layers})
    read = held(batches)
    singular: list[str] = []
    rows: list[PrunedLayer] = []
    with all_or_nothing(model) as keep:
        with evaluating(model):
            stages = survey(model, layers, read, forward)
            counts = _counts(rule, layers, method, model, stages, read, forward)
            empty = [name for name, count in counts.items() if count == 0]
            for stage in stages:
                moment = moment_of(model, stage, read, forward)
                if method == "obs" and is_singular(moment.matrix, moment.places):
                    singular += [layer.name for layer in stage.layers]
                for layer in stage.layers:
                    keep(layer.weight)
                    with torch.autocast(layer.weight.device.type, enabled=False):
                        rows.append(_prune_layer(layer, moment, counts[layer.name], method, by_row, pattern, damping))
        if batch_norm:
            recalibrate(model, read, forward=forward)
    made_sparse.note(layer.weight for layer in layers)
    _warn(rows, empty, singular, layers)
    return PruneReport(method, tuple(rows), tuple(singular))


def _prune_layer(
    layer: Layer, moment: Moment, k: int, method: str, by_row: bool, pattern: str | None, damping: float
) -> PrunedLayer:
    """Prune one layer, in place."""
    matrix = layer.matrix().to(moment.matrix.dtype, copy=True)  # of a linear layer it is a view
    if method == "obs":
        made, mask = reconstruct(matrix, moment.matrix, k, by_row=by_row, pattern=pattern, damping=damping)
    else:
        scores = MOMENT_SCORES[method](matrix, moment).flatten(0, 1)
        mask = choose(scores, k, by_row=by_row, pattern=pattern).view(matrix.shape)
        made = matrix * mask
    layer.weight.copy_(layer.weight_of(made))
    if not bool(layer.weight.isfinite().all()):  # in the dtype that it has
        raise ValueError(
            f"{layer.name!r} would not be finite after its reconstruction; give a larger damping= than {damping}"
        )
    removed = relative_error(matrix, matrix * mask, moment.matrix)
    error = relative_error(matrix, layer.matrix().to(matrix.dtype), moment.matrix)
    return PrunedLayer(layer.name, tuple(layer.weight.shape), matrix.numel(), count_true(mask), removed, error)


def _counts(
    rule: AtStart,
    layers: Sequence[Layer],
    method: str,
    model: nn.Module,
    stages: Sequence[Stage],
    batches: Sequence[Any],
    forward: Forward | None,
) -> dict[str, int]:
    """How many weights each layer keeps; for ``"global"`` the dense model's scores say."""
    names = [layer.name for layer in layers]
    allocation = "uniform" if rule.pattern is not None else rule.allocation
    counts = allocate(allocation, [layer.shape for layer in layers], rule.sparsity)
    if counts is None:
        scores: dict[str, Tensor] = {}
        for stage in stages:
            moment = moment_of(model, stage, batches, forward)
            for layer in stage.layers:
                scores[layer.name] = MOMENT_SCORES[method](layer.matrix().to(moment.matrix.dtype), moment)
        counts = [count_true(mask) for mask in select([scores[name] for name in names], rule.sparsity)]
    return dict(zip(names, counts, strict=True))


def _warn(rows: Sequence[PrunedLayer], empty: Sequence[str], singular: Sequence[str], layers: Sequence[Layer]) -> None:
    if empty:
        warnings.warn(
            f"this sparsity leaves nothing of {few(empty)}; leave the layer out with weights=, lower the sparsity, or "
            "choose another allocation",
            stacklevel=callers_level(),
        )
    if singular:
        warnings.warn(
            f"the second moment of the inputs of {few(singular)} is singular, and was damped: there are fewer tokens "
            "or pixels than inputs, or inputs that are always zero or always alike; more batches may help",
            stacklevel=callers_level(),
        )
    found = {layer.name: int(torch.count_nonzero(layer.weight)) for layer in layers}
    short = [row.name for row in rows if found[row.name] < row.nonzeros]
    if short:
        warnings.warn(
            f"{sum(found.values())} nonzeros instead of {sum(row.nonzeros for row in rows)}: weights that the mask "
            f"keeps are exactly zero in {few(short)}",
            stacklevel=callers_level(),
        )
