"""SparseOptimizer: pull the gradient back, step the base, push the weight forward, mask."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mirrormask.checks import check_int, check_known
from mirrormask.geometry import Geometry
from mirrormask.masks import DATA_SCORES, keep_count
from mirrormask.masks.saliency import Loss, measure
from mirrormask.methods import Method
from mirrormask.optimizer import base_optimizer as linking
from mirrormask.optimizer import mask_changes as masking
from mirrormask.optimizer.diagnostics import diagnose, l1_norm
from mirrormask.optimizer.rounds import Rounds
from mirrormask.optimizer.state_dict import read_state, write_state
from mirrormask.optimizer.steps import any_base as stepping
from mirrormask.optimizer.steps.fused_cpu import FusedStep
from mirrormask.progress import Clock
from mirrormask.selection import Weights

__all__ = ["SparseOptimizer", "sparsify"]

#: How many steps pass between two rounds of snapping, and so how long a denormal number can live; the fused step
#: snaps in every step.
SNAP_EVERY = 64


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
) -> SparseOptimizer:
    """Wrap ``optimizer`` so that it trains ``model`` to the method's sparsity.

    Args:
        model: an ordinary network; its parameters stay the plain weights, at every step.
        optimizer: any torch optimizer that holds them, before its first step. It is taken over: build schedulers on
            what this function returns, and step that.
        method: from :mod:`mirrormask.methods`, or a :class:`mirrormask.methods.Method` of your own.
        steps: how many optimizer steps the training will have, at least 1: schedules are fractions of it.
        weights: which parameters may become sparse, as in :func:`mirrormask.select_weights`.
        fused: use the single-loop step where it applies (:mod:`~mirrormask.optimizer.steps.fused_cpu`);
            False for tensor operations only.
        batches: for scores that need data before the first step (SNIP, SynFlow, GraSP): pairs ``(input, target)`` on
            the model's device, or a single one; SynFlow reads the shape of one input only.
        loss_fn: ``loss_fn(model(input), target)`` for those scores; None for cross entropy.
        on_empty: what happens when a mask leaves nothing of a weight tensor: ``"warn"``, ``"error"`` or ``"ignore"``.

    Returns:
        A :class:`SparseOptimizer`.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: steps < 1, nothing to sparsify, a weight that the optimizer does not hold, an optimizer that is
            wrapped already, or one that cannot be; a sparsity that leaves no weight at all, an N:M pattern that does
            not divide a weight; batches missing, or given to a method that reads none.

    Example:
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
    return SparseOptimizer(
        model,
        optimizer,
        method,
        steps=steps,
        weights=weights,
        fused=fused,
        batches=batches,
        loss_fn=loss_fn,
        on_empty=on_empty,
    )


