"""Timing in turns: who is called when, and what is counted."""

import pytest

from mirrormask.machine import timing
from mirrormask.runtime.model import race


class World:
    """A clock that calls and rests move, and a record of both."""

    def __init__(self, monkeypatch) -> None:
        self.now, self.seen = 0.0, []
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(timing.time, "sleep", lambda seconds: self.spend("rest", seconds) if seconds else None)

    def spend(self, what: str, seconds: float) -> None:
        self.seen.append(what)
        self.now += seconds

    def clock(self) -> float:
        return self.now


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch)


def test_turns_alternate_and_each_repeats_a_call_for_its_budget(world):
    calls = {"slow": lambda: world.spend("slow", 0.5), "fast": lambda: world.spend("fast", 0.25)}
    times = timing.in_turns(calls, rounds=2, budget=1.0, clock=world.clock)
    assert times == {"slow": [0.5, 0.5], "fast": [0.25, 0.25]}
    warm_up = ["slow"] * 3 + ["fast"] * 3
    assert world.seen == warm_up + 2 * (["slow"] * 3 + ["fast"] * 5), "one call more than is timed"


def test_after_a_rest_a_call_warms_up_for_as_long_as_it_is_timed(world):
    timing.in_turns({"one": lambda: world.spend("one", 0.25)}, rounds=1, budget=1.0, clock=world.clock, pause=2.0)
    assert world.seen == ["one"] * 3 + ["rest"] + ["one"] * 8


def test_what_is_said_before_a_round_is_not_timed(world):
    calls = {"one": lambda: world.spend("one", 0.25)}
    said = lambda number: world.spend(f"round {number}", 100.0)  # noqa: E731
    times = timing.in_turns(calls, rounds=2, budget=0.25, clock=world.clock, before_round=said)
    assert times == {"one": [0.25, 0.25]}
    assert world.seen == ["one"] * 3 + ["round 0", "one", "one", "round 1", "one", "one"]


def test_no_round_begins_after_the_limit_but_the_first(world):
    def count(limit: float) -> int:
        call = {0: lambda: world.spend("call", 1.0)}
        return len(timing.in_turns(call, rounds=9, budget=1.0, clock=world.clock, limit=limit)[0])

    assert [count(limit) for limit in (0.0, 3.0, 100.0)] == [1, 2, 9]


@pytest.mark.parametrize(("eager", "plan", "looks"), [(1.0, 0.125, 1), (1.0, 0.75, 6), (0.125, 0.01, 10)])
def test_a_model_that_takes_far_longer_than_its_plan_is_looked_at_once(world, monkeypatch, eager, plan, looks):
    monkeypatch.setattr(race, "own_time", world.clock)
    found = race._race(lambda: world.spend("eager", eager), lambda: world.spend("plan", plan))
    assert found == pytest.approx((eager, plan)) and world.seen.count("eager") == looks
