"""Networks that other people chose: what :mod:`zoo` compiles, each with random weights and its natural input."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mirrormask as mm

__all__ = ["ZOO", "ZooNetwork", "build", "example"]

TOKENS = 128
IMAGE = (1, 3, 224, 224)
#: The least variance of a batch norm's channel, over the mean of its channels.
QUIET = 0.1


class UNet(nn.Module):
    """Ronneberger et al., arXiv 1505.04597, with batch norm, padding and a quarter of the channels."""

    def __init__(self, widths: tuple[int, ...] = (16, 32, 64, 128, 256), classes: int = 2) -> None:
        super().__init__()
        pairs = list(itertools.pairwise(widths))
        self.first = self._twice(3, widths[0])
        self.down = nn.ModuleList(self._twice(narrow, wide) for narrow, wide in pairs)
        self.up = nn.ModuleList(nn.ConvTranspose2d(wide, narrow, 2, 2) for narrow, wide in reversed(pairs))
        self.merge = nn.ModuleList(self._twice(2 * narrow, narrow) for narrow, _ in reversed(pairs))
        self.last = nn.Conv2d(widths[0], classes, 1)

    @staticmethod
    def _twice(inputs: int, outputs: int) -> nn.Module:
        layers: list[nn.Module] = []
        for width in (inputs, outputs):
            layers += [nn.Conv2d(width, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.first(x)]
        for block in self.down:
            kept.append(block(F.max_pool2d(kept[-1], 2)))
        x = kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat((kept.pop(), up(x)), 1))
        return self.last(x)


class LSTMClassifier(nn.Module):
    """A text's class from the last state of a two-layer LSTM."""

    def __init__(self, vocabulary: int, width: int = 256, classes: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        states, _ = self.lstm(self.embedding(tokens))
        return self.head(states[:, -1])


class CausalBlock(nn.Module):
    """Two causal dilated convolutions and a shortcut: the block of Bai et al., arXiv 1803.01271."""

    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.conv1 = nn.Conv1d(inputs, outputs, 3, dilation=dilation)
        self.conv2 = nn.Conv1d(outputs, outputs, 3, dilation=dilation)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv1(F.pad(x, (self.past, 0))))
        y = torch.relu(self.conv2(F.pad(y, (self.past, 0))))
        return torch.relu(y + self.shortcut(x))


def tcn() -> nn.Module:
    """Six causal blocks over a series of 16 channels, and a number for each moment."""
    blocks = [CausalBlock(16 if level == 0 else 128, 128, 2**level) for level in range(6)]
    return nn.Sequential(*blocks, nn.Conv1d(128, 1, 1))


@dataclass(frozen=True)
class ZooNetwork:
    """How a network is made, and the input it is made for.

    Attributes:
        make: from the size of the vocabulary to the network; networks without a vocabulary do not look at it.
        shape: of the input; ``None`` to take what the network itself says (timm's ``pretrained_cfg``).
        package: which must be installed.
        tokens: the input is numbers of words.
    """

    make: Callable[[int], nn.Module]
    shape: tuple[int, ...] | None = IMAGE
    package: str = "torch"
    tokens: bool = False


def _torchvision(name: str, shape: tuple[int, ...] = IMAGE, **options: Any) -> ZooNetwork:
    def make(_: int) -> nn.Module:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options)

    return ZooNetwork(make, shape, "torchvision")


def _timm(name: str, shape: tuple[int, ...] | None = None) -> ZooNetwork:
    def make(_: int) -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return ZooNetwork(make, shape, "timm")


def _convmixer(width: int, depth: int) -> ZooNetwork:
    def make(_: int) -> nn.Module:
        from timm.models.convmixer import ConvMixer

        return ConvMixer(width, depth, kernel_size=9, patch_size=7)

    return ZooNetwork(make, package="timm")


def _transformers(model: str, config: str, shape: tuple[int, ...] = (1, TOKENS), **options: Any) -> ZooNetwork:
    tokens = len(shape) == 2

    def make(vocabulary: int) -> nn.Module:
        import transformers

        sizes: dict[str, Any] = {"vocab_size": vocabulary} if tokens else {}
        special = {f"{name}_token_id": 0 for name in ("bos", "eos", "pad")} if tokens else {}  # within any vocabulary
        made = getattr(transformers, config)(**sizes, **special, **options)
        if hasattr(made, "use_cache"):
            made.use_cache = False
        return getattr(transformers, model)(made)

    return ZooNetwork(make, shape, "transformers", tokens)


def _whisper(vocabulary: int) -> nn.Module:
    import transformers

    config = transformers.WhisperConfig(vocab_size=vocabulary, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    return transformers.WhisperModel(config).encoder


_SEGMENTATION = {"weights_backbone": None}
_FROM_INCEPTION = {"aux_logits": False, "init_weights": True}  # the auxiliary classifiers are for training
_SMALL = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}

