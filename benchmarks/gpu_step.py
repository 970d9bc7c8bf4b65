"""The time and memory of a training step on a GPU, beside torch's fused SGD and AdamW; and 2:4 products.

ResNet-50 (batch 256, channels_last, bf16 autocast, SGD), ViT-S/16 (batch 256, AdamW), a GPT-2 of 124 M weights (batch
8 x 1,024 tokens, AdamW). In every round each contender takes a few steps in turn. Memory is the peak above that of
torch's own optimizer, in tensors of the weights' size (fp32).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mirrormask as mm

#: Contender -> method and options; ``torch`` is its own fused optimizer.
CONTENDERS: dict[str, tuple[str, dict[str, Any]] | None] = {
    "torch": None,
    "mirror": ("mirror", {}),
    "gmp": ("gmp", {}),
    "gmp_ham": ("gmp_ham", {}),
}
ROUNDS, STEPS = 7, 4


class Bottleneck(nn.Module):
    """The block of ResNet-50 (arXiv 1512.03385), with the stride in its 3x3 convolution."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        shapes = ((n_in, width, 1, 1), (width, width, 3, stride), (width, 4 * width, 1, 1))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k, s, k // 2, bias=False) for a, b, k, s in shapes)
        self.norms = nn.ModuleList(nn.BatchNorm2d(b) for _, b, _, _ in shapes)
        same = stride == 1 and n_in == 4 * width
        short = nn.Sequential(nn.Conv2d(n_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width))
        self.short = nn.Identity() if same else short

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            y = norm(conv(y))
            y = F.relu(y, inplace=True) if i < 2 else y
        return F.relu(y + self.short(x), inplace=True)


def resnet50(blocks: tuple[int, ...] = (3, 4, 6, 3)) -> nn.Module:
    """ResNet-50 for 1,000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, 64, 7, 2, 3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    n_in = 64
    for stage, number in enumerate(blocks):
        for block in range(number):
            layers.append(Bottleneck(n_in, 64 * 2**stage, 2 if stage and not block else 1))
            n_in = 256 * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 1000))


class Encoder(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class ViT(nn.Module):
    """ViT-S/16 (arXiv 2010.11929; 22 M weights)."""

    def __init__(self, width: int = 384, depth: int = 12, heads: int = 6, patches: int = 196) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.place = nn.Parameter(0.02 * torch.randn(1, patches, width))
        self.blocks = nn.Sequential(*(Encoder(width, heads, causal=False) for _ in range(depth)), nn.LayerNorm(width))
        self.head = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2) + self.place).mean(1))


class GPT(nn.Module):
    """GPT-2's smallest (124 M weights), its head tied to the embedding."""

    def __init__(
        self, width: int = 768, depth: int = 12, heads: int = 12, words: int = 50257, length: int = 1024
    ) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Encoder(width, heads, causal=True) for _ in range(depth)), nn.LayerNorm(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(self.words(x) + self.places.weight[: x.shape[1]])
        return F.linear(y, self.words.weight).flatten(0, 1)


def cases(*, tiny: bool) -> dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], bool]]:
    """Network -> how to make it, the shape of a batch, whether AdamW trains it; with ``tiny`` such as a CPU can."""
    if tiny:
        return {
            "resnet50": (lambda: resnet50((1, 1)), (2, 3, 32, 32), False),
            "vit_s": (lambda: ViT(16, 1, 2, 4), (2, 3, 32, 32), True),
            "gpt2": (lambda: GPT(16, 1, 2, 50, 8), (2, 8), True),
        }
    return {
        "resnet50": (resnet50, (256, 3, 224, 224), False),
        "vit_s": (ViT, (256, 3, 224, 224), True),
        "gpt2": (GPT, (8, 1024), True),
    }


