"""mm.compile against eager PyTorch, for each instruction set that this machine runs."""

import pytest
import torch
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.machine.targets import available_targets

NAMES = [target.name for target in available_targets()]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return torch.relu(x + self.second(y))


def sparsified(module: nn.Module, sparsity: float) -> nn.Module:
    """Random zeros in every weight, and batch norms that do something."""
    for m in module.modules():
        if isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            m.weight.data *= torch.rand_like(m.weight) >= sparsity
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.uniform_(-0.5, 0.5)
            m.running_var.uniform_(0.5, 1.5)
    return module.eval()


def check(module: nn.Module, x: Tensor, name: str, sparsity: float = 0.8) -> None:
    module = sparsified(module, sparsity)
    fast = mm.compile(module, x, instruction_set=name, tune=False, force=True)
    assert fast.report.compiled and not fast.report.left, str(fast.report)
    with torch.no_grad():
        expected = module(x)
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [56, 28, 14, 7, 5, 4, 2, 1])
@pytest.mark.parametrize("stride", [1, 2])
def test_3x3_convolutions_of_every_width(name, size, stride):
    check(nn.Conv2d(6, 5, 3, stride, 1), torch.randn(2, 6, size, size + 1), name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [32, 14, 7])
def test_residual_blocks(name, size):
    check(Residual(8), torch.randn(2, 8, size, size), name)
