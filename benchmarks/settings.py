"""What benchmarks/results.py tries of each method; the best trials are the settings of recipes/compare-*.yaml.

Every method that has something to choose gets the same number of trials, its defaults among them. Methods without an
option that could help (random, uniform, erk, snip, synflow, grasp, lth) are trained as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirrormask.compare.options import load_grid

__all__ = [
    "ADAMW_SETTINGS",
    "ADAMW_TRIALS",
    "CIFAR_ADAMW_SETTINGS",
    "CIFAR_ADAMW_TRIALS",
    "CIFAR_TRIALS",
    "OTHER_SETTINGS",
    "OTHER_TRIALS",
    "RESNET7_TRIALS",
    "SETTINGS",
    "SMALL_SETTINGS",
    "TRIALS",
]

Options = dict[str, Any]

#: LeNet-300-100 on Fashion-MNIST: four settings a method, compared on 5,000 training images that are held out.
TRIALS: dict[str, list[Options]] = {
    "magnitude": [{}, {"at": 0.2}, {"at": 0.3}, {"at": 0.7}],
    "gmp": [{}, {"end_at": 0.4}, {"end_at": 0.5}, {"end_at": 0.6}],
    "l1": [{}, {"alpha": 3e-5}, {"alpha": 3e-4}, {"alpha": 3e-4, "at": 0.7}],
    "wr": [{}, {"prunings": 2}, {"prunings": 2, "rewind_to": 0.05}, {"prunings": 3}],
    "lrr": [{}, {"prunings": 2}, {"prunings": 3}, {"prunings": 6}],
    "acdc": [{}, {"phase": 0.025}, {"end_at": 0.7}, {"phase": 0.1, "end_at": 0.7}],
    "str": [{}, {"end_at": 0.5}, {"init_threshold": 1e-3}, {"init_threshold": 1e-3, "end_at": 0.5}],
    "cs": [{}, {"s_init": 0.1}, {"end_at": 0.5}, {"final": 50.0}],
    "powerprop": [{}, {"power": 1.5}, {"power": 3.0}, {"at": 0.3}],
    "rigl": [{}, {"fraction": 0.5}, {"allocation": "global"}, {"every": 0.02, "until": 0.5}],
    "set": [{}, {"fraction": 0.5}, {"until": 0.75}, {"allocation": "global"}],
    "ham": [{}, {"a": 10.0}, {"a": 50.0}, {"at": 0.3}],
    "gmp_ham": [{}, {"end_at": 0.5}, {"a": 50.0}, {"a": 50.0, "end_at": 0.5}],
    "acdc_ham": [{}, {"phase": 0.025}, {"end_at": 0.7}, {"a": 50.0, "end_at": 0.7}],
    "sign_in": [{}, {"every": 0.05}, {"gain": None}, {"alpha": 2.5e-4}],
    "sparseopt": [{}, {"fraction": 0.5}, {"allocation": "global"}, {"every": 0.02, "until": 0.5}],
    "spred": [{}, {"alpha": 3e-3}, {"alpha": 2e-2}, {"alpha": 1e-2, "at": 0.3}],
    "dwf": [{}, {"alpha": 1e-3}, {"alpha": 1e-2}, {"depth": 4}],
    "pilot": [{}, {"alpha_init": 3e-3}, {"alpha_init": 1e-2}, {"at": 0.3}],
    "pilot_lrr": [{}, {"prunings": 2}, {"prunings": 3}, {"prunings": 2, "alpha_init": 1e-2}],
    "mirror": [{}, {"shrink": 3.0}, {"shrink": 6.0}, {"end_at": 0.65}],
}

#: ResNet-20 on CIFAR-10, where a run takes minutes: four settings a method at 98%, their defaults among them.
CIFAR_TRIALS: dict[str, list[Options]] = {
    "gmp": [{}, {"end_at": 0.4}, {"end_at": 0.6}, {"end_at": 0.85}],
    "acdc": [{}, {"end_at": 0.7}, {"allocation": "erk"}, {"allocation": "erk", "end_at": 0.7}],
    "gmp_ham": [{}, {"a": 50.0}, {"a": 100.0}, {"a": 50.0, "end_at": 0.6}],
    "str": [{}, {"init_threshold": 1e-3}, {"end_at": 0.5}, {"init_threshold": 1e-3, "end_at": 0.5}],
    "spred": [{}, {"alpha": 5e-3}, {"alpha": 2e-2}, {"alpha": 1e-2, "at": 0.3}],
    "pilot": [{}, {"alpha_init": 1e-2}, {"alpha_init": 2e-2}, {"alpha_init": 1e-2, "at": 0.7}],
    "mirror": [{}, {"shrink": 3.0}, {"shrink": 6.0}, {"end_at": 0.65}],
}

#: ResNet-7 on CIFAR-10, likewise.
RESNET7_TRIALS: dict[str, list[Options]] = {
    "gmp": [{}, {"end_at": 0.5}, {"end_at": 0.6}, {"end_at": 0.85}],
    "gmp_ham": [{}, {"a": 50.0}, {"a": 100.0}, {"a": 100.0, "end_at": 0.6}],
    "str": [{}, {"init_threshold": 1e-3}, {"end_at": 0.5}, {"init_threshold": 1e-3, "end_at": 0.5}],
    "dwf": [{}, {"alpha": 1e-3}, {"alpha": 1e-2}, {"depth": 4}],
    "acdc_ham": [{}, {"allocation": "erk"}, {"allocation": "erk", "a": 50.0}, {"allocation": "erk", "end_at": 0.7}],
    "spred": [{}, {"alpha": 2e-3}, {"alpha": 6e-3}, {"alpha": 6e-3, "at": 0.3}],
    "pilot": [{}, {"alpha_init": 2e-3}, {"alpha_init": 6e-3}, {"alpha_init": 6e-3, "at": 0.7}],
    "sparseopt": [{}, {"fraction": 0.5}, {"allocation": "global"}, {"every": 0.02, "until": 0.5}],
    "mirror": [{}, {"shrink": 3.0}, {"shrink": 6.0}, {"end_at": 0.65}],
}

_RECIPES = Path(__file__).parent.parent / "recipes"
#: What the tables use: the best trial of each method by its mean over 98% and 99.5%; on CIFAR-10 at 98%.
SETTINGS = load_grid(_RECIPES / "compare-fashion-mnist.yaml").methods
CIFAR_SETTINGS = load_grid(_RECIPES / "compare-cifar10-resnet20.yaml").methods
#: The leading ones, for trainings with more seeds.
SMALL_SETTINGS = {m: CIFAR_SETTINGS[m] for m in ("dense", "gmp", "gmp_ham", "str", "pilot", "mirror")}
#: The methods that are not in that table: the best trial at 98%; without trials of their own, the defaults or what the
#: same schedule has without HAM.
OTHER_SETTINGS: dict[str, Options] = {
    **{method: {} for method in ("random", "uniform", "erk", "snip", "synflow", "grasp", "lth", "wr")},
    "lrr": {"prunings": 3},
    "l1": {"alpha": 3e-4},
    "cs": {"end_at": 0.5},
    "powerprop": {"power": 1.5},
    "set": {"until": 0.75},
    "ham": {"at": 0.3},
    "acdc_ham": {"phase": 0.025},
    "rigl_ham": SETTINGS["rigl"],
    "str_ham": SETTINGS["str"],
    "erk_ham": {},
    "sign_in": {},
    "dwf": {},
    "sparseopt": {},
    "pilot_init": {},
    "pilot_lrr": {"prunings": 3},
    "pilot_wr": {},
}
OTHER_TRIALS = {method: TRIALS[method] for method in OTHER_SETTINGS if method in TRIALS}


def _rates(settings: dict[str, Options], rates: tuple[float, ...]) -> dict[str, list[Options]]:
    return {m: [{**settings[m], "lr": lr} for lr in rates] for m in ("gmp", "gmp_ham", "mirror")}


#: Under AdamW the learning rate is what matters most; each method keeps its SGD setting and chooses among these.
ADAMW_TRIALS = _rates(SETTINGS, (1e-3, 2e-3, 4e-3, 8e-3))
CIFAR_ADAMW_TRIALS = _rates(CIFAR_SETTINGS, (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2))


def _with_rates(settings: dict[str, Options], rates: dict[str, float]) -> dict[str, Options]:
    return {"dense": {}, **{method: {**settings[method], "lr": lr} for method, lr in rates.items()}}


#: The best of them.
ADAMW_SETTINGS = _with_rates(SETTINGS, {"gmp": 4e-3, "gmp_ham": 4e-3, "mirror": 4e-3})
CIFAR_ADAMW_SETTINGS = _with_rates(CIFAR_SETTINGS, {"gmp": 1.6e-2, "gmp_ham": 1.6e-2, "mirror": 1.6e-2})
