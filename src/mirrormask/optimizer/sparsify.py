"""mm.sparsify: from a model, an optimizer and a method to a SparseOptimizer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mirrormask import made_sparse
from mirrormask.checks import check_int, check_known
from mirrormask.collector import uncollected
from mirrormask.masks import DATA_SCORES
from mirrormask.masks.saliency import Loss, measure
from mirrormask.methods import Method
from mirrormask.optimizer.arguments import check_arguments, frozen_weights, held_weights, unwrapped
from mirrormask.optimizer.mask_changes import report_empty
from mirrormask.optimizer.processes import Processes
from mirrormask.optimizer.sparse_optimizer import SparseOptimizer
from mirrormask.optimizer.together import copy_model
from mirrormask.optimizer.unheard import warn_of_weight_decay
from mirrormask.progress import Clock
from mirrormask.resharding import reshard
from mirrormask.selection import Weights

__all__ = ["sparsify"]


def sparsify(
    model: nn.Module,
    optimizer: Optimizer,
    method: Method,
    *,
    steps: int,
    weights: Weights | None = None,
    fused: bool = True,
    batches: Iterable[Any] | None = None,
    loss_fn: Loss | None = None,
    on_empty: str = "warn",
    process_group: Any = None,
    state_dtype: torch.dtype | None = None,
) -> SparseOptimizer:
    """Wrap ``optimizer`` so that it trains ``model`` to the method's sparsity.

    The weights stay as they are, to the last bit, unless the method prunes before the first step.

    Args:
        model: an ordinary network; its parameters stay the plain weights, at every step.
        optimizer: any torch optimizer that holds them, before its first step. It is taken over: build schedulers on
            what this function returns, and step that. One that Accelerate has prepared is unwrapped, and steps, saves
            and loads what this function returns from then on.
        method: from :mod:`mirrormask.methods`, or a :class:`mirrormask.methods.Method` of your own.
        steps: how many optimizer steps the training will have, at least 1: schedules are fractions of it.
        weights: which parameters may become sparse, as in :func:`mirrormask.select_weights`.
        fused: use the single-loop step where it applies (:mod:`mirrormask.optimizer.steps`), generated with llvmlite on
            a CPU and with Triton on a GPU; False for tensor operations only.
        batches: for scores that need data before the first step (SNIP, SynFlow, GraSP): pairs ``(input, target)``, or
            mappings of keyword arguments, on
            the model's device, or a single one; SynFlow reads the shape of one input only.
        loss_fn: ``loss_fn(model(input), target)`` for those scores, None for cross entropy; with mappings
            ``loss_fn(output, batch)``, None for the loss that the model returns.
        on_empty: what happens when a mask leaves nothing of a weight tensor: ``"warn"``, ``"error"`` or ``"ignore"``.
        process_group: the processes that train this model together, as of ``torch.distributed.new_group``; None for
            all, where ``torch.distributed`` has been initialised. Each of them calls this function, with the same
            arguments but for ``batches``; see ``docs/distributed.md``.
        state_dtype: ``torch.bfloat16`` keeps the momenta of latents in half the memory, rounded at random so that they
            are right on average; None for the dtype of the weights. For SGD with momentum in the fused step on a CPU;
            anything else is refused.

    Returns:
        A :class:`SparseOptimizer`.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: steps < 1, nothing to sparsify, a weight that the optimizer does not hold, an optimizer that is
            wrapped already, or one that cannot be; a weight that is lazy, complex, without values or not finite; a
            sparsity that leaves no weight at all, an N:M pattern that does not divide a weight; batches missing, or
            given to a method that reads none; on sharded weights, what cannot be known of a part of one.
        RuntimeError: processes were given different arguments.

    Example:
        >>> import torch
        >>> import mirrormask as mm
        >>> model = nn.Linear(20, 10)
        >>> base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = mm.sparsify(model, base, mm.methods.mirror(sparsity=0.9), steps=50)
        >>> for _ in range(50):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 20)).square().mean().backward()
        ...     _ = optimizer.step()
        >>> optimizer.finalize()
        >>> mm.sparsity(model).nonzeros
        20
    """
    base, wrapper = unwrapped(optimizer)
    if isinstance(model, nn.Module):
        reshard(model)
    if isinstance(base, SparseOptimizer):
        raise ValueError("this optimizer is wrapped already; pass the base optimizer, and wrap it once")
    check_arguments(model, base, method)
    if (batches is not None or loss_fn is not None) and not method.reads_data:
        raise ValueError(
            f"the method {method.name!r} reads no data; leave out batches= and loss_fn=, "
            f"or choose a score that does: {', '.join(sorted(DATA_SCORES))}"
        )
    check_known("on_empty", on_empty, ("warn", "error", "ignore"))
    check_int("steps", steps, low=1, hint="epochs * len(loader)")
    processes = Processes(process_group)
    with uncollected():
        named = held_weights(model, base, weights, method, processes)
    empty = method.mask.check_weights({name: tuple(x.shape) for name, x in named.items()})
    if method.mask.sparsity_at(Clock(0, steps)) is None:  # else the pruning before the first step tells
        report_empty(empty, on_empty)
    with uncollected():
        sparse = SparseOptimizer(
            model, base, method, named, steps=steps, on_empty=on_empty, fused=fused, processes=processes,
            state_dtype=state_dtype,
        )  # fmt: skip

    def measured() -> list[Tensor]:
        rule = method.mask
        copy_model(model, processes)
        return measure(rule.score, model, named, batches, loss_fn, sparsity=method.sparsity, allocation=rule.allocation)

    made_sparse.forget(named.values())
    sparse.take_over(measured if method.reads_data else None)
    if weights is None:
        sparse.parts.freezing.leave_out(frozen_weights(model, base), (name for name, _ in model.named_parameters()))
    warn_of_weight_decay(sparse)
    if wrapper is not None:
        _put_into(wrapper, sparse)
    return sparse


def _put_into(wrapper: Any, sparse: SparseOptimizer) -> None:
    """Let Accelerate's wrapper step, save and load ``sparse``; under fp16 it notes steps by a function of its own."""
    wrapper.optimizer = sparse
    if hasattr(wrapper, "_optimizer_original_step_method"):
        patched = type(wrapper).__init__.__globals__["patch_optimizer_step"]
        wrapper._optimizer_original_step_method = sparse.step
        wrapper._optimizer_patched_step_method = patched(wrapper, sparse.step)
