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
def _own_cache(nothing_is_settled, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path_factory.getbasetemp() / "row_operations"))


class Network(nn.Module):
    """``operation(self, first(x), x)`` between linear layers."""

    def __init__(self, operation: Callable[..., Tensor]) -> None:
        super().__init__()
        self.operation = operation
        self.first, self.side = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.last = nn.LazyLinear(7)
        self.norm, self.rms = nn.LayerNorm(FEATURES), nn.RMSNorm(FEATURES)
        self.three, self.narrow = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES // 2)
        self.attention = nn.MultiheadAttention(FEATURES, HEADS, batch_first=True)
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
    "softmax of large numbers": lambda net, y, x: F.softmax(150 * y, 2),
    "log softmax": lambda net, y, x: F.log_softmax(5 * y, -1) * 0.1,
    "gelu by hand": lambda net, y, x: 0.5 * y * (1.0 + torch.tanh(0.7978845608028654 * (y + 0.044715 * y.pow(3.0)))),
}


def of_all(y: Tensor) -> Tensor:
    """One number of all features."""
    norm = torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    return torch.cat([y.mean(-1, True), y.sum(-1, True), y.max(-1, True)[0], y.max(-1)[0].unsqueeze(-1) - 1, norm], -1)


OPERATIONS |= {
    "numbers of all features": lambda net, y, x: torch.cat([y, of_all(x), of_all(net.norm(y))], -1),
    "features beside their mean": lambda net, y, x: (y - y.mean(-1, keepdim=True)) / (1 + of_all(x)[..., :1].abs()),
    "features over their norm": lambda net, y, x: F.normalize(y, dim=-1) + F.normalize(x, dim=2, eps=3.0),
    "gate of half of the features": lambda net, y, x: F.glu(torch.cat([y, x], -1), -1),
    "a norm by hand": lambda net, y, x: (z := y - y.mean(-1, True)) / torch.sqrt(z.square().mean(-1, True) + 1e-5),
    "some features": lambda net, y, x: net.side(torch.cat([y[..., 3:14], x[..., 1::2]], -1)) * y,
}
HEADS = 2


def heads(x: Tensor, count: int = HEADS) -> Tensor:
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def attention(net: Network, y: Tensor, x: Tensor, **options) -> Tensor:
    """With three layers; ``mask`` may be a function of the input."""
    if "mask" in options:
        options["attn_mask"] = options.pop("mask")(x)
    return joined(F.scaled_dot_product_attention(heads(y), heads(net.side(x)), heads(net.side(y)), **options))


