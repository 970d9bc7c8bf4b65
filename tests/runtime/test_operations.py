"""The operations that regions over maps know, each in a small network, against eager PyTorch.

One row each; the battery asks of every row: one region and nothing left in PyTorch, for each instruction set of this
machine (and AVX-512's layouts, halved, where it has none), batches of one and three, and other image sizes afterwards.
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
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.tune import default_choice

NAMES = [target.name for target in available_targets()]
#: Compiled at the first; rows of 7 and 9 share vectors, those of 17 and 33 end within one.
SIZES = [(12, 12), (7, 7), (31, 17), (9, 33)]
CHANNELS = 8


@pytest.fixture(autouse=True)
def _own_cache(nothing_is_settled, tmp_path_factory, monkeypatch):
    # One folder for the file: what several rows need is generated once.
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path_factory.getbasetemp() / "operations"))


class Network(nn.Module):
    """``operation(self, conv(x), x)`` between convolutions, which read what lies around a map."""

    def __init__(self, operation: Callable[..., Tensor], outputs: int) -> None:
        super().__init__()
        self.operation = operation
        self.first = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.last = nn.Conv2d(outputs, 5, 3, padding=1)
        self.squeeze, self.widen = nn.Conv2d(CHANNELS, 3, 1), nn.Conv2d(3, CHANNELS, 1)
        self.down, self.up = nn.Linear(CHANNELS, 3), nn.Linear(3, CHANNELS)
        self.side = nn.Conv2d(4, CHANNELS, 3, padding=1)
        self.narrow, self.both = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 4, 1)
        self.pair = nn.Conv2d(2 * CHANNELS, 5, 1)
        self.rows = nn.Linear(3, 40)
        self.norm = nn.BatchNorm2d(outputs)
        self.turned = nn.ConvTranspose2d(CHANNELS, 6, 3, 2, 1, output_padding=1, groups=2, dilation=(2, 1))
        self.doubled = nn.ConvTranspose2d(CHANNELS, 5, 2, 2, bias=False)
        self.slopes, self.slope = nn.PReLU(CHANNELS), nn.PReLU()
        nn.init.uniform_(self.slopes.weight, -0.5, 0.5)
        self.over = nn.LayerNorm(CHANNELS)
        nn.init.uniform_(self.over.weight, 0.5, 1.5)
        nn.init.uniform_(self.over.bias, 0.5, 1.5)
        self.numbers = nn.Parameter(torch.rand(CHANNELS, 1, 1) + 0.5)
        self.one = nn.Parameter(torch.rand(1) + 0.5)
        self.look, self.beside = nn.Conv2d(5, 1, 3, padding=1), nn.Conv1d(1, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self, self.first(x), x))


def gate(net: Network, y: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Squeeze and excitation's factor."""
    return function(net.widen(F.relu(net.squeeze(F.adaptive_avg_pool2d(y, 1)))))


def linear_gate(net: Network, y: Tensor) -> Tensor:
    z = torch.sigmoid(net.up(F.relu(net.down(y.mean((2, 3))))))
    return y * z.view(len(y), -1, 1, 1)


def response(net: Network, y: Tensor) -> Tensor:
    """timm's global response norm, channels first."""
    g = y.norm(p=2, dim=(2, 3), keepdim=True)
    n = g / (g.mean(dim=1, keepdim=True) + 1e-6)
    return y + torch.addcmul(net.over.bias.view(1, -1, 1, 1), net.over.weight.view(1, -1, 1, 1), y * n)


def response_last(net: Network, y: Tensor) -> Tensor:
    """The authors' own, channels last, between linear layers."""
    x = net.up(net.down(y.permute(0, 2, 3, 1)))
    g = torch.linalg.vector_norm(x, ord=2, dim=(1, 2), keepdim=True)
    n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
    return net.up(net.down(net.over.weight * (x * n) + net.over.bias + x)).permute(0, 3, 1, 2)


