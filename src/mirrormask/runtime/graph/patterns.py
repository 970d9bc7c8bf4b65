"""Norms and activations that a model writes out in parts, as the one operation that they are."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.chains import open_shape
from mirrormask.runtime.graph.functions import response

__all__ = ["PATTERN_PARTS", "Found", "normalised", "response_norm", "rms_norm", "tanh_gelu"]

aten = torch.ops.aten

#: What takes the place of an operation: the function, its arguments, and perhaps some by name.
Found = tuple[Any, tuple[Any, ...]] | tuple[Any, tuple[Any, ...], dict[str, Any]] | None
#: Operations that are nothing without the one that they are a part of.
PATTERN_PARTS = {
    aten.mul.Tensor,
    aten.add.Tensor,
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.mean.dim,
    aten.rsqrt.default,
    aten.tanh.default,
    aten.rms_norm.default,
    aten.linalg_vector_norm.default,
    aten.div.Tensor,
}


def _is(node: Any, target: Any) -> bool:
    return isinstance(node, fx.Node) and node.target is target


def _number(value: Any, expected: float) -> bool:
    return isinstance(value, (int, float)) and math.isclose(value, expected, rel_tol=1e-6)


def _pair(node: Any, target: Any) -> tuple[Any, Any] | None:
    """The two things that an operation of this kind takes, if it is one without further ado."""
    if not _is(node, target) or len(node.args) != 2 or node.kwargs:
        return None
    return node.args[0], node.args[1]


def _with_number(node: Any, target: Any, expected: float) -> Any:
    """What is added to, or multiplied with, this number; None if nothing is."""
    pair = _pair(node, target)
    if pair is None:
        return None
    if _number(pair[1], expected):
        return pair[0]
    return pair[1] if _number(pair[0], expected) else None


def rms_norm(node: fx.Node) -> Found:
    """``x rsqrt(mean(x^2) + eps)``; and such a norm without a weight, multiplied by a stored one."""
    pair = _pair(node, aten.mul.Tensor)
    if pair is None:
        return None
    for x, other in (pair, pair[::-1]):
        if not isinstance(x, fx.Node) or not isinstance(other, fx.Node):
            continue
        if _is(x, aten.rms_norm.default) and other.op == "get_attr" and len(x.users) == 1:
            source, shape, weight, eps = x.args
            if weight is None and open_shape(other) == tuple(shape):  # type: ignore[arg-type]
                return aten.rms_norm.default, (source, shape, other, eps)
        eps = _root_mean_square(other, x)
        if eps is not None:
            return aten.rms_norm.default, (x, [open_shape(x)[-1]], None, eps)
    return None


def _root_mean_square(node: fx.Node, x: fx.Node) -> float | None:
    """The ``eps`` of ``rsqrt(mean(x^2) + eps)`` over the last dimension of this ``x``."""
    shifted = node.args[0] if _is(node, aten.rsqrt.default) else None
    pair = _pair(shifted, aten.add.Tensor)
    if pair is None or not isinstance(pair[1], (int, float)):
        return None
    mean, eps = pair
    if not _is(mean, aten.mean.dim) or len(mean.args) != 3 or mean.kwargs:
        return None
    square, dims, kept = mean.args
    last = len(open_shape(x)) - 1
    if not kept or [dim % (last + 1) for dim in dims] != [last] or not isinstance(open_shape(x)[-1], int):
        return None
    squared = _is(square, aten.square.default) or (_is(square, aten.pow.Tensor_Scalar) and square.args[1] == 2)
    return float(eps) if squared and square.args[0] is x else None


def response_norm(node: fx.Node) -> Found:
    """``x g / (mean(g) + eps)`` with the norms ``g`` of maps, their channels first or last."""
    pair = _pair(node, aten.mul.Tensor)
    for x, share in (pair, pair[::-1]) if pair else ():
        parts = _pair(share, aten.div.Tensor)
        shifted = _pair(parts[1], aten.add.Tensor) if parts else None
        if parts is None or shifted is None or not isinstance(shifted[1], (int, float)):
            continue
        norm, mean = parts[0], shifted[0]
        if not _is(norm, aten.linalg_vector_norm.default) or norm.args[0] is not x or len(open_shape(x)) != 4:
            continue
        if not _is(mean, aten.mean.dim) or mean.args[0] is not norm or norm.kwargs or mean.kwargs:
            continue
        order, dims, kept = (*norm.args[1:], *[None] * 3)[:3]
        over, kept_too = (*mean.args[1:], None)[:2]
        if order != 2 or not kept or not kept_too or len(over) != 1 or not isinstance(dims, (list, tuple)):
            continue
        for channel, places in ((1, [2, 3]), (3, [1, 2])):
            if sorted(dim % 4 for dim in dims) == places and over[0] % 4 == channel:
                return response, (x, float(shifted[1]), channel == 3)
    return None


def tanh_gelu(node: fx.Node) -> Found:
    """``0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))``."""
    pair = _pair(node, aten.mul.Tensor)
    if pair is None:
        return None
    for half, gate in (pair, pair[::-1]):
        x = _with_number(half, aten.mul.Tensor, 0.5)
        curve = _with_number(gate, aten.add.Tensor, 1.0)
        if x is None or not _is(curve, aten.tanh.default):
            continue
        inner = _pair(_with_number(curve.args[0], aten.mul.Tensor, math.sqrt(2 / math.pi)), aten.add.Tensor)
        for same, cubic in (inner, inner[::-1]) if inner else ():
            cube = _with_number(cubic, aten.mul.Tensor, 0.044715)
            if same is x and _is(cube, aten.pow.Tensor_Scalar) and cube.args[0] is x and _number(cube.args[1], 3.0):
                return aten.gelu.default, (x,), {"approximate": "tanh"}
    return None


def normalised(node: fx.Node) -> tuple[fx.Node | None, float]:
    """What is divided by the root of its squares' sum over the last dimension, or by eps if that is more; and eps."""
    pair = _pair(node, aten.div.Tensor)
    if pair is None:
        return None, 0.0
    x, norm = pair
    if isinstance(norm, fx.Node) and norm.target in (aten.expand.default, aten.expand_as.default):
        norm = norm.args[0]
    bound = _pair(norm, aten.clamp_min.default)
    if bound is None or not isinstance(bound[1], (int, float)) or bound[1] <= 0:
        return None, 0.0
    norm, eps = bound
    if not _is(norm, aten.linalg_vector_norm.default) or norm.args[0] is not x or norm.kwargs or len(norm.args) < 4:
        return None, 0.0
    order, dims, kept = norm.args[1:4]
    if order != 2 or not kept or [dim % len(open_shape(x)) for dim in dims] != [len(open_shape(x)) - 1]:
        return None, 0.0
    return x, float(eps)
