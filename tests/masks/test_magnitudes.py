"""What is chosen by magnitudes that are made as they are read: LAMP's masks and exchanges, against a plain sort."""

import math

import pytest
import torch

from mirrormask.masks import Magnitudes, exchange, few, keys, lamp, largest, magnitudes, select_lamp
from mirrormask.masks.few import few_largest
from mirrormask.masks.shards import Layer, largest_of_each

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.fixture(params=["small chunks", "whole tensors", "torch alone"])
def ways(request, monkeypatch):
    """As in test_mask_selection: many chunks of small tensors, samples of small tensors, and no numpy, as on a GPU."""
    if request.param == "small chunks":
        monkeypatch.setattr(keys, "CHUNK", 77)
        monkeypatch.setattr(lamp, "SMALL", 300)
        monkeypatch.setattr(lamp, "SAMPLE", 5)
        monkeypatch.setattr(few, "SAMPLE", 5)
    if request.param == "torch alone":
        for module in (few, magnitudes, lamp):
            monkeypatch.setattr(module, "by_numpy", lambda tensor: False)


def by_sorting(layers, k, wanted=None):
    """Equation (4) in float64 for every element, and one sort of all; equal scores stay by layer, then by size."""
    rows = []
    for number, x in enumerate(layers):
        sizes = x.double().abs().reshape(-1)
        own = torch.ones(x.numel(), dtype=torch.bool) if wanted is None else wanted[number].reshape(-1)
        order = torch.where(own, sizes, -1.0).sort(descending=True, stable=True).indices
        squares = torch.where(own, sizes, 0.0)[order].square()
        scores = (squares / squares.cumsum(0)).nan_to_num(nan=0.0)
        scores = torch.where(own[order], scores, -1.0)
        rows += [
            (-s, number, place, at) for place, (s, at) in enumerate(zip(scores.tolist(), order.tolist(), strict=True))
        ]
    masks = [torch.zeros(x.numel(), dtype=torch.bool) for x in layers]
    for _, number, _, at in sorted(rows)[:k]:
        masks[number][at] = True
    return [mask.view(x.shape) for mask, x in zip(masks, layers, strict=True)]


def equal(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def drawn(kind):
    """Layers of usual weights, of a few very large ones among small, of few levels, and of many zeros."""
    layers = [torch.randn(40, 30), 0.01 * torch.randn(500), torch.randn(7, 3, 2), torch.randn(0, 4), torch.zeros(11)]
    if kind == "outliers":
        layers[0].view(-1)[::211] *= 1e4
        layers[1][7] = 1e6
    if kind == "levels":
        layers = [(4 * x).round() for x in layers]
    if kind == "zeros":
        layers[0][torch.rand(40, 30) < 0.9] = 0.0
    return layers


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("kind", ["usual", "outliers", "levels", "zeros"])
def test_the_masks_of_lamp_are_those_of_a_sort(kind, request):
    layers = drawn(kind)
    total = sum(x.numel() for x in layers)
    for k in (0, 1, 3, 30, 200, 900, 1500, total - 12, total - 1, total):
        found = select_lamp([Magnitudes(x) for x in layers], k)
        assert sum(int(mask.sum()) for mask in found) == k
        expected = by_sorting(layers, k)
        if "torch alone" in request.node.name:  # scores in float32, whose ties are by index
            differ = sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True))
            assert kind in ("levels", "zeros") or differ <= 2
        else:
            assert equal(found, expected)


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_of_what_is_not_wanted_nothing_stays_while_there_is_other(dtype):
    layers = [x.to(dtype) for x in drawn("zeros")]
    wanted = [torch.rand(x.shape) < 0.5 for x in layers]
    inverted = [~mask for mask in wanted]
    there = sum(int(mask.sum()) for mask in wanted)
    for k in (1, 50, 300, there - 3, there):
        found = select_lamp([Magnitudes(x, mask) for x, mask in zip(layers, wanted, strict=True)], k)
        assert sum(int(mask.sum()) for mask in found) == k
        assert not any(bool((a & ~b).any()) for a, b in zip(found, wanted, strict=True))
        assert equal(
            found, select_lamp([Magnitudes(x, m, wanted=False) for x, m in zip(layers, inverted, strict=True)], k)
        )
        if dtype == torch.float32 and k < 300:
            assert sum(int((a != b).sum()) for a, b in zip(found, by_sorting(layers, k, wanted), strict=True)) <= 2


