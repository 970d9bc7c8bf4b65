"""A checkpoint of one number of processes goes on with another, as the run that was never stopped."""

import copy
import shutil
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from world import BASES, STEPS, make_method, make_model, run_world, sharded, train, whole

import mirrormask as mm

CUT = 7
#: State of every kind: factors, one number a tensor, exchanged masks, kept weights.
CASES = [("mirror", "adamw"), ("str", "sgd"), ("rigl", "adamw"), ("wr", "sgd")]
WIDTHS = (6, 8, 4, 1)


def build(name, base, kind, seed=0):
    model = make_model(WIDTHS, seed=seed)
    if kind == "fsdp":
        model = sharded(model)
    elif kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), make_method(name), steps=STEPS)
    return model, optimizer


def save(folder, name, base, kind, rank=0, size=1):
    model, optimizer = build(name, base, kind)
    train(model, optimizer, 0, CUT, rank, size)
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=folder / f"{name}-{kind}{size}")


def go_on(folder, name, base, kind, origin, rank=0, size=1):
    """Load what ``origin`` saved, train to the end, and return the weights."""
    model, optimizer = build(name, base, kind, seed=7)
    weights, state = get_state_dict(model, optimizer)
    loaded = {"model": weights, "optimizer": state}
    dcp.load(loaded, checkpoint_id=folder / f"{name}-{origin}")
    set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    assert optimizer.step_count == CUT
    train(model, optimizer, CUT, STEPS, rank, size)
    optimizer.finalize()
    return [whole(p).clone() for p in model.parameters()]


def straight(name, base):
    model, optimizer = build(name, base, "")
    train(model, optimizer)
    optimizer.finalize()
    return [p.detach() for p in model.parameters()]


def same(found, wanted):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert torch.equal(a == 0, b == 0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.long
def test_any_number_of_processes_goes_on_from_any_other(tmp_path):
    torch.set_num_threads(1)
    for name, base in CASES:
        save(tmp_path, name, base, "")
        torch.save(straight(name, base), tmp_path / f"{name}.pt")
        shutil.move(tmp_path / f"{name}-1", tmp_path / f"{name}-one")
    run_world(2, _two, tmp_path)
    run_world(4, _four, tmp_path)
    for name, base in CASES:
        for origin in ("fsdp2", "fsdp4", "ddp2"):
            if (tmp_path / f"{name}-{origin}").exists():
                same(go_on(tmp_path, name, base, "", origin), torch.load(tmp_path / f"{name}.pt"))


def _two(rank, size, folder):
    yield from _world(rank, size, folder.parent, ("one", "ddp2", "fsdp2"))
    yield "options", lambda: whole_states(rank)


def _four(rank, size, folder):
    yield from _world(rank, size, folder.parent, ("one", "fsdp2"))


def _world(rank, size, folder, origins):
    warnings.simplefilter("ignore")
    for i, (name, base) in enumerate(CASES):
        yield f"save-{name}", lambda name=name, base=base: save(folder, name, base, "fsdp", rank, size)
        if size == 2:
            yield f"ddp-{name}", lambda name=name, base=base: save(folder, name, base, "ddp", rank, size)
        for origin in origins if i < 2 else origins[i % 2 :][:1]:

            def case(name=name, base=base, origin=origin):
                kind = "ddp" if origin == "fsdp2" and size == 2 else "fsdp"
                found = go_on(folder, name, base, kind, origin, rank, size)
                same(found, torch.load(folder / f"{name}.pt"))

            yield f"{origin}-to-{size}-{name}", case


def whole_states(rank):
    """full_state_dict, cpu_offload and broadcast_from_rank0: what one process saves, and what it has read for all."""
    model, optimizer = build("mirror", "adamw", "fsdp")
    train(model, optimizer, 0, CUT, rank, 2)
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights, state = get_state_dict(model, optimizer, options=options)
    assert bool(weights) == (rank == 0)
    both = [(weights, state)]
    dist.broadcast_object_list(both, src=0)
    for how in (StateDictOptions(full_state_dict=True, broadcast_from_rank0=True), options):
        other, resumed = build("mirror", "adamw", "fsdp", seed=7)
        # Either rank 0 has read the file, or all have; torch takes out of the dictionaries what it has loaded.
        weights, state = copy.deepcopy(both[0]) if how is options or rank == 0 else ({}, {})
        set_model_state_dict(other, weights, options=how)  # set_state_dict skips what is empty on a process
        set_optimizer_state_dict(other, resumed, state, options=how)
        assert resumed.step_count == CUT
        for a, b in zip(model.parameters(), other.parameters(), strict=True):
            assert torch.equal(whole(a), whole(b))
        for a, b in zip(optimizer.weights.values(), resumed.weights.values(), strict=True):
            for key, value in optimizer.state[a].items():
                assert not isinstance(value, torch.Tensor) or torch.equal(value, resumed.state[b][key]), key
    plain = make_model(WIDTHS, seed=9)
    alone = [dist.new_group([r]) for r in range(2)][rank]
    one = mm.sparsify(plain, BASES["adamw"](plain.parameters()), make_method("mirror"), steps=STEPS,
                      process_group=alone)  # fmt: skip
    set_state_dict(plain, one, model_state_dict=both[0][0], optim_state_dict=both[0][1], options=options)
    assert one.step_count == CUT
