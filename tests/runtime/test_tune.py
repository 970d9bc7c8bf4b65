"""How the tuner decides, with turns that take the time that a table says."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from mirrormask.machine import timing
from mirrormask.machine.targets import best_target
from mirrormask.machine.timing import Watch
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.schedule import memory, tune
from mirrormask.runtime.schedule.lower import lower
from mirrormask.runtime.schedule.problem import Choice, Problem
from mirrormask.runtime.schedule.trial import Trial


class Clocked:
    """A trial whose turns take given times, one after another; the last one again and again."""

    times: dict[int, list[float]]
    turns: list[int]
    alone = SimpleNamespace(plan=SimpleNamespace(nbytes=0))

    def __init__(self, problem, choice, others) -> None:
        self.rows = choice.rows
        self.left = list(self.times[choice.rows])

    def turn(self) -> float:
        self.turns.append(self.rows)
        return self.left.pop(0) if len(self.left) > 1 else self.left[0]

    def seconds(self, least: float) -> float:
        return self.turn()


def winner(monkeypatch, times: dict[int, list[float]]) -> tuple[int, list[int]]:
    monkeypatch.setattr(Clocked, "times", times, raising=False)
    monkeypatch.setattr(Clocked, "turns", [], raising=False)
    monkeypatch.setattr(tune, "Trial", Clocked)
    choice = tune._fastest(None, [Choice("dense", rows) for rows in times], 0, Watch())
    return choice.rows, Clocked.turns


def test_a_busy_moment_does_not_decide(monkeypatch):
    # 2 is faster, but something else ran when it was first measured, and again later.
    rows, turns = winner(monkeypatch, {1: [1.0], 2: [1.3, 0.9, 5.0, 0.9]})
    assert rows == 2
    assert turns[:2] == [1, 2] and turns[2:] == [1, 2] * tune.ROUNDS


def test_what_is_far_behind_gets_no_more_turns(monkeypatch):
    rows, turns = winner(monkeypatch, {1: [2.0], 2: [1.0], 3: [1.5, 0.1]})
    assert rows == 2
    assert turns == [1, 2, 3]


def test_only_so_many_are_measured_to_the_end(monkeypatch):
    rows, turns = winner(monkeypatch, {n: [1.0 + n / 100] for n in range(1, 9)})
    assert rows == 1
    assert set(turns[8:]) == set(range(1, 1 + tune.FINALISTS))


# Of tiles of four vectors and of eight that are equally fast alone, those of eight took up to twice as long in a model
# whose other layers, or whose neighbours on the machine, left them less of the caches.
@pytest.mark.parametrize(
    "seconds, chosen",
    [
        ({8: 1.00, 4: 1.04, 2: 1.30}, 4),  # as fast and narrower
        ({8: 1.00, 4: 1.04, 2: 1.03}, 2),  # the narrowest of them, though not the fastest
        ({8: 1.00, 4: 1.10}, 8),  # narrower, but slower
        ({4: 1.00, 8: 1.00}, 4),
    ],
)
def test_of_tiles_that_are_as_fast_the_narrowest_is_taken(seconds, chosen):
    assert tune._narrowest({Choice("aligned", 1, n): took for n, took in seconds.items()}).vectors == chosen
    others = {Choice("direct", 1, 1): 1.01, Choice("aligned", 2, 1): 1.01}
    found = tune._narrowest({Choice("aligned", 1, n): took for n, took in seconds.items()} | others)
    assert found.vectors == chosen, "of another kernel, or over other rows, the tile says nothing"


@pytest.mark.parametrize("model", [nn.Conv2d(3, 8, 3, padding=1), nn.Linear(40, 30)], ids=["maps", "one row"])
def test_a_trial_runs_the_layer_on_the_memory_that_it_names(model):
    x = torch.randn(1, 3, 14, 14) if isinstance(model, nn.Conv2d) else torch.randn(1, 40)
    seen: list[Problem] = []
    captured = capture(model.eval(), (x,))
    lower(captured.regions[captured.whole], best_target(), 1, lambda p: (seen.append(p), next(p.candidates()))[1], 1)
    for choice in seen[0].candidates():
        trial = Trial(seen[0], choice, np.zeros(1000, np.float32))
        size = 40 if isinstance(model, nn.Linear) else seen[0].input_layout(choice).size
        assert trial.alone.source == slice(memory.MARGIN, memory.MARGIN + size)
        assert 0 < trial.seconds(1.0) < 1.0
        trial.alone.plan.memory[trial.alone.source] = 1.0
        trial.turn()
        assert (trial.alone.plan.memory[trial.alone.source] == 1.0).all(), "the input stays what it was"
        assert np.isfinite(trial.alone.plan.memory).all() and trial.alone.plan.memory.any()


def test_a_watch_tells_waiting_from_work(monkeypatch):
    wall, own = [0.0], [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: wall[0])
    monkeypatch.setattr(timing, "own_time", lambda: own[0])
    for waits, busy in ((0.0, False), (0.1, False), (0.3, True)):
        watch = Watch()
        for _ in range(2):
            wall[0] += 5.0  # between its turns it does not look
            with watch:
                own[0] += 0.5
                wall[0] += 0.5 + waits / 2
        assert watch.busy == busy
    with (watch := Watch()):
        wall[0] += 0.009  # a moment is no busy machine
    assert not watch.busy


class Layer:
    """A problem of two choices, of which only the name matters."""

    key = "a layer"

    def candidates(self):
        return iter([Choice("dense", 1), Choice("dense", 2)])


def test_what_was_measured_on_a_busy_machine_is_measured_again(monkeypatch, tmp_path):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))
    busy, asked = True, []

    def fastest(problem, found, around, watch):
        watch.wall, watch.own = (3.0, 1.0) if busy else (1.0, 1.0)
        asked.append(problem.key)
        return found[len(asked) % 2]

    monkeypatch.setattr(tune, "_fastest", fastest)

    def built() -> tune.Tuner:
        tuner = tune.Tuner("2" * 40)
        tuner(Layer())
        tuner.save()
        return tuner

    first = built()
    assert first.unsure == {"a layer": 1} and not first.again
    again = built()
    assert len(asked) == 2 and again.unsure == {"a layer": 2} and again.again
    busy = False
    assert built().unsure == {} and len(asked) == 3
    assert built().choices == {"a layer": Choice("dense", 2)} and len(asked) == 3, "now it is sure"
    # A machine that is always busy is not asked for ever.
    busy = True
    known = tune.Tuner("3" * 40)
    for tries in range(1, 2 + tune.TRIES):
        known = tune.Tuner("3" * 40)
        known(Layer())
        known.save()
        assert len(asked) == 3 + min(tries, tune.TRIES)
    # One that may not measure takes what there is.
    tuner = tune.Tuner("3" * 40)
    tuner.measure = False
    assert tuner(Layer()) == known.choices["a layer"]
