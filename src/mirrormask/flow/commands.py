"""The experiments as commands: ``mirrormask flow recovery | bias | depth | signs | rates | norm | all``.

Each writes ``NAME.svg``, ``NAME.png``, ``NAME.csv`` and ``NAME.txt`` (one sentence of what it shows) into a folder, and
returns its name, that sentence and the files.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mirrormask import waiting

__all__ = ["all", "bias", "depth", "norm", "rates", "recovery", "signs"]

OUT = Path("runs/flow")


def recovery(out: Path = OUT, seeds: int = 20) -> dict[str, Any]:
    """Recovery error of diagonal linear networks against the amount of decay, for six methods.

    Args:
        out: the folder to write to; it is made if it is not there.
        seeds: how many random problems the means and intervals are over.
    """
    from mirrormask.flow.recovery import recovery_experiment

    return _write("recovery", lambda: recovery_experiment(seeds), out)


def bias(out: Path = OUT) -> dict[str, Any]:
    """The implicit penalty from parabola to absolute value, and the effective exponent along runs.

    Args:
        out: the folder to write to.
    """
    from mirrormask.flow.bias import bias_experiment

    return _write("bias", bias_experiment, out)


def depth(out: Path = OUT) -> dict[str, Any]:
    """The implicit penalty of two, three and four factors.

    Args:
        out: the folder to write to.
    """
    from mirrormask.flow.depth import depth_experiment

    return _write("depth", depth_experiment, out)


def signs(out: Path = OUT) -> dict[str, Any]:
    """Which initialisations let a weight change its sign, and how long it takes.

    Args:
        out: the folder to write to.
    """
    from mirrormask.flow.signs import signs_experiment

    return _write("signs", signs_experiment, out)


def rates(out: Path = OUT) -> dict[str, Any]:
    """The optimizer that trains networks against the flow, for smaller and smaller steps.

    Args:
        out: the folder to write to.
    """
    from mirrormask.flow.rates import rates_experiment

    return _write("rates", rates_experiment, out)


def norm(out: Path = OUT, run: Path | None = None) -> dict[str, Any]:
    """The recorded scale of a training run beside the one that its decay integral predicts.

    Args:
        out: the folder to write to.
        run: the folder of a run with a log.jsonl; without one, three small networks are trained on the digits.
    """
    from mirrormask.flow.norm import norm_experiment

    return _write("norm", lambda: norm_experiment(run, Path(out)), out)


def all(out: Path = OUT, seeds: int = 20) -> dict[str, Any]:
    """Every experiment, one after another.

    Args:
        out: the folder to write to.
        seeds: of the recovery experiment.
    """
    started = time.perf_counter()
    made = [recovery(out, seeds), bias(out), depth(out), signs(out), rates(out), norm(out)]
    print(f"all experiments took {time.perf_counter() - started:.1f} s")
    return {"experiments": made}


def _write(name: str, make: Callable[[], Any], out: Path) -> dict[str, Any]:
    # Not by its type: jsonargparse imports what annotations name, and help must not wait for torch.
    with waiting.stages("flow") as at:
        at(name)
        experiment = make()
        paths = experiment.save(out)
    print(f"{experiment.name}: {experiment.sentence}")
    print(f"  wrote {', '.join(str(path) for path in paths)}")
    return {"experiment": experiment.name, "sentence": experiment.sentence, "files": paths}
