"""Theory and training are one thing: the optimizer obeys the mirror identity, and the geometry the formulas."""

import json

import numpy as np
import pytest
import torch

import mirrormask as mm
from mirrormask import flow
from mirrormask.corrections import Hyperbolic
from mirrormask.decay import ConstantDecay, ShrinkDecay
from mirrormask.flow.norm import KEYS, norm_experiment, read_log, train_digits
from mirrormask.flow.rates import descend, slope
from mirrormask.geometry import Euclidean, Hadamard
from mirrormask.masks import Never

STEP_SIZES = (0.02, 0.01, 0.005, 0.0025)


@pytest.mark.parametrize("shrink", [0.0, 4.0])
@pytest.mark.cases(1)
def test_sgd_satisfies_the_mirror_identity_and_follows_the_flow_to_first_order(shrink):
    network, _ = flow.sparse_regression(seed=0, n=8, d=20, nonzeros=2)
    x0 = np.random.default_rng(0).normal(0.0, 0.3, 20)
    alpha = flow.SwitchedOff(shrink / 4 / 2.0, until=2.0) if shrink else 0.0
    curve = network.flow(beta=0.5, alpha=alpha, time=4.0, x0=x0, points=21)
    identity, distance = [], []
    for step_size in STEP_SIZES:
        run = descend(network, x0, beta=0.5, step_size=step_size, time=4.0, shrink=shrink)
        np.testing.assert_allclose(run.A, curve.A, atol=1e-9)
        identity.append(run.identity_error(0.5, x0))
        distance.append(np.linalg.norm(run.x - curve.x, axis=1).max())
    assert slope(STEP_SIZES, identity) == pytest.approx(1.0, abs=0.1)
    assert slope(STEP_SIZES, distance) == pytest.approx(1.0, abs=0.1)
    assert identity[-1] < 0.02 and distance[-1] < 0.02


def logistic_run(step_size, *, gain, coupled, time=2.0):
    """Full-batch logistic regression with labels that no plane separates; returns both sides of the identity."""
    random = np.random.default_rng(3)
    inputs = torch.from_numpy(random.standard_normal((30, 6)))
    labels = torch.from_numpy(random.integers(0, 2, (30, 1)).astype(np.float64))
    model = torch.nn.Linear(6, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(random.normal(0, 0.5, (1, 6))))
    x0 = model.weight.detach().numpy().copy()
    steps = round(time / step_size)
    method = mm.Method(Hadamard(beta=0.7, gain=gain), ConstantDecay(0.2, coupled=coupled), Never())
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=step_size), method, steps=steps)
    rate = optimizer.state[model.weight]["rate"]
    impulse = np.zeros_like(x0)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(inputs), labels).backward()
        impulse += step_size * rate * model.weight.grad.numpy()
        optimizer.step()
    a = flow.scale(0.7, optimizer.diagnostics()["decay_integral"])
    assert optimizer.diagnostics()["decay_integral"] == pytest.approx(0.2 * time)
    return flow.mirror_map(model.weight.detach().numpy(), a, flow.initial_offset(x0, 0.7)), -impulse


@pytest.mark.parametrize(("gain", "coupled"), [(None, False), (None, True), (1.0, False)])
@pytest.mark.cases(1)
def test_the_mirror_identity_on_a_logistic_loss_is_linear_in_the_step(gain, coupled):
    errors = [np.abs(np.subtract(*logistic_run(eta, gain=gain, coupled=coupled))).max() for eta in STEP_SIZES]
    assert slope(STEP_SIZES, errors) == pytest.approx(1.0, abs=0.1)
    mirror, impulse = logistic_run(STEP_SIZES[-1], gain=gain, coupled=coupled)
    assert np.abs(impulse).max() > 20 * errors[-1]  # both sides are large beside their difference
    np.testing.assert_allclose(mirror, impulse, atol=2 * errors[-1])


def hyperbolic_run(step_size, *, a=3.0, time=2.0):
    """SGD with HAM's step on the same loss. To first order ``dx = -(1 + a |x|) ∇f dt``, whose mirror map is
    ``sign(x) log(1 + a |x|) / a``; returns its change and minus the impulse.
    """
    random = np.random.default_rng(3)
    inputs = torch.from_numpy(random.standard_normal((30, 6)))
    labels = torch.from_numpy(random.integers(0, 2, (30, 1)).astype(np.float64))
    model = torch.nn.Linear(6, 1, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(random.normal(0, 0.5, (1, 6))))

    def mirror_coordinate():
        x = model.weight.detach().numpy().copy()
        return np.sign(x) * np.log1p(a * np.abs(x)) / a

    start, impulse = mirror_coordinate(), np.zeros((1, 6))
    steps = round(time / step_size)
    method = mm.Method(Euclidean(), ConstantDecay(), Never(), correction=Hyperbolic(a=a, b=0.0, clip=None))
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=step_size), method, steps=steps)
    for _ in range(steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(inputs), labels).backward()
        impulse += step_size * model.weight.grad.numpy()
        optimizer.step()
    return mirror_coordinate() - start, -impulse