def test_weights_that_are_not_finite_stay_first():
    x = torch.randn(3000)
    x[[5, 70]] = math.nan
    x[1234] = -math.inf
    for k in (3, 10, 500):
        (mask,) = select_lamp([Magnitudes(x)], k)
        assert int(mask.sum()) == k and bool(mask[[5, 70, 1234]].all())


@pytest.mark.usefixtures("ways")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["rows", "columns", "channels last"])
def test_an_exchange_is_that_of_a_sort(dtype, layout):
    x, wish = torch.randn(6, 8, 5, 5).to(dtype), torch.randn(6, 8, 5, 5).to(dtype)
    if layout == "columns":
        x, wish = x.transpose(0, 1), wish.transpose(0, 1)
    if layout == "channels last":
        x = x.contiguous(memory_format=torch.channels_last)
    alive = torch.rand(x.shape) < 0.3
    count = int(alive.sum())
    for drop in (0, 1, count // 3, count):
        found = exchange(x, alive, wish, count - drop, drop)
        key = torch.where(alive, x.double().abs(), -1.0).reshape(-1)
        stays = torch.zeros_like(key, dtype=torch.bool)
        stays[key.sort(descending=True, stable=True).indices[: count - drop]] = True
        key = torch.where(stays, -1.0, wish.double().abs().reshape(-1))
        stays[key.sort(descending=True, stable=True).indices[:drop]] = True
        assert torch.equal(found.reshape(-1), stays)


def test_magnitudes_of_parts_are_those_of_the_whole():
    x, mask = torch.randn(30, 7), torch.rand(30, 7) < 0.6
    layer = Layer(Magnitudes(x, mask), lambda at: at, x.numel(), True)
    (found,) = largest_of_each([layer], [50], lambda counts: counts)
    assert torch.equal(found, largest(Magnitudes(x, mask), 50))
    assert torch.equal(found, largest(torch.where(mask, x.abs(), -1.0), 50))


@pytest.mark.usefixtures("ways")
def test_the_bits_of_numbers_that_differ_in_their_last_one():
    one = torch.tensor(1.0)
    above = torch.nextafter(one, 2 * one)
    row = torch.stack([one, -above, one, above, torch.tensor(-0.0), torch.tensor(0.0)])
    assert [largest(Magnitudes(row), k).int().tolist() for k in (1, 3, 5)] == [
        [0, 1, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 1, 1, 1, 1, 0],
    ]


@pytest.mark.parametrize("kind", ["usual", "levels", "zeros", "infinities", "integers", "sorted"])
@pytest.mark.parametrize("sparse", [False, True], ids=["one in SAMPLE", "one in SPARSER"])
def test_few_are_those_of_a_sort(kind, sparse, monkeypatch):
    monkeypatch.setattr(keys, "CHUNK", 500)
    monkeypatch.setattr(few, "SAMPLE", 7)
    monkeypatch.setattr(few, "SPARSER", 11)
    monkeypatch.setattr(few, "LARGE", 0 if sparse else 10**9)
    x = torch.randn(83, 97)
    x = {"usual": x, "levels": (2 * x).round(), "zeros": x.relu(), "sorted": x.sort().values,
         "infinities": torch.where(x > 1.5, math.inf, x), "integers": (9 * x).round().int()}[kind]  # fmt: skip
    for scores in (x, x.t()):
        order = scores.reshape(-1).sort(descending=True, stable=True).indices
        for k in (1, 3, 100, 900):
            expected = torch.zeros(x.numel(), dtype=torch.bool)
            expected[order[:k]] = True
            found = few_largest(scores, k)
            assert found is not None or kind != "usual"
            assert found is None or torch.equal(found.reshape(-1), expected)


def test_many_are_left_to_others():
    x = torch.randn(keys.CHUNK)
    assert few_largest(x, 0) is None and few_largest(x, keys.CHUNK // 4) is None
    assert few_largest(torch.zeros(keys.CHUNK), 5) is None  # all are near the last that stays
    assert few_largest(torch.randn(100), 5) is None
