"""Zeros that come back after they were made: said before the model is written or compiled."""

import copy
import warnings

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask import made_sparse


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))


X = torch.randn(64, 16, generator=torch.Generator().manual_seed(1))


def train(model, optimizer, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()


def finalized(tmp_path, model):
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), mm.methods.gmp(0.8), steps=4)
    train(model, optimizer, 4)
    optimizer.finalize()
    train(model, optimizer)  # which keeps its mask


def loaded(tmp_path, model):
    mm.prune(other := net(), [X], 0.8, "magnitude")
    mm.save(other, tmp_path / "sparse.safetensors")
    mm.load(tmp_path / "sparse.safetensors", model)


MADE = {
    "finalize": finalized,
    "prune": lambda tmp_path, model: mm.prune(model, [X], 0.8, "magnitude"),
    "load": loaded,
}
WRITES = {
    "save": lambda tmp_path, model: mm.save(model, tmp_path / "net.safetensors"),
    "compile": lambda tmp_path, model: mm.compile(copy.copy(model).eval(), X, tune=False),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("made", MADE)
def test_a_forgotten_mask_is_told_of_once(tmp_path, made, write):
    model = net()
    MADE[made](tmp_path, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made sparse")
        WRITES[write](tmp_path, model)
        plain = torch.optim.AdamW(model.parameters())
        handle = mm.keep_zeros(model, plain)
        train(model, plain)
        WRITES[write](tmp_path, model)
    handle.remove()
    train(model, plain)
    with pytest.warns(UserWarning, match=r"^0.weight, 2.weight had 1,2\d\d zeros .* and have \d+ now.*mm.keep_zeros"):
        WRITES[write](tmp_path, model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made sparse")
        WRITES[write](tmp_path, model)


@pytest.mark.parametrize("made", MADE)
def test_who_becomes_sparse_anew_or_is_another_model_is_none_of_these(tmp_path, made):
    model = net()
    MADE[made](tmp_path, model)
    other = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*made sparse")
        train(other, torch.optim.SGD(other.parameters(), lr=0.1))
        mm.save(other, tmp_path / "other.safetensors")
        regrown = mm.methods.rigl(0.5)
        optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), regrown, steps=4)
        with torch.no_grad():
            model[0].weight.add_(0.1)
        mm.save(model, tmp_path / "between.safetensors")
        train(model, optimizer, 4)
        optimizer.finalize()
        mm.save(model, tmp_path / "after.safetensors")


def test_a_few_zeros_of_any_origin_are_not_remembered():
    layer = nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight[0] = 0.0
    made_sparse.note([layer.weight, layer.bias])
    assert layer.weight not in made_sparse._nonzeros and layer.bias not in made_sparse._nonzeros
