"""The largest scores of all layers together, exactly so many.

All elements of all tensors stand in one strict order: by score, the largest first, and equal scores by index. A
:class:`Cut` is a place in that order, and what is before it stays. It is found by :mod:`mirrormask.masks.radix`, over
the bits of the scores; then over the bits of the index, if some of the elements that equal the k-th must go.

Tensors are read in chunks that stay in the caches, so that beside scores and masks there is little memory. Over
devices and processes only counts are added up: each process passes what it holds, and a ``reduce`` that sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirrormask.flats import count_each, flats
from mirrormask.masks import keys
from mirrormask.masks.allocations import allocate, floors, keep_count
from mirrormask.masks.few import few_largest
from mirrormask.masks.keys import Scores, all_chunks, by_numpy, chunks, common, equal_places, over_layers, to_keys
from mirrormask.masks.radix import Reduce, by_sample, kth_largest, kth_score, together

__all__ = ["Cut", "Index", "Reduce", "consecutive", "find_cut", "largest", "put_first", "select"]

#: From places in a local tensor's row-major order (int64) to the same elements' indices among all weights.
Index = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Cut:
    """A place in the order of all elements: those above ``value`` stay, and those equal to it before ``index``.

    Args:
        value: the smallest score that stays; NaN where nothing does.
        index: the first index, among all weights, at which a score equal to ``value`` goes; None where none does.
        dtype: in which scores are compared.
    """

    value: float
    index: int | None
    dtype: torch.dtype

    def mask(self, scores: Scores, index: Index) -> Tensor:
        """A bool tensor of the shape and on the device of ``scores``: what stays.

        Args:
            scores: one of the tensors that the cut was found for, or a copy of it that was not counted.
            index: of this tensor's elements, as the cut was found with.
        """
        mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
        flat, start = mask.view(-1), 0
        for chunk in chunks(scores, self.dtype):
            stays = flat[start : start + len(chunk)]
            _at_least(chunk, self.value, stays)
            if self.index is not None:
                places = equal_places(chunk, self.value)
                stays.scatter_(0, places, index(places + start) < self.index)
            start += len(chunk)
        return mask


def find_cut(scores: Sequence[Scores], indices: Sequence[Index], k: int, reduce: Reduce = lambda counts: counts) -> Cut:
    """The cut that keeps exactly the ``k`` largest of all ``scores``, of equal ones those of the smallest index.

    Args:
        scores: what this process holds of each layer: any shapes, also empty; any floating dtypes or any integer ones,
            compared as the numbers that they are; on any devices; infinities, but no NaN. An element that several
            processes hold is passed by one of them.
        indices: for each tensor, where its elements are among those of all layers and processes, counted from 0.
        k: how many to keep, of all processes together.
        reduce: sums over processes, which all call this function together.

    Example:
        >>> layers = [torch.tensor([4.0, 1.0, 2.0]), torch.tensor([2.0, 2.0])]
        >>> find_cut(layers, consecutive(layers), 3)
        Cut(value=2.0, index=4, dtype=torch.float32)
    """
    total = int(reduce(torch.tensor([sum(score.numel() for score in scores)])))
    dtype = common(score.dtype for score in scores)
    if not 0 < k < total:
        return Cut(math.nan if k <= 0 else -math.inf, None, dtype)
    found = by_sample(scores, dtype, k, total, reduce) if total >= keys.CHUNK else None
    value, kept, equal = found or kth_score(lambda: all_chunks(scores, dtype), dtype, k, total, reduce)
    if kept == equal:
        return Cut(value, None, dtype)

    def ties() -> Iterator[Tensor]:
        for score, index in zip(scores, indices, strict=True):
            start = 0
            for chunk in chunks(score, dtype):
                yield ~index(equal_places(chunk, value).add_(start))  # the smallest index is the largest integer
                start += len(chunk)

    few = together(ties(), equal, torch.int64) if equal < total // 64 else None
    last, _, _ = kth_largest(
        lambda: ties() if few is None else [few], kept, equal, 16 * (total.bit_length() // 16 + 1), reduce
    )
    return Cut(value, ~last + 1, dtype)


def consecutive(scores: Sequence[Scores]) -> list[Index]:
    """The indices of tensors that follow each other, whole and in row-major order: as if they were concatenated."""

    def after(start: int) -> Index:
        return lambda places: places + start

    starts = [0]
    for score in scores:
        starts.append(starts[-1] + score.numel())
    return [after(start) for start in starts[:-1]]


def largest(scores: Scores, k: int) -> Tensor:
    """A bool mask of exactly ``k`` of the largest ``scores``; of equal ones the first by index.

    Args:
        scores: any shape, no NaN; or :class:`mirrormask.masks.magnitudes.Magnitudes`.
        k: how many to keep, in [0, numel].

    Example:
        >>> largest(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 3).int().tolist()
        [[1, 1], [0, 1]]
    """
    mask = few_largest(scores, k)
    return _largest([scores], k)[0] if mask is None else mask


def _largest(scores: Sequence[Scores], k: int) -> list[Tensor]:
    if sum(score.numel() for score in scores) < keys.CHUNK and all(score.device.type == "cpu" for score in scores):
        return _largest_of_few(scores, k)
    indices = consecutive(scores)
    cut = find_cut(scores, indices, k)
    return over_layers(cut.mask, scores, indices)


def _largest_of_few(scores: Sequence[Scores], k: int) -> list[Tensor]:
    """By one partition of all, where counting digits would be many calls over next to nothing."""
    dtype = common(score.dtype for score in scores)
    parts = [to_keys(chunk).numpy() for chunk in all_chunks(scores, dtype)]
    ranks = np.concatenate(parts) if parts else np.zeros(0, np.int64)
    kept = np.full(len(ranks), k > 0)
    if 0 < k < len(ranks):
        bound = np.partition(ranks, len(ranks) - k)[len(ranks) - k]
        np.greater_equal(ranks, bound, out=kept)
        ties = np.flatnonzero(ranks == bound)
        kept[ties[len(ties) - (np.count_nonzero(kept) - k) :]] = False
    return _taken_apart(torch.from_numpy(kept), scores)


def _largest_of_all(scores: Sequence[Scores], k: int) -> list[Tensor]:
    """As :func:`largest`, over all layers; small ones are read together."""
    there = [score for score in scores if isinstance(score, Tensor)]
    if len(there) < len(scores):
        return _largest(scores, k)
    pieces = list(flats(there))
    masks = zip(pieces, _largest([flat for _, flat in pieces], k), strict=True)
    return [own for (of, _), mask in masks for own in _taken_apart(mask, [there[index] for index in of])]


def _largest_of_each(scores: Sequence[Tensor], counts: Sequence[int]) -> list[Tensor]:
    """:func:`largest` of each layer; small ones are sorted together."""
    masks: list[Tensor] = []
    alone: list[int] = []
    for of, flat in flats(scores):
        own = [scores[index] for index in of]
        if len(own) == 1 or not by_numpy(flat):
            alone += of
            masks += own
        else:
            masks += _taken_apart(_sorted_apart(flat, [score.numel() for score in own], [counts[i] for i in of]), own)
    found = over_layers(largest, [scores[index] for index in alone], [counts[index] for index in alone])
    for index, mask in zip(alone, found, strict=True):
        masks[index] = mask
    return masks


def _sorted_apart(flat: Tensor, sizes: Sequence[int], counts: Sequence[int]) -> Tensor:
    """A flat mask of the largest of each stretch of so many scores; of equal ones the first."""
    ranks = to_keys(flat.to(common([flat.dtype]))).numpy()
    layers = np.repeat(np.arange(len(sizes)), sizes)
    order = np.lexsort((~ranks, layers))  # by layer, then from the largest; what is equal stays in its order
    starts = np.cumsum([0, *sizes[:-1]])
    mask = torch.empty(len(flat), dtype=torch.bool)
    mask.numpy()[order] = np.arange(len(flat)) - starts[layers] < np.asarray(counts)[layers]
    return mask


def _taken_apart(mask: Tensor, scores: Sequence[Scores]) -> list[Tensor]:
    """A flat mask as one of each tensor, in memory of its own: who keeps one does not keep all."""
    if len(scores) == 1:
        return [mask.view(scores[0].shape)]
    parts = torch.split(mask, [score.numel() for score in scores])
    return [part.view(score.shape).clone() for part, score in zip(parts, scores, strict=True)]


def select(scores: Sequence[Scores], sparsity: float, allocation: str = "global", floor: float = 0.0) -> list[Tensor]:
    """The masks that keep the largest scores: exactly ``round((1 - sparsity) · N)`` True over all layers together.

    Args:
        scores: one tensor a layer, on any devices; no NaN. Scores of several dtypes are compared as numbers. Without
            a floor also :class:`mirrormask.masks.magnitudes.Magnitudes`, all of as many bits.
        sparsity: the fraction of zeros, in [0, 1).
        allocation: ``"global"``, ``"uniform"`` or ``"erk"``.
        floor: under ``"global"``, the share of its ERK count that every layer keeps in any case, in [0, 1]: its largest
            scores, as far as they are above ``-inf``.

    Returns:
        One bool tensor a layer, of the layer's shape and on its device; of equal scores the first by index is kept.

    Example:
        >>> scores = [torch.tensor([[4.0, 1.0], [2.0, 3.0]]), torch.tensor([9.0, 8.0])]
        >>> [mask.int().tolist() for mask in select(scores, 0.5)]
        [[[1, 0], [0, 0]], [1, 1]]
        >>> [mask.int().tolist() for mask in select(scores, 0.5, "uniform")]
        [[[1, 0], [0, 1]], [1, 0]]
        >>> [mask.int().tolist() for mask in select([torch.tensor([9.0, 8.0]), torch.tensor([2.0, 1.0])], 0.5, floor=1)]
        [[1, 0], [1, 0]]
    """
    shapes = [tuple(score.shape) for score in scores]
    counts = allocate(allocation, shapes, sparsity)
    if counts is not None:
        there = [score for score in scores if isinstance(score, Tensor)]
        return _largest_of_each(there, counts) if len(there) == len(scores) else over_layers(largest, scores, counts)
    keep = keep_count(sum(score.numel() for score in scores), sparsity)
    masks, least = _largest_of_all(scores, keep), floors(shapes, sparsity, floor)
    if not any(least) or all(living >= k for living, k in zip(count_each(masks), least, strict=True)):
        return masks
    tensors = [score for score in scores if isinstance(score, Tensor)]
    assert len(tensors) == len(scores), "a floor asks for scores that are there"
    first = _largest_of_each(tensors, least)
    return _largest_of_all(put_first(tensors, first), keep)


def put_first(scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """New scores, with infinity where a mask is True: these stay before all others, unless their score is ``-inf``."""
    own = [score if score.is_floating_point() else score.double() for score in scores]
    return [score.masked_fill(mask & (score > -math.inf), math.inf) for score, mask in zip(own, masks, strict=True)]


def _at_least(values: Tensor, bound: float, out: Tensor) -> None:
    if by_numpy(values):
        np.greater_equal(values.numpy(), bound, out=out.numpy())
    else:
        torch.ge(values, bound, out=out)
