"""How strong the decay is, and when."""

import math

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.decay import ConstantDecay, PILoTDecay, ShrinkDecay, TargetDecay
from mirrormask.decay.growth import share_grown
from mirrormask.progress import Clock


def test_shrink_spends_exactly_its_total_whatever_the_steps_and_the_learning_rate():
    for steps, lr in ((7, 0.1), (100, 1e-3), (4690, 1.0)):
        decay = ShrinkDecay(shrink=4.0)
        spent = [decay.increment({}, Clock(step, steps), lr, 0.0) for step in range(steps)]
        assert 4 * math.fsum(spent) == pytest.approx(4.0, rel=1e-12)
        assert spent[0] == 0.0 or steps < 10
        assert spent[-1] == 0.0


def test_algorithm_1_line_by_line():
    decay = PILoTDecay(alpha_init=1.0, delta=2.0, K=10.0, half=0.5, relative=False)
    state = decay.start()
    course = []
    for step, score, l1 in [
        (10, 0.1, 50.0),  # the first score: a rise            -> 2
        (20, 0.2, 50.0),  # rose, above K, first half          -> 4
        (30, 0.2, 50.0),  # did not rise                       -> 2
        (40, 0.3, 9.0),  # rose, but the norm is below K       -> 1
        (50, 0.4, 50.0),  # k = T/2 still counts               -> 2
        (60, 0.5, 50.0),  # second half                        -> 1
    ]:
        decay.epoch_end(state, Clock(step, 100), score=score, l1_norm=l1)
        course.append(state["alpha"])
    assert course == [2.0, 4.0, 2.0, 1.0, 2.0, 1.0]
    assert decay.increment(state, Clock(60, 100), 0.5, 0.0) == 0.5


def test_a_relative_K_is_a_fraction_of_the_first_norm():
    decay = PILoTDecay(alpha_init=1.0, delta=2.0, K=0.5)
    state = decay.start()
    decay.epoch_end(state, Clock(1, 100), score=0.1, l1_norm=100.0)
    decay.epoch_end(state, Clock(2, 100), score=0.2, l1_norm=51.0)
    assert state["alpha"] == 4.0
    decay.epoch_end(state, Clock(3, 100), score=0.3, l1_norm=50.0)
    assert state["alpha"] == 2.0


def test_constant():
    assert ConstantDecay(0.5).increment({}, Clock(3, 4), 0.1, 7.0) == 0.05
    assert ConstantDecay().off
    assert not ConstantDecay(0.1).off


def simulate(decay, steps, response):
    """A network whose rho falls as exp(-response * 4A) from 0.9: what does the controller spend?"""
    state, integral = decay.start(), 0.0
    for size in (0.0, 1.0):  # a training from random weights, which grow at once
        decay.watch(state, Clock(0, steps), [size], [10])
    for step in range(steps):
        integral += decay.increment(state, Clock(step, steps), 0.1, integral)
        if step % (steps // 100) == 0:
            decay.observe(state, Clock(step + 1, steps), rho=0.9 * math.exp(-response * 4 * integral))
    return 4 * integral, 0.9 * math.exp(-response * 4 * integral)


def test_target_finds_the_strength_that_brings_rho_down():
    for response in (0.6, 1.0, 2.0):
        spent, rho = simulate(TargetDecay(rho_end=0.03, cap=12.0), 2000, response)
        assert 0.01 < rho < 0.09, (response, spent, rho)


def test_target_spends_no_more_than_its_cap_where_decay_does_not_help():
    spent, rho = simulate(TargetDecay(rho_end=0.03, cap=8.0), 4000, 0.01)
    assert spent == pytest.approx(8.0)
    assert rho > 0.5


def test_a_limit_keeps_a_short_training_from_shrinking_everything():
    def total(steps):
        decay = ShrinkDecay(shrink=4.0, start_at=0.0, end_at=0.5, limit=0.01)
        return 4 * sum(decay.increment({}, Clock(step, steps), lr=0.1, integral=0.0) for step in range(steps))

    assert total(10_000) == pytest.approx(4.0)
    assert total(100) == pytest.approx(50 * 0.01)
    with pytest.raises(ValueError, match=r"limit=0\.0"):
        ShrinkDecay(limit=0.0)


@pytest.mark.parametrize("steps", [60, 200])
def test_mirror_learns_in_a_short_training(steps):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 4))
    optimizer = mm.sparsify(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), mm.methods.mirror(0.8), steps=steps
    )
    labels = torch.arange(4).repeat(16)
    for _ in range(steps):
        optimizer.zero_grad()
        images = 2 * torch.eye(8)[labels] + 0.5 * torch.randn(64, 8)
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    optimizer.finalize()
    assert float((model(2 * torch.eye(8)[labels]).argmax(1) == labels).float().mean()) == 1.0


