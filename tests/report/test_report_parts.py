"""The parts of the page, on tables that an eye can check."""

import json

import pytest
import torch
from synthetic_runs import make_run, picture

from mirrormask.report import changes, curves, distributions
from mirrormask.report.findings import findings
from mirrormask.report.setting import pareto, settle


def settled(tmp_path, accuracies):
    """A setting with these accuracies: (method, sparsity) -> one value a seed."""
    results = []
    for (method, sparsity), values in accuracies.items():
        for seed, value in enumerate(values):
            results.append(make_run(tmp_path / f"{method}{sparsity}{seed}", method, sparsity, seed, accuracy=value))
    return settle(results)


@pytest.mark.parametrize(
    ("accuracies", "heading"),
    [
        ({("dense", 0.0): [0.9]}, "The dense model reaches 90.0%"),
        ({("mirror", 0.9): [0.8]}, "mirror reaches 80.0% at 90%"),
        (
            {("dense", 0.0): [0.9, 0.9], ("mirror", 0.9): [0.88, 0.88]},
            "mirror reaches 88.0% at 90%, 2.0\u00a0points below the dense model",
        ),
        (
            {("dense", 0.0): [0.9], ("mirror", 0.9): [0.913]},
            "mirror reaches 91.3% at 90%, 1.3\u00a0points above the dense model",
        ),
        (
            {("mirror", 0.99): [0.9, 0.91, 0.92], ("gmp", 0.99): [0.887, 0.8972, 0.9068]},
            "mirror leads gmp by 1.30\u00a0±\u00a00.05\u00a0points at 99%",
        ),
        (
            {("mirror", 0.99): [0.9, 0.93], ("gmp", 0.99): [0.91, 0.9]},
            "mirror leads gmp by 1.0\u00a0±\u00a025.4\u00a0points at 99%, within chance",
        ),
        ({("mirror", 0.99): [0.9], ("gmp", 0.99): [0.9]}, "mirror and gmp are level at 99%"),
        # The sparsity with most methods, not the highest.
        (
            {("mirror", 0.9): [0.9], ("gmp", 0.9): [0.8], ("gmp", 0.99): [0.5]},
            "mirror leads gmp by 10.0\u00a0points at 90%, not tested",
        ),
        # Settings of one method are no rivals of each other; of three methods the best other one is named as such.
        (
            {
                ("mirror", 0.9): [0.9, 0.91],
                ("mirror/descent", 0.9): [0.899, 0.909],
                ("str", 0.9): [0.88, 0.892],
                ("gmp", 0.9): [0.8, 0.81],
            },
            "mirror leads the best other method, str, by 1.9\u00a0±\u00a01.3\u00a0points at 90%, within chance",
        ),
        (
            {("mirror", 0.9): [0.9], ("mirror/descent", 0.9): [0.91]},
            "mirror/descent is the best of 2 settings of mirror at 90%: 91.0%",
        ),
        # Only one seed is shared: what is said is the difference there.
        (
            {("mirror", 0.9): [0.9, 0.95], ("gmp", 0.9): [0.89]},
            "mirror leads gmp by 1.0\u00a0points at 90%, not tested",
        ),
    ],
)
def test_the_heading_of_the_page(tmp_path, accuracies, heading):
    assert findings(settled(tmp_path, accuracies))["accuracy"] == heading


def test_other_headings(tmp_path):
    setting = settled(
        tmp_path,
        {
            ("dense", 0.0): [0.90, 0.91],
            ("mirror", 0.9): [0.90, 0.90],
            ("mirror", 0.99): [0.897, 0.898],
            ("gmp", 0.9): [0.90, 0.90],
            ("gmp", 0.99): [0.80, 0.80],
        },
    )
    said = findings(setting)
    assert said["closeness"] == "mirror stays within a point of the dense model's 90.5% at 99%"
    assert said["size"] == "mirror at 99% keeps 89.8% in a file of 12.6\u00a0kB, 84 times smaller than dense"
    assert said["time"] == ""
    assert said["significance"] == "1 of 2 differences between methods is more than chance"
    assert setting.methods == ("mirror", "gmp", "dense")


def test_without_a_method_near_the_dense_one_the_most_accurate_is_named(tmp_path):
    setting = settled(tmp_path, {("dense", 0.0): [0.9], ("mirror", 0.9): [0.85], ("gmp", 0.99): [0.8]})
    said = findings(setting)
    assert said["closeness"] == "No method stays within a point of the dense model's 90.0%"
    assert said["size"].startswith("mirror at 90% keeps 85.0% in a file of")


def test_no_pair_can_be_tested_with_one_seed(tmp_path):
    setting = settled(tmp_path, {("mirror", 0.9): [0.9], ("gmp", 0.9): [0.8]})
    assert findings(setting)["significance"].startswith("No difference between methods can be tested")


def test_the_pareto_front_of_six_points():
    points = [(1, 0.5), (2, 0.7), (3, 0.7), (2, 0.6), (4, 0.9), (5, 0.9)]
    assert pareto(points) == [True, True, False, False, True, False]
    assert pareto([]) == []


