"""The first table of docs/results.md is that of the results that are kept."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def summary(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import summary

    return summary


def test_the_page_begins_with_the_table_of_what_is_kept(summary):
    page = summary.PAGE.read_text()
    assert summary.BEGIN + summary.block(summary.experiments()) + summary.END in page, (
        "run python benchmarks/summary.py"
    )
    anchors = {f"## {line[3:]}" for line in page.splitlines() if line.startswith("## ")}
    for one in summary.experiments():
        titles = [a[3:].lower().replace(" ", "-").replace(",", "").replace(":", "") for a in anchors]
        assert one["anchor"] in titles


def test_a_row_names_the_best_rival_and_what_its_interval_says(summary):
    methods = {"mirror": [88.0, 0.2], "mirror/descent": [88.2, 0.1], "str": [87.5, 0.3], "gmp": [86.0, 0.1]}
    level = {"dense": [89.0, None], "methods": methods, "paired": {"str": [0.5, 0.4]}}
    one = {"network": "N", "data": "D", "budget": "B", "anchor": "n", "seeds": 3, "levels": {"98": level}}
    (row,) = [line for line in summary.block([one]).splitlines() if line.startswith("| [N")]
    assert row == ("| [N, D](#n) | B | 98% | 89.00 | 88.00 ± 0.20 | `str` 87.50 ± 0.30 | +0.50 ± 0.40, ahead | 3 |")
    assert summary.verdict(-0.5, 0.4) == "behind"
    assert summary.verdict(0.3, 0.4) == "level"
    assert summary.verdict(3.0, None) == "not tested"


def test_a_comparison_is_kept_with_its_paired_differences(summary, tmp_path):
    runs = [
        {"method": method, "sparsity": s, "seed": seed, "accuracy": base + 0.01 * seed}
        for method, s, base in (("dense", 0.0, 0.9), ("mirror", 0.98, 0.8), ("gmp", 0.98, 0.78))
        for seed in (0, 1, 2)
    ]
    runs[-1]["accuracy"] += 0.003
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": runs}))
    kept = summary.kept_of(summary.compared(tmp_path), {"network": "N", "data": "D", "budget": "B", "anchor": "n"})
    level = kept["levels"]["98"]
    assert kept["seeds"] == 3
    assert level["dense"][0] == 91.0
    assert level["methods"]["mirror"][0] == 81.0
    assert level["paired"]["gmp"] == [1.9, 0.43]  # 2, 2 and 1.7 points: t s / sqrt(3) = 4.303 * 0.173 / 1.732
    assert summary.rival(level) == "gmp"

    # What has as many seeds is kept beside it; of what has another number, the sparsities that it lacks.
    other = {"dense": None, "methods": {"str": [70.0, None]}, "paired": {}}
    again = {**kept, "levels": {"98": other, "95": other}}
    fewer = {**kept, "seeds": 1, "levels": {"98": other, "99.5": other}}
    both, left = summary.with_others(kept, [fewer, again])
    assert both["levels"] == {"98": {**level, "methods": {**other["methods"], **level["methods"]}}, "95": other}
    assert left == {**fewer, "levels": {"99.5": other}}

    cells = [
        {"cell": [kind, "n", base, 200, 0.9, "gmp", "{}", 0.05, seed], "accuracy": 0.8}
        for kind, base, seed in (("trial", "sgd", 0), ("run", "sgd", 0), ("run", "sgd", 1), ("run", "adamw", 0))
    ]
    lines = [*cells, {"dense": "n", "seed": 0, "accuracy": 0.9, "steps": 10}]
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert summary.fine_tuned(tmp_path, "sgd/200") == {
        ("gmp", 0.9, 0): 0.8,
        ("gmp", 0.9, 1): 0.8,
        ("dense", 0.0, 0): 0.9,
    }
    del sys.modules["summary"]
