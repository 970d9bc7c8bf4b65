"""The networks of the runtime's benchmark, with random zeros: speed depends on where zeros are, not on learning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """The basic residual block of He et al., arXiv 1512.03385."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Identity() if same else shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(y + self.shortcut(x))


def resnet(stem: nn.Module, widths: tuple[int, ...], blocks: int, classes: int) -> nn.Module:
    """A residual network of basic blocks."""
    layers: list[nn.Module] = [stem]
    inputs = widths[0]
    for stage, width in enumerate(widths):
        for block in range(blocks):
            layers.append(Block(inputs, width, 2 if stage and not block else 1))
            inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def resnet18() -> nn.Module:
    """ResNet-18 for 224 x 224 images."""
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return resnet(nn.Sequential(*stem), (64, 128, 256, 512), 2, 1000)


def resnet50() -> nn.Module:
    """ResNet-50 for 224 x 224 images, torchvision's."""
    from torchvision.models import resnet50 as make

    return make(weights=None)


def resnet20() -> nn.Module:
    """ResNet-20 for 32 x 32 images."""
    stem = nn.Sequential(nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return resnet(stem, (16, 32, 64), 3, 10)


def mlp() -> nn.Module:
    """784-1024-1024-10."""
    return nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 10))


class FeedForward(nn.Module):
    """The linear layers of 12 transformer blocks: ``x + B relu(A x)``."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(384, 1536) for _ in range(12))
        self.down = nn.ModuleList(nn.Linear(1536, 384) for _ in range(12))

    def forward(self, x: Tensor) -> Tensor:
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(x)))
        return x


class EncoderBlock(nn.Module):
    """A transformer block with six heads, of which the linear layers are sparse."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (6, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.out(attended)
        return x + self.mlp(self.norm2(x))


def encoder() -> nn.Module:
    """Twelve blocks of width 384, as in ViT-S."""
    return nn.Sequential(*(EncoderBlock(384) for _ in range(12)))


@dataclass(frozen=True)
class Network:
    """A network and its input. The first convolution and the classifier stay dense, as in the papers."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    keep_first: bool = True
    keep_last: bool = True


NETWORKS = {
    "resnet18-b1": Network(resnet18, (1, 3, 224, 224)),
    "resnet18-b16": Network(resnet18, (16, 3, 224, 224)),
    "resnet50-b1": Network(resnet50, (1, 3, 224, 224)),
    "resnet20-b1": Network(resnet20, (1, 3, 32, 32)),
    "resnet20-b64": Network(resnet20, (64, 3, 32, 32)),
    "mlp-b1": Network(mlp, (1, 784), keep_first=False),
    "linears-128": Network(FeedForward, (128, 384), keep_first=False, keep_last=False),
    "encoder-128": Network(encoder, (1, 128, 384), keep_first=False, keep_last=False),
}


def build(network: Network, sparsity: float) -> tuple[nn.Module, Tensor]:
    """The network with a random mask per layer, in eval mode, and an input."""
    torch.manual_seed(0)
    model = network.make().eval()
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    dense = {*(layers[:1] if network.keep_first else ()), *(layers[-1:] if network.keep_last else ())}
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for layer in layers:
        if layer in dense:
            continue
        weight = layer.weight.data
        keep = torch.randperm(weight.numel())[: round(weight.numel() * (1 - sparsity))]
        mask = torch.zeros(weight.numel())
        mask[keep] = (1 - sparsity) ** -0.5  # the sums keep their size
        weight.mul_(mask.view_as(weight))
    return model, torch.randn(network.shape)
