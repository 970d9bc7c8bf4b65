"""The masks of LAMP, exactly so many, without a score for every weight and without a sort of them.

Within a tensor the score ``y² / Σ {z² : z ≥ y}`` of a magnitude y grows with y. So a cut through the scores of all
tensors is, in each of them, a cut through magnitudes, and only scores near it need to be known. A sample says between
which two magnitudes the cut of each tensor lies. One pass adds up the squares above and gathers what lies between,
whose scores are then exact. Bounds of all other scores tell whether the cut is there indeed; where it is not, what is
known by then gives the next guess, twice as wide.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirrormask.masks.keys import by_numpy, equal_places, over_layers
from mirrormask.masks.magnitudes import Magnitudes
from mirrormask.masks.radix import SAMPLE, together
from mirrormask.masks.scores import lamp, lamp_shares
from mirrormask.masks.selection import Cut, consecutive, find_cut

__all__ = ["select_lamp"]

Floats = NDArray[np.float64]

#: Of a tensor with fewer elements all are gathered: a sample of it would say little.
SMALL = 2**16
#: The last guess is that the cut may be anywhere; a first one that fails is of weights unlike any usual ones.
TRIES = 6


def select_lamp(layers: Sequence[Magnitudes], k: int) -> list[Tensor]:
    """The masks that keep the ``k`` largest LAMP scores of all tensors together, of equal ones those of the first.

    Args:
        layers: the magnitudes, of which those that are not wanted have no score and are the last to stay.
        k: how many to keep, from 0 to all that are wanted.

    Returns:
        One bool tensor a layer, with exactly ``k`` True in all.

    Example:
        >>> layers = [torch.tensor([[3.0, -4.0], [-3.0, 0.0]]), torch.tensor([0.1, 0.5])]
        >>> [mask.int().tolist() for mask in select_lamp([Magnitudes(x) for x in layers], 3)]
        [[[1, 1], [0, 0]], [0, 1]]

    Source: Lee, Park, Mo, Ahn and Shin 2021, arXiv 2010.07611, equation (4); the search is this library's.
    """
    cuts = _cuts(layers, k) if k > 0 and all(by_numpy(layer) for layer in layers) else None
    if cuts is None:
        return _by_scores(layers, k)
    return over_layers(lambda cut, layer: cut.mask(layer, lambda places: places), cuts, layers)


def _by_scores(layers: Sequence[Magnitudes], k: int) -> list[Tensor]:
    """From all scores: on other devices, and where weights are not finite."""
    scores = []
    for layer in layers:
        others = None if layer.mask is None else layer.mask != layer.wanted
        x = layer.x.detach()
        scores.append(lamp(x if others is None else x.masked_fill(others, 0.0), torch.Generator()))
        if others is not None:
            scores[-1].masked_fill_(others, -math.inf)
    indices = consecutive(scores)
    cut = find_cut(scores, indices, k)
    return [cut.mask(score, index) for score, index in zip(scores, indices, strict=True)]


class _Guess:
    """Where the cut of one layer may lie, and what is known of the layer.

    Attributes:
        low, high: the magnitudes between which all were gathered, both included; 1 is the smallest above zero.
        inside: those, from the largest to the smallest, as integers.
        scores: of those.
        count: how many are above ``high``.
        above: the sum of their squares.
    """

    def __init__(self, layer: Magnitudes) -> None:
        self.layer = layer
        self._largest = torch.iinfo(layer.dtype).max
        self.low, self.high = 1, self._largest
        self.inside, self.scores = np.empty(0, np.int64), np.empty(0)
        self.count, self.above = 0, 0.0
        self._every = max(SAMPLE, layer.numel() // SMALL | 1)
        drawn = layer.chunks(self._every) if layer.numel() >= SMALL else ()
        found = together((part[part > 0] for part in drawn), layer.numel() // self._every, layer.dtype)
        assert found is not None
        self._sample = np.sort(found.numpy())[::-1]
        self._squares = _squares(self._sample)
        self._sums = self._every * self._squares.cumsum()
        if not len(self._sample):
            self.read()

    def estimate(self) -> None:
        """Say what the scores of the sample are, from what is known of the sum of the squares above each."""
        offset = 0.0
        if self.count:  # a sum that is known need not be estimated from the few large ones in the sample
            before = int(np.count_nonzero(self._sample > self.high))
            offset = self.above - (self._sums[before - 1] if before else 0.0)
        self._negative = -self._squares / np.maximum(offset + self._sums, self._squares)

    def rank(self, threshold: float) -> int:
        """How many elements have a score above the threshold, by the sample's estimate if there is one."""
        if not len(self._sample):
            return int(np.searchsorted(-self.scores, -threshold))
        return self._every * int(np.searchsorted(self._negative, -threshold))

    def look_near(self, threshold: float, width: float) -> None:
        """Gather what has about this score; all, where the sample is too small to tell."""
        n = len(self._sample)
        if not n:
            return
        rank = self.rank(threshold) // self._every
        margin = min(width * (8 + 4 * math.sqrt(rank * (1 - rank / n))), n + 1)
        self.high = int(self._sample[int(rank - margin)]) if rank >= margin else self._largest
        self.low = int(self._sample[int(rank + margin)]) if rank + margin < n else 1
        self.read()

    def read(self) -> None:
        """The one pass over the layer."""
        self.count, self.above = 0, 0.0
        inside = together(self._between(), self.layer.numel(), self.layer.dtype)  # memory is taken as it is filled
        assert inside is not None
        self.inside = np.sort(inside.numpy())[::-1]
        squares = torch.from_numpy(_squares(self.inside))
        above = torch.tensor([self.above], dtype=torch.float64)
        self.scores = lamp_shares(squares, above)[0].numpy() if len(squares) else np.empty(0)

    def _between(self) -> Iterator[Tensor]:
        for chunk in self.layer.chunks():
            array = chunk.numpy()
            over = array > self.high
            found = int(np.count_nonzero(over))
            if found:
                self.count, self.above = self.count + found, self.above + float(_squares(array * over).sum())
            yield torch.from_numpy(array[np.flatnonzero((array >= self.low) & ~over)])

    @property
    def nonzero(self) -> int:
        """How many are not zero, if all of those were gathered."""
        return self.count + len(self.inside)

    @property
    def whole(self) -> bool:
        """Whether nothing is below what was gathered, but zeros."""
        return self.low == 1

    @property
    def finite(self) -> bool:
        """Whether its largest elements are."""
        return math.isfinite(self.above) and bool(np.isfinite(self.scores).all())

    def holds(self, threshold: float) -> bool:
        """Whether a cut at this score keeps all that are above and none that are below."""
        if self.count and not float(_squares(np.array([self.high], self.inside.dtype))[0]) / self.above > threshold:
            return False
        return self.whole or bool(self.scores[-1] < threshold)

    def cut(self, n: int) -> Cut:
        """Where the n largest of this layer end; equal ones stay by index."""
        dtype = self.layer.dtype
        if n == 0:
            return Cut(math.nan, None, dtype)
        if n == self.count:
            return Cut(self.high + 1, None, dtype)
        if n <= self.nonzero:
            value = int(self.inside[n - self.count - 1])
            larger = self.count + int(np.count_nonzero(self.inside > value))
            return Cut(value, self._index(value, n - larger), dtype)
        zeros = self.numbers()[0]
        if n <= self.nonzero + zeros:
            return Cut(0, self._index(0, n - self.nonzero), dtype)
        return Cut(-1, self._index(-1, n - self.nonzero - zeros), dtype)

    def numbers(self) -> tuple[int, int]:
        """How many zeros are wanted, and how many elements are not wanted at all; all others were gathered."""
        mask = self.layer.mask
        other = 0 if mask is None else int((mask != self.layer.wanted).sum())
        return self.layer.numel() - other - self.nonzero, other

    def _index(self, value: int, kept: int) -> int | None:
        """The index at which elements equal to ``value`` go, if so many of them stay."""
        start = 0
        for chunk in self.layer.chunks():
            places = equal_places(chunk, value)
            if kept <= len(places):
                return start + int(places[kept - 1]) + 1
            start, kept = start + len(chunk), kept - len(places)
        raise AssertionError("more are kept than there are")


