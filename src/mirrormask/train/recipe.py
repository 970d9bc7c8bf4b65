"""A recipe: everything that decides what a training run does, in one frozen tree that a YAML file can hold."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mirrormask import checks
from mirrormask.train import intervals, named

__all__ = ["Data", "Method", "Model", "Optimizer", "Recipe", "Schedule", "Teacher"]

#: The learning rate that a recipe without one gets, by optimizer.
LEARNING_RATES = {"sgd": 0.05, "adam": 1e-3, "adamw": 1e-3, "rmsprop": 1e-3}
DATA = ("cifar10", "cifar100", "digits", "fashion-mnist")
SCHEDULES = ("constant", "cosine", "linear", "one-cycle", "step")
#: Fields that a recipe has gained: a run is the same run where they are what they were before there were any.
GAINED: dict[str, dict[str, Any]] = {
    "model": {"init": None},
    "schedule": {"at": [0.5, 0.75], "factor": 0.1},
    "": {"device": None, "label_smoothing": 0.0},
}
#: More pixels to crop are no variation of an image, and more threads than any machine has cores end in a crash.
MOST_CROP, MOST_THREADS = 1024, 4096
#: Of epochs and of images a step: their product with any number of images stays an integer of 64 bits.
MOST = 2**31 - 1
DEVICES = ("cpu", "cuda", "mps", "xpu")
PRECISIONS = ("bf16", "fp16", "fp32")
#: How a model may lie on several processes: each holds all of it, or a part of each tensor.
PARALLEL = ("ddp", "fsdp")


def data_name(name: str) -> str:
    """A data set's name as recipes keep it: the path of a folder gets the kind of folder in front.

    Raises:
        ValueError: no data set is called so; the nearest name is suggested.
    """
    kind, colon, path = name.partition(":")
    if kind in ("folder", "datasets") and colon:
        if not path:
            raise ValueError(f"data {name!r} names no folder; write {kind}:PATH")
        return name
    if name in DATA or named.is_code(name):
        return name
    if Path(name).is_dir():
        saved = any((Path(name) / file).is_file() for file in ("dataset_dict.json", "dataset_info.json"))
        return f"{'datasets' if saved else 'folder'}:{name}"
    if "/" in name:
        raise ValueError(f"the data folder {name!r} does not exist (here: {Path.cwd()})")
    return checks.check_known("data set", name, [*DATA, "folder:PATH", "datasets:PATH", "FILE.py:NAME"])


@dataclass(frozen=True)
class Data:
    """Which images to train on, and how they are varied.

    Args:
        name: ``digits``, ``fashion-mnist``, ``cifar10``, ``cifar100``; ``folder:PATH`` for a folder with ``train/``
            and ``test/`` (or ``val/``), each with one folder a class; ``datasets:PATH`` for a folder that the library
            datasets has saved; the PATH of either alone; ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME`` for a function
            that returns ``(train x, train y), (test x, test y)``, or a :class:`mirrormask.train.data.Splits`.
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
        object.__setattr__(self, "name", data_name(self.name))
        checks.check_int("data.crop", self.crop, low=0, high=MOST_CROP)
        checks.check_int("data.validation", self.validation, low=0)
        if self.size is not None:
            checks.check_int("data.size", self.size, low=1)
        if self.channels not in (None, 1, 3):
            raise ValueError(f"data.channels={self.channels!r} is not 1 or 3; leave it out to keep the data's own")

    @property
    def short(self) -> str:
        """The name as part of a folder's."""
        return re.sub(r"[^\w.=+-]+", "-", Path(self.name).name)


@dataclass(frozen=True)
class Model:
    """Which network to train.

    Args:
        name: ``mlp``, ``lenet-300-100``, ``resnet7``, ``resnet20``, ``resnet18-cifar``, ``torchvision:NAME``,
            ``timm:NAME``, ``FILE.py:NAME`` or ``PACKAGE.MODULE:NAME``.
        options: keyword arguments of the model, for instance ``{"stem_stride": 2}`` of ``resnet20``.
        init: the weights to start from: a state dict (``.pt``, ``.pth``, ``.bin``), a ``.safetensors`` file, or
            ``pretrained`` for those of timm and torchvision; unset starts from random ones.
    """

    name: str = "mlp"
    options: dict[str, Any] = field(default_factory=dict)
    init: str | None = None

    @property
    def short(self) -> str:
        """The name as part of a folder's."""
        return re.sub(r"[^\w.=+-]+", "-", Path(self.name).name)


@dataclass(frozen=True)
class RecipeMethod:
    """How the network becomes sparse.

    Args:
        name: a name of ``mirrormask info methods``; on the command line several, joined by commas.
        options: keyword arguments of the method.
    """

    name: str = "mirror"
    options: dict[str, Any] = field(default_factory=dict)


