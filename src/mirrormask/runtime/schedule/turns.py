"""The turns of a run over sequences of tokens: which ops run on which buffer, one after the other.

Ops on single rows follow each other on one buffer, while what they made is in the caches. Where an op takes all buffers
of some sequences together, the ops before it run on every one of these buffers first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.kernels.driver import WORDS
from mirrormask.runtime.kernels.facts import FACTS

__all__ = ["Sequences", "segments"]

Ints = npt.NDArray[np.int64]
#: (first op, how many, whether they take all buffers together).
Runs = list[tuple[int, int, bool]]


def segments(together: list[bool]) -> Runs:
    """The runs of ops that are alike in whether they take all buffers together."""
    found, first = [], 0
    for kind, run in groupby(together):
        count = len(list(run))
        found.append((first, count, kind))
        first += count
    return found


@dataclass(frozen=True)
class Sequences:
    """``batch`` sequences of ``length`` tokens in buffers of ``tokens``.

    As many sequences as fit one buffer, or one and as many buffers as it needs, are a group.
    """

    tokens: int
    batch: int
    length: int

    @property
    def each(self) -> int:
        """Sequences of a group."""
        return max(1, self.tokens // max(1, self.length))

    @property
    def buffers(self) -> int:
        """Buffers of a group."""
        return max(1, -(-self.length // self.tokens))

    @property
    def groups(self) -> int:
        """How many groups there are."""
        return -(-self.batch // self.each) if self.length else 0

    def facts(self, pitch: int, steps: int) -> Ints:
        """What kernels are told of each buffer: ``[groups, buffers, facts]``."""
        facts = np.zeros((max(1, self.groups), self.buffers, len(FACTS)), np.int64)
        first = np.arange(len(facts))[:, None] * self.each
        sequences = np.minimum(self.each, self.batch - first)
        rows = sequences * self.length - np.arange(self.buffers) * self.tokens
        said: dict[str, Ints | int] = {
            "rows": np.clip(rows, 0, self.tokens),
            "buffers": self.buffers,
            "length": self.length,
            "sequences": sequences,
            "sequence": first,
            "pitch": pitch,
            "masks": steps,
        }
        for i, name in enumerate(FACTS):
            facts[:, :, i] = np.asarray(said[name])
        return facts

    def turns(self, common: Ints, groups: tuple[int, int], runs: Runs, arena: tuple[int, int], facts: Ints) -> Ints:
        """Their number, and the words of each.

        Args:
            common: the words of a turn of all ops on the first token; see :mod:`mirrormask.runtime.kernels.driver`.
            groups: the first, and past the last.
            runs: of ops, as :func:`segments` finds them.
            arena: the address of the first buffer, and the bytes from one to the next.
        """
        low, high = groups
        one = [
            (first, count, buffer)
            for first, count, together in runs
            for buffer in range(1 if together else self.buffers)
        ]
        first, count, buffer = np.array(one, np.int64).reshape(-1, 3).T
        words = np.broadcast_to(common, (high - low, len(one), WORDS)).copy()
        words[:, :, 0] += 8 * int(common[11]) * first
        words[:, :, 1] = count
        words[:, :, 2] = arena[0] + buffer * arena[1]
        group = np.arange(low, high)[:, None]
        words[:, :, 6] = group * self.each * self.length + buffer * self.tokens
        words[:, :, 7] = words[:, :, 6] + 1
        words[:, :, 12] = facts.ctypes.data + (group * self.buffers + buffer) * facts.strides[1]
        return np.concatenate([np.array([words.shape[0] * words.shape[1]]), words.reshape(-1)])
