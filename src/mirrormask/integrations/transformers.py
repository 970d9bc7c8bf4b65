"""A callback for the Hugging Face Trainer.

A TrainerCallback is told of everything but the moment between the optimizer and its scheduler, and is never given its
trainer. So importing this module puts a shell around ``Trainer.train``: for a trainer that holds a
:class:`SparsityCallback` it stands in for ``create_scheduler`` and ``log`` of that one trainer while it trains; any
other trainer is passed through untouched.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

from mirrormask import checks
from mirrormask.integrations.callback import Sparsifying
from mirrormask.integrations.schedulers import drive, release
from mirrormask.integrations.wrapping import finish, mask_print, rate_again, warn_of_rounds, zero_share
from mirrormask.optimizer import SparseOptimizer
from mirrormask.optimizer.arguments import unwrapped

checks.require("transformers", "transformers", "mirrormask.integrations.transformers")
from transformers import Trainer, TrainerCallback  # noqa: E402

__all__ = ["SparsityCallback"]

#: What the state of a trainer remembers of the best model so far; the last one is newer than 4.48.
BEST = ("best_metric", "best_model_checkpoint", "best_global_step")
#: In the row of an evaluation in a trainer's log_history: the mask that its metrics belong to.
MASK = "mask"


class SparsityCallback(Sparsifying, TrainerCallback):  # type: ignore[misc]
    """Train with ``mm.sparsify`` in a Hugging Face Trainer, with nothing else to do.

    The trainer's optimizer is wrapped for the trainer's own number of steps (gradient accumulation and epochs
    counted) before the scheduler is built, and finalized after the last step: before the last evaluation, the last
    checkpoint, and whatever is saved then. The share of zeros appears in every log as ``sparsity``. The optimizer's
    state goes through the trainer's checkpoints; ``resume_from_checkpoint`` goes on bit for bit.

    With ``load_best_model_at_end`` models are compared only with models of the same mask: each evaluation after the
    mask has changed starts the search for the best one (and the patience of an EarlyStoppingCallback) anew. A best
    model, an average or anything else that is in the model at the end gets the final mask, with a warning where it
    loses something by that.

    Args:
        method: from :mod:`mirrormask.methods`, such as ``mm.methods.mirror(0.9)``.
        weights: which parameters may become sparse, as in :func:`mirrormask.select_weights`.
        score: for methods whose decay reads the training accuracy (PILoT's own schedule): a function that returns it,
            in [0, 1], called at the end of every epoch.
        batches, loss_fn, fused, on_empty: as in :func:`mirrormask.sparsify`.

    Raises:
        TypeError: the method is none.
        ValueError: at the start of training, before the first step: two of these callbacks, an optimizer that lacks the
            weights or is wrapped already, ``auto_find_batch_size``, DeepSpeed or FSDP, or a checkpoint without the
            optimizer's state.

    Example:
        >>> import mirrormask as mm
        >>> callback = SparsityCallback(mm.methods.mirror(0.9))
        >>> callback  # Trainer(model, args, train_dataset=..., callbacks=[callback]).train()
        SparsityCallback('mirror', sparsity=0.9)
    """

    begins = "trainer.train()"
    _drives = False

    @contextlib.contextmanager
    def driving(self, trainer: Any) -> Iterator[None]:
        """Stand in for two methods of this trainer; afterwards it is as it was, and its model has the final mask."""
        check_trainer(trainer)
        create_scheduler, log = trainer.create_scheduler, trainer.log
        replaced = getattr(trainer, "_created_lr_scheduler", False)  # by another of its own, before the first step

        @functools.wraps(create_scheduler)
        def create(num_training_steps: int, optimizer: Any = None) -> Any:
            before, _ = unwrapped(trainer.optimizer)
            if trainer.lr_scheduler is not None or replaced:
                release(before)
            self._wrap(trainer, num_training_steps)
            if trainer.lr_scheduler is not None and before is not self._optimizer:
                drive(trainer.lr_scheduler, before, self.optimizer)
                warn_of_rounds(self.optimizer)
            return create_scheduler(self.optimizer.round_steps, None if optimizer is None else trainer.optimizer)

        @functools.wraps(log)
        def tell(logs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if self._optimizer is not None:
                logs = {**logs, "sparsity": zero_share(self._optimizer)}
                rate = rate_again(self._optimizer)
                if rate is not None and "learning_rate" in logs:
                    logs["learning_rate"] = rate
            known = len(trainer.state.log_history)
            told = log(logs, *args, **kwargs)
            if self._optimizer is not None:
                for row in trainer.state.log_history[known:]:
                    if any(name.startswith("eval_") for name in row):
                        row[MASK] = mask_print(self._optimizer)  # into checkpoints, and not into dashboards
            return told

        own = {"create_scheduler": create, "log": tell}
        before = {name: vars(trainer)[name] for name in own if name in vars(trainer)}
        vars(trainer).update(own)
        self._drives = True
        try:
            yield
            if self._optimizer is not None:  # another callback's on_train_end may have put an average into the model
                finish(self._optimizer, put_back="what a callback put into the model at the end")
        finally:
            self._drives = False
            for name in own:
                del vars(trainer)[name]
            vars(trainer).update(before)

    def _wrap(self, trainer: Any, steps: int) -> None:
        own, wrapper = unwrapped(trainer.optimizer)
        if own is not self._optimizer:
            self._optimizer = None
            if isinstance(own, SparseOptimizer):
                raise ValueError(
                    "the trainer's optimizer is one of mm.sparsify already; pass the base optimizer, or leave out the "
                    "SparsityCallback and call finalize() yourself"
                )
            # While the trainer is in Accelerate's hands already, mm.sparsify puts its own into that wrapper.
            self._optimizer = self.wrapping.wrap(trainer.model, trainer.optimizer, steps)
            if wrapper is None:
                trainer.optimizer = self._optimizer
        elif isinstance(own, SparseOptimizer) and not own.finalized and own.steps != steps:
            raise ValueError(
                f"this trainer began to train for {own.steps} steps and shall go on for {steps}; schedules are "
                "fractions of the whole, so make a new Trainer for another number"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Everything is loaded: see to it that what will step is what was wrapped."""
        inner, _wrapper = unwrapped(_.get("optimizer"))  # as the trainer hands it to callbacks
        if self._optimizer is None or inner is not self._optimizer:
            raise ValueError(
                "the trainer's optimizer was not wrapped: it never came to create_scheduler, or replaced the optimizer "
                "afterwards; let your Trainer call create_scheduler(num_training_steps) after create_optimizer()"
            )
        taken = self._optimizer.step_count
        if not self._optimizer.finalized and (taken > state.global_step or (taken == 0 < state.global_step)):
            raise ValueError(
                f"the trainer goes on at step {state.global_step} and its optimizer has taken {taken} steps; a "
                "checkpoint needs its optimizer.pt (save_only_model=False), and a training that was broken off needs a "
                "new Trainer or resume_from_checkpoint"
            )
        # The mask may have changed between the last evaluation and the checkpoint.
        known = [row[MASK] for row in state.log_history if MASK in row]
        self._print = known[-1] if known and taken else mask_print(self._optimizer)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """After the last step: the final mask, before anything is evaluated or saved."""
        if state.global_step >= state.max_steps:
            finish(self.optimizer)
        if control.should_evaluate:
            self._search_anew(state)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the decay, and finalize where another callback has ended the training."""
        if not self.optimizer.finalized:
            self.wrapping.epoch_end(self.optimizer)
        if control.should_training_stop and not self.optimizer.finalized:
            finish(self.optimizer)
        if control.should_evaluate:
            self._search_anew(state)

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Before an evaluation is judged, which another callback may have asked for after :meth:`on_step_end`."""
        if self._drives:
            self._search_anew(state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The best model may have been loaded: whatever the model holds gets the final mask."""
        finish(self.optimizer, put_back=state.best_model_checkpoint or "the model")

    def _search_anew(self, state: Any) -> None:
        """At an evaluation: if the mask is another than at the last one, no earlier model was better."""
        now = mask_print(self.optimizer)
        if now != self._print:
            for name in BEST:
                if hasattr(state, name):
                    setattr(state, name, None)
        self._print = now


def check_trainer(trainer: Any) -> None:
    """Refuse, before anything is trained, what would go wrong.

    Raises:
        ValueError: two callbacks, a batch size that is still to be found, or an optimizer that another library owns.
    """
    count = sum(isinstance(callback, SparsityCallback) for callback in trainer.callback_handler.callbacks)
    if count > 1:
        raise ValueError(
            f"the trainer holds {count} SparsityCallbacks; add one: two masks on one weight undo each other"
        )
    if trainer.args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size=True may start again with another number of steps after some were taken; set "
            "per_device_train_batch_size to one that fits"
        )
    for name, library in (("is_deepspeed_enabled", "DeepSpeed"), ("is_fsdp_enabled", "FSDP")):
        if getattr(trainer, name, False):
            raise ValueError(
                f"{library} steps shards of the parameters, which this callback does not wrap; train with DDP or on "
                "one device"
            )


def _install() -> None:
    plain = Trainer.train
    if hasattr(plain, "_mirrormask"):
        return

    @functools.wraps(plain)
    def train(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = [one for one in self.callback_handler.callbacks if isinstance(one, SparsityCallback)]
        if not found:
            return plain(self, *args, **kwargs)
        with found[0].driving(self):
            return plain(self, *args, **kwargs)

    train._mirrormask = True  # type: ignore[attr-defined]
    setattr(Trainer, "train", train)  # noqa: B010


_install()
