"""The experiments as commands: ``mirrormask flow recovery | bias | depth | signs | rates | norm | all``.

Each writes ``NAME.svg``, ``NAME.png``, ``NAME.csv`` and ``NAME.txt`` (one sentence of what it shows) into a folder.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

__all__ = ["all", "bias", "depth", "norm", "rates", "recovery", "signs"]

OUT = Path("runs/flow")


def recovery(out: Path = OUT, seeds: int = 20) -> None:
    """Recovery error of diagonal linear networks against the amount of decay, for six methods.

    Args:
        out: the folder to write to; it is made if it is not there.
        seeds: how many random problems the means and intervals are over.
    """
    from mirrormask.flow.recovery import recovery_experiment

    _write(recovery_experiment(seeds), out)


def bias(out: Path = OUT) -> None:
    """The implicit penalty from parabola to absolute value, and the effective exponent along runs.

    Args:
        out: the folder to write to.
    """
    from mirrormask.flow.bias import bias_experiment

    _write(bias_experiment(), out)


def depth(out: Path = OUT) -> None:
    """The implicit penalty of two, three and four factors.

    Args:
        out: the folder to write to.
    """
    from mirrormask.flow.depth import depth_experiment

    _write(depth_experiment(), out)


def signs(out: Path = OUT) -> None:
    """Which initialisations let a weight change its sign, and how long it takes.

    Args:
        out: the folder to write to.
    """
    from mirrormask.flow.signs import signs_experiment

    _write(signs_experiment(), out)


def rates(out: Path = OUT) -> None:
    """The optimizer that trains networks against the flow, for smaller and smaller steps.

    Args:
        out: the folder to write to.
    """
    from mirrormask.flow.rates import rates_experiment

    _write(rates_experiment(), out)


def norm(out: Path = OUT, run: Path | None = None) -> None:
    """The recorded scale of a training run beside the one that its decay integral predicts.

    Args:
        out: the folder to write to.
        run: the folder of a run with a log.jsonl; without one, three small networks are trained on the digits.
    """
    from mirrormask.flow.norm import norm_experiment

    _write(norm_experiment(run, Path(out)), out)


def all(out: Path = OUT, seeds: int = 20) -> None:
    """Every experiment, one after another.

    Args:
        out: the folder to write to.
        seeds: of the recovery experiment.
    """
    started = time.perf_counter()
    recovery(out, seeds)
    bias(out)
    depth(out)
    signs(out)
    rates(out)
    norm(out)
    print(f"all experiments took {time.perf_counter() - started:.1f} s")


def _write(experiment: Any, out: Path) -> None:
    # Not by its type: jsonargparse imports what annotations name, and help must not wait for torch.
    paths = experiment.save(out)
    print(f"{experiment.name}: {experiment.sentence}")
    print(f"  wrote {', '.join(str(path) for path in paths)}")
