"""The implicit bias of fine-tuning: which solution is nearest to the start, and what nearest means."""

import numpy as np
import pytest
from scipy.optimize import linprog

from mirrormask import flow

RANDOM = np.random.default_rng(7)
Z = RANDOM.standard_normal((4, 9))
X0 = np.array([1.5, -1.0, 0.8, 0.0, 0.0, -0.6, 1.2, 0.0, -0.9])
Y = Z @ (X0 + 0.3 * RANDOM.standard_normal(9))
NETWORK = flow.DiagonalLinearNetwork(Z, Y)


def nearest(a, centre=X0):
    """``argmin D_{R_a}(x, centre) s.t. Zx = y``."""
    return flow.minimize_potential(Z, Y, a, np.arcsinh(centre / a))


@pytest.mark.parametrize("a", [0.05, 0.5, 5.0])
def test_the_flow_ends_at_the_solution_that_is_nearest_to_its_start(a):
    end = NETWORK.flow(x0=X0, beta=2 * a, time=400.0).x[-1]
    np.testing.assert_allclose(Z @ end, Y, atol=1e-6)
    np.testing.assert_allclose(end, nearest(a), atol=1e-5)
    own = flow.bregman_divergence(end, X0, a)
    null = np.linalg.svd(Z)[2][4:]
    for direction in [*null, *-null]:  # no other solution is nearer
        assert own < flow.bregman_divergence(end + 0.05 * direction, X0, a)


def test_a_decay_measures_from_a_start_that_it_has_shrunk():
    a0, integral = 0.5, 0.4
    curve = NETWORK.flow(x0=X0, beta=2 * a0, alpha=flow.SwitchedOff(integral / 20, until=20.0), time=800.0)
    shrunk = np.exp(-4 * integral)
    expected = nearest(a0 * shrunk, X0 * shrunk)
    np.testing.assert_allclose(curve.x[-1], expected, atol=1e-5)
    assert np.linalg.norm(expected - nearest(a0 * shrunk)) > 0.1  # which is elsewhere than without decay
    assert np.linalg.norm(expected - X0) > np.linalg.norm(nearest(a0) - X0)


def test_a_large_scale_moves_as_little_as_possible_in_L2():
    least = X0 + np.linalg.pinv(Z) @ (Y - Z @ X0)
    np.testing.assert_allclose(nearest(1e4), least, atol=1e-4)


def test_a_small_scale_charges_for_new_weights_and_twice_for_changed_signs():
    """``D / log(1/a)`` tends to ``½ (Σ |x_i| where x₀ = 0 + 2 Σ |x_i| where the sign changes)``; the rest is free."""
    x = np.array([3.0, -2.0, -0.5, 0.7, 0.0, 0.4, 0.1, -0.2, -5.0])
    weights = np.where(X0 == 0, 1.0, np.where(np.sign(x) == np.sign(X0), 0.0, 2.0))
    limit = 0.5 * weights @ np.abs(x)
    rates = [
        (flow.bregman_divergence(x, X0, a / 10) - flow.bregman_divergence(x, X0, a)) / np.log(10)
        for a in (1e-3, 1e-6, 1e-9)
    ]
    np.testing.assert_allclose(rates[-1], limit, rtol=1e-6)
    assert abs(rates[0] - limit) >= abs(rates[1] - limit)
    # The cheapest solution by that price, as a linear program over what each weight pays for on either side.
    up, down = np.where(X0 > 0, 0.0, np.where(X0 < 0, 2.0, 1.0)), np.where(X0 < 0, 0.0, np.where(X0 > 0, 2.0, 1.0))
    price = linprog(np.r_[up, down], A_eq=np.c_[Z, -Z], b_eq=Y).fun

    def paid(x):
        return up @ np.maximum(x, 0) + down @ np.maximum(-x, 0)

    assert paid(nearest(1e-12)) < price + 0.02
    assert paid(nearest(1e-12)) < paid(nearest(10.0))
