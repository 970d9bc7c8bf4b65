"""The largest scores of all layers together: exact, without a copy of all scores and without a sort.

All elements of all tensors stand in one strict order: by score, the largest first, and equal scores by index. A
:class:`Cut` is a place in that order, and what is before it stays. It is found by radix selection: a histogram of the
scores' highest 16 bits says which bucket holds the k-th, one of the next 16 bits says where in the bucket, and so on to
the last bit; then the same over the bits of the index, if some of the elements that equal the k-th must go. Of many
scores a sample says first between which two the k-th most likely is, and only those between are counted so.

Tensors are read in chunks that stay in the caches, so that beside scores and masks there is little memory. Over
devices and processes only counts are added up: each process passes what it holds, and a ``reduce`` that sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mirrormask.masks.allocations import allocate, floors, keep_count

__all__ = [
    "Cut", "Index", "Reduce", "chunks", "common", "consecutive", "equal_places", "find_cut", "from_key", "largest",
    "put_first", "select", "to_keys",
]  # fmt: skip

#: Sums a small int64 tensor in CPU memory over processes.
Reduce = Callable[[Tensor], Tensor]
#: From places in a local tensor's row-major order (int64) to the same elements' indices among all weights.
Index = Callable[[Tensor], Tensor]

#: Elements read at a time on a CPU: a few temporaries of so many stay in its caches, and calls cost little beside work.
CHUNK = 2**18
#: One score in so many is in the sample; a prime, so that it comes from all columns of a matrix.
SAMPLE = 61


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

    def mask(self, scores: Tensor, index: Index) -> Tensor:
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


def find_cut(scores: Sequence[Tensor], indices: Sequence[Index], k: int, reduce: Reduce = lambda counts: counts) -> Cut:
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
    found = _by_sample(scores, dtype, k, total, reduce) if total >= CHUNK else None
    value, kept, equal = found or _kth_score(lambda: _all_chunks(scores, dtype), dtype, k, total, reduce)
    if kept == equal:
        return Cut(value, None, dtype)

    def ties() -> Iterator[Tensor]:
        for score, index in zip(scores, indices, strict=True):
            start = 0
            for chunk in chunks(score, dtype):
                yield ~index(equal_places(chunk, value).add_(start))  # the smallest index is the largest integer
                start += len(chunk)

    few = _together(ties(), equal, torch.int64) if equal < total // 64 else None
    last, _, _ = _kth_largest(
        lambda: ties() if few is None else [few], kept, equal, 16 * (total.bit_length() // 16 + 1), reduce
    )
    return Cut(value, ~last + 1, dtype)


def consecutive(scores: Sequence[Tensor]) -> list[Index]:
    """The indices of tensors that follow each other, whole and in row-major order: as if they were concatenated."""

    def after(start: int) -> Index:
        return lambda places: places + start

    starts = [0]
    for score in scores:
        starts.append(starts[-1] + score.numel())
    return [after(start) for start in starts[:-1]]


def largest(scores: Tensor, k: int) -> Tensor:
    """A bool mask of exactly ``k`` of the largest ``scores``; of equal ones the first by index.

    Args:
        scores: any shape, no NaN.
        k: how many to keep, in [0, numel].

    Example:
        >>> largest(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), 3).int().tolist()
        [[1, 1], [0, 1]]
    """
    return _largest([scores], k)[0]


def _largest(scores: Sequence[Tensor], k: int) -> list[Tensor]:
    indices = consecutive(scores)
    cut = find_cut(scores, indices, k)
    return [cut.mask(score, index) for score, index in zip(scores, indices, strict=True)]


def select(scores: Sequence[Tensor], sparsity: float, allocation: str = "global", floor: float = 0.0) -> list[Tensor]:
    """The masks that keep the largest scores: exactly ``round((1 - sparsity) · N)`` True over all layers together.

    Args:
        scores: one tensor a layer, on any devices; no NaN. Scores of several dtypes are compared as numbers.
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
        return [largest(score, k) for score, k in zip(scores, counts, strict=True)]
    keep = keep_count(sum(score.numel() for score in scores), sparsity)
    masks, least = _largest(scores, keep), floors(shapes, sparsity, floor)
    if all(int(mask.count_nonzero()) >= k for mask, k in zip(masks, least, strict=True)):
        return masks
    first = [largest(score, k) for score, k in zip(scores, least, strict=True)]
    return _largest(put_first(scores, first), keep)


def put_first(scores: Sequence[Tensor], masks: Sequence[Tensor]) -> list[Tensor]:
    """New scores, with infinity where a mask is True: these stay before all others, unless their score is ``-inf``."""
    own = [score if score.is_floating_point() else score.double() for score in scores]
    return [score.masked_fill(mask & (score > -math.inf), math.inf) for score, mask in zip(own, masks, strict=True)]


