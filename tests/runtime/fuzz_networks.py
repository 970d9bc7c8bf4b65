"""Random small networks against eager PyTorch: ``python fuzz_networks.py SECONDS SEED [--one]``.

Each network is the text of a module. It is compiled, and called with other numbers, other batches, other sizes and
other strides; every result is judged by the distance of eager's own to 64-bit arithmetic. Calls may not change what
earlier ones gave, nor their inputs otherwise than eager does, and what eager refuses is refused. Prints the seed and
the text of each network that disagrees, cut down, and at the end how many there were. ``--one``: of this seed alone.
"""

import faulthandler
import random
import sys
import time
import traceback

import torch
import torch.nn.functional as F  # noqa: F401 (the texts of networks read it)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import mirrormask as mm

KINDS = ("images", "signals", "rows", "tokens", "volumes", "pair", "ids")
ACTIVATIONS = """relu({v}) | torch.sigmoid({v}) | torch.tanh({v}) | F.gelu({v}) | F.gelu({v}, approximate='tanh')
F.silu({v}) | F.mish({v}) | F.softplus({v}, 2.0) | F.leaky_relu({v}, {s}) | F.elu({v}, {p})
F.hardtanh({v}, -{p}, {p}) | F.hardshrink({v}, {p}) | F.softshrink({v}, {p}) | F.threshold({v}, {s}, {s})
F.logsigmoid({v}) | F.softsign({v}) | F.tanhshrink({v}) | F.celu({v}, {p}) | F.selu({v}) | F.rrelu({v})
F.hardswish({v}) | F.hardsigmoid({v}) | F.relu6({v}) | {v}.clamp({s}, {s}) | {v}.clamp(min={s}) | {v}.clamp(max={s})
{v}.abs() | -{v} | {v}.square() | {v}.abs().sqrt() | ({v}.square() + {p}).rsqrt() | torch.exp(-{v}.abs())
1 / ({v}.abs() + {p}) | {v} ** 2 | {v} ** 3 | {v}.abs() ** 0.5 | {v} ** 0 | {v}.sin() | {v}.cos() | {v}.erf()
{v}.floor() | {v}.round() | {v}.sign() | {v}.log1p().nan_to_num() | torch.nan_to_num({v}) | {v}.abs().log1p()
F.dropout({v}, 0.5, False) | F.alpha_dropout({v}, 0.5, False) | F.feature_dropout({v}, 0.5, False) if False else {v}
F.relu({v}, inplace=False) | {v}.expm1().clamp(max=4) | {v}.trunc() | {v}.frac() | F.glu({v}, {dim})
torch.logit(torch.sigmoid({v})) | torch.clamp({v}, torch.tensor({s}), torch.tensor({s})) | {v}.softmax({dim})
{v}.log_softmax({dim}) | F.softmin({v}, {dim}) | F.softmax({v}, {dim}, dtype=torch.float64).float()
F.normalize({v}, p={norm}, dim={dim}) | F.normalize({v}, dim={dim}) | F.gumbel_softmax({v}, dim={dim}) * 0
F.layer_norm({v}, {v}.shape[-1:])"""
REDUCTIONS = """{v}.mean({dim}, keepdim={b}) | {v}.sum({dim}, keepdim={b}) | {v}.amax({dim}, keepdim={b})
{v}.amin({dim}, keepdim={b}) | {v}.max({dim}, keepdim={b})[0] | {v}.min({dim})[0]
{v}.max({dim}, keepdim={b}).indices.float() | {v}.prod({dim}) | {v}.std({dim}, keepdim={b})
{v}.var({dim}, unbiased=False, keepdim={b}) | {v}.logsumexp({dim}, keepdim={b})
{v}.norm(p={norm}, dim={dim}, keepdim={b}) | {v}.mean({dims}, keepdim={b}) | {v}.sum({dims}, keepdim={b})
{v}.amax({dims}, keepdim={b}) | {v}.var({dims}, keepdim={b}) | {v}.sum(()) | {v}.mean() | {v}.argmax({dim}).float()
{v}.cumsum({dim}) | {v}.cumprod({dim}) | ({v} > 0).any({dim}).float() | ({v} > {s}).sum({dim})
{v}.median({dim}).values | {v}.sum() | {v}.max() | {v}.argmin() | {v}.mean({dims}) | {v}.std()
torch.aminmax({v}, dim={dim}).max | torch.linalg.vector_norm({v}, {norm}, {dims}, {b})
torch.std_mean({v}, {dim}, keepdim={b})[1] | {v}.cummax({dim}).values | {v}.sum({dim}, dtype=torch.float64).float()
{v}.count_nonzero({dim}) | F.cosine_similarity({v}, {v} + 1, {dim}) | {v}.mean(0, True)
{v}.abs().mean({dim}, True) | {v}.square().mean(-1, keepdim=True)"""
SHAPES = """{v}.flip({dim}) | {v}.flip({dims}) | {v}.roll({i}, {dim}) | {v}.roll({i}) | {v}.narrow({dim}, {k}, {k1})
{v}.transpose({dim}, {dim2}) | {v}.permute({perm}) | {v}.permute({perm}).contiguous() | {v}.unsqueeze({dim})
{v}.squeeze({dim}) | {v}.squeeze() | {v}.flatten({dim}) | {v}.flatten({dim}, {dim2}) | {v}.reshape({v}.shape[0], -1)
{v}.view({v}.shape[0], -1) | {v}.reshape(-1, {v}.shape[-1]) | {v}.unflatten({dim}, ({k}, -1))
{v}.unflatten({dim}, (-1, {k})) | {v}.chunk({k}, {dim})[{j}] | {v}.split({k}, {dim})[{j}]
torch.tensor_split({v}, {k}, {dim})[{j}] | {v}.unbind({dim})[{j}] | {v}.select({dim}, {j})
torch.cat([{v}, {v}], {dim}) | torch.cat([{v}, -{v}.flip({dim})], {dim}) | torch.stack([{v}, {v} + 1], {dim})
{v}.repeat_interleave({k}, {dim}) | {v}.repeat({ones}) | {v}.expand({k}, *{v}.shape) | {v}[..., ::2] | {v}[..., 1:]
{v}[..., :-1] | {v}[..., -2:] | {v}[:, ::2] | {v}[:, 1:] | {v}[:, -1] | {v}[:, None] | {v}[..., None] | {v}[0]
{v}[:1] | {v}[-1:] | {v}[::2] | {v}[:, :, ::3] | {v}[:, :, 1::2] | {v}[..., 5:2] | {v}[:, 0:1] | {v}[..., 0]
{v}[None] | F.pad({v}, ({k}, {j})) | F.pad({v}, (-1, {j}), value={s}) | F.pad({v}, ({j}, 0, -1, {k}))
F.pad({v}, (0, 0, {j}, {k}), value={s}) | F.pad({v}, (1, {k}), mode={mode})
F.pad({v}, (1, 1, {k}, 2), mode={mode}) | F.pad({v}, (0, 1, 2, 1, 1, {k}), mode={mode}) | F.pad({v}, (0,0,0,0,1,0))
{v}.tril() | {v}.triu({i}) | {v}.diagonal(0, {dim}, {dim2}) | {v}.index_select({dim}, torch.tensor([{j}, 0, {j}]))
{v}[:, [{j}, 0]] | {v}[..., torch.tensor([0, {j}])] | {v}.gather({dim}, {v}.argsort({dim})) | {v}.sort({dim}).values
{v}.topk({k}, {dim}).values | {v}.topk(1, {dim})[1].float() | {v}.movedim({dim}, {dim2})
{v}.swapaxes({dim}, {dim2}) | {v}.unfold({dim}, {k}, {j1}) | {v}.mT | {v}.T | {v}.masked_fill({v} > {s}, {s})
torch.where({v} > 0, {v}, {s}) | torch.where({v}.sum({dim}, keepdim=True) > 0, {v}, -{v}) | {v} * ({v} > {s})
{v}.rot90(1, ({dim}, {dim2})) | F.pixel_shuffle({v}, 2) | F.pixel_unshuffle({v}, 2) | F.channel_shuffle({v}, {k})
F.unfold({v}, {k}, padding=1) | F.unfold({v}, 2, stride=2) | {v}.view_as({v}) | {v}.reshape_as({v})
{v}.contiguous() | {v}.clone() | {v}.detach() | {v}.broadcast_to({v}.shape) | {v}.view({v}.shape) | {v}.flatten()
{v}.ravel() | {v}.take_along_dim({v}.argsort({dim}), {dim}) | {v}.diff(dim={dim}) | torch.atleast_3d({v})
{v}.tile({ones}) | {v}.index_fill({dim}, torch.tensor([0]), {s}) | torch.einsum('...i->...', {v})
torch.einsum('b...->b...', {v}) | {v}.view({v}.shape[0], {k}, -1, *{v}.shape[2:]).transpose(1, 2).flatten(1, 2)
{v}.flatten(2).transpose(1, 2) | {v}.unsafe_chunk({k}, {dim})[{j}] | {v}.hsplit(1)[0]"""
POOLS = """F.max_pool{n}d({v}, {k}, {j1}, {j}, ceil_mode={b}) | F.max_pool{n}d({v}, {k}, {j1}, 0, 2, ceil_mode={b})
F.avg_pool{n}d({v}, {k}, {j1}, {j}, {b}, {b2}) | F.adaptive_avg_pool{n}d({v}, {k})
F.adaptive_max_pool{n}d({v}, {k}) | F.max_pool{n}d({v}, {k}, {j1}, return_indices=True)[0]
F.lp_pool{n}d({v}.abs(), 2, {k}, {j1}) | F.interpolate({v}, scale_factor={scale}, mode={up})
F.interpolate({v}, scale_factor={scale}, mode={lin}, align_corners={b}) | F.interpolate({v}, size={k1}, mode={up})
F.interpolate({v}, scale_factor={scale}, mode={up}, recompute_scale_factor=True)
F.interpolate({v}, size={k1}, mode={lin}, align_corners={b})
F.max_unpool{n}d(*F.max_pool{n}d({v}, 2, 2, return_indices=True), 2) | F.local_response_norm({v}, {k})
F.max_pool{n}d({v}, 2, 2, return_indices=True)[1].float()"""
POOLS2 = """F.avg_pool2d({v}, {k}, {j1}, {j}, {b}, {b2}, divisor_override={k1})
F.avg_pool2d({v}, ({k}, 1), ({j1}, 2), (0, 0), {b}) | F.max_pool2d({v}, (1, {k}), ({j1}, 1), (0, {j}))
F.interpolate({v}, scale_factor={scale}, mode='bicubic', align_corners={b})
F.interpolate({v}, scale_factor=0.5, mode='bilinear', antialias=True) | F.adaptive_avg_pool2d({v}, (None, {k}))
F.adaptive_avg_pool2d({v}, ({k}, 1)) | F.interpolate({v}, scale_factor=({scale}, 2.0), mode={lin})
F.interpolate({v}, size=({k1}, {v}.shape[3]), mode='nearest-exact')
F.grid_sample({v}, torch.zeros({v}.shape[0], 3, 3, 2) + {s}, align_corners={b})
F.fold(F.unfold({v}, 2, stride=2), {v}.shape[2:], 2, stride=2) | F.interpolate({v}, scale_factor=0.5, mode='area')"""
BINARY = """{v} + {w} | {v} - {w} | {v} * {w} | {v} / ({w}.abs() + 1) | torch.maximum({v}, {w})
torch.minimum({v}, {w}) | torch.add({v}, {w}, alpha={s}) | torch.sub({v}, {w}, alpha=2)
torch.where({v} > {w}, {v}, {w}) | torch.lerp({v}, {w}, {p}) | torch.addcmul({v}, {w}, {w}, value={s})
torch.addcdiv({v}, {w}, {w}.square() + 1) | {v}.atan2({w}.abs() + 1) | torch.fmax({v}, {w})
({v} > {w}).float() * {v} | torch.cat([{v}, {w}], {dim}) | torch.stack([{v}, {w}], {dim})
{v} @ {w}.transpose(-1, -2) | {v} @ {w} | torch.bmm({v}, {w}.transpose(1, 2)) | {v}.expand_as({w}) + {w}
torch.rsub({v}, {w}, alpha=2) | {v} * torch.sigmoid({w}) | {v}.masked_fill({w} > 0, {s}) | {v}.where({w} > 0, {s})
{v}.remainder({w}.abs() + 1) | {v} + {w}.mean({dim}, keepdim=True) | {v} * {w}.amax({dims}, keepdim=True)
torch.outer({v}.flatten()[:3], {w}.flatten()[:3]) | torch.hypot({v}, {w}) | ({v} != {w}) * {v}
torch.logaddexp({v}, {w}) | {v}.copysign({w}) | {v} // ({w}.abs() + 1) | torch.einsum('b...i,b...j->bij', {v}, {w})
{v}.float_power(2).float() + {w}"""
NUMBERS = """{v} + {s} | {s} - {v} | {v} * {s} | {v} / {p} | {p} / ({v}.abs() + 1) | {v} + 1 | 2 * {v} | {v} + True
{v} * torch.tensor({s}) | {v} + torch.tensor(3) | {v} * torch.tensor({s}, dtype=torch.float64) | {v} % {p}
{v} // {p} | {v} * {v}.shape[-1] | {v} / {v}.shape[0] | {v} / {v}.shape[-1] ** 0.5
{v} + torch.arange({v}.shape[-1]) | {v} * torch.linspace(0, 1, {v}.shape[-1]) | {v} + torch.zeros(1)
{v} + torch.ones_like({v}) | torch.rsub({v}, {s}, alpha=2) | {v} * {v}.numel() / 100 | {v} + float({v}.dim())
{v} + torch.arange({v}.shape[0]).view(-1, *[1] * ({v}.dim() - 1)) | {v} * torch.eye({v}.shape[-1])
{v} + torch.full_like({v}[:1], {s}) | {v} * {v}.new_tensor([{s}]) | {v} + (1 if {v}.shape[-1] > 5 else 2)
{v} * (2 if {v}.shape[0] > 1 else 3) | torch.add({v}, {s}, alpha=3)"""
CASTS = """{v}.half().float() | {v}.bfloat16().float() | ({v}.double() * 3).float() | {v}.long().float()
({v}.int() % 3).float() | ({v} * 4).int() // 3 + {v} | {v}.double().softmax(-1).to({v}.dtype)
({v} > 0) & ({v} < 1) | ({v} > 0).long() * 2 - 1 | {v}.to(torch.float64).mean({dim}).float() | (~({v} > 0)).float()
({v} > 0).to({v}.dtype) * {v} | {v}.bool().float() | {v}.type(torch.float32) | {v}.to({v})
torch.complex({v}, {v}).abs() | {v}.type_as({v})"""
INPLACE = """{v}.add_({s}) | {v}.mul_({s}) | {v}.relu_() | {v}[..., :1].mul_({s}) | {v}[:, 0].zero_()
{v}[:, 1:].add_({v}[:, :1]) | {v}.clamp_({s}) | {v}.copy_({v}.flip(-1)) | {v}.transpose(-1, -2).add_(1)
{v}[..., ::2].fill_({s}) | {v}.flatten(1)[:, :2].neg_() | {v}.masked_fill_({v} > 0, {s}) | F.relu({v}, True)
F.silu({v}, inplace=True) | {v}.view(-1)[0].add_(1) | {v}.chunk(2, -1)[0].mul_(2) | {v}.unbind(0)[0].add_(1)
{v}.sub_({v}.mean({dim}, keepdim=True)) | {v}.div_(torch.tensor({p}, dtype=torch.float64)) | {v}.squeeze_(1)
{v}.unsqueeze_(0) | {v}.swapaxes(0, 1).mul_({s}) | {v}.mT.add_(2) | {v}.tensor_split(2, -1)[0].mul_(3)
{v}.movedim((0, 1), (1, 0)).add_(1) | {v}.reshape(-1).add_(1) | {v}.ravel().add_(1)
torch.einsum('b...->b...', {v}).add_(1) | {v}.index_add_(0, torch.tensor([0]), {v}[:1].clone())
{v}.contiguous().add_(1) | F.dropout({v}, 0.5, False).add_(1) | {v}.float().add_(1) | {v}.squeeze().mul_(2)
torch.add({v}, 1, out={v}) | {v}.broadcast_to({v}.shape).add_(1) | {v}.type_as({v}).add_(2)
{v}.expand_as({v}).add_(2) | {v}.split([1, {v}.shape[-1] - 1], -1)[1].add_(1) | {v}.narrow(0, 0, 1).mul_(2)
{v}.hsplit(1)[0].mul_(2) | {v}.positive().add_(1) | torch.atleast_2d({v}).add_(1) | {v}.reshape_as({v}).mul_(2)
torch.broadcast_tensors({v}, {v}[:1])[0].add_(1) | {v}.fill_diagonal_({s}) | {v}.exp_().clamp_(max=5) | {v}.t_()
{v}.sigmoid_()"""


