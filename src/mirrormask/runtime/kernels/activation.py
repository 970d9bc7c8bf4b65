"""Activations as vector code, fused into whatever kernel stores the value."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from llvmlite import ir

from mirrormask.runtime.kernels.emit import I32, Emitter, Value

__all__ = ["ACTIVATIONS", "Activation", "Chain", "activate", "exponential", "logarithm", "moves_zero"]


@dataclass(frozen=True)
class Activation:
    """A function of one number: its name, and its parameters (a slope, bounds) in the order of its function here."""

    kind: str
    values: tuple[float, ...] = ()


#: Applied one after the other; empty for none.
Chain = tuple[Activation, ...]


def _relu(e: Emitter, x: Value) -> Value:
    return e.above(e.zero(x.type.count), x)


def _relu6(e: Emitter, x: Value) -> Value:
    return e.below(e.splat(6.0, x.type.count), _relu(e, x))


def _exp_parts(e: Emitter, x: Value) -> tuple[Value, Value]:
    """``exp(r) - 1`` and ``n`` with ``x = n ln 2 + r``: a polynomial of degree 7.

    The reduction in two parts and the coefficients are those of Cephes' ``expf``. NaN stays NaN.
    """
    n = x.type.count
    x = e.below(e.splat(88.0, n), e.above(e.splat(-87.0, n), x))
    power = e.rounded(e.fmul(x, e.splat(1.44269504088896341, n)))
    rest = e.fma(power, e.splat(-0.693359375, n), x)
    rest = e.fma(power, e.splat(2.12194440e-4, n), rest)
    series = e.splat(1.9875691500e-4, n)
    for coefficient in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        series = e.fma(series, rest, e.splat(coefficient, n))
    return e.fma(series, e.fmul(rest, rest), rest), power


def exponential(e: Emitter, x: Value) -> Value:
    """``exp(x)`` to about 2 ulp."""
    series, power = _exp_parts(e, x)
    return e.scaled(e.fadd(series, e.splat(1.0, x.type.count)), power)


def _expm1(e: Emitter, x: Value) -> Value:
    """``exp(x) - 1``, as exact for small numbers: ``2^n (exp(r) - 1) + (2^n - 1)``."""
    series, power = _exp_parts(e, x)
    one = e.splat(1.0, x.type.count)
    return e.fadd(e.scaled(series, power), e.b.fsub(e.scaled(one, power), one))


def _log1p(e: Emitter, x: Value) -> Value:
    """``log(1 + x)`` for ``x`` in [0, 1]: ``2 artanh(s)`` with ``s = x / (2 + x)``, at most 1/3."""
    n = x.type.count
    s = e.fdiv(x, e.fadd(x, e.splat(2.0, n)))
    square, series = e.fmul(s, s), e.splat(1 / 15, n)
    for divisor in (13, 11, 9, 7, 5, 3):
        series = e.fma(series, square, e.splat(1 / divisor, n))
    return e.fmul(e.splat(2.0, n), e.fma(e.fmul(series, square), s, s))


def logarithm(e: Emitter, x: Value) -> Value:
    """``log(x)`` of a normal number of at least 1, or of NaN.

    A guess from the exponent, off by less than 0.06, and two steps ``y + 2 (x - exp(y)) / (x + exp(y))``, of which each
    leaves a twelfth of the error's cube.
    """
    n = x.type.count
    kind = ir.VectorType(I32, n)
    bits = e.b.sitofp(e.b.bitcast(x, kind), x.type)
    y = e.fma(bits, e.splat(0.6931471805599453 / (1 << 23), n), e.splat(-126.957 * 0.6931471805599453, n))
    for _ in range(2):
        power = exponential(e, y)
        y = e.fma(e.fdiv(e.b.fsub(x, power), e.fadd(x, power)), e.splat(2.0, n), y)
    return y


def _sigmoid(e: Emitter, x: Value) -> Value:
    n = x.type.count
    return e.fdiv(e.splat(1.0, n), e.fadd(e.splat(1.0, n), exponential(e, e.fmul(x, e.splat(-1.0, n)))))


def _silu(e: Emitter, x: Value) -> Value:
    return e.fmul(x, _sigmoid(e, x))


def _gelu_tanh(e: Emitter, x: Value) -> Value:
    """``x sigmoid(2u)`` with ``u = sqrt(2/pi) (x + 0.044715 x^3)``: equal to ``x (1 + tanh u) / 2``."""
    n = x.type.count
    cube = e.fmul(e.fmul(x, x), x)
    inner = e.fmul(e.fma(cube, e.splat(0.044715, n), x), e.splat(2 * 0.7978845608028654, n))
    return e.fmul(x, _sigmoid(e, inner))


def _gelu(e: Emitter, x: Value) -> Value:
    """``x Phi(x)``, with ``erf`` from Abramowitz and Stegun 7.1.26 (absolute error below 1.5e-7).

    For ``z = |x| / sqrt 2``, ``erfc(z) = t P(t) exp(-z^2)`` with ``t = 1 / (1 + 0.3275911 z)``, and
    ``gelu(x) = max(x, 0) - |x| erfc(z) / 2``.
    """
    n = x.type.count
    size = e.absolute(x)
    z = e.fmul(size, e.splat(0.7071067811865476, n))
    t = e.fdiv(e.splat(1.0, n), e.fma(z, e.splat(0.3275911, n), e.splat(1.0, n)))
    series = e.splat(1.061405429, n)
    for coefficient in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        series = e.fma(series, t, e.splat(coefficient, n))
    tail = e.fmul(e.fmul(series, t), exponential(e, e.fmul(e.fmul(z, z), e.splat(-1.0, n))))
    # Past z = 13 the tail is below 1e-37: dropping it there keeps infinity from meeting zero.
    size = e.below(e.splat(20.0, n), size)
    return e.fma(e.fmul(size, tail), e.splat(-0.5, n), _relu(e, x))


def _hardswish(e: Emitter, x: Value) -> Value:
    n = x.type.count
    gate = e.below(e.splat(6.0, n), _relu(e, e.fadd(x, e.splat(3.0, n))))
    return e.fmul(e.fmul(x, gate), e.splat(1.0 / 6.0, n))


def _hardsigmoid(e: Emitter, x: Value) -> Value:
    n = x.type.count
    return e.fmul(_clamp(e, e.fadd(x, e.splat(3.0, n)), 0.0, 6.0), e.splat(1.0 / 6.0, n))


def _tanh(e: Emitter, x: Value) -> Value:
    """Cephes' ``tanhf``: an odd polynomial near zero, ``1 - 2 / (exp(2 |x|) + 1)`` with the sign of ``x`` elsewhere."""
    n = x.type.count
    size, square = e.absolute(x), e.fmul(x, x)
    series = e.splat(-5.70498872745e-3, n)
    for coefficient in (2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1):
        series = e.fma(series, square, e.splat(coefficient, n))
    near = e.fma(e.fmul(series, square), x, x)
    steep = e.fadd(exponential(e, e.fmul(size, e.splat(2.0, n))), e.splat(1.0, n))
    far = e.b.fsub(e.splat(1.0, n), e.fdiv(e.splat(2.0, n), steep))
    far = e.b.select(e.b.fcmp_ordered("<", x, e.zero(n)), e.fmul(far, e.splat(-1.0, n)), far)
    return e.b.select(e.b.fcmp_ordered("<", size, e.splat(0.625, n)), near, far)


