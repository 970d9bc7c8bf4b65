"""The operations that regions over rows know, each in a small network, against eager PyTorch.

One row each, as in test_operations: one region and nothing left in PyTorch, on each instruction set of this machine,
and any numbers of rows and lengths afterwards.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.machine.targets import TARGETS, Target, available_targets, best_target
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.model.ranges import RangeFinder
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.schedule.tune import Tuner

NAMES = [target.name for target in available_targets()]
FEATURES = 22
#: Leading dimensions: compiled for the first; several rows, a few, one, and more than one item of a plan holds.
LEADING = [(3, 5), (1, 9), (1, 1), (2, 75)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path_factory.getbasetemp() / "row_operations"))


class Network(nn.Module):
    """``operation(self, first(x), x)`` between linear layers."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.first, self.side = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.last = nn.LazyLinear(7)
        self.norm, self.rms = nn.LayerNorm(FEATURES), nn.RMSNorm(FEATURES)
        self.scale = nn.Parameter(torch.ones(FEATURES))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self, self.first(x), x))


def t5_norm(net: Network, y: Tensor) -> Tensor:
    """Hugging Face's RMS norm."""
    return net.scale * (y * torch.rsqrt(y.to(torch.float32).pow(2).mean(-1, keepdim=True) + 1e-6)).to(y.dtype)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "layer norm": lambda net, y, x: net.norm(y),
    "layer norm without numbers": lambda net, y, x: F.layer_norm(y, (FEATURES,), eps=1e-3),
    "layer norm of what is far from zero": lambda net, y, x: net.norm(y + 10),
    "rms norm": lambda net, y, x: net.rms(y),
    "rms norm with an eps": lambda net, y, x: F.rms_norm(y, (FEATURES,), None, 0.1),
    "rms norm by hand": lambda net, y, x: t5_norm(net, y),
    "norms before and after": lambda net, y, x: net.norm(x + net.side(F.gelu(net.norm(y)))),
    "residual streams": lambda net, y, x: net.norm((z := x + net.side(net.norm(x))) + net.side(F.relu(net.rms(z))) + y),
    "softmax": lambda net, y, x: F.softmax(5 * y, -1),
    "softmax of large numbers": lambda net, y, x: F.softmax(500 * y, 2),
    "log softmax": lambda net, y, x: F.log_softmax(5 * y, -1) * 0.1,
    "gelu by hand": lambda net, y, x: 0.5 * y * (1.0 + torch.tanh(0.7978845608028654 * (y + 0.044715 * y.pow(3.0)))),
}


def network(row: str) -> nn.Module:
    torch.manual_seed(0)
    model = Network(OPERATIONS[row])
    model(torch.zeros(1, 3, FEATURES))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data *= torch.rand_like(module.weight) >= 0.5
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            for parameter in module.parameters():
                parameter.data.uniform_(0.5, 1.5)
    model.scale.data.uniform_(0.5, 1.5)
    return model.eval()


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", OPERATIONS)
def test_an_operation_is_native_and_right(row, name):
    model = network(row)
    x = torch.randn(*LEADING[0], FEATURES)
    fast = mm.compile(model, x, instruction_set=name, tune=False, force=True)
    assert fast.report.compiled and not fast.report.left and fast.report.regions == 1, f"{fast.report.left}"
    with torch.no_grad():
        for _ in range(2):  # the second run finds the first one's memory
            close(fast(x), model(x))
        for leading in LEADING[1:]:
            other = torch.randn(*leading, FEATURES)
            close(fast(other), model(other))
        close(RangeFinder(fast.regions[0].graph)(x), model(x))


@pytest.mark.skipif(best_target().name != "avx2", reason="AVX-512 itself is tested above, or cannot be imitated")
@pytest.mark.parametrize("row", OPERATIONS)
def test_an_operation_is_right_in_the_layouts_of_longer_vectors(row):
    wide = Target("wide-in-halves", 16, 32, TARGETS["avx2"].needs, "x86_64")
    model, x = network(row), torch.randn(3, 7, FEATURES)
    with torch.no_grad():
        captured, expected = capture(model, (x,)), model(x)
        close(Region(captured.regions[captured.whole], wide, Tuner(measure=False))(x), expected)


@pytest.mark.parametrize("row", OPERATIONS)
def test_threads_that_share_rows_agree(row):
    """Each does some of every step: none may write what is another's."""
    model, x = network(row), torch.randn(1, 16, FEATURES)
    with torch.no_grad():
        captured, expected = capture(model, (x,)), model(x)
    region = Region(captured.regions[captured.whole], best_target(), Tuner(measure=False))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        region.plan_for(16).shares = True
        for _ in range(10):
            close(region(x), expected)
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_not_numbers_stay_among_themselves():
    model, x = network("norms before and after"), torch.randn(2, 5, FEATURES)
    fast = mm.compile(model, x, tune=False, force=True)
    x[0, 3, 2] = float("nan")
    with torch.no_grad():
        got, expected = fast(x), model(x)
    assert np.array_equal(got.isnan(), expected.isnan()) and got.isnan().any()
