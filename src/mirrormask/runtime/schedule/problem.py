"""What a tuner knows of a layer to be run: the choices that there are, and a plan of the layer alone to measure one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.kernels.activation import Chain
from mirrormask.runtime.schedule.nonzeros import some_rows
from mirrormask.runtime.schedule.plan import Plan

__all__ = ["Alone", "Choice", "Fused", "Problem", "sampled"]

#: Weights of a layer that are measured: of a larger one some outputs, at least so many. They take as long each as all
#: do, while packing all of them for every candidate takes minutes, and several times the weights' memory.
MOST_TRIED, LEAST_OUTPUTS = 1 << 21, 64


@dataclass(frozen=True)
class Choice:
    """How a layer runs.

    Attributes:
        kernel: ``aligned``, ``direct`` (sparse, unaligned loads), ``dense``, ``winograd`` (dense) or, for one vector,
            ``tables``, ``sell``, ``shared`` or ``panel`` (dense); ``levels`` is ``sell`` with weights of 8 bits,
            ``halves`` of 16, ``tables levels`` and ``tables halves`` are ``tables`` with such.
        rows, vectors: the tile.
        block: input planes per block (sparse), output channels per group (``dense``, ``winograd``), or slices per
            nonzero of a row in percent (``shared``).
    """

    kernel: str
    rows: int = 1
    vectors: int = 1
    block: int = 1


@dataclass(frozen=True)
class Fused:
    """What follows a layer and is computed as it stores: a tensor to add, activations, and the value's final name."""

    out: str
    residual: str = ""
    activation: Chain = ()


@dataclass(frozen=True)
class Alone:
    """A layer by itself.

    Attributes:
        plan: runs it.
        source: where the layer's input lies in the plan's memory.
        copying: seconds that the choice costs besides, since its input has to be copied.
    """

    plan: Plan
    source: slice
    copying: float = 0.0


class Problem(Protocol):
    """A layer to be run."""

    @property
    def key(self) -> str:
        """What the choice depends on, apart from the processor and where the nonzeros are."""

    def candidates(self) -> Iterator[Choice]:
        """The choices worth measuring, best guess first."""

    def direct(self, choice: Choice) -> Choice:
        """``choice`` if it computes every output from the inputs that its weights name alone; else one that does."""

    def trial(self, choice: Choice) -> Alone:
        """The layer alone, with this choice."""


def sampled(node: Node) -> Node:
    """A layer to measure in place of ``node``: itself, or some of its outputs, evenly spaced, if it is large."""
    weight = node.weight
    assert weight is not None
    number = max(LEAST_OUTPUTS, MOST_TRIED // max(1, math.prod(weight.shape[1:])))
    if node.groups != 1 or weight.shape[0] <= number:
        return node
    rows, some = some_rows(weight, number)
    bias = None if node.bias is None else node.bias[rows]
    return replace(node, weight=some, bias=bias, shape=(number, *node.shape[1:]))
