"""Iterative magnitude pruning: train, prune and start again, in rounds."""

from __future__ import annotations

from dataclasses import dataclass

from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Euclidean
from mirrormask.masks import Iterative
from mirrormask.methods.base import Method, named
from mirrormask.methods.groups import Layers, Rewinding, Rounds
from mirrormask.methods.options import reads

__all__ = ["lrr", "lth", "wr"]


@named("Frankle and Carbin 2019, arXiv 1803.03635")
@reads(Rounds)
def lth(options: Rounds) -> Method:
    """Lottery tickets: iterative magnitude pruning, rewound to the initialisation after each round.

    The ``prunings + 1`` rounds of training share the one budget of steps; build learning-rate schedules for
    ``optimizer.round_steps``.

    Example:
        >>> lth(0.9).mask.rewind_to
        0.0

    Source: Frankle and Carbin 2019, arXiv 1803.03635, section 1 (iterative pruning).

    Differs from the paper: the rounds share one budget, and so are fewer (the paper removes 20% a round, each trained
    in full: 14 rounds to 95%).
    """
    return Method(Euclidean(), ConstantDecay(), options.part(Iterative, rewind_to=0.0), "lth")


@dataclass(frozen=True, kw_only=True)
class _Rewound(Rounds, Rewinding, Layers):
    """The options of :func:`wr`."""


@named("Frankle et al. 2020, arXiv 1912.05671")
@reads(_Rewound)
def wr(options: _Rewound) -> Method:
    """Weight rewinding: iterative magnitude pruning, rewound to an early step after each round.

    Example:
        >>> wr(0.9).mask.rewind_to
        0.1

    Source: Frankle et al. 2020, arXiv 1912.05671; Renda, Frankle and Carbin 2020, arXiv 2003.02389.

    Differs from the paper: the rounds share one budget.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(Iterative), "wr")


@named("Renda, Frankle and Carbin 2020, arXiv 2003.02389")
@reads(Rounds)
def lrr(options: Rounds) -> Method:
    """Learning-rate rewinding: iterative magnitude pruning, only the learning rate starts anew each round.

    Example:
        >>> lrr(0.9).mask.rewind_to is None
        True

    Source: Renda, Frankle and Carbin 2020, arXiv 2003.02389, section 3.

    Differs from the paper: the rounds share one budget.
    """
    return Method(Euclidean(), ConstantDecay(), options.part(Iterative, rewind_to=None), "lrr")
