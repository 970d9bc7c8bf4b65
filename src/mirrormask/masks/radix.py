"""The k-th largest of many numbers: exact, without a copy of all of them and without a sort.

Radix selection: a histogram of the highest 16 bits says which bucket holds the k-th, one of the next 16 bits says where
in the bucket, and so on to the last bit. Of many numbers a sample says first between which two the k-th most likely is,
and only those between are counted so. Over processes only counts are added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from mirrormask.masks.keys import Scores, all_chunks, by_numpy, equal_places, from_key, to_keys

__all__ = ["SAMPLE", "Reduce", "by_sample", "kth_largest", "kth_score", "together"]

#: Sums a small int64 tensor in CPU memory over processes.
Reduce = Callable[[Tensor], Tensor]

#: One score in so many is in the sample; a prime, so that it comes from all columns of a matrix.
SAMPLE = 61


def by_sample(
    scores: Sequence[Scores], dtype: torch.dtype, k: int, total: int, reduce: Reduce
) -> tuple[float, int, int] | None:
    """As :func:`kth_score`, in one pass: a sample tells of two scores that the k-th is between, or equal to one.

    None where it is not (bad luck), or a process finds more scores between them than it should hold.
    """
    here = sum(score.numel() for score in scores)
    sample = together(all_chunks(scores, dtype, SAMPLE), here // SAMPLE, dtype)
    assert sample is not None
    drawn = int(reduce(torch.tensor([len(sample)])))
    rank = drawn * k / total
    margin = 4 + 4 * math.sqrt(rank * (1 - k / total))  # four standard deviations of the k-th one's rank in a sample

    def ranked(rank: int) -> float:
        return kth_score(lambda: [sample], dtype, rank, drawn, reduce)[0]

    high = ranked(int(rank - margin)) if rank - margin >= 1 else math.inf
    low = ranked(int(rank + margin)) if rank + margin <= drawn else -math.inf
    above = 0

    def between() -> Iterator[Tensor]:
        nonlocal above
        for chunk in all_chunks(scores, dtype):
            inside, higher = _between(chunk, low, high)
            above += higher
            yield inside

    near = together(between(), here // 16, dtype)
    crowded, above, count = reduce(torch.tensor([near is None, above, 0 if near is None else len(near)])).tolist()
    if crowded or near is None:
        return None
    if above < k <= above + count:
        return kth_score(lambda: [near], dtype, k - above, count, reduce)
    end = high if k <= above else low
    above = equal = 0
    for chunk in all_chunks(scores, dtype):
        above += int((chunk > end).count_nonzero())
        equal += int((chunk == end).count_nonzero())
    above, equal = reduce(torch.tensor([above, equal])).tolist()
    return (end, k - above, equal) if above < k <= above + equal else None


def together(parts: Iterable[Tensor], room: int, dtype: torch.dtype) -> Tensor | None:
    """The parts as one tensor in CPU memory, of at most ``room`` elements; None if there are more.

    Its memory is taken first: small parts kept one by one would each lie in what the chunk before left free, and the
    next chunk would need new memory.
    """
    whole, count = torch.empty(room, dtype=dtype), 0
    for part in parts:
        if count + len(part) > room:
            return None
        whole[count : count + len(part)] = part
        count += len(part)
    return whole[:count]


def _between(values: Tensor, low: float, high: float) -> tuple[Tensor, int]:
    """The values between ``low`` and ``high``, both left out, and how many are not below ``high``."""
    if not by_numpy(values):
        above = values >= high
        return values[(values > low) & ~above], int(above.count_nonzero())
    array = values.numpy()
    over = array >= high
    return torch.from_numpy(array[np.flatnonzero((array > low) & ~over)]), int(np.count_nonzero(over))


def kth_score(
    parts: Callable[[], Iterable[Tensor]], dtype: torch.dtype, k: int, count: int, reduce: Reduce
) -> tuple[float, int, int]:
    """The k-th largest of ``count`` scores, how many equal to it are among the k largest, and how many there are."""
    key, kept, equal = kth_largest(lambda: map(to_keys, parts()), k, count, 8 * dtype.itemsize, reduce)
    return from_key(key, dtype), kept, equal


def kth_largest(
    parts: Callable[[], Iterable[Tensor]], k: int, count: int, bits: int, reduce: Reduce
) -> tuple[int, int, int]:
    """The k-th largest integer, how many equal to it are among the k largest, and how many equal to it there are.

    Args:
        parts: the integers, signed, in pieces; read once for each digit.
        k: from 1 to ``count``.
        count: how many integers all processes pass.
        bits: how many bits an integer has at most, a multiple of 16.
        reduce: sums over processes.
    """
    digit = 16 if count >= 2**18 else 8  # more passes over few take less time than histograms of more than they are
    low = -(2 ** (digit - 1))  # the least that the bits down to ``shift`` can be: the highest digit is signed
    for shift in range(bits - digit, -1, -digit):
        histogram = torch.zeros(2**digit, dtype=torch.int64)
        for part in parts():
            if shift < bits - digit:
                # The others differ in a higher digit.
                part = part.index_select(0, equal_places(part >> (shift + digit), low >> digit))
            histogram += torch.bincount((part >> shift).sub_(low), minlength=2**digit).cpu()
        histogram = reduce(histogram)
        from_top = histogram.flip(0).cumsum(0)
        place = int(torch.searchsorted(from_top, k))
        found = 2**digit - 1 - place
        equal = int(histogram[found])
        k -= int(from_top[place]) - equal
        low = (low + found) << digit
    return low >> digit, k, equal
