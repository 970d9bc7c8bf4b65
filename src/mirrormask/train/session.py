"""Everything that one run holds in memory: data, model, optimizer, and where it stands."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mirrormask as mm
from mirrormask import checks
from mirrormask.flats import which_not_finite
from mirrormask.train import batch_norm, data, init, models, parallel, randomness
from mirrormask.train.batches import Batches
from mirrormask.train.origin import digest_of
from mirrormask.train.recipe import Optimizer, Recipe
from mirrormask.train.schedule import make_scheduler
from mirrormask.train.trained import load_teacher

__all__ = ["Session", "Totals"]

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
}
#: Batches from which the statistics of batch norm are estimated after pruning.
RECALIBRATION_BATCHES = 100
#: Batches for methods that score weights on data before the first step.
SCORING_BATCHES = 10


class Totals:
    """Loss and accuracy summed over batches, on the device, so that a step waits for nothing."""

    def __init__(self, device: torch.device) -> None:
        # float32 counts exactly only to 2^24; Apple's GPUs have nothing wider.
        self.sums = torch.zeros(3, device=device, dtype=torch.float32 if device.type == "mps" else torch.float64)

    def add(self, loss: Tensor, scores: Tensor, y: Tensor) -> None:
        """Count one batch; one whose loss is not finite counts nowhere, as its step was skipped."""
        loss, n = loss.detach().to(self.sums), len(y)
        correct = (scores.detach().argmax(1) == y).sum()
        batch = torch.stack([loss * n, correct.to(loss), torch.full_like(loss, n)])
        self.sums += torch.where(torch.isfinite(loss), batch, 0.0)

    def take(self, other: Totals) -> None:
        """Move what ``other`` has counted into this one."""
        self.sums += other.sums
        other.sums.zero_()

    def means(self, accelerator: Any) -> tuple[float, float]:
        """Mean loss and accuracy over all processes; NaN if nothing was counted."""
        loss, correct, n = accelerator.reduce(self.sums, "sum").tolist()
        return (loss / n, correct / n) if n else (float("nan"), float("nan"))


class Session:
    """The parts of a run, made from its recipe; nothing is written.

    All randomness comes from the recipe's seed and the number of the epoch, and in the middle of an epoch from states
    that a checkpoint holds, so that a run that goes on after an interruption draws what it would have drawn.

    Args:
        recipe: the run.
        splits: the recipe's data, where the caller has read it already.

    Raises:
        TypeError, ValueError: anything in the recipe that does not fit: all of it is found here, before the
            first step.
    """

    def __init__(self, recipe: Recipe, splits: data.Splits | None = None) -> None:
        self.recipe = recipe
        self.accelerator = _accelerator(recipe.precision, recipe.device)
        device, rank, world = self.accelerator.device, self.accelerator.process_index, self.accelerator.num_processes
        #: How the model lies on the processes: ``ddp``, ``fsdp`` or, in one process, ``none``.
        self.kind = (recipe.parallel or "ddp") if world > 1 else "none"
        if self.kind == "fsdp" and recipe.precision == "fp16":
            raise ValueError("precision='fp16' scales the loss, which parallel='fsdp' does not; take bf16, or ddp")
        if splits is None:
            with self.accelerator.local_main_process_first():  # the others find what it has decoded
                splits = data.load(recipe.data)
        self.splits = splits
        if len(self.splits.train) < recipe.batch_size:
            n = len(self.splits.train)
            raise ValueError(f"batch_size={recipe.batch_size} is larger than the {n} training images; lower it")
        if recipe.batch_size % world:
            raise ValueError(f"batch_size={recipe.batch_size} is not divisible by the {world} processes; change one")

        self.epoch = self.step = 0
        self.order: torch.Generator | None = None
        self.position: dict[str, Any] | None = None
        randomness.seed(recipe.seed)
        options = recipe.model.options
        self.model = models.build(recipe.model.name, self.splits.shape, len(self.splits.classes), **options)
        #: What a person should know of how the run begins.
        self.note = ""
        if world == 1 and recipe.parallel is not None:
            self.note = f"parallel={recipe.parallel!r} and one process: it trains as one"
        if recipe.model.init is not None:
            name, classes = recipe.model.name, len(self.splits.classes)
            self.note = init.initialise(self.model, recipe.model.init, name=name, classes=classes)
        self.model.to(device)
        teacher = load_teacher(recipe, self.splits.shape, len(self.splits.classes), device)
        self.teacher_digest = "" if teacher is None else digest_of(teacher.state_dict())
        self.taught: mm.Distillation | None = None
        if teacher is not None:
            self.taught = mm.distill(self.model, teacher, temperature=recipe.teacher.temperature)
        if world > 1:
            batch_norm.synchronize(self.model)
        if self.kind == "fsdp":
            parallel.shard(self.model)
        self.mean, self.std = mean, std = self.splits.statistics()
        convolves = any(isinstance(module, nn.Conv2d) for module in self.model.modules())
        shared: dict[str, Any] = {"device": device, "rank": rank, "world": world, "channels_last": convolves}
        augmented: dict[str, Any] = {"crop": recipe.data.crop, "flip": recipe.data.flip}
        self.train = Batches(self.splits.train, mean, std, recipe.batch_size, **shared, **augmented)
        self.test = Batches(self.splits.test, mean, std, recipe.batch_size, **shared)
        held_out = self.splits.validation
        self.validation = Batches(held_out, mean, std, recipe.batch_size, **shared) if held_out else None

        self.steps = recipe.epochs * len(self.train)
        base = make_optimizer(recipe.optimizer, self.model)
        method = make_method(recipe)
        first = None
        if method.reads_data:
            # Not this process's share: all must come to the same mask.
            whole = Batches(self.splits.train, mean, std, recipe.batch_size, device=device, channels_last=convolves)
            first = list(islice(whole.shuffled(self._generator(1)), SCORING_BATCHES))
        self.optimizer = mm.sparsify(self.model, base, method, steps=self.steps, batches=first)
        # A method that trains in rounds plays the rates of its first round again by itself.
        self.scheduler = make_scheduler(self.optimizer, recipe.schedule, self.optimizer.round_steps)
        # FSDP has its hooks on the model; in evaluation mode Accelerate adds autocast to it, and no DDP.
        self.parallel = self.accelerator.prepare_model(self.model, evaluation_mode=self.kind == "fsdp")
        # Accelerate's optimizer is there for the scaler of fp16; without one it only looks for packages, at every step.
        scaled = self.accelerator.scaler is not None
        prepare = self.accelerator.prepare_optimizer
        self.stepper = prepare(self.optimizer, device_placement=False) if scaled else self.optimizer

    def train_epoch(
        self, totals: Totals, after_backward: Callable[[Tensor], None], after_step: Callable[[], None]
    ) -> None:
        """What is left of a pass over the training images.

        Args:
            totals: counts every batch, before ``after_step`` is called.
            after_backward: is called with each loss after the step, while the gradients are still there.
            after_step: is called when a step is complete, and may leave the epoch with an exception: what
                :meth:`state_dict` and :meth:`position_dict` give then is enough to go on.
        """
        self.parallel.train()
        self.order = self._generator(0)
        if self.position is None or self.position["random"] is None:
            randomness.seed(self._seed(self.accelerator.process_index + 1, *([self.done] if self.done else [])))
        order = None if self.position is None else self.position["order"]
        self.position = None
        for x, y in self.train.shuffled(self.order, skip=self.done, state=order):
            if self.step:
                # Before the step that uses it, so that what is logged after a step is the rate that made it.
                self.scheduler.step()
            scores = self.parallel(x)
            loss = self._loss(scores, x, y)
            self.accelerator.backward(loss)
            self.stepper.step()
            after_backward(loss)
            self.stepper.zero_grad()
            self.step += 1
            totals.add(loss, scores, y)
            after_step()

    def _loss(self, scores: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Cross entropy, and the teacher's share of the loss."""
        share, smoothing = self.recipe.teacher.weight, self.recipe.label_smoothing
        if self.taught is None:
            return F.cross_entropy(scores, y, label_smoothing=smoothing)
        with self.accelerator.autocast():
            drawn = self.taught(scores, x)
        return (
            drawn if share == 1 else share * drawn + (1 - share) * F.cross_entropy(scores, y, label_smoothing=smoothing)
        )

    @torch.no_grad()
    def evaluate(self, batches: Batches, after_batch: Callable[[], None] | None = None) -> tuple[float, float]:
        """Mean loss and accuracy of the model as it is; ``after_batch`` may leave with an exception."""
        self.model.eval()
        totals = Totals(self.accelerator.device)
        for x, y in batches.in_order(together=self.kind == "fsdp"):
            scores = self.model(x)
            scores = scores[: len(y)]
            if len(y):
                totals.add(F.cross_entropy(scores, y), scores, y)
            if after_batch is not None:
                after_batch()
        return totals.means(self.accelerator)

    def whole_model(self) -> nn.Module | None:
        """The model with whole weights: itself, or under FSDP one of its kind, on the main process alone.

        Every process must call this.
        """
        if self.kind != "fsdp":
            return self.model
        main = self.accelerator.is_main_process
        weights = parallel.whole(self.model.state_dict(), keep=main)
        if not main:
            return None
        with torch.random.fork_rng():
            name, options = self.recipe.model.name, self.recipe.model.options
            model = models.build(name, self.splits.shape, len(self.splits.classes), **options)
        model.load_state_dict(weights)
        return model.to(self.accelerator.device)

    def finish(self) -> None:
        """Make the model exactly as sparse as asked, and estimate batch norm's statistics on what is left.

        The dense network's too, or after few steps it would be compared by running averages of before it was trained.
        """
        self.optimizer.finalize()
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()):
            mm.recalibrate(self.model, self._inputs())

    def state_dict(self) -> dict[str, Any]:
        """What all processes share of what a run needs to go on bit for bit, as tensors and plain containers.

        Every process must call this; under FSDP the main one alone gets the tensors, whole.
        """
        scaler, main = self.accelerator.scaler, self.accelerator.is_main_process
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": parallel.whole(dict(self.model.state_dict()), keep=main),
            "optimizer": parallel.whole(self.optimizer.state_dict(), keep=main),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "scaler": dict(scaler.state_dict()) if scaler is not None else None,
        }

    def position_dict(self) -> dict[str, Any]:
        """What each process has of its own: its random states, and how the rest of the epoch will be drawn."""
        order = self.order.get_state() if self.order is not None and self.done else None
        return {"random": randomness.state(), "order": order}

    @property
    def done(self) -> int:
        """Steps of the epoch under way."""
        return self.step - self.epoch * len(self.train)

    def load_state_dict(self, state: dict[str, Any], position: dict[str, Any] | None) -> None:
        """Go on from :meth:`state_dict` of a session with the same recipe.

        Args:
            state: of all processes.
            position: of this one. Where it was not among them, its ``random`` is None, and in the middle of an epoch
                random states begin anew; the order of the images is that of all.

        Raises:
            ValueError, and whatever a model or optimizer raises: the state does not fit.
        """
        epoch, step = state["epoch"], state["step"]
        checks.check_int("epoch", epoch, low=0)
        checks.check_int("step", step, low=0)
        first = epoch * len(self.train)
        if epoch > self.recipe.epochs or not first <= step <= min(first + len(self.train), self.steps):
            raise ValueError(f"step {step} is not one of epoch {epoch} of {self.recipe.epochs}")
        if step > first and (position is None or position["order"] is None):
            raise ValueError("it does not say how its epoch goes on")
        for name, tensor in self.model.state_dict().items():
            saved = state["model"][name]
            if saved.shape != tensor.shape or saved.dtype != tensor.dtype:
                there = f"{tuple(saved.shape)} of {saved.dtype} there, {tuple(tensor.shape)} of {tensor.dtype} here"
                raise ValueError(f"{name!r} is {there}")
        numbers = {name: tensor for name, tensor in state["model"].items() if tensor.is_floating_point()}
        bad = [name for name, is_bad in zip(numbers, which_not_finite(list(numbers.values())), strict=True) if is_bad]
        if bad:
            raise ValueError(f"{checks.few(bad)} {'is' if len(bad) == 1 else 'are'} not finite: it had diverged")
        if step > first and position is not None:
            torch.Generator().set_state(position["order"])
        if self.kind == "fsdp":
            from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

            set_model_state_dict(self.model, state["model"], options=StateDictOptions(full_state_dict=True))
        else:
            self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(self.optimizer.param_groups)})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if position is not None and position["random"] is not None:
            randomness.use(position["random"])
        self.epoch, self.step = epoch, step
        self.position = position if step > first else None

    def _inputs(self) -> Iterator[Tensor]:
        batches = self.train.shuffled(self._generator(0))
        return (x for x, _ in islice(batches, RECALIBRATION_BATCHES))

    def _seed(self, *stream: int) -> int:
        # Sequences of one seed are independent of each other and of the next seed's, which seed + epoch is not.
        words = np.random.SeedSequence([self.recipe.seed, self.epoch, *stream]).generate_state(1, np.uint64)
        return int(words[0] >> 1)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed(stream))


