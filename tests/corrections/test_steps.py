"""Steps after the optimizer's, by hand."""

import math

import pytest
import torch

from mirrormask.corrections import Hyperbolic, Proximal
from mirrormask.progress import Clock


def after(step, theta, grad, lr):
    theta = [torch.tensor(theta, dtype=torch.float64)]
    grads = [torch.tensor(grad, dtype=torch.float64)]
    before = grads[0].clone()
    step.apply(theta, step.prepare(grads, lr), lr)
    assert torch.equal(grads[0], before)
    return theta[0].tolist()


def test_the_mirror_step_by_hand():
    found = after(Hyperbolic(a=2.0, b=0.5, clip=None), [1.0, -1.0, 0.0], [0.3, 0.3, 0.3], lr=0.1)
    assert found == pytest.approx([math.exp(-0.06 - 0.05), -math.exp(0.06 - 0.05), 0.0])


def test_the_clip_bounds_the_factor_and_leaves_the_pull_alone():
    found = after(Hyperbolic(a=200.0, b=0.5, clip=0.1), [1.0, 1.0], [1e6, -1e6], lr=0.1)
    assert found == pytest.approx([math.exp(-0.1 - 0.05), math.exp(0.1 - 0.05)])


def test_the_mirror_step_is_to_first_order_a_step_in_the_metric_of_the_absolute_value():
    a, lr, w, g = 3.0, 1e-4, -0.7, 0.4
    (found,) = after(Hyperbolic(a=a, b=0.0, clip=None), [w], [g], lr=lr)
    assert (found - w) / lr == pytest.approx(-a * abs(w) * g, rel=1e-3)


def test_the_proximal_step_minimises_its_objective():
    x, lr, alpha = torch.randn(50, dtype=torch.float64), 0.3, 0.7
    theta = [x.clone()]
    Proximal(alpha).apply(theta, [], lr)
    grid = torch.linspace(-4, 4, 8001, dtype=torch.float64)
    objective = (grid[None] - x[:, None]) ** 2 / (2 * lr) + alpha * grid[None].abs()
    assert (theta[0] - grid[objective.argmin(1)]).abs().max() < 1e-3


def test_the_proximal_step_rests_after_its_time():
    step = Proximal(1.0, until=0.5)
    assert [step.active(Clock(t, 10)) for t in (0, 4, 5, 12)] == [True, True, False, False]
