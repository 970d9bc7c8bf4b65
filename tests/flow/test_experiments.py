"""The experiments: their numbers show what the theory says, and their files hold the numbers."""

import csv
import math

import numpy as np
import pytest

from mirrormask import flow
from mirrormask.flow import commands
from mirrormask.flow.bias import bias_experiment, run_exponent
from mirrormask.flow.figures import Experiment, canvas, mean_and_interval
from mirrormask.flow.recovery import AMOUNTS, recovery_experiment
from mirrormask.flow.signs import balanced_flow, crossing_time, predicted_crossing_time, signs_experiment


@pytest.fixture(scope="module")
def recovery():
    experiment = recovery_experiment(seeds=2)
    table = {}
    for _, method, amount, _, error, residual, norm in experiment.rows:
        table.setdefault((method, amount), []).append((error, residual, norm))
    return experiment, {key: np.mean(value, axis=0) for key, value in table.items()}


def test_recovery_improves_with_the_decay_integral_and_stays_on_the_manifold(recovery):
    _, table = recovery
    for method in ("decay off at T/2", "decay tends to 0"):
        errors = [table[method, amount][0] for amount in AMOUNTS]
        assert np.all(np.diff(errors[:7]) < 0) and errors[-1] < 0.01
        assert max(table[method, amount][1] for amount in AMOUNTS) < 3e-3
    assert min(table["no decay", 1.0][0], table["gradient descent", 1.0][0]) > 2.0


def test_constant_decay_ends_where_explicit_l1_does_off_the_manifold(recovery):
    _, table = recovery
    for amount in AMOUNTS[-2:]:
        constant, explicit = table["constant decay", amount], table["explicit L1", amount]
        np.testing.assert_allclose(constant, explicit, rtol=0.02)
        assert constant[1] > 20 * table["decay off at T/2", amount][1]


def test_the_sentence_is_made_of_the_numbers(recovery):
    experiment, table = recovery
    assert f"{table['no decay', 1.0][0]:.2f} without decay" in experiment.sentence
    assert len(experiment.rows) == 2 * 6 * len(AMOUNTS)


def test_the_exponent_along_a_run_goes_from_two_towards_one_and_stays():
    experiment = bias_experiment()
    curves = {}
    for part, curve, t, p, _ in experiment.rows:
        if part == "run":
            curves.setdefault(curve, []).append((t, p))
    for name, points in curves.items():
        times, exponents = np.array(points).T
        assert exponents[0] == pytest.approx(2.0)
        assert (exponents[-1] > 1.9) == (name == "no decay")
        if "off at" in name:
            after = exponents[times > 201]
            assert after.max() < 1.04 and np.ptp(after) < 2e-3


def test_the_run_exponent_is_the_logarithmic_derivative():
    network, _ = flow.sparse_regression(seed=0, n=8, d=12, nonzeros=2)
    run = network.flow(alpha=0.05, time=10.0, points=3)
    step = 1e-6
    for x, a, p in zip(run.x[1:], run.a[1:], run_exponent(run)[1:], strict=True):
        up, down = flow.penalty(x * (1 + step), a).sum(), flow.penalty(x * (1 - step), a).sum()
        assert p == pytest.approx(math.log(up / down) / (2 * step), rel=1e-7)


@pytest.mark.parametrize("beta", [10.0, 1.0, 1e-3, 1e-9])
def test_the_crossing_time_is_the_quadrature(beta):
    for integrate in (flow.mirror_flow, flow.gradient_flow):
        if integrate is flow.gradient_flow and beta < 1e-6:
            continue  # the factors cannot hold a scale that far below the weight; see gradient_flow
        run = integrate(lambda x: x + 1.0, [1.0], beta=beta, time=30.0)
        assert crossing_time(run) == pytest.approx(predicted_crossing_time(beta), rel=1e-6)
        assert run.x[-1] == pytest.approx(-1.0, abs=1e-6)


def test_a_balanced_start_solves_its_equation_and_never_crosses():
    times = np.linspace(0, 5, 11)
    x = balanced_flow(times, x0=2.0, target=-0.5)
    step = 1e-6
    slope = (balanced_flow(times + step, 2.0, -0.5) - balanced_flow(times - step, 2.0, -0.5)) / (2 * step)
    np.testing.assert_allclose(slope, -2 * x * (x + 0.5), rtol=1e-7)
    assert x[0] == pytest.approx(2.0) and np.all(balanced_flow(np.linspace(0, 300, 50)) > 0)
    with pytest.raises(ValueError, match=r"target=0\.5 is outside"):
        balanced_flow(times, 1.0, 0.5)


def test_no_crossing_is_infinitely_late():
    assert crossing_time(flow.mirror_flow(lambda x: x - 1.0, [0.5], beta=1.0, time=5.0)) == math.inf


def test_every_unbalanced_start_crosses_and_later_for_smaller_beta():
    rows = [row for row in signs_experiment().rows if row[0] == "crossing"]
    for alpha in {row[2] for row in rows}:
        times = [t for _, beta, strength, t, _ in sorted(rows) if strength == alpha]
        assert np.all(np.isfinite(times)) and np.all(np.diff(times) < 0)


def test_an_experiment_writes_its_figure_its_numbers_and_its_sentence(tmp_path):
    figure, (axis,) = canvas("A title", ["a panel"])
    axis.plot([0, 1], [0, 1])
    experiment = Experiment("line", figure, ("x", "y"), [(0.1, "low"), (1 / 3, "high")], "It rises.")
    paths = experiment.save(tmp_path / "deep" / "down")
    assert [path.name for path in paths] == ["line.svg", "line.png", "line.csv", "line.txt"]
    assert "A title" in paths[0].read_text() and paths[1].read_bytes().startswith(b"\x89PNG")
    assert list(csv.reader(paths[2].open())) == [["x", "y"], ["0.1", "low"], ["0.3333333333", "high"]]
    assert paths[3].read_text() == "It rises.\n"
    before = paths[0].read_bytes()
    experiment.save(tmp_path / "deep" / "down")
    assert paths[0].read_bytes() == before


def test_the_interval_holds_the_mean_and_narrows():
    random = np.random.default_rng(0)
    wide, narrow = random.exponential(1.0, (5, 1)), random.exponential(1.0, (500, 1))
    for samples in (wide, narrow):
        middle, low, high = mean_and_interval(samples)
        assert 0 < low < middle < high
    assert np.subtract(*mean_and_interval(narrow)[:0:-1]) < np.subtract(*mean_and_interval(wide)[:0:-1])


def test_a_command_writes_and_says_what_it_found(tmp_path, capsys):
    commands.signs(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["signs.csv", "signs.png", "signs.svg", "signs.txt"]
    assert (tmp_path / "signs.txt").read_text().strip() in capsys.readouterr().out


def test_all_runs_every_experiment_once(tmp_path, monkeypatch, capsys):
    figure, _ = canvas("A title", ["a panel"])
    names = ["recovery", "bias", "depth", "signs", "rates", "norm"]
    for name in names:
        fake = Experiment(name, figure, ("x",), [(1,)], f"This is {name}.")
        monkeypatch.setattr(f"mirrormask.flow.{name}.{name}_experiment", lambda *arguments, fake=fake: fake)
    commands.all(tmp_path, seeds=2)
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"{name}.{kind}" for name in names for kind in ("svg", "png", "csv", "txt")}
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines() if "This is" in line] == names


def test_too_few_seeds():
    with pytest.raises(ValueError, match="seeds=1 is below 2; an interval over seeds"):
        recovery_experiment(seeds=1)
