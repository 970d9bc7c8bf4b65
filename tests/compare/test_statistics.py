"""The statistics against slow plain ones and tables that an eye can check; silence where there is nothing to say."""

import itertools
import json
import math
import random

import compare_forge as forge
import pytest
from rich.console import Console
from scipy import integrate, special, stats

from mirrormask.compare import Skipped, paired_tests, summarize
from mirrormask.compare.budgets import Cost, best_within, time_costs
from mirrormask.compare.comparison import Failure, compare_runs
from mirrormask.compare.statistics import half_width, holm
from mirrormask.compare.table import accuracy_table, differences, markdown, print_comparison, to_csv, to_json


def plain_t_tail(t, degrees):
    """P(|T| > t), by integrating the density."""
    constant = special.gamma((degrees + 1) / 2) / (math.sqrt(degrees * math.pi) * special.gamma(degrees / 2))
    inside = integrate.quad(lambda x: constant * (1 + x * x / degrees) ** (-(degrees + 1) / 2), -t, t)[0]
    return 1 - inside


def values_of(table):
    """{"a": [..]} at 0.9 -> Values."""
    return {(m, 0.9, seed): v for m, vs in table.items() for seed, v in enumerate(vs) if v is not None}


def test_the_interval_of_three_values_by_hand():
    # mean 2, s = 1, t(2) = 4.3027: 4.3027 / sqrt(3)
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(2.4841, abs=1e-4)
    assert half_width([1.0]) is None and half_width([]) is None
    assert half_width([0.5, 0.5]) == 0.0


def test_the_interval_covers_the_mean_in_19_of_20_samples():
    draw = random.Random(0)
    samples = [[draw.gauss(0, 1) for _ in range(4)] for _ in range(4000)]
    covered = sum(abs(sum(s) / 4) <= half_width(s) for s in samples) / 4000
    assert covered == pytest.approx(0.95, abs=0.012)


def test_paired_test_equals_the_integral_of_the_density():
    a, b = [0.81, 0.80, 0.83, 0.79], [0.80, 0.80, 0.81, 0.785]
    (pair,) = paired_tests(values_of({"a": a, "b": b}))
    d = [x - y for x, y in zip(a, b, strict=True)]
    mean = sum(d) / 4
    s = math.sqrt(sum((x - mean) ** 2 for x in d) / 3)
    assert pair.difference == pytest.approx(mean)
    assert pair.p == pytest.approx(plain_t_tail(mean / (s / 2), 3), abs=1e-9)
    assert pair.p_corrected == pair.p and pair.seeds == (0, 1, 2, 3)
    # The interval and the test say the same.
    assert (abs(pair.difference) > pair.half_width) == (pair.p < 0.05)


def test_only_shared_seeds_are_paired():
    rows = values_of({"a": [0.9, 0.8, None, 0.7], "b": [0.8, None, 0.9, 0.65]})
    (pair,) = paired_tests(rows)
    assert pair.seeds == (0, 3)
    assert pair.difference == pytest.approx(0.075)
    (none,) = paired_tests(values_of({"a": [0.9, None], "b": [None, 0.8]}))
    assert (none.difference, none.half_width, none.p, none.significant) == (None, None, None, False)


def test_one_seed_gives_no_interval_and_no_test():
    rows = values_of({"a": [0.9], "b": [0.5]})
    (pair,) = paired_tests(rows)
    assert (pair.p, pair.p_corrected, pair.half_width, pair.significant) == (None, None, None, False)
    assert [row.half_width for row in summarize(rows)] == [None, None]


def test_differences_without_spread_are_not_called_certain():
    (pair,) = paired_tests(values_of({"a": [0.9, 0.8, 0.7], "b": [0.8, 0.7, 0.6]}))
    assert (pair.p, pair.significant) == (None, False)
    assert pair.difference == pytest.approx(0.1)
    (equal,) = paired_tests(values_of({"a": [0.9, 0.8, 0.7], "b": [0.9, 0.8, 0.7]}))
    assert (equal.difference, equal.p, equal.significant) == (0.0, 1.0, False)