def _by_sample(
    scores: Sequence[Tensor], dtype: torch.dtype, k: int, total: int, reduce: Reduce
) -> tuple[float, int, int] | None:
    """As :func:`_kth_score`, in one pass: a sample tells of two scores that the k-th is between, or equal to one.

    None where it is not (bad luck), or a process finds more scores between them than it should hold.
    """
    here = sum(score.numel() for score in scores)
    sample = _together((chunk[SAMPLE - 1 :: SAMPLE] for chunk in _all_chunks(scores, dtype)), here // SAMPLE, dtype)
    assert sample is not None
    drawn = int(reduce(torch.tensor([len(sample)])))
    rank = drawn * k / total
    margin = 4 + 4 * math.sqrt(rank * (1 - k / total))  # four standard deviations of the k-th one's rank in a sample

    def ranked(rank: int) -> float:
        return _kth_score(lambda: [sample], dtype, rank, drawn, reduce)[0]

    high = ranked(int(rank - margin)) if rank - margin >= 1 else math.inf
    low = ranked(int(rank + margin)) if rank + margin <= drawn else -math.inf
    above = 0

    def between() -> Iterator[Tensor]:
        nonlocal above
        for chunk in _all_chunks(scores, dtype):
            inside, higher = _between(chunk, low, high)
            above += higher
            yield inside

    near = _together(between(), here // 16, dtype)
    crowded, above, count = reduce(torch.tensor([near is None, above, 0 if near is None else len(near)])).tolist()
    if crowded or near is None:
        return None
    if above < k <= above + count:
        return _kth_score(lambda: [near], dtype, k - above, count, reduce)
    end = high if k <= above else low
    above = equal = 0
    for chunk in _all_chunks(scores, dtype):
        above += int((chunk > end).count_nonzero())
        equal += int((chunk == end).count_nonzero())
    above, equal = reduce(torch.tensor([above, equal])).tolist()
    return (end, k - above, equal) if above < k <= above + equal else None


def _together(parts: Iterable[Tensor], room: int, dtype: torch.dtype) -> Tensor | None:
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


def _kth_score(
    parts: Callable[[], Iterable[Tensor]], dtype: torch.dtype, k: int, count: int, reduce: Reduce
) -> tuple[float, int, int]:
    """The k-th largest of ``count`` scores, how many equal to it are among the k largest, and how many there are."""
    key, kept, equal = _kth_largest(lambda: map(to_keys, parts()), k, count, 8 * dtype.itemsize, reduce)
    return from_key(key, dtype), kept, equal


def _kth_largest(
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


def common(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """A dtype of 32 or 64 bits in which each of these compares exactly."""
    found = set(dtypes)
    if torch.float64 in found:
        return torch.float64
    return torch.float32 if not found or any(dtype.is_floating_point for dtype in found) else torch.int64


def _all_chunks(tensors: Iterable[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for tensor in tensors:
        yield from chunks(tensor, dtype)


def chunks(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The elements in row-major order, some at a time: no tensor is copied whole, contiguous or not."""
    tensor = tensor.detach()
    size = CHUNK if tensor.device.type == "cpu" else 8 * CHUNK  # a call on a GPU costs more beside its work
    if tensor.is_contiguous() or tensor.numel() <= size:
        for chunk in torch.split(tensor.reshape(-1), size):
            yield chunk.to(dtype)
        return
    rows = size * len(tensor) // tensor.numel()
    for part in torch.split(tensor, rows) if rows else tensor:
        yield from chunks(part, dtype)


def by_numpy(tensor: Tensor) -> bool:
    """Whether numpy reads this: on a CPU it compares, counts, finds and sorts several times as fast as torch."""
    return tensor.device.type == "cpu"


def _at_least(values: Tensor, bound: float, out: Tensor) -> None:
    if by_numpy(values):
        np.greater_equal(values.numpy(), bound, out=out.numpy())
    else:
        torch.ge(values, bound, out=out)


def equal_places(values: Tensor, bound: float) -> Tensor:
    """The places of the values that are ``bound``."""
    if by_numpy(values):
        return torch.from_numpy(np.flatnonzero(values.numpy() == bound))
    return (values == bound).nonzero().view(-1)


def _between(values: Tensor, low: float, high: float) -> tuple[Tensor, int]:
    """The values between ``low`` and ``high``, both left out, and how many are not below ``high``."""
    if not by_numpy(values):
        above = values >= high
        return values[(values > low) & ~above], int(above.count_nonzero())
    array = values.numpy()
    over = array >= high
    return torch.from_numpy(array[np.flatnonzero((array > low) & ~over)]), int(np.count_nonzero(over))


def to_keys(values: Tensor) -> Tensor:
    """Integers in the order of ``values``: of a float its magnitude's bits with its sign, so that -0.0 equals 0.0."""
    if not values.is_floating_point():
        return values
    integer = _integer(values.dtype)
    bits = values.view(integer)
    sign = bits >> (8 * values.itemsize - 1)
    return (bits & torch.iinfo(integer).max).bitwise_xor_(sign).sub_(sign)


def from_key(key: int, dtype: torch.dtype) -> float:
    """The number whose key this is."""
    if not dtype.is_floating_point:
        return key
    bits = key if key >= 0 else torch.iinfo(_integer(dtype)).min - key
    return torch.tensor(bits, dtype=_integer(dtype)).view(dtype).item()


def _integer(dtype: torch.dtype) -> torch.dtype:
    return torch.int32 if dtype.itemsize == 4 else torch.int64
