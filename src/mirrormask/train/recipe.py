"""A recipe: everything that decides what a training run does, in one frozen tree that a YAML file can hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirrormask import checks
from mirrormask.train import intervals

__all__ = ["Data", "Method", "Model", "Optimizer", "Recipe", "Schedule"]

#: The learning rate that a recipe without one gets, by optimizer.
LEARNING_RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3}
DATA = ("cifar10", "cifar100", "digits", "fashion-mnist")
SCHEDULES = ("constant", "cosine", "linear")
PRECISIONS = ("bf16", "fp16", "fp32")


@dataclass(frozen=True)
class Data:
    """Which images to train on, and how they are varied.

    Args:
        name: ``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100``, or ``folder:PATH`` for a folder with
            ``train/`` and ``test/`` (or ``val/``), each with one folder a class.
        root: the folder in which torchvision looks for its data sets; not read by ``digits`` and ``folder:PATH``.
        download: fetch a torchvision data set that ``root`` does not hold.
        crop: random crop after padding each side with this many pixels; 0 for none.
        flip: mirror half of the training images.
        validation: how many training images to hold out; the split is the same for every seed.
        size: side in pixels to which a folder's images are resized; only needed where they differ.
        channels: 3 repeats a grey channel, for models that take colour images; unset keeps what the data has.
    """

    name: str = "digits"
    root: str = "data"
    download: bool = False
    crop: int = 0
    flip: bool = False
    validation: int = 0
    size: int | None = None
    channels: int | None = None

    def __post_init__(self) -> None:
        if not self.name.startswith("folder:"):
            checks.check_known("data set", self.name, [*DATA, "folder:PATH"])
        elif self.name == "folder:":
            raise ValueError("data 'folder:' names no folder; write folder:PATH")
        checks.check_int("data.crop", self.crop, low=0)
        checks.check_int("data.validation", self.validation, low=0)
        if self.size is not None:
            checks.check_int("data.size", self.size, low=1)
        if self.channels not in (None, 1, 3):
            raise ValueError(f"data.channels={self.channels!r} is not 1 or 3; leave it out to keep the data's own")


@dataclass(frozen=True)
class Model:
    """Which network to train.

    Args:
        name: ``mlp``, ``lenet-300-100``, ``resnet20``, ``resnet18-cifar`` or ``torchvision:NAME``.
        options: keyword arguments of the model, for instance ``{"stem_stride": 2}`` of ``resnet20``.
    """

    name: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """How the network becomes sparse.

    Args:
        name: a name of ``mirrormask info methods``; on the command line several, joined by commas.
        options: keyword arguments of the method.
    """

    name: str = "pilot"
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Optimizer:
    """The torch optimizer that the method wraps.

    Args:
        name: ``sgd``, ``adam``, ``adamw`` or ``rmsprop``.
        lr: the largest learning rate; unset gives 0.05 for ``sgd`` and 0.001 for the others.
        momentum: of ``sgd`` and ``rmsprop``; unset gives 0.9 for ``sgd``, 0 for ``rmsprop``.
        nesterov: of ``sgd``.
        weight_decay: of the base optimizer, on the tensors that it trains itself.
        options: further keyword arguments of the torch optimizer, for instance ``{"betas": [0.9, 0.95]}``.
    """

    name: str = "sgd"
    lr: float | None = None
    momentum: float | None = None
    nesterov: bool = False
    weight_decay: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        checks.check_known("optimizer", self.name, LEARNING_RATES)
        lr = LEARNING_RATES[self.name] if self.lr is None else self.lr
        object.__setattr__(self, "lr", checks.check_number("optimizer.lr", lr, low=0.0, open_low=True))
        checks.check_number("optimizer.weight_decay", self.weight_decay, low=0.0)
        if self.momentum is None:
            object.__setattr__(self, "momentum", {"sgd": 0.9, "rmsprop": 0.0}.get(self.name))
        elif self.name in ("adam", "adamw"):
            raise ValueError(
                f"{self.name} has no momentum={self.momentum!r}; leave it out and set optimizer.options.betas instead"
            )
        if self.momentum is not None:
            checks.check_number("optimizer.momentum", self.momentum, low=0.0, high=1.0, open_high=True)
        if self.nesterov and (self.name != "sgd" or not self.momentum):
            raise ValueError("optimizer.nesterov=True needs sgd with momentum above 0; leave it out or set both")


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a function of progress.

    Args:
        name: ``cosine`` (to zero), ``linear`` (to zero) or ``constant``, after the warm-up.
        warmup: the fraction of all steps over which the rate rises linearly from zero.
    """

    name: str = "cosine"
    warmup: float = 0.05

    def __post_init__(self) -> None:
        checks.check_known("schedule", self.name, SCHEDULES)
        checks.check_number("schedule.warmup", self.warmup, low=0.0, high=1.0, open_high=True)