def _clamp(e: Emitter, x: Value, low: float, high: float) -> Value:
    n = x.type.count
    x = x if low == -math.inf else e.above(e.splat(low, n), x)
    return x if high == math.inf else e.below(e.splat(high, n), x)


def _leaky_relu(e: Emitter, x: Value, slope: float) -> Value:
    n = x.type.count
    return e.b.select(e.b.fcmp_ordered(">", x, e.zero(n)), x, e.fmul(x, e.splat(slope, n)))


def _elu(e: Emitter, x: Value, alpha: float, scale: float, inner: float) -> Value:
    """``scale max(x, 0) + scale alpha (exp(inner min(x, 0)) - 1)``: also CELU and SELU."""
    n = x.type.count
    below = e.fmul(_expm1(e, e.fmul(x, e.splat(inner, n))), e.splat(alpha * scale, n))
    return e.b.select(e.b.fcmp_ordered(">", x, e.zero(n)), e.fmul(x, e.splat(scale, n)), below)


def _softplus(e: Emitter, x: Value, beta: float) -> Value:
    """``log(1 + exp(beta x)) / beta = max(x, 0) + log(1 + exp(-|beta x|)) / beta``."""
    n = x.type.count
    tail = _log1p(e, exponential(e, e.fmul(e.absolute(x), e.splat(-abs(beta), n))))
    return e.fma(tail, e.splat(1.0 / beta, n), _relu(e, x))


def _mish(e: Emitter, x: Value) -> Value:
    """``x tanh(softplus(x)) = x w / (w + 2)`` with ``w = exp(x) (exp(x) + 2)``; the factor is 1 from 20 on."""
    n, two = x.type.count, e.splat(2.0, x.type.count)
    power = exponential(e, e.below(e.splat(20.0, n), x))
    w = e.fmul(power, e.fadd(power, two))
    return e.fmul(x, e.fdiv(w, e.fadd(w, two)))


def _affine(e: Emitter, x: Value, gain: float, shift: float) -> Value:
    n = x.type.count
    return e.fma(x, e.splat(gain, n), e.splat(shift, n))


ACTIVATIONS: dict[str, Callable[..., Value]] = {
    "relu": _relu,
    "relu6": _relu6,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardswish": _hardswish,
    "sigmoid": _sigmoid,
    "hardsigmoid": _hardsigmoid,
    "tanh": _tanh,
    "clamp": _clamp,
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "softplus": _softplus,
    "mish": _mish,
    "affine": _affine,
    "abs": lambda e, x: e.absolute(x),
    "square": lambda e, x: e.fmul(x, x),
    "exp": exponential,
    "reciprocal": lambda e, x: e.fdiv(e.splat(1.0, x.type.count), x),
    "sqrt": lambda e, x: e.root(x),
    "rsqrt": lambda e, x: e.fdiv(e.splat(1.0, x.type.count), e.root(x)),
}
#: What half precision holds as well as it holds the argument.
EXACT = ("relu", "relu6", "clamp", "abs")


def moves_zero(chain: Chain) -> bool:
    """Whether some function makes anything else of zero: what lies around maps must then be cleared afterwards."""
    moving: dict[str, Callable[..., Any]] = {
        "sigmoid": lambda: True,
        "hardsigmoid": lambda: True,
        "softplus": lambda beta: True,
        "exp": lambda: True,
        "reciprocal": lambda: True,
        "rsqrt": lambda: True,
        "clamp": lambda low, high: not low <= 0 <= high,
        "affine": lambda gain, shift: shift != 0,
    }
    return any(step.kind in moving and moving[step.kind](*step.values) for step in chain)


def activate(e: Emitter, chain: Chain, value: Value) -> Value:
    """Apply the functions of ``chain``. What the first is applied to is watched."""
    e.watch(value)
    for step in chain:
        function = ACTIVATIONS[step.kind]
        if step.kind in EXACT:
            value = function(e, value, *step.values)
            continue
        # The others raise to powers, or add, which half precision cannot hold.
        with e.floats():
            value = function(e, e.converted(value), *step.values)
        value = e.converted(value)
    return value