def test_the_hyperbolic_step_satisfies_the_identity_of_its_own_potential():
    errors = [np.abs(np.subtract(*hyperbolic_run(eta))).max() for eta in STEP_SIZES]
    assert slope(STEP_SIZES, errors) == pytest.approx(1.0, abs=0.1)
    assert np.abs(hyperbolic_run(STEP_SIZES[-1])[1]).max() > 20 * errors[-1]


@pytest.mark.parametrize("beta", [1e-3, 0.7, 40.0])
def test_the_geometry_that_trains_networks_starts_where_the_theory_does(beta):
    x = torch.tensor([-3.0, -1e-4, 0.0, 0.2, 70.0], dtype=torch.float64)
    latents = Hadamard(beta=beta).init(x)
    m, w = flow.initial_latents(x.numpy(), beta)
    np.testing.assert_allclose(latents["m"], m, rtol=1e-14)
    np.testing.assert_allclose(latents["w"], w, rtol=1e-14)
    scale = Hadamard(beta=beta).scale(latents).numpy()
    np.testing.assert_allclose(scale, flow.scale(beta), rtol=1e-12, atol=1e-14 * 70)
    # The metric of the flow is what a small step of SGD on the factors does to x.
    gradient, eta = torch.full_like(x, 0.3), 1e-9
    pulled = Hadamard(beta=beta).pullback([gradient], [x], {name: [value] for name, value in latents.items()})
    moved = (latents["m"] - eta * pulled["m"][0]) * (latents["w"] - eta * pulled["w"][0])
    speed = (moved - x).numpy() / (-eta * 0.3)
    np.testing.assert_allclose(speed, 1 / flow.hessian_metric(x.numpy(), beta / 2), rtol=1e-4)


def test_descend_checks_its_grid():
    network, _ = flow.sparse_regression(seed=0, n=4, d=6, nonzeros=1)
    with pytest.raises(ValueError, match="= 7 is not a positive multiple of 20"):
        descend(network, np.zeros(6), beta=1.0, step_size=1.0, time=7.0)


def test_a_real_run_falls_with_its_recorded_decay_integral():
    method = mm.Method(Hadamard(gain=1.0), ShrinkDecay(3.0), Never(0.8))
    rows, accuracy = train_digits(method, lr=0.03, epochs=8, every=20)
    assert accuracy > 0.8
    scale = np.array([row["median_a"] for row in rows])
    integral = np.array([row["decay_integral"] for row in rows])
    assert 4 * integral[-1] == pytest.approx(3.0)
    np.testing.assert_allclose(scale / scale[0], np.exp(-4 * integral), rtol=0.05)


def write_log(folder, lines):
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return folder


def test_norm_draws_the_log_of_a_run(tmp_path):
    rows = [
        {"step": 10 * k, "decay_integral": 0.1 * k, "median_a": 0.5 * np.exp(-0.4 * k), "l1_norm": 9.0 - k, "loss": 1.0}
        for k in range(5)
    ]
    run = write_log(tmp_path / "run", [{"step": 0, "event": "start"}, *rows, "", {**rows[0], "median_a": float("nan")}])
    assert read_log(run) == [{key: row[key] for key in KEYS} for row in rows]
    experiment = norm_experiment(run)
    assert len(experiment.rows) == 5
    for _, _, _, recorded, predicted, _ in experiment.rows:
        assert recorded == pytest.approx(predicted)
    assert "run: 0.202 where exp(-4A) is 0.202" in experiment.sentence


def test_a_bad_log_is_refused_with_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"log\.jsonl is not there; give the folder of a training run"):
        read_log(tmp_path)
    with pytest.raises(ValueError, match=r"line 1 of .* is not JSON"):
        read_log(write_log(tmp_path / "torn", ['{"step": 1, "deca']))
    with pytest.raises(ValueError, match="has 0 rows with finite step, decay_integral"):
        read_log(write_log(tmp_path / "dense", [{"step": 1, "loss": 0.3}, [1, 2], {"step": 2, "loss": 0.2}]))
