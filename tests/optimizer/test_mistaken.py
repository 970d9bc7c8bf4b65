"""The state of a sparse training, given to an optimizer that is none: refused, whatever reads it, and by name."""

import copy
import json

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

import mirrormask as mm
from mirrormask.optimizer.mistaken import refuse_by_name

X = torch.randn(32, 6, generator=torch.Generator().manual_seed(1))
Y = X[:, :3].argmax(1)
METHODS = {"mirror": lambda: mm.methods.mirror(0.5), "gmp": lambda: mm.methods.gmp(0.5)}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
NAMED = "the state of a mirrormask SparseOptimizer, and .* would train on densely.*SparsityCallback.*mm.sparsify"
#: torch's own, as it is where mirrormask was never imported.
PLAIN = Optimizer.load_state_dict.__wrapped__
cases = pytest.mark.parametrize(("name", "base"), [(name, base) for name in METHODS for base in BASES])


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))


def groups_of(model):
    """Of all kinds: of several parameters, of one, of none."""
    return [{"params": list(model[0].parameters())}, {"params": []}, *({"params": [p]} for p in model[2].parameters())]


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()


def trained(name, base, parameters=nn.Module.parameters, steps=12):
    model = net()
    optimizer = mm.sparsify(model, BASES[base](parameters(model)), METHODS[name](), steps=20)
    train(model, optimizer, steps)
    return model, optimizer


def from_disk(optimizer, path):
    torch.save(optimizer.state_dict(), path)
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("parameters", [nn.Module.parameters, groups_of])
@pytest.mark.parametrize("steps", [0, 12])
@cases
@pytest.mark.cases(5)
def test_a_plain_optimizer_refuses_it_and_is_as_it_was(name, base, steps, parameters, tmp_path):
    """Without mirrormask in the process too, which only finds the words."""
    model, optimizer = trained(name, base, parameters, steps)
    saved = from_disk(optimizer, tmp_path / "optimizer.pt")
    plain = BASES[base](parameters(model))
    before = copy.deepcopy(plain.state_dict())
    with pytest.raises(ValueError, match="match the size of optimizer's group"):
        PLAIN(plain, saved)
    with pytest.raises(ValueError, match=NAMED):
        plain.load_state_dict(saved)
    assert plain.state_dict() == before
    assert "mirrormask SparseOptimizer" in saved["param_groups"][0]["mirrormask"]  # for who looks into the file


@pytest.mark.parametrize("form", ["as before version 3", "without its mark", "copied"])
@pytest.mark.parametrize("parameters", [nn.Module.parameters, groups_of])
@cases
@pytest.mark.cases(5)
def test_with_the_mark_or_without_a_sparse_training_goes_on_bit_for_bit(name, base, parameters, form):
    model, optimizer = trained(name, base, parameters)
    saved = copy.deepcopy(optimizer.state_dict())
    for group in saved["param_groups"] if form != "copied" else ():
        assert group["params"][:1] == group["params"][-1:]
        group["params"] = group["params"][:-1]
        if form == "as before version 3":
            summary = json.loads(group["mirrormask"])
            summary.pop("about", None)
            group["mirrormask"] = json.dumps({**summary, "version": 2})
    other, resumed = trained(name, base, parameters, steps=0)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(saved)
    train(model, optimizer, 8)
    train(other, resumed, 8)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_hooks_see_what_will_be_saved():
    _, optimizer = trained("gmp", "sgd", steps=0)
    seen = []
    optimizer.register_state_dict_post_hook(lambda _, state: seen.append(state["param_groups"][0]["params"]))
    for _ in range(2):
        assert optimizer.state_dict()["param_groups"][0]["params"] == seen[-1] == [0, 1, 2, 3, 0]


@cases
def test_what_a_distributed_checkpoint_has_made_fit_is_refused_by_name(name, base):
    """torch.distributed.checkpoint takes the parameters from the optimizer that it loads into, and drops the mark."""
    model, optimizer = trained(name, base)
    saved = get_optimizer_state_dict(model, optimizer)
    plain = BASES[base](model.parameters())
    with pytest.raises(ValueError, match=NAMED):
        set_optimizer_state_dict(model, plain, saved)


@cases
@pytest.mark.parametrize("place", ["optimizer", "deep"])
def test_what_a_distributed_checkpoint_reads_key_by_key_is_refused_by_name(name, base, place, tmp_path):
    """It takes from a checkpoint what the optimizer knows, and never sees the rest."""
    model, optimizer = trained(name, base)

    def held(model, optimizer):
        weights, state = get_state_dict(model, optimizer)
        return {"model": weights, **({place: state} if place == "optimizer" else {"at": {place: state}})}

    dcp.save(held(model, optimizer), checkpoint_id=tmp_path)
    other = net()
    refuse_by_name()  # as mm.keep_zeros does, should the import have come later
    with pytest.raises(CheckpointException, match=NAMED):
        dcp.load(held(other, BASES[base](other.parameters())), checkpoint_id=tmp_path)
    assert not any(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    alone = {"model": get_model_state_dict(other)}
    dcp.load(alone, checkpoint_id=tmp_path)  # who only reads the model is not kept from it
    assert all(torch.equal(alone["model"][key], value) for key, value in model.state_dict().items())
    again, resumed = trained(name, base, steps=0)
    loaded = held(again, resumed)
    dcp.load(loaded, checkpoint_id=tmp_path)


@cases
def test_accelerate_refuses_it_where_nothing_was_sparsified(name, base, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), METHODS[name](), steps=20)
    model, stepped = accelerator.prepare(model, optimizer)
    train(model, stepped, 12)
    accelerator.save_state(str(tmp_path))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    model = net()
    accelerator.prepare(model, BASES[base](model.parameters()))
    with pytest.raises(ValueError, match=NAMED):
        accelerator.load_state(str(tmp_path))


def test_timm_refuses_it_where_nothing_was_sparsified(tmp_path):
    timm = pytest.importorskip("timm")
    optim = pytest.importorskip("timm.optim")
    model, optimizer = trained("gmp", "momentum")
    path = str(tmp_path / "last.pth.tar")
    state = {"state_dict": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "version": 2}
    torch.save(state, path)
    plain = optim.create_optimizer_v2(net(), "momentum", lr=0.05, filter_bias_and_bn=False)
    with pytest.raises(ValueError, match=NAMED):
        timm.models.resume_checkpoint(net(), path, plain, log_info=False)
    timm.models.load_checkpoint(other := net(), path)  # the model in it needs nothing of this
    assert torch.equal(other[0].weight, model[0].weight)