def spent(decay, steps, growth, lr=0.1):
    """``4A`` at the end, and the steepest step, where the weights are ``growth(progress)`` above their start."""
    state, integral, steepest = decay.start(), 0.0, 0.0
    for step in range(steps):
        if step % max(steps // 100, 1) == 0:
            decay.watch(state, Clock(step, steps), [growth(step / steps) if step else 0.0], [10])
            decay.observe(state, Clock(step, steps), rho=0.9)  # far from where it is to be: pull
        rise = decay.increment(state, Clock(step, steps), lr, integral)
        integral, steepest = integral + rise, max(steepest, 4 * rise)
    return 4 * integral, steepest


BOUNDED = [ShrinkDecay(limit=0.004, growth=0.5), TargetDecay()]
bounded = pytest.mark.parametrize("decay", BOUNDED, ids=lambda decay: type(decay).__name__)


@bounded
@pytest.mark.parametrize("steps", [60, 300, 4690])
def test_a_decay_that_watches_takes_nothing_from_weights_that_did_not_grow(decay, steps):
    for level in (-1.0, 0.0, 0.25):
        assert spent(decay, steps, lambda _, level=level: level) == (0.0, 0.0)
    some, _ = spent(decay, steps, lambda _: 0.3)
    assert 0 < some <= 0.35 * decay.shrink * 2


@bounded
def test_no_step_takes_more_than_the_limit_however_far_the_mask_is(decay):
    for steps in (60, 300, 1000):
        total, steepest = spent(decay, steps, lambda _: 2.0)
        assert steepest <= 0.004 * (1 + 1e-12)
        assert total <= 0.004 * steps


def test_from_random_weights_the_whole_shrink_is_spent_as_evenly_as_ever():
    plain, watching = ShrinkDecay(limit=0.004), ShrinkDecay(limit=0.004, growth=0.5)
    total, steepest = spent(watching, 4690, lambda t: 40 * t)
    assert total == pytest.approx(4.0, rel=1e-9)
    assert steepest == pytest.approx(spent(plain, 4690, lambda t: 0.0)[1], rel=1e-9)
    late, steepest = spent(watching, 4690, lambda t: 3 * t)  # grown at a sixth of training only
    assert late == pytest.approx(4.0, rel=1e-3)
    assert steepest <= 2 * 4.0 / (0.7 * 4690) * (1 + 1e-3)
    never, _ = spent(watching, 4690, lambda t: float(t > 0.7))  # what is left cannot all be caught up with
    assert never <= 2 * 4.0 * 0.05 / 0.7 * 1.1


def test_the_share_that_has_grown_counts_a_tensor_by_its_size_and_no_further():
    assert share_grown([9.0, 0.0], [1, 99], 0.5) == pytest.approx(0.01)
    assert share_grown([0.5, 0.25, 0.375], [1, 1, 2], 0.5) == pytest.approx(0.5)
    assert share_grown([], [], 0.5) == 0.0
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="growth"):
            ShrinkDecay(growth=bad)


SMALL = torch.randn(64, 8, generator=torch.Generator().manual_seed(5))


def fit(model, optimizer, steps):
    """Learn the signs of one input; returns the accuracy."""
    labels = (SMALL[:, 0] > 0).long() + 2 * (SMALL[:, 1] > 0).long()
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(SMALL), labels).backward()
        optimizer.step()
    return float((model(SMALL).argmax(1) == labels).float().mean())


def network(scale=1.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 4))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(scale)
    return model


@pytest.mark.parametrize(
    "base", [lambda p: torch.optim.SGD(p, 0.02, momentum=0.9), lambda p: torch.optim.AdamW(p, 1e-3)]
)
@pytest.mark.parametrize("decay", [TargetDecay(), ShrinkDecay(limit=0.004, growth=0.5)], ids=["target", "shrink"])
def test_a_trained_network_stays_trained(decay, base):
    model = network()
    assert fit(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 300) > 0.97
    method = mm.Method(mm.geometry.Hadamard(), decay, mm.masks.Gradual(0.7))
    optimizer = mm.sparsify(model, base(model.parameters()), method, steps=90)
    fit(model, optimizer, 90)
    optimizer.finalize()
    assert optimizer.diagnostics()["decay_integral"] < 0.02
    assert fit(model, optimizer, 0) > 0.9


def test_weights_that_are_loaded_after_the_wrapping_are_the_start():
    trained = network()
    fit(trained, torch.optim.SGD(trained.parameters(), 0.1, momentum=0.9), 300)
    model = network(scale=1e-3)
    optimizer = mm.sparsify(
        model, torch.optim.SGD(model.parameters(), 0.01, momentum=0.9), mm.methods.mirror(0.7), steps=90
    )
    model.load_state_dict(trained.state_dict())
    fit(model, optimizer, 90)
    assert optimizer.diagnostics()["decay_integral"] == 0.0


@pytest.mark.parametrize("name", ["mirror", "spred", "pilot_init"])
@pytest.mark.parametrize("scale", [1e-1, 1e-3, 1e-5])
def test_layers_that_start_tiny_train(name, scale):
    model = network(scale)
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = mm.sparsify(model, base, mm.methods.get(name)(0.5), steps=300)
    fit(model, optimizer, 300)
    optimizer.finalize()
    assert fit(model, optimizer, 0) > 0.8


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.cases(1)
def test_what_a_gradient_counts_under_adam_follows_the_growth(trained):
    """From random weights the masks are those of ``sensitivity``, to the last element; from trained ones, not."""
    masks = []
    for score in ("auto", "sensitivity", "magnitude"):
        model = network()
        if trained:
            fit(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), 300)
        base = torch.optim.AdamW(model.parameters(), lr=1e-3 if trained else 0.05)
        # no mask before the weights have had time to grow
        optimizer = mm.sparsify(model, base, mm.methods.mirror(0.7, score=score, start_at=0.3, end_at=0.5), steps=120)
        fit(model, optimizer, 120)
        masks.append(torch.cat([mask.flatten() for mask in optimizer.masks.values()]))
    assert torch.equal(masks[0], masks[1]) != trained
    assert not torch.equal(masks[0], masks[2])
