"""Processes as launchers start them: two nodes, accelerate on a CPU, one that is killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from kills import free_port

from mirrormask.train import Method, Model, Recipe, log, recipe_file
from mirrormask.train.run_folder import RunResult


def tiny(out, **changes):
    return Recipe(model=Model("mlp", {"hidden": [8]}), method=Method("dense"), epochs=1, log_every=20, threads=1,
                  figure=False, out=str(out), **changes)  # fmt: skip


def launch(command, folder, **environment):
    folder.mkdir(exist_ok=True)
    (folder / "r.yaml").write_text(recipe_file.dump(tiny("out")))
    command = [sys.executable, "-m", *command, "-m", "mirrormask.cli", "train", "r.yaml"]
    own = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(*Path(log.__file__).parts[:-3])), **environment}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=own, stdout=pipe, stderr=subprocess.STDOUT, text=True)


@pytest.mark.distributed
def test_two_nodes_train_one_run_and_the_first_alone_writes(tmp_path):
    there = f"127.0.0.1:{free_port()}"
    nodes = []
    for number, address in enumerate(("127.0.0.1", "127.0.0.2")):
        options = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={number}", "--rdzv_backend=c10d", "--rdzv_id=7"]
        command = ["torch.distributed.run", *options, f"--rdzv_endpoint={there}", f"--local_addr={address}"]
        nodes.append(launch(command, tmp_path / str(number), GLOO_SOCKET_IFNAME="lo"))
    said = [node.communicate(timeout=300)[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    left = [(tmp_path / str(n) / "out").exists() for n in (0, 1)]
    assert sorted(left) == [False, True], said
    first = left.index(True)
    assert "2 processes, ddp" in said[first] and "2 ddp" in said[first]
    assert "test accuracy" not in said[1 - first]
    folder = tmp_path / str(first) / "out" / "dense"
    assert RunResult.read(folder).processes == 2
    assert log.read(folder)[0]["processes"] == 2


@pytest.mark.distributed
def test_accelerate_that_starts_one_process_instead_of_two_is_noticed(tmp_path):
    command = ["accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    run = launch(command, tmp_path / "x")
    said = run.communicate(timeout=300)[0]
    assert run.returncode == 0, said
    assert "accelerate launch was asked for several processes and started one" in " ".join(said.split())


SCRIPT = Path(__file__).parent / "kills.py"


@pytest.mark.early
def test_two_processes_are_killed_and_the_others_say_so_and_the_runs_go_on():
    killed(2, first=1)  # in a change of the mask and in a checkpoint


@pytest.mark.distributed
def test_thirty_processes_are_killed():
    killed(30)


def killed(number, first=0):
    command = [sys.executable, str(SCRIPT), "--kills", str(number), "--first", str(first)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 * number + 120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{number} of {number} runs went on" in done.stdout