@pytest.mark.parametrize("n", [1, 2, 5, 60, 61, 1000])
def test_a_thinned_curve_keeps_its_ends_and_its_order(n):
    kept = curves.places(n, 60)
    assert len(kept) == min(n, 60)
    assert (kept[0], kept[-1]) == (0, n - 1)
    assert kept == sorted(set(kept))


def test_curves_of_a_small_log(tmp_path):
    lines = [
        {"event": "step", "epoch_progress": 0.5, "loss": 2.0, "alpha": 0.0, "median_a": None},
        {"event": "epoch", "epoch_progress": 1.0, "loss": 1.0, "alpha": 0.0, "median_a": None, "test_accuracy": 0.5},
        {"event": "final", "epoch_progress": 1.0, "loss": 9.0, "alpha": 9.0},
        {"event": "epoch", "epoch_progress": "soon", "loss": 9.0},
        [1, 2],
    ]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert curves.curves(tmp_path, 10) == {
        "epoch": {"x": [1.0], "test_accuracy": [0.5]},
        "step": {"x": [0.5, 1.0], "loss": [2.0, 1.0], "alpha": 0.0},
    }
    assert curves.curves(tmp_path / "nowhere", 10) is None


def predictions(predicted, images=()):
    return {
        "classes": ["cat", "dog"],
        "truth": [0, 0, 1, 1, 1],
        "predicted": predicted,
        "images": {i: picture(i, 2) for i in images},
    }


def test_what_changed_between_two_models():
    dense, sparse = predictions([0, 1, 1, 1, 0], [1, 4]), predictions([1, 0, 1, 1, 0], [0, 4])
    assert changes.changes(dense, sparse) == {
        "n": 5,
        "changed": 2,
        "lost": 1,
        "won": 1,
        "by_class": [["cat", 2, 1, 1], ["dog", 3, 2, 2]],
        "examples": [["cat", "cat", "dog", picture(0, 2)], ["cat", "dog", "cat", picture(1, 2)]],
    }
    assert len(changes.changes(dense, sparse, shown=1)["examples"]) == 1


def test_models_that_saw_other_images_are_not_compared():
    other = {**predictions([0] * 5), "truth": [1, 0, 1, 1, 1]}
    assert changes.changes(predictions([0] * 5), other) is None


@pytest.mark.parametrize(
    "change",
    [
        {"truth": [0]},
        {"predicted": [0, 1, 2, 3, 9]},
        {"predicted": [0, 0, 0, 0, True]},
        {"classes": [1, 2]},
        {"images": []},
    ],
)
def test_predictions_that_no_run_wrote_are_none(tmp_path, change):
    tree = {**predictions([0] * 5), "images": {"1": picture(1, 2)}}
    (tmp_path / "predictions.json").write_text(json.dumps(tree))
    assert changes.read(tmp_path) == {**predictions([0] * 5), "images": {1: picture(1, 2)}}
    (tmp_path / "predictions.json").write_text(json.dumps({**tree, **change}))
    assert changes.read(tmp_path) is None


def test_histograms_as_the_page_has_them(tmp_path):
    from mirrormask.train.distributions import histogram

    x = histogram(torch.tensor([-1.0, 0.0, 1.0]), bins=3)
    layer = {"name": "a", "start": x, "trained": x, "final": x, "imbalance": None, "imbalance_start": None}
    (tmp_path / "distributions.json").write_text(json.dumps({"version": 1, "layers": [layer]}))
    expected = [-1.0, 1.0, 1, [1, 0, 1]]
    assert distributions.read(tmp_path) == [["a", expected, None, expected, None, None]]
    layer["final"] = {**x, "counts": ["<b>"]}
    (tmp_path / "distributions.json").write_text(json.dumps({"version": 1, "layers": [layer]}))
    assert distributions.read(tmp_path) is None


def test_a_comparison_s_own_names_are_used_wherever_it_lies_now(tmp_path):
    results = [
        make_run(tmp_path / f"{i}", "pilot", 0.9, i % 2, options=o) for i, o in enumerate([{}, {}, {"beta": 1.0}])
    ]
    assert settle(results).methods == ("pilot", "pilot beta=1.0")
    rows = [{"folder": f"/elsewhere/{i}", "method": "pilot/literal" if i == 2 else "pilot"} for i in range(3)]
    (tmp_path / "comparison.json").write_text(json.dumps({"runs": rows}))
    assert set(settle(results).methods) == {"pilot", "pilot/literal"}
    for damaged in ("{", '{"runs": 3}', '{"runs": [{}]}', "[]"):
        (tmp_path / "comparison.json").write_text(damaged)
        assert set(settle(results).methods) == {"pilot", "pilot beta=1.0"}


def test_a_name_that_two_comparisons_give_to_different_methods_is_not_used(tmp_path):
    results = []
    for folder, options in (("a", {}), ("b", {"beta": 1.0})):
        results.append(make_run(tmp_path / folder / "run", "pilot", options=options))
        (tmp_path / folder / "comparison.json").write_text(json.dumps({"runs": [{"folder": "run", "method": "mine"}]}))
    assert set(settle(results).methods) == {"pilot", "pilot beta=1.0"}
