"""Networks over volumes, against eager PyTorch: one region and nothing left in PyTorch, for each instruction set."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.machine.targets import TARGETS, Target, available_targets
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.graph.frames import frames_conv, taps_of
from mirrormask.runtime.model.ranges import RangeFinder
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.tune import default_choice

SIZE = (5, 9, 7)


@pytest.fixture(autouse=True)
def _own_cache(nothing_is_settled, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path_factory.getbasetemp() / "volumes"))


class Layers(nn.Module):
    """Convolutions of every kind, batch norms, and what is done number by number."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv3d(3, 6, 3, padding=1, bias=False), nn.BatchNorm3d(6), nn.ReLU())
        self.again = nn.Sequential(nn.Conv3d(6, 6, (3, 1, 3), padding="same"), nn.BatchNorm3d(6))
        self.each = nn.Conv3d(6, 6, 3, padding=(2, 1, 1), dilation=(2, 1, 1), groups=6)
        self.within = nn.Conv3d(6, 8, (1, 3, 3), (2, 1, 2), (0, 1, 1), groups=2)
        self.slopes, self.gain = nn.PReLU(8), nn.Parameter(torch.rand(8, 1, 1, 1) + 0.5)
        self.positions = nn.Parameter(torch.randn(1, 6, *SIZE))
        self.squeeze, self.widen = nn.Conv3d(8, 3, 1), nn.Conv3d(3, 8, 1)
        self.norm, self.group = nn.InstanceNorm3d(8, affine=True), nn.GroupNorm(2, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        x = F.relu(self.again(x) + x) + self.positions
        x = self.slopes(self.within(self.each(x) * 0.5)) * self.gain
        x = x * torch.sigmoid(self.widen(F.relu(self.squeeze(x.mean((2, 3, 4), keepdim=True)))))
        x = self.norm(F.silu(self.group(x))) * torch.tanh(x[:, :1])
        return self.head(x.mean((2, 3, 4))), x


class Sizes(nn.Module):
    """A U-Net's way down and up, by pools, interpolation and transposed convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.MaxPool3d(3, 2, 1), nn.Conv3d(4, 6, (1, 3, 3)))
        self.up = nn.ConvTranspose3d(6, 4, 3, 2, 1, output_padding=(0, 1, 0), groups=2)
        self.twice = nn.ConvTranspose3d(4, 5, (1, 2, 2), (2, 2, 2), dilation=(2, 1, 1), bias=False)
        self.merge = nn.Conv3d(10, 4, 1)
        self.rows = nn.Linear(4 * 2 * 2 * 3, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        y = self.twice(F.relu(self.up(x)))
        y = torch.cat([y, F.interpolate(y[:, :, 1:-1], size=y.shape[2:], mode="trilinear")], 1)
        y = F.avg_pool3d(self.merge(y), (2, 1, 2))
        y = torch.cat([y, F.interpolate(y, scale_factor=(2.0, 1.0, 1.0))[:, :, ::2]], 2)
        y = F.pad(F.max_pool3d(y, 2, ceil_mode=True), (1, 0, 0, 1))
        y = torch.cat([y[..., :2], y[..., -3:]], 4)
        y = y[:, :, : 2 * (y.shape[2] // 2)]
        return self.rows(F.adaptive_avg_pool3d(y, (2, 2, 3)).flatten(1))


NETWORKS = {"layers": Layers, "sizes": Sizes}
#: Kernels of pools and interpolation are tried on each instruction set in the battery over maps.
ROWS = [("layers", target.name) for target in available_targets()] + [("sizes", "scalar")]


def sparse(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv3d, nn.Linear, nn.ConvTranspose3d)):
            module.weight.data *= torch.rand_like(module.weight) >= 0.5
        if isinstance(module, nn.BatchNorm3d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def leaves(value: object) -> list[Tensor]:
    return torch.utils._pytree.tree_leaves(value)


def agrees(got: object, expected: object) -> None:
    pairs = zip(got, expected, strict=True) if isinstance(expected, tuple) else [(got, expected)]
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 * float(b.abs().max()))


@pytest.mark.parametrize(("network", "name"), ROWS)
@pytest.mark.cases(1)
@torch.no_grad()
def test_a_network_over_volumes_is_one_region(network, name):
    model = sparse(NETWORKS[network]())
    x = torch.randn(2, 3, *SIZE)
    fast = mm.compile(model, x, instruction_set=name, tune=False, force=True)
    assert fast.report.compiled and not fast.report.left and fast.report.regions == 1, f"{fast.report.left}"
    for given in (x, x, x[:1], torch.randn(3, 3, *SIZE)):
        agrees(fast(given), model(given))
    made = RangeFinder(fast.regions[0].graph)(x)
    agrees(sorted(leaves(made), key=torch.numel), tuple(sorted(leaves(model(x)), key=torch.numel)))
    # Each layer is one row of the report, whatever the frames.
    rows = [row.layer for row in fast.report.layers if row.shape]
    assert len(rows) == len(set(rows))


@torch.no_grad()
def test_another_depth_is_another_capture():
    model = sparse(nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv3d(4, 2, 3)))
    fast = mm.compile(model, torch.randn(1, 3, 4, 8, 8), tune=False, force=True)
    given = torch.randn(2, 3, 8, 4, 8)  # the same numbers in other dimensions
    agrees(fast(given), model(given))


@pytest.mark.skipif("avx2" not in [target.name for target in available_targets()], reason="its registers are needed")
@pytest.mark.parametrize(("width", "threads"), [(7, 1), (33, 2)])
@torch.no_grad()
def test_frames_are_right_in_any_layout(width, threads):
    """Rows that share vectors and rows that do not, of AVX-512's length; dense kernels, which filter rows, too."""
    wide = Target("wide-in-halves", 16, 32, TARGETS["avx2"].needs, "x86_64")
    model = sparse(nn.Sequential(nn.Conv3d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv3d(5, 4, 3, (1, 2, 2), 1)))
    x = torch.randn(1, 3, 4, 7, width)
    captured = capture(model, (x,))
    graph, expected = captured.regions[captured.whole], model(x)
    for choose in (default_choice, lambda problem: list(problem.candidates())[-1]):
        plan = lower(graph, wide, threads, choose)
        plan.shares = True
        out = torch.full(expected.shape, float("nan"))
        addresses = np.array([x.data_ptr(), out.data_ptr()], np.int64)
        for _ in range(2):
            plan.run(addresses.ctypes.data, 1)
        agrees(out, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_frames_that_are_read_are_those_of_pytorch(stride, dilation):
    x, weight = torch.randn(1, 2, 6, 3, 3), torch.randn(4, 2, 3, 1, 1)
    frames = x.transpose(1, 2).flatten(1, 2)
    settings = (stride, (2, 0, 0), dilation)
    expected = F.conv3d(x, weight, None, (stride, 1, 1), *settings[1:2], (dilation, 1, 1))
    table = taps_of(6, expected.shape[2], 3, stride, 2, dilation)
    got = frames_conv(frames, weight, None, table, (1, 1), (0, 0), (1, 1), 1, False)
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(1, 2))
    turned = torch.randn(2, 4, 3, 1, 1)
    expected = F.conv_transpose3d(x, turned, None, (stride, 1, 1), (1, 0, 0), 0, 1, (dilation, 1, 1))
    table = taps_of(6, expected.shape[2], 3, stride, 1, dilation, transposed=True)
    got = frames_conv(frames, turned, None, table, (1, 1), (0, 0), (1, 1), 1, True)
    torch.testing.assert_close(got, expected.transpose(1, 2).flatten(1, 2))