@dataclass(frozen=True)
class Recipe:
    """One training run, completely: the same recipe on the same machine gives the same weights, bit for bit.

    Args:
        data: the images.
        model: the network.
        method: how it becomes sparse.
        sparsity: the fraction of zeros at the end, in [0, 1), over all sparsifiable weights; ``dense`` sets it to 0.
        optimizer: the optimizer that the method wraps.
        schedule: its learning rate over time.
        epochs: passes over the training images.
        batch_size: images a step, over all processes together; an incomplete last batch of an epoch is left out.
        seed: of the weights, the data order and everything else that is random.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast.
        threads: CPU threads; unset leaves torch's choice.
        log_every: steps between two lines of the log.
        figure: draw ``figure.png`` and ``figure.svg`` at the end; this may take longer than to train a small network.
        checkpoint_every: time or steps between checkpoints, ``10min`` or ``500steps``, beside those at the end of each
            epoch; ``epoch`` for these only.
        stop_after: steps in a row without a finite loss or gradient after which the run stops.
        stop_dead: stop where a layer of zeros lets the network tell no image from another.
        deterministic: refuse operations that may give other bits the next time, on GPUs; slower.
        out: the run's folder; empty makes it ``runs/DATA-MODEL-SPARSITY-seedN``.

    Raises:
        TypeError, ValueError: a field is of the wrong type or outside its range, naming what is allowed.

    Example:
        >>> Recipe(optimizer=Optimizer("adamw")).optimizer.lr
        0.001
        >>> Recipe(epochs=0)
        Traceback (most recent call last):
        ValueError: epochs=0 is below 1
    """

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    method: Method = field(default_factory=Method)
    sparsity: float = 0.95
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    epochs: int = 40
    batch_size: int = 32
    seed: int = 0
    precision: str = "fp32"
    threads: int | None = None
    log_every: int = 50
    figure: bool = True
    checkpoint_every: str = "10min"
    stop_after: int = 100
    stop_dead: bool = True
    deterministic: bool = False
    out: str = ""

    def __post_init__(self) -> None:
        checks.check_sparsity(self.sparsity)
        if self.method.name == "dense":
            object.__setattr__(self, "sparsity", 0.0)
        checks.check_int("epochs", self.epochs, low=1)
        checks.check_int("batch_size", self.batch_size, low=1)
        checks.check_int("seed", self.seed, low=0)
        checks.check_int("log_every", self.log_every, low=1)
        checks.check_int("stop_after", self.stop_after, low=1)
        intervals.parse(self.checkpoint_every)
        checks.check_known("precision", self.precision, PRECISIONS)
        if self.threads is not None:
            checks.check_int("threads", self.threads, low=1)
        if not self.out:
            data, model = Path(self.data.name).name, self.model.name.replace(":", "-")
            object.__setattr__(self, "out", f"runs/{data}-{model}-{self.sparsity:g}-seed{self.seed}")

    def dense(self, out: str) -> Recipe:
        """The run that this one is compared with: the same in everything but method and sparsity."""
        return dataclasses.replace(self, method=Method("dense"), sparsity=0.0, out=out)

    def identity(self) -> dict[str, Any]:
        """What decides the result: the tree without folder, place of the data, log, figure and checkpoints."""
        tree = dataclasses.asdict(self)
        for name in ("out", "log_every", "figure", "checkpoint_every", "stop_after", "stop_dead"):
            del tree[name]
        if not self.deterministic:  # so that runs from before this option keep their fingerprint
            del tree["deterministic"]
        for name in ("root", "download"):
            del tree["data"][name]
        return tree

    def fingerprint(self) -> str:
        """A hash of :meth:`identity`, 12 hexadecimal digits: two recipes with the same one are the same run."""
        text = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def reference_key(self) -> str:
        """The :meth:`fingerprint` of the dense run that this recipe is compared with."""
        return self.dense(self.out).fingerprint()
