"""Mirror descent: the closed form of the flow, the factors' flow in the limit, and what masks and decay do to it."""

import math

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.decay import ConstantDecay
from mirrormask.flow import mirror_map
from mirrormask.geometry import Hadamard, MirrorDescent, factorize
from mirrormask.masks import Never


def layer(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Linear(30, 20, bias=False).to(dtype)


def descend(geometry, lr, time, alpha=0.0, momentum=0.0):
    """Train on a quadratic with steps of size lr; the weight, the optimizer and the sum of lr times the gradient."""
    model = layer()
    target = torch.randn(20, 30, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 0.3
    steps = round(time / lr)
    base = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    optimizer = mm.sparsify(model, base, mm.Method(geometry, ConstantDecay(alpha), Never()), steps=steps)
    total = torch.zeros_like(target)
    for _ in range(steps):
        model.weight.grad = model.weight.detach() - target
        total += lr * model.weight.grad
        optimizer.step()
    return model.weight.detach(), optimizer, total


@pytest.mark.parametrize("lr", [0.01, 0.3])
def test_the_mirror_identity_is_exact_at_any_step_size(lr):
    # grad R_a(x_t) - grad R_a0(x_0) = - integral of the gradient, a_t = a_0 exp(-4 A) up to the decay's own steps
    start = layer().weight.detach()
    x, optimizer, total = descend(MirrorDescent(beta=0.4, gain=None, clip=None), lr, 3.0, alpha=0.05)
    a = float(optimizer.state[optimizer.weights["weight"]]["a"])
    steps = round(3.0 / lr)
    assert a == pytest.approx(0.2 * (1 - 2 * lr * 0.05) ** (2 * steps), rel=1e-12)
    assert a == pytest.approx(0.2 * math.exp(-4 * 0.05 * 3.0), rel=0.05 * lr + 1e-3)
    moved = mirror_map(x.numpy(), a) - mirror_map(start.numpy(), 0.2)
    assert abs(moved + total.numpy()).max() < 1e-12


def test_small_steps_follow_the_factors_and_the_gap_falls_linearly():
    gaps = []
    for lr in (0.02, 0.01, 0.005):
        ours, _, _ = descend(MirrorDescent(beta=0.4, gain=None, clip=None), lr, 1.0, alpha=0.2)
        theirs, _, _ = descend(Hadamard(beta=0.4, gain=None), lr, 1.0, alpha=0.2)
        gaps.append(float((ours - theirs).abs().max()))
    assert gaps[0] < 5e-3
    assert gaps[0] / gaps[1] == pytest.approx(2.0, rel=0.1)
    assert gaps[1] / gaps[2] == pytest.approx(2.0, rel=0.1)


def test_the_decay_moves_x_as_it_moves_the_product_of_the_factors():
    x = torch.randn(7, dtype=torch.float64)
    geometry = MirrorDescent(beta=0.5)
    latents = {name: [value] for name, value in geometry.init(x).items()}
    geometry.shrink(latents, 0.9)
    found = torch.empty_like(x)
    geometry.push([found], latents)
    m, w = factorize(x, 0.5)
    torch.testing.assert_close(found, (0.9 * m) * (0.9 * w))
    torch.testing.assert_close(2 * latents["a"][0].expand(7), (0.9 * m) ** 2 - (0.9 * w) ** 2)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_the_first_step_moves_x_on_average_as_the_base_does(make):
    model, plain = layer(), layer()
    method = mm.Method(MirrorDescent(gain=1.0), ConstantDecay(0.0), Never())
    options = {"lr": 1e-4} if make is torch.optim.SGD else {"lr": 1e-6, "weight_decay": 0.0}
    optimizer = mm.sparsify(model, make(model.parameters(), **options), method, steps=1)
    base = make(plain.parameters(), **options)
    before = model.weight.detach().clone()
    for weight in (model.weight, plain.weight):
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    base.step()
    ours, theirs = ((before - x.detach()).abs().mean() for x in (model.weight, plain.weight))
    assert float(ours / theirs) == pytest.approx(1.0, rel=1e-3)


def test_pruned_weights_stay_zero_and_what_comes_back_moves():
    geometry = MirrorDescent(beta=0.5)
    x = torch.tensor([1.0, -2.0, 0.5, 3.0])
    latents = geometry.init(x)
    alive = torch.tensor([True, False, False, True])
    geometry.prune(latents, alive)
    new = torch.tensor([False, True, True, False])
    geometry.revive(latents, alive, new, torch.tensor([9.0, 0.25, 0.0, 9.0]))
    found = torch.empty_like(x)
    geometry.push([found], {name: [value] for name, value in latents.items()})
    torch.testing.assert_close(found, torch.tensor([1.0, 0.25, 0.0, 3.0]))


def test_a_weight_that_is_dead_for_long_does_not_overflow():
    # its gradient is not zero, so without a mask u would run off, and 0 * inf is not a number
    method = mm.methods.mirror(0.9, start_at=0.0, end_at=0.01, factors=False)
    for fused in (True, False):
        model = layer(torch.float32)
        optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=5.0), method, steps=200, fused=fused)
        for _ in range(200):
            model.weight.grad = torch.where(model.weight == 0, -1.0, 0.0)
            optimizer.step()
        assert model.weight.isfinite().all() and mm.sparsity(model).nonzeros == 60


def test_a_coupled_decay_is_refused():
    with pytest.raises(ValueError, match="MirrorDescent has no gradient for a coupled decay"):
        mm.Method(MirrorDescent(), ConstantDecay(0.1, coupled=True), Never())


def test_the_generated_sinh_is_accurate():
    model = nn.Linear(4096, 1, bias=False)
    values = torch.cat([torch.logspace(-18, 1.9, 2047), torch.zeros(1)])
    u = torch.cat([values, -values]).reshape(1, -1)
    base = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    optimizer = mm.sparsify(model, base, mm.Method(MirrorDescent(beta=2.0), ConstantDecay(0.0), Never()), steps=9)
    optimizer.state[model.weight]["u"].copy_(u)
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    assert optimizer._steps[0]._table is not None
    expected = torch.sinh(u.double())
    relative = ((model.weight.detach().double() - expected) / expected.abs().clamp(min=1e-30)).abs().max()
    assert float(relative) < 5e-7
