"""Taps that meet nothing but padding are left out, and nothing else is."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.machine.targets import best_target
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.reach import reached
from mirrormask.runtime.schedule.tune import default_choice


def test_a_tap_that_some_output_reads_the_map_with_stays():
    for size, taps, stride, padding, dilation in itertools.product(
        (1, 2, 5), (1, 2, 3, 5), (1, 2), range(9), (1, 2, 4)
    ):
        made = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
        if made < 1:
            continue
        read = [[stride * o + tap * dilation - padding for o in range(made)] for tap in range(taps)]
        meets = [tap for tap in range(taps) if any(0 <= place < size for place in read[tap])]
        first, last = reached(size, made, taps, stride, padding, dilation)
        assert set(meets) <= set(range(first, last)) <= set(range(taps))
        if stride == 1 and meets:
            assert (first, last) == (meets[0], meets[-1] + 1)


def zeros(model: nn.Module, share: float) -> nn.Module:
    """Random zeros in the model's convolutions."""
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.weight.data *= torch.rand_like(layer.weight) >= share
    return model.eval()


#: kernel, stride, padding, dilation, groups
FAR = [(3, 1, 12, 12, 1), (3, 1, (9, 1), (9, 1), 4), (5, 2, 8, 4, 1), (2, 1, 30, 30, 1), (3, 2, (3, 40), (3, 40), 1)]


@pytest.mark.parametrize("share", [0.0, 0.8])
@pytest.mark.parametrize("settings", [*FAR, (3, 1, 1, 1, 1)], ids=str)
def test_far_taps_on_small_maps(settings, share, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", "")
    torch.manual_seed(0)
    kernel, stride, padding, dilation, groups = settings
    far = nn.Conv2d(8, 8, kernel, stride, padding, dilation, groups)
    model = zeros(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), far, nn.ReLU(), nn.Conv2d(8, 5, 1)), share)
    fast = mm.compile(model, torch.randn(2, 3, 9, 9), tune=False, force=True)
    assert fast.report.regions == 1 and not fast.report.left
    for size in [(9, 9), (1, 1), (2, 5), (17, 3), (40, 41)]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            try:
                expected = model(x)
            except RuntimeError:  # the map is smaller than the kernel
                continue
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_zeros_put_around_a_map_before_are_padding_too(monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", "")
    torch.manual_seed(0)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, (1, 3), dilation=23)
            self.last, self.near = nn.Conv2d(8, 5, 3, dilation=(9, 5)), nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = F.pad(self.first(x), (23, 23, 1, 2))
            z = F.relu(self.middle(y)) + self.near(y)[..., 23:-23]
            return self.last(F.pad(F.pad(z, (2, 9, 9, 7)), (1, 1), value=0.5))

    model = zeros(Padded(), 0.5)
    fast = mm.compile(model, torch.randn(2, 3, 9, 9), tune=False, force=True)
    assert fast.report.regions == 1 and not fast.report.left, fast.report.left
    for size in [(9, 9), (3, 2), (30, 31)]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("rows", [(-2, -2), (-1, 2)], ids=str)
def test_what_a_negative_padding_cuts_off_is_not_read(rows, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", "")
    torch.manual_seed(0)

    class Cut(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.far = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3, padding=(1, 0), dilation=(1, 24))

        def forward(self, x: Tensor) -> Tensor:
            return self.far(F.pad(self.first(x), (24, 24, *rows)))

    model = zeros(Cut(), 0.5)
    fast = mm.compile(model, torch.randn(2, 3, 9, 9), tune=False, force=True)
    assert fast.report.compiled, fast.report.reason
    for size in [(9, 9), (30, 31)]:
        x = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model(x)
        torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_rate_beyond_the_map_costs_what_a_1x1_kernel_does():
    """As in DeepLab on small images: eight of nine taps are not packed, and the map needs no room around it."""
    torch.manual_seed(0)
    plans = []
    for layer in (nn.Conv2d(8, 16, 3, padding=24, dilation=24), nn.Conv2d(8, 16, 1)):
        graph_of = capture(zeros(nn.Sequential(layer), 0.8), (torch.randn(1, 8, 14, 14),))
        plans.append(lower(graph_of.regions[graph_of.whole], best_target(), 1, default_choice))
    far, near = plans
    assert far.floats == near.floats
    assert max(np.size(a) for op in far.ops for a in op.args.values()) < 8 * 16
