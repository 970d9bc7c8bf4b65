"""Which layers of a graph leave the range of half precision for an input: found by running it in fp32, in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirrormask.runtime.graph.frames import frames_conv
from mirrormask.runtime.graph.functions import arrange, attend, attend_maps, channel_norm, map_norm, spaced
from mirrormask.runtime.graph.ir import Graph, Node
from mirrormask.runtime.graph.moments import moments

__all__ = ["LIMIT", "RangeFinder"]

#: The largest number that half precision holds.
LIMIT = 65504.0

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "hardswish": F.hardswish,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": F.hardsigmoid,
    "tanh": torch.tanh,
    "clamp": torch.clamp,
    "leaky_relu": F.leaky_relu,
    "elu": torch.ops.aten.elu,
    "softplus": F.softplus,
    "mish": F.mish,
    "affine": lambda x, gain, shift: gain * x + shift,
    "abs": torch.abs,
    "square": torch.square,
    "exp": torch.exp,
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
}
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
    "div": torch.div,
    "max": torch.maximum,
    "min": torch.minimum,
}

REDUCE: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.sum(1, keepdim=True),
    "mean": lambda x: x.mean(1, keepdim=True),
    "max": lambda x: x.amax(1, keepdim=True),
    "norm": lambda x: torch.linalg.vector_norm(x, dim=1, keepdim=True),
}


class RangeFinder(nn.Module):
    """Stands in for a region: runs its graph in PyTorch, and notes how large every value and sum may become.

    For a layer ``y = W x + b`` that is ``max (|W| |x| + |b|)``: no partial sum can exceed it, in whatever order the
    terms are added. Where it is past 65,504 the layer must not run in half precision, nor whatever reads a value that
    is itself past it.

    Attributes:
        wide: names of the nodes that must run in fp32.
        peaks: per such node, the bound that was exceeded.
    """

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.wide: set[str] = set()
        self.peaks: dict[str, float] = {}

    def forward(self, *inputs: Tensor) -> Any:
        """Run the graph; what was noted adds up over calls."""
        graph = self.graph
        if graph.recurrent:
            return _states(graph, *inputs)  # in fp32 whatever they are
        leading = graph.leading(inputs[0].shape)
        given = dict(zip(graph.inputs, inputs, strict=True))
        values: dict[str, Tensor] = {}
        for node in graph.nodes:
            if node.kind == "mask":
                values[node.name] = given[node.name]
                continue
            if node.op == "input":
                values[node.name] = given[node.name].reshape(math.prod(leading), *node.shape)
                continue
            if node.op == "stored":
                assert node.gain is not None
                values[node.name] = (
                    torch.from_numpy(node.gain).reshape(1, *node.shape).expand(math.prod(leading), *node.shape)
                )
                continue
            sources = [values[name] for name in node.inputs]
            if node.op == "attention":
                streams = [x.reshape(*leading, -1) for x in sources[:3]]
                result = _attention(node, streams, sources[3] if len(sources) > 3 else None).flatten(0, -2)
            else:
                result = _result(node, sources)
            values[node.name] = result
            peak = max(_most(node, sources), _peak(result), *(_peak(x) for x in sources))
            if not peak <= LIMIT:
                self.wide.add(node.name)
                self.peaks[node.name] = max(peak, self.peaks.get(node.name, 0.0))
        results = [values[name].reshape(*leading, *graph.shapes[name]) for name in graph.outputs]
        return results[0] if len(results) == 1 else tuple(results)


def _peak(x: Tensor | None) -> float:
    return 0.0 if x is None or not x.numel() else float(x.abs().max())


def _weights(node: Node) -> tuple[Tensor, Tensor | None]:
    assert node.weight is not None
    return torch.from_numpy(node.weight.dense()), None if node.bias is None else torch.from_numpy(node.bias)


def _layer(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if node.op == "linear":
        return F.linear(x, weight, bias)
    if node.span:
        maps = x if x.dim() == 4 else x[:, :, None, None]
        made = frames_conv(
            maps, weight, bias, node.span, node.stride, node.padding, node.dilation, node.groups, turned=False
        )
        return made.reshape(len(x), *node.shape)
    if x.dim() == 2:  # one number per channel
        return _layer(node, x[:, :, None, None], weight, bias)[:, :, 0, 0]
    return F.conv2d(x, weight, bias, node.stride, node.padding, node.dilation, node.groups)


def _most(node: Node, sources: list[Tensor]) -> float:
    """How large a sum inside an operation may become, and its weights."""
    x = sources[0]
    if node.weight is not None:
        weight, bias = _weights(node)
        sums = _layer(node, x.abs(), weight.abs(), None if bias is None else bias.abs())
        return max(_peak(sums), _peak(weight), _peak(bias))
    if node.op == "pool" and node.kind == "mean":
        return _peak(_pooled(node, x.abs(), divisor=1))
    if node.op == "reduce" and node.kind in ("sum", "mean"):
        return _peak(x.abs().sum(1))
    if node.op == "adaptive" and node.kind == "mean":
        window = math.prod(n // m + 2 for n, m in zip(x.shape[2:], (*node.shape[1:], 1, 1), strict=False))
        return window * _peak(_resized(node, x.abs()))
    return 0.0


def _pooled(node: Node, x: Tensor, divisor: int | None = None) -> Tensor:
    if node.kind == "mean":
        count = node.count_padding
        return F.avg_pool2d(x, node.kernel, node.stride, node.padding, node.ceil, count, divisor_override=divisor)
    return F.max_pool2d(x, node.kernel, node.stride, node.padding, ceil_mode=node.ceil)


def _resized(node: Node, x: Tensor) -> Tensor:
    """What pools of any windows, padding, crops and interpolation make."""
    if node.op == "adaptive":
        pool = F.adaptive_avg_pool2d if node.kind == "mean" else F.adaptive_max_pool2d
        rows, columns = (*node.shape[1:], 1, 1)[:2]
        return pool(x, (rows, columns)).reshape(len(x), *node.shape)
    if node.op == "pad" and node.kind == "spaced":
        return spaced(x, node.stride, node.span)  # type: ignore[arg-type]
    if node.op == "pad":
        fill = node.values[0] if node.kind == "constant" else None
        return F.pad(x, node.span, node.kind, fill)
    if node.op == "crop":
        axis, *bounds = node.span
        return x[:, :, slice(*bounds)] if axis == 0 else x[:, :, :, slice(*bounds)]
    if node.kind == "nearest":
        return F.interpolate(x, node.shape[1:])
    return F.interpolate(x, node.shape[1:], mode="bilinear", align_corners=node.kind == "corners")


def _attention(node: Node, sources: list[Tensor], mask: Tensor | None) -> Tensor:
    heads, (width, value_width) = node.groups, node.kernel
    starts = tuple(node.span[i * heads : (i + 1) * heads] for i in range(3))
    query, key, value = sources
    causal = node.kind == "causal"
    function = attend if node.op == "attention" else attend_maps
    return function(query, key, value, mask, starts, (width, value_width), node.values[0], causal)  # type: ignore[arg-type]


def _arranged(node: Node, x: Tensor) -> Tensor:
    channels = node.shape[0]
    return arrange(x, node.span[:channels], node.span[channels:], node.shape[1:])


def _result(node: Node, sources: list[Tensor]) -> Tensor:
    """What a node makes of its inputs, ``[items, *shape]``."""
    x = sources[0]
    if node.weight is not None:
        return _layer(node, x, *_weights(node))
    if node.op == "act":
        return ACTIVATIONS[node.kind](x, *node.values)
    if node.op in ("add", "combine"):
        return COMBINE[node.kind or "add"](x, sources[1])
    if node.op == "norm" and node.kind == "mean":
        return x / (x.mean(1, keepdim=True) + node.values[0])
    if node.op in ("norm", "group_norm"):
        gain, bias = (None if part is None else torch.from_numpy(part) for part in (node.gain, node.bias))
        if node.op == "group_norm":
            return F.group_norm(x, node.groups, gain, bias, node.values[0])
        if len(node.shape) == 3:
            return channel_norm(x, gain, bias, node.values[0], node.kind)
        if node.kind == "layer":
            return F.layer_norm(x, node.shape, gain, bias, node.values[0])
        return F.rms_norm(x, node.shape, gain, node.values[0]) + (0.0 if bias is None else bias)
    if node.op == "softmax":
        return x.softmax(1) if node.kind == "softmax" else x.log_softmax(1)
    if node.op == "reduce":
        return REDUCE[node.kind](x)
    if node.op == "arrange":
        return _arranged(node, x)
    if node.op == "attend":
        bias = None
        if node.gain is not None:
            bias = torch.from_numpy(node.gain).reshape(*node.stride, node.shape[-1], sources[1].shape[-1])
        return _attention(node, sources, bias)
    if node.op == "concat":
        return torch.cat(sources, 1)
    if node.op == "join":
        return torch.cat(sources, 2 + node.span[0])
    if node.op == "slice":
        return x[:, slice(*node.span)]
    if node.op == "gather":
        taken = x[:, list(node.span)]
        return taken * torch.tensor(node.values).reshape(-1, *[1] * (x.dim() - 2)) if node.values else taken
    if node.op == "pool":
        return _pooled(node, x)
    if node.op in ("adaptive", "pad", "crop", "resample"):
        return _resized(node, x)
    if node.op == "mean" and node.kind == "sum":
        return x.sum((2, 3)).reshape(len(x), *node.shape)
    if node.op == "mean" and node.kind:
        return map_norm(x).reshape(len(x), *node.shape)
    if node.op == "mean":
        return x.mean((2, 3)).reshape(len(x), *node.shape)
    return x.reshape(len(x), *node.shape)


def _states(graph: Graph, pre: Tensor, first: Tensor | None = None) -> Tensor:
    """What a recurrent layer's graph computes."""
    layer, made = graph.layers()[0], graph.nodes[-1]
    assert layer.weight is not None
    weight = torch.from_numpy(layer.weight.dense())
    bias = None if layer.bias is None else torch.from_numpy(layer.bias)
    return moments(pre, first, weight, bias, made.kind)[..., : made.shape[0]]