class Contender:
    """A network, its optimizer, and steps on one batch of noise."""

    def __init__(
        self, name: str, case: tuple[Callable[[], nn.Module], tuple[int, ...], bool], device: torch.device
    ) -> None:
        make, shape, adam = case
        torch.manual_seed(0)
        self.device = device
        self.model = make().to(device)
        if len(shape) == 4:
            self.model = self.model.to(memory_format=torch.channels_last)
            self.x = torch.randn(shape, device=device).to(memory_format=torch.channels_last)
            self.y = torch.randint(0, 1000, shape[:1], device=device)
        else:
            self.x = torch.randint(0, 50, shape, device=device)
            self.y = torch.randint(0, 50, (shape[0] * shape[1],), device=device)
        own = list(self.model.parameters())
        base: torch.optim.Optimizer = torch.optim.SGD(own, lr=1e-3, momentum=0.9, fused=True)
        if adam:
            base = torch.optim.AdamW(own, lr=1e-4, fused=True)
        self.optimizer: Any = base
        chosen = CONTENDERS[name]
        if chosen is not None:
            self.optimizer = mm.sparsify(self.model, base, mm.methods.get(chosen[0])(0.9, **chosen[1]), steps=100_000)

    def step(self) -> tuple[float, float]:
        """Seconds of a whole step and of the optimizer's."""
        self.optimizer.zero_grad()
        start = self._now()
        with torch.autocast(self.device.type, torch.bfloat16):
            loss = F.cross_entropy(self.model(self.x), self.y)
        loss.backward()
        middle = self._now()
        self.optimizer.step()
        end = self._now()
        return end - start, end - middle

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def memory(name: str, case: Any, device: torch.device) -> float:
    """The peak of two steps, in bytes; 0 where torch counts none."""
    if device.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    contender = Contender(name, case, device)
    for _ in range(2):
        contender.step()
    return float(torch.cuda.max_memory_allocated())


def measure(network: str, device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """One row a contender."""
    case = cases(tiny=tiny)[network]
    peaks = {name: memory(name, case, device) for name in CONTENDERS}
    contenders = {name: Contender(name, case, device) for name in CONTENDERS}
    for contender in contenders.values():
        for _ in range(1 if tiny else 3):
            contender.step()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(1 if tiny else ROUNDS):
        for name, contender in contenders.items():
            times[name] += [contender.step() for _ in range(STEPS)]
    weights = 4 * sum(p.numel() for p in contenders["torch"].model.parameters())
    rows = []
    for name, found in times.items():
        whole, part = (1e3 * statistics.median(one[i] for one in found) for i in (0, 1))
        extra = (peaks[name] - peaks["torch"]) / weights
        rows.append({"network": network, "contender": name, "ms": whole, "optimizer_ms": part, "extra_tensors": extra})
    reference = rows[0]
    for row in rows:
        row["whole_ratio"] = row["ms"] / reference["ms"]
        row["optimizer_ratio"] = row["optimizer_ms"] / reference["optimizer_ms"]
    return rows


def semi_structured(device: torch.device, *, tiny: bool) -> list[dict[str, Any]]:
    """2:4 weights in torch's semi-structured form against dense ones, in bf16: rows x columns x tokens."""
    rows: list[dict[str, Any]] = []
    shapes = ((3072, 768, 8192), (768, 3072, 8192), (4096, 4096, 4096), (3072, 768, 64))
    for out, inner, tokens in shapes if device.type == "cuda" and not tiny else ():
        weight = torch.randn(out, inner, device=device, dtype=torch.bfloat16)
        weight *= torch.tensor([1, 1, 0, 0], device=device).tile(out, inner // 4)
        x = torch.randn(tokens, inner, device=device, dtype=torch.bfloat16)
        sparse = torch.sparse.to_sparse_semi_structured(weight)
        seconds = {name: _timed(F.linear, x, w) for name, w in (("dense", weight), ("2:4", sparse))}
        ratio = seconds["dense"] / seconds["2:4"]
        rows.append({"shape": [out, inner, tokens], "dense_ms": 1e3 * seconds["dense"], "times_faster": ratio})
    return rows


def _timed(run: Callable[..., Any], *arguments: Any) -> float:
    for _ in range(5):
        run(*arguments)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(50):
        run(*arguments)
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / 50
