"""How strong the decay is, and when."""

import math

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.decay import ConstantDecay, PILoTDecay, ShrinkDecay, TargetDecay
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
    spent, rho = simulate(TargetDecay(rho_end=0.03, cap=8.0), 2000, 0.01)
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
