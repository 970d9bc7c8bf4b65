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
from mirrormask.train import data, init, models
from mirrormask.train.batches import Batches
from mirrormask.train.recipe import Optimizer, Recipe
from mirrormask.train.schedule import make_scheduler

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

    All randomness comes from the recipe's seed and the number of the epoch, so that a run that goes on after
    an interruption draws what it would have drawn.

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
        self.splits = data.load(recipe.data) if splits is None else splits
        if len(self.splits.train) < recipe.batch_size:
            n = len(self.splits.train)
            raise ValueError(f"batch_size={recipe.batch_size} is larger than the {n} training images; lower it")
        if recipe.batch_size % world:
            raise ValueError(f"batch_size={recipe.batch_size} is not divisible by the {world} processes; change one")

        self.epoch = self.step = 0
        torch.manual_seed(recipe.seed)
        options = recipe.model.options
        self.model = models.build(recipe.model.name, self.splits.shape, len(self.splits.classes), **options)
        #: What a person should know of how the run begins.
        self.note = ""
        if recipe.model.init is not None:
            name, classes = recipe.model.name, len(self.splits.classes)
            self.note = init.initialise(self.model, recipe.model.init, name=name, classes=classes)
        self.model.to(device)
        mean, std = self.splits.statistics()
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
        self.parallel = self.accelerator.prepare_model(self.model)
        # Accelerate's optimizer is there for the scaler of fp16; without one it only looks for packages, at every step.
        scaled = self.accelerator.scaler is not None
        prepare = self.accelerator.prepare_optimizer
        self.stepper = prepare(self.optimizer, device_placement=False) if scaled else self.optimizer

    def train_epoch(self, totals: Totals, after_step: Callable[[], None]) -> None:
        """One pass over the training images: every batch is counted in ``totals`` before ``after_step`` is called."""
        self.parallel.train()
        torch.manual_seed(self._seed(self.accelerator.process_index + 1))
        for x, y in self.train.shuffled(self._generator(0)):
            if self.step:
                # Before the step that uses it, so that what is logged after a step is the rate that made it.
                self.scheduler.step()
            scores = self.parallel(x)
            loss = F.cross_entropy(scores, y)
            self.accelerator.backward(loss)
            self.stepper.step()
            self.stepper.zero_grad()
            self.step += 1
            totals.add(loss, scores, y)
            after_step()
        self.epoch += 1

    @torch.no_grad()
    def evaluate(self, batches: Batches) -> tuple[float, float]:
        """Mean loss and accuracy of the model as it is."""
        self.model.eval()
        totals = Totals(self.accelerator.device)
        for x, y in batches.in_order():
            scores = self.model(x)
            totals.add(F.cross_entropy(scores, y), scores, y)
        return totals.means(self.accelerator)

    def finish(self) -> None:
        """Make the model exactly as sparse as asked, and estimate batch norm's statistics on what is left."""
        self.optimizer.finalize()
        if self.recipe.sparsity and any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in self.model.modules()):
            mm.recalibrate(self.model, self._inputs())

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on bit for bit, as tensors and plain containers."""
        scaler = self.accelerator.scaler
        return {
            "epoch": self.epoch,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {k: v for k, v in self.scheduler.state_dict().items() if k != "lr_lambdas"},
            "scaler": scaler.state_dict() if scaler is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict` of a session with the same recipe."""
        self.epoch, self.step = state["epoch"], state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict({**state["scheduler"], "lr_lambdas": [None] * len(self.optimizer.param_groups)})
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def _inputs(self) -> Iterator[Tensor]:
        batches = self.train.shuffled(self._generator(0))
        return (x for x, _ in islice(batches, RECALIBRATION_BATCHES))

    def _seed(self, stream: int) -> int:
        # Sequences of one seed are independent of each other and of the next seed's, which seed + epoch is not.
        return int(np.random.SeedSequence([self.recipe.seed, self.epoch, stream]).generate_state(1, np.uint64)[0] >> 1)

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
