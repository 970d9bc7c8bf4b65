"""Batch-norm statistics after pruning."""

import pytest
import torch
from torch import nn

import mirrormask as mm


def model():
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5))


def test_statistics_are_the_averages_over_the_batches():
    net, batches = model(), [torch.randn(64, 4) for _ in range(5)]
    net[1].momentum = 0.3
    assert mm.recalibrate(net, ((x, None) for x in batches)) == 5
    outputs = [net[0](x) for x in batches]
    torch.testing.assert_close(net[1].running_mean, torch.stack([y.mean(0) for y in outputs]).mean(0).detach())
    torch.testing.assert_close(net[1].running_var, torch.stack([y.var(0) for y in outputs]).mean(0).detach())
    assert net[1].momentum == 0.3
    assert net.training
    assert net[2].training


def test_an_empty_set_of_batches_is_refused_and_changes_nothing():
    net = model()
    net(torch.randn(8, 4))
    before = net[1].running_mean.clone()
    with pytest.raises(ValueError, match="batches is empty"):
        mm.recalibrate(net, [])
    assert torch.equal(net[1].running_mean, before)
    assert net[1].momentum == 0.1


@pytest.mark.parametrize(
    ("batch", "message"), [(torch.full((8, 4), torch.nan), "input of 1 is not finite"), (torch.randn(8, 3), "shape")]
)
def test_batches_that_end_in_an_error_change_nothing(batch, message):
    net = model()
    net(torch.randn(8, 4))
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    with pytest.raises((ValueError, RuntimeError), match=message):
        mm.recalibrate(net, [torch.randn(8, 4), batch])
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    with pytest.raises(TypeError, match=r"model is a NoneType, not an nn.Module"):
        mm.recalibrate(None, [])


def test_a_model_without_batch_norm_reads_nothing():
    assert mm.recalibrate(nn.Linear(2, 2), iter(())) == 0