class SparseOptimizer(Optimizer):
    """A torch optimizer over the model's own parameters that trains their latents with another one.

    In one step: the gradient of each weight x is pulled back to its latents θ, the decay shrinks them (or joins their
    gradient, if coupled), the base optimizer steps them, ``x = φ(θ)`` is written into the model's parameter, and
    masked weights are set to zero. Parameters that are not sparsified train with the base optimizer as ever.

    The base optimizer's ``weight_decay`` acts on every parameter that it trains itself, the weights of a Euclidean
    method included; on latents it does not act, since the method's decay takes its place there.

    A step whose gradients are not all finite is skipped and counted in ``diagnostics()["skipped_steps"]``. On an
    accelerator, where finding out would mean waiting for the device, such a gradient is replaced by zeros instead.
    """

    _FIELDS = (
        "base",
        "method",
        "steps",
        "weights",
        "fused",
        "step_count",
        "skipped_steps",
        "finalized",
        "decay_state",
        "decay_integrals",
        "links",
        "_stepped",
        "increments",
        "on_empty",
        "rounds",
    )

    def __init__(
        self,
        model: nn.Module,
        base: Optimizer,
        method: Method,
        *,
        steps: int,
        weights: Weights | None = None,
        fused: bool = True,
        batches: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        on_empty: str = "warn",
    ) -> None:
        linking.check_arguments(model, base, method)
        if (batches is not None or loss_fn is not None) and not method.reads_data:
            raise ValueError(
                f"the method {method.name!r} reads no data; leave out batches= and loss_fn=, "
                f"or choose a score that does: {', '.join(sorted(DATA_SCORES))}"
            )
        self.on_empty = check_known("on_empty", on_empty, ("warn", "error", "ignore"))
        self.steps = check_int("steps", steps, low=1, hint="epochs * len(loader)")
        self.base = base
        method = method.under(adaptive=not isinstance(base, torch.optim.SGD))
        self.method = method
        self.weights: dict[str, nn.Parameter] = linking.held_weights(model, base, weights)
        empty = method.mask.check_weights({name: tuple(x.shape) for name, x in self.weights.items()})
        if method.mask.sparsity_at(Clock(0, self.steps)) is None:  # else the pruning before the first step tells
            masking.report_empty(empty, self.on_empty)
        self.step_count = 0
        self.skipped_steps = 0
        self.finalized = False
        self.decay_state = method.decay.start()
        self.fused = fused
        self._fused: FusedStep | None = None
        self.links: list[tuple[int, float | None, bool]] = []
        self._stepped: list[list[tuple[Tensor, Tensor]]] = []
        self.rounds = Rounds() if method.mask.replays else None
        super().__init__([dict(group) for group in base.param_groups], dict(base.defaults))
        self.decay_integrals = [0.0] * len(self.param_groups)
        self.increments = [0.0] * len(self.param_groups)
        scores = None
        if method.reads_data:
            scores = measure(
                method.mask.score,
                model,
                self.weights,
                batches,
                loss_fn,
                sparsity=method.sparsity,
                allocation=method.mask.allocation,
            )
        self._take_over(scores)

    # -- construction ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _take_over(self, scores: list[Tensor] | None) -> None:
        """Give every sparsifiable weight its latents, and hand those to the base optimizer in the weight's place."""
        geometry = self.method.geometry
        adaptive = not isinstance(self.base, torch.optim.SGD)
        for x in self.weights.values():
            latents = geometry.init(x)
            rate = geometry.rate(x, latents, adaptive=adaptive) if latents else 1.0
            self.state[x] = {**latents, "rate": rate, "negative_start": x.detach() < 0}
            if latents:
                self.base.state.pop(x, None)
        linking.link(self)
        self.push_all()
        if scores is not None:
            for x, score in zip(self.weights.values(), scores, strict=True):
                self.state[x]["score"] = score
        first = self.method.mask.sparsity_at(Clock(0, self.steps))
        if first is not None:
            masking.prune(self, first)
            for x in self.weights.values():
                self.state[x].pop("score", None)  # the mask says it all
        if self.rounds is not None and self.method.mask.keep_at(self.steps) == 0:
            self.rounds.keep(self)

    @property
    def geometry(self) -> Geometry:
        """The method's geometry as it is at this step."""
        return self.method.geometry.at(Clock(self.step_count, self.steps))

    @property
    def round_steps(self) -> int:
        """How many steps a learning-rate schedule built on this optimizer shall have.

        All of ``steps``, unless the method trains in rounds (LTH, WR, LRR): then those of the first round; in later
        rounds the learning rates of the first are set again, whatever the scheduler does in the meantime.
        """
        return self.method.mask.round_steps(self.steps)

    def is_sparsified(self, p: Tensor) -> bool:
        """Whether ``p``, a parameter of the model, is one of ``weights``."""
        return "rate" in self.state.get(p, {})

    def latents_of(self, x: Tensor) -> dict[str, Tensor]:
        """The latents and constants of one weight by name; ``{}`` where the geometry has none."""
        state, geometry = self.state[x], self.method.geometry
        return {name: state[name] for name in (*geometry.latents, *geometry.constants)}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that train densely; the weights to sparsify are chosen at construction."""
        super().add_param_group(param_group)
        if self.links:
            group = self.param_groups[-1]
            self.base.add_param_group({**group, "params": list(group["params"])})
            self.links.append((len(self.param_groups) - 1, None, True))
            self._stepped.append([])
            self.decay_integrals.append(0.0)
            self.increments.append(0.0)
            self._fused = None

    # -- the step ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of training; ``closure`` re-evaluates the model and returns the loss, as in torch.optim."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self.fused and self._fused is None:
            self._fused = FusedStep(self)
        fused = self._fused if self._fused is not None and self._fused.prepare() else None
        if not (stepping.keep_finite(self._gradients()) if fused is None else fused.finite()):
            self.skipped_steps += 1
            return loss
        if self.rounds is not None:
            self.rounds.before_step(self)
        linking.sync_groups(self)
        self._measure_decay()
        dense = self._gradients_for_growth()
        if fused is None:
            stepping.plain_step(self)
        else:
            fused.step()
        self.step_count += 1
        self._after_step(dense)
        return loss

    def _gradients(self) -> list[Tensor]:
        """Every gradient that there is."""
        return [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]

    def _gradients_for_growth(self) -> list[Tensor | None] | None:
        """Copies of the weights' gradients if the mask regrows after this step: the base may overwrite gradients."""
        mask = self.method.mask
        if not mask.regrows or self.finalized or not mask.regrow_at(Clock(self.step_count + 1, self.steps)):
            return None
        return [None if x.grad is None else x.grad.clone() for x in self.weights.values()]

    def _measure_decay(self) -> None:
        """Ask the decay for ``ΔA`` of this step, once a group."""
        clock = Clock(self.step_count, self.steps)
        for index, group in enumerate(self.param_groups):
            lr = float(group["lr"])
            idle = self.finalized or (self.method.decay.coupled and lr == 0)
            integral = self.decay_integrals[index]
            increment = 0.0 if idle else self.method.decay.increment(self.decay_state, clock, lr, integral)
            self.increments[index] = increment
            self.decay_integrals[index] += increment

    def _after_step(self, dense: list[Tensor | None] | None) -> None:
        """Change the mask, let the decay observe, snap: whatever does not happen at every step."""
        clock = Clock(self.step_count, self.steps)
        mask, geometry = self.method.mask, self.method.geometry
        if not self.finalized:
            target = mask.sparsity_at(clock)
            if target is not None:
                masking.prune(self, target)
                if self.rounds is not None:
                    self.rounds.start_again(self)
            elif dense is not None:
                masking.exchange(self, mask.regrow_at(clock), dense)
            if self.rounds is not None and mask.keep_at(self.steps) == clock.step:
                self.rounds.keep(self)
            observes = self.method.decay.observes
            if observes and self.step_count % max(round(observes * self.steps), 1) == 0:
                rho = masking.removed_share(self, mask.sparsity_ahead(clock))
                self.method.decay.observe(self.decay_state, clock, rho=rho)
        if geometry.refresh_due(clock):
            self._refresh()
        if self.step_count % SNAP_EVERY == 0:
            stepping.snap(self)

    def _refresh(self) -> None:
        """Let the geometry choose its latents anew; what the base optimizer knew of the old ones does not hold."""
        for x in self.weights.values():
            latents, mask = self.latents_of(x), self.state[x].get("mask")
            self.method.geometry.refresh(x, latents, mask)
            if mask is not None:
                self.method.geometry.prune(latents, mask)
            for latent in latents.values():
                for value in self.base_tensors(latent):
                    value.zero_()
        self.push_all()

    def forget_base_state(self) -> None:
        """Let the base optimizer start anew: no momentum, no step count."""
        self.base.state.clear()
        self._fused = None

    def base_tensors(self, held: Tensor) -> list[Tensor]:
        """The base optimizer's state of one tensor, as far as it has a value for each element."""
        state = self.base.state.get(held, {}).values()
        return [value for value in state if isinstance(value, Tensor) and value.shape == held.shape]

    def push_all(self) -> None:
        """Write all weights anew from their latents and masks."""
        stepping.push(self, list(self.weights.values()))
        stepping.apply_masks(self, self.weights.values())

    # -- masks -------------------------------------------------------------------------------------------------

    @property
    def masks(self) -> dict[str, Tensor]:
        """name -> bool tensor, True where the weight lives."""
        return {
            name: self.state[x]["mask"] if "mask" in self.state[x] else torch.ones_like(x, dtype=torch.bool)
            for name, x in self.weights.items()
        }

    @torch.no_grad()
    def finalize(self) -> None:
        """Leave exactly ``round((1 - sparsity) · N)`` weights alive and the rest exactly zero; steps keep that mask.

        A second call changes nothing. Where fewer weights than that are nonzero to begin with (a layer of zeros), a
        warning names the layers.
        """
        if self.finalized:
            return
        if self.method.sparsity > 0:
            if not masking.is_reached(self, self.method.sparsity):
                masking.prune(self, self.method.sparsity)
            asked = keep_count(sum(x.numel() for x in self.weights.values()), self.method.sparsity)
            short = [
                name for name, x in self.weights.items() if int(x.count_nonzero()) < int(self.state[x]["mask"].sum())
            ]
            if short:
                found = sum(int(x.count_nonzero()) for x in self.weights.values())
                warnings.warn(
                    f"{found} nonzeros instead of {asked}: weights that the mask keeps are exactly zero "
                    f"already in {', '.join(short)}",
                    stacklevel=2,
                )
        self.finalized = True

    # -- what is going on --------------------------------------------------------------------------------------

    def epoch_end(self, score: float | None = None) -> None:
        """Tell the method that an epoch is over, with its training accuracy; only PILoT's own schedule reads it.

        Raises:
            ValueError: the method's decay needs a score and got None.
        """
        decay = self.method.decay
        if not decay.reads_score:
            return
        if score is None:
            raise ValueError(f"{type(decay).__name__} reads the training accuracy; call epoch_end(score=accuracy)")
        decay.epoch_end(
            self.decay_state,
            Clock(self.step_count, self.steps),
            score=float(score),
            l1_norm=l1_norm(self.weights.values()),
        )

    def diagnostics(self) -> dict[str, float]:
        """How training stands; see :func:`~mirrormask.optimizer.diagnostics.diagnose`. Reading waits for the device."""
        return diagnose(self)

    # -- saving ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All of it, keyed by the model's parameters: latents, masks, the base optimizer's state, the schedule."""
        return write_state(self, super().state_dict)

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit; the model's own weights are loaded by the model.

        Raises:
            ValueError: it was taken from another model, method or number of steps, or from another optimizer.
        """
        read_state(self, state_dict)
        self._fused = None
        loaded = [x.detach().clone() for x in self.weights.values()]
        self.push_all()
        for x, value in zip(self.weights.values(), loaded, strict=True):
            # Weights that the model has loaded are what the run had to the last bit; φ may be computed in two ways.
            if torch.allclose(x, value, rtol=1e-4, atol=1e-6 * float(value.abs().max() if value.numel() else 0.0)):
                x.copy_(value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), **{name: self.__dict__[name] for name in self._FIELDS}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._fused = None

    def __repr__(self) -> str:
        return f"SparseOptimizer({self.method!r}, {self.base!r})"
