"""Weights in fewer bits: what is rounded, how far, and that it is rounded once."""

import os

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.quantization.levels import levels, rounded, scales


def pruned(*shape, sparsity=0.9):
    x = torch.randn(shape)
    return x * (torch.rand(shape) >= sparsity)


def test_levels_by_hand():
    x = torch.tensor([[127.0, -3.2, 0.0], [0.0, 0.0, 0.0], [-0.5, 0.25, 0.001]])
    scale = scales(x, 0)
    assert scale[0] == 1 and scale[2] == torch.tensor(0.5 / 127).bfloat16()
    assert levels(x, scale, 0).tolist() == [[127, -3, 0], [0, 0, 0], [-127, 64, 0]]


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_what_was_rounded_is_on_its_own_levels(axis, size):
    x = size * pruned(40, 50, 3, sparsity=0.5) * torch.rand(40, 50, 3)
    scale = scales(x, axis)
    level = levels(x, scale, axis)
    once = rounded(level, scale, axis)
    half = 0.5 * scale.float().view([-1 if dim == axis else 1 for dim in range(3)])
    assert ((once - x).abs() <= 1.001 * half + x.abs() / 256).all()
    assert torch.equal(scales(once, axis), scale) and torch.equal(levels(once, scale, axis), level)
    # the product is exact: 64 bits give the same
    assert torch.equal(once.double(), level.double() * scale.double().view(half.shape))


class Net(nn.Module):
    """One of each layer whose outputs are counted otherwise, a vector, an embedding, and a table that is no weight."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(40, 30)
        self.up = nn.ConvTranspose2d(8, 20, 3)
        self.words = nn.Embedding(50, 12)
        self.norm = nn.LayerNorm(40)
        self.register_buffer("bias", torch.full((40, 40), -float("inf")).triu(1))
        self.register_buffer("table", torch.rand(64, 64))


@pytest.mark.parametrize("values", ["int8", "float16"])
def test_layers_and_embeddings_are_rounded_and_nothing_else(values, tmp_path):
    model = Net()
    with torch.no_grad():
        model.up.weight.mul_(10 ** torch.linspace(-3, 0, 20)[:, None, None])  # scales of outputs, dimension 1
    mm.save(model, tmp_path / "x", values=values)
    loaded = mm.load(tmp_path / "x")
    for name, tensor in model.state_dict().items():
        assert loaded[name].dtype == tensor.dtype
        if name in ("linear.weight", "up.weight", "words.weight"):
            assert not torch.equal(loaded[name], tensor)
            most = tensor.abs().max() / (127 if values == "int8" else 2048)
            assert (loaded[name] - tensor).abs().max() <= most
        else:
            assert torch.equal(loaded[name], tensor), name
    if values == "int8":
        errors = (loaded["up.weight"] - model.up.weight).abs().amax((0, 2, 3))
        assert (errors <= model.up.weight.abs().amax((0, 2, 3)) / 127).all()
    mm.save(mm.load(tmp_path / "x", Net()), tmp_path / "again", values=values)
    again = mm.load(tmp_path / "again")
    assert all(torch.equal(again[name], loaded[name]) for name in loaded)
    mm.load(tmp_path / "x", model)
    assert torch.equal(model.linear.weight, loaded["linear.weight"])


def test_zeros_stay_and_files_shrink(tmp_path):
    state = {"w": pruned(300, 300), "b": torch.randn(300)}
    sizes = {}
    for values in (None, "float16", "int8"):
        mm.save(state, tmp_path / "x", values=values)
        sizes[values] = os.path.getsize(tmp_path / "x")
        loaded = mm.load(tmp_path / "x")
        assert (loaded["w"][state["w"] == 0] == 0).all()
        assert torch.equal(loaded["b"], state["b"])
    assert sizes["float16"] < 0.7 * sizes[None] and sizes["int8"] < 0.5 * sizes[None]


def test_ties_stay_ties(tmp_path):
    model = nn.Sequential(nn.Embedding(30, 40), nn.Linear(40, 30, bias=False))
    model[1].weight = model[0].weight
    mm.save(model, tmp_path / "x", values="int8")
    loaded = mm.load(tmp_path / "x")
    assert loaded["0.weight"] is loaded["1.weight"]


def test_what_cannot_be_rounded_is_refused(tmp_path):
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"values.*'int4'.*int8"):
        mm.save(layer, tmp_path / "x", values="int4")
    with pytest.raises(ValueError, match="both say how to store"):
        mm.save(layer, tmp_path / "x", values="int8", dtype=torch.bfloat16)
    layer.weight.data[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"'weight' reaches 1e\+06, beyond torch.float16"):
        mm.save(layer, tmp_path / "x", values="float16")
    layer.weight.data[0, 0] = float("nan")
    for values in ("int8", "float16"):
        with pytest.raises(ValueError, match="'weight' holds numbers that are not finite"):
            mm.save(layer, tmp_path / "x", values=values)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("values", ["int8", "float16"])
def test_types_of_eight_bits_stay_as_they_are(values, tmp_path):
    state = {"a": torch.randn(8, 8), "b": torch.randn(8, 8).to(torch.float8_e4m3fn)}
    mm.save(state, tmp_path / "x", values=values)
    loaded = mm.load(tmp_path / "x")
    assert loaded["a"].dtype == torch.float32 and loaded["b"].dtype == torch.float8_e4m3fn
    assert torch.equal(loaded["b"].float(), state["b"].float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_largest_number_of_a_type_stays_finite(dtype, tmp_path):
    most = torch.finfo(dtype).max
    layer = nn.Linear(3, 2, bias=False).to(dtype)
    layer.weight.data = torch.tensor([[most, -most, 0.0], [1.0, 0.5, 0.0]], dtype=dtype)
    mm.save(layer, tmp_path / "x", values="int8")
    loaded = mm.load(tmp_path / "x")["weight"]
    mm.quantize(layer)
    assert torch.equal(layer.weight, loaded) and bool(loaded.isfinite().all()) and loaded[0, 2] == 0
    assert float(loaded[0, 0]) == -float(loaded[0, 1]) > 0.99 * most
    mm.save(layer, tmp_path / "x", values="int8")
    assert torch.equal(mm.load(tmp_path / "x")["weight"], loaded)


def test_what_float32_does_not_hold_has_no_levels(tmp_path):
    layer = nn.Linear(3, 2, bias=False).double()
    layer.weight.data[0, 0] = 1e300
    with pytest.raises(ValueError, match="'weight' holds numbers that are not finite; values='int8'"):
        mm.save(layer, tmp_path / "x", values="int8")
    with pytest.raises(ValueError, match=r"weight passes 3.40282e\+38"):
        mm.quantize(layer)
    mm.save(layer.state_dict(), tmp_path / "x", values="int8")  # as what is infinite
    assert torch.equal(mm.load(tmp_path / "x")["weight"], layer.weight)
