"""What a build takes: code whose length does not grow with the maps, and memory that does not with the candidates."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mirrormask.machine.targets import Target, available_targets
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.kernels import pool, relayout
from mirrormask.runtime.kernels.layout import Layout, map_layout
from mirrormask.runtime.kernels.pool import PoolSpec
from mirrormask.runtime.kernels.relayout import RelayoutSpec, plain_layout
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.tune import default_choice

EVERY = available_targets()
per_target = pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
#: Characters of IR by which the digits of larger numbers may lengthen it.
DIGITS = 1500
#: (kernel, stride, padding) of a row.
WINDOWS = [(2, 2, 0), (3, 1, 1), (3, 2, 1), (5, 3, 2), (40, 1, 20), (600, 600, 0), (3500, 700, 800)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))


def difference(model: nn.Module, x: Tensor, target: Target, tokens: int = 1) -> float:
    """Between the first guess of a plan and eager PyTorch, relative to the largest output."""
    with torch.no_grad():
        captured, expected = capture(model.eval(), (x,)), model(x)
    plan = lower(captured.regions[captured.whole], target, 1, default_choice, tokens)
    result = torch.full((len(x), *plan.outputs[0]), float("nan"))
    addresses = np.array([x.data_ptr(), result.data_ptr()], np.int64)
    for _ in range(2):  # the second run finds the first one's memory
        plan.run(addresses.ctypes.data, len(x) // tokens)
    return float((result.reshape(expected.shape) - expected).abs().max() / expected.abs().max())


def flat(width: int) -> Layout:
    return plain_layout(1, 1, width)


def planes(width: int, target: Target) -> Layout:
    return map_layout(1, 1, width, target.lanes, halo=0)


def copies(width: int, target: Target) -> list[RelayoutSpec]:
    """In and out of the arena, into phases, and to and from the columns of rows."""
    outer, inner = flat(width), planes(width, target)
    half, third = planes(-(-width // 2), target), planes(-(-width // 3), target)
    wide = planes(width // 64 * 64, target)
    return [
        RelayoutSpec(target, outer, outer, True, False),
        RelayoutSpec(target, outer, inner, True, False),
        RelayoutSpec(target, inner, outer, False, True),
        RelayoutSpec(target, outer, half, True, False, (1, 2), ((0, 0), (0, 1))),
        RelayoutSpec(target, inner, third, False, False, (1, 3), ((0, 0), (0, 1), (0, 2))),
        RelayoutSpec(target, outer, wide, True, False, transposed=30),
        RelayoutSpec(target, wide, outer, False, True, transposed=30),
    ]


def pools(width: int, target: Target) -> list[PoolSpec]:
    found = []
    for kernel, stride, padding in WINDOWS:
        out = planes((width + 2 * padding - kernel) // stride + 1, target)
        settings = (planes(width, target), out, (1, kernel), (1, stride), (0, padding))
        found += [PoolSpec(target, *settings, mean, counted) for mean, counted in ((False, True), (True, False))]
    return found


@per_target
@pytest.mark.parametrize(("specs", "emit"), [(copies, relayout.emit), (pools, pool.emit)], ids=["copies", "pools"])
def test_code_does_not_grow_with_a_row(target, specs, emit):
    # As many vectors are left over from whole rounds in both.
    for narrow, wide in zip(specs(8_003, target), specs(104_003, target), strict=True):
        short, long = len(emit(narrow, "k")), len(emit(wide, "k"))
        assert abs(long - short) <= DIGITS, wide
        assert long < 200_000, wide


@per_target
def test_a_pools_stack_does_not_grow_with_a_row(target):
    for spec in pools(100_003, target):
        sizes = [int(part.split(" x ")[0]) for part in pool.emit(spec, "k").split("alloca [")[1:]]
        assert sum(sizes) <= 2 * pool.MOST_SCRATCH, spec


@per_target
@pytest.mark.parametrize("width", [8_000, 8_003, 100_000])
def test_a_wide_row_is_read_and_written(target, width):
    assert difference(nn.Linear(width, 3), torch.randn(2, width), target) < 1e-5
    assert difference(nn.Linear(3, width), torch.randn(2, 3), target) < 1e-5


@per_target
@pytest.mark.parametrize(("kernel", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 3, 0), (4, 4, 2)])
def test_a_long_signal(target, kernel, stride, padding):
    model = nn.Sequential(nn.Conv1d(3, 4, kernel, stride, padding), nn.ReLU(), nn.Conv1d(4, 2, 3, padding=1))
    assert difference(model, torch.randn(2, 3, 8_000), target) < 1e-5


@per_target
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_pools_of_long_signals(target, window):
    kernel, stride, padding = window
    kinds = [
        nn.MaxPool1d(kernel, stride, padding),
        nn.AvgPool1d(kernel, stride, padding),
        nn.AvgPool1d(kernel, stride, padding, count_include_pad=False),
    ]
    for width in (40, 8_003):
        for kind in kinds if width + 2 * padding >= kernel else ():
            model = nn.Sequential(nn.Conv1d(2, 2, 1), kind)
            assert difference(model, torch.randn(2, 2, width), target) < 1e-5, (kind, width)


@per_target
@pytest.mark.parametrize("width", [5, 9, 33, 300])
def test_pools_of_maps(target, width):
    kinds = [
        nn.MaxPool2d(3, 2, 1),
        nn.AvgPool2d(3, 1, 1, count_include_pad=False),
        nn.AvgPool2d((2, 5), (1, 3), (1, 2)),
    ]
    for kind in kinds:
        model = nn.Sequential(nn.Conv2d(2, 2, 1), kind)
        assert difference(model, torch.randn(2, 2, 9, width), target) < 1e-5, (kind, width)
