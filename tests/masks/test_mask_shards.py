"""The mask that processes choose together is that of one process, ties included; here threads stand for processes."""

import threading

import pytest
import torch

from mirrormask.masks import allocate, keep_count, select
from mirrormask.masks.shards import Layer, kth_largest, largest_of_all, largest_of_each

COUNT = 3


def together(work):
    """``work(rank, reduce)`` on so many threads; what each returns."""
    barrier, given, found = threading.Barrier(COUNT), [None] * COUNT, [None] * COUNT

    def run(rank):
        def reduce(tensor):
            given[rank] = tensor.clone()
            barrier.wait()
            total = sum(given)
            barrier.wait()
            return total

        found[rank] = work(rank, reduce)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(COUNT)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def parts(scores, rank):
    """Rows in turn, so that shards interleave; the last layer is on every process, and counted by the second."""
    layers = []
    for i, score in enumerate(scores):
        rows = torch.arange(len(score)) if i == len(scores) - 1 else torch.arange(rank, len(score), COUNT)
        width = score[0].numel()

        def index(at, rows=rows, width=width):
            return rows[at // width] * width + at % width

        layers.append(Layer(score[rows], index, score.numel(), i < len(scores) - 1 or rank == 1))
    return layers


def joined(scores, found):
    """The masks of all processes as those of whole layers."""
    masks = []
    for i, score in enumerate(scores):
        mask = torch.zeros(score.shape, dtype=torch.bool)
        for rank in range(COUNT):
            mask[slice(None) if i == len(scores) - 1 else slice(rank, None, COUNT)] = found[rank][i]
        masks.append(mask)
    return masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("levels", [2, 7, 10**6])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9])
def test_processes_choose_the_mask_of_one(dtype, levels, sparsity):
    torch.manual_seed(levels)
    scores = [torch.randint(-levels, levels, shape).to(dtype) / 8 for shape in ((7, 5), (2, 3, 2), (11, 1), (4, 4))]
    total = keep_count(sum(score.numel() for score in scores), sparsity)
    found = together(lambda rank, reduce: largest_of_all(parts(scores, rank), total, reduce))
    for mask, wanted in zip(joined(scores, found), select(scores, sparsity), strict=True):
        assert torch.equal(mask, wanted)
    counts = allocate("uniform", [tuple(score.shape) for score in scores], sparsity)
    found = together(lambda rank, reduce: largest_of_each(parts(scores, rank), counts, reduce))
    for mask, wanted in zip(joined(scores, found), select(scores, sparsity, "uniform"), strict=True):
        assert torch.equal(mask, wanted)


def test_the_kth_largest_of_all_processes():
    values = [torch.tensor([3.0, -1.0]), torch.tensor([]), torch.tensor([2.0, 2.0, float("-inf")])]
    for k, wanted in enumerate([3.0, 2.0, 2.0, -1.0, float("-inf")], start=1):
        assert together(lambda rank, reduce, k=k: kth_largest([values[rank]], k, reduce)) == [wanted] * COUNT