def test_holm_by_hand_and_against_scipy_s_bound():
    assert holm([0.01, 0.02, 0.03]) == [0.03, 0.04, 0.04]
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == [] and holm([None]) == [None]
    draw = random.Random(1)
    for _ in range(50):
        p = [draw.random() ** 3 for _ in range(6)]
        # Benjamini and Hochberg's correction is never stricter than Holm's.
        weaker = stats.false_discovery_control(p)
        assert all(h >= w - 1e-12 and h >= q for h, w, q in zip(holm(p), weaker, p, strict=True))


def test_noise_alone_is_seldom_significant_over_all_pairs_together():
    draw = random.Random(2)
    alarms = 0
    for _ in range(300):
        table = {m: [draw.gauss(0.9, 0.01) for _ in range(5)] for m in "abcd"}
        alarms += any(pair.significant for pair in paired_tests(values_of(table)))
    assert alarms / 300 < 0.08


def test_dense_counts_at_every_sparsity_and_in_no_pair():
    rows = {("dense", 0.0, s): 0.9 for s in (0, 1)}
    rows |= {(m, s, seed): 0.9 - s / 10 - seed / 100 for m in ("a", "b") for s in (0.5, 0.9) for seed in (0, 1)}
    summaries = summarize(rows)
    assert [(r.method, r.sparsity) for r in summaries] == [("dense", 0), ("a", 0.5), ("a", 0.9), ("b", 0.5), ("b", 0.9)]
    assert [r.difference_from_dense for r in summaries] == pytest.approx([None, -0.055, -0.095, -0.055, -0.095])
    assert {(p.a, p.b) for p in paired_tests(rows)} == {("a", "b")}
    assert "| dense | 90.00 ± 0.00 | 90.00 ± 0.00 | 2 |" in accuracy_table(rows)


def test_a_line_of_differences_reads_in_the_order_that_was_asked():
    rows = values_of({"gmp": [0.8, 0.8], "mirror": [0.82, 0.81], "x": [0.1, 0.1]})
    assert differences(rows, "mirror", "gmp") == "mirror - gmp, paired over seeds: 90%: +1.50 ± 6.35"
    assert differences(rows, "gmp", "mirror") == "gmp - mirror, paired over seeds: 90%: -1.50 ± 6.35"


def test_best_within_a_budget_against_a_search():
    draw = random.Random(3)
    for _ in range(50):
        values = {("m", round(0.5 + i / 50, 2), 0): 0.9 * draw.random() for i in range(8)} | {("dense", 0.0, 0): 0.95}
        summaries = summarize(values)
        costs = [Cost(r.method, r.sparsity, 800 * draw.random() if r.sparsity else 800.0) for r in summaries]
        found = best_within(costs, summaries)
        assert (round(found[0].limit, 6), found[0].method) == (800.0, "dense")
        for row, (tighter, _) in zip(found, itertools.pairwise([*found, None]), strict=True):
            allowed = [c for c in costs if c.cost <= row.limit]
            assert row.mean == max(values[c.method, c.sparsity, 0] for c in allowed)
            assert row.cost <= row.limit
            assert tighter is row
    assert best_within([], ()) == ()


def test_the_limits_halve_or_part_a_short_range_in_three():
    rows = summarize({("dense", 0.0, 0): 0.9, ("a", 0.5, 0): 0.8, ("b", 0.5, 0): 0.7})
    costs = [Cost("dense", 0.0, 64.0), Cost("a", 0.5, 7.0), Cost("b", 0.5, 3.0)]
    assert [(round(w.limit, 3), w.method) for w in best_within(costs, rows)] == [(64, "dense"), (8, "a"), (4, "b")]
    costs = [Cost("dense", 0.0, 8.0), Cost("a", 0.5, 4.0), Cost("b", 0.5, 1.0)]
    assert [(round(w.limit, 3), w.method) for w in best_within(costs, rows)] == [(8, "dense"), (4, "a"), (1, "b")]
    costs = [Cost("dense", 0.0, 3.375), Cost("a", 0.5, 2.0), Cost("b", 0.5, 1.0)]
    assert [(round(w.limit, 3), w.method) for w in best_within(costs, rows)] == [
        (3.375, "dense"),
        (2.25, "a"),
        (1, "b"),
    ]
    assert [w.method for w in best_within([Cost("a", 0.5, 2.0)], rows)] == ["a"]