#: name -> (operation, channels of its result)
OPERATIONS: dict[str, tuple[Callable[..., Tensor], int]] = {
    name: (lambda net, y, x, function=function: function(y), CHANNELS)
    for name, function in {
        "relu": F.relu,
        "relu6": F.relu6,
        "silu": F.silu,
        "gelu": F.gelu,
        "hardswish": F.hardswish,
        "sigmoid": torch.sigmoid,
        "hardsigmoid": F.hardsigmoid,
        "tanh": torch.tanh,
        "leaky_relu": lambda y: F.leaky_relu(y, 0.2),
        "elu": lambda y: F.elu(y, 0.7),
        "celu": lambda y: F.celu(y, 0.7),
        "selu": F.selu,
        "mish": F.mish,
        "softplus": lambda y: F.softplus(y, 2.0),
        "hardtanh": lambda y: F.hardtanh(y, -0.3, 0.6),
        "clamp above zero": lambda y: y.clamp(0.1, 0.5),
        "clamp from one side": lambda y: y.clamp(min=0.2) + y.clamp(max=0.1),
        "in place": lambda y: F.leaky_relu(F.hardtanh(y, -2, 2, inplace=True), 0.1, inplace=True),
        "square and abs": lambda y: y.square() + y.abs() + y.pow(2),
        "exp": lambda y: torch.exp(-y),
        "roots": lambda y: torch.sqrt(y.abs()) + torch.rsqrt(y.square() + 0.5),
        "several at once": lambda y: torch.sigmoid(2 * F.relu(y) + 1),
    }.items()
} | {
    "number": (lambda net, y, x: 1 - ((y * 2 + 1 - 3) / 4), CHANNELS),
    "number less a multiple": (lambda net, y, x: torch.rsub(torch.rsub(y, 2.0, alpha=2), 1), CHANNELS),
    "custom hardswish": (lambda net, y, x: y * F.relu6(y + 3) / 6, CHANNELS),
    "sigmoid that others read": (
        lambda net, y, x: torch.sigmoid(y) * net.side(x + 1) + net.widen(net.squeeze(torch.sigmoid(y))),
        CHANNELS,
    ),
    "product": (lambda net, y, x: y * net.side(x), CHANNELS),
    "product, then functions": (lambda net, y, x: torch.sigmoid(y * net.side(x) + 0.5), CHANNELS),
    "difference": (lambda net, y, x: net.side(x) - F.relu(y), CHANNELS),
    "quotient": (lambda net, y, x: y / (1 + net.side(x).abs()), CHANNELS),
    "maximum and minimum": (lambda net, y, x: torch.maximum(y, net.side(x)) + torch.minimum(y, y * 2), CHANNELS),
    "stored numbers": (lambda net, y, x: (net.numbers * F.relu(y) + net.numbers - net.one) / net.numbers, CHANNELS),
    "stored numbers alone": (lambda net, y, x: net.numbers - y, CHANNELS),
    "squeeze and excitation": (lambda net, y, x: y * gate(net, y, torch.sigmoid), CHANNELS),
    "hard squeeze and excitation": (lambda net, y, x: gate(net, y, F.hardsigmoid) * y, CHANNELS),
    "linear squeeze and excitation": (lambda net, y, x: linear_gate(net, y), CHANNELS),
    "per channel, all of them": (
        lambda net, y, x: (y + y.mean((2, 3), keepdim=True)) / (2 + gate(net, y, torch.tanh)) - gate(net, y, F.relu),
        CHANNELS,
    ),
    "from a channel": (lambda net, y, x: gate(net, y, F.relu) - y, CHANNELS),
    "map for all channels": (lambda net, y, x: y * torch.sigmoid(net.side(x)[:, :1]), CHANNELS),
    "one number for all channels": (
        lambda net, y, x: (
            y * ((p := y.mean((2, 3), keepdim=True)) / (1 + net.squeeze(p)[:, :1].abs())) - net.squeeze(p)[:, :1] * p
        ),
        CHANNELS,
    ),
    "channels of a mean turned around": (lambda net, y, x: y * y.mean((2, 3), keepdim=True).flip(1), CHANNELS),
    "group norm": (lambda net, y, x: F.group_norm(y, 4, net.over.weight, net.over.bias), CHANNELS),
    "group norm of all": (lambda net, y, x: F.group_norm(y + 3, 1, net.over.weight, None, 1e-3), CHANNELS),
    "group norm without numbers": (lambda net, y, x: F.gelu(F.group_norm(y, 2)), CHANNELS),
    "instance norm": (lambda net, y, x: F.instance_norm(y, weight=net.over.weight, bias=net.over.bias), CHANNELS),
    "response norm": (lambda net, y, x: response(net, y), CHANNELS),
    "response norm of channels at the end": (lambda net, y, x: response_last(net, y), CHANNELS),
    "padding that is wider than a map": (
        lambda net, y, x: F.conv2d(y, net.side.weight.repeat(1, 2, 1, 1), None, 1, (3, 36), (3, 36)) + y,
        CHANNELS,
    ),
    "stored numbers on a mean": (lambda net, y, x: y + net.numbers * F.adaptive_avg_pool2d(y, 1), CHANNELS),
}


