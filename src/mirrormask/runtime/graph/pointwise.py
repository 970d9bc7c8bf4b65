"""Operations on each number by itself: activations, arithmetic with numbers, stored tensors and other values."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.aten import Context, Unsupported, argument, item_shape, shape_of, source_of
from mirrormask.runtime.graph.ir import Node, Origin, narrow_shapes

__all__ = ["ACTIVATIONS", "ARITHMETIC", "KINDS", "PER_CHANNEL", "Converter", "each_channel"]

aten = torch.ops.aten

Converter = Callable[[Context, fx.Node], Node]
#: An activation's name and parameters, read from a node.
Reader = Callable[[fx.Node], tuple[str, tuple[float, ...]]]


def _act(context: Context, node: fx.Node, kind: str, *values: float) -> Node:
    source, shape = source_of(node), item_shape(context, node)
    return Node("act", node.name, [source.name], shape, layer=node.name, kind=kind, values=tuple(map(float, values)))


def _activation(read: str | Reader) -> Converter:
    def convert_activation(context: Context, node: fx.Node) -> Node:
        kind, values = (read, ()) if isinstance(read, str) else read(node)
        return _act(context, node, kind, *values)

    return convert_activation


def _gelu(node: fx.Node) -> tuple[str, tuple[float, ...]]:
    return ("gelu_tanh" if argument(node, 1, "approximate", "none") == "tanh" else "gelu"), ()


def _bounds(low: float, high: float, names: tuple[str, str] = ("min", "max")) -> Reader:
    """A clamp whose bounds are the arguments of these names, and so much without them."""

    def read(node: fx.Node) -> tuple[str, tuple[float, ...]]:
        defaults = (low, high)
        found: list[Any] = [argument(node, 1 + i, names[i], defaults[i]) for i in range(2)]
        bounds = tuple(defaults[i] if found[i] is None else float(found[i]) for i in range(2))
        return ("relu6", ()) if bounds == (0.0, 6.0) else ("clamp", bounds)

    return read


def _clamp_max(node: fx.Node) -> tuple[str, tuple[float, ...]]:
    return "clamp", (-math.inf, float(argument(node, 1, "max")))


def _elu(node: fx.Node) -> tuple[str, tuple[float, ...]]:
    return "elu", tuple(float(argument(node, i, n, 1)) for i, n in enumerate(("alpha", "scale", "input_scale"), 1))


def _celu(node: fx.Node) -> tuple[str, tuple[float, ...]]:
    alpha = float(argument(node, 1, "alpha", 1.0))
    return "elu", (alpha, 1.0, 1 / alpha)


def _softplus(node: fx.Node) -> tuple[str, tuple[float, ...]]:
    beta, threshold = float(argument(node, 1, "beta", 1)), float(argument(node, 2, "threshold", 20))
    if threshold < 15 or beta <= 0:
        raise Unsupported("it is linear from a threshold on that is not far out")
    return "softplus", (beta,)


def _square(node: fx.Node) -> tuple[str, tuple[float, ...]]:
    if argument(node, 1, "exponent", 2) != 2:
        raise Unsupported("it raises to another power than 2")
    return "square", ()


SELU = (1.6732632423543772848170429916717, 1.0507009873554804934193349852946, 1.0)
READERS: dict[str, str | Reader] = {
    "relu": "relu",
    "relu6": "relu6",
    "silu": "silu",
    "gelu": _gelu,
    "hardswish": "hardswish",
    "sigmoid": "sigmoid",
    "hardsigmoid": "hardsigmoid",
    "tanh": "tanh",
    "mish": "mish",
    "softplus": _softplus,
    "leaky_relu": lambda node: ("leaky_relu", (float(argument(node, 1, "negative_slope", 0.01)),)),
    "elu": _elu,
    "celu": _celu,
    "selu": lambda node: ("elu", SELU),
    "hardtanh": _bounds(-1, 1, ("min_val", "max_val")),
    "clamp": _bounds(-math.inf, math.inf),
    "clamp_min": _bounds(-math.inf, math.inf),
    "clamp_max": _clamp_max,
    "abs": "abs",
    "neg": lambda node: ("affine", (-1.0, 0.0)),
    "square": "square",
    "exp": "exp",
    "reciprocal": "reciprocal",
    "sqrt": "sqrt",
    "rsqrt": "rsqrt",
}


def _overloads(name: str, overload: str = "default") -> list[Any]:
    """An operation, and the one that does it in place."""
    packets = [getattr(aten, n, None) for n in (name, f"{name}_")]
    return [getattr(packet, overload) for packet in packets if packet is not None and overload in packet.overloads()]


ACTIVATIONS: dict[Any, Converter] = {
    target: _activation(read) for name, read in READERS.items() for target in _overloads(name)
}
ACTIVATIONS |= dict.fromkeys(_overloads("pow", "Tensor_Scalar"), _activation(_square))


def _arithmetic(kind: str) -> Converter:
    def convert_arithmetic(context: Context, node: fx.Node) -> Node:
        a, b = argument(node, 0, "self"), argument(node, 1, "other")
        alpha: Any = argument(node, 2, "alpha", 1)
        if not isinstance(a, fx.Node) or (alpha != 1 and not isinstance(b, (int, float))):
            raise Unsupported("it works on a number, or with a multiple")
        if isinstance(b, (int, float)):
            return _act(context, node, "affine", *_with_number(kind, float(b), float(alpha)))
        if not isinstance(b, fx.Node):
            raise Unsupported("it works with something that is not a tensor")
        if b in context.constants:
            return _with_stored(context, node, a, b, kind)
        if a in context.constants:
            return _with_stored(context, node, b, a, {"sub": "rsub", "div": "rdiv"}.get(kind, kind))
        return _with_value(context, node, a, b, kind)

    return convert_arithmetic


def _with_number(kind: str, number: float, alpha: float) -> tuple[float, float]:
    """Gain and shift."""
    if kind == "div" and number == 0:
        raise Unsupported("it divides by zero")
    found = {
        "add": (1.0, alpha * number),
        "sub": (1.0, -alpha * number),
        "rsub": (-alpha, number),
        "mul": (number, 0.0),
    }
    if kind == "div":
        return 1 / number, 0.0
    if kind not in found:
        raise Unsupported("it compares with a number")
    return found[kind]


#: How many features may have a stored number each.
MOST_FEATURES = 8192
#: Arithmetic with one stored number per channel, by the name of the stored tensor.
PER_CHANNEL: dict[str, Callable[[str], Origin]] = {
    "mul": lambda name: Origin(weight=name),
    "div": lambda name: Origin(weight=name, inverse=True),
    "add": lambda name: Origin(bias=name),
    "sub": lambda name: Origin(bias=name, bias_gain=-1.0),
    "rsub": lambda name: Origin(bias=name, gain=-1.0),
}


def each_channel(name: str, inputs: list[str], shape: tuple[int, ...], layer: str, origin: Origin) -> Node:
    """A multiplication and an addition for each channel of maps, or feature of rows: of one weight each.

    Raises:
        Unsupported: a row is so wide that the matrix with these weights on its diagonal would take gigabytes.
    """
    if len(shape) == 1:
        if shape[0] > MOST_FEATURES:
            raise Unsupported(f"it works with a stored number for each of more than {MOST_FEATURES:,} features")
        return Node("linear", name, inputs, shape, layer=layer, origin=origin, kind="batch_norm")
    return Node("conv", name, inputs, shape, layer=layer, origin=origin, groups=shape[0], kind="batch_norm")


def _with_stored(context: Context, node: fx.Node, x: fx.Node, stored: fx.Node, kind: str) -> Node:
    """With one stored number per channel, as a batch norm is."""
    name, shape = context.constant(stored)
    given = shape_of(x)
    if x in context.constants:
        raise Unsupported("it works with a stored tensor")
    aligned, channel = (1,) * (len(given) - len(shape)) + shape, len(given) - 1 if context.rows else 1
    if len(aligned) != len(given) or any(size != 1 for i, size in enumerate(aligned) if i != channel):
        raise Unsupported(f"it works with a stored tensor of shape {shape}, which is not one number per channel")
    if aligned[channel] not in (1, given[channel]):
        raise Unsupported("it adds channels")
    if kind not in PER_CHANNEL:
        raise Unsupported("it works with a stored tensor")
    made = item_shape(context, node)
    layer = context.names[stored]
    return each_channel(node.name, [x.name], made, layer, PER_CHANNEL[kind](name))


def _with_value(context: Context, node: fx.Node, a: fx.Node, b: fx.Node, kind: str) -> Node:
    shapes = shape_of(a), shape_of(b)
    made = item_shape(context, node)
    names = [a.name, b.name]
    if shapes[0] == shapes[1]:
        if kind == "add":
            return Node("add", node.name, names, made, layer=node.name)
        return Node("combine", node.name, names, made, layer=node.name, kind=kind)
    last = -1 if context.rows else 1
    if len(shapes[0]) != len(shapes[1]) or shapes[0][:last] != shapes[1][:last]:
        raise Unsupported("it combines tensors of different shapes")
    items = [item_shape(context, n) for n in (a, b)]
    narrow = [item for item in items if item != made]
    if len(narrow) != 1 or narrow[0] not in narrow_shapes(made):
        raise Unsupported("it combines tensors of different shapes, otherwise than by channel, or along an axis")
    return Node("combine", node.name, names, made, layer=node.name, kind=kind)


ARITHMETIC: dict[Any, Converter] = {
    target: _arithmetic(kind) for kind in ("add", "sub", "mul", "div") for target in _overloads(kind, "Tensor")
}
ARITHMETIC |= {
    operator.add: _arithmetic("add"),
    operator.mul: _arithmetic("mul"),
    aten.rsub.Scalar: _arithmetic("rsub"),
    aten.maximum.default: _arithmetic("max"),
    aten.minimum.default: _arithmetic("min"),
}
#: The same by name, but for those with a number alone.
KINDS: dict[Any, str] = {
    target: kind
    for kind in ("add", "sub", "mul", "div")
    for target in ARITHMETIC
    if str(target).startswith((f"aten.{kind}.", f"aten.{kind}_."))
}
