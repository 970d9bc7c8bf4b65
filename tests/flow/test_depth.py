"""More than two factors: the mirror map is that of the flow in the factors, and decay discounts later gradients."""

import numpy as np
import pytest

from mirrormask.flow.depth import depth_experiment, depth_flow, depth_map, depth_penalty, last_factor
from mirrormask.geometry.hypentropy import mirror_map, penalty

Z = np.array([[1.0, -2.0, 0.5, 0.3], [0.2, 0.4, -1.0, 0.7]])
Y = np.array([1.0, -0.5])


def gradient(x):
    return Z.T @ (Z @ x - Y) / 2


def test_two_factors_are_the_hypentropy():
    x = np.linspace(-3, 3, 25)
    np.testing.assert_allclose(depth_map(x, 0.4, 2), mirror_map(x, 0.2), rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(depth_penalty(x, 0.4, 2), penalty(x, 0.2), rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_potential_is_the_integral_of_the_map_and_the_map_that_of_the_inverse_speed(depth):
    x, step = np.array([-2.0, -0.3, 1e-3, 0.1, 5.0]), 1e-6
    slope = (depth_penalty(x + step, 0.3, depth) - depth_penalty(x - step, 0.3, depth)) / (2 * step)
    np.testing.assert_allclose(slope, depth_map(x, 0.3, depth), rtol=1e-6, atol=1e-9)
    w = last_factor(x, 0.3, depth)
    m2 = 0.3 + w * w
    speed = m2 ** (depth - 1) + (depth - 1) * m2 ** (depth - 2) * w * w  # the sum of squared products of the others
    curve = (depth_map(x + step, 0.3, depth) - depth_map(x - step, 0.3, depth)) / (2 * step)
    np.testing.assert_allclose(curve, 1 / speed, rtol=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 0.05])
@pytest.mark.parametrize("depth", [2, 3, 4])
def test_the_flow_in_the_factors_is_the_mirror_flow_with_discounted_gradients(depth, alpha):
    """``x_t = exp(-2 D A) y``, ``∇R(y) = ∇R(x₀) - ∫ exp(-2 (D-2) A) ∇f``: two factors alone have no discount."""
    x0, beta, time = np.array([0.1, -0.2, 0.0, 0.05]), 0.5, 3.0
    x, z = depth_flow(gradient, x0, beta=beta, depth=depth, alpha=alpha, time=time)
    grown = np.exp(2 * depth * alpha * time) * x
    np.testing.assert_allclose(depth_map(grown, beta, depth), depth_map(x0, beta, depth) + z, rtol=1e-7, atol=1e-9)
    assert np.abs(x - x0).max() > 0.05


@pytest.mark.parametrize(("depth", "bound"), [(3, np.pi / 2), (4, 1.0)])
def test_the_map_of_more_factors_is_bounded(depth, bound):
    assert float(depth_map(1e15, 1.0, depth)) == pytest.approx(bound, rel=1e-4)
    assert float(depth_map(1e15, 1.0, 2)) > 15


@pytest.mark.parametrize(("depth", "beta"), [(3, 1e-4), (4, 1e-3)])
def test_far_beyond_the_scale_the_penalty_is_l1_less_a_power(depth, beta):
    x = np.array([1.0, 10.0])
    top = {3: np.pi / 2 / beta**0.5, 4: 1 / beta}[depth]
    found = top * x - depth_penalty(x, beta, depth)
    np.testing.assert_allclose(found, depth / (2 * (depth - 2)) * x ** (2 / depth), rtol=0.01)


def test_the_figure_orders_the_depths():
    rows = {(row[1], row[2]): row[3] for row in depth_experiment().rows if row[0] == "exponent"}
    ends = [min((abs(x - 1), value) for (depth, x), value in rows.items() if depth == d)[1] for d in (2, 3, 4)]
    assert ends[0] > ends[1] > ends[2] > 1


@pytest.mark.parametrize("call", [lambda: last_factor(1.0, 0.0, 3), lambda: last_factor(1.0, 1.0, 5)])
def test_what_has_no_map_is_refused(call):
    with pytest.raises(ValueError, match=r"beta|closed form"):
        call()
