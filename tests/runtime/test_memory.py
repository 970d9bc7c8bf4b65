"""Memory of a plan: what lives together lies apart, and what another layout overwrote is cleared."""

import functools
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.machine.targets import available_targets
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.kernels.layout import flat_layout, map_layout
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.memory import MARGIN, Memory
from mirrormask.runtime.schedule.problem import Choice

#: Nobody's memory.
ZERO = -1
LAYOUTS = [
    map_layout(4, 32, 32, 16, halo=1),
    map_layout(8, 16, 16, 16, halo=1),
    map_layout(8, 16, 16, 16, halo=0),
    map_layout(16, 8, 8, 16, halo=1),
    flat_layout(300),
]


@settings(max_examples=200, deadline=None, database=None)
@given(st.lists(st.tuples(st.integers(0, len(LAYOUTS) - 1), st.integers(0, 2)), min_size=1, max_size=25))
def test_buffers_that_live_together_lie_apart_and_lost_zeros_are_known(steps):
    """Against a simulation that paints, for two runs, the memory of each buffer with its layout and place.

    A cleared buffer is all zero here, though its rows are not: its writer fills them. That no margin of another buffer
    that lives is anything but zeros, the assertion of what lies before each buffer shows.
    """
    memory, live, history = Memory(), [], []
    for step, (kind, releases) in enumerate(steps):
        place = memory.take(LAYOUTS[kind], step)
        assert place >= MARGIN and place % 16 == 0
        for layout, other in live:
            assert place + LAYOUTS[kind].size <= other or other + layout.size <= place
        live.append((LAYOUTS[kind], place))
        history.append((LAYOUTS[kind], place))
        for _ in range(min(releases, len(live))):
            memory.give(*live.pop(0))
    assert memory.size >= max(place + layout.size for layout, place in history)
    cleared = {taken.step for taken in memory.disturbed()}
    owner = np.full(memory.size, ZERO)
    names = {key: number for number, key in enumerate(dict.fromkeys(history))}
    for _ in range(2):
        for step, (layout, place) in enumerate(history):
            inside = slice(place, place + layout.size - MARGIN)
            if step in cleared:
                owner[place - MARGIN : inside.stop] = ZERO
            elif not layout.flat:
                assert set(owner[inside].tolist()) <= {names[layout, place], ZERO}, "zeros that only it wrote around"
                assert set(owner[place - MARGIN : place].tolist()) == {ZERO}
            owner[inside] = names[layout, place]


def test_equal_layouts_that_take_turns_need_no_clearing():
    memory = Memory()
    a, b = (memory.take(LAYOUTS[0], step) for step in range(2))
    memory.give(LAYOUTS[0], a)
    assert memory.take(LAYOUTS[0], 2) == a != b
    assert memory.disturbed() == []
    memory.give(LAYOUTS[0], a)
    assert memory.take(LAYOUTS[1], 3) == a
    assert [taken.step for taken in memory.disturbed()] == [0, 3], (
        "a's first use follows the fourth's of the run before"
    )


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        step = outputs // inputs
        self.first = nn.Conv2d(inputs, outputs, 3, step, 1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.short = nn.Conv2d(inputs, outputs, 1, step) if step > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.short(x) + self.second(torch.relu(self.first(x))))


def residual_network(sparsity: float) -> nn.Module:
    widths = [(16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), *(Block(*pair) for pair in widths)).eval()
    for m in model.modules():
        if isinstance(m, nn.Conv2d):
            m.weight.data *= torch.rand_like(m.weight) > sparsity
            m.weight.data *= (1 - sparsity) ** -0.5
    return model


@pytest.mark.parametrize("size", [32, 28, 31])
@pytest.mark.cases(1)
def test_a_residual_network_needs_little_more_than_its_first_stage(size, tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))
    model, x = residual_network(0.9), torch.randn(3, 3, size, size)
    fast = mm.compile(model, x, tune=False, force=True)
    with torch.no_grad():
        for batch in (x, x[:1], 10 * torch.randn(2, 3, size, size)):
            expected = model(batch)
            torch.testing.assert_close(fast(batch), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    (region,) = fast.regions
    plan = region.plan_for(3)
    stage = 4 * 16 * size * size
    assert 4 * plan.floats < 6 * stage and fast.report.nbytes >= 4 * plan.floats


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The cache of all tests below: what several of them need is generated once."""
    return tmp_path_factory.mktemp("cache")


@functools.cache
def captured(size: int):
    """A network, exported once for all targets and kernels: its graph, an input, and what eager PyTorch makes of it."""
    model, x = residual_network(0.3), 5 + torch.randn(3, 3, size, size)
    with torch.no_grad():
        found = capture(model, (x,))
        return found.regions[found.whole], x, model(x)


@pytest.mark.parametrize("target", available_targets(), ids=lambda target: target.name)
@pytest.mark.parametrize("kernel", ["dense", "direct", "aligned", "winograd", "any"])
@pytest.mark.parametrize("size", [56, 32, 20])
@pytest.mark.cases(1)
def test_no_layer_reads_what_others_left(target, kernel, size, folder, monkeypatch):
    """Layers that read beside their maps, in memory that others filled: as on the first image, so on later ones."""
    monkeypatch.setenv("MIRRORMASK_CACHE", str(folder))
    graph, x, expected = captured(size)
    turn = itertools.count()

    def choose(problem) -> Choice:
        found = list(problem.candidates())
        if kernel == "any":
            return found[next(turn) % len(found)]
        return next((choice for choice in found if choice.kernel == kernel), found[0])

    plan = lower(graph, target, 1, choose, 1)
    out = torch.empty_like(expected)
    addresses = np.array([x.data_ptr(), out.data_ptr()], np.int64)
    plan.run(addresses.ctypes.data, 3)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