#: Its own name is another one than ``mm.Method``'s, for which jsonargparse would look, and import all of torch.
Method = RecipeMethod


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
        name: ``cosine`` (to zero), ``linear`` (to zero), ``constant`` or ``step`` (times ``factor`` at each of ``at``),
            after the warm-up, with which ``linear`` is a triangle; ``one-cycle`` rises by a cosine from 1/25 and falls
            by one to nothing.
        warmup: the fraction of all steps over which the rate rises from zero; unset gives 0.3 for ``one-cycle`` and
            0.05 for the others.
        at: of ``step``: the fractions of all steps at which the rate falls, in rising order.
        factor: of ``step``: by what the rate is multiplied there.
    """

    name: str = "cosine"
    warmup: float | None = None
    at: list[float] = field(default_factory=lambda: [0.5, 0.75])
    factor: float = 0.1

    def __post_init__(self) -> None:
        checks.check_known("schedule", self.name, SCHEDULES)
        warmup = (0.3 if self.name == "one-cycle" else 0.05) if self.warmup is None else self.warmup
        object.__setattr__(
            self, "warmup", checks.check_number("schedule.warmup", warmup, low=0.0, high=1.0, open_high=True)
        )
        object.__setattr__(self, "at", list(self.at))
        for at in self.at:
            checks.check_number("schedule.at", at, low=0.0, high=1.0, open_low=True, open_high=True)
        if self.at != sorted(set(self.at)):
            raise ValueError(f"schedule.at={self.at} must rise; each rate drop has a place of its own")
        checks.check_number("schedule.factor", self.factor, low=0.0, high=1.0, open_high=True)


@dataclass(frozen=True)
class Teacher:
    """A trained network whose outputs the one in training is drawn to.

    The loss is ``(1 - weight) · cross entropy + weight · T² KL(teacher ‖ student)``; see :func:`mirrormask.distill`.

    Args:
        name: a finished run's folder, or a file of weights of the same model as in ``model.name`` (as ``model.init``
            takes them); unset trains on the labels alone.
        temperature: T, in [0.001, 10000]: the larger, the more the teacher's small probabilities count.
        weight: the teacher's share of the loss, in (0, 1]; 1 leaves the labels out.
    """

    name: str | None = None
    temperature: float = 2.0
    weight: float = 0.5

    def __post_init__(self) -> None:
        checks.check_number("teacher.temperature", self.temperature, low=1e-3, high=1e4)  # as mm.distill
        checks.check_number("teacher.weight", self.weight, low=0.0, high=1.0, open_low=True)
        for name in ("temperature", "weight"):
            value = getattr(self, name)
            if self.name is None and value != getattr(Teacher, name):
                raise ValueError(f"teacher.{name}={value} has no effect without a teacher; name one: --teacher PATH")


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
        teacher: a trained network to learn from beside the labels.
        label_smoothing: ε in [0, 1): cross entropy is that with ``1 - ε`` on the label and ``ε`` spread over all
            classes; what is logged of test images is without it.
        epochs: passes over the training images.
        batch_size: images a step, over all processes together; an incomplete last batch of an epoch is left out.
        seed: of the weights, the data order and everything else that is random.
        precision: ``fp32``, ``bf16`` or ``fp16`` autocast.
        threads: CPU threads; unset leaves torch's choice.
        device: ``cpu``, ``cuda``, ``mps`` or ``xpu``; unset takes an accelerator where there is one.
        parallel: where a launcher has started several processes: ``ddp`` (each holds the whole model; unset is this)
            or ``fsdp`` (each holds a part of every tensor). One process trains as without it.
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
    teacher: Teacher = field(default_factory=Teacher)
    label_smoothing: float = 0.0
    epochs: int = 40
    batch_size: int = 32
    seed: int = 0
    precision: str = "fp32"
    threads: int | None = None
    device: str | None = None
    parallel: str | None = None
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
        checks.check_number("label_smoothing", self.label_smoothing, low=0.0, high=1.0, open_high=True)
        checks.check_int("epochs", self.epochs, low=1, high=MOST)
        checks.check_int("batch_size", self.batch_size, low=1, high=MOST)
        checks.check_int("seed", self.seed, low=0)
        checks.check_int("log_every", self.log_every, low=1)
        checks.check_int("stop_after", self.stop_after, low=1)
        intervals.parse(self.checkpoint_every)
        checks.check_known("precision", self.precision, PRECISIONS)
        if self.device is not None:
            checks.check_known("device", self.device, DEVICES)
        if self.parallel is not None:
            checks.check_known("parallel", self.parallel, PARALLEL)
        if self.threads is not None:
            checks.check_int("threads", self.threads, low=1, high=MOST_THREADS)
        if not self.out:
            object.__setattr__(
                self, "out", f"runs/{self.data.short}-{self.model.short}-{self.sparsity:g}-seed{self.seed}"
            )

    def dense(self, out: str) -> Recipe:
        """The run that this one is compared with: the same in everything but method and sparsity."""
        return dataclasses.replace(self, method=Method("dense"), sparsity=0.0, out=out)

    def identity(self) -> dict[str, Any]:
        """What decides the result: the tree without folder, place of the data, processes, log, figure, checkpoints."""
        tree = dataclasses.asdict(self)
        for name in ("out", "parallel", "log_every", "figure", "checkpoint_every", "stop_after", "stop_dead"):
            del tree[name]
        if not self.deterministic:  # so that runs from before this option keep their fingerprint
            del tree["deterministic"]
        if self.teacher.name is None:
            del tree["teacher"]
        for name in ("root", "download"):
            del tree["data"][name]
        for section, fields in GAINED.items():
            part = tree[section] if section else tree
            for name, before in fields.items():
                if part[name] == before:
                    del part[name]
        return tree

    def fingerprint(self) -> str:
        """A hash of :meth:`identity`, 12 hexadecimal digits: two recipes with the same one are the same run."""
        text = json.dumps(self.identity(), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def reference_key(self) -> str:
        """The :meth:`fingerprint` of the dense run that this recipe is compared with."""
        return self.dense(self.out).fingerprint()
