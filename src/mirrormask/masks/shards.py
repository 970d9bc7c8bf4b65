"""The largest scores of layers that several processes hold parts of: the mask of one process, and nothing gathered.

The selection of :mod:`mirrormask.masks.selection`, for several layers side by side: two histograms of 16 bits each,
added up over the processes, say what the k-th largest score is, however many layers and processes there are. Where some
of the elements that equal it must go, two or three more of their indices say which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mirrormask.masks.keys import Scores, chunks, common, equal_places, from_key, to_keys
from mirrormask.masks.selection import Cut, Index, Reduce

__all__ = ["Layer", "kth_largest", "largest_of_all", "largest_of_each"]

DIGIT = 16


@dataclass(frozen=True)
class Layer:
    """The scores of one layer, as far as they are here.

    Attributes:
        scores: no NaN.
        index: from places in their row-major order to indices within the whole layer.
        size: the number of elements of the whole layer.
        counts: whether this process counts them: one of those that hold the same.
    """

    scores: Scores
    index: Index
    size: int
    counts: bool


def largest_of_all(layers: Sequence[Layer], k: int, reduce: Reduce) -> list[Tensor]:
    """For each layer the mask of what is here: exactly ``k`` True over all layers and processes together.

    Of equal scores those with the smallest index stay, as if all layers were concatenated.

    Args:
        layers: the same ones on every process.
        k: how many to keep.
        reduce: sums over the processes.
    """
    (cut,) = _cuts([layers], [k], reduce)
    return [cut.mask(layer.scores, index) for layer, index in zip(layers, _among(layers), strict=True)]


def largest_of_each(layers: Sequence[Layer], ks: Sequence[int], reduce: Reduce) -> list[Tensor]:
    """As :func:`largest_of_all`, with a number to keep of each layer by itself."""
    cuts = _cuts([[layer] for layer in layers], ks, reduce)
    return [cut.mask(layer.scores, layer.index) for layer, cut in zip(layers, cuts, strict=True)]


def kth_largest(parts: Sequence[Tensor], k: int, reduce: Reduce) -> float:
    """The k-th largest of all numbers of all processes.

    Args:
        parts: what this process counts.
        k: from 1 to how many there are.
        reduce: sums over the processes.
    """
    dtype = common(part.dtype for part in parts)
    keys = [lambda: (to_keys(chunk) for part in parts for chunk in chunks(part, dtype))]
    ((key, _, _),) = _kth_of_each(keys, [k], 8 * dtype.itemsize, reduce)
    return from_key(key, dtype)


def _among(layers: Sequence[Layer]) -> list[Index]:
    """The indices of several layers, as if they were concatenated."""

    def after(start: int, index: Index) -> Index:
        return lambda places: index(places) + start

    found, start = [], 0
    for layer in layers:
        found.append(after(start, layer.index))
        start += layer.size
    return found


def _cuts(problems: Sequence[Sequence[Layer]], ks: Sequence[int], reduce: Reduce) -> list[Cut]:
    """For each problem the cut that keeps its k largest."""
    dtype = common(layer.scores.dtype for layers in problems for layer in layers)
    sizes = [sum(layer.size for layer in layers) for layers in problems]
    cuts = [Cut(float("nan") if k <= 0 else float("-inf"), None, dtype) for k in ks]
    hard = [i for i, (k, size) in enumerate(zip(ks, sizes, strict=True)) if 0 < k < size]
    if not hard:
        return cuts
    keys = [_keys(problems[i], dtype) for i in hard]
    found = _kth_of_each(keys, [ks[i] for i in hard], 8 * dtype.itemsize, reduce)
    torn = []
    for i, (key, kept, equal) in zip(hard, found, strict=True):
        cuts[i] = Cut(from_key(key, dtype), None, dtype)
        if kept < equal:
            torn.append((i, kept))
    if torn:
        bits = DIGIT * (max(sizes).bit_length() // DIGIT + 1)
        ties = [_ties(problems[i], cuts[i]) for i, _ in torn]
        last = _kth_of_each(ties, [kept for _, kept in torn], bits, reduce)
        for (i, _), (index, _, _) in zip(torn, last, strict=True):
            cuts[i] = Cut(cuts[i].value, ~index + 1, dtype)
    return cuts


def _keys(layers: Sequence[Layer], dtype: torch.dtype) -> Callable[[], Iterator[Tensor]]:
    def parts() -> Iterator[Tensor]:
        for layer in layers:
            if layer.counts:
                for chunk in chunks(layer.scores, dtype):
                    yield to_keys(chunk)

    return parts


def _ties(layers: Sequence[Layer], cut: Cut) -> Callable[[], Iterator[Tensor]]:
    """The indices of what equals the cut, turned around: the smallest is the largest integer."""

    def parts() -> Iterator[Tensor]:
        for layer, index in zip(layers, _among(layers), strict=True):
            start = 0
            for chunk in chunks(layer.scores, cut.dtype) if layer.counts else ():
                yield ~index(equal_places(chunk, cut.value) + start)
                start += len(chunk)

    return parts


def _kth_of_each(
    problems: Sequence[Callable[[], Iterable[Tensor]]], ks: Sequence[int], bits: int, reduce: Reduce
) -> list[tuple[int, int, int]]:
    """For each problem the k-th largest integer, how many equal to it are among the k largest, and how many there are.

    Args:
        problems: their integers, signed, in pieces; read once for each digit.
        ks: which to find.
        bits: how many bits an integer has at most, a multiple of 16.
        reduce: sums over the processes; called once for each digit.
    """
    lows, left, equal = [-(2 ** (DIGIT - 1))] * len(ks), list(ks), [0] * len(ks)
    for shift in range(bits - DIGIT, -1, -DIGIT):
        histograms = torch.zeros((len(ks), 2**DIGIT), dtype=torch.int64)
        for histogram, parts, low in zip(histograms, problems, lows, strict=True):
            for part in parts():
                if shift < bits - DIGIT:  # the others differ in a higher digit
                    part = part.index_select(0, equal_places(part >> (shift + DIGIT), low >> DIGIT))
                if len(part):
                    histogram += torch.bincount((part >> shift).sub_(low), minlength=2**DIGIT).cpu()
        for i, histogram in enumerate(reduce(histograms)):
            from_top = histogram.flip(0).cumsum(0)
            place = int(torch.searchsorted(from_top, left[i]))
            found = 2**DIGIT - 1 - place
            equal[i] = int(histogram[found])
            left[i] -= int(from_top[place]) - equal[i]
            lows[i] = (lows[i] + found) << DIGIT
    return [(low >> DIGIT, kept, count) for low, kept, count in zip(lows, left, equal, strict=True)]
