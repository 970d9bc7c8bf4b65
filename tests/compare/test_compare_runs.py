"""Folders of runs: every finished one is found once, everything else is named, nothing is fatal."""

import json
import os
import shutil
from pathlib import Path

import compare_forge as forge

from mirrormask.compare import by_setting, labels, load_runs, measured
from mirrormask.train import Optimizer, run


def reasons(runs):
    return {os.path.basename(skipped.path): skipped.reason for skipped in runs.skipped}


def test_runs_are_found_at_any_depth_in_the_order_of_their_paths(tmp_path):
    for name in ("b/gmp", "a/x/y/gmp", ".dense/12ab"):
        forge.write(tmp_path / name, seed=len(name))
    found = load_runs([tmp_path])
    assert [os.path.relpath(r.folder, tmp_path) for r in found.results] == [".dense/12ab", "a/x/y/gmp", "b/gmp"]
    assert found.skipped == ()
    assert load_runs([tmp_path / "b" / "gmp"]).results == (found.results[2],)


def test_a_real_run_is_read(tmp_path):
    made = run(forge.recipe(out=tmp_path / "run"))
    assert load_runs([str(tmp_path)]).results == (made,)
    assert load_runs([tmp_path]).skipped == ()


def test_a_run_is_counted_once_through_links_loops_copies_and_repeated_arguments(tmp_path):
    forge.write(tmp_path / "runs" / "one")
    (tmp_path / "runs" / "last").symlink_to("one")
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    once = load_runs([tmp_path / "runs", tmp_path / "runs" / "last", tmp_path])
    assert [r.folder for r in once.results] == [str(tmp_path / "runs" / "one")]
    assert once.skipped == ()
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "two")
    assert reasons(load_runs([tmp_path])) == {"two": f"the same run as {tmp_path / 'runs' / 'one'}"}


def test_a_link_to_elsewhere_is_followed(tmp_path):
    forge.write(tmp_path / "far" / "run")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "last").symlink_to(tmp_path / "far" / "run")
    (tmp_path / "runs" / "gone").symlink_to(tmp_path / "nothing")
    found = load_runs([tmp_path / "runs"])
    assert len(found.results) == 1
    assert reasons(found) == {"gone": "not a run"}


def test_what_is_no_finished_run_is_named_with_its_reason(tmp_path):
    good = forge.write(tmp_path / "good")
    text = (tmp_path / "good" / "result.json").read_text()
    for name in ("cut", "binary", "list", "text", "deep", "nan", "types", "missing", "share", "recipe"):
        (tmp_path / name).mkdir()
    tree = json.loads(text)
    (tmp_path / "cut" / "result.json").write_text(text[: len(text) // 2])
    (tmp_path / "binary" / "result.json").write_bytes(bytes(range(256)))
    (tmp_path / "list" / "result.json").write_text("[1, 2]")
    (tmp_path / "text" / "result.json").write_text('"hello"')
    (tmp_path / "deep" / "result.json").write_text("[" * 200_000)
    (tmp_path / "nan" / "result.json").write_text(json.dumps({**tree, "test_accuracy": float("nan"), "seed": 7}))
    (tmp_path / "types" / "result.json").write_text(json.dumps({**tree, "file_bytes": "1 kB", "seed": 8}))
    (tmp_path / "missing" / "result.json").write_text(json.dumps({k: v for k, v in tree.items() if k != "numel"}))
    (tmp_path / "share" / "result.json").write_text(json.dumps({**tree, "test_accuracy": 80.0}))
    (tmp_path / "recipe" / "result.json").write_text(json.dumps({**tree, "recipe": {"epochs": 0}}))
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "checkpoint.pt").write_bytes(b"")
    (tmp_path / "failed").mkdir()
    (tmp_path / "failed" / "recipe.yaml").write_text("")
    (tmp_path / "failed" / "error.txt").write_text("ValueError: no\n\nTraceback: ...")
    (tmp_path / "holiday").mkdir()
    (tmp_path / "holiday" / "photo.png").write_bytes(b"png")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "comparison.csv").write_text("ours")
    (tmp_path / ".DS_Store").write_text("")
    found = load_runs([tmp_path, tmp_path / "absent", tmp_path / "notes.txt"])
    assert found.results == (good,)
    why = reasons(found)
    damaged = {name for name, reason in why.items() if reason.startswith("damaged: ")}
    assert damaged == {"cut", "binary", "list", "text", "deep", "nan", "types", "missing", "share", "recipe"}
    assert "is malformed" in why["nan"] and "Expected `int`, got `str` - at `$.file_bytes`" in why["types"]
    assert why["unfinished"] == "unfinished: it has no result.json"
    assert why["failed"] == "failed: ValueError: no"
    assert why["holiday"] == "not a run" and why["notes.txt"] == "a file, not a folder"
    assert why["absent"] == "does not exist"
    assert set(why) == damaged | {"unfinished", "failed", "holiday", "notes.txt", "absent"}


def test_a_folder_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    listed = Path.iterdir

    def iterdir(path):  # root, who runs tests in containers, may read every real folder
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    assert reasons(load_runs([tmp_path])) == {"closed": "cannot be read: Permission denied"}


def test_labels_name_the_options_that_differ():
    def of(method, **options):
        return forge.result(forge.recipe(method, options=options))

    assert labels([of("gmp"), of("mirror", gain=0.5)]) == ["gmp", "mirror"]
    assert labels([of("gmp", end_at=0.5), of("gmp", end_at=0.6)]) == ["gmp end_at=0.5", "gmp end_at=0.6"]
    assert labels([of("gmp"), of("gmp", end_at=0.6)]) == ["gmp", "gmp end_at=0.6"]
    known = {"gmp/late": ("gmp", {"end_at": 0.6})}
    assert labels([of("gmp"), of("gmp", end_at=0.6)], known) == ["gmp", "gmp/late"]
    fast = forge.result(forge.recipe(optimizer=Optimizer(lr=0.2)))
    known = {"gmp/fast": ("gmp", {"lr": 0.2}), "gmp": ("gmp", {})}
    assert labels([of("gmp"), fast, of("gmp", end_at=0.6)], known) == ["gmp", "gmp/fast", "gmp end_at=0.6"]


def test_runs_of_another_setting_do_not_mix():
    same = [forge.result(forge.recipe(method, seed=seed)) for method in ("gmp", "dense") for seed in (0, 1)]
    other = forge.result(forge.recipe(epochs=2))
    threads = forge.result(forge.recipe(seed=5, threads=2))
    groups = list(by_setting([other, *same, threads]).values())
    assert groups == [[*same, threads], [other]]


def test_a_measurement_is_read_or_passed_over(tmp_path):
    made = forge.write(tmp_path / "run")
    assert measured(made) is None
    tree = {"threads": 1, "shape": [1, 1, 8, 8], "processor": "P", "seconds": {"mirrormask": 1e-5}}
    (tmp_path / "run" / "bench.json").write_text(json.dumps(tree))
    assert measured(made) == tree
    for bad in ("", "[]", json.dumps({**tree, "seconds": {"mirrormask": "fast"}}), json.dumps({"seconds": {}})):
        (tmp_path / "run" / "bench.json").write_text(bad)
        assert measured(made) is None
