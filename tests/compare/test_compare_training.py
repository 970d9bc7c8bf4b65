"""Grids that are trained: each cell once, whatever fails, dies, fills the disk or is interrupted in between."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import compare_forge as forge
import pytest
import torch

import mirrormask as mm
from mirrormask import cli
from mirrormask.compare import data_file, runner
from mirrormask.compare.grid import Cell
from mirrormask.compare.runner import DiskFull, train_cells
from mirrormask.train import Model, RunResult, data, recipe_file, run
from mirrormask.train.lock import locked

GRID = ["--methods", "dense,gmp", "--sparsity", "0.9,0.95", "--seeds", "2", "--workers", "1"]
FAST = ["--epochs", "2", "--model.options", '{"hidden": [16]}', "--threads", "1"]


class Watch:
    """Notes what is told, and calls back when a cell has come somewhere."""

    def __init__(self, when=None):
        self.events, self.when = [], when

    def started(self, cell):
        self.events.append(("started", cell.name))

    def progressed(self, cell, fraction):
        if self.when:
            self.when(cell, fraction)

    def finished(self, cell, result):
        self.events.append(("finished", cell.name))

    def failed(self, cell, error):
        self.events.append(("failed", cell.name, error))


def cell(folder, method="gmp", seed=0, **changes):
    return Cell(method, forge.recipe(method, seed=seed, out=folder / f"{method}-{seed}", **changes))


def weights(folder):
    return mm.load(Path(folder) / "model.safetensors")


def same(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def damage(cell):
    """Lay an unfinished run there that cannot go on."""
    Path(cell.recipe.out).mkdir()
    recipe_file.save(cell.recipe, Path(cell.recipe.out) / "recipe.yaml")
    (Path(cell.recipe.out) / "checkpoints").mkdir()
    (Path(cell.recipe.out) / "checkpoints" / "step-000000045.safetensors").write_bytes(b"damaged")


def training_in(folder):
    """Processes that have a file of the folder open or mapped."""
    found = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            found += [maps.parent.name] if str(folder) in maps.read_text() else []
    return found


def heed_interrupts():
    """What a shell starts in the background ignores SIGINT, and so does all that it starts, the tests among them."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def times(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).glob("*/result.json")}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """A small comparison that went well, and what it printed."""
    out = tmp_path_factory.mktemp("compared") / "c"
    with contextlib.redirect_stdout(io.StringIO()) as text:
        status = cli.main(["compare", *GRID, *FAST, "--out", str(out)])
    assert status == 0, text.getvalue()
    return out, text.getvalue()


def test_a_comparison_trains_every_cell_once_and_writes_the_tables(compared):
    out, text = compared
    assert {path.name for path in out.iterdir()} == {
        *("dense-0-0", "dense-0-1", "gmp-0.9-0", "gmp-0.9-1", "gmp-0.95-0", "gmp-0.95-1"),
        *("comparison.json", "comparison.csv", "comparison.md", "report.html", ".lock"),
    }
    assert "6 cells: 0 finished, 6 to train" in text and "[6/6] " in text and "0 running, 0 left" in text
    tree = json.loads((out / "comparison.json").read_text())
    assert len(tree["runs"]) == 6 and tree["failures"] == []
    assert "</html>" in (out / "report.html").read_text()
    means = {(row["method"], row["sparsity"]): row for row in tree["summaries"]}
    values = [RunResult.read(out / f"gmp-0.9-{seed}").test_accuracy for seed in (0, 1)]
    assert means["gmp", 0.9]["mean"] == pytest.approx(sum(values) / 2)
    assert f"{50 * sum(values):.2f} ± " in text and f"{50 * sum(values):.2f} ± " in (out / "comparison.md").read_text()


def test_a_cell_is_the_run_that_train_would_make(compared, tmp_path):
    out, _ = compared
    recipe = recipe_file.from_dict({**RunResult.read(out / "gmp-0.95-1").recipe, "out": str(tmp_path / "alone")})
    run(recipe)
    assert same(out / "gmp-0.95-1", tmp_path / "alone")


def test_the_same_command_again_trains_nothing(compared, capsys, monkeypatch):
    out, _ = compared
    before = times(out)
    monkeypatch.setattr(runner, "train_cells", None)
    assert cli.main(["compare", *GRID, *FAST, "--out", str(out)]) == 0
    assert "6 cells: 6 finished, 0 to train" in capsys.readouterr().out
    assert times(out) == before and len(before) == 6


def test_runs_made_elsewhere_join_the_table_and_stay_as_they_are(compared, tmp_path, capsys, monkeypatch):
    out, _ = compared
    other = tmp_path / "other"
    forge.write(other / "mirror", "mirror", epochs=2, model=Model("mlp", {"hidden": [16]}))
    forge.write(other / "foreign", "mirror", epochs=3)
    shutil.copytree(out / "gmp-0.9-0", other / "copy")
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    arguments = ["compare", "--import", f"{out},{other}", "--out", str(tmp_path / "joined")]
    assert cli.main(arguments) == 0
    tree = json.loads((tmp_path / "joined" / "comparison.json").read_text())
    assert len(tree["runs"]) == 7 and {row["method"] for row in tree["summaries"]} == {"dense", "gmp", "mirror"}
    assert {os.path.basename(s["path"]): s["reason"] for s in tree["skipped"]} == {
        "foreign": "other data, model or budget",
        "copy": f"the same run as {out / 'gmp-0.9-0'}",
    }
    # With a grid: its cells that were imported are not trained.
    monkeypatch.setattr(runner, "train_cells", None)
    assert cli.main([*arguments, *GRID, *FAST]) == 0
    text = capsys.readouterr().out
    assert "6 cells are imported" in text and "0 to train" in text
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before


def test_a_second_comparison_in_the_same_folder_is_refused(tmp_path, capsys):
    out = tmp_path / "c"
    with locked(out / ".lock"):
        assert cli.main(["compare", *GRID, *FAST, "--out", str(out)]) == 2
    assert f"another comparison is at work in '{out}'" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == [".lock"]


def test_a_damaged_and_a_killed_cell_are_reported_and_the_others_go_on(tmp_path):
    damaged, killed, good = cell(tmp_path, seed=1), cell(tmp_path, seed=2, epochs=400), cell(tmp_path, seed=3)
    damage(damaged)

    def kill(cell, fraction):
        if cell is killed and fraction > 0:
            (child,) = multiprocessing.active_children()
            os.kill(child.pid, signal.SIGKILL)

    watch = Watch(kill)
    failures = train_cells(
        [damaged, killed, good], workers=1, threads=1, splits=data.load(data.Data()), scratch=tmp_path, watcher=watch
    )
    assert [failure.cell for failure in failures] == ["gmp 90% seed 1", "gmp 90% seed 2"]
    assert "is damaged" in failures[0].error and "killed by signal 9 (SIGKILL)" in failures[1].error
    assert (tmp_path / "gmp-1" / "error.txt").read_text() == failures[0].error
    assert [event[:2] for event in watch.events] == [
        ("started", damaged.name),
        ("failed", damaged.name),
        ("started", killed.name),
        ("failed", killed.name),
        ("started", good.name),
        ("finished", good.name),
    ]
    assert not (tmp_path / data_file.NAME).exists()
    assert RunResult.read(good.recipe.out).nonzeros == RunResult.read(good.recipe.out).nonzeros_asked


def test_a_failed_cell_gives_a_status_and_is_tried_again(tmp_path, capsys):
    out = tmp_path / "c"
    grid = ["compare", "--methods", "dense,gmp", "--sparsity", "0.9", "--seeds", "1", *FAST, "--out", str(out)]
    small = {"epochs": 2, "model": Model("mlp", {"hidden": [16]})}
    finished = forge.write(out / "dense-0-0", "dense", **small)
    bad = out / "gmp-0.9-0"
    damage(Cell("gmp", forge.recipe(out=bad, **small)))
    assert cli.main(grid) == 1
    text = capsys.readouterr().out
    assert "gmp 90% seed 0 failed: CheckpointError: every checkpoint" in text and "80.00" in text
    assert "failed: gmp 90% seed 0: CheckpointError: every checkpoint" in text
    tree = json.loads((out / "comparison.json").read_text())
    assert [failure["cell"] for failure in tree["failures"]] == ["gmp 90% seed 0"] and len(tree["runs"]) == 1
    shutil.rmtree(bad / "checkpoints")
    assert cli.main(grid) == 0
    assert not (bad / "error.txt").exists()
    assert RunResult.read(out / "dense-0-0") == finished


def test_a_full_disk_is_one_clear_error_and_no_finished_cell_is_lost(tmp_path):
    # A limit on the size of files stands for the disk: mirror's checkpoint is larger than the dense run's.
    wide = {"model": Model("mlp", {"hidden": [512]})}
    cells = [cell(tmp_path, method, **wide) for method in ("dense", "mirror", "gmp")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = (450_000, before[1])

    class FillDisk(Watch):
        def started(self, cell):
            super().started(cell)
            for worker in multiprocessing.active_children():  # a fork of a server that may be older than the limit
                resource.prlimit(worker.pid, resource.RLIMIT_FSIZE, limit)

    watch = FillDisk()
    resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    try:
        with pytest.raises(DiskFull, match=r"is full: mirror 90% seed 0 could not be written, 1 cells were not begun"):
            train_cells(cells, workers=1, threads=1, splits=data.load(data.Data()), scratch=tmp_path, watcher=watch)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert RunResult.read(tmp_path / "dense-0").test_accuracy > 0.5
    assert mm.load(tmp_path / "dense-0" / "model.safetensors")
    assert not (tmp_path / "gmp-0").exists() and not (tmp_path / "mirror-0" / "result.json").exists()
    assert not list(tmp_path.rglob("*.part")) and not (tmp_path / data_file.NAME).exists()


def test_a_disk_without_room_for_the_data_is_said_so(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DiskFull, match="no room for the data set"):
            splits = data.load(data.Data())
            train_cells([cell(tmp_path)], workers=1, threads=1, splits=splits, scratch=tmp_path, watcher=Watch())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.early
def test_an_interrupted_comparison_ends_cleanly_and_goes_on_where_it_stopped(tmp_path, capsys):
    out = tmp_path / "c"
    grid = ["compare", "--methods", "dense,gmp", "--sparsity", "0.9", "--seeds", "1", "--workers", "1"]
    grid += [*FAST[2:], "--epochs", "8", "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "mirrormask.cli", *grid],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_interrupts,
    )
    try:
        deadline = time.monotonic() + 240
        while not list((out / "gmp-0.9-0").glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert training_in(out)  # the worker maps the data
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
        text, error = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, text + error
    assert "interrupted; run the same command again to go on" in error and "Traceback" not in text + error
    assert training_in(out) == []
    assert not (out / data_file.NAME).exists() and not list(out.rglob("*.part"))
    before = times(out)
    assert [path.parent.name for path in before] == ["dense-0-0"]
    assert cli.main(grid) == 0
    assert "2 cells: 1 finished, 1 to train" in capsys.readouterr().out
    assert times(out).items() > before.items()
    whole = recipe_file.from_dict({**RunResult.read(out / "gmp-0.9-0").recipe, "out": str(tmp_path / "whole")})
    run(whole)
    assert same(out / "gmp-0.9-0", tmp_path / "whole")


@pytest.mark.long
def test_a_killed_comparison_holds_its_folder_until_then_and_goes_on_as_if_nothing_had_been(tmp_path, capsys):
    out = tmp_path / "c"
    grid = ["compare", "--methods", "gmp", "--sparsity", "0.9", "--seeds", "1", "--workers", "1"]
    grid += [*FAST[2:], "--epochs", "30", "--out", str(out)]
    process = subprocess.Popen([sys.executable, "-m", "mirrormask.cli", *grid], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not list((out / "gmp-0.9-0").glob("checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert cli.main(grid) == 2
        assert "another comparison is at work in" in capsys.readouterr().err
        assert training_in(out)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 60
    while training_in(out) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert training_in(out) == []  # the workers have ended with it
    assert not (out / "gmp-0.9-0" / "result.json").exists()
    assert cli.main(grid) == 0
    assert not (out / data_file.NAME).exists() and not list(out.rglob("*.part"))
    whole = recipe_file.from_dict({**RunResult.read(out / "gmp-0.9-0").recipe, "out": str(tmp_path / "whole")})
    run(whole)
    assert same(out / "gmp-0.9-0", tmp_path / "whole")


def test_what_workers_are_forked_from_has_looked_at_no_device_and_run_no_thread():
    # Whatever asks for a GPU in the server would leave its children without one; NumPy's threads alone stand a fork.
    code = f"""
