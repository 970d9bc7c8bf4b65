"""Buffers are what they were after whatever only looks at a model."""

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.calibration import evaluating
from mirrormask.masks.saliency import measure
from mirrormask.pruning.undo import all_or_nothing
from mirrormask.train import models

with torch.inference_mode():
    FIXED = torch.ones(3)


class Busy(nn.Module):
    """Each kind of buffer, and each way to write one."""

    def __init__(self, shape=(1, 2, 2), classes=4):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, classes))
        self.register_buffer("counted", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(2))
        self.register_buffer("cached", None, persistent=False)
        self.register_buffer("longer", torch.zeros(2))
        self.register_buffer("nan", torch.full((2,), torch.nan))
        self.register_buffer("expanded", torch.arange(3.0).expand(2, 3))
        self.register_buffer("fixed", FIXED)
        self.register_buffer("graph", torch.eye(3).to_sparse())

    def forward(self, x):
        self.counted += 1
        self.replaced = self.replaced + 1
        self.cached = x.detach().mean(0)
        self.longer.resize_(5).fill_(1.0)
        self.nan.zero_()
        self.register_buffer("late", torch.ones(1))
        return self.net(x)


def looked_at(model, x):
    with evaluating(model):
        model(x)


def broken_off(model, x):
    with pytest.raises(KeyError), all_or_nothing(model):
        model(x)
        raise KeyError


LOOKS = {
    "evaluating": looked_at,
    "all_or_nothing": broken_off,
    "prune": lambda model, x: mm.prune(model, [x], 0.5),
    "quantize": lambda model, x: mm.quantize(model, [x]),
    "recalibrate": lambda model, x: mm.recalibrate(model, [x]),
    "measure": lambda model, x: measure(
        "snip", model, mm.select_weights(model), [(x, torch.zeros(len(x)).long())], None, sparsity=0.5,
        allocation="global",
    ),
    "a model that is tried": lambda model, x: models._try("busy", model, (1, 2, 2), 4),
}  # fmt: skip


@pytest.mark.parametrize("look", LOOKS)
def test_buffers_are_what_they_were(look):
    model = Busy()
    own = [name for name, _ in model.named_buffers() if not name.startswith("net.")]
    objects, values = dict(model._buffers), {name: model._buffers[name].clone() for name in own}
    LOOKS[look](model, torch.randn(20, 1, 2, 2))
    assert list(model._buffers) == list(objects)
    assert all(model._buffers[name] is buffer for name, buffer in objects.items())
    for name in own:
        assert torch.equal(model._buffers[name].to_dense().nan_to_num(7.0), values[name].to_dense().nan_to_num(7.0))
    moved = bool(model.net[2].running_mean.any())
    assert moved == (look in ("prune", "recalibrate"))  # the statistics that these are there for
