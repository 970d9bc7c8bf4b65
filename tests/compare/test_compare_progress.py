"""What a person sees of a grid: counts that add up, and a time to go from the work that was done."""

import io

import compare_forge as forge
import pytest
from rich.console import Console

from mirrormask.compare import progress as module
from mirrormask.compare.grid import Cell
from mirrormask.compare.progress import Progress
from mirrormask.compare.runner import cores, share


def cells(n):
    return [Cell("gmp", forge.recipe(seed=seed)) for seed in range(n)]


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def plain():
    return Console(file=io.StringIO(), width=200)


def test_lines_count_done_running_and_left_with_the_time_to_go(clock):
    console, (a, b, c) = plain(), cells(3)
    shown = Progress(console, [a, b, c], already=5)
    clock[0] = 130.0  # workers start up
    for cell in (a, b):
        shown.started(cell)
        shown.progressed(cell, 0.0)
    clock[0] = 140.0
    shown.progressed(b, 0.5)
    shown.finished(a, forge.result(a.recipe))
    shown.started(c)
    # 1.5 cells in 10 s, 1.5 are left.
    assert console.file.getvalue() == (
        "[6/8] gmp 90% seed 0: 80.00% in 1.5 s; 6 of 8 done, 1 running, 1 left, 10 s to go\n"
    )
    shown.failed(b, "ValueError: no")
    shown.finished(c, forge.result(c.recipe))
    assert console.file.getvalue().endswith("8 of 8 done, 0 running, 0 left, 1 failed\n")


def test_what_an_earlier_start_had_done_is_not_taken_for_speed(clock):
    shown = Progress(plain(), cells(2))
    a, b = cells(2)
    shown.started(a)
    shown.progressed(a, 0.5)
    assert shown.seconds_to_go() is None
    clock[0] += 10.0
    shown.progressed(a, 0.75)
    assert shown.seconds_to_go() == pytest.approx(50.0)  # a quarter in 10 s; 0.25 and 1 are left
    shown.finished(a, forge.result(a.recipe))
    shown.started(b)
    assert shown.seconds_to_go() == pytest.approx(20.0)


def test_a_terminal_gets_one_live_line_that_goes_away():
    console = Console(file=io.StringIO(), force_terminal=True, width=120, highlight=False)
    a, b = cells(2)
    shown = Progress(console, [a, b])
    shown.started(a)
    shown.progressed(a, 0.5)
    shown.bar.refresh()
    assert "0 of 2 done, 1 running, 1 left" in console.file.getvalue()
    shown.finished(a, forge.result(a.recipe))
    shown.stop()
    shown.stop()
    assert "gmp 90% seed 0: 80.00% in 1.5 s" in console.file.getvalue()


def test_cores_are_shared_out_between_workers_and_threads():
    assert share(100, None, 1) == (cores(), 1)
    assert share(100, 1, None) == (1, cores())
    assert share(3, 100, 1) == (3, 1)
    assert share(2, 1, 4) == (1, 4)
    assert share(100, None, 1000) == (1, 1000)
