"""fp16 plans on any AVX-512 processor: each operation is computed in 32 bits and rounded to 16, as AVX512-FP16 does.

That is slow, but the numbers are the same. That the real instructions are selected is for ``test_assembly.py``.
"""

import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.machine import targets
from mirrormask.machine.targets import EMULATED_FP16
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.model.half import split
from mirrormask.runtime.model.ranges import RangeFinder
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.tune import default_choice

RUNS = "avx512" in {target.name for target in targets.available_targets()}
needs_avx512 = pytest.mark.skipif(not RUNS, reason="this processor has no AVX-512")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))


def run_half(model: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The output of an emulated fp16 plan, and of the model."""
    for m in model.modules():
        if isinstance(m, (nn.Conv2d, nn.Linear)):
            m.weight.data *= torch.rand_like(m.weight) > 0.7
    model.eval()
    with torch.no_grad():
        expected = model(x)
        captured = capture(model, (x,))
        graph = captured.regions[captured.whole]
        tokens = 32 * -(-len(x) // 32) if graph.rows and len(x) > 1 else 1
        plan = lower(graph, EMULATED_FP16, 1, default_choice, tokens)
    padded = torch.zeros(max(tokens, len(x)), *x.shape[1:])
    padded[: len(x)] = x
    out = torch.zeros(len(padded), *expected.shape[1:])
    addresses = np.array([padded.data_ptr(), out.data_ptr()], np.int64)
    plan.run(addresses.ctypes.data, len(padded) // tokens)
    return out[: len(x)], expected


@needs_avx512
@pytest.mark.parametrize("size", [56, 28, 14, 7, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions(size, stride):
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, stride, 1), nn.ReLU(), nn.Conv2d(6, 5, 3, padding=1), nn.SiLU(), nn.MaxPool2d(2, 1)
    )
    got, expected = run_half(model, torch.randn(2, 3, size, size))
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


@needs_avx512
@pytest.mark.parametrize("rows", [1, 5, 64])
def test_linear_layers(rows):
    got, expected = run_half(nn.Sequential(nn.Linear(70, 90), nn.GELU(), nn.Linear(90, 11)), torch.randn(rows, 70))
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


@needs_avx512
def test_classifier_head():
    model = nn.Sequential(nn.Conv2d(3, 8, 7, 2, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    got, expected = run_half(model, torch.randn(3, 3, 32, 32))
    torch.testing.assert_close(got, expected, rtol=0, atol=5e-3 * float(expected.abs().max()))


@pytest.fixture
def emulated(monkeypatch):
    """``mm.compile`` takes this processor for one with AVX512-FP16."""
    for place in ("build", "region"):
        monkeypatch.setattr(f"mirrormask.runtime.{place}.fp16_target", lambda: EMULATED_FP16)


def half(model: nn.Module, x: torch.Tensor, **options):
    return mm.compile(model, x, precision="fp16", force=True, tune=False, **options)


def close(fast, model, x, tolerance=5e-3):
    with torch.no_grad():
        expected = model(x)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=tolerance * float(expected.abs().max()))


class Loud(nn.Module):
    """Its middle layer leaves the range of half precision, and the one after brings the numbers back."""

    def __init__(self, gain: float, *, maps: bool) -> None:
        super().__init__()
        make = (lambda a, b: nn.Conv2d(a, b, 3, padding=1)) if maps else nn.Linear
        self.first, self.loud, self.calm, self.last = make(6, 8), make(8, 8), make(8, 8), make(8, 5)
        self.loud.weight.data.abs_().mul_(gain)
        self.calm.weight.data.mul_(1 / gain)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        return self.last(torch.relu(y + self.calm(torch.relu(self.loud(y)))))


SHAPES = {"maps": (2, 6, 9, 14), "one row": (1, 6), "rows": (40, 6), "rows of rows": (3, 5, 6)}


@needs_avx512
@pytest.mark.parametrize("kind", SHAPES)
def test_only_the_layers_that_leave_the_range_stay_in_fp32(kind, emulated):
    model, x = Loud(1e6, maps=kind == "maps").eval(), torch.randn(SHAPES[kind])
    fast = half(model, x)
    assert fast.report.precision == "fp16" and 0 < fast.report.error < 5e-3
    assert [name for name, _ in fast.report.wide] == ["calm", "loud"]
    assert "stays in fp32: loud: its sums reach" in str(fast.report)
    close(fast, model, x)
    close(fast, model, 0.5 * torch.cat([x, x]))  # another batch
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        close(other, model, x)
    assert half(model, x).report.cached
    calm = Loud(1.0, maps=kind == "maps").eval()
    assert half(calm, x).report.wide == ()
    if kind == "maps":
        close(fast, model, torch.randn(1, 6, 20, 7))


@needs_avx512
@pytest.mark.parametrize("kind", SHAPES)
def test_the_check_at_run_time_moves_layers_to_fp32_when_they_leave_the_range(kind, emulated):
    model, x = Loud(100.0, maps=kind == "maps").eval(), torch.randn(SHAPES[kind])
    fast, blind = half(model, x, check_range=True), half(model, x)
    assert fast.report.wide == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(fast, model, x)
    louder = 3e3 * x
    assert not blind(louder).isfinite().all() or (blind(louder) - model(louder)).abs().max() > 100
    with pytest.warns(RuntimeWarning, match="loud.* left the range of half precision"):
        close(fast, model, louder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(fast, model, louder)
        close(fast, model, x)
        bad = x.clone()
        bad.view(-1)[0] = float("nan")
        assert fast(bad).isnan().any()  # the input's own, and no reason to move anything


@needs_avx512
def test_negative_overflow_that_a_relu_would_hide_is_noticed(emulated):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    model[0].weight.data = -model[0].weight.data.abs()
    x = torch.rand(32, 8)
    fast = half(model, x, check_range=True)
    with pytest.warns(RuntimeWarning, match="0, "):
        close(fast, model, 1e6 * x)


@needs_avx512
def test_parts_in_pytorch_keep_their_wide_layers_for_other_shapes(emulated):
    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.norm, self.b = nn.Linear(6, 8), nn.LayerNorm(8), Loud(1e6, maps=False)
            self.c = nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.c(self.norm(self.a(x))))

    model = Between().eval()
    fast = half(model, torch.randn(2, 5, 6))
    assert fast.report.left and [name for name, _ in fast.report.wide] == ["b.calm", "b.loud"]
    for shape in [(2, 5, 6), (3, 7, 6)]:
        close(fast, model, torch.randn(shape))


@needs_avx512
def test_a_plan_that_is_far_off_runs_in_fp32_and_says_why(emulated):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 1)).eval()
    model[1].weight.data.copy_(torch.linalg.pinv(model[0].weight.data.sum(1, keepdim=True)))
    x = torch.randn(32, 64) * 1e-9  # below the smallest numbers of half precision
    model[0].bias.data.zero_()
    model[1].bias.data.zero_()
    fast = half(model, x)
    assert fast.report.precision == "fp32" and "in fp16 its output would differ by" in fast.report.reason


@needs_avx512
def test_pieces_of_a_graph_compute_what_it_does():
    model, x = Loud(1.0, maps=True).eval(), torch.randn(2, 6, 9, 14)
    (graph,) = capture(model, (x,)).blueprint.regions.values()
    names = [node.name for node in graph.nodes if node.op != "input"]
    for wide in ([], names, names[2:4], names[::2], names[-1:]):
        pieces = split(graph, wide)
        assert [node.name for piece, _ in pieces for node in piece.nodes if node.op != "input"] == names
        assert all((node.name in wide) == is_wide for piece, is_wide in pieces for node in piece.nodes if node.inputs)
        ready = set(graph.inputs)
        for piece, _ in pieces:
            assert ready.issuperset(piece.inputs)
            ready |= set(piece.outputs)
        assert ready.issuperset(graph.outputs)


def test_the_range_is_that_of_sums_whatever_their_order():
    model, x = nn.Sequential(nn.Linear(2, 1), nn.ReLU()).eval(), torch.tensor([[300.0, 300.0]])
    model[0].weight.data = torch.tensor([[200.0, -200.0]])
    model[0].bias.data.zero_()
    (graph,) = capture(model, (x,)).regions.values()
    finder = RangeFinder(graph)
    assert finder(x).item() == 0 and set(finder.peaks.values()) == {120000.0}
    finder = RangeFinder(finder.graph)
    finder(0.5 * x)
    assert not finder.wide


@pytest.mark.skipif(targets.fp16_target() is not None, reason="this processor has AVX512-FP16")
def test_processors_without_it_say_so():
    model, x = nn.Linear(4, 4).eval(), torch.randn(2, 4)
    with pytest.raises(ValueError, match="AVX512-FP16"):
        mm.compile(model, x, precision="fp16")
    assert mm.compile(model, x, precision="auto", force=True).report.precision == "fp32"