import os, numpy
count = len(os.listdir("/proc/self/task"))
import torch

def asked(*_):
    raise AssertionError("the server asked for devices")

torch._C._cuda_getDeviceCount = torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = asked
for name in {runner.IMPORTS}:
    __import__(name)
assert len(os.listdir("/proc/self/task")) == count and not torch.cuda.is_initialized()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_workers_have_the_environment_of_now(tmp_path, monkeypatch):
    splits = data.load(data.Data())

    def failures(name):
        return train_cells(
            [cell(tmp_path / name)], workers=1, threads=1, splits=splits, scratch=tmp_path, watcher=Watch()
        )

    assert failures("a") == []
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NONSENSE")
    assert "NONSENSE" in failures("b")[0].error
    monkeypatch.delenv("ACCELERATE_DYNAMO_BACKEND")
    assert failures("b") == []


SCRIPT = """
from mirrormask.compare import runner

if __name__ == "__main__":
    child = runner.processes().Process(target=runner._outlive_nobody)
    child.start()
    print(child.pid, flush=True)
    child.join()
"""


@pytest.mark.long
def test_a_worker_ends_when_its_parent_is_killed(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, tmp_path / "script.py"], stdout=subprocess.PIPE, text=True)
    assert int(process.stdout.readline())
    process.kill()
    process.wait()
    process.stdout.read()  # which ends when the child, too, has closed it
