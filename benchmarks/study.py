"""What makes `mirror` good: variants of it on held-out training images (the tables of docs/studies.md).

    python benchmarks/study.py --data DIR [--seeds 2] [--out runs/study]
    python benchmarks/study.py cifar10 --data DIR/cifar10            # or cifar10-adamw; fashion-mnist-adamw with DIR

Each study varies a suite of benchmarks/results.py, with 5,000 of the training images held out.
The variants that are not options of `mirror` are methods that this file registers, compositions of the library's parts.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from mirrormask.compare.grid import Grid, describe
from mirrormask.compare.table import accuracy_table
from mirrormask.corrections import Correction, Hyperbolic
from mirrormask.decay import ConstantDecay, Decay, PILoTDecay, ShrinkDecay, TargetDecay
from mirrormask.geometry import Euclidean, Geometry, Hadamard, MirrorDescent
from mirrormask.geometry.base import Latents
from mirrormask.masks import Alternating, Gradual, Mask, OneShot
from mirrormask.methods import Method
from mirrormask.methods.base import named
from mirrormask.progress import Clock
from results import accuracies, check_complete, make_grid
from settings import CIFAR_SETTINGS

SHRINK = ShrinkDecay(4.0, 0.05, 0.75, 0.004)


def _gradual(sparsity: float) -> Mask:
    return Gradual(sparsity, 0.10, 0.75, 1 / 45)


def _method(
    name: str, mask: Mask, decay: Decay = SHRINK, geometry: Geometry | None = None, correction: Correction | None = None
) -> Method:
    return Method(geometry or Hadamard(), decay, mask, name, correction=correction)


@dataclasses.dataclass(frozen=True)
class PlainLater(Hadamard):
    """``m ⊙ w`` until ``plain_from`` of training; from then on m rests, and w moves x as a plain step would."""

    plain_from: float = 0.75
    plain: bool = False
    constants: ClassVar[tuple[str, ...]] = ("unit",)

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """The factors, and what undoes their learning rate's scale."""
        latents = super().init(x)
        rate = self.rate(x, latents, adaptive=False)
        return {**latents, "unit": latents["m"].new_tensor(1 / rate)}

    def at(self, clock: Clock) -> PlainLater:
        """Plain from ``plain_from`` on."""
        return dataclasses.replace(self, plain=clock.progress >= self.plain_from)

    def pullback(self, grads: list[Tensor], x: list[Tensor], latents: Latents) -> dict[str, list[Tensor]]:
        """``∂m = 0`` and ``∂w = ∂x / (rate m)``, so that x moves by ``-lr ∂x``."""
        if not self.plain:
            return super().pullback(grads, x, latents)
        rows = zip(grads, latents["m"], latents["unit"], strict=True)
        ours = [torch.where(m > 0, unit * g / m, 0.0) for g, m, unit in rows]
        return {"m": [torch.zeros_like(g) for g in grads], "w": ours}

    def prune(self, latents: Mapping[str, Tensor], mask: Tensor) -> None:
        """Both factors are zero."""
        super().prune({name: latents[name] for name in ("m", "w")}, mask)


@named("study: plain training at the end")
def study_plain(sparsity: float, *, plain_from: float = 0.75) -> Method:
    """A last phase of plain training on the mask that was found."""
    return _method("study_plain", _gradual(sparsity), geometry=PlainLater(plain_from=plain_from))


@named("study: HAM's step on the factors")
def study_ham(sparsity: float, *, a: float = 20.0) -> Method:
    """`mirror` and HAM's step on the factors."""
    return _method("study_ham", _gradual(sparsity), correction=Hyperbolic(a, 0.0))


@dataclasses.dataclass(frozen=True)
class Plain(Correction):
    """``θ ← θ - lr a ∂θ`` after the base optimizer's step, by at most ``clip``: a step of SGD beside one of Adam."""

    a: float
    clip: float = 0.1

    def prepare(self, grads: list[Tensor], lr: float) -> list[Tensor]:
        """The step."""
        return [(-lr * self.a * grad).clamp_(-self.clip, self.clip) for grad in grads]

    def apply(self, theta: list[Tensor], prepared: list[Tensor], lr: float) -> None:
        """Take it."""
        torch._foreach_add_(theta, prepared)


@named("study: a step of SGD beside Adam's")
def study_both(sparsity: float, *, a: float = 40.0, clip: float = 0.03) -> Method:
    """`mirror` without factors, where the dual variable takes a step of SGD after that of the base optimizer."""
    return _method("study_both", _gradual(sparsity), geometry=MirrorDescent(clip=clip), correction=Plain(a))


@named("study: HAM and the schedule of mirror")
def study_ham_alone(sparsity: float, *, a: float = 20.0, b: float = 1e-3) -> Method:
    """HAM's step on the weights, under the mask of `mirror`."""
    return _method("study_ham_alone", _gradual(sparsity), ConstantDecay(), Euclidean(), Hyperbolic(a, b))


@named("study: the decay chosen by the controller")
def study_target(sparsity: float) -> Method:
    """The `target` decay instead of a total shrink."""
    return _method("study_target", _gradual(sparsity), TargetDecay())


@named("study: a constant decay")
def study_constant(sparsity: float, *, alpha: float = 1e-2) -> Method:
    """A constant decay instead of a total shrink."""
    return _method("study_constant", _gradual(sparsity), ConstantDecay(alpha))


