"""The largest scores of one tensor where few stay: one pass that compares only what may be among them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mirrormask.masks import keys
from mirrormask.masks.keys import Scores, by_numpy, chunks, common
from mirrormask.masks.radix import SAMPLE, together

__all__ = ["few_largest"]

#: Of so many elements at most one may stay: what is gathered of each takes 16 bytes at most.
SHARE = 8
#: Of a tensor with so many elements one in SPARSER (a prime) tells as much.
LARGE, SPARSER = 2**22, 509


def few_largest(scores: Scores, k: int) -> Tensor | None:
    """As :func:`mirrormask.masks.selection.largest`, where it can be done at once; None where it cannot.

    A sample says above which score at least k most likely are; one pass finds their places, and a partition of them
    the k largest. It is for CPUs, for large tensors, and for k that are at most an eighth of them.

    Args:
        scores: any shape, no NaN.
        k: how many to keep.
    """
    size = scores.numel()
    if not by_numpy(scores) or size < keys.CHUNK or not 0 < SHARE * k <= size:
        return None
    dtype = common([scores.dtype])
    every = SAMPLE if size < LARGE else SPARSER
    sample = together(chunks(scores, dtype, every), size // every, dtype)
    assert sample is not None
    drawn = sample.numpy()
    rank = math.ceil(k / every + 4 + 4 * math.sqrt(k / every))  # four standard deviations beyond the k-th one's
    if rank > len(drawn):
        return None
    bound = np.partition(drawn, len(drawn) - rank)[len(drawn) - rank]
    places, values, found, start = [], [], 0, 0
    for chunk in chunks(scores, dtype):
        array = chunk.numpy()
        near = np.flatnonzero(array >= bound)
        found += len(near)
        if found > 2 * rank * every + size // 64:  # very many are equal
            return None
        places.append((near + start).astype(np.uint32 if size <= 2**32 else np.uint64))
        values.append(array[near])
        start += len(array)
    if found < k:
        return None
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    mask.view(-1).numpy()[np.concatenate(places)[_largest(np.concatenate(values), k)]] = True
    return mask


def _largest(values: NDArray[Any], k: int) -> NDArray[np.bool_]:
    """Where the k largest are; of equal ones the first."""
    last = np.partition(values, len(values) - k)[len(values) - k]
    stays: NDArray[np.bool_] = values > last
    equal = np.flatnonzero(values == last)
    stays[equal[: k - np.count_nonzero(stays)]] = True
    return stays
