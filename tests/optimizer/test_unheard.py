"""A weight decay that was asked for and does nothing is said, and only then."""

import warnings

import pytest
import torch
from torch import nn

import mirrormask as mm


def wrapped(method, kind=torch.optim.SGD, **options):
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    mm.sparsify(model, kind(model.parameters(), lr=0.1, **options), method, steps=10)


@pytest.mark.parametrize(
    ("method", "kind", "value"),
    [
        (mm.methods.mirror(0.5), torch.optim.SGD, 5e-4),
        (mm.methods.spred(0.5), torch.optim.SGD, 5e-4),
        (mm.methods.mirror(0.5), torch.optim.AdamW, 0.1),
    ],
)
def test_it_is_said_where_it_is_set(method, kind, value):
    with pytest.warns(
        UserWarning, match=rf"weight_decay={value:g} of {kind.__name__} does not act on 0.weight, 1.weight"
    ):
        wrapped(method, kind, weight_decay=value)


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        (mm.methods.mirror(0.5), torch.optim.SGD, {}),
        (mm.methods.mirror(0.5), torch.optim.AdamW, {}),  # has 0.01 by itself
        (mm.methods.gmp(0.5), torch.optim.SGD, {"weight_decay": 5e-4}),  # it acts
        (mm.methods.get("str")(0.5), torch.optim.SGD, {"weight_decay": 5e-4}),  # on w
    ],
)
def test_and_nowhere_else(method, kind, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(method, kind, **options)


def test_a_group_of_its_own_says_that_it_is_meant():
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3))
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.0},
        {"params": [p for p in model.parameters() if p.dim() < 2]},
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mm.sparsify(model, torch.optim.SGD(groups, lr=0.1, weight_decay=5e-4), mm.methods.mirror(0.5), steps=10)
