"""Cells on a real Ray cluster of two nodes, one of which is killed; and addresses where there is none."""

import io
import json
import socket
import threading
import time
import zipfile

import compare_forge as forge
import pytest
import torch

import mirrormask as mm
from mirrormask import cli
from mirrormask.compare import cluster, training
from mirrormask.compare.options import parse
from mirrormask.compare.parcel import pack, unpack
from mirrormask.compare.progress import Progress
from mirrormask.train import Observer, RunFolder, RunResult, data, log, recipe_file, run

GRID = ["compare", "--methods", "gmp", "--sparsity", "0.9", "--seeds", "1", "--epochs", "1"]


class Watch(Progress):
    """Counts how often each cell has ended."""

    def __init__(self, console, cells, already=0):
        super().__init__(console, cells, already)
        self.ended = []
        watches.append(self)

    def finished(self, cell, result):
        super().finished(cell, result)
        self.ended.append(cell.name)

    def failed(self, cell, error):
        super().failed(cell, error)
        self.ended.append(cell.name)


watches = []


def wait_for(condition, seconds):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the nodes did not get so far"
        time.sleep(0.02)


def test_a_run_travels_whole_and_only_into_its_own_folder(tmp_path):
    made = run(forge.recipe(out=tmp_path / "far", figure=True))
    (tmp_path / "far" / "notes.txt").write_text("mine")
    here = forge.recipe(out=tmp_path / "near", figure=True)
    unpack(pack(tmp_path / "far"), here)
    landed = RunResult.read(tmp_path / "near")
    assert landed.recipe["out"] == str(tmp_path / "near") and landed.test_accuracy == made.test_accuracy
    assert RunFolder(tmp_path / "near").held() == here
    assert not (tmp_path / "near" / "notes.txt").exists()
    for name in ("model.safetensors", "checkpoints/best.safetensors", "log.jsonl", "figure.svg"):
        assert (tmp_path / "near" / name).read_bytes() == (tmp_path / "far" / name).read_bytes()
    assert len(list((tmp_path / "near" / "tensorboard").iterdir())) == 1


@pytest.mark.parametrize("name", ["../x", "/x", "notes.txt", "tensorboard/../../x"])
def test_an_archive_cannot_write_elsewhere(tmp_path, name):
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


@pytest.mark.long
def test_no_cell_is_lost_or_doubled_when_a_node_is_killed(tmp_path, monkeypatch):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'mirrormask[cluster]'")
    from ray.cluster_utils import Cluster
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    monkeypatch.setenv("RAY_TMPDIR", "/tmp")  # Ray's sockets need a short path
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # What a node trains can be seen in its temporary folder; a node that is killed leaves that behind.
    (tmp_path / "lost").mkdir()

    def begun():
        return list((tmp_path / "lost").glob("mirrormask-*/run/log.jsonl"))

    here = tmp_path / "here"
    grid = ["compare", "--methods", "dense,gmp", "--sparsity", "0.9", "--seeds", "2", "--epochs", "32"]
    grid += ["--threads", "1", "--model.options.hidden", "[8]", "--out", str(here)]
    cells = parse(grid[1:])[0].cells()
    # The last cell has got somewhere on this machine, and goes on from there; the one before cannot go on.
    half, bad = cells[-1].recipe, cells[-2]
    interrupted = interrupt_at(half, 1200)
    whole = run(recipe_file.from_dict({**recipe_file.to_dict(half), "out": str(tmp_path / "whole")}))
    (here / "dense-0-1").mkdir()
    recipe_file.save(bad.recipe, here / "dense-0-1" / "recipe.yaml")
    (here / "dense-0-1" / "checkpoints").mkdir()
    (here / "dense-0-1" / "checkpoints" / "step-000000045.safetensors").write_bytes(b"damaged")

    head = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        lost = head.add_node(num_cpus=1, env_vars={"TMPDIR": str(tmp_path / "lost"), "RAY_TMPDIR": "/tmp"})
        head.add_node(num_cpus=1)
        ray = cluster.connect(head.address)
        with pytest.raises(ValueError, match=r"needs 2 CPU\(s\) and 0 GPU\(s\), but no node .*at most 1 and 0"):
            cluster.train_cells(cells, ray=ray, threads=2, gpus=0, splits=None, watcher=None)

        # A first run on each node, so that both are ready at the same time.
        train = ray.remote(num_cpus=1)(cluster._train_far)
        tree = recipe_file.to_dict(forge.recipe("dense"))
        arrays = cluster._to_arrays(data.load(half.data))
        nodes = [node["NodeID"] for node in ray.nodes() if node["Resources"].get("CPU")]
        pinned = [NodeAffinitySchedulingStrategy(node, soft=False) for node in nodes]
        first = [train.options(scheduling_strategy=place).remote(tree, b"", arrays, 1) for place in pinned]
        assert [error for _, error in ray.get(first, timeout=600)] == [None, None]

        def kill():
            wait_for(begun, 600)
            head.remove_node(lost, allow_graceful=False)

        killer = threading.Thread(target=kill)
        killer.start()
        monkeypatch.setattr(training, "Progress", Watch)
        assert cli.main([*grid, "--ray", head.address]) == 1
        killer.join()
    finally:
        cluster.checks.require("ray", "cluster", "this test").shutdown()
        head.shutdown()

    assert len(begun()) == 1  # a run was cut off there
    (watch,) = watches
    assert sorted(watch.ended) == sorted(cell.name for cell in cells)
    tree = json.loads((here / "comparison.json").read_text())
    assert [failure["cell"] for failure in tree["failures"]] == [bad.name] and len(tree["runs"]) == len(cells) - 1
    assert "is damaged" in (here / "dense-0-1" / "error.txt").read_text()
    for cell in cells:
        if cell is not bad:
            assert RunResult.read(cell.recipe.out).recipe == recipe_file.to_dict(cell.recipe)
            assert [record["event"] for record in log.read(cell.recipe.out)].count("final") == 1
    # It went on from the checkpoint that lay here, and is the run that this machine would have made.
    a, b = (mm.load(f"{folder}/model.safetensors") for folder in (half.out, whole.folder))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert log.read(half.out)[0]["seconds"] == interrupted[0]["seconds"]


def interrupt_at(recipe, step):
    """Train the recipe up to a step, as if this had been stopped there; the log so far."""

    class Stop(Observer):
        def stepped(self, now):
            if now == step:
                raise InterruptedError

    with pytest.raises(InterruptedError):
        run(recipe, observer=Stop())
    return log.read(recipe.out)
