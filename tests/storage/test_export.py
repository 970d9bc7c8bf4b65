"""Exports hold the model's tensors unchanged, and compute what the model computes."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import mirrormask as mm
from mirrormask.storage.torch_types import to_bits


def sparse_network():
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 32),
        nn.ReLU(),
        nn.Linear(32, 10),
    )
    model(torch.randn(16, 3, 8, 8))  # running statistics of its own
    with torch.no_grad():
        for weight in mm.select_weights(model).values():
            weight.mul_(torch.rand_like(weight) < 0.1).add_(0.0)
    return model


pytestmark = [
    pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants"),
]


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)
        self.two.weight = self.one.weight

    def forward(self, x, y):
        return self.two(self.one(x)), x + y


def test_onnx_keeps_every_weight_bit_for_bit_and_agrees_with_onnx_runtime(tmp_path):
    onnx = pytest.importorskip("onnx", reason="the export extra is not installed")
    ort = pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    model, x = sparse_network(), torch.randn(2, 3, 8, 8)
    assert model.training
    done = mm.export.onnx(model, tmp_path / "model.onnx", x, metadata={"who": "me", "classes": ["a", "b"]})
    assert model.training, "the mode is restored"
    assert done.error <= 1e-5
    assert done.opset == 18
    assert done.nbytes == (tmp_path / "model.onnx").stat().st_size
    proto = onnx.load(tmp_path / "model.onnx")
    assert [(entry.domain, entry.version) for entry in proto.opset_import if entry.domain == ""] == [("", 18)]
    assert {entry.key: entry.value for entry in proto.metadata_props}.items() >= {
        "who": "me",
        "classes": '["a", "b"]',
    }.items()
    stored = {item.name: onnx.numpy_helper.to_array(item) for item in proto.graph.initializer}
    for name, weight in model.named_parameters():
        assert stored[name].tobytes() == to_bits(weight).tobytes(), name
        assert np.count_nonzero(stored[name]) == int(torch.count_nonzero(weight))
    session = ort.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    model.eval()
    for batch in (1, 7):
        x = torch.randn(batch, 3, 8, 8)
        (result,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        np.testing.assert_allclose(result, model(x).detach().numpy(), atol=1e-5)


def test_onnx_with_tied_weights_and_several_inputs_and_outputs(tmp_path):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    done = mm.export.onnx(Tied(), tmp_path / "model.onnx", (torch.randn(3, 16), torch.randn(3, 16)))
    assert done.error <= 1e-5
    assert {"one.bias", "two.bias"} < set(done.tensors) < {"one.bias", "two.bias", "one.weight", "two.weight"}


def test_onnx_refuses_what_is_not_the_model_and_leaves_the_old_file(tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime", reason="the export extra is not installed")
    from mirrormask.storage.export import onnx as function

    module = __import__("sys").modules[function.__module__]
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    original = module._export

    def spoiled(model, *arguments):
        proto = original(model, *arguments)
        (weight,) = [item for item in proto.graph.initializer if item.name == "weight"]
        data = bytearray(weight.raw_data)
        data[0] ^= 1
        weight.raw_data = bytes(data)
        return proto

    monkeypatch.setattr(module, "_export", spoiled)
    with pytest.raises(ValueError, match="the ONNX exporter changed 'weight'"):
        mm.export.onnx(nn.Linear(4, 3), path, torch.randn(2, 4))
    monkeypatch.setattr(module, "_export", original)
    with pytest.raises(ValueError, match=r"differs from PyTorch's by .*, allowed 0"):
        wide = nn.Sequential(nn.Linear(512, 512), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 512))
        mm.export.onnx(wide, path, torch.randn(64, 512), tolerance=0.0)
    with pytest.raises(ValueError, match="opset=17 is below 18"):
        mm.export.onnx(nn.Linear(4, 3), path, torch.randn(2, 4), opset=17)
    with pytest.raises(ValueError, match="metadata 'odd' cannot be written"):
        mm.export.onnx(nn.Linear(4, 3), path, torch.randn(2, 4), metadata={"odd": {1, 2}})
    assert path.read_bytes() == b"old"


def test_what_cannot_be_exported_is_said_before_anything_is_built(tmp_path):
    path, layer, x = tmp_path / "m.onnx", nn.Linear(4, 3), torch.randn(2, 4)
    torn = nn.Linear(4, 3)
    torn.weight.data[0, 0] = float("nan")
    cases = [
        ((layer, x, path), TypeError, r"path is a Tensor, not a path; call onnx\(model, path, example\)"),
        ((layer, path, [x]), TypeError, "example is a list"),
        ((layer, path, (x, 3)), TypeError, "example holds a int"),
        ((layer.state_dict(), path, x), TypeError, r"not an nn\.Module"),
        ((layer, path, torch.randn(2, 5)), ValueError, r"does not take the example, \[2, 5\]"),
        ((torn, path, x), ValueError, "weight is not finite"),
        ((nn.Linear(4, 3).bfloat16(), path, x.bfloat16()), ValueError, "no kernels for bfloat16"),
    ]
    for arguments, kind, said in cases:
        with pytest.raises(kind, match=said):
            mm.export.onnx(*arguments)
    for each in (mm.export.torch_sparse, mm.export.two_four):
        with pytest.raises(TypeError, match=r"not an nn\.Module"):
            each("model")
    assert not path.exists()
    half = nn.Sequential(nn.Conv1d(30, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 28, 3)).half()
    assert mm.export.onnx(half, path, torch.randn(2, 30, 30).half()).error < 4e-3


def test_torch_sparse_has_csr_weights_equal_to_the_models(tmp_path):
    model = sparse_network().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    other = mm.export.torch_sparse(model)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    for index in (5, 7):
        weight = other[index].weight
        assert weight.layout == torch.sparse_csr
        assert weight.values().numel() == int(torch.count_nonzero(model[index].weight))
        assert torch.equal(weight.to_dense(), model[index].weight)
    assert other[0].weight.layout == torch.strided
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(other(x), model(x), atol=1e-5, rtol=1e-5)
    torch.save(other.state_dict(), tmp_path / "csr.pt")
    loaded = torch.load(tmp_path / "csr.pt", weights_only=True)
    assert torch.equal(loaded["5.weight"].to_dense(), model[5].weight)


def test_torch_sparse_keeps_ties_and_dense_layers():
    model = Tied()
    with torch.no_grad():
        model.one.weight.mul_(torch.rand(16, 16) < 0.2)
    other = mm.export.torch_sparse(model)
    assert other.one.weight is other.two.weight
    with pytest.raises(ValueError, match=r"Linear has no nn.Linear weight with min_sparsity=0.5 or more zeros"):
        mm.export.torch_sparse(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="min_sparsity=2 is outside"):
        mm.export.torch_sparse(model, min_sparsity=2)


def two_four_layer(rows=32, columns=64, dtype=torch.float16):
    layer = nn.Linear(columns, rows).to(dtype)
    keep = torch.rand(rows, columns // 4, 4).argsort(-1) < 2
    layer.weight.data *= keep.reshape(rows, columns)
    return layer


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_two_four_has_the_kept_values_in_order_and_turns_back(dtype):
    model = nn.Sequential(two_four_layer(dtype=dtype), nn.ReLU(), nn.Linear(32, 10).to(dtype))
    other = mm.export.two_four(model)
    weight = other[0].weight
    assert weight.packed.shape == (32, 32)
    assert weight.meta.dtype == torch.int16
    kept = model[0].weight.detach()
    for row in range(32):
        values = kept[row][kept[row] != 0]
        assert torch.equal(weight.packed[row], values)
    assert torch.equal(weight.to_dense(), kept)
    assert other[2].weight.layout == torch.strided
    assert type(other[2].weight) is nn.Parameter


def test_two_four_says_why_not():
    cases = {
        r"0: torch.float32, not float16 or bfloat16; convert the model first": two_four_layer(dtype=torch.float32),
        r"0: a block of 4 has 4 nonzeros": nn.Linear(64, 32).half(),
        r"0: shape \[30, 64\] is not a multiple of \[32, 64\]": nn.Linear(64, 30).half(),
        "it has no nn.Linear": nn.ReLU(),
    }
    for why, layer in cases.items():
        with pytest.raises(ValueError, match=f"no weight of Sequential can be a 2:4 tensor: {why}"):
            mm.export.two_four(nn.Sequential(layer))


def test_dense_is_plain_safetensors(tmp_path):
    model = Tied()
    mm.export.dense(model, tmp_path / "dense.safetensors")
    loaded = load_file(tmp_path / "dense.safetensors")
    assert set(loaded) == set(model.state_dict())
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
