"""SparseOptimizer: the order of a step, and torch's protocol."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo
from torch.optim import Optimizer

from mirrormask.checks import check_number
from mirrormask.collector import while_uncollected
from mirrormask.matrices import normed_dims
from mirrormask.methods import Method
from mirrormask.optimizer import diagnostics
from mirrormask.optimizer.agreement import fingerprint
from mirrormask.optimizer.arguments import check_shards, turned_by_maximize
from mirrormask.optimizer.base_groups import check_group
from mirrormask.optimizer.base_optimizer import BaseOptimizer
from mirrormask.optimizer.decay_clock import DecayClock
from mirrormask.optimizer.due import (
    change_masks,
    gradients_for_growth,
    is_change_due,
    keep_if_due,
    observe,
    recur,
    watch,
)
from mirrormask.optimizer.edits import Edits
from mirrormask.optimizer.freezing import Freezing
from mirrormask.optimizer.mask_changes import MaskChanges
from mirrormask.optimizer.narrow_state import check_state_dtype, refuse_step
from mirrormask.optimizer.outcome import finish, note_gradients, skip
from mirrormask.optimizer.parts import Parts
from mirrormask.optimizer.presence import Presence
from mirrormask.optimizer.processes import Processes
from mirrormask.optimizer.rounds import Rounds
from mirrormask.optimizer.saved_state import marked
from mirrormask.optimizer.shards import Shards, is_sharded
from mirrormask.optimizer.state_dict import StateDict
from mirrormask.optimizer.steps import FUSED, STEPS, Now, Step
from mirrormask.optimizer.surroundings import apart
from mirrormask.optimizer.together import agree_on_state, begin_together, mean_of_all
from mirrormask.optimizer.training import Training
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["SparseOptimizer"]

#: How many steps processes that train together go at most without comparing what they are at.
AGREE_EVERY = 64


class SparseOptimizer(Optimizer):
    """A torch optimizer over the model's own parameters that trains their latents with another one.

    :func:`mirrormask.sparsify` makes one. In a step the gradient of each weight x is pulled back to its latents θ, the
    decay shrinks them (or joins their gradient, if coupled), the base optimizer steps them, ``x = φ(θ)`` is written
    into the model's parameter, and masked weights are set to zero. Parameters that are not sparsified train as ever.

    The base optimizer's ``weight_decay`` acts on every parameter that it trains itself, the weights of a Euclidean
    method included; on latents it does not act, since the method's decay takes its place there.

    What is written into a weight between two steps (a checkpoint, an average, a clipped norm) is what training goes on
    from, as under any torch optimizer. Write in place under ``torch.no_grad()``: that is always noticed, if it changes
    a weight by more than rounding (4 units in the last place, 64 where x is not a product of factors). What is written
    through ``p.data`` is noticed before the next step where it changes a whole weight, or one of less than 64 KiB, in
    CPU memory; of fewer elements, or on an accelerator, only by ``state_dict()`` and ``finalize()`` if no step came
    between, and the step takes it back. A parameter that is *replaced* in the model is an error at the next step.

    A step whose gradients are not all finite is skipped and counted in ``diagnostics()["skipped_steps"]``. On an
    accelerator, where finding out would mean waiting for the device, such a gradient is replaced by zeros instead.
    """

    def __init__(self, model: nn.Module, base: Optimizer, method: Method, named: dict[str, nn.Parameter], *, steps: int,
                 on_empty: str, fused: bool, processes: Processes | None = None,
                 state_dtype: torch.dtype | None = None) -> None:  # fmt: skip
        holder = BaseOptimizer(base, state_dtype, turned_by_maximize(method))
        method = method.under(adaptive=holder.adaptive)
        shards = Shards((p for group in base.param_groups for p in group["params"]), processes or Processes())
        weights = SparseWeights(named, method.geometry, self, shards)
        rounds = Rounds() if method.mask.replays else None
        training = Training(steps, DecayClock.start(method.decay, len(base.param_groups)), rounds)
        masks = MaskChanges(method, weights, training.decay, holder, on_empty, normed_dims(model))
        self.parts = Parts(method, weights, holder, Presence(model, weights), masks, training, Edits(weights),
                           Freezing(weights), fused)  # fmt: skip
        self._steps: list[Step] = []
        self._unpruned: list[tuple[Tensor, object]] = []
        self._to_agree = True
        super().__init__([dict(group) for group in base.param_groups], dict(base.defaults))

    @apart
    def take_over(self, measured: Callable[[], Sequence[Tensor]] | None) -> None:
        """Before the first step: give every weight its latents, hand them to the base, and prune if that is due.

        Args:
            measured: the scores that data give, one tensor a weight; None where the mask reads none.
        """
        weights, base = self.parts.weights, self.parts.base
        check_shards(self.method, weights, base)
        begin_together(self.parts, self.param_groups)
        self._give_latents(None if measured is None else mean_of_all(measured, weights.shards.processes))

    @while_uncollected
    def _give_latents(self, scores: Sequence[Tensor] | None) -> None:
        weights, base = self.parts.weights, self.parts.base
        for index, x in enumerate(weights.values()):
            geometry = weights.geometry_of([x])
            latents = geometry.init(x)
            rate = geometry.rate(x, latents, adaptive=base.adaptive) if latents else 1.0
            self.state[x] = {**latents, "rate": rate, "signs": diagnostics.pack_signs(x)}
            if scores is not None:
                self.state[x]["score"] = scores[index]
            if latents:
                base.forget(weights.shards.whole(x))
        base.link(self.param_groups, weights)
        first = self.method.mask.sparsity_at(self.parts.training.clock)
        if first is not None:
            values = [x.detach().clone() for x in weights.values()]
            self.parts.masks.prune(first, self.parts.training.clock)
            # A checkpoint of the model may have been loaded before, and the mask that belongs to it will be loaded yet.
            self._unpruned = [(value, self._written(x)) for value, x in zip(values, weights.values(), strict=True)]
            for x in weights.values():
                self.state[x].pop("score", None)  # the mask says it all
        keep_if_due(self.parts)
        self.parts.edits.note()
        check_state_dtype(self.parts, self.param_groups)
        self.parts.presence.claim()

    # -- what it is made of ------------------------------------------------------------------------------------

    @property
    def base(self) -> Optimizer:
        """The optimizer that was wrapped."""
        return self.parts.base.torch

    @property
    def method(self) -> Method:
        """The method, as it is under this base optimizer."""
        return self.parts.method

    @property
    def weights(self) -> SparseWeights:
        """name -> parameter of the weights that may become sparse; of a DTensor, what this process holds of it."""
        return self.parts.weights

    @property
    def masks(self) -> dict[str, Tensor]:
        """name -> bool tensor, True where the weight lives; copies, which may be kept and written into.

        Of a sharded weight it is a DTensor that lies as the weight does.
        """
        weights = self.parts.weights
        return {name: weights.shards.wrap(weights[name], mask.clone()) for name, mask in weights.masks.items()}

    @property
    def steps(self) -> int:
        """How many steps the training will have."""
        return self.parts.training.steps

    @property
    def step_count(self) -> int:
        """How many steps were taken."""
        return self.parts.training.step

    @property
    def skipped_steps(self) -> int:
        """How many steps were skipped, since a gradient was not finite; reading it waits for the device."""
        return self.parts.training.settle_count()

    @property
    def finalized(self) -> bool:
        """Whether the mask is final."""
        return self.parts.training.finalized

    @property
    def round_steps(self) -> int:
        """How many steps a learning-rate schedule built on this optimizer shall have.

        All of ``steps``, unless the method trains in rounds (LTH, WR, LRR): then those of the first round; in later
        rounds the learning rates of the first are set again, whatever the scheduler does in the meantime.
        """
        return self.method.mask.round_steps(self.steps)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters that train densely; the weights to sparsify are chosen at construction."""
        check_group({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if self.parts.base.links:
            self.weights.shards.add(self.param_groups[-1]["params"])
            self.parts.base.add_group(self.param_groups[-1], self.weights)
            self.parts.training.decay.add_group()
            self._steps = []

    # -- the step ----------------------------------------------------------------------------------------------

    @_disable_dynamo
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of training; ``closure`` re-evaluates the model and returns the loss, as in torch.optim.

        Raises:
            RuntimeError: the model holds other parameters than those that are trained, they are elsewhere, another
                SparseOptimizer trains them since, a scheduler was built on the base optimizer or its groups were
                changed, this one's state was cleared or parameters were put into its groups, processes may end one
                after another (``model.join()`` of DDP), or a CUDA graph is being captured.
        """
        self._check_not_captured()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        shards = self.weights.shards
        shards.take_gradients()
        try:
            self._take_step()
        finally:
            shards.drop_gradients()
        return loss

    def _check_not_captured(self) -> None:
        """A graph would play the rates, decay and mask of one step again at every replay, and count none of them."""
        started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        if started and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "step() while a CUDA graph is captured: its replays would repeat this step's learning rate, decay and "
                "mask; capture forward and backward alone, and call step() after each replay()"
            )

    @apart
    @while_uncollected
    def _take_step(self) -> None:
        parts, training = self.parts, self.parts.training
        self._unpruned = []
        parts.presence.check()
        parts.weights.check_kept()
        parts.base.check_members(self.param_groups)
        parts.freezing.look()
        note_gradients(parts)
        if parts.weights.shards.processes.count > 1:
            parts.presence.check_joined()
        parts.base.check_untouched()
        parts.edits.adopt(training.clock)
        if training.rounds is not None and not training.finalized:
            training.rounds.before_step(self.param_groups, self.method.mask, training.clock)
        parts.base.sync(self.param_groups)
        if self._to_agree:
            self._to_agree = False
            agree_on_state(parts, self.param_groups, latents=True)
        if training.step == 0:
            watch(parts)  # only now: a trained network may have been loaded since this optimizer was made
        now = self._now()
        step = self._first_ready(now)
        good = step.finite()
        if isinstance(good, Tensor):
            training.count_on_device(good)
        elif not parts.weights.shards.all(good):
            skip(parts, self.param_groups)
            return
        training.decay.take(now.increments)
        dense = gradients_for_growth(parts)
        step.run(now)
        parts.weights.push_unstepped(now.clock, zeros_stay=parts.base.zeros_stay)
        parts.base.reflect(self.param_groups)
        training.step += 1
        training.skipped_in_a_row = 0
        if not training.finalized:
            changed = change_masks(parts, dense)
            if changed == "round":
                self._steps = []
            keep_if_due(parts)
            observe(parts)
        recur(parts, snapped=step.snaps)
        if is_change_due(parts) or training.step % AGREE_EVERY == 0:
            agree_on_state(parts, self.param_groups)
        parts.edits.note()

    def _now(self) -> Now:
        training = self.parts.training
        lrs = tuple(float(group["lr"]) for group in self.param_groups)
        increments = training.decay.ahead(training.clock, lrs, finalized=training.finalized)
        return Now(training.clock, lrs, increments, self.method.decay.coupled, training.finalized)

    def _first_ready(self, now: Now) -> Step:
        if not self._steps:
            kinds = [kind for kind in STEPS if self.parts.fused or kind not in FUSED]
            self._steps = [kind(self.method, self.weights, self.parts.base) for kind in kinds]
        step = next(step for step in self._steps if step.ready(now))
        if self.parts.base.state_dtype is not None and not step.narrow:
            refuse_step(self.parts, self.param_groups)
        return step

    # -- the end -----------------------------------------------------------------------------------------------

    @apart
    @while_uncollected
    def finalize(self) -> None:
        """Leave exactly ``round((1 - sparsity) · N)`` weights alive and the rest exactly zero; steps keep that mask.

        The weights are those that the model holds now: a best checkpoint or an average that was loaded before gets the
        mask of this training. Called again, it looks again. Where fewer weights than asked for are nonzero to begin
        with (a layer of zeros), a warning names the layers. Others say that there was no step at all, that the schedule
        had not come there yet, that a parametrization makes something less sparse of a weight, and that the model has
        layers that came after the weights were chosen.

        Raises:
            RuntimeError: more steps were skipped than taken, a weight is not finite, or the model holds other
                parameters than those that were trained; nothing has changed then.
        """
        self.weights.shards.take_gradients()
        try:
            finish(self.parts)
            torch.clear_autocast_cache()  # within a region of autocast it would hold weights of before
        finally:
            self.weights.shards.drop_gradients()

    # -- what is going on --------------------------------------------------------------------------------------

    @apart
    def epoch_end(self, score: float | Tensor | None = None) -> None:
        """Tell the method that an epoch is over, with its training accuracy; only PILoT's own schedule reads it.

        Where several processes train together, each of them calls this; of different scores their mean counts.

        Raises:
            TypeError: the score is no number.
            ValueError: the method's decay needs a score and got None, or one that is not finite.
        """
        decay, training = self.method.decay, self.parts.training
        if not decay.reads_score:
            return
        if score is None:
            raise ValueError(f"{type(decay).__name__} reads the training accuracy; call epoch_end(score=accuracy)")
        shards = self.weights.shards
        shards.refresh()
        own = check_number("score", score.item() if isinstance(score, Tensor | np.generic) else score)
        mean = shards.processes.mean(own)  # of its part of the data each process has an accuracy of its own
        norm = diagnostics.l1_norm(self.weights)
        decay.epoch_end(training.decay.state, training.clock, score=mean, l1_norm=norm)

    @apart
    def diagnostics(self) -> dict[str, float]:
        """How training stands; see :func:`~mirrormask.optimizer.diagnostics.diagnose`. Reading waits for the device."""
        lrs = [float(group["lr"]) for group in self.param_groups]
        self.weights.shards.refresh()
        found = diagnostics.diagnose(self.weights, self.parts.base, self.parts.training.decay, lrs)
        return {"step": self.step_count, **found, "skipped_steps": self.skipped_steps}

    def train(self) -> None:
        """Call the base optimizer's ``train()``, if it has one: schedule-free ones need it before training."""
        self._set_mode("train")

    def eval(self) -> None:
        """Call the base optimizer's ``eval()``, if it has one: schedule-free ones need it before evaluation."""
        self._set_mode("eval")

    @apart
    def _set_mode(self, mode: str) -> None:
        parts = self.parts
        parts.edits.adopt(parts.training.clock)
        if parts.base.set_mode(mode):
            parts.base.reflect(self.param_groups)
            parts.weights.push_all(parts.training.clock, zeros_stay=False)
            parts.edits.note()

    # -- saving ------------------------------------------------------------------------------------------------

    @property
    def _state_dict(self) -> StateDict:
        return StateDict(self.method, self.weights, self.parts.base, self.parts.training, self.parts.edits)

    @_disable_dynamo
    @apart
    @while_uncollected
    def state_dict(self) -> dict[str, Any]:
        """All of it, keyed by the model's parameters: latents, masks, the base optimizer's state, the schedule.

        Any other optimizer refuses it: each group names its first parameter twice, first and last.
        """
        self.weights.shards.refresh()
        own = self.state, self.param_groups
        self.state, self.param_groups = self._state_dict.write(self.param_groups)  # type: ignore[assignment]
        try:
            with self.register_state_dict_post_hook(lambda _, packed: marked(packed), prepend=True):
                return super().state_dict()
        finally:
            self.state, self.param_groups = own

    @_disable_dynamo
    @apart
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue where ``state_dict`` was taken, bit for bit; the model's own weights are loaded by the model.

        In which order the model is loaded, this optimizer is made and loaded, does not matter.

        Raises:
            ValueError: it was taken from another model, method or number of steps, or from another optimizer, or
                something of it was lost, or is not finite; nothing has changed then.
        """
        state_dict = copy.copy(state_dict)
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = before(self, state_dict) or state_dict
        self.weights.shards.refresh()
        self._state_dict.read(state_dict, self.param_groups)
        self._steps, self._to_agree = [], True
        for x, (value, written) in zip(self.weights.values(), self._unpruned, strict=False):
            if self._written(x) == written:
                x.copy_(value)
        self.parts.edits.restore(self.parts.training.clock)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _written(self, x: Tensor) -> object:
        """What changes when somebody writes into a weight. Who reads a file into a DTensor's part leaves no version."""
        shards = self.weights.shards
        return fingerprint(x) if is_sharded(shards.whole(x)) else shards.version(x)

    def __getstate__(self) -> dict[str, Any]:
        own = {"parts": self.parts, "_steps": [], "_unpruned": [], "_to_agree": True}
        return {**super().__getstate__(), **own}

    def __repr__(self) -> str:
        return f"SparseOptimizer({self.method!r}, {self.base!r})"
