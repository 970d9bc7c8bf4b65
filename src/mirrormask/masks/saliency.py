"""How much a weight matters, judged by data before training: SNIP, SynFlow, GraSP, and by a layer's inputs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mirrormask.buffers import kept_buffers
from mirrormask.calibration.batches import copied
from mirrormask.checks import few
from mirrormask.masks.calibrated import of_inputs
from mirrormask.masks.selection import select

__all__ = ["DATA_SCORES", "Loss", "grasp", "measure", "snip", "synflow"]

#: ``loss_fn(model(x), y)``; of a mapping ``loss_fn(model(**batch), batch)``.
Loss = Callable[[Any, Any], Tensor]
#: Pairs ``(x, y)``, or mappings of keyword arguments.
Batches = Sequence[Any]

SYNFLOW_ROUNDS = 100
GRASP_TEMPERATURE = 200.0


def snip(model: nn.Module, weights: Mapping[str, Tensor], batches: Batches, loss_fn: Loss, **_: Any) -> list[Tensor]:
    """``|x ⊙ ∇f(x)|``, the gradient summed over the batches: how much the loss would feel a change of scale of x.

    Source: Lee, Ajanthan and Torr 2019, arXiv 1810.02340, equation (6); normalising changes no rank.
    """
    total = _gradients(model, weights, batches, loss_fn, create_graph=False)
    return [(x.detach() * grad).abs() for x, grad in zip(weights.values(), total, strict=True)]


def grasp(model: nn.Module, weights: Mapping[str, Tensor], batches: Batches, loss_fn: Loss, **_: Any) -> list[Tensor]:
    """``x ⊙ H∇f(x)``: what pruning x would take from the gradient's norm; the largest stay.

    Outputs are divided by a temperature of 200 first, where they are tensors.

    Source: Wang, Zhang and Grosse 2020, arXiv 2002.07376, equation (8) and Algorithm 2 (whose score has the sign
    turned, with the largest removed).
    """

    def cool(output: Any, target: Any) -> Tensor:
        return loss_fn(output / GRASP_TEMPERATURE if isinstance(output, Tensor) else output, target)

    fixed = [g.detach() for g in _gradients(model, weights, batches, cool, create_graph=False)]
    product = [torch.zeros_like(g) for g in fixed]
    for batch in batches:
        grads = _gradients(model, weights, [batch], cool, create_graph=True)
        along = sum(((g * v).sum() for g, v in zip(grads, fixed, strict=True)), torch.zeros(()))
        if along.requires_grad:
            for total, part in zip(
                product, torch.autograd.grad(along, list(weights.values()), allow_unused=True), strict=True
            ):
                if part is not None:
                    total += part
    return [x.detach() * h for x, h in zip(weights.values(), product, strict=True)]


def synflow(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    batches: Batches,
    loss_fn: Loss,
    *,
    sparsity: float,
    allocation: str,
    rounds: int = SYNFLOW_ROUNDS,
) -> list[Tensor]:
    """``|x| ⊙ ∂R/∂|x|`` with ``R = 1ᵀ f_|x|(1)``, pruned in ``rounds`` exponential steps.

    Of the data only the shape of one input is used. The network runs in evaluation mode, in float64, with every
    parameter and buffer replaced by its absolute value. A weight that falls in an earlier round ranks below one that
    falls later.

    Source: Tanaka et al. 2020, arXiv 2006.05467, Algorithm 1.
    """
    model = copy.deepcopy(model).double().eval()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: t.detach().abs() if t.is_floating_point() else t for name, t in tensors.items()}
    ones = torch.ones_like(_input(batches[0])[:1], dtype=torch.float64)
    start = {name: state[name] for name in weights}
    masks = {name: torch.ones_like(x, dtype=torch.bool) for name, x in start.items()}
    ranks = {name: torch.zeros_like(x) for name, x in start.items()}
    scores: dict[str, Tensor] = {}
    for step in range(1, rounds + 1):
        live = {name: (x * masks[name]).requires_grad_() for name, x in start.items()}
        output = functional_call(model, {**state, **live}, (ones,))
        grads = torch.autograd.grad(_first(output).sum(), list(live.values()), allow_unused=True)
        for (name, x), grad in zip(live.items(), grads, strict=True):
            score = torch.zeros_like(x) if grad is None else (x * grad).detach()
            scores[name] = torch.where(masks[name], score, ranks[name])
        kept = select(list(scores.values()), 1 - (1 - sparsity) ** (step / rounds), allocation)
        for name, mask in zip(start, kept, strict=True):
            ranks[name].masked_fill_(masks[name] & ~mask, step - rounds - 1.0)
            masks[name] &= mask
    return [torch.where(masks[name], scores[name], ranks[name]) for name in start]


#: Scores that need data, by name.
DATA_SCORES: Mapping[str, Callable[..., list[Tensor]]] = {
    "snip": snip,
    "synflow": synflow,
    "grasp": grasp,
    **{name: of_inputs(name) for name in ("obs", "ria", "wanda")},
}


def measure(
    name: str,
    model: nn.Module,
    weights: Mapping[str, nn.Parameter],
    batches: Iterable[Any] | None,
    loss_fn: Loss | None,
    *,
    sparsity: float,
    allocation: str,
) -> list[Tensor]:
    """The score ``name`` of each weight; the model's gradients, buffers and modes are afterwards what they were.

    Args:
        name: a name in ``DATA_SCORES``.
        model: as it starts.
        weights: name -> parameter of the model.
        batches: of ``(input, target)``; a single such pair will do. Or mappings of keyword arguments, labels among
            them, as Hugging Face's models take them.
        loss_fn: ``loss_fn(model(input), target)``; None for cross entropy. For a mapping
            ``loss_fn(model(**batch), batch)``; None for the loss that the model returns.
        sparsity, allocation: what the score is for; only SynFlow, which prunes in rounds, reads them.

    Raises:
        ValueError: there are no batches, they are neither pairs nor mappings, or nothing returns a loss.
    """
    pairs = _pairs(name, batches)
    restore_buffers = kept_buffers(model)
    try:
        with torch.enable_grad():
            scores = DATA_SCORES[name](
                model, weights, pairs, loss_fn or _usual, sparsity=sparsity, allocation=allocation
            )
    finally:
        restore_buffers()
    return [score.detach().nan_to_num(nan=0.0).to(x.device) for score, x in zip(scores, weights.values(), strict=True)]


def _pairs(name: str, batches: Iterable[Any] | None) -> Batches:
    if batches is None:
        raise ValueError(
            f"score={name!r} needs data before the first step; pass batches=[(input, target), ...] to mm.sparsify"
        )
    pairs = [batches] if isinstance(batches, (tuple, Mapping)) else list(batches)
    for pair in pairs:
        if not isinstance(pair, Mapping) and (not isinstance(pair, (tuple, list)) or len(pair) != 2):
            raise ValueError(
                f"batches holds a {type(pair).__name__}; it must hold pairs (input, target), or mappings of keyword "
                "arguments"
            )
    if not pairs:
        raise ValueError(f"batches is empty; score={name!r} needs at least one pair (input, target)")
    return [pair if isinstance(pair, Mapping) else (pair[0], pair[1]) for pair in pairs]


def _usual(output: Any, target: Any) -> Tensor:
    """Cross entropy; where the target is the mapping that the model was given, the loss that it returned."""
    if not isinstance(target, Mapping):
        return nn.functional.cross_entropy(output, target)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"the model returned a {type(output).__name__} without a loss for a batch of {few(list(target))}; put the "
            "labels into the batch, or pass loss_fn=lambda output, batch: ..."
        )
    return loss


def _gradients(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Batches, loss_fn: Loss, *, create_graph: bool
) -> list[Tensor]:
    total = [torch.zeros_like(x) for x in weights.values()]
    for batch in batches:
        if isinstance(batch, Mapping):
            loss = loss_fn(model(**copied(batch)), batch)
        else:
            loss = loss_fn(model(copied(batch[0])), batch[1])
        grads = torch.autograd.grad(loss, list(weights.values()), create_graph=create_graph, allow_unused=True)
        total = [t if g is None else t + g for t, g in zip(total, grads, strict=True)]
    return total


def _input(batch: Any) -> Tensor:
    if isinstance(batch, Mapping) or not isinstance(batch[0], Tensor) or not batch[0].is_floating_point():
        raise ValueError("synflow feeds the network ones of the input's shape: the input must be one floating tensor")
    found: Tensor = batch[0]
    return found


def _first(output: Any) -> Tensor:
    first: Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first