def looked_at(y: Tensor) -> Tensor:
    """What spatial attention looks at, in the words of several authors."""
    return torch.cat(
        [
            y.mean(1, keepdim=True),
            torch.max(y, dim=1, keepdim=True)[0],
            y.sum(1).unsqueeze(1),
            (y - 3).amax(1, keepdim=True),
            torch.linalg.vector_norm(y, dim=1, keepdim=True),
        ],
        1,
    )


OPERATIONS |= {
    "numbers of all channels": (lambda net, y, x: torch.cat([y, looked_at(y)], 1), CHANNELS + 5),
    "spatial attention": (lambda net, y, x: y * torch.sigmoid(net.look(looked_at(y))), CHANNELS),
    "numbers of all channels of means": (
        lambda net, y, x: y * ((z := y.mean((2, 3), keepdim=True)).softmax(1) + looked_at(z).mean(1, keepdim=True)),
        CHANNELS,
    ),
    "a convolution over channels": (
        lambda net, y, x: (
            y * torch.sigmoid(net.beside(y.mean((2, 3), True).squeeze(-1).mT).mT.unsqueeze(-1)).expand_as(y)
        ),
        CHANNELS,
    ),
    "sums of maps": (
        lambda net, y, x: y * y.sum((2, 3), keepdim=True) * 0.1 + y.sum((-1, -2))[:, :, None, None],
        CHANNELS,
    ),
    "softmax over channels": (lambda net, y, x: y.softmax(1) + F.log_softmax(y + 1, 1), CHANNELS),
    "channels over their norm": (lambda net, y, x: F.normalize(y, dim=1), CHANNELS),
    "gate of half of the channels": (lambda net, y, x: F.glu(torch.cat([y, x], 1), 1), (CHANNELS + 4) // 2),
    "rows and columns of means": (
        lambda net, y, x: (
            y * torch.sigmoid(y.mean(3, keepdim=True)) * y.mean(2, keepdim=True)
            - y.amax(-1, keepdim=True) / (1 + y.abs())
        ),
        CHANNELS,
    ),
}


def shuffled(y: Tensor, groups: int = 4) -> Tensor:
    n, c, h, w = y.shape
    return y.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


def dense_block(net: Network, y: Tensor) -> Tensor:
    """Lists that grow, as a DenseNet's."""
    parts = [y]
    for _ in range(3):
        parts.append(torch.sigmoid(net.squeeze(torch.cat(parts, 1)[:, -CHANNELS:])))
    return torch.cat(parts, 1)


def nested(net: Network, y: Tensor) -> Tensor:
    """Each concatenation holds the one before, as in timm."""
    one = torch.cat([y, net.squeeze(y)], 1)
    two = torch.cat([one, F.relu(net.squeeze(one[:, :CHANNELS]))], 1)
    return torch.cat([two, net.squeeze(two[:, 6:])], 1)


def ghost(net: Network, y: Tensor) -> Tensor:
    a = F.relu(net.squeeze(y))
    return torch.cat([a, torch.sigmoid(net.narrow(net.both(a)))], 1)[:, :5]


def unit(net: Network, y: Tensor) -> Tensor:
    """ShuffleNet's."""
    a, b = shuffled(y).chunk(2, 1)
    a, b = torch.cat([a, F.relu(net.narrow(b))], 1).split([2, 5], 1)
    return torch.cat([net.narrow(F.relu(b[:, 1:])), a, b], 1)


OPERATIONS |= {
    "concat": (lambda net, y, x: torch.cat([F.relu(net.squeeze(y)), net.side(x), y], 1), 2 * CHANNELS + 3),
    "concat of what others read": (
        lambda net, y, x: torch.cat([y, z := torch.sigmoid(net.squeeze(y)), y, z], 1),
        2 * CHANNELS + 6,
    ),
    "concat with the input": (lambda net, y, x: torch.cat([x, y, x], 1), CHANNELS + 8),
    "two concats of one": (
        lambda net, y, x: net.pair(torch.cat([y, net.side(x)], 1)) + net.pair(torch.cat([net.side(x), F.relu(y)], 1)),
        5,
    ),
    "concat after pools": (
        lambda net, y, x: torch.cat([F.max_pool2d(y, 3, 1, 1), F.avg_pool2d(y, 3, 1, 1), net.squeeze(y)], 1),
        2 * CHANNELS + 3,
    ),
    "concat, then a layer in its place": (lambda net, y, x: F.relu(net.norm(torch.cat([x, y], 1))), CHANNELS + 4),
    "concat of numbers": (
        lambda net, y, x: y * net.up(torch.cat([y.mean((2, 3))[:, 2:4], x.mean((2, 3))[:, :1]], 1))[:, :, None, None],
        CHANNELS,
    ),
    "growing concats": (lambda net, y, x: dense_block(net, y), CHANNELS + 9),
    "nested concats": (lambda net, y, x: nested(net, y), CHANNELS + 9),
    "ghost": (lambda net, y, x: ghost(net, y), 5),
    "slice": (lambda net, y, x: y[:, 2:7], 5),
    "slice of the input": (lambda net, y, x: torch.cat([x[:, :2], y, x[:, 3:]], 1), CHANNELS + 3),
    "slice in steps": (lambda net, y, x: y[:, 1::2], 4),
    "one channel": (lambda net, y, x: torch.cat([y, x[:, 1].unsqueeze(1) * 0.5 + 0.2], 1), CHANNELS + 1),
    "narrow": (lambda net, y, x: y.narrow(1, 3, 4) * torch.sigmoid(y.narrow(1, 0, 4)), 4),
    "split": (lambda net, y, x: (p := y.split(3, 1))[0] * torch.sigmoid(p[1]) + F.relu(p[0]), 3),
    "chunk": (lambda net, y, x: (p := y.chunk(2, 1))[0] * torch.sigmoid(p[1]), 4),
    "flipped channels": (lambda net, y, x: y.flip(1), CHANNELS),
    "channel shuffle": (lambda net, y, x: shuffled(y), CHANNELS),
    "channel shuffle by name": (lambda net, y, x: F.channel_shuffle(y, 2), CHANNELS),
    "shuffle unit": (lambda net, y, x: unit(net, y), 10),
    "a slice that outlives": (lambda net, y, x: net.widen(net.squeeze(F.relu(y)))[:, :3] + net.squeeze(y[:, :]), 3),
    "expanded": (lambda net, y, x: y * torch.sigmoid(y.mean((2, 3)).view(-1, CHANNELS, 1, 1)).expand_as(y), CHANNELS),
    "the same": (lambda net, y, x: F.dropout(y.detach().clone().contiguous(), 0.5, False).to(torch.float32), CHANNELS),
    "to features and back": (
        lambda net, y, x: y + F.relu(y.mean((2, 3), keepdim=True).flatten(1)).unsqueeze(-1).unsqueeze(-1),
        CHANNELS,
    ),
    "squeezed": (
        lambda net, y, x: y * net.up(net.down(F.adaptive_avg_pool2d(y, 1).squeeze(-1).squeeze(-1)))[:, :, None, None],
        CHANNELS,
    ),
    "features to maps": (lambda net, y, x: net.rows(F.relu(net.down(y.mean((2, 3))))).view(-1, 2, 5, 4), 2),
}


OPERATIONS |= {
    name: (lambda net, y, x, function=function: function(torch.sigmoid(y)), CHANNELS)
    for name, function in {
        "max pool up to the edge": lambda y: F.max_pool2d(y, 3, 2, ceil_mode=True),
        "max pool up to the edge, padded": lambda y: F.max_pool2d(y, 2, 2, 1, ceil_mode=True),
        "mean pool up to the edge": lambda y: F.avg_pool2d(y, 3, 2, 1, ceil_mode=True),
        "mean pool up to the edge, uncounted": lambda y: F.avg_pool2d(
            y, 4, 3, 1, ceil_mode=True, count_include_pad=False
        ),
        "adaptive mean": lambda y: F.adaptive_avg_pool2d(y, 4),
        "adaptive mean, unequal windows": lambda y: F.adaptive_avg_pool2d(y, (5, 7)),
        "adaptive maximum": lambda y: F.adaptive_max_pool2d(y, (5, 2)),
        "global maximum": lambda y: y * F.adaptive_max_pool2d(y, 1) + y.amax((2, 3))[:, :, None, None],
        "zero padding": lambda y: F.pad(y, (1, 2, 0, 3)),
        "padding with a number": lambda y: F.pad(y, (0, 1, 2, 0), value=0.5),
        "padding by reflection": lambda y: F.pad(y, (2, 1, 1, 2), mode="reflect"),
        "padding by repetition": lambda y: F.pad(y, (2, 1, 1, 2), mode="replicate"),
        "padding around": lambda y: F.pad(y, (2, 1, 1, 2), mode="circular"),
        "negative padding": lambda y: F.pad(y, (-1, 2, -2, -1)),
        "rows and columns": lambda y: y[:, :, 1:-1, 2:] + y[:, :, :-2, ::1][:, :, :, :-2],
        "every second": lambda y: y[:, :, ::2, 1::2],
        "nearest": lambda y: F.interpolate(y, scale_factor=2),
        "nearest, smaller": lambda y: F.interpolate(y, scale_factor=0.5),
        "up and together": lambda y: torch.cat(
            [
                F.interpolate(F.max_pool2d(y[:, ::2], 3, 1, 1), scale_factor=3),
                F.interpolate(y, scale_factor=3, mode="bilinear")[:, ::2],
            ],
            1,
        ),
        "linear": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear"),
        "linear between corners": lambda y: F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=True),
    }.items()
}


