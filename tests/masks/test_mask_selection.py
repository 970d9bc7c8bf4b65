"""The k largest, against a sort: ties, dtypes, layouts, several processes, and the memory that it takes."""

import contextlib
import ctypes
import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mirrormask.masks import (
    Magnitudes,
    exchange,
    keys,
    largest,
    patterns,
    protect,
    radix,
    scores,
    select,
    select_lamp,
    selection,
)
from mirrormask.masks.scores import lamp, magnitude
from mirrormask.masks.selection import consecutive, find_cut

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
INTEGERS = [torch.uint8, torch.int32, torch.int64]


@pytest.fixture(params=["small chunks", "whole tensors", "torch alone"])
def ways(request, monkeypatch):
    """Chunks of a few elements too, so that small tensors have many; and torch's own functions too, as on a GPU."""
    for module in (keys, scores, patterns):
        monkeypatch.setattr(module, "CHUNK", keys.CHUNK if request.param == "whole tensors" else 7)
    for module in (keys, radix, selection, scores):
        monkeypatch.setattr(module, "by_numpy", lambda tensor: request.param != "torch alone")


def by_sorting(layers, k):
    """Masks of the k largest of all layers together, of equal ones the first."""
    wide = torch.float64 if any(layer.is_floating_point() for layer in layers) else torch.int64
    flat = torch.cat([layer.reshape(-1).to(wide) for layer in layers])
    mask = torch.zeros_like(flat, dtype=torch.bool)
    mask[flat.argsort(descending=True, stable=True)[:k]] = True
    sizes = [layer.numel() for layer in layers]
    return [m.reshape(s.shape) for m, s in zip(mask.split(sizes), layers, strict=True)]


def same(found, expected):
    return all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def by_cut(layers, k):
    indices = consecutive(layers)
    cut = find_cut(layers, indices, k)
    return [cut.mask(layer, index) for layer, index in zip(layers, indices, strict=True)]


def draw(shape, dtype, levels):
    """Scores of few levels, zeros of both signs and both infinities among them; or, without levels, of all bits."""
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return (
            torch.randint(info.min, info.max, shape, dtype=dtype)
            if not levels
            else torch.randint(0, levels, shape).to(dtype)
        )
    if levels:
        values = torch.tensor([0.0, -0.0, math.inf, -math.inf, 1.0, -1.0, 0.3, 1e-7][: levels + 2])
        return values[torch.randint(0, len(values), shape)].to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    info = torch.iinfo(bits)
    return torch.randint(info.min, info.max, shape, dtype=bits).view(dtype).nan_to_num(nan=0.5, posinf=math.inf)


def test_numbers_that_differ_in_their_last_bit():
    one = torch.tensor(1.0)
    above, below = torch.nextafter(one, 2 * one), torch.nextafter(one, 0 * one)
    row = torch.stack([one, below, above, one, -below, -above])
    assert [largest(row, k).int().tolist() for k in (1, 2, 4, 5)] == [
        [0, 0, 1, 0, 0, 0],
        [1, 0, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
    ]


def test_zeros_of_both_signs_are_equal_and_infinities_are_the_ends():
    row = torch.tensor([-math.inf, -0.0, 0.0, math.inf, -0.0])
    assert [largest(row, k).int().tolist() for k in (1, 2, 3, 4)] == [
        [0, 0, 0, 1, 0],
        [0, 1, 0, 1, 0],
        [0, 1, 1, 1, 0],
        [0, 1, 1, 1, 1],
    ]


def test_layers_of_several_dtypes_compare_as_numbers():
    """1.001 is nearer to 1 than bfloat16 can tell: in the first layer's dtype it would lose to that layer's 1."""
    layers = [torch.tensor([1.0, 2.0], dtype=torch.bfloat16), torch.tensor([1.001, 0.5], dtype=torch.float64)]
    assert [m.int().tolist() for m in select(layers, 0.5)] == [[0, 1], [1, 0]]


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("levels", [0, 1, 2, 6])
@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS], ids=str)
def test_every_count_is_that_of_a_sort(dtype, levels):
    layers = [draw(shape, dtype, levels) for shape in ((3, 5), (0, 4), (), (2, 3, 4), (11,))]
    for k in (-1, 0, 1, 2, 9, 17, 25, 26, 27, 40, 49, 50, 51, 52):  # there are 51
        assert same(by_cut(layers, k), by_sorting(layers, max(k, 0)))
    assert same([largest(layer, 5) for layer in layers], [by_sorting([layer], 5)[0] for layer in layers])


