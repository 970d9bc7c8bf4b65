"""A world of processes that runs many cases: starting one costs seconds, so each world is started once."""

import itertools
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import mirrormask as mm
from mirrormask.compare.runner import processes

STEPS = 16
#: Uneven rows, and a last layer of which a second process holds nothing.
WIDTHS = (6, 9, 5, 1)
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
}
OPTIONS = {"pilot": {"alpha_init": 0.01}, "spred": {"alpha": 0.01}, "l1": {"alpha": 1e-3}, "set": {"every": 0.1},
           "rigl": {"every": 0.1}}  # fmt: skip


def make_model(widths=WIDTHS, seed=0):
    torch.manual_seed(seed)
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


def batch(step, size=8, width=WIDTHS[0]):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(size, width, generator=generator, dtype=torch.float64)
    return x, x[:, :1].sin() + x[:, 1:2] * x[:, 2:3]


def make_method(name, **options):
    return mm.methods.get(name)(0.0 if name == "dense" else 0.7, **{**OPTIONS.get(name, {}), **options})


def train(model, optimizer, first=0, last=STEPS, rank=0, world=1, size=8):
    """Each process has its part of every batch of ``size``."""
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = batch(step, size)
        part = slice(rank * len(x) // world, (rank + 1) * len(x) // world)
        nn.functional.mse_loss(model(x[part]), y[part]).backward()
        optimizer.step()
        if step % 8 == 7:
            optimizer.epoch_end(score=step / 100)


def sharded(model, mesh=None):
    """fully_shard, layer by layer and at the root, as its documentation has it."""
    for layer in model:
        if isinstance(layer, nn.Linear) and layer is not model[-1]:
            fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def whole(tensor):
    tensor = tensor.detach()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def mesh_of(*shape, names=None):
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def run_world(size, cases, path):
    """Run ``cases(rank, world, folder)``, names and functions, on so many processes; says what failed, by name."""
    folder = Path(tempfile.mkdtemp(dir=path))
    how = processes().get_start_method()
    torch.multiprocessing.start_processes(_work, (size, cases, str(folder)), nprocs=size, start_method=how)
    failed = [f"{file.name}:\n{file.read_text()}" for file in sorted(folder.glob("failed-*"))]
    if failed:
        pytest.fail("\n".join(failed), pytrace=False)


def _work(rank, size, cases, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size)
    for name, case in cases(rank, size, Path(folder)):
        try:
            case()
        except BaseException:
            (Path(folder) / f"failed-{name}-rank{rank}".replace("/", "_")).write_text(traceback.format_exc())
            break  # the others wait in what this one does not call any more: they end with an error
    else:
        dist.barrier()
    dist.destroy_process_group()