def _squares(magnitudes: NDArray[Any]) -> Floats:
    """Of magnitudes as integers."""
    values = magnitudes.view(np.float32 if magnitudes.itemsize == 4 else np.float64).astype(np.float64)
    return np.square(values, out=values)


def _cuts(layers: Sequence[Magnitudes], k: int) -> list[Cut] | None:
    """The cut of each layer; None if one has numbers that are not finite."""
    guesses = over_layers(_Guess, layers)
    for attempt in range(TRIES):
        for guess in guesses:
            guess.estimate()
        threshold = _threshold(guesses, k)
        width = math.inf if attempt == TRIES - 1 else 2.0**attempt
        over_layers(_Guess.look_near, guesses, repeat(threshold), repeat(width))
        if not all(guess.finite for guess in guesses):
            return None
        kept = _share(guesses, k)
        if kept is not None:
            return [guess.cut(n) for guess, n in zip(guesses, kept, strict=True)]
    raise AssertionError("all were gathered, and the cut is among them")


def _threshold(guesses: Sequence[_Guess], k: int) -> float:
    """The score above which about k are."""
    low, high = 1e-300, 1.0
    for _ in range(60):
        middle = math.sqrt(low * high)
        if sum(guess.rank(middle) for guess in guesses) < k:
            high = middle
        else:
            low = middle
    return high


def _share(guesses: Sequence[_Guess], k: int) -> list[int] | None:
    """How many each layer keeps; None where what was gathered does not tell."""
    left = k - sum(guess.count for guess in guesses)
    scores = np.concatenate([guess.scores for guess in guesses])
    if left > len(scores):
        return _with_zeros(guesses, left - len(scores)) if all(guess.whole for guess in guesses) else None
    if left <= 0:
        return None
    scores.partition(len(scores) - left)
    threshold = float(scores[len(scores) - left])
    if not all(guess.holds(threshold) for guess in guesses):
        return None
    kept = [int(np.count_nonzero(guess.scores > threshold)) for guess in guesses]
    left -= sum(kept)
    for index, guess in enumerate(guesses):
        equal = min(left, int(np.count_nonzero(guess.scores == threshold)))
        kept[index], left = guess.count + kept[index] + equal, left - equal
    return kept


def _with_zeros(guesses: Sequence[_Guess], left: int) -> list[int]:
    """All that have a score above 0 stay: so many of the others do too, zeros first, from the first layer on."""
    kept, numbers = [guess.nonzero for guess in guesses], [guess.numbers() for guess in guesses]
    for kind in (0, 1):
        for index, own in enumerate(numbers):
            more = min(left, own[kind])
            kept[index], left = kept[index] + more, left - more
    return kept
