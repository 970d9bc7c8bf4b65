"""``mirrormask train`` on several processes is the run of one, to rounding, wherever it was stopped in between."""

import dataclasses
import json
import os

import pytest
import torch
from torch import nn
from world import run_world

import mirrormask as mm
from mirrormask.train import Data, Method, Model, Observer, Recipe, batch_norm, log, parallel, run
from mirrormask.train.run_folder import RunResult
from mirrormask.train.session import F

#: A convolution, a batch norm and a layer that is cut unevenly.
NET = """
from torch import nn
def net(shape, classes):
    first = nn.Conv2d(1, 5, 3, stride=2), nn.BatchNorm2d(5), nn.ReLU()
    return nn.Sequential(*first, nn.Flatten(), nn.Linear(45, classes))
"""
CASES = {"conv": {"method": Method("mirror")}, "pilot": {"method": Method("pilot"), "data": Data(crop=1, flip=True)}}
CUT = 50  # in the middle of the second epoch


def recipe(folder, name, out, **changes):
    model = Model(f"{folder}/net.py:net") if name == "conv" else Model("mlp", {"hidden": [33]})
    options = {"epochs": 2, "log_every": 10, "threads": 1, "figure": False, "checkpoint_every": f"{CUT}steps"}
    return Recipe(model=model, sparsity=0.8, out=str(folder / out), **{**options, **CASES[name], **changes})


class Stop(Observer):
    def stepped(self, step):
        if step == CUT + 5:
            raise KeyError("as a crash would")


def interrupted(one):
    with pytest.raises(KeyError):
        run(one, observer=Stop())


def curve(folder):
    return [(r["event"], r["step"], r["loss"], r["sparsity"]) for r in log.read(folder) if r["event"] != "processes"]


def same(folder, found, expected):
    """The curve of one process, and the model that it ends with."""
    a, b = curve(folder / found), curve(folder / expected)
    assert [line[:2] for line in a] == [line[:2] for line in b]
    for one, other in zip(a, b, strict=True):
        assert one[2:] == pytest.approx(other[2:], rel=2e-3, abs=2e-4), (one, other)
    left, right = (mm.load(folder / name / "model.safetensors") for name in (found, expected))
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name].float(), right[name].float(), rtol=0.05, atol=0.02)
    results = [RunResult.read(folder / name) for name in (found, expected)]
    assert results[0].nonzeros == results[1].nonzeros == results[0].nonzeros_asked
    assert results[0].test_accuracy == pytest.approx(results[1].test_accuracy, abs=0.01)
    for name in ("distributions.json", "predictions.json"):
        trees = [json.loads((folder / which / name).read_text()) for which in (found, expected)]
        assert trees[0].keys() == trees[1].keys()
    assert [sum(layer["final"]["counts"]) for layer in trees_of(folder, found)] == [
        sum(layer["final"]["counts"]) for layer in trees_of(folder, expected)
    ]


def trees_of(folder, name):
    return json.loads((folder / name / "distributions.json").read_text())["layers"]


@pytest.mark.long
def test_two_processes_give_the_run_of_one_and_go_on_with_another_number(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    for name in CASES:
        run(recipe(tmp_path, name, f"one-{name}"))
    interrupted(recipe(tmp_path, "conv", "one-to-two"))
    run_world(2, _two, tmp_path)
    for name in CASES:
        for kind in parallel_kinds(name):
            same(tmp_path, f"{kind}-{name}", f"one-{name}")
            result = RunResult.read(tmp_path / f"{kind}-{name}")
            assert (result.processes, result.parallel) == (2, kind)
            first = log.read(tmp_path / f"{kind}-{name}")[0]
            assert (first["event"], first["processes"], first["parallel"]) == ("processes", 2, kind)
    run(recipe(tmp_path, "conv", "two-to-one", parallel="fsdp"), resume=True)
    for name in ("two-to-one", "one-to-two"):
        same(tmp_path, name, "one-conv")
        said = [r["processes"] for r in log.read(tmp_path / name) if r["event"] == "processes"]
        assert said == ([2, 1] if name == "two-to-one" else [2])


def parallel_kinds(name):
    return ("ddp", "fsdp") if name == "conv" else ("fsdp",)


def _two(rank, size, folder):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    folder = folder.parent
    parallel.BLOCK = 40  # so that a block is sharded by itself
    for name in CASES:
        for kind in parallel_kinds(name):
            what = recipe(folder, name, f"{kind}-{name}", parallel=kind)
            yield what.out, lambda what=what: run(what)
    yield "from two", lambda: interrupted(recipe(folder, "conv", "two-to-one", parallel="fsdp"))
    yield "from one", lambda: run(recipe(folder, "conv", "one-to-two"), resume=True)
    yield "batch norm", lambda: batch_norm_sees_all(rank)
    yield "died", lambda: one_process_s_nan_ends_all(folder, rank)


def batch_norm_sees_all(rank):
    """Outputs, running averages and gradients are those of one process that has the whole batch."""
    for kind, shape in ((nn.BatchNorm1d, (6, 3)), (nn.BatchNorm2d, (6, 3, 4, 2))):
        torch.manual_seed(3)
        x = torch.randn(shape, dtype=torch.float64)
        one = kind(3, dtype=torch.float64)
        with torch.no_grad():
            one.weight.copy_(torch.randn(3))
        two = kind(3, dtype=torch.float64)
        two.load_state_dict(one.state_dict())
        batch_norm.synchronize(two)
        assert isinstance(two, kind)
        whole = x.clone().requires_grad_()
        (one(whole) ** 3).mean().backward()
        part = x[rank::2].clone().requires_grad_()
        (two(part) ** 3).mean().backward()
        torch.testing.assert_close(part.grad, 2 * whole.grad[rank::2])
        for key, value in one.state_dict().items():
            torch.testing.assert_close(two.state_dict()[key], value)
        torch.testing.assert_close(two.eval()(x), one.eval()(x))


def one_process_s_nan_ends_all(folder, rank):
    """All end with the same error, not one of them alone."""
    what = recipe(folder, "pilot", "nan", stop_after=20, data=Data())

    own, calls = F.cross_entropy, []

    def spoiled(scores, y, **options):
        calls.append(1)
        return own(scores, y, **options) * (float("nan") if rank == 1 and len(calls) > 5 else 1.0)

    F.cross_entropy = spoiled
    try:
        with pytest.raises(FloatingPointError, match="no finite loss and gradient"):
            run(what)
    finally:
        F.cross_entropy = own


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({}, ""),
        ({"WORLD_SIZE": "1", "RANK": "0"}, ""),
        ({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_MIXED_PRECISION": "no"}, "accelerate launch was asked for several"),
        ({"MASTER_ADDR": "127.0.0.1"}, ""),
        ({"WORLD_SIZE": "4"}, "the launcher started 4 processes and this run has 1"),
        ({"SLURM_STEP_NUM_TASKS": "2"}, "srun started 2 tasks"),
    ],
)
def test_a_launcher_that_was_asked_for_more_is_noticed(environment, said):
    assert parallel.too_few(1, environment).startswith(said)
    assert bool(said) == bool(parallel.too_few(1, environment))


def test_parallel_is_no_part_of_what_a_run_is_and_is_checked(tmp_path):
    (tmp_path / "net.py").write_text(NET)
    one = recipe(tmp_path, "pilot", "x")
    assert dataclasses.replace(one, parallel="fsdp").fingerprint() == one.fingerprint()
    with pytest.raises(ValueError, match="unknown parallel 'tp'"):
        dataclasses.replace(one, parallel="tp")