def _lines(text: str) -> list[str]:
    return [one.strip() for line in text.splitlines() for one in line.split(" | ") if one.strip()]


TEMPLATES = {
    name: _lines(text)
    for name, text in {
        "act": ACTIVATIONS.replace("relu({v}) |", "F.relu({v}) |", 1),
        "reduce": REDUCTIONS,
        "shape": SHAPES,
        "pool": POOLS,
        "pool2": POOLS2,
        "binary": BINARY,
        "number": NUMBERS,
        "cast": CASTS,
        "inplace": INPLACE,
    }.items()
}


class Generator:
    """The text of one random network: lines of ``__init__``, lines of ``forward``, the value that each line makes."""

    def __init__(self, seed: int) -> None:
        self.r = r = random.Random(seed)
        torch.manual_seed(seed)
        self.init: list[str] = []
        self.lines: list[tuple[str, str]] = []  # name, expression ("" name: a statement)
        self.kind = r.choice(KINDS)
        b, n = r.choice([1, 2, 3, 4]), r.choice([3, 5, 6, 8, 9, 12])
        c = r.choice([1, 2, 3, 4, 6, 8])
        f = r.choice([3, 5, 8, 16, 24])
        self.shapes = {
            "images": [(b, c, n, r.choice([n, 7, 10]))],
            "signals": [(b, c, r.choice([9, 16, 21]))],
            "rows": [(b, f)],
            "tokens": [(b, n, f)],
            "volumes": [(b, c, r.choice([2, 4, 5]), n, r.choice([n, 6]))],
            "pair": [(b, n, f), r.choice([(b, n, f), (b, 1, f), (f,), (b, n, 1), (1, n, f), (b, r.choice([4, 7]), f)])],
            "ids": [(b, n)],
        }[self.kind]
        self.env: dict[str, Tensor] = {f"x{i}": self.input(s) for i, s in enumerate(self.shapes)}
        self.module = nn.Module().eval()
        for _ in range(r.choice([2, 3, 4, 5, 7, 9])):
            self.step()
        self.finish()

    def input(self, shape):
        return torch.randint(0, 10, shape) if self.kind == "ids" else torch.randn(shape)

    def args(self, t: Tensor) -> dict:
        r, d = self.r, max(t.dim(), 1)
        dims = r.sample(range(d), r.randint(1, d))
        dims = [x if r.random() < 0.5 else x - d for x in dims]
        perm = r.sample(range(d), d)
        k = r.randint(1, 4)
        lin = {3: "linear", 4: "bilinear", 5: "trilinear"}.get(d, "bilinear")
        return {
            "s": r.choice([-1.5, -0.5, 0.0, 0.25, 1.0, 2.0, 0.1]), "p": r.choice([0.5, 0.7, 1.0, 2.0, 3]),
            "dim": r.randint(-d, d - 1), "dim2": r.randint(-d, d - 1), "dims": tuple(dims), "b": r.random() < 0.5,
            "b2": r.random() < 0.5, "i": r.randint(-3, 3), "j": r.randint(0, 2), "j1": r.randint(1, 3), "k": k,
            "k1": r.randint(1, 9), "perm": ", ".join(map(str, perm)), "norm": r.choice([1, 2, 3, "float('inf')"]),
            "ones": ", ".join(str(r.choice([1, 1, 2])) for _ in range(d)),
            "mode": repr(r.choice(["reflect", "replicate", "circular"])),
            "scale": r.choice([2, 0.5, 1.5, 3, 2.3, 1]),
            "up": repr(r.choice(["nearest", "nearest-exact", "area"])), "lin": repr(lin), "n": d - 2,
        }  # fmt: skip

    def step(self) -> None:
        r = self.r
        for _ in range(40):
            name = list(self.env)[-1] if r.random() < 0.7 else r.choice(list(self.env))
            t = self.env[name]
            if not isinstance(t, Tensor) or t.numel() > 40000:
                continue
            if t.dtype == torch.int64 and name.startswith("x"):
                init, expression = self.embedding(name)
            elif r.random() < (0.4 if self.lines else 0.8):
                init, expression = self.layer(name, t)
            else:
                init, expression = "", self.operation(name, t)
            if expression and self.attempt(init, expression):
                return

    def operation(self, name: str, t: Tensor) -> str:
        r = self.r
        families = [
            "act",
            "act",
            "act",
            "reduce",
            "shape",
            "shape",
            "shape",
            "binary",
            "binary",
            "number",
            "cast",
            "inplace",
            "pool",
            "param",
            "sdpa",
        ]
        family = r.choice(families)
        if family == "pool":
            if t.dim() not in (3, 4, 5):
                return ""
            family = "pool2" if t.dim() == 4 and r.random() < 0.5 else "pool"
        values = self.args(t)
        if family == "param":
            shape = [s if r.random() < 0.5 else 1 for s in t.shape]
            shape = shape[r.choice([0, 0, 1]) :]
            if not shape or (t.dim() == len(shape) and shape[0] == t.shape[0] and t.shape[0] > 1):
                return ""
            self.pending = f"nn.Parameter(torch.randn({tuple(shape)}))"
            return r.choice(
                [
                    "{v} * M",
                    "{v} + M",
                    "M - {v}",
                    "{v} / (M.abs() + 0.5)",
                    "torch.maximum({v}, M)",
                    "torch.where(M > 0, {v}, M)",
                    "{v} * torch.sigmoid(M)",
                    "M * {v}",
                    "torch.addcmul(M, {v}, M)",
                ]
            ).format(v=name)
        if family == "sdpa":
            if t.dim() not in (3, 4):
                return ""
            others = [
                n
                for n, o in self.env.items()
                if isinstance(o, Tensor)
                and o.dim() == t.dim()
                and o.shape[-1] == t.shape[-1]
                and o.shape[:-2] == t.shape[:-2]
            ]
            if t.dim() not in (3, 4):
                return ""
            k, v = r.choice(others), r.choice(others)
            length = self.env[k].shape[-2]
            mask = r.choice(
                [
                    "",
                    "",
                    ", is_causal=True",
                    ", scale=0.3",
                    f", attn_mask=torch.ones({t.shape[-2]}, {length}).tril().bool()",
                    f", attn_mask=torch.ones({t.shape[-2]}, {length}).tril(-1).bool()",
                    ", attn_mask=({v}.mean(-1, keepdim=True) > 0)",
                    f", attn_mask=torch.arange({length}) * -0.5",
                    f", attn_mask=torch.randn({t.shape[-2]}, {length}) * 0",
                ]
            )
            if r.random() < 0.4 and t.dim() == 3 and t.shape[-1] % 2 == 0:
                heads = ".unflatten(-1, (2, -1)).transpose(1, 2)"
                said = "" if "mean" in mask else mask.format(v=name)
                parts = f"{name}{heads}, {k}{heads}, {v}{heads}{said}"
                return f"F.scaled_dot_product_attention({parts}).transpose(1, 2).flatten(2)"
            return f"F.scaled_dot_product_attention({name}, {k}, {v}{mask.format(v=name)})"
        text = r.choice(TEMPLATES[family])
        if family == "binary":
            others = [n for n, o in self.env.items() if isinstance(o, Tensor) and n != name] or [name]
            values["w"] = r.choice(others)
        if family == "inplace" and r.random() < 0.6:  # a tensor of its own
            return "!" + text.replace("{v}", "c").format(v=name, **values) + f"!{name}"
        if family == "inplace":
            return "?" + text.format(v=name, **values)
        return text.format(v=name, **values)

    def embedding(self, name: str):
        r = self.r
        f = r.choice([4, 8, 16])
        made = r.choice(
            [
                f"nn.Embedding(10, {f})",
                f"nn.Embedding(10, {f}, padding_idx=0)",
                f"nn.Embedding(10, {f}, max_norm=1.0)",
                f"nn.EmbeddingBag(10, {f}, mode={r.choice(['sum', 'mean', 'max'])!r})",
            ]
        )
        return made, f"M({name})"

    def layer(self, name: str, t: Tensor):
        r = self.r
        if not t.is_floating_point() or t.dim() == 0 or not t.numel():
            return "", ""
        d, n = t.dim(), t.dim() - 2
        out = r.choice([1, 2, 3, 4, 5, 8, 16])
        kinds = (
            ["linear", "linear", "norm"]
            + (
                ["conv", "conv", "conv", "conv", "turned"]
                if d in (3, 4, 5) and n and self.kind not in ("tokens", "ids", "pair")
                else []
            )
            + (["rnn", "mha", "norm"] if d == 3 and r.random() < 0.5 else [])
        )
        kind = r.choice(kinds)
        wrap = r.choice(
            ["{}"] * 9
            + [
                "nn.utils.parametrizations.weight_norm({})",
                "nn.utils.parametrizations.spectral_norm({})",
                "nn.utils.weight_norm({})",
            ]
        )
        if kind == "linear":
            return wrap.format(f"nn.Linear({t.shape[-1]}, {out}, bias={r.random() < 0.7})"), f"M({name})"
        if kind in ("conv", "turned"):
            c = t.shape[1]
            groups = r.choice([g for g in (1, 1, 2, 3, c) if c % g == 0])
            k = [r.choice([1, 2, 3, 3, 5]) for _ in range(n)]
            stride, dilation = r.choice([1, 1, 2, 3]), r.choice([1, 1, 1, 2])
            if kind == "turned":
                pad = r.randint(0, 2)
                return (
                    f"nn.ConvTranspose{n}d({c}, {groups * r.randint(1, 3)}, {tuple(k)}, {stride}, {pad}, "
                    f"{r.randint(0, max(stride, dilation) - 1)}, {groups}, {r.random() < 0.7}, {dilation})",
                    f"M({name})",
                )
            mode = r.choice(["zeros"] * 4 + ["circular", "reflect", "replicate"])
            padding = repr(r.choice(["same", "valid", 0, 1, 2, tuple(x // 2 for x in k)]))
            return wrap.format(
                f"nn.Conv{n}d({c}, {groups * r.randint(1, 4)}, {tuple(k)}, {stride if padding != repr('same') else 1}, "
                f"{padding}, {dilation}, {groups}, {r.random() < 0.7}, {mode!r})"
            ), f"M({name})"
        if kind == "norm":
            last = tuple(t.shape[-r.randint(1, min(d, 3)) :])
            c = t.shape[1] if d > 1 else 1
            made = [f"nn.LayerNorm({last}, elementwise_affine={r.random() < 0.7})", f"nn.RMSNorm({last})"]
            if d > 1:
                made.append(
                    f"nn.GroupNorm({r.choice([g for g in (1, 2, 3, c) if c % g == 0])}, {c}, affine={r.random() < 0.7})"
                )
            if d in (2, 3, 4, 5):
                b = {2: "1", 3: "1", 4: "2", 5: "3"}[d]
                made.append(f"nn.BatchNorm{b}d({c}, affine={r.random() < 0.7}, track_running_stats={r.random() < 0.8})")
            if d in (3, 4, 5):
                made.append(
                    f"nn.InstanceNorm{n}d({c}, affine={r.random() < 0.5}, track_running_stats={r.random() < 0.3})"
                )
            return r.choice(made), f"M({name})"
        if kind == "rnn":
            f, h = t.shape[-1], r.choice([3, 4, 8])
            which = r.choice(["LSTM", "LSTM", "GRU", "RNN"])
            extra = f", proj_size={h - 1}" if which == "LSTM" and r.random() < 0.2 else ""
            return (
                f"nn.{which}({f}, {h}, num_layers={r.choice([1, 1, 2])}, bidirectional={r.random() < 0.4}, "
                f"batch_first={r.random() < 0.6}{extra})",
                f"M({name})" + r.choice(["[0]", "[0]", "[1]" if which != "LSTM" else "[1][0]"]),
            )
        f = t.shape[-1]
        if f % 2:
            return "", ""
        if r.random() < 0.5:
            return (
                f"nn.TransformerEncoderLayer({f}, 2, {2 * f}, batch_first={r.random() < 0.7}, "
                f"norm_first={r.random() < 0.5}, activation={r.choice(['relu', 'gelu'])!r})",
                f"M({name})",
            )
        return (
            f"nn.MultiheadAttention({f}, 2, batch_first={r.random() < 0.7}, bias={r.random() < 0.7}, "
            f"add_bias_kv={r.random() < 0.15}, add_zero_attn={r.random() < 0.1})",
            f"M({name}, {name}, {name}, need_weights={r.random() < 0.5})[0]",
        )

    def attempt(self, init: str, expression: str) -> bool:
        """Run the step; keep it if eager does."""
        if "M" in expression and not init and getattr(self, "pending", ""):
            init, self.pending = self.pending, ""
        made, statements = f"v{len(self.lines)}", []
        if expression.startswith("!"):
            _, statement, source = expression.split("!", 2) if expression.count("!") == 2 else (None, None, None)
            if statement is None:
                return False
            statements = [
                (made, self.r.choice(["{0}.clone()", "{0} + 1", "{0} * 2", "torch.relu({0})"]).format(source)),
                ("", statement.replace("c.", made + ".").replace("(c", f"({made}").replace("=c)", f"={made})")),
            ]
        elif expression.startswith("?"):
            statements = [(made, expression[1:])]
        else:
            statements = [(made, expression)]
        module = f"l{len(self.init)}" if init else ""
        statements = [(n, e.replace("M", f"self.{module}") if init else e) for n, e in statements]
        env = {n: v.clone() if isinstance(v, Tensor) else v for n, v in self.env.items()}
        try:
            if init:
                setattr(self.module, module, eval(init))
                self.module.eval()
            with torch.no_grad():
                local = {**env, "self": self.module}
                for n, e in statements:
                    value = eval(e, globals(), local)
                    if n:
                        local[n] = value
        except Exception:
            return False
        value = local[made]
        if (
            not isinstance(value, Tensor)
            or value.numel() > 40000
            or (value.is_floating_point() and not value.isfinite().all())
        ):
            return False
        if init:
            self.init.append(init)
        self.lines += statements
        self.env[made] = value
        return True

    def finish(self) -> None:
        r = self.r
        names = [n for n, _ in self.lines if n] or ["x0"]
        last = names[-1]
        others = [*names, *(f"x{i}" for i in range(len(self.shapes)))]
        self.result = r.choice(
            [last] * 4
            + [
                f"{last}, {r.choice(others)}",
                f"[{last}, {{'a': {r.choice(others)}, 'b': None}}]",
                f"{last}, {last}.flatten()",
                f"{last}, {r.choice(others)}.shape[0], {r.choice(others)}",
            ]
        )

    def text(self, lines=None, result=None) -> str:
        lines = self.lines if lines is None else lines
        result = self.result if result is None else result
        text = "class Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        used = " ".join(e for _, e in lines)
        text += "".join(f"        self.l{i} = {one}\n" for i, one in enumerate(self.init) if f"self.l{i}" in used)
        text += f"\n    def forward(self, {', '.join(f'x{i}' for i in range(len(self.shapes)))}):\n"
        text += "".join(f"        {n} = {e}\n" if n else f"        {e}\n" for n, e in lines)
        return text + f"        return {result}\n"


def build(text: str, seed: int) -> nn.Module:
    space: dict = {}
    exec(compile(text, "<network>", "exec"), globals(), space)
    torch.manual_seed(seed)
    model = space["Net"]()
    sparsity = random.Random(seed).choice([0.0, 0.5, 0.9])
    with torch.no_grad():
        for module in model.modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) and isinstance(
                module._parameters.get("weight"), Tensor
            ):
                weight.mul_(torch.rand_like(weight) >= sparsity)
            for name in ("running_mean", "running_var"):
                if isinstance(getattr(module, name, None), Tensor):
                    getattr(module, name).uniform_(0.5, 1.5)
    return model.eval()


def variants(shapes: list[tuple[int, ...]], seed: int, ids: bool):
    """Inputs: the example's shapes twice, other strides, other batches, other sizes."""
    g = torch.Generator().manual_seed(seed)
    r = random.Random(seed)

    def new(shape):
        return torch.randint(0, 10, shape, generator=g) if ids else torch.randn(shape, generator=g)

    def batch(n):
        return [
            tuple(n if i == 0 and s == shapes[0][0] and len(shape) > 1 else s for i, s in enumerate(shape))
            for shape in shapes
        ]

    b = shapes[0][0]
    other = {s: s + r.choice([1, 2, 3, 5, -1, 8]) for s in set(shapes[0][2:])} if len(shapes[0]) > 2 else {}
    sized = [(shapes[0][0], shapes[0][1], *(other[s] for s in shapes[0][2:])), *shapes[1:]]
    longer = [(s[0], s[1] + 3, *s[2:]) if len(s) == 3 and s[1] > 1 else s for s in shapes]
    if len(shapes) == 1 and len(shapes[0]) == 2:
        longer = [(shapes[0][0], shapes[0][1] + 3)]
    sized = r.choice([sized, longer]) if len(shapes[0]) == 3 else sized if len(shapes[0]) > 3 else longer
    first = [new(s) for s in shapes]
    if r.random() < 0.15:
        first = [
            x.contiguous(memory_format=torch.channels_last)
            if x.dim() == 4
            else x.transpose(-1, -2).contiguous().transpose(-1, -2)
            if x.dim() > 1
            else x
            for x in first
        ]
    yield "example", first
    yield "again", [new(s) for s in shapes]
    strided = [new(s) for s in shapes]
    how = r.choice(["last", "expanded", "transposed", "step"])
    if how == "last":
        strided = [
            x.contiguous(memory_format=torch.channels_last)
            if x.dim() == 4
            else x.transpose(0, -1).contiguous().transpose(0, -1)
            for x in strided
        ]
    elif how == "expanded":
        strided = [x[:1].expand(x.shape) for x in strided]
    elif how == "transposed":
        strided = [x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.dim() > 1 else x for x in strided]
    else:
        strided = [torch.stack([x, x], -1)[..., 1] for x in strided]
    yield how, strided
    yield "batch", [new(s) for s in batch(b + r.choice([1, 2, 6]))]
    yield "size", [new(s) for s in sized]
    yield "one", [new(s) for s in batch(1)]
    yield "none", [new(s) for s in batch(0)]
    yield "example once more", [new(s) for s in shapes]


def distance(got, want) -> float:
    a, b = pytree.tree_leaves(got), pytree.tree_leaves(want)
    if len(a) != len(b) or str(pytree.tree_structure(got)) != str(pytree.tree_structure(want)):
        return float("inf")
    worst = 0.0
    for x, y in zip(a, b, strict=True):
        if not isinstance(y, Tensor):
            worst = worst if type(x) is type(y) and x == y else float("inf")
            continue
        if not isinstance(x, Tensor) or x.shape != y.shape:
            return float("inf")
        if not y.numel():
            continue
        if not y.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(x.double(), y.double()) else 1.0)
            continue
        x, y = x.double(), y.double()
        finite = y.isfinite()
        if not torch.equal(
            torch.where(finite, 0.0, y).nan_to_num(7e30), torch.where(x.isfinite(), 0.0, x).nan_to_num(7e30)
        ):
            return float("inf")
        x, y = x[finite], y[finite]
        if y.numel():
            worst = max(worst, float((x - y).abs().max()) / max(float(y.abs().max()), 1e-3))
    return worst


def kinds_of(result):
    return [(x.dtype, tuple(x.shape)) if isinstance(x, Tensor) else type(x) for x in pytree.tree_leaves(result)]


def call(model, xs):
    try:
        with torch.no_grad():
            return model(*xs), None
    except Exception as error:
        return None, error


def cloned(value):
    return pytree.tree_map_only(Tensor, lambda x: x.clone(), value)


class Fault(Exception):
    pass


def check(text: str, shapes, seed: int, ids: bool) -> str:
    """What was found, or raises Fault."""
    model = build(text, seed)
    calls = list(variants(shapes, seed, ids))
    state = {k: v.clone() for k, v in model.state_dict().items()}
    example = [x.clone() for x in calls[0][1]]
    _, error = call(build(text, seed), example)
    if error is not None:
        return "refused"
    start = time.process_time()
    given = [x.clone() for x in example]
    try:
        fast = mm.compile(model, tuple(given), tune=False, force=True)
    except Exception as error:
        raise Fault(f"compile raises {type(error).__name__}: {str(error)[:300]}") from error
    took = time.process_time() - start
    if took > 25:
        raise Fault(f"slow: the build took {took:.0f} s")
    if fast.report.reason.startswith(("its output would differ", "its code does not run")):
        raise Fault(f"not compiled: {fast.report.reason}")
    if not all(torch.equal(a, b) for a, b in zip(given, example, strict=True)):
        raise Fault("compile changes the example")
    for name, value in model.state_dict().items():
        if not torch.equal(value, state[name]) and not value.isnan().any() and "max_norm" not in text:
            raise Fault(f"compile changed {name}")
    plain, kept = build(text, seed), []
    for which, xs in calls:
        mine, theirs, exact = (
            [x.detach().clone(memory_format=torch.preserve_format) if which != "expanded" else x for x in xs]
            for _ in range(3)
        )
        want, refused = call(plain, theirs)
        start = time.process_time()
        got, raised = call(fast, mine)
        took = time.process_time() - start
        if took > 15:
            raise Fault(f"{which}: slow, the call took {took:.0f} s")
        if refused is not None:
            if raised is None:
                raise Fault(f"{which}: runs where eager refuses ({str(refused)[:200]})")
            continue
        if raised is not None:
            raise Fault(f"{which}: raises {type(raised).__name__}: {str(raised)[:300]}") from raised
        if kinds_of(got) != kinds_of(want):
            raise Fault(f"{which}: gives {kinds_of(got)}, eager {kinds_of(want)}")
        error = distance(got, want)
        if error > 1e-5:
            double = build(text, seed).double()
            truth, failed = call(double, [x.double() if x.is_floating_point() else x for x in exact])
            own = distance(want, truth) if failed is None else 1e-6
            if own > 1e-3:
                continue  # a comparison or a rounding that a last bit decides
            if min(error, distance(got, truth) if failed is None else error) > max(1e-5, 8 * own):
                raise Fault(f"{which}: differs by {error:.1e} (eager itself by {own:.1e})")
        if which != "expanded" and distance(mine, theirs) > 1e-5:
            raise Fault(f"{which}: the inputs are changed otherwise than by eager")
        for x, y in zip(pytree.tree_leaves(got), pytree.tree_leaves(want), strict=True):
            if (
                isinstance(x, Tensor)
                and which in ("example", "again", "batch")
                and y.is_contiguous()
                and not x.is_contiguous()
            ):
                raise Fault(f"{which}: strides {x.stride()} where eager has {y.stride()}")
            if isinstance(x, Tensor) and x.requires_grad:
                raise Fault(f"{which}: a result requires grad")
        kept.append((which, got, cloned(got)))
        for earlier, value, was in kept:
            if distance(value, was) > 0:
                raise Fault(f"{which}: changes what {earlier!r} gave")
    return f"regions {fast.report.regions}" if fast.report.compiled else "not compiled"


def cut(generator: Generator, seed: int, fault: Fault) -> tuple[str, str]:
    """A smaller text with a fault of the same kind."""
    ids = generator.kind == "ids"

    def kind(error) -> str:
        text = str(error)
        head = text.partition(":")[2] or text
        return next(
            (
                word
                for word in (
                    "compile raises",
                    "not compiled",
                    "slow",
                    "runs where",
                    "raises",
                    "gives",
                    "differs",
                    "inputs",
                    "strides",
                    "changes",
                )
                if word in text
            ),
            head[:20],
        )

    lines, result, message = list(generator.lines), generator.result, str(fault)
    wanted, end = kind(fault), time.process_time() + 40

    def still(lines, result):
        nonlocal message
        if time.process_time() > end:
            return False
        try:
            check(generator.text(lines, result), generator.shapes, seed, ids)
        except Fault as error:
            if kind(error) == wanted:
                message = str(error)
                return True
        except Exception:
            return False
        return False

    for name in [n for n, _ in lines if n]:
        if result != name and still(lines, name):
            result = name
            break
    i = len(lines) - 1
    while i >= 0:
        shorter = lines[:i] + lines[i + 1 :]
        if len(lines) > 1 and still(shorter, result):
            lines = shorter
        elif lines[i][0]:
            earlier = [n for n, _ in lines[:i] if n] + ["x0"]
            for other in reversed(earlier):
                changed = [(n, e) if j != i else (n, other) for j, (n, e) in enumerate(lines)]
                if lines[i][1] != other and still(changed, result):
                    lines = changed
                    break
        i -= 1
    return generator.text(lines, result), message


def main(seconds: float, seed: int, one: bool) -> None:
    faulthandler.enable()
    torch.set_num_threads(1)
    found: dict[str, int] = {}
    end = time.time() + seconds
    while time.time() < end:
        generator = Generator(seed)
        try:
            said = check(generator.text(), generator.shapes, seed, generator.kind == "ids")
        except Fault as fault:
            said = "fault"
            text, message = cut(generator, seed, fault) if not one else (generator.text(), str(fault))
            print(f"--- seed {seed}, shapes {generator.shapes}: {fault}\ncut down: {message}\n{text}", flush=True)
            if one:
                traceback.print_exception(fault)
        except Exception:
            said = "fuzzer"
            print(f"--- seed {seed}: the fuzzer fails\n{traceback.format_exc()}", flush=True)
        said = said.split()[0] if said.startswith("regions 0") else said
        found[said] = found.get(said, 0) + 1
        if one:
            print(generator.text(), said)
            return
        seed += 1
    print(seed, found)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), "--one" in sys.argv)