OPERATIONS |= {
    "layer norm over channels": (lambda net, y, x: net.over(y.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), CHANNELS),
    "layers over channels": (
        lambda net, y, x: y + net.up(F.gelu(net.down(net.over(y.permute(0, 2, 3, 1))))).permute(0, 3, 1, 2),
        CHANNELS,
    ),
    "transposed convolution": (lambda net, y, x: net.turned(F.relu(y)), 6),
    "transposed convolution, doubled": (lambda net, y, x: torch.cat([net.doubled(y), net.doubled(F.relu(y))], 1), 10),
    "prelu": (lambda net, y, x: net.slopes(y) + net.slope(-y), CHANNELS),
    "layer norm of a mean": (
        lambda net, y, x: y * net.over(y.mean((2, 3), keepdim=True).permute(0, 2, 3, 1)).permute(0, 3, 1, 2),
        CHANNELS,
    ),
}


def sparse(model: nn.Module, sparsity: float = 0.5) -> nn.Module:
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            module.weight.data *= torch.rand_like(module.weight) >= sparsity
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


def agrees(fast: nn.Module, model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        expected = model(x)
    got = fast(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", OPERATIONS)
def test_an_operation_is_native_and_right(row, name):
    operation, outputs = OPERATIONS[row]
    torch.manual_seed(0)
    model = sparse(Network(operation, outputs))
    x = torch.randn(3, 4, *SIZES[0])
    fast = mm.compile(model, x, instruction_set=name, tune=False, force=True)
    assert fast.report.compiled and not fast.report.left and fast.report.regions == 1, f"{fast.report.left}"
    for _ in range(2):  # the second run finds the first one's memory
        agrees(fast, model, x)
    agrees(fast, model, x[:1])
    for size in SIZES[1:]:
        agrees(fast, model, torch.randn(3, 4, *size))
        agrees(fast, model, torch.randn(1, 4, *size))
    region = fast.regions[0]
    with torch.no_grad():  # what looks for numbers that half precision cannot hold computes the same
        torch.testing.assert_close(RangeFinder(region.graph)(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(best_target().name != "avx2", reason="AVX-512 itself is tested above, or cannot be imitated")
@pytest.mark.parametrize("size", [(7, 7), (9, 33)])
@pytest.mark.parametrize("row", OPERATIONS)
def test_an_operation_is_right_in_the_layouts_of_longer_vectors(row, size):
    """Those of AVX-512, of which LLVM makes two registers each, with other kernels than the likeliest."""
    wide = Target("wide-in-halves", 16, 32, TARGETS["avx2"].needs, "x86_64")
    operation, outputs = OPERATIONS[row]
    torch.manual_seed(0)
    model, x = sparse(Network(operation, outputs)), torch.randn(2, 4, *size)
    with torch.no_grad():
        captured, expected = capture(model, (x,)), model(x)
    graph = captured.regions[captured.whole]
    for choose in (default_choice, lambda problem: list(problem.candidates())[-1]):
        plan = lower(graph, wide, 1, choose)
        out = torch.full(expected.shape, float("nan"))
        addresses = np.array([x.data_ptr(), out.data_ptr()], np.int64)
        for _ in range(2):
            plan.run(addresses.ctypes.data, len(x))
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("row", OPERATIONS)
def test_threads_that_share_an_image_agree(row):
    """Each does some channels of every step: none may write what is another's."""
    operation, outputs = OPERATIONS[row]
    torch.manual_seed(0)
    model, x = sparse(Network(operation, outputs)), torch.randn(1, 4, 7, 9)
    with torch.no_grad():
        captured, expected = capture(model, (x,)), model(x)
    plan = lower(captured.regions[captured.whole], best_target(), 2, default_choice)
    plan.shares = True
    for _ in range(10):
        out = torch.full(expected.shape, float("nan"))
        addresses = np.array([x.data_ptr(), out.data_ptr()], np.int64)
        plan.run(addresses.ctypes.data, 1)
        torch.testing.assert_close(out, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_what_depends_on_no_input_has_no_items():
    """Beside one image its first dimension looks like the batch."""

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.gates = nn.Conv2d(3, 4, 3), nn.Parameter(torch.randn(1, 4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.layer(x)) * torch.sigmoid(self.gates)

    model = sparse(Gated())
    fast = mm.compile(model, torch.randn(1, 3, 9, 9), tune=False, force=True)
    for batch in (1, 3):
        agrees(fast, model, torch.randn(batch, 3, 9, 9))


@pytest.mark.parametrize("name", NAMES)
def test_without_padding_a_kernel_may_reach_far(name):
    """As those of a causal network, which pads before."""

    class Causal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.far = nn.Conv1d(4, 6, 3, dilation=40)
            self.last = nn.Conv1d(6, 3, 3, dilation=70)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(F.pad(F.relu(self.far(F.pad(x, (80, 0)))), (140, 0)))

    model, x = sparse(Causal()), torch.randn(2, 4, 200)
    fast = mm.compile(model, x, instruction_set=name, tune=False, force=True)
    assert fast.report.compiled and not fast.report.left and fast.report.regions == 1, f"{fast.report.left}"
    for length in (200, 37, 150):
        agrees(fast, model, torch.randn(3, 4, length))


def test_transposed_convolutions_of_sequences():
    layers = [nn.Conv1d(4, 6, 3, padding=1), nn.ReLU(), nn.ConvTranspose1d(6, 4, 4, 2, 1), nn.ReLU()]
    layers += [nn.ConvTranspose1d(4, 6, 3, 3, 2, output_padding=1, groups=2, dilation=2, bias=False)]
    model = nn.Sequential(*layers).eval()
    for layer in model[::2]:
        layer.weight.data *= torch.rand_like(layer.weight) >= 0.5
    fast = mm.compile(model, torch.randn(2, 4, 11), tune=False, force=True)
    assert fast.report.compiled and not fast.report.left and fast.report.regions == 1, f"{fast.report.left}"
    for shape in [(2, 4, 11), (1, 4, 40), (3, 4, 5)]:
        agrees(fast, model, torch.randn(shape))