def packed(net: Network, y: Tensor) -> Tensor:
    """Query, key and value of one layer, as in timm."""
    q, k, v = net.three(y).reshape(*y.shape[:2], 3, HEADS, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return joined(F.scaled_dot_product_attention(q, k, v))


def split(net: Network, y: Tensor) -> Tensor:
    """As in GPT-2: pieces of one layer, and one head."""
    q, k, v = net.three(y).split((FEATURES, FEATURES, FEATURES), -1)
    return joined(F.scaled_dot_product_attention(heads(q, 1), heads(k, 1), heads(v, 1), is_causal=True))


def grouped(net: Network, y: Tensor, by_hand: bool) -> Tensor:
    """Two heads of queries to one of keys."""
    k, v = heads(net.narrow(y), 1), heads(net.narrow(y + 1), 1)
    if not by_hand:
        return joined(F.scaled_dot_product_attention(heads(y), k, v, enable_gqa=True))
    k, v = (x[:, :, None].expand(-1, -1, HEADS, -1, -1).flatten(1, 2) for x in (k, v))
    return joined(F.scaled_dot_product_attention(heads(y), k, v))


def multihead(net: Network, y: Tensor) -> Tensor:
    """PyTorch's own, which counts tokens by length and batch."""
    return net.attention(y, y, y, need_weights=False)[0]


def later(x: Tensor) -> Tensor:
    """What a token may not see, as nn.Transformer has it."""
    return torch.triu(torch.full((x.shape[1], x.shape[1]), float("-inf")), 1)


def padding(x: Tensor) -> Tensor:
    """Keys whose first number is negative are padding, but for the first one."""
    return ((x[:, :, 0] > 0) | (torch.arange(x.shape[1]) == 0))[:, None, None, :]


def by_head(x: Tensor) -> Tensor:
    return torch.arange(1.0, 1 + HEADS)[:, None, None] * later(x).clamp(min=-1)


OPERATIONS |= {
    "attention": attention,
    "attention with a scale": lambda net, y, x: attention(net, y, x, scale=0.7),
    "causal attention": lambda net, y, x: attention(net, y, x, is_causal=True),
    "attention of large scores": lambda net, y, x: attention(net, 10 * y, x),
    "packed attention": lambda net, y, x: packed(net, y),
    "split attention": lambda net, y, x: split(net, y),
    "grouped queries": lambda net, y, x: grouped(net, y, False),
    "grouped queries by hand": lambda net, y, x: grouped(net, y, True),
    "multihead attention": lambda net, y, x: multihead(net, y),
    "a block": lambda net, y, x: net.norm(
        (z := x + multihead(net, net.norm(y))) + net.side(F.gelu(net.first(net.rms(z))))
    ),
}
#: With masks, which stay in PyTorch, as what they are made of does.
MASKED: dict[str, Callable[..., Tensor]] = {
    "additive mask": lambda net, y, x: attention(net, y, x, mask=later),
    "boolean mask": lambda net, y, x: attention(net, y, x, mask=padding),
    "mask for each score": lambda net, y, x: attention(net, y, x, mask=lambda x: x[:, None] @ x[:, None].mT),
    "mask for each head": lambda net, y, x: attention(net, y, x, mask=by_head),
    "tokens that see nothing": lambda net, y, x: attention(net, y, x, mask=lambda x: (x[:, :, :1] > 0)[:, None]),
    "two layers with one mask": lambda net, y, x: attention(net, attention(net, y, x, mask=padding), x, mask=padding),
}


def angles(x: Tensor, width: int) -> Tensor:
    """Of each place and pair of features."""
    return torch.arange(x.shape[1])[:, None] * torch.linspace(1.0, 0.1, width // 2)


def halves(z: Tensor, t: Tensor) -> Tensor:
    """Hugging Face's Llama: a feature is turned with the one half a head away."""
    t, half = torch.cat([t, t], -1), z.shape[-1] // 2
    return z * t.cos()[None, None] + torch.cat([-z[..., half:], z[..., :half]], -1) * t.sin()[None, None]


def pairs(z: Tensor, t: Tensor) -> Tensor:
    """GPT-J: with its neighbour."""
    t = t.repeat_interleave(2, -1)
    return z * t.cos() + torch.stack((-z[..., 1::2], z[..., ::2]), -1).flatten(-2) * t.sin()


def chunks(z: Tensor, t: Tensor) -> Tensor:
    a, b = z.chunk(2, -1)
    return torch.cat([a * t.cos() - b * t.sin(), b * t.cos() + a * t.sin()], -1)


def partly(z: Tensor, t: Tensor) -> Tensor:
    """GPT-NeoX: some features are left as they are."""
    some = 2 * t.shape[1]
    return torch.cat([halves(z[..., :some], t), z[..., some:]], -1)


def rotary(net: Network, y: Tensor, turn: Callable[..., Tensor], count: int, part: int = 1) -> Tensor:
    """The key is one head for all queries."""
    width = FEATURES // count
    t = angles(y, width // part)
    q, k = turn(heads(y, count), t), turn(heads(net.three(y)[..., :width], 1), t)
    return joined(F.scaled_dot_product_attention(q, k.expand(q.shape), heads(net.side(y), count)))


def apart(net: Network, y: Tensor, x: Tensor) -> Tensor:
    """Turned before heads change places with tokens, with tables for each item."""
    t = angles(y, 2)[None].expand(len(y), -1, -1)
    cos, sin = t.cos()[:, :, None], t.sin()[:, :, None]
    a, b = y.view(*y.shape[:2], -1, 2).unbind(-1)
    q = torch.stack([a * cos[..., 0] - b * sin[..., 0], a * sin[..., 0] + b * cos[..., 0]], -1).transpose(1, 2)
    return joined(F.scaled_dot_product_attention(q, q, heads(net.side(x), FEATURES // 2)))


def of_heads(net: Network, y: Tensor, norm: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Queries and keys of unit size, those with their heads moved and these not yet."""
    q, k = norm(heads(y, count)), norm(net.side(y).view(*y.shape[:2], count, -1)).transpose(1, 2)
    return joined(F.scaled_dot_product_attention(q, k, heads(net.side(y), count)))


def by_hand(net: Network, y: Tensor, x: Tensor, masked: Callable[[Tensor], Tensor] = lambda scores: scores) -> Tensor:
    q, k, v = heads(y, 2), heads(net.side(x), 2), heads(net.side(y), 2)
    return joined(masked(q @ k.transpose(-2, -1) / 3.0 * 0.5).softmax(-1) @ v)


def ahead(scores: Tensor) -> Tensor:
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


OPERATIONS |= {
    "attention by hand": by_hand,
    "one head of keys for all": lambda net, y, x: joined(
        F.scaled_dot_product_attention(
            heads(y), heads(net.side(x)[..., : FEATURES // HEADS], 1), heads(net.side(y)[..., : FEATURES // HEADS], 1)
        )
    ),
    "rms norms of heads": lambda net, y, x: of_heads(net, y, lambda h: F.rms_norm(h, h.shape[-1:], net.scale[:2]), 11),
    "layer norms of heads": lambda net, y, x: of_heads(
        net, y, lambda h: F.layer_norm(h, h.shape[-1:], net.scale[:11], net.scale[5:16]), 2
    ),
    "softmax of features of heads": lambda net, y, x: joined(heads(net.side(x), 2) + heads(y, 2).softmax(-1)),
    "a norm of one head": lambda net, y, x: of_heads(net, y, lambda h: F.rms_norm(h, h.shape[-1:]), 1),
    "stored numbers": lambda net, y, x: (x + net.scale * net.norm(y) - net.scale) / net.scale,
    "stored numbers behind a layer": lambda net, y, x: net.norm(net.scale * net.side(x) + net.scale[:1]),
    "features put together": lambda net, y, x: torch.cat([y, x, net.side(x)], -1),
    "features at stored places": lambda net, y, x: torch.cat([y[..., [-2, -1]], net.side(x)[..., [3]]], -1),
    "halves exchanged": lambda net, y, x: net.side(torch.cat([y[..., 10:], -y[..., :10]], -1)),
    "heads put together": lambda net, y, x: (
        torch.cat([heads(y), heads(net.side(x)).abs()], -1).transpose(1, 2).flatten(2)
    ),
}
#: Their tables stay in PyTorch.
MASKED |= {
    "rotary embedding of halves": lambda net, y, x: rotary(net, y, halves, 11),
    "rotary embedding of wide halves": lambda net, y, x: rotary(net, y, halves, 1),
    "rotary embedding of pairs": lambda net, y, x: rotary(net, y, pairs, 1),
    "rotary embedding of chunks": lambda net, y, x: rotary(net, y, chunks, 11),
    "rotary embedding of some features": lambda net, y, x: rotary(net, y, partly, 1, part=2),
    "rotary embedding before the heads": apart,
    "masks by hand": lambda net, y, x: by_hand(net, y, x, lambda s: later(x) + (s + by_head(x))),
    "mask by hand of what comes later": lambda net, y, x: by_hand(
        net, y, x, lambda s: s.masked_fill(ahead(s), -torch.inf)
    ),
    "mask by hand of nearly all": lambda net, y, x: by_hand(
        net, y, x, lambda s: s.masked_fill((x[:, :, :1] > 0)[:, None], torch.finfo(s.dtype).min)
    ),
    "norms of heads before a rotary embedding": lambda net, y, x: rotary(
        net, y, lambda h, t: halves(F.rms_norm(h, (2,), net.scale[:2]), t), 11
    ),
}


def network(row: str) -> nn.Module:
    torch.manual_seed(0)
    model = Network((OPERATIONS | MASKED)[row])
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("row", MASKED)
@pytest.mark.cases(1)
def test_attention_with_what_stays_in_pytorch_is_one_region(row, name):
    model = network(row)
    x = torch.randn(*LEADING[0], FEATURES)
    fast = mm.compile(model, x, instruction_set=name, tune=False, force=True)
    assert fast.report.compiled and fast.report.regions == 1, f"{fast.report.left}"
    assert not any("attention" in left for left, _ in fast.report.left), f"{fast.report.left}"
    with torch.no_grad():
        for leading in (LEADING[0], *LEADING):
            other = torch.randn(*leading, FEATURES)
            close(fast(other), model(other))


@pytest.mark.skipif(best_target().name != "avx2", reason="AVX-512 itself is tested above, or cannot be imitated")
@pytest.mark.parametrize("row", OPERATIONS)
def test_an_operation_is_right_in_the_layouts_of_longer_vectors(row):
    wide = Target("wide-in-halves", 16, 32, TARGETS["avx2"].needs, "x86_64")
    model, x = network(row), torch.randn(3, 7, FEATURES)
    with torch.no_grad():
        captured, expected = capture(model, (x,)), model(x)
        close(Region(captured.regions[captured.whole], wide, Tuner(measure=False))(x), expected)


@pytest.mark.parametrize("row", OPERATIONS)
@pytest.mark.cases(1)
def test_threads_that_share_rows_agree(row):
    """Each does some of every step: none may write what is another's."""
    model, x = network(row), torch.randn(1, 16, FEATURES)
    many = torch.randn(4, 40, FEATURES)  # which they share out
    with torch.no_grad():
        captured, expected, all_of_them = capture(model, (x,)), model(x), model(many)
    region = Region(captured.regions[captured.whole], best_target(), Tuner(measure=False))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        region.plan_for(16, 16).shares = True
        for _ in range(10):
            close(region(x), expected)
            close(region(many), all_of_them)
    finally:
        torch.set_num_threads(before)


def test_rows_that_are_not_numbers_stay_among_themselves():
    model, x = network("norms before and after"), torch.randn(2, 5, FEATURES)
    fast = mm.compile(model, x, tune=False, force=True)
    x[0, 3, 2] = float("nan")
    with torch.no_grad():
        got, expected = fast(x), model(x)
    assert np.array_equal(got.isnan(), expected.isnan()) and got.isnan().any()


class Images(nn.Module):
    """A perceptron on images to which something is done first."""

    def __init__(self, first: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("channels", torch.tensor([1.0, 2.0, 4.0]).view(1, 3, 1, 1))
        self.register_buffer("columns", torch.arange(1.0, 9.0))
        self.rest = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.first(self, x))


#: What is done to images -> whether as many numbers in another height and width may follow.
NORMALISED: dict[str, tuple[Callable[[nn.Module, Tensor], Tensor], bool]] = {
    "a number for each channel": (lambda net, x: (x - net.channels) / net.channels, True),
    "and a number for all": (lambda net, x: torch.relu(1 - (x * net.channels[0] + 0.5)), True),
    "a number for each column": (lambda net, x: x * net.columns, False),
}


@pytest.mark.parametrize("row", NORMALISED)
def test_images_that_are_normalised_before_linear_layers_are_one_region(row):
    first, any_size = NORMALISED[row]
    model = Images(first).eval()
    for again in range(2):  # the second time from the cache, of other numbers
        with torch.no_grad():
            model.channels.add_(again)
        fast = mm.compile(model, torch.randn(2, 3, 8, 8), tune=False, force=True)
        assert (fast.report.regions, fast.report.left) == (1, ())
        for sizes in [(2, 3, 8, 8), (5, 3, 8, 8), *([(3, 3, 4, 16)] if any_size else [])]:
            x = torch.randn(sizes)
            close(fast(x), model(x))


def test_stored_places_are_those_of_the_model_at_hand():
    """A buffer says which features are taken: a model of the same structure with another one takes others."""
    model = network("layer norm")
    model.operation = lambda net, y, x: y[..., net.places]
    model.register_buffer("places", torch.tensor([2, 3, 4]))
    model.last, x = nn.Linear(3, 7).eval(), torch.randn(2, 5, FEATURES)
    for places, regions in (([2, 3, 4], 1), ([7, 8, 9], 1), ([-3, -2, -1], 1), ([7, 1, 9], 2), ([-1, 0, 1], 2)):
        model.places.copy_(torch.tensor(places))
        fast = mm.compile(model, x, tune=False, force=True)
        with torch.no_grad():
            close(fast(x), model(x))
        assert fast.report.regions == regions


def test_numbers_for_very_many_features_stay_in_pytorch():
    """As weights on the diagonal of a matrix they would take gigabytes."""
    model = network("layer norm")
    model.operation = lambda net, y, x: net.wide(y) * net.numbers
    model.wide, model.last = nn.Linear(FEATURES, 9000), nn.Linear(9000, 3)
    model.register_buffer("numbers", torch.rand(9000))
    x = torch.randn(2, 5, FEATURES)
    fast = mm.compile(model.eval(), x, tune=False, force=True)
    assert fast.report.left == (("mul", "it works with a stored number for each of more than 8,192 features"),)
    with torch.no_grad():
        close(fast(x), model(x))


def test_a_place_that_is_not_there_is_an_error_as_in_pytorch():
    model = network("layer norm")
    model.operation = lambda net, y, x: y[:, [0, 1]]
    model.last, x = nn.Linear(FEATURES, 7), torch.randn(2, 5, FEATURES)
    fast = mm.compile(model.eval(), x, tune=False, force=True)
    with torch.no_grad():
        close(fast(x), model(x))
    with pytest.raises(IndexError):
        fast(x[:, :1])


def test_images_of_which_more_is_made_stay_as_they_are():
    """What is done to images is not done to rows where sizes left open say to which number of a row."""
    grow = Images(lambda net, x: x * net.channels).eval()  # three channels of one
    kept = Images(lambda net, x: x * net.channels.view(3, 1)).eval()  # channels between height and width
    twice = Images(lambda net, x: (lambda y: y + y.mean())(x * net.channels)).eval()
    for model, sizes in ((grow, [(2, 1, 8, 8), (1, 1, 4, 16)]), (kept, [(2, 8, 3, 8), (1, 4, 3, 16)]),
                         (twice, [(2, 3, 8, 8), (1, 3, 4, 16)])):  # fmt: skip
        fast = mm.compile(model, torch.randn(sizes[0]), tune=False, force=True)
        for size in sizes:
            x = torch.randn(size)
            close(fast(x), model(x))


def test_sequences_keep_to_themselves():
    """Three in a buffer, of which one is no number."""
    model, x = network("a block"), torch.randn(3, 5, FEATURES)
    fast = mm.compile(model, x, tune=False, force=True)
    x[1, 3, 2] = float("nan")
    with torch.no_grad():
        got, expected = fast(x), model(x)
    assert np.array_equal(got.isnan(), expected.isnan()) and got[1].isnan().all()
    close(got[[0, 2]], expected[[0, 2]])
    x[1, 3, 2] = 0.0
    with torch.no_grad():
        close(fast(x[:, :2]), model(x[:, :2]))


@pytest.mark.long
def test_many_lengths_of_sequences_make_few_plans():
    model = network("boolean mask")
    fast = mm.compile(model, torch.randn(1, 40, FEATURES), tune=False, force=True)
    with torch.no_grad():
        for length in (*range(1, 200, 13), 200, 64, 65):
            for batch in (1, 3):
                x = torch.randn(batch, length, FEATURES)
                close(fast(x), model(x))
    (region,) = fast.regions
    assert len(fast._body.captures) == 1 and len(region.plans()) <= 6
    assert sum(plan.nbytes for plan in region.plans()) < 4e6
    mask = torch.zeros(1, 1, 5, 5)
    for bad in (mask[:, :, :4], mask[0], mask.expand(3, 1, 5, 5)):
        with pytest.raises(ValueError, match="mask"):
            region(torch.randn(2, 5, FEATURES), bad)


def test_a_small_layer_on_one_token_is_in_the_region():
    """As a pooler: for all tokens, of which one is taken; a large one is not."""

    class Pooled(nn.Module):
        def __init__(self, outputs: int) -> None:
            super().__init__()
            self.body = nn.Sequential(*[nn.Linear(32, 32) for _ in range(3)], nn.LayerNorm(32))
            self.pooler = nn.Linear(32, outputs)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.body(x)
            return y, torch.tanh(self.pooler(y[:, 0]))

    for outputs, regions in ((4, 1), (64, 2)):
        model, x = Pooled(outputs).eval(), torch.randn(2, 5, 32)
        fast = mm.compile(model, x, tune=False, force=True)
        assert fast.report.regions == regions, f"{fast.report.left}"
        for shape in ((2, 5, 32), (1, 9, 32)):
            x = torch.randn(shape)
            with torch.no_grad():
                for got, expected in zip(fast(x), model(x), strict=True):
                    close(got, expected)


def test_a_softmax_by_hand_of_nothing_is_no_number():
    """PyTorch's own attention gives zeros there, a softmax that is written out none."""
    torch.manual_seed(0)
    model = Network(
        lambda net, y, x: by_hand(net, y, x, lambda s: s.masked_fill((x[..., :1] > 3)[:, None], -torch.inf))
    )
    model(torch.zeros(1, 3, FEATURES))
    model, x = model.eval(), torch.randn(2, 5, FEATURES).clamp(max=2)
    fast = mm.compile(model, x, tune=False, force=True)
    assert fast.report.regions == 1
    with torch.no_grad():
        close(fast(x), model(x))
        x[0, 2, 0] = x[1, 4, 0] = 4
        expected = model(x)
        assert torch.equal(fast(x).isnan(), expected.isnan()) and int(expected.isnan().any(-1).sum()) == 2
        close(fast(x).nan_to_num(), expected.nan_to_num())