@named("study: PILoT's decay")
def study_pilot(sparsity: float) -> Method:
    """PILoT's decay instead of a total shrink."""
    return _method("study_pilot", _gradual(sparsity), PILoTDecay(5e-3))


@named("study: one mask at half")
def study_one_shot(sparsity: float, *, at: float = 0.5) -> Method:
    """One mask instead of a gradual one."""
    return _method("study_one_shot", OneShot(sparsity, at=at))


@named("study: regrowth")
def study_regrown(sparsity: float) -> Method:
    """Masks that let weights come back, as in AC/DC."""
    return _method("study_regrown", Alternating(sparsity, end_at=0.75))


Variants = list[tuple[str, dict[str, Any]]]

FASHION: Variants = [
    ("mirror", {}),
    ("mirror", {"shrink": 0.0}),
    ("mirror", {"end_at": 0.5}),
    ("mirror", {"end_at": 0.85}),
    ("mirror", {"decay_until": 0.5}),
    ("mirror", {"decay_until": 0.95}),
    ("mirror", {"allocation": "erk"}),
    ("mirror", {"allocation": "uniform"}),
    ("mirror", {"score": "lamp"}),
    ("mirror", {"score": "sensitivity"}),
    ("study_one_shot", {}),
    ("study_regrown", {}),
    ("study_plain", {}),
    ("study_plain", {"plain_from": 0.9}),
    ("study_target", {}),
    ("study_constant", {}),
    ("study_pilot", {}),
    ("study_ham", {}),
    ("study_ham", {"a": 5.0}),
    ("study_ham_alone", {}),
    ("study_ham_alone", {"a": 50.0}),
]
CIFAR: Variants = [
    *((name, CIFAR_SETTINGS[name]) for name in ("gmp", "gmp_ham", "str", "pilot")),
    ("gmp", {"score": "lamp"}),
    ("mirror", {}),
    ("gmp", {"score": "sensitivity"}),
    ("mirror", {"score": "lamp"}),
    ("mirror", {"score": "sensitivity"}),
    ("mirror", {"allocation": "erk"}),
    ("mirror", {"gain": 1.0}),
    ("mirror", {"gain": 1.4}),
    ("mirror", {"shrink": 2.0}),
    ("mirror", {"decay_until": 0.5}),
    ("mirror", {"end_at": 0.85}),
    ("mirror", {"factors": False}),
    ("study_ham", {}),
    ("study_ham", {"a": 100.0}),
]
CIFAR_ADAMW: Variants = [
    *((name, {**CIFAR_SETTINGS[name], "lr": 0.016}) for name in ("gmp", "gmp_ham")),
    ("gmp", {"score": "sensitivity", "lr": 0.016}),
    *(("mirror", {**options, "lr": 0.016}) for options in ({}, {"score": "magnitude"})),
    *(("mirror", {"factors": False, **options, "lr": 0.016}) for options in ({}, {"score": "magnitude"})),
    *(("mirror", {"factors": False, "score": "magnitude", "clip": clip, "lr": 0.004}) for clip in (0.01, 0.03)),
    ("mirror", {"factors": False, "score": "magnitude", "shrink": 0.0, "lr": 0.016}),
    ("mirror", {"factors": False, "score": "magnitude", "gain": 4.0, "clip": 0.1, "lr": 0.016}),
    *(("study_both", {"a": a, "lr": 0.016}) for a in (40.0, 100.0)),
    ("mirror", {"factors": False, "gain": 4.0, "clip": 0.1, "lr": 0.016}),
    ("mirror", {"factors": False, "end_at": 0.85, "lr": 0.016}),
]
FASHION_ADAMW: Variants = [
    ("mirror", {**options, "lr": lr})
    for options in ({}, {"factors": False}, {"factors": False, "score": "magnitude"})
    for lr in (0.001, 0.002, 0.004, 0.008)
]


class Study(NamedTuple):
    """What a study trains: the suite of results.py whose trainings it varies, its sparsities and its rows."""

    suite: str
    sparsities: tuple[float, ...]
    variants: Variants


STUDIES = {
    "fashion-mnist": Study("fashion-mnist", (0.98, 0.995), FASHION),
    "fashion-mnist-adamw": Study("fashion-mnist-adamw", (0.98, 0.995), FASHION_ADAMW),
    "cifar10": Study("cifar10-small", (0.98, 0.99), CIFAR),
    "cifar10-adamw": Study("cifar10-small-adamw", (0.98, 0.99), CIFAR_ADAMW),
}


def main() -> None:
    """Train the variants and print their table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", nargs="?", default="fashion-mnist", choices=list(STUDIES))
    parser.add_argument("--data", required=True, help="where the data set is")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--variants", nargs="+", help="only these rows, by their names in the table")
    parser.add_argument("--sparsity", nargs="+", type=float, help="only these sparsities")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    study = STUDIES[arguments.study]
    grid = make_grid(study.suite, arguments.data, arguments.out / arguments.study, tune=True)
    methods = {describe(name, options): options for name, options in study.variants}
    methods = {name: o for name, o in methods.items() if not arguments.variants or name in arguments.variants}
    sparsities = tuple(arguments.sparsity or study.sparsities)
    grid = Grid(grid.base, methods, sparsities, {"": tuple(range(arguments.seeds))})
    values = accuracies(grid, arguments.workers)
    print("\n" + accuracy_table(values, accuracy="validation"))
    check_complete(grid, values)


if __name__ == "__main__":
    main()
