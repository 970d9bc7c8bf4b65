"""Tokens that are made of maps: what vision transformers do, each operation between layers, against eager PyTorch.

One row each, as in test_operations: one region and nothing left in PyTorch, on each instruction set of this machine,
and other batches afterwards.
"""

from collections.abc import Callable

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
CHANNELS, SIDE, HEADS = 8, 6, 2
TOKENS = SIDE * SIDE


@pytest.fixture(autouse=True)
def _own_cache(nothing_is_settled, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path_factory.getbasetemp() / "token_operations"))


class Network(nn.Module):
    """``operation(self, tokens)``, ``[batch, length, CHANNELS]``, and a layer on what it gives."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.patches, self.conv = nn.Conv2d(3, CHANNELS, 2, 2), nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.kind = nn.Parameter(torch.randn(1, 1, CHANNELS))
        self.places = nn.Parameter(torch.randn(1, TOKENS + 1, CHANNELS))
        self.norm, self.layer, self.last = nn.LayerNorm(CHANNELS), nn.Linear(CHANNELS, CHANNELS), nn.LazyLinear(5)
        self.scale = nn.Parameter(torch.rand(CHANNELS) + 0.5)
        self.three, self.mix = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(TOKENS, TOKENS)
        self.attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True)
        self.table = nn.Parameter(torch.randn(25, HEADS))
        self.register_buffer("pairs", torch.randint(25, (9, 9)))
        self.patch = nn.Conv2d(CHANNELS, CHANNELS, 2, 2)
        self.one = nn.Conv2d(CHANNELS // 4, CHANNELS // 4, 3, padding=1)
        self.batch = nn.BatchNorm1d(CHANNELS)
        self.heat = nn.Parameter(torch.rand(HEADS, 1, 1) + 0.5)
        nn.init.uniform_(self.batch.running_var, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.operation(self, self.patches(x).flatten(2).transpose(1, 2)))


def maps(t: Tensor) -> Tensor:
    return t.transpose(1, 2).reshape(t.shape[0], t.shape[2], SIDE, SIDE)


def with_class(net: Network, t: Tensor) -> Tensor:
    return torch.cat([net.kind.expand(t.shape[0], -1, -1), t], 1)


def by_name(net: Network, t: Tensor) -> Tensor:
    q, k, v = net.three(t).reshape(t.shape[0], -1, 3, HEADS, CHANNELS // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(t.shape)


def windows(t: Tensor, side: int = 3, shift: int = 0) -> Tensor:
    """``[batch * windows, side * side, channels]``, as Swin has them."""
    x = t.reshape(-1, SIDE, SIDE, CHANNELS)
    x = torch.roll(x, (-shift, -shift), (1, 2)) if shift else x
    x = x.view(-1, SIDE // side, side, SIDE // side, side, CHANNELS)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side * side, CHANNELS)


def unwindowed(w: Tensor, side: int = 3, shift: int = 0) -> Tensor:
    n = SIDE // side
    x = w.view(-1, n, n, side, side, CHANNELS).permute(0, 1, 3, 2, 4, 5).reshape(-1, SIDE, SIDE, CHANNELS)
    x = torch.roll(x, (shift, shift), (1, 2)) if shift else x
    return x.reshape(-1, TOKENS, CHANNELS)


def in_windows(net: Network, t: Tensor, shift: int = 0, masked: bool = False) -> Tensor:
    """Attention within windows, written out, with a bias for each pair of places and head."""
    w = windows(t, shift=shift)
    q, k, v = net.three(w).reshape(w.shape[0], 9, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    scores = (q * 0.4) @ k.transpose(-2, -1)
    scores = scores + net.table[net.pairs.view(-1)].view(9, 9, -1).permute(2, 0, 1).unsqueeze(0)
    if masked:
        mask = t.new_zeros((SIDE, SIDE))
        mask[3:] = 1
        mask = mask.view(2, 3, 2, 3).permute(0, 2, 1, 3).reshape(4, 9)
        mask = (mask.unsqueeze(1) - mask.unsqueeze(2)).abs() * -100.0
        scores = scores.view(-1, 4, HEADS, 9, 9) + mask.unsqueeze(1).unsqueeze(0)
        scores = scores.view(-1, HEADS, 9, 9)
    return unwindowed((scores.softmax(-1) @ v).transpose(1, 2).reshape(w.shape), shift=shift)


def of_unit_length(net: Network, t: Tensor, shift: int = 0) -> Tensor:
    """Cosines of queries and keys within windows, with a number for each head: Swin V2's. One token is nothing."""
    w = windows(t, shift=shift)
    w = torch.cat([w[:, :1] * 0, w[:, 1:]], 1)
    q, k, v = F.linear(w, net.three.weight).reshape(w.shape[0], 9, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    scores = scores * net.heat.clamp(max=4.6).exp()
    scores = scores + net.table[net.pairs.view(-1)].view(9, 9, -1).permute(2, 0, 1).unsqueeze(0)
    return unwindowed((scores.softmax(-1) @ v).transpose(1, 2).reshape(w.shape), shift=shift)


def einsum(net: Network, t: Tensor) -> Tensor:
    """As in MaxViT: windows are a dimension of their own."""
    w = windows(t).view(-1, 4, 9, CHANNELS)
    q, k, v = (x.reshape(-1, 4, 9, HEADS, CHANNELS // HEADS).transpose(2, 3) for x in net.three(w).chunk(3, -1))
    scores = torch.einsum("BGHID,BGHJD->BGHIJ", [q, k * 0.3]).softmax(-1)
    out = torch.einsum("BGHIJ,BGHJD->BGHID", [scores, v]).permute(0, 1, 3, 2, 4).reshape(-1, 9, CHANNELS)
    return unwindowed(out)


def every_second(net: Network, t: Tensor) -> Tensor:
    """Fewer queries than keys, as LeViT has where it shrinks maps."""
    q = net.layer(t.view(-1, SIDE, SIDE, CHANNELS)[:, ::2, ::2].reshape(-1, TOKENS // 4, CHANNELS))
    q = q.view(-1, TOKENS // 4, HEADS, CHANNELS // HEADS).permute(0, 2, 1, 3)
    kv = net.three(t).view(t.shape[0], TOKENS, HEADS, -1)
    k, v = kv.split([CHANNELS // HEADS, CHANNELS], 3)
    return (((q @ k.permute(0, 2, 3, 1)) * 0.5).softmax(-1) @ v.permute(0, 2, 1, 3)).transpose(1, 2).flatten(2)


def fewer_keys(net: Network, t: Tensor) -> Tensor:
    """Keys and values of maps a quarter as large, as SegFormer and PVT have them, by name."""
    few = net.norm(net.patch(maps(t)).flatten(2).transpose(1, 2))
    k, v = (heads(part) for part in net.three(few)[..., : 2 * CHANNELS].chunk(2, -1))
    return F.scaled_dot_product_attention(heads(net.layer(t)), k, v).transpose(1, 2).reshape(t.shape)


def heads(t: Tensor) -> Tensor:
    return t.view(t.shape[0], -1, HEADS, CHANNELS // HEADS).transpose(1, 2)


def unit_heads(net: Network, t: Tensor) -> Tensor:
    """Queries and keys are normalised, each head's by itself."""
    q, k, v = net.three(t).reshape(t.shape[0], -1, 3, HEADS, CHANNELS // HEADS).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = F.layer_norm(q, q.shape[-1:], net.scale[:4], net.scale[4:]), F.rms_norm(k, k.shape[-1:], net.scale[:4])
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(t.shape)


def merged(net: Network, t: Tensor) -> Tensor:
    x = F.pad(t.view(-1, SIDE, SIDE, CHANNELS), (0, 0, 0, 1, 0, 1))
    return torch.cat([x[:, :-1:2, :-1:2], x[:, 1::2, :-1:2], x[:, :-1:2, 1::2], x[:, 1::2, 1::2]], -1).flatten(1, 2)


def cross_covariance(net: Network, t: Tensor) -> Tensor:
    """Attention between features of unit length over the tokens, with a temperature: EdgeNeXt's, XCiT's."""
    q, k, v = net.three(t).reshape(t.shape[0], -1, 3, HEADS, CHANNELS // HEADS).permute(2, 0, 3, 4, 1).unbind(0)
    scores = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)) * net.heat
    return (scores.softmax(-1) @ v).permute(0, 3, 1, 2).reshape(t.shape)


def waves(net: Network, t: Tensor) -> Tensor:
    """Positions that are made for the whole batch, of nothing but its size, and go through a layer."""
    y = (~torch.zeros(t.shape[0], SIDE, SIDE).to(torch.bool)).cumsum(1, dtype=torch.float32)
    table = (y / (y[:, -1:] + 1e-6)).unsqueeze(1) / torch.arange(1.0, CHANNELS + 1)[:, None, None]
    return t + net.conv(table.sin()).reshape(t.shape[0], CHANNELS, -1).permute(0, 2, 1)


def in_parts(net: Network, t: Tensor) -> Tensor:
    """Some channels of maps go through a layer before they are tokens."""
    a, b = net.conv(maps(t)).chunk(2, 1)
    return net.layer(torch.cat([F.relu(a) + b, b], 1).flatten(2).transpose(1, 2))


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "layers": lambda net, t: t + F.gelu(net.layer(net.norm(t))),
    "class token": with_class,
    "class token at the end": lambda net, t: torch.cat([t, net.kind.expand(t.shape[0], -1, -1)], 1),
    "two tokens": lambda net, t: torch.cat([net.kind.expand(t.shape[0], 2, -1), t], 1) * 0.5,
    "positions": lambda net, t: t + net.places[:, 1:],
    "class token and positions": lambda net, t: net.norm(with_class(net, t) + net.places),
    "the class token's": lambda net, t: net.norm(net.layer(with_class(net, t)))[:, 0],
    "norm of the class token": lambda net, t: net.norm(with_class(net, t)[:, 0]),
    "all but the class token": lambda net, t: net.layer(with_class(net, t))[:, 1:],
    "mean of tokens": lambda net, t: net.norm(t.mean(1)),
    "layer scale": lambda net, t: t + net.scale * net.layer(t),
    "back to maps": lambda net, t: net.conv(maps(net.layer(t))).flatten(2).transpose(1, 2),
    "tokens mixed": lambda net, t: t + F.gelu(net.mix(net.norm(t).transpose(1, 2))).transpose(1, 2),
    "attention": lambda net, t: t + net.layer(by_name(net, t)),
    "attention with a class token": lambda net, t: by_name(net, with_class(net, t) + net.places)[:, 0],
    "multihead attention": lambda net, t: (
        t + net.attention(net.norm(t), net.norm(t), net.norm(t), need_weights=False)[0]
    ),
    "windows": lambda net, t: t + unwindowed(net.layer(windows(t))),
    "attention in windows": lambda net, t: t + in_windows(net, t),
    "attention in shifted windows": lambda net, t: t + in_windows(net, t, shift=1, masked=True),
    "attention by einsum": lambda net, t: t + einsum(net, t),
    "fewer queries": every_second,
    "fewer keys": lambda net, t: t + net.layer(fewer_keys(net, t)),
    "cosines in windows": lambda net, t: t + of_unit_length(net, t),
    "cosines in shifted windows": lambda net, t: t + of_unit_length(net, t, shift=1),
    "norms of heads": lambda net, t: t + net.layer(unit_heads(net, t)),
    "cross-covariance attention": lambda net, t: t + net.layer(cross_covariance(net, net.norm(t))),
    "positions of a batch": waves,
    "maps in parts": in_parts,
    "patches merged": merged,
    "batch norm of rows": lambda net, t: F.hardswish(net.batch(net.layer(t).flatten(0, 1)).reshape_as(t)),
    "pixel shuffle": lambda net, t: F.pixel_shuffle(maps(t), 2).flatten(2).transpose(1, 2),
    "pixels together": lambda net, t: F.pixel_unshuffle(net.one(F.pixel_shuffle(maps(t), 2)), 2).flatten(2).mT,
}


def network(row: str) -> nn.Module:
    torch.manual_seed(0)
    model = Network(OPERATIONS[row]).eval()
    with torch.no_grad():
        model(torch.zeros(2, 3, 2 * SIDE, 2 * SIDE))
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.weight *= torch.rand_like(module.weight) >= 0.4
            if isinstance(module, nn.LayerNorm):
                module.weight.uniform_(0.5, 1.5)
                module.bias.uniform_(-0.5, 0.5)
    return model.requires_grad_(False)


def images(batch: int) -> Tensor:
    return torch.randn(batch, 3, 2 * SIDE, 2 * SIDE)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", OPERATIONS)
def test_an_operation_is_native_and_right(row, name):
    model, x = network(row), images(2)
    fast = mm.compile(model, x, instruction_set=name, tune=False, force=True)
    assert fast.report.compiled and fast.report.regions == 1, f"{fast.report.left}"
    # What gives the rows of the result their shape is a view.
    assert {left.partition(" ")[0] for left, _ in fast.report.left} <= {"permute", "reshape"}, f"{fast.report.left}"
    for _ in range(2):  # the second run finds the first one's memory
        close(fast(x), model(x))
    for batch in (1, 3):
        x = images(batch)
        close(fast(x), model(x))


@pytest.mark.skipif(best_target().name != "avx2", reason="AVX-512 itself is tested above, or cannot be imitated")
@pytest.mark.parametrize("row", OPERATIONS)
def test_an_operation_is_right_in_the_layouts_of_longer_vectors(row):
    wide = Target("wide-in-halves", 16, 32, TARGETS["avx2"].needs, "x86_64")
    model, x = network(row), images(2)
    captured = capture(model, (x,))
    (name,) = captured.regions
    for stand_in in (Region(captured.regions[name], wide, Tuner(measure=False)), RangeFinder(captured.regions[name])):
        captured.module.set_submodule(name, stand_in)
        close(captured.module(x), model(x))


def test_len_of_a_batch_leaves_it_open():
    """As in many vision transformers, whose class token is expanded to ``len(x)``."""

    def operation(net: Network, t: Tensor) -> Tensor:
        return net.layer(torch.cat([net.kind.expand(len(t), -1, -1), t], 1)) / len(OPERATIONS)

    OPERATIONS["len"] = operation
    try:
        model = network("len")
    finally:
        del OPERATIONS["len"]
    captured = capture(model, (images(1),))
    assert captured.guards.free == {(0, 0)} and len(captured.regions) == 1
    assert "len" not in globals()
    fast = mm.compile(model, images(1), tune=False, force=True)
    for batch in (1, 2, 5):
        x = images(batch)
        close(fast(x), model(x))
    assert len(fast._body.captures) == 1
