"""Activations as vector code, fused into whatever kernel stores the value."""

from __future__ import annotations

from collections.abc import Callable

from mirrormask.runtime.kernels.emit import Emitter, Value

__all__ = ["ACTIVATIONS", "activate"]


def _relu(e: Emitter, x: Value) -> Value:
    return e.above(e.zero(x.type.count), x)


def _relu6(e: Emitter, x: Value) -> Value:
    return e.below(e.splat(6.0, x.type.count), _relu(e, x))


def _exp(e: Emitter, x: Value) -> Value:
    """``exp(x)`` to about 2 ulp: ``2^n exp(r)``, ``n = round(x / ln 2)``, with a polynomial of degree 7 for ``exp(r)``.

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
    series = e.fma(series, e.fmul(rest, rest), e.fadd(rest, e.splat(1.0, n)))
    return e.scaled(series, power)


def _sigmoid(e: Emitter, x: Value) -> Value:
    n = x.type.count
    return e.fdiv(e.splat(1.0, n), e.fadd(e.splat(1.0, n), _exp(e, e.fmul(x, e.splat(-1.0, n)))))


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
    tail = e.fmul(e.fmul(series, t), _exp(e, e.fmul(e.fmul(z, z), e.splat(-1.0, n))))
    # Past z = 13 the tail is below 1e-37: dropping it there keeps infinity from meeting zero.
    size = e.below(e.splat(20.0, n), size)
    return e.fma(e.fmul(size, tail), e.splat(-0.5, n), _relu(e, x))


def _hardswish(e: Emitter, x: Value) -> Value:
    n = x.type.count
    gate = e.below(e.splat(6.0, n), _relu(e, e.fadd(x, e.splat(3.0, n))))
    return e.fmul(e.fmul(x, gate), e.splat(1.0 / 6.0, n))


#: Each maps zero to zero, which padding relies on: zero lanes stay zero.
ACTIVATIONS: dict[str, Callable[[Emitter, Value], Value]] = {
    "relu": _relu,
    "relu6": _relu6,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "hardswish": _hardswish,
}


def activate(e: Emitter, name: str, value: Value) -> Value:
    """Apply the activation called ``name``; ``""`` is none. What it is applied to is watched."""
    e.watch(value)
    if name in ("", "relu", "relu6"):
        return ACTIVATIONS[name](e, value) if name else value
    # The others raise to powers, which half precision cannot hold.
    with e.floats():
        result = ACTIVATIONS[name](e, e.converted(value))
    return e.converted(result)
