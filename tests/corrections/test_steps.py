"""Steps after the optimizer's, by hand."""

import math

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.corrections import Hyperbolic, NeuronScale, Proximal
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


# -- SparseOpt ------------------------------------------------------------------------------------------------------


def test_the_scale_of_each_neuron_by_hand():
    mask = torch.tensor(
        [[1, 1, 1, 1], [1, 0, 0, 0], [0, 0, 0, 0]]
    ).bool()  # sparsities 0, 3/4 and 1; their mean is 7/12
    (found,) = NeuronScale().gradients([torch.ones(3, 4)], [torch.ones(3, 4)], [mask])
    wanted = [math.sqrt(1 / (5 / 12)), math.sqrt(0.25 / (5 / 12)), 0.0]
    torch.testing.assert_close(found, torch.tensor(wanted).view(3, 1).expand(3, 4))


def test_neurons_that_are_alike_keep_their_gradient_and_so_do_vectors_and_what_is_dead():
    grad = torch.randn(3, 4)
    for x, mask in ((torch.ones(3, 4), None), (torch.ones(3, 4), torch.eye(4)[:3].bool()), (torch.zeros(3, 4), None)):
        assert torch.equal(NeuronScale().gradients([grad], [x], [mask])[0], grad)
    assert torch.equal(NeuronScale().gradients([grad[0]], [torch.ones(4)], [None])[0], grad[0])


def test_batch_norm_multiplies_gradients_by_what_the_scale_takes_back():
    """Rows of one input's variance each: the gradient behind the norm goes as ``1 / sqrt(1 - s_i)``."""
    torch.manual_seed(0)
    inputs, seen = 64, []
    for living in (4, 16, 64):
        x = torch.zeros(1, inputs, dtype=torch.float64)
        x[0, :living] = 1.0
        x.requires_grad_()
        out = nn.functional.batch_norm(torch.randn(4096, inputs, dtype=torch.float64) @ x.T, None, None, training=True)
        (out * torch.randn(4096, 1, dtype=torch.float64)).mean().backward()
        seen.append(float(x.grad[0, :4].square().mean().sqrt()) * math.sqrt(living / inputs))
    assert max(seen) < 2.5 * min(seen)  # where the gradients themselves are four times apart


@pytest.mark.parametrize("geometry", [mm.geometry.Euclidean(), mm.geometry.Hadamard(), mm.geometry.SoftThreshold()])
@pytest.mark.parametrize("then", [None, Hyperbolic(), Proximal(1e-3)])
def test_it_goes_with_any_geometry_and_another_step_and_leaves_the_gradients_that_were_given(geometry, then):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 4))
    method = mm.Method(geometry, mm.decay.ConstantDecay(), mm.masks.Gradual(0.7), correction=NeuronScale(then=then))
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), method, steps=40)
    for step in range(40):
        generator = torch.Generator().manual_seed(step)
        x, y = torch.randn(32, 8, generator=generator), torch.randint(0, 4, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        given = [w.grad.clone() for w in optimizer.weights.values()]
        optimizer.step()
        assert all(torch.equal(w.grad, g) for w, g in zip(optimizer.weights.values(), given, strict=True))
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == round(0.3 * 144)


def test_what_it_cannot_scale_is_refused_by_name():
    model = nn.ConvTranspose2d(4, 6, 3)
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"NeuronScale goes by outputs.*'weight', a ConvTranspose2d; leave it out"):
        mm.sparsify(model, base, mm.methods.sparseopt(0.5), steps=10)
    with pytest.raises(TypeError, match="then=3 is a int, not a Correction"):
        NeuronScale(then=3)
    with pytest.raises(ValueError, match="changes gradients itself"):
        NeuronScale(then=NeuronScale())