def comparison(tmp_path):
    results = []
    for i, (method, sparsity) in enumerate([("dense", 0.0), ("gmp", 0.9), ("lth", 0.9), ("gmp", 0.95)]):
        for seed in range(3):
            name = f"{method}-{sparsity}-{seed}"
            results.append(forge.write(tmp_path / name, method, sparsity, seed, 0.9 - i / 50 + (seed * (i + 1)) / 500))
    return compare_runs(
        results,
        skipped=[Skipped("x", "not a run")],
        failures=[Failure("rigl 90% seed 0", "rigl-0.9-0", "ValueError: [bold]no[/]\n\nTraceback: ...")],
    )


def test_every_form_of_the_table_holds_the_same_numbers(tmp_path):
    made = comparison(tmp_path)
    console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
    print_comparison(console, made)
    shown, page, tree = console.export_text(), markdown(made), json.loads(to_json(made))
    row = next(r for r in made.summaries if (r.method, r.sparsity) == ("gmp", 0.9))
    cell = f"{100 * row.mean:.2f} ± {100 * row.half_width:.2f}"
    assert cell in shown and cell in page
    assert row.mean in [r["mean"] for r in tree["summaries"]]
    line = next(line for line in to_csv(made).splitlines() if line.startswith("gmp,0.9,"))
    assert line.split(",")[2:4] == ["0 1 2", f"{row.mean:.6g}"]
    assert len(tree["runs"]) == 12 and {r["method"] for r in tree["runs"]} == {"dense", "gmp", "lth"}
    for text in (shown, page):
        assert "gmp - lth" in text and "ValueError: [bold]no[/]" in text and "x: not a run" in text
        assert "`lth` trains in 5 rounds; all of them share the 45 steps that every method has" in text


def test_markup_in_a_name_stays_text_and_bars_keep_their_column():
    rows = {("a|b [red]", 0.9, 0): 0.5}
    assert accuracy_table(rows).splitlines()[2] == "| a\\|b [red] | 50.00 | 1 |"


def test_times_compare_only_under_one_set_of_conditions(tmp_path):
    groups = {}
    for i, (processor, threads) in enumerate([("P", 1), ("P", 1), ("P", 2), ("Q", 1)]):
        made = forge.write(tmp_path / str(i), seed=i, sparsity=0.9 + i / 100)
        bench = {"threads": threads, "shape": [1, 1, 8, 8], "processor": processor, "seconds": {"mirrormask": 1e-5 + i}}
        (tmp_path / str(i) / "bench.json").write_text(json.dumps(bench))
        groups["gmp", made.sparsity_asked] = [made]
    costs, where = time_costs(groups)
    assert where == "P, 1 thread(s), 1 image(s) at a time"
    assert [cost.sparsity for cost in costs] == [0.9, 0.91]
    assert time_costs({}) == ((), "")


def test_the_second_run_of_a_cell_is_skipped_and_no_run_is_an_error(tmp_path):
    a, b = forge.write(tmp_path / "a"), forge.write(tmp_path / "b", accuracy=0.1)
    made = compare_runs([a, b])
    assert made.summaries[0].mean == 0.8
    assert made.skipped == (Skipped(str(tmp_path / "b"), f"the same method, sparsity and seed as {tmp_path / 'a'}"),)
    with pytest.raises(ValueError, match="there is no finished run"):
        compare_runs([], skipped=[Skipped("x", "not a run")])