#: In the order of the table.
ZOO: dict[str, ZooNetwork] = {
    "alexnet": _torchvision("alexnet"),
    "vgg11_bn": _torchvision("vgg11_bn"),
    "resnet18": _torchvision("resnet18"),
    "resnet50": _torchvision("resnet50"),
    "resnext50_32x4d": _torchvision("resnext50_32x4d"),
    "wide_resnet50_2": _torchvision("wide_resnet50_2"),
    "densenet121": _torchvision("densenet121"),
    "googlenet": _torchvision("googlenet", **_FROM_INCEPTION),
    "inception_v3": _torchvision("inception_v3", (1, 3, 299, 299), **_FROM_INCEPTION),
    "mobilenet_v2": _torchvision("mobilenet_v2"),
    "mobilenet_v3_small": _torchvision("mobilenet_v3_small"),
    "mobilenet_v3_large": _torchvision("mobilenet_v3_large"),
    "mnasnet1_0": _torchvision("mnasnet1_0"),
    "shufflenet_v2_x1_0": _torchvision("shufflenet_v2_x1_0"),
    "squeezenet1_1": _torchvision("squeezenet1_1"),
    "efficientnet_b0": _torchvision("efficientnet_b0"),
    "efficientnet_v2_s": _torchvision("efficientnet_v2_s"),
    "regnet_x_400mf": _torchvision("regnet_x_400mf"),
    "regnet_y_400mf": _torchvision("regnet_y_400mf"),
    "convnext_tiny": _torchvision("convnext_tiny"),
    "vit_b_16": _torchvision("vit_b_16"),
    "swin_t": _torchvision("swin_t"),
    "maxvit_t": _torchvision("maxvit_t"),
    "deeplabv3_mobilenet_v3_large": _torchvision("deeplabv3_mobilenet_v3_large", **_SEGMENTATION),
    "lraspp_mobilenet_v3_large": _torchvision("lraspp_mobilenet_v3_large", **_SEGMENTATION),
    "fcn_resnet50": _torchvision("fcn_resnet50", **_SEGMENTATION),
    "mc3_18": _torchvision("mc3_18", (1, 3, 16, 112, 112)),
    "convmixer_256_8": _convmixer(256, 8),
    "mixer_s16_224": _timm("mixer_s16_224"),
    "repvgg_a0": _timm("repvgg_a0"),
    "ghostnet_100": _timm("ghostnet_100"),
    "edgenext_small": _timm("edgenext_small"),
    "convnextv2_atto": _timm("convnextv2_atto"),
    "mobilevit_s": _timm("mobilevit_s"),
    "levit_128": _timm("levit_128"),
    "deit_tiny_patch16_224": _timm("deit_tiny_patch16_224"),
    "efficientnet_lite0": _timm("efficientnet_lite0"),
    "bert": _transformers("BertModel", "BertConfig", num_hidden_layers=4, **_SMALL),
    "distilbert": _transformers("DistilBertModel", "DistilBertConfig"),
    "gpt2": _transformers("GPT2LMHeadModel", "GPT2Config"),
    "t5_encoder": _transformers("T5EncoderModel", "T5Config"),
    "whisper_encoder": ZooNetwork(_whisper, (1, 80, 3000), "transformers"),
    "llama": _transformers("LlamaForCausalLM", "LlamaConfig", num_hidden_layers=6, num_key_value_heads=4, **_SMALL),
    "vit": _transformers(
        "ViTForImageClassification", "ViTConfig", IMAGE, hidden_size=384, intermediate_size=1536, num_attention_heads=6
    ),
    "unet": ZooNetwork(lambda _: UNet()),
    "lstm": ZooNetwork(LSTMClassifier, (1, TOKENS), tokens=True),
    "tcn": ZooNetwork(lambda _: tcn(), (1, 16, 512)),
}


def example(network: ZooNetwork, model: nn.Module, vocabulary: int, batch: int = 1) -> Tensor:
    """An input of the network, drawn from the present state of torch's generator."""
    shape = network.shape or (1, *model.pretrained_cfg["input_size"])
    shape = (batch, *shape[1:])
    return torch.randint(vocabulary, shape) if network.tokens else torch.randn(shape)


@torch.no_grad()
def build(network: ZooNetwork, sparsity: float, vocabulary: int) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    """The network in eval mode with the smallest weights of each matrix at zero, and those matrices by name."""
    torch.manual_seed(0)
    model = network.make(vocabulary).eval()
    chosen = mm.select_weights(model)
    _enliven(model, chosen)
    masks = mm.masks.select([w.abs() for w in chosen.values()], sparsity, "uniform")
    for weight, mask in zip(chosen.values(), masks, strict=True):
        before = weight.norm()
        weight.mul_(mask)
        weight.mul_(before / weight.norm())  # the sums keep their size, else deep networks fall silent
    mm.recalibrate(model, [example(network, model, vocabulary, batch=4)])
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm) and norm.running_var is not None:
            # Nothing reaches some channels, whose rounding errors would be the largest of their layer: MobileNetV2 in
            # PyTorch itself is then 4e-3 from float64.
            norm.running_var.clamp_(min=QUIET * float(norm.running_var.mean()))
    return model.requires_grad_(False), chosen


def _enliven(model: nn.Module, chosen: dict[str, nn.Parameter]) -> None:
    """Draw what initialization left constant, as training would have moved it.

    Gains of one and biases of zero hide an exchanged channel; a head of zeros or a residual branch that is scaled by
    1e-6 hides all errors before it.
    """
    for name, parameter in model.named_parameters():
        if parameter.numel() < 2 or bool((parameter != parameter.flatten()[0]).any()):
            continue
        value = float(parameter.flatten()[0])
        if name in chosen:
            parameter.normal_(0.0, math.prod(parameter.shape[1:]) ** -0.5)
        elif parameter.numel() > max(parameter.shape):
            parameter.normal_(0.0, 0.02)  # a table of positions
        elif value == 0.0 and name.endswith("bias"):
            parameter.normal_(0.0, 0.1)
        elif abs(value) >= 0.1:
            parameter.uniform_(0.5, 1.5).mul_(value)
        else:
            parameter.uniform_(0.1, 0.5)