@settings(max_examples=100, deadline=None)
@given(
    layers=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=3), st.sampled_from(FLOATS)), min_size=1, max_size=5
    ),
    levels=st.integers(0, 6),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_layers_of_any_shapes_and_dtypes(layers, levels, share, seed):
    torch.manual_seed(seed)
    layers = [draw(shape, dtype, levels) for shape, dtype in layers]
    k = round(share * sum(layer.numel() for layer in layers))
    assert same(by_cut(layers, k), by_sorting(layers, k))


@pytest.mark.parametrize("levels", [0, 3])
def test_more_elements_than_a_chunk_has(levels):
    layers = [draw((3, keys.CHUNK // 2), torch.float32, levels), draw((keys.CHUNK,), torch.float32, levels)]
    for k in (1, 1000, keys.CHUNK, 2 * keys.CHUNK + 1):
        assert same(by_cut(layers, k), by_sorting(layers, k))


@pytest.mark.usefixtures("ways")
def test_tensors_that_are_not_contiguous_have_the_indices_of_reshape():
    x = draw((4, 6, 5), torch.float32, 2)
    for view in (x.movedim(1, -1), x.flip(0).transpose(0, 2), x[:, ::2], x[1].t(), x[:1].expand(3, 6, 5), x[0, 0, ::3]):
        for k in range(0, view.numel() + 1, max(1, view.numel() // 6)):
            assert same([largest(view, k)], by_sorting([view], k))
    assert largest(x.movedim(1, -1), 7).is_contiguous()


def test_scores_with_a_graph():
    x = torch.rand(5, requires_grad=True)
    assert int(largest(2 * x, 2).sum()) == 2 and int(largest(x, 2).sum()) == 2


# -- several processes ----------------------------------------------------------------------------------------------


class Team:
    """So many processes, as threads: ``reduce(rank)`` sums what all of them pass."""

    def __init__(self, size):
        self.barrier, self.passed = threading.Barrier(size, timeout=60), [None] * size

    def reduce(self, rank):
        def together(counts):
            assert counts.dtype == torch.int64 and counts.numel() <= 2**16
            self.passed[rank] = counts
            self.barrier.wait()
            total = sum(self.passed)
            self.barrier.wait()
            return total

        return together


def numbered(layers):
    """For each element of each layer its index among all."""
    sizes = [layer.numel() for layer in layers]
    return [n.view(layer.shape) for n, layer in zip(torch.arange(sum(sizes)).split(sizes), layers, strict=True)]


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("size", [1, 2, 5])
def test_processes_that_hold_parts_get_the_parts_of_the_same_masks(size, dim):
    """Parts are uneven, some empty; split along dimension 1, their indices interleave. The last layer is on all."""
    layers = [draw(shape, torch.float32, 4) for shape in ((4, 6), (5, 3), (1, 9), (7, 2))]

    def held(whole, rank):
        return [*(t.tensor_split(size, dim)[rank] for t in whole[:3]), whole[3]]

    def masks(rank, k, reduce):
        parts = held(layers, rank)
        indices = [n.reshape(-1).__getitem__ for n in held(numbered(layers), rank)]
        counted = parts if rank == 0 else [*parts[:3], parts[3].new_empty(0)]
        cut = find_cut(counted, indices, k, reduce)
        return [cut.mask(part, index) for part, index in zip(parts, indices, strict=True)]

    with ThreadPoolExecutor(size) as pool:
        for k in (0, 1, 7, 18, 30, 31, 32, 45, 61, 62):
            team, expected = Team(size), by_sorting(layers, k)
            runs = [pool.submit(masks, rank, k, team.reduce(rank)) for rank in range(size)]
            for rank, run in enumerate(runs):
                assert same(run.result(), held(expected, rank))


# -- scores and patterns in chunks ----------------------------------------------------------------------------------


def lamp_of_a_sort(x):
    """Equation (4) in float64 on the whole tensor."""
    sizes = magnitude(x, torch.Generator()).double().reshape(-1)
    order = sizes.sort(descending=True, stable=True).indices
    squares = sizes[order].square_()
    found = torch.empty_like(squares)
    found[order] = torch.where(squares.isinf(), squares, squares / squares.cumsum(0)).nan_to_num_(nan=0.0, posinf=2.0)
    return found.reshape(x.shape).float()


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("levels", [0, 1, 4, 6])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_lamp_is_that_of_a_sort_bit_for_bit(dtype, levels):
    for shape in ((), (0, 3), (4, 9, 5), (1000,)):
        x = draw(shape, dtype, levels)
        assert torch.equal(lamp(x, torch.Generator()), lamp_of_a_sort(x))
    x = torch.randn(6, 8).to(dtype).t()
    assert torch.equal(lamp(x, torch.Generator()), lamp_of_a_sort(x))


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("shape", [(3, 16), (5, 8, 3, 3), (0, 8)])
@pytest.mark.parametrize("pattern", ["1:2", "2:4", "3:8"])
def test_the_best_of_every_group_are_protected_and_nothing_else_changes(pattern, shape):
    n, m = patterns.check_pattern(pattern)
    scored = draw(shape, torch.float32, 4)
    before = scored.clone()
    found, expected = protect(scored, pattern).movedim(1, -1).reshape(-1, m), scored.movedim(1, -1).reshape(-1, m)
    for group, original in zip(found, expected, strict=True):
        best = by_sorting([original], n)[0]
        assert group[best].isposinf().all() and torch.equal(group[~best], original[~best])
    assert torch.equal(scored, before)


# -- memory ---------------------------------------------------------------------------------------------------------


def peak_bytes(function):
    """How far the peak of this process's resident memory rises while ``function`` runs (Linux)."""

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = resident("VmRSS")
    kept = function()
    return resident("VmHWM") - before, kept


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
@pytest.mark.parametrize(
    ("choose", "bound"),
    [
        (lambda layers: select(layers, 0.9), 2),
        (lambda layers: select(layers, 0.9, "uniform"), 2),
        (lambda layers: select(layers, 0.9, "erk"), 2),
        (lambda layers: select([layer.t() for layer in layers], 0.9), 2),
        (lambda layers: select([layer.round_() for layer in layers], 0.999), 2),  # ties, of which few stay
        (lambda layers: [lamp(layer, torch.Generator()) for layer in layers], 4 + 2),
        (lambda layers: select_lamp([Magnitudes(layer) for layer in layers], 2**21), 2),
        (lambda layers: [exchange(x, x > 1, x.t(), 10**5, 10**5) for x in layers], 2),
        (lambda layers: [protect(layer, "2:4") for layer in layers], 4 + 2),
    ],
    ids=["global", "uniform", "erk", "transposed", "ties", "lamp", "masks of lamp", "exchange", "protect"],
)
def test_bytes_a_weight_beside_what_goes_in(choose, bound):
    layers = [torch.randn(1024, 1024) for _ in range(32)]
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what tests before left free would hide what this takes
    choose(layers[:1])
    rise, kept = peak_bytes(lambda: choose(layers))
    assert len(kept) == len(layers)
    # Up to a byte more is what the allocator left lying between; `benchmarks/masks.py` measures 285 million weights.
    assert rise < (bound + 1) * sum(layer.numel() for layer in layers)
