"""A callback for Lightning's Trainer, of the package ``lightning`` or of ``pytorch_lightning``."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from mirrormask import checks
from mirrormask.integrations.callback import Sparsifying
from mirrormask.integrations.schedulers import drive, release
from mirrormask.integrations.wrapping import finish, mask_print, warn_of_rounds, zero_share
from mirrormask.masks.saliency import Loss
from mirrormask.methods import Method
from mirrormask.optimizer import SparseOptimizer, apply_masks
from mirrormask.selection import Weights

if TYPE_CHECKING:
    from lightning.pytorch import Callback
else:
    try:
        from lightning.pytorch import Callback
    except ImportError:
        Callback = checks.require("pytorch_lightning", "lightning", "mirrormask.integrations.lightning").Callback

__all__ = ["SparsityCallback", "stepping_batches"]

#: In this callback's part of a checkpoint: the mask that the metrics in it belong to.
MASK = "mask"


class SparsityCallback(Sparsifying, Callback):
    """Train with ``mm.sparsify`` under Lightning, with nothing else to do.

    The optimizer of ``configure_optimizers`` is wrapped, for the trainer's own number of steps, before the first step
    and before a checkpoint is loaded into it; its scheduler, built or not, drives what was wrapped. After the last step
    it is finalized: before the last validation and the last checkpoint. The share of zeros is logged as ``sparsity``,
    into the progress bar too. The optimizer's state goes through Lightning's checkpoints; ``fit(ckpt_path=...)`` goes
    on bit for bit where the data does.

    A ModelCheckpoint and an EarlyStopping compare models of one mask only: each validation after the mask has changed
    starts their search for the best one anew. What StochasticWeightAveraging or WeightAveraging put into the model, or
    into a checkpoint, gets the final mask once there is one.

    The trainer calls this callback after all others but those that save.

    Args:
        method: from :mod:`mirrormask.methods`, such as ``mm.methods.mirror(0.9)``.
        weights: which parameters may become sparse, as in :func:`mirrormask.select_weights`.
        steps: how many optimizer steps there will be; only where the module steps by itself
            (``automatic_optimization = False``), and the trainer cannot know.
        score: for methods whose decay reads the training accuracy (PILoT's own schedule): a function that returns it,
            in [0, 1], called at the end of every epoch.
        batches, loss_fn, fused, on_empty: as in :func:`mirrormask.sparsify`.

    Raises:
        TypeError: the method is none.
        ValueError: at the start of ``fit``, before the first step: two of these callbacks, several optimizers or none,
            one that lacks the weights or is wrapped already, a trainer without an end, DeepSpeed or FSDP.

    Example:
        >>> import mirrormask as mm
        >>> callback = SparsityCallback(mm.methods.mirror(0.9))
        >>> callback  # L.Trainer(max_epochs=3, callbacks=[callback]).fit(module, loader)
        SparsityCallback('mirror', sparsity=0.9)
    """

    begins = "trainer.fit()"

    def __init__(
        self,
        method: Method,
        *,
        weights: Weights | None = None,
        steps: int | None = None,
        score: Callable[[], float] | None = None,
        batches: Iterable[Any] | None = None,
        loss_fn: Loss | None = None,
        fused: bool = True,
        on_empty: str = "warn",
    ) -> None:
        super().__init__(
            method, weights=weights, score=score, batches=batches, loss_fn=loss_fn, fused=fused, on_empty=on_empty
        )
        self._for_steps(steps)
        self._epochs: int | None = None
        self._loaded = ""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before anything else of ``fit``: check the trainer, and come after all callbacks but those that save."""
        if stage != "fit":
            return
        check_trainer(trainer)
        self._optimizer, self._loaded = None, ""
        # Before a StochasticWeightAveraging adds an epoch without steps, for the statistics of batch norm.
        self._epochs = trainer.max_epochs
        saving = [one for one in trainer.callbacks if is_a(one, "Checkpoint")]
        others = [one for one in trainer.callbacks if one is not self and one not in saving]
        # A new list: the trainer is going over the old one.
        trainer.callbacks = [*others, self, *saving]

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The optimizer is there, and no state has been loaded into it: wrap it."""
        optimizers = trainer.optimizers
        if len(optimizers) != 1 or not isinstance(optimizers[0], torch.optim.Optimizer):
            raise ValueError(
                f"configure_optimizers returned {len(optimizers)} optimizers, and this callback wraps one; call "
                "mm.sparsify in configure_optimizers on the one that holds the weights, and finalize() in on_train_end"
            )
        base = optimizers[0]
        if isinstance(base, SparseOptimizer):
            raise ValueError(
                "configure_optimizers returned an optimizer of mm.sparsify already; return the base optimizer, or "
                "leave out the SparsityCallback and call finalize() yourself"
            )
        steps = self.wrapping.steps
        if steps is None:
            steps = stepping_batches(trainer, pl_module, self._epochs)
        elif pl_module.automatic_optimization:
            raise ValueError(
                f"steps={steps} is for modules with automatic_optimization = False; leave it out, the trainer knows"
            )
        schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
        # A LearningRateFinder has searched with a scheduler of its own, whose mark stays on the optimizer.
        if schedulers or any(is_a(one, "LearningRateFinder") for one in trainer.callbacks):
            release(base)
        self._optimizer = self.wrapping.wrap(pl_module, base, steps)
        for scheduler in schedulers:
            drive(scheduler, base, self._optimizer)
            warn_of_rounds(self._optimizer)
        trainer.strategy.optimizers = [self._optimizer]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Everything is loaded; without a checkpoint the metrics belong to the mask of now."""
        optimizer = self.optimizer
        if not optimizer.finalized and optimizer.step_count == 0 < trainer.global_step:
            raise ValueError(
                f"the trainer goes on at step {trainer.global_step} and its optimizer has taken none; a checkpoint "
                "needs the optimizer's state (save_weights_only=False), and a second fit() a new Trainer"
            )
        self._print = self._loaded or mask_print(optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """The mask that a checkpoint's metrics belong to may have changed between their validation and the saving."""
        self._loaded = state_dict[MASK]

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """An average that takes the model's place for an epoch of statistics gets the final mask first."""
        if self.optimizer.finalized:
            apply_masks(pl_module, self.optimizer.masks)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """After the last step: the final mask, before anything is validated or saved."""
        optimizer = self.optimizer
        last = trainer.global_step >= optimizer.steps and not optimizer.finalized
        if last:
            finish(optimizer)
        if last or trainer.global_step % max(trainer.log_every_n_steps, 1) == 0:
            log: Any = getattr(self, "log")  # noqa: B009 -- the trainer gives it to its callbacks
            log("sparsity", zero_share(optimizer), prog_bar=True)

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """An average that is validated in the model's place is validated as it will be."""
        if trainer.state.fn == "fit" and self._optimizer is not None and self._optimizer.finalized:
            apply_masks(pl_module, self._optimizer.masks)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """If the mask is another than at the last validation, no earlier model was better."""
        if self._optimizer is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        now = mask_print(self._optimizer)
        if now != self._print:
            for callback in trainer.callbacks:
                search_anew(callback)
        self._print = now

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Tell the decay, and finalize where another callback has ended the training, before anything is saved."""
        optimizer = self.optimizer
        if not optimizer.finalized:
            self.wrapping.epoch_end(optimizer)
            if trainer.should_stop and trainer.fit_loop._can_stop_early:
                finish(optimizer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Averages are in the model by now: whatever it holds gets the final mask."""
        averaged = any(is_a(one, "WeightAveraging", "StochasticWeightAveraging") for one in trainer.callbacks)
        finish(self.optimizer, put_back="" if averaged else "the model")

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """A training without a step (its ``max_time`` was over) has had no end of training."""
        if not self.optimizer.finalized:
            finish(self.optimizer)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """A checkpoint after the end is sparse, even where a callback has put an average of weights into it."""
        if self._optimizer is None or not self._trained(pl_module):
            return
        # Not by state_dict(): of two callbacks that have one Lightning would say first that their keys are alike. That
        # it is there at all lets Lightning warn whoever goes on without this callback.
        if "callbacks" in checkpoint:
            checkpoint["callbacks"][self.state_key] = {MASK: self._print}
        if not self._optimizer.finalized:
            return
        tensors = checkpoint["state_dict"]
        for name, mask in self._optimizer.masks.items():
            if isinstance(tensors.get(name), torch.Tensor):
                tensors[name] = tensors[name].masked_fill(~mask.to(tensors[name].device), 0.0)

    def _trained(self, pl_module: Any) -> bool:
        """Whether these are the parameters that were trained: a trainer may be given another module afterwards."""
        held = dict(pl_module.named_parameters())
        return all(held.get(name) is x for name, x in self.optimizer.weights.items())


def stepping_batches(trainer: Any, pl_module: Any, epochs: int | None) -> int:
    """How many optimizer steps a trainer will take: an incomplete last group of batches of an epoch makes a step too.

    Args:
        trainer: within ``fit``.
        pl_module: the module that it trains.
        epochs: ``trainer.max_epochs`` as the user has set it.

    Raises:
        ValueError: the module steps by itself, or nothing says when training ends.
    """
    if not pl_module.automatic_optimization:
        raise ValueError(
            "the module has automatic_optimization = False, so that only you know how many steps it takes; pass steps="
        )
    limit = math.inf if trainer.max_steps in (-1, None) else trainer.max_steps
    total: float = math.inf
    if epochs not in (-1, None):
        _ = trainer.estimated_stepping_batches  # which loads the data, and with it the number of batches
        batches = trainer.num_training_batches
        changing = [one for one in trainer.callbacks if is_a(one, "GradientAccumulationScheduler")]
        every: Callable[[int], int] = (
            changing[0].get_accumulate_grad_batches if changing else lambda _: int(trainer.accumulate_grad_batches)
        )
        if math.isfinite(batches):
            total = sum(math.ceil(batches / every(epoch)) for epoch in range(int(epochs or 0)))
    steps = min(limit, total)
    if not math.isfinite(steps):
        raise ValueError(
            "nothing says how many steps this trainer will take, and schedules are fractions of the whole; give it "
            "max_steps, or max_epochs and data that has a length"
        )
    return int(steps)


def check_trainer(trainer: Any) -> None:
    """Refuse, before anything is trained, what would go wrong.

    Raises:
        ValueError: two callbacks that prune, or an optimizer that another library owns.
    """
    count = sum(isinstance(callback, SparsityCallback) for callback in trainer.callbacks)
    if count > 1:
        raise ValueError(
            f"the trainer holds {count} SparsityCallbacks; add one: two masks on one weight undo each other"
        )
    if any(is_a(callback, "ModelPruning") for callback in trainer.callbacks):
        raise ValueError(
            "the trainer holds a ModelPruning beside the SparsityCallback: two masks on one weight undo each other; "
            "leave out one of them"
        )
    if is_a(trainer.strategy, "FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"):
        raise ValueError(
            f"{type(trainer.strategy).__name__} steps shards of the parameters, which this callback does not wrap; "
            "train with DDP or on one device"
        )


def search_anew(callback: Any) -> None:
    """Let a ModelCheckpoint or an EarlyStopping take the next model for the best one, whatever came before."""
    if is_a(callback, "ModelCheckpoint") and callback.monitor is not None and callback.best_k_models:
        worst = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        # The files stay what they are, until a better model takes their place.
        callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
        callback.kth_value = callback.best_model_score = worst
    elif is_a(callback, "EarlyStopping"):
        worst = torch.tensor(math.inf if callback.mode == "min" else -math.inf)
        callback.best_score, callback.wait_count = worst, 0


def is_a(thing: Any, *names: str) -> bool:
    """Whether a class of one of these names is among its ancestors: Lightning comes in two packages."""
    return any(kind.__name__ in names for kind in type(thing).__mro__)
