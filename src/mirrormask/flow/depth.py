"""Depth: the mirror flow of D factors, whose potential is the entropy for two and a power of |x| for more.

``x = mᴰ⁻¹ w`` with ``m² - w² = β``: D - 1 factors start alike, and stay so. Then

    ∇R(x) = ∫₀ʷ (β + s²)^(-(D-1)/2) ds,      R(x) = x ∇R(x) - w² / 2

in closed form for D = 2 (an arcsinh), 3 (an arctangent) and 4 (algebraic).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from mirrormask.checks import check_int, check_number, require
from mirrormask.flow.figures import COLOURS, Experiment, canvas, legend
from mirrormask.geometry.hypentropy import Array

__all__ = ["depth_experiment", "depth_flow", "depth_map", "depth_penalty", "last_factor"]

DEPTHS = (2, 3, 4)
#: The scale at which all depths are compared: below it the penalty is a parabola.
SCALE = 1e-2


def _checked(beta: float, depth: int) -> tuple[float, int]:
    if check_int("depth", depth, low=2) > max(DEPTHS):
        raise ValueError(f"depth={depth!r} has no closed form here; take 2, 3 or 4")
    return check_number("beta", beta, low=0.0, open_low=True), depth


def last_factor(x: npt.ArrayLike, beta: float, depth: int) -> Array:
    """The ``w`` with ``(β + w²)^((D-1)/2) w = x``: the factor that has the sign.

    Args:
        x: any shape.
        beta: ``m² - w²``, in (0, inf).
        depth: D, 2 to 4.

    Example:
        >>> w = last_factor([0.0, 2.0, -2.0], beta=1.0, depth=3)
        >>> ((1.0 + w**2) * w).round(9).tolist()
        [0.0, 2.0, -2.0]
    """
    beta, depth = _checked(beta, depth)
    size = np.abs(np.asarray(x, dtype=np.float64))
    # log x is increasing in log w, with a slope from 1 to D: Newton's method from above converges.
    w = np.minimum(size / beta ** ((depth - 1) / 2), size ** (1 / depth)) + 1e-300
    for _ in range(60):
        m2 = beta + w * w
        wrong = np.log(np.maximum(m2 ** ((depth - 1) / 2) * w, 1e-300)) - np.log(np.maximum(size, 1e-300))
        w = w * np.exp(-wrong / (1 + (depth - 1) * w * w / m2))
    return np.asarray(np.where(size > 0, w, 0.0) * np.sign(x))


def depth_map(x: npt.ArrayLike, beta: float, depth: int) -> Array:
    """The mirror map ``∇R(x)``, 0 at x = 0; for D > 2 it is bounded.

    Args:
        x, beta, depth: as in :func:`last_factor`.

    Example:
        >>> [float(depth_map(1e12, 1.0, depth).round(3)) for depth in (3, 4)]  # π/2 and 1
        [1.571, 1.0]
    """
    beta, depth = _checked(beta, depth)
    w, root = last_factor(x, beta, depth), np.sqrt(beta)
    if depth == 2:
        return np.asarray(np.arcsinh(w / root))
    if depth == 3:
        return np.asarray(np.arctan(w / root) / root)
    return np.asarray(w / (beta * np.sqrt(beta + w * w)))


def depth_penalty(x: npt.ArrayLike, beta: float, depth: int) -> Array:
    """The potential ``R(x) = x ∇R(x) - w²/2``, 0 at x = 0.

    For ``|x| ≪ β^(D/2)`` it is ``x² / (2 βᴰ⁻¹)``; beyond it is ``C |x|``, less a power for D > 2,
    ``D / (2 (D - 2)) |x|^(2/D)``, and times a logarithm for D = 2.

    Args:
        x, beta, depth: as in :func:`last_factor`.

    Example:
        >>> float(depth_penalty(1e-3, 1.0, 3).round(12))
        5e-07
    """
    return np.asarray(np.asarray(x) * depth_map(x, beta, depth) - last_factor(x, beta, depth) ** 2 / 2)


def depth_flow(
    gradient: Callable[[Array], Array], x0: npt.ArrayLike, *, beta: float, depth: int, alpha: float, time: float
) -> tuple[Array, Array]:
    """Gradient flow of ``f(Π ω) + α Σ ‖ω_d‖²`` in the factors, and what it adds up of the gradient.

    Returns:
        ``x`` at ``time``, and ``z = -∫ exp(-2 (D - 2) A_t) ∇f(x_t) dt``, both of x0's shape.
    """
    beta, depth = _checked(beta, depth)
    start = np.asarray(x0, dtype=np.float64)
    w = last_factor(start, beta, depth)
    m = np.sqrt(beta + w * w)

    def slope(t: float, state: Array) -> Array:
        m, w, _ = state.reshape(3, -1)
        g = gradient(m ** (depth - 1) * w)
        return np.concatenate([
            -g * m ** (depth - 2) * w - 2 * alpha * m,
            -g * m ** (depth - 1) - 2 * alpha * w,
            -np.exp(-2 * (depth - 2) * alpha * t) * g,
        ])  # fmt: skip

    solve = require("scipy.integrate", "flow", "a flow").solve_ivp
    first = np.concatenate([m, w, np.zeros_like(start)])
    end = solve(slope, (0.0, time), first, rtol=1e-10, atol=1e-13, method="DOP853").y[:, -1]
    m, w, z = end.reshape(3, -1)
    return m ** (depth - 1) * w, z


def depth_experiment() -> Experiment:
    """Penalty, its exponent, and the speed near zero, for two, three and four factors of one scale.

    Returns:
        The figure and one CSV row a point of each curve.
    """
    figure, (shapes, exponents, speeds) = canvas(
        f"More factors: nearer to L1 at the same scale, $\\beta^{{D/2}} = {SCALE:g}$",
        ["Penalty, scaled to 1 at $x = 1$", "Effective exponent", "Speed of a weight, $dx = -g(x)\\,\\nabla f\\,dt$"],
    )
    rows: list[tuple[object, ...]] = []
    near, x = np.linspace(-0.06, 0.06, 121), np.logspace(-5, 3, 161)
    ends = {}
    for depth, colour in zip(DEPTHS, (COLOURS["black"], COLOURS["blue"], COLOURS["orange"]), strict=True):
        beta = SCALE ** (2 / depth)
        shape = depth_penalty(near, beta, depth) / depth_penalty(1.0, beta, depth)
        exponent = x * depth_map(x, beta, depth) / depth_penalty(x, beta, depth)
        w = last_factor(x, beta, depth)
        m2 = beta + w * w
        speed = m2 ** (depth - 1) + (depth - 1) * m2 ** (depth - 2) * w * w
        shapes.plot(near, shape, color=colour, label=f"D = {depth}")
        exponents.plot(x, exponent, color=colour, label=f"D = {depth}")
        speeds.plot(x, speed, color=colour, label=f"D = {depth}")
        rows += [("penalty", depth, float(at), float(value)) for at, value in zip(near, shape, strict=True)]
        rows += [("exponent", depth, float(at), float(value)) for at, value in zip(x, exponent, strict=True)]
        rows += [("speed", depth, float(at), float(value)) for at, value in zip(x, speed, strict=True)]
        ends[depth] = float(exponent[np.searchsorted(x, 1.0)])
    shapes.plot(near, np.abs(near), color=COLOURS["red"], ls="--", lw=1.0, label="$|x|$ (L1)")
    shapes.set(xlabel="weight $x$")
    exponents.axhline(1.0, color=COLOURS["grey"], lw=0.8)
    exponents.set(xlabel="$|x|$", xscale="log", ylabel="$d\\,\\log R / d\\,\\log |x|$")
    speeds.set(xlabel="$|x|$", xscale="log", yscale="log")
    for axis in (shapes, exponents, speeds):
        legend(axis, "best")
    return Experiment(
        "depth",
        figure,
        ("part", "depth", "x", "value"),
        rows,
        "At x = 1, a hundred times the scale, the penalty's exponent is "
        + ", ".join(f"{ends[depth]:.3f} for D = {depth}" for depth in DEPTHS)
        + ": with more factors than two L1 is reached by a power of the scale instead of its logarithm.",
    )
