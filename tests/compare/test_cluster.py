"""Cells on a real Ray cluster of two nodes, one of which is killed; and addresses where there is none."""

import socket
import threading
import time

import compare_forge as forge
import pytest
import torch

import mirrormask as mm
from mirrormask import cli
from mirrormask.compare import cluster
from mirrormask.compare.grid import Cell
from mirrormask.compare.parcel import pack, unpack
from mirrormask.train import RunFolder, RunResult, data, log, recipe_file, run

GRID = ["compare", "--methods", "gmp", "--sparsity", "0.9", "--seeds", "1", "--epochs", "1"]


class Watch:
    """Counts how often each cell has ended."""

    def __init__(self):
        self.running, self.ended, self.errors = [], [], []

    def started(self, cell):
        self.running.append(cell.name)

    def progressed(self, cell, fraction):
        raise AssertionError("a node sends no such thing")

    def finished(self, cell, result):
        self.ended.append(cell.name)

    def failed(self, cell, error):
        self.ended.append(cell.name)
        self.errors.append(error)


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the nodes did not get so far"
        time.sleep(0.02)


def test_a_run_travels_whole_and_only_into_its_own_folder(tmp_path):
    made = run(forge.recipe(out=tmp_path / "far"))
    (tmp_path / "far" / "notes.txt").write_text("mine")
    here = forge.recipe(out=tmp_path / "near")
    unpack(pack(tmp_path / "far"), here)
    landed = RunResult.read(tmp_path / "near")
    assert landed.recipe["out"] == str(tmp_path / "near") and landed.test_accuracy == made.test_accuracy
    assert RunFolder(tmp_path / "near").held() == here
    assert not (tmp_path / "near" / "notes.txt").exists()
    for name in ("model.safetensors", "checkpoint.pt", "log.jsonl", "figure.svg"):
        assert (tmp_path / "near" / name).read_bytes() == (tmp_path / "far" / name).read_bytes()
    assert len(list((tmp_path / "near" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("name", ["../x", "/x", "notes.txt", "tensorboard/../../x"])
def test_an_archive_cannot_write_elsewhere(tmp_path, name):
    import io
    import zipfile

    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("recipe.yaml", "")
        zipped.writestr(name, "x")
    with pytest.raises(ValueError, match="no file of a run"):
        unpack(archive.getvalue(), forge.recipe(out=tmp_path / "run"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"] and not list((tmp_path / "run").iterdir())


def test_an_address_where_nothing_answers_is_a_clear_error_soon(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.monotonic()
    assert cli.main([*GRID, "--ray", f"127.0.0.1:{port}", "--out", str(tmp_path)]) == 2
    assert time.monotonic() - start < 30
    err = capsys.readouterr().err
    assert f"no Ray cluster answers at '127.0.0.1:{port}'" in err and "`ray start --head`" in err
    assert not (tmp_path / "gmp-0.9-0").exists()


def test_something_else_that_listens_there_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(cluster, "ANSWER", 2.0)
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with pytest.raises(ConnectionError, match=f"no Ray cluster answers at '{address}' within 2 s"):
            cluster.connect(address)


@pytest.mark.parametrize("address", ["nonsense", "127.0.0.1:port", "127.0.0.1:99999999"])
def test_an_address_that_is_none_is_named(address):
    with pytest.raises(ValueError, match=f"'{address}' is not host:port or auto"):
        cluster.connect(address)


def test_no_cell_is_lost_or_doubled_when_a_node_is_killed(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mirrormask[cluster]'")
    from ray.cluster_utils import Cluster

    # What is being trained on the nodes can be seen in their temporary folders; a killed one leaves its own behind.
    nodes = tmp_path / "nodes"
    nodes.mkdir()
    monkeypatch.setenv("TMPDIR", str(nodes))
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray's sockets need a short path
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    begun = lambda: list(nodes.glob("mirrormask-*/run/log.jsonl"))  # noqa: E731

    cells = [
        Cell(method, forge.recipe(method, seed=seed, epochs=24, out=tmp_path / "here" / f"{method}-{seed}"))
        for seed in range(3)
        for method in ("dense", "gmp")
    ]
    # One cell has got somewhere on this machine, and goes on from there.
    half = cells[0].recipe
    whole = run(recipe_file.from_dict({**recipe_file.to_dict(half), "out": str(tmp_path / "whole")}))
    interrupted = interrupt_at(half, 900)
    # One cannot be trained.
    bad = Cell("gmp/bad", forge.recipe("gmp", seed=9, out=tmp_path / "here" / "bad", batch_size=5000))

    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        lost, _ = head.add_node(num_cpus=1), head.add_node(num_cpus=1)
        ray = cluster.connect(head.address)
        with pytest.raises(ValueError, match=r"needs 2 CPU\(s\) and 0 GPU\(s\), but no node .*at most 1 and 0"):
            cluster.train_cells(cells, ray=ray, threads=2, gpus=0, splits=None, watcher=Watch())
        watch = Watch()

        def kill():
            wait_for(lambda: len(begun()) >= 2, 90)  # both nodes are at it
            head.remove_node(lost, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        splits = data.load(half.data)
        failures = cluster.train_cells([*cells, bad], ray=ray, threads=1, gpus=0, splits=splits, watcher=watch)
        killer.join()
        assert [node["Alive"] for node in ray.nodes() if node["Resources"].get("CPU")].count(True) == 1
    finally:
        cluster.checks.require("ray", "cluster", "this test").shutdown()
        head.shutdown()

    assert len(begun()) >= 1  # a run was cut off on the lost node
    assert sorted(watch.ended) == sorted([*(cell.name for cell in cells), bad.name])
    assert [failure.cell for failure in failures] == [bad.name] and "batch_size=5000" in watch.errors[0]
    assert "batch_size=5000" in (tmp_path / "here" / "bad" / "error.txt").read_text()
    for cell in cells:
        result = RunResult.read(cell.recipe.out)
        assert result.recipe == recipe_file.to_dict(cell.recipe)
        assert [record["event"] for record in log.read(cell.recipe.out)].count("final") == 1
    # It went on from the checkpoint that lay here, and is the run that this machine would have made.
    a, b = (mm.load(f"{folder}/model.safetensors") for folder in (half.out, whole.folder))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert log.read(half.out)[0]["seconds"] == interrupted[0]["seconds"]


def interrupt_at(recipe, step):
    """Train the recipe up to a step, as if this had been stopped there; the log so far."""
    from mirrormask.train import Observer

    class Stop(Observer):
        def stepped(self, now):
            if now == step:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run(recipe, observer=Stop())
    return log.read(recipe.out)
