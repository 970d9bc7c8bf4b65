"""A layer as a matrix: what its output is a product of, whatever its kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mirrormask.checks import few
from mirrormask.matrices import candidates

__all__ = ["Layer", "can_be_seen", "check_values", "layers_of"]

#: Elements of unfolded inputs at a time: they are ``kernel size`` times the input.
CHUNK = 2**22
#: By full name, since they may not be installed: Hugging Face's linear layer whose weight has its inputs first, and
#: the convolution of networks that come from TensorFlow.
TRANSPOSED = ("transformers.pytorch_utils.Conv1D", "transformers.modeling_utils.Conv1D")
TF_SAME = ("timm.layers.conv2d_same.Conv2dSame",)


@dataclass(frozen=True)
class Layer:
    """A weight, and the modules that compute ``matrix · columns`` with it, group by group.

    Attributes:
        name: of the weight in its model.
        weight: the parameter.
        modules: those that compute with it; more than one where it is tied.
    """

    name: str
    weight: nn.Parameter
    modules: tuple[nn.Module, ...]

    @property
    def kind(self) -> nn.Module:
        """The first of its modules, whose shapes are those of all."""
        return self.modules[0]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight, with outputs first and inputs second, as Linear and Conv have it."""
        shape = tuple(self.weight.shape)
        return shape[::-1] if _transposed(self.kind) else shape

    def matrix(self, weight: Tensor | None = None) -> Tensor:
        """The weight, or a tensor of its shape, as ``(groups, outputs, inputs)``; consecutive channels stay so.

        Example:
            >>> layer = layers_of(nn.Conv2d(4, 6, 3, groups=2))[0]
            >>> layer.matrix().shape
            torch.Size([2, 3, 18])
        """
        x = self.weight.detach() if weight is None else weight
        if isinstance(self.kind, nn.modules.conv._ConvNd):
            return x.movedim(1, -1).reshape(self.kind.groups, -1, x[0].numel())
        return (x.T if _transposed(self.kind) else x)[None]

    def weight_of(self, matrix: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`."""
        if isinstance(self.kind, nn.modules.conv._ConvNd):
            shape = self.weight.shape
            return matrix.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
        return matrix[0].T if _transposed(self.kind) else matrix[0]

    def columns(self, x: Tensor) -> Iterator[Tensor]:
        """What the matrix is multiplied with, ``(groups, places, inputs)``, some examples at a time."""
        conv = self.kind
        if not isinstance(conv, nn.modules.conv._ConvNd):
            yield from (part[None] for part in torch.split(x.reshape(-1, x.shape[-1]), max(CHUNK // x.shape[-1], 1)))
            return
        if x.dim() == conv.weight.dim() - 1:
            x = x[None]
        for part in torch.split(x, max(CHUNK // max(x[0].numel() * conv.weight[0, 0].numel(), 1), 1)):
            yield _windows(part, conv)

    def outputs(self, y: Tensor) -> Tensor:
        """A layer's output as ``(groups, places, outputs)``, as :meth:`columns` has its inputs."""
        conv = self.kind
        if not isinstance(conv, nn.modules.conv._ConvNd):
            return y.reshape(1, -1, y.shape[-1])
        if y.dim() == conv.weight.dim() - 1:
            y = y[None]
        y = y.movedim(1, -1).reshape(-1, conv.groups, y.shape[1] // conv.groups)
        return y.transpose(0, 1)


def _windows(x: Tensor, conv: nn.modules.conv._ConvNd) -> Tensor:
    """im2col with the channels last, for any number of dimensions."""
    padding = _padding_of_tensorflow(x, conv) if _is_a(conv, TF_SAME) else list(conv._reversed_padding_repeated_twice)
    if any(padding):
        x = F.pad(x, padding, mode="constant" if conv.padding_mode == "zeros" else conv.padding_mode)
    n = len(conv.kernel_size)
    for dim, (size, stride, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + dim, dilation * (size - 1) + 1, stride)[..., ::dilation]
    groups = conv.groups
    x = x.reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    places, kernel = range(3, 3 + n), range(3 + n, 3 + 2 * n)
    x = x.permute(1, 0, *places, *kernel, 2)
    inputs = x.shape[-1] * conv.weight[0, 0].numel()
    return x.reshape(groups, -1, inputs)


def _padding_of_tensorflow(x: Tensor, conv: nn.modules.conv._ConvNd) -> list[int]:
    """As many outputs as ``ceil(size / stride)``, of which the odd zero comes last: what no padding of torch does."""
    padding: list[int] = []
    for size, kernel, stride, dilation in zip(x.shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=True):
        total = max((-(-size // stride) - 1) * stride + dilation * (kernel - 1) + 1 - size, 0)
        padding = [total // 2, total - total // 2, *padding]
    return padding


def layers_of(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> list[Layer]:
    """The layers of these weights, in their order.

    Args:
        model: any module.
        weights: name -> parameter of the model; None for all that some layer of a known kind computes with.

    Raises:
        ValueError: a weight belongs to no Linear, Conv or Hugging Face Conv1D, or to two of different shapes.

    Example:
        >>> [layer.name for layer in layers_of(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))]
        ['0.weight', '2.weight']
    """
    owners = _owners(model)
    if weights is None:
        weights = {name: p for name, p in model.named_parameters() if id(p) in owners}
    bad = [name for name, p in weights.items() if id(p) not in owners]
    if bad:
        known_weights = [name for name, p in weights.items() if id(p) in owners]
        remedy = f", such as weights={known_weights[:3]!r}" if known_weights else ""
        raise ValueError(
            f"{few(bad)} {'is' if len(bad) == 1 else 'are'} not the weight of a Linear, Conv1d to Conv3d or Hugging "
            f"Face Conv1D layer alone, whose inputs can be looked at; choose others with weights={remedy}"
        )
    layers = [Layer(name, _parameter(p), owners[id(p)]) for name, p in weights.items()]
    odd = [layer.name for layer in layers if len({_geometry(module) for module in layer.modules}) > 1]
    if odd:
        raise ValueError(f"{few(odd)}: layers of different kinds share this weight; leave it out with weights=")
    return layers


def check_values(weights: Mapping[str, Tensor], verb: str) -> None:
    """Refuse weights that are not here, or not finite.

    Args:
        weights: by name.
        verb: what is to be done to the model.

    Raises:
        ValueError: one is sharded over processes, has no values, cannot be written, or holds NaN or inf.
    """
    spread = [name for name, p in weights.items() if hasattr(p, "placements")]
    if spread:
        raise ValueError(f"{few(spread)}: sharded over processes; {verb} the model before it is sharded")
    absent = [name for name, p in weights.items() if p.is_meta]
    if absent:
        raise ValueError(f"{few(absent)}: on the meta device, without values; load or initialise the weights first")
    fixed = [name for name, p in weights.items() if p.is_inference()]
    if fixed and not torch.is_inference_mode_enabled():
        raise ValueError(f"{few(fixed)}: made in inference mode, where nothing can be changed; build the model outside")
    bad = [name for name, p in weights.items() if not bool(p.detach().isfinite().all())]
    if bad:
        raise ValueError(
            f"{few(bad)} {'is' if len(bad) == 1 else 'are'} not finite; load or initialise the weights first"
        )


def can_be_seen(model: nn.Module, weight: Tensor) -> bool:
    """Whether :func:`layers_of` knows layers that compute with this parameter, and with nothing else of it.

    Example:
        >>> model = nn.LSTM(2, 3)
        >>> can_be_seen(model, model.weight_ih_l0)
        False
    """
    return id(weight) in _owners(model)


def _owners(model: nn.Module) -> dict[int, tuple[nn.Module, ...]]:
    """The modules of known kinds that compute with a parameter alone, by its ``id``."""
    owners: dict[int, tuple[nn.Module, ...]] = {}
    for candidate in candidates(model):
        known = [m for m in candidate.owners if _is_known(m) and m._parameters.get("weight") is candidate.parameter]
        if len(known) == len(candidate.owners):
            owners[id(candidate.parameter)] = tuple(dict.fromkeys(known))
    return owners


def _parameter(p: Tensor) -> nn.Parameter:
    assert isinstance(p, nn.Parameter)
    return p


def _geometry(module: nn.Module) -> tuple[Any, ...]:
    names = ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return (_transposed(module), *(getattr(module, name, None) for name in names))


def _is_known(module: nn.Module) -> bool:
    conv = isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    return conv or isinstance(module, nn.Linear) or _transposed(module)


def _transposed(module: nn.Module) -> bool:
    return _is_a(module, TRANSPOSED)


def _is_a(module: nn.Module, names: tuple[str, ...]) -> bool:
    return any(f"{kind.__module__}.{kind.__qualname__}" in names for kind in type(module).__mro__)


def agrees(layer: Layer, module: nn.Module, x: Tensor, y: Any) -> bool:
    """Whether ``y`` is what the matrix makes of ``x``: not so where a class pads, scales or adapts on its own."""
    if not isinstance(y, Tensor):
        return False
    if isinstance(layer.kind, nn.modules.conv._ConvNd) and x.dim() == layer.weight.dim():
        x, y = x[:1], y[:1]  # one image will tell
    elif not isinstance(layer.kind, nn.modules.conv._ConvNd):
        x, y = x.reshape(-1, x.shape[-1])[:1024], y.reshape(-1, y.shape[-1])[:1024]
    columns = torch.cat(list(layer.columns(x)), 1).float()
    expected = columns @ layer.matrix().float().transpose(1, 2)
    bias = getattr(module, "bias", None)
    if isinstance(bias, Tensor):
        expected = expected + bias.detach().float().reshape(expected.shape[0], 1, -1)
    found = layer.outputs(y).float()
    if found.shape != expected.shape:
        return False
    if not bool(found.isfinite().all()):
        return True  # no number says what the layer computes; it is found where this is used
    distance, size = (float(torch.linalg.vector_norm(t)) for t in (found - expected, expected))
    close: bool = distance <= 0.05 * size + 1e-6 * expected.numel() ** 0.5
    return close
