"""Weights of 8 bits: as mm.quantize rounds them, read as bytes by the kernels, and equal to the rounded model."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.machine.jit import host_features
from mirrormask.machine.targets import available_targets
from mirrormask.runtime.graph.ir import Weight
from mirrormask.runtime.graph.levels import levels_of, stored_as


def network(sparsity=0.9):
    torch.manual_seed(2)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2), nn.Flatten(),
        nn.Linear(12 * 49, 200), nn.GELU(), nn.Linear(200, 33),
    )  # fmt: skip
    model[1].running_mean.uniform_(-0.2, 0.2)
    model[1].running_var.uniform_(0.5, 2)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data *= torch.rand_like(weight) >= sparsity
    model[7].weight.data[5] = 0  # an output without weights
    return model.eval()


def kinds(fast):
    return [op.kernel.kind + ({"int8": " levels", "fp16": " halves"}.get(getattr(op.spec, "weights", ""), ""))
            for region in fast.regions for plan in region.plans() for op in plan.ops]  # fmt: skip


@pytest.mark.parametrize("target", [target.name for target in available_targets()])
@pytest.mark.parametrize("batch", [1, 9])
def test_equal_to_the_quantized_model(target, batch):
    model, x = network(), torch.randn(batch, 3, 17, 17)
    before = copy.deepcopy(model.state_dict())
    options = {"tune": False, "force": True, "instruction_set": target}
    fast = mm.compile(model, x, weights="int8", **options)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    mm.quantize(model)
    expected = model(x).detach()
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))
    assert fast.report.error < 1e-5
    assert sum(kind in ("vector_sparse levels", "vector_tables levels") for kind in kinds(fast)) == 2
    twin = mm.compile(model, x, **options)  # a model that is rounded already
    assert kinds(twin) == kinds(fast) and torch.equal(twin(x), fast(x))
    plain = mm.compile(network(), x, **options)
    assert not any(kind.endswith("levels") for kind in kinds(plain)) and not torch.equal(plain(x), fast(x))


def test_half_precision_weights():
    model, x = network(), torch.randn(1, 3, 17, 17)
    fast = mm.compile(model, x, weights="fp16", tune=False, force=True)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data = weight.data.half().float()
    expected = model(x).detach()
    torch.testing.assert_close(fast(x), expected, rtol=1e-5, atol=2e-6 * float(expected.abs().max()))
    narrow = [kind for kind in kinds(fast) if kind in ("vector_sparse halves", "vector_tables halves")]
    assert len(narrow) == 2 or "f16c" not in host_features()
    model[7].weight.data[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"'7\.weight' holds numbers beyond half precision's 65,504"):
        mm.compile(model, x, weights="fp16")


def test_other_shapes_are_those_of_the_rounded_model_and_stale_is_of_the_users():
    model, x = network(), torch.randn(4, 3, 17, 17)
    fast = mm.compile(model, x, weights="int8", tune=False, force=True)
    rounded = copy.deepcopy(model)
    mm.quantize(rounded)
    for given in (torch.randn(7, 3, 17, 17), torch.randn(1, 3, 17, 17)):
        torch.testing.assert_close(fast(given), rounded(given), rtol=1e-4, atol=1e-5)
    assert fast.stale() == []
    model[7].weight.data.mul_(2)
    assert fast.stale() == ["7.weight"]


def test_what_is_not_finite_goes_where_weights_lead():
    model = nn.Sequential(nn.Linear(64, 40)).eval()
    model[0].weight.data *= torch.rand(40, 64) < 0.2
    fast = mm.compile(model, torch.randn(1, 64), weights="int8", tune=False, force=True)
    x = torch.randn(1, 64)
    x[0, 7] = float("inf")
    reached = model[0].weight[:, 7] != 0
    assert torch.equal(fast(x)[0].isfinite(), ~reached) and bool(reached.any()) and not bool(reached.all())


def test_a_file_of_it_has_the_same_bits(tmp_path):
    x = torch.randn(2, 3, 17, 17)
    fast = mm.compile(network(), x, weights="int8", tune=False, force=True)
    fast.save(tmp_path / "m")
    assert np.array_equal(mm.runtime.load(tmp_path / "m", threads=1)(x.numpy()), fast(x).numpy())


def test_levels_are_found_in_the_numbers():
    rng = np.random.default_rng(0)
    level = rng.integers(-127, 128, (20, 300)) * (rng.random((20, 300)) < 0.1)
    level[:, 0] = 127
    scale = rng.random((20, 1)).astype(np.float32) + np.float32(0.01)
    weight = (level * scale).astype(np.float32)
    row, column = np.nonzero(weight)
    values, first = weight[row, column], row < 9
    found, scales = levels_of([(row[first], values[first]), (row[~first], values[~first])], 20)
    assert np.array_equal(np.concatenate(found), level[row, column])
    np.testing.assert_allclose(scales, scale[:, 0], rtol=3e-7)
    assert stored_as(Weight.of(weight)) == "int8"
    weight[3, np.flatnonzero(weight[3])[1]] *= np.float32(1.001)
    row, column = np.nonzero(weight)
    assert levels_of([(row, weight[row, column])], 20) is None
    assert stored_as(Weight.of(weight)) == "fp32"
    assert stored_as(Weight.of(weight.astype(np.float16).astype(np.float32))) == "fp16"


def test_what_cannot_be_rounded_is_refused():
    with pytest.raises(ValueError, match="unknown weights 'int4'"):
        mm.compile(network(), torch.randn(1, 3, 17, 17), weights="int4")
    with pytest.raises(ValueError, match="the model has none"):
        mm.compile(nn.ReLU().eval(), torch.randn(1, 3), weights="int8")
    model = network()
    model[5].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"'5\.weight' holds numbers that are not finite"):
        mm.compile(model, torch.randn(1, 3, 17, 17), weights="int8")
