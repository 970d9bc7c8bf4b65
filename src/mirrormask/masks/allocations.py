"""How a target sparsity is shared over layers: one function an allocation; each meets the total exactly."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence

from mirrormask.checks import check_known, check_sparsity

__all__ = ["ALLOCATIONS", "FLOOR", "allocate", "check_allocation", "floors", "keep_count"]

#: The least that ``global`` leaves of a layer, as a share of its ERK count (docs/methods.md, "Extreme sparsity").
FLOOR = 0.3


def keep_count(numel: int, sparsity: float) -> int:
    """The nonzeros that a sparsity asks for: ``round((1 - sparsity) · numel)``.

    Example:
        >>> keep_count(1000, 0.95)
        50
    """
    return round((1 - check_sparsity(sparsity)) * numel)


def uniform(shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[int]:
    """The same sparsity in every layer; what rounding leaves over goes to the largest remainders."""
    sizes = [math.prod(shape) for shape in shapes]
    return _integers([(1 - sparsity) * size for size in sizes], sizes, keep_count(sum(sizes), sparsity))


def erk(shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[int]:
    """Erdős-Rényi-Kernel: a layer keeps a share in proportion to ``(sum of its dimensions) / (their product)``.

    A layer whose share would exceed 1 is kept whole (it saturates) and the rest is shared again, so that the total
    is met at every sparsity.

    Source: Evci et al. 2020, arXiv 1911.11134, section 3 (1), after Mocanu et al. 2018.
    """
    sizes = [math.prod(shape) for shape in shapes]
    raw = [sum(shape) / size if size else 0.0 for shape, size in zip(shapes, sizes, strict=True)]
    total = keep_count(sum(sizes), sparsity)
    saturated: set[int] = set()
    while True:
        open_layers = [i for i in range(len(sizes)) if i not in saturated]
        left = total - sum(sizes[i] for i in saturated)
        mass = sum(raw[i] * sizes[i] for i in open_layers)
        scale = left / mass if mass > 0 else 0.0
        over = {i for i in open_layers if scale * raw[i] > 1}
        if not over:
            break
        saturated |= over
    wanted = [float(sizes[i]) if i in saturated else scale * raw[i] * sizes[i] for i in range(len(sizes))]
    return _integers(wanted, sizes, total)


def floors(shapes: Sequence[tuple[int, ...]], sparsity: float, share: float) -> list[int]:
    """The nonzeros that each layer keeps in any case: ``share`` of its ERK count, rounded down, and at least one.

    Args:
        shapes: one a layer.
        sparsity: the fraction of zeros over all layers together, in [0, 1).
        share: in [0, 1]; 0 for no floor.

    Returns:
        Their sum is at most what the sparsity keeps. Where that is less than one a layer there is no floor: nothing can
        keep every layer alive then.

    Example:
        >>> floors([(16, 3, 3, 3), (64, 64, 3, 3), (10, 64)], 0.999, share=0.5)
        [2, 11, 6]
        >>> floors([(16, 3, 3, 3), (64, 64, 3, 3), (10, 64)], 0.99999, share=0.5)
        [0, 0, 0]
    """
    sizes = [math.prod(shape) for shape in shapes]
    keep = keep_count(sum(sizes), sparsity)
    alive = [int(size > 0) for size in sizes]
    if share == 0 or keep < sum(alive):
        return [0] * len(sizes)
    found = [max(math.floor(share * count), least) for count, least in zip(erk(shapes, sparsity), alive, strict=True)]
    surplus = sum(found) - keep  # the ones that were rounded up to are too many: the largest give way
    largest = [(-count, index) for index, count in enumerate(found)]
    heapq.heapify(largest)
    for _ in range(surplus):
        count, index = largest[0]
        heapq.heapreplace(largest, (count + 1, index))
        found[index] -= 1
    return found


def _integers(wanted: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Round ``wanted`` so that the sum is exactly ``total``, by largest remainders, within [0, size]."""
    counts = [min(math.floor(value), size) for value, size in zip(wanted, sizes, strict=True)]
    by_remainder = sorted(range(len(sizes)), key=lambda i: (counts[i] - wanted[i], i))
    missing = total - sum(counts)
    while missing > 0:
        for i in by_remainder:
            if missing > 0 and counts[i] < sizes[i]:
                counts[i] += 1
                missing -= 1
    return counts


#: Allocations that fix each layer's count from the shapes alone; ``global`` compares the scores of all layers.
ALLOCATIONS: Mapping[str, Callable[[Sequence[tuple[int, ...]], float], list[int]] | None] = {
    "global": None,
    "uniform": uniform,
    "erk": erk,
}


def check_allocation(name: str) -> str:
    """Return ``name`` if it names an allocation, else raise a ValueError that lists the known ones."""
    return check_known("allocation", name, ALLOCATIONS)


def allocate(allocation: str, shapes: Sequence[tuple[int, ...]], sparsity: float) -> list[int] | None:
    """The nonzeros of each layer, or None where the scores decide (``global``)."""
    function = ALLOCATIONS[check_allocation(allocation)]
    return None if function is None else function(shapes, check_sparsity(sparsity))
