"""Which weights are chosen, and how their zeros are counted."""

import pytest
import torch
from torch import nn

import mirrormask as mm


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3), nn.Embedding(5, 3))


def test_default_takes_linear_and_conv_weights_only():
    assert list(mm.select_weights(small())) == ["0.weight", "3.weight"]


def test_patterns_and_predicates_select():
    assert list(mm.select_weights(small(), "3.*")) == ["3.weight", "3.bias"]
    assert list(mm.select_weights(small(), lambda name, module: isinstance(module, nn.Embedding))) == ["4.weight"]


def test_a_pattern_that_matches_nothing_names_the_parameters():
    with pytest.raises(ValueError, match=r"'fc\*' matches no parameter of the model; it has: 0.weight"):
        mm.select_weights(small(), ["3.*", "fc*"])


def test_no_sparsifiable_weight():
    with pytest.raises(ValueError, match="ReLU has no sparsifiable weight"):
        mm.select_weights(nn.ReLU())


def test_tied_weights_count_once():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    assert list(mm.select_weights(model)) == ["0.weight"]
    assert mm.sparsity(model).numel == 9


def test_sparsity_counts_exact_zeros_and_prints_a_table():
    model = nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[0.0, 1e-30, 0.0, 2.0], [0.0, 0.0, 0.0, -0.0]]))
        model[1].weight.fill_(1.0)
    report = mm.sparsity(model)
    assert (report.numel, report.nonzeros) == (12, 6)
    assert report.total == float(report) == 0.5
    assert [layer.sparsity for layer in report.layers] == [0.75, 0.0]
    assert str(report).splitlines()[-1].split() == ["total", "12", "6", "50.000%"]
