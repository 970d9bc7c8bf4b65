"""A graph without weights, filled with a model's tensors; batch norms become weights, and part of the layer before."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
from torch import Tensor

from mirrormask.runtime.graph.ir import Graph, Node, Origin, Weight

__all__ = ["bind", "fold", "names_in"]

Floats = npt.NDArray[np.float32]


def names_in(graph: Graph) -> set[str]:
    """The names of the tensors that a graph is made of."""
    origins = [node.origin for node in graph.nodes if node.origin is not None]
    return {name for o in origins for name in (o.weight, o.bias, o.mean, o.variance) if name}


def bind(graph: Graph, tensors: dict[str, Tensor]) -> Graph:
    """Fill in weights and biases, and fold batch norms.

    Raises:
        KeyError: a tensor is missing.
    """
    channels = {node.name: node.shape[0] for node in graph.nodes if node.shape}
    filled = [_filled(node, tensors) for node in graph.nodes]
    return fold(replace(graph, nodes=[_single(node, channels) if node.span else node for node in filled]))


def _filled(node: Node, tensors: dict[str, Tensor]) -> Node:
    origin = node.origin
    if origin is None:
        return node
    weight: Floats
    bias: Floats | None
    if node.op in ("norm", "group_norm"):
        gain, shift = (_array(tensors[name]).copy() if name else None for name in (origin.weight, origin.bias))
        return replace(node, gain=gain, bias=shift, origin=None)
    if node.op == "stored":
        flat = _array(tensors[origin.weight]).reshape(-1)
        return replace(node, gain=flat[_places(node)], span=(), origin=None)
    if node.op == "attend":
        return replace(node, gain=_array(tensors[origin.weight]).copy() if origin.weight else None, origin=None)
    if origin.variance:
        weight, bias = _batch_norm(origin, tensors, node.shape[0])
    elif node.kind == "batch_norm":
        weight, bias = _per_channel(origin, tensors, node.shape[0])
    else:
        weight = _array(tensors[origin.weight])
        weight = weight[:, :, None, :] if weight.ndim == 3 else weight
        weight = weight[:, :, None, None] if weight.ndim == 2 and node.op == "conv" else weight
        if origin.transposed:
            weight = weight.T if node.op == "linear" else _turned(weight, node.groups)
        bias = _array(tensors[origin.bias]).copy() if origin.bias else None
    if node.op == "linear" and node.kind == "batch_norm":
        return replace(node, weight=_diagonal(weight.reshape(-1)), bias=bias, origin=None)
    return replace(node, weight=Weight.of(weight), bias=bias, origin=None)


def _single(node: Node, channels: dict[str, int]) -> Node:
    """A convolution over frames that makes one frame of one is a plain one."""
    weight = node.weight
    if node.op != "conv" or weight is None or len(node.span) != weight.shape[2]:
        return node
    taps = [tap for tap, frame in enumerate(node.span) if frame >= 0]
    if len(taps) != 1 or channels[node.inputs[0]] != weight.shape[1] * node.groups:
        return node
    return replace(node, weight=Weight.of(weight.dense()[:, :, taps[0]]), span=())


def _diagonal(values: Floats) -> Weight:
    """A matrix with these numbers on its diagonal."""
    step = values.size + 1
    gaps = np.full(values.size, step)
    gaps[:1] = 0
    narrow = gaps.astype(np.uint16) if step < 1 << 16 else gaps.astype(np.uint32)
    return Weight((values.size, values.size), narrow, np.ascontiguousarray(values))


def _turned(weight: Floats, groups: int) -> Floats:
    """The weight of a transposed convolution, ``[inputs, outputs, ...]``, as that of one over spaced maps."""
    inputs, outputs, *kernel = weight.shape
    parts = weight.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    return np.ascontiguousarray(parts.reshape(groups * outputs, inputs // groups, *kernel)[..., ::-1, ::-1])


def _places(node: Node) -> npt.NDArray[np.int64]:
    """Of each number of a stored map, its place in the stored tensor."""
    channels = node.shape[0]
    first, second = (np.array(part, np.int64) for part in (node.span[:channels], node.span[channels:]))
    places: npt.NDArray[np.int64] = first[:, None] + second
    return places


def _batch_norm(origin: Origin, tensors: dict[str, Tensor], channels: int) -> tuple[Floats, Floats]:
    """Weight ``[channels, 1, 1, 1]`` and bias of ``gain (x - mean) / sqrt(variance + eps) + shift``."""
    mean, variance = (_array(tensors[name]).astype(np.float64) for name in (origin.mean, origin.variance))
    gain = _array(tensors[origin.weight]) if origin.weight else np.ones(len(mean), np.float32)
    shift = _array(tensors[origin.bias]) if origin.bias else np.zeros(len(mean), np.float32)
    scale = gain / np.sqrt(variance + origin.eps)
    bias = shift - mean * scale
    scale, bias = (np.tile(part, channels // len(part)) for part in (scale, bias))  # those of frames: of each
    return scale.astype(np.float32).reshape(-1, 1, 1, 1), bias.astype(np.float32)


def _per_channel(origin: Origin, tensors: dict[str, Tensor], channels: int) -> tuple[Floats, Floats]:
    """Weight ``[channels, 1, 1, 1]`` and bias of a multiplication with, or an addition of, stored numbers."""
    weight = _array(tensors[origin.weight]).reshape(-1) if origin.weight else np.ones(1, np.float32)
    bias = _array(tensors[origin.bias]).reshape(-1) if origin.bias else np.zeros(1, np.float32)
    scale = origin.gain * (1 / weight if origin.inverse else weight)
    parts = (scale, origin.bias_gain * bias)
    spread = [np.tile(part, channels // len(part)).astype(np.float32) for part in parts]  # of frames: to each
    return spread[0].reshape(-1, 1, 1, 1), spread[1]


def _array(tensor: Tensor) -> Floats:
    return np.asarray(tensor.detach().cpu().numpy(), np.float32)


def fold(graph: Graph) -> Graph:
    """Merge each batch norm into the convolution before it, when nothing else reads that convolution."""
    made: dict[str, Node] = {}
    for node in graph.nodes:
        before = made.get(node.inputs[0]) if node.inputs else None
        single = before is not None and before.name not in graph.outputs and len(graph.users(before.name)) == 1
        alike = node.kind == "batch_norm" and before is not None and before.op == node.op and not before.kind
        if alike and single and before is not None:
            assert node.weight is not None and node.bias is not None and before.weight is not None
            scale = (node.weight.values if node.op == "linear" else node.weight.dense()).astype(np.float64).reshape(-1)
            shift, outputs = node.bias, before.weight.shape[0]
            frames = [part.reshape(-1, outputs) for part in (scale, shift)]
            if any((part != part[:1]).any() for part in frames):
                made[node.name] = node  # each frame has numbers of its own
                continue
            scale, shift = scale[:outputs], shift[:outputs]
            weight = before.weight.dense() * scale.reshape(-1, *[1] * (len(before.weight.shape) - 1))
            bias = shift + (0 if before.bias is None else before.bias * scale)
            node = replace(
                before, name=node.name, weight=Weight.of(weight.astype(np.float32)), bias=bias.astype(np.float32)
            )
            del made[before.name]
        made[node.name] = node
    return replace(graph, nodes=list(made.values()))
