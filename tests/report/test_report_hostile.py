"""Runs that somebody forged or broke: each is set aside by name, and the page is made of the others."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from synthetic_runs import make_run

from mirrormask.compare import load_runs, measured
from mirrormask.compare.runs import labels
from mirrormask.report import changes, curves, distributions
from mirrormask.report.material import gather
from mirrormask.train import RunResult, log

HUGE = 10**400


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def put(*keys, value):
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        tree[keys[-1]] = value

    return change


def without(*keys):
    def change(tree):
        for key in keys[:-1]:
            tree = tree[key]
        del tree[keys[-1]]

    return change


RESULTS = {
    "steps": put("steps", value=HUGE),
    "negative": put("steps", value=-(2**70)),
    "seconds": put("seconds", value=HUGE),
    "loss": put("train_loss", value="x"),
    "bool": put("epochs", value=True),
    "numel": put("layers", 0, "numel", value=HUGE),
    "shape": put("layers", 0, "shape", value=[HUGE]),
    "input": put("input_shape", value=[HUGE, 1, 1]),
    "options-deep": put("recipe", "method", "options", value={"a": nested(900)}),
    "options-list": put("recipe", "method", "options", value=[1]),
    "options-null": put("recipe", "method", "options", value=None),
    "options-huge": put("recipe", "method", "options", value={"a": HUGE}),
    "name": put("recipe", "model", "name", value=3),
    "no-method": without("recipe", "method"),
    "no-epochs": without("recipe", "epochs"),
    "no-data": without("recipe", "data"),
    "section": put("recipe", "data", value=None),
    "lr": put("recipe", "optimizer", "lr", value=HUGE),
    "other-method": put("method", value="gmp"),
    "other-seed": put("recipe", "seed", value=5),
    "environment": put("environment", value={"versions": nested(900)}),
    "no-layers": without("layers"),
    "list": lambda tree: [tree],
}


def change_file(path, change):
    tree = json.loads(path.read_text())
    path.write_text(json.dumps(change(tree) or tree))


def test_each_forged_result_is_set_aside_by_name_and_the_page_is_made(tmp_path):
    make_run(tmp_path / "good", seed=99)
    for number, (name, change) in enumerate(RESULTS.items()):
        make_run(tmp_path / name, seed=number, extras=False)
        change_file(tmp_path / name / "result.json", change)
    material = gather([tmp_path])
    assert material.runs == 1
    why = {entry.path.rpartition("/")[2]: entry.reason for entry in material.skipped}
    assert set(why) == set(RESULTS)
    assert all(reason.startswith("damaged: ") and len(reason) < 1000 for reason in why.values())


@pytest.mark.parametrize("section", ["method", "data", "model", "optimizer", "schedule"])
def test_what_a_recipe_leaves_out_is_its_default_or_the_run_is_set_aside(tmp_path, section):
    make_run(tmp_path / "good", seed=99)
    make_run(tmp_path / "bare", method="mirror")
    change_file(tmp_path / "bare" / "result.json", put("recipe", section, value={}))
    material = gather([tmp_path])
    assert material.runs + len(material.skipped) == 2
    results = load_runs([tmp_path]).results
    assert all(isinstance(result.recipe[section], dict) and result.recipe[section] for result in results)
    assert len(labels(results)) == len(results) >= 1


FORGED = [str(HUGE), json.dumps(nested(900)), "null", "[]", '"x"', "-1", "1e400", "true", "{}"]


@pytest.mark.parametrize("name", ["bench.json", "distributions.json", "predictions.json", "log.jsonl"])
def test_a_forged_value_anywhere_beside_a_result_costs_its_section_only(tmp_path, name):
    made = make_run(tmp_path / "run", timed=True, epochs=2, images=6, shapes={"1.weight": (3, 4)})
    path = tmp_path / "run" / name
    whole = path.read_text()
    places = [at for at in range(len(whole)) if whole[at - 2 : at] in (": ", ", ") or whole[at - 1] == "["]
    for at in places[:: max(1, len(places) // 40)]:
        for number, forged in enumerate(FORGED):
            end = min(e for e in (whole.find(c, at + 1) for c in ",]}\n") if e > 0)
            if number % 3 == at % 3:
                path.write_text(whole[:at] + forged + whole[end:])
                curves.curves(tmp_path / "run", 40)
                changes.read(tmp_path / "run")
                distributions.read(tmp_path / "run")
                measured(made)
                if at == places[0]:
                    assert gather([tmp_path / "run"]).runs == 1


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just(HUGE),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
KEYS = ["steps", "seconds", "recipe", "layers", "method", "test_accuracy", "environment", "numel", "input_shape"]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=VALUES, cut=st.integers(0, 4000))
def test_any_result_is_read_or_named(tmp_path, key, value, cut):
    folder = tmp_path / "run"
    if not folder.exists():
        make_run(folder, extras=False)
        (tmp_path / "whole").write_text((folder / "result.json").read_text())
    tree = json.loads((tmp_path / "whole").read_text())
    tree[key] = value
    text = json.dumps(tree)
    (folder / "result.json").write_text(text if cut % 3 else text[:cut])
    found = load_runs([folder])
    assert len(found.results) + len(found.skipped) == 1


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(raw=st.binary(max_size=80) | st.dictionaries(st.text(max_size=5), VALUES).map(lambda d: json.dumps(d).encode()))
def test_any_bytes_are_read_or_passed_over(tmp_path, raw):
    for name in ("log.jsonl", "distributions.json", "predictions.json", "bench.json", "result.json"):
        (tmp_path / name).write_bytes(raw)
    assert isinstance(log.read(tmp_path), list)
    curves.curves(tmp_path, 40)
    assert distributions.read(tmp_path) is None or raw.startswith(b"{")
    changes.read(tmp_path)
    with pytest.raises(ValueError, match="is damaged"):
        RunResult.read(tmp_path)
