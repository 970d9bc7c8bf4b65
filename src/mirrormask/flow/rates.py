"""Rates: how far the optimizer that trains networks is from the flow, against its step size."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from mirrormask.checks import check_number
from mirrormask.decay import ShrinkDecay
from mirrormask.flow.decays import SwitchedOff
from mirrormask.flow.figures import COLOURS, Experiment, canvas, legend
from mirrormask.flow.linear import DiagonalLinearNetwork, sparse_regression
from mirrormask.geometry import Hadamard
from mirrormask.geometry.hypentropy import Array, initial_offset, mirror_map, scale
from mirrormask.masks import Never
from mirrormask.methods import Method
from mirrormask.optimizer import sparsify

__all__ = ["Descent", "descend", "rates_experiment", "slope"]

TIME, BETA = 8.0, 1.0
STEP_SIZES = (0.02, 0.01, 0.005, 0.0025, 0.00125)
#: The total shrink 4 A_T, spread over the first half of the run -> how it is drawn.
SHRINKS = {0.0: (COLOURS["black"], "o"), 4.0: (COLOURS["blue"], "s"), 12.0: (COLOURS["orange"], "^")}


@dataclass(frozen=True, eq=False)
class Descent:
    """A run of the optimizer on a diagonal linear network, seen at ``k`` equidistant times.

    ``times`` and ``A`` have shape ``(k,)``; ``x`` and ``impulse``, the sum ``Σ η ∇f`` so far, ``(k, d)``.
    """

    times: Array
    x: Array
    A: Array
    impulse: Array

    def identity_error(self, beta: float, x0: npt.ArrayLike) -> float:
        """The largest entry of ``| ∇R_{a_t}(x_t) + Σ η ∇f |`` over all times, with ``a_t = ½ β exp(-4 A_t)``."""
        mirror = mirror_map(self.x, scale(beta, self.A)[:, None], initial_offset(x0, beta))
        return float(np.abs(mirror + self.impulse).max())


def descend(
    network: DiagonalLinearNetwork,
    x0: npt.ArrayLike,
    *,
    beta: float,
    step_size: float,
    time: float,
    shrink: float = 0.0,
    points: int = 21,
) -> Descent:
    """Full-batch SGD without momentum through :func:`mirrormask.sparsify`, in float64, from ``x0`` to ``time``.

    Args:
        network: the loss.
        x0: the initial weight, shape ``(d,)``.
        beta: of the Hadamard geometry; its learning-rate scale is off, so ``η`` is the step of the factors.
        step_size: ``η``, positive; the run has ``time / η`` steps.
        time: the end, in the flow's units.
        shrink: ``4 A_T``, spread over the first half of the run.
        points: how many times are recorded, ends included, at most one a step.

    Raises:
        ValueError: a number is outside its range, or ``time / step_size`` is not a multiple of ``points - 1``.

    Example:
        >>> network = DiagonalLinearNetwork([[1.0, 2.0]], [2.0])
        >>> descend(network, [0.0, 0.0], beta=1.0, step_size=0.05, time=20.0).x[-1].round(2).tolist()
        [0.35, 0.82]
    """
    check_number("step_size", step_size, low=0.0, open_low=True)
    steps = round(check_number("time", time, low=0.0, open_low=True) / step_size)
    if steps < 1 or steps % (points - 1):
        raise ValueError(f"time / step_size = {time / step_size:g} is not a positive multiple of {points - 1}")
    Z, y = torch.from_numpy(network.Z), torch.from_numpy(network.y)
    model = torch.nn.Linear(Z.shape[1], 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.as_tensor(np.asarray(x0, dtype=np.float64)))
    base = torch.optim.SGD(model.parameters(), lr=step_size)
    method = Method(Hadamard(beta=beta, gain=None), ShrinkDecay(shrink, 0.0, 0.5), Never())
    optimizer = sparsify(model, base, method, steps=steps)
    impulse = torch.zeros(Z.shape[1], dtype=torch.float64)
    record: list[tuple[float, Array, float, Array]] = []
    for step in range(steps + 1):
        if step % (steps // (points - 1)) == 0:
            x = model.weight.detach()[0].numpy().copy()
            record.append((step * step_size, x, optimizer.parts.training.decay.integrals[0], impulse.numpy().copy()))
        if step < steps:
            optimizer.zero_grad()
            loss = 0.5 * (model(Z)[:, 0] - y).square().mean()
            loss.backward()
            assert model.weight.grad is not None
            impulse += step_size * model.weight.grad[0]
            optimizer.step()
    times, xs, integrals, impulses = zip(*record, strict=True)
    return Descent(np.array(times), np.array(xs), np.array(integrals), np.array(impulses))


def slope(step_sizes: npt.ArrayLike, errors: npt.ArrayLike) -> float:
    """The order of an error in the step size: the slope of ``log error`` on ``log η`` by least squares.

    Example:
        >>> round(slope([0.1, 0.2, 0.4], [0.3, 1.2, 4.8]), 6)
        2.0
    """
    return float(np.polyfit(np.log(np.asarray(step_sizes)), np.log(np.asarray(errors)), 1)[0])


def rates_experiment() -> Experiment:
    """The optimizer against the flow on one problem, for five step sizes and three amounts of decay.

    Returns:
        The figure, distance from the flow and error of the mirror identity against the step size, and one CSV row
        an amount and step size.
    """
    network, _ = sparse_regression(seed=0)
    x0 = np.random.default_rng(0).normal(0.0, 0.3, network.Z.shape[1])
    figure, (distances, identities) = canvas(
        "The optimizer that trains networks follows the flow: first order in the step size",
        ["Distance from the flow", "Error of the mirror identity"],
        width=5.0,
    )
    rows: list[tuple[object, ...]] = []
    orders: list[float] = []
    for shrink, (colour, mark) in SHRINKS.items():
        alpha = SwitchedOff(shrink / 4 / (TIME / 2), until=TIME / 2) if shrink else 0.0
        flow = network.flow(beta=BETA, alpha=alpha, time=TIME, x0=x0, points=21)
        label = f"$4A_T = {shrink:g}$" if shrink else "no decay"
        errors = []
        for step_size in STEP_SIZES:
            run = descend(network, x0, beta=BETA, step_size=step_size, time=TIME, shrink=shrink)
            distance = float(np.linalg.norm(run.x - flow.x, axis=1).max())
            errors.append((distance, run.identity_error(BETA, x0)))
            rows.append((shrink, step_size, *errors[-1]))
        for axis, values in zip((distances, identities), np.array(errors).T, strict=True):
            orders.append(slope(STEP_SIZES, values))
            axis.plot(
                STEP_SIZES,
                values,
                color=colour,
                marker=mark,
                ms=6,
                mfc="none",
                label=f"{label}: order {orders[-1]:.2f}",
            )
    for axis in (distances, identities):
        low, high = STEP_SIZES[-1], STEP_SIZES[0]
        start = axis.get_ylim()[0]
        axis.plot([low, high], [start, start * high / low], color=COLOURS["grey"], ls=":", label="order 1")
        axis.set(xscale="log", yscale="log", xlabel="step size $\\eta$")
        axis.set_xticks(STEP_SIZES, [f"{eta:g}" for eta in STEP_SIZES])
        axis.tick_params(axis="x", which="minor", bottom=False)
        axis.xaxis.minorticks_off()
        legend(axis, "upper left")
    distances.set_ylabel("$\\max_t \\|x^{SGD}_t - x^{flow}_t\\|_2$")
    identities.set_ylabel("$\\max_t \\|\\nabla R_{a_t}(x_t) + \\sum \\eta\\nabla f\\|_\\infty$")
    return Experiment(
        "rates",
        figure,
        ("shrink", "step_size", "distance_from_flow", "mirror_identity_error"),
        rows,
        f"From step size {STEP_SIZES[0]:g} to {STEP_SIZES[-1]:g} the optimizer's distance from the flow and the error "
        f"of the mirror identity fall with orders between {min(orders):.2f} and {max(orders):.2f}, with and without "
        f"decay.",
    )
