"""Many small tensors as a few: what is asked of each costs a call, and of a model of 10^5 tensors the calls are all."""

from __future__ import annotations

import cmath
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from mirrormask.masked import count_true, keep_only

__all__ = ["ROOM", "SMALL", "all_finite", "count_each", "flats", "is_small", "keep_only_each", "which_not_finite"]

#: Elements that a flat of several tensors has at most; of a tensor with more, nothing is copied.
ROOM = 2**16
#: Of a tensor with so many elements or fewer, a call takes longer than copying it.
SMALL = 2**12
#: How many small tensors are written at once: at most 4 MB of float32.
AT_ONCE = 256


@torch.no_grad()
def flats(tensors: Sequence[Tensor]) -> Iterator[tuple[range, Tensor]]:
    """The elements of all tensors in order, in flat tensors: of several small ones of a kind, or of one.

    A flat of several is a copy. A DTensor is not one of several: what is asked of it may be asked of all processes.
    One of more than :data:`ROOM` elements that do not lie in order is given as it is, in its own shape.

    Args:
        tensors: of any shapes, dtypes and devices.

    Returns:
        For each flat, which of the tensors it is of.

    Example:
        >>> [(list(of), flat.tolist()) for of, flat in flats([torch.ones(2), torch.zeros(1), torch.zeros(1).int()])]
        [([0, 1], [1.0, 1.0, 0.0]), ([2], [0])]
    """
    first, size, kind = 0, 0, None
    for index, tensor in enumerate(tensors):
        here, numel = (tensor.dtype, tensor.device, tensor.layout), tensor.numel()
        numel = numel if tensor.layout == torch.strided else ROOM  # a sparse gradient: what it holds, alone
        if index > first and (here != kind or size + numel > ROOM):
            yield range(first, index), _joined(tensors[first:index])
            first, size = index, 0
        kind, size = here, size + numel
    if len(tensors) > first:
        yield range(first, len(tensors)), _joined(tensors[first:])


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        whole = tensors[0].detach()
        if whole.layout != torch.strided:
            return whole.coalesce().values().reshape(-1)
        return whole if whole.numel() > ROOM and not whole.is_contiguous() else whole.reshape(-1)
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def count_each(tensors: Sequence[Tensor]) -> list[int]:
    """How many elements of each tensor are not zero.

    Example:
        >>> count_each([torch.tensor([1.0, 0.0, 2.0]), torch.zeros(2), torch.tensor([True])])
        [2, 0, 1]
    """
    counts: list[int] = []
    for of, flat in flats(tensors):
        if len(of) == 1:
            counts.append(count_true(flat) if flat.dtype == torch.bool else int(flat.count_nonzero()))
            continue
        sums = [0, *(flat != 0).cumsum(0).tolist()]
        end = before = 0
        for index in of:
            end += tensors[index].numel()
            counts.append(sums[end] - before)
            before = sums[end]
    return counts


@torch.no_grad()
def keep_only_each(tensors: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """As :func:`mirrormask.masked.keep_only` of each tensor with its mask; several small ones of a kind at once.

    Example:
        >>> small = [torch.tensor([1.0, float("nan")]), torch.tensor([[-2.0], [3.0]])]
        >>> keep_only_each(small, [torch.tensor([True, False]), torch.tensor([[False], [True]])])
        >>> [tensor.tolist() for tensor in small]
        [[1.0, 0.0], [[0.0], [3.0]]]
    """
    together: dict[torch.dtype, list[int]] = {}
    for index, (tensor, mask) in enumerate(zip(tensors, masks, strict=True)):
        if is_small(tensor) and mask.shape == tensor.shape:
            together.setdefault(tensor.dtype, []).append(index)
        else:
            keep_only(tensor, mask)
    for indices in together.values():
        for start in range(0, len(indices), AT_ONCE):
            some = indices[start : start + AT_ONCE]
            if len(some) == 1:  # whose flat would be the tensor itself
                keep_only(tensors[some[0]], masks[some[0]])
                continue
            own = [tensors[index] for index in some]
            flat = _flatten_dense_tensors(own)  # type: ignore[no-untyped-call]
            flat.masked_fill_(~_flatten_dense_tensors([masks[index] for index in some]), 0.0)  # type: ignore[no-untyped-call]
            torch._foreach_copy_(own, _unflatten_dense_tensors(flat, own))  # type: ignore[no-untyped-call]


def is_small(tensor: Tensor) -> bool:
    """Whether it is an ordinary tensor in CPU memory that is sooner copied than asked about."""
    return (
        0 < tensor.numel() <= SMALL
        and tensor.is_cpu
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_inference()
    )


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no element of any tensor in CPU memory is infinite or NaN."""
    return all(_is_finite(flat) for _, flat in flats(tensors))


def _is_finite(flat: Tensor) -> bool:
    # A sum is fast to take, and takes no memory; it can overflow where every element is finite.
    return cmath.isfinite(flat.sum().item()) or all(bool(part.isfinite().all()) for part in torch.split(flat, ROOM))


def which_not_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Of each tensor, whether an element is infinite or NaN."""
    found = [False] * len(tensors)
    for of, flat in flats(tensors):
        if not _is_finite(flat):
            for index in of:
                found[index] = len(of) == 1 or not bool(tensors[index].isfinite().all())
    return found