def make_method(recipe: Recipe) -> Any:
    """The method of a recipe.

    Raises:
        TypeError, ValueError: the method is unknown, or it does not take an option or a value.
    """
    name, options = recipe.method.name, recipe.method.options
    function = mm.methods.get(name)
    checks.check_options("method", name, function, options)
    return function(**options) if name == "dense" else function(recipe.sparsity, **options)


def make_optimizer(options: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    """The torch optimizer of a recipe, over all parameters of the model.

    Raises:
        TypeError, ValueError: an option that the optimizer does not take.
    """
    arguments: dict[str, Any] = {"lr": options.lr, "weight_decay": options.weight_decay}
    if options.momentum is not None:
        arguments["momentum"] = options.momentum
    if options.nesterov:
        arguments["nesterov"] = True
    try:
        make: Any = OPTIMIZERS[options.name]
        optimizer: torch.optim.Optimizer = make(model.parameters(), **arguments, **options.options)
    except TypeError as error:
        raise TypeError(f"optimizer.options={options.options!r} do not fit {options.name!r}: {error}") from error
    return optimizer


def _accelerator(precision: str, device: str | None = None) -> Any:
    there = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device not in (None, "cpu") and (there is None or there.type != device):
        raise ValueError(f"device={device!r} is not on this machine, which has {there.type if there else 'cpu'}")
    accelerate = checks.require("accelerate", "train", "training")
    mixed = "no" if precision == "fp32" else precision
    state = accelerate.state.AcceleratorState
    if state._shared_state and state._shared_state.get("_mixed_precision") != mixed:
        # Accelerate keeps one precision a process; runs after each other may each have their own.
        state._reset_state()
    # Without the flag Accelerate joins processes only if they have GPUs.
    return accelerate.Accelerator(mixed_precision=mixed, cpu=device == "cpu" or there is None)
