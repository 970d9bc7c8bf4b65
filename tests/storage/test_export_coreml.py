"""Core ML packages: weights stored sparse, bit for bit the model's; what they compute needs a Mac."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

import mirrormask as mm

PATH = "model.mlpackage"
#: (the package has a function of this name)
MODULE = importlib.import_module("mirrormask.storage.export.coreml")
pytest.importorskip("coremltools", reason="the extra coreml is not installed")


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 50), nn.Linear(50, 4)
    model = nn.Sequential(*layers)
    model[1].running_var.uniform_(0.5, 2)
    with torch.no_grad():
        for layer in (model[0], model[4]):
            layer.weight *= torch.rand_like(layer.weight) < 0.1  # which leaves -0.0
    return model.train()


def nbytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def test_sparse_weights_are_stored_sparse_and_are_the_models(tmp_path):
    model, x = network(), torch.randn(1, 3, 8, 8)
    done = mm.export.coreml(model, tmp_path / PATH, x, metadata={"classes": ["a", "b"]})
    assert model.training and model[1].training
    assert (done.sparse, done.dense) == (("0.weight", "4.weight"), ("5.weight",))
    assert done.nbytes == nbytes(tmp_path / PATH)
    kept = sum(int(weight.count_nonzero()) for weight in (model[0].weight, model[4].weight))
    large = model[0].weight.numel() + model[4].weight.numel()
    assert 4 * kept + large / 8 < done.nbytes < 4 * kept + large / 8 + 16_000 < 4 * large
    import coremltools as ct

    spec = ct.models.MLModel(str(tmp_path / PATH), skip_model_load=True).get_spec()
    assert spec.description.metadata.userDefined["classes"] == '["a", "b"]'
    blocks = [b for f in spec.mlProgram.functions.values() for b in f.block_specializations.values()]
    assert [op.type for block in blocks for op in block.operations].count("constexpr_sparse_to_dense") == 2
    half = mm.export.coreml(model, tmp_path / PATH, x, precision="fp16")  # in the place of the other
    assert half.sparse == done.sparse and half.nbytes == nbytes(tmp_path / PATH) < 0.8 * done.nbytes
    assert [path.name for path in tmp_path.iterdir()] == [PATH]


def test_a_changed_or_missing_weight_is_refused():
    state = {"a.weight": torch.eye(3), "a.bias": torch.ones(3)}
    arrays = [(False, np.ones(3, np.float32)), (True, np.eye(3, dtype=np.float32))]
    assert MODULE._check_weights(iter(arrays), state, np.float32) == (("a.weight",), ())
    signed = [(False, np.eye(3, dtype=np.float32))]
    signed[0][1][0, 1] = -0.0  # as a mask leaves it, in a weight that is stored whole
    assert MODULE._check_weights(iter(signed), state, np.float32) == ((), ("a.weight",))
    for wrong in ([(True, 2 * np.eye(3, dtype=np.float32))], [(True, np.eye(4, dtype=np.float32))], []):
        with pytest.raises(ValueError, match=r"changed 'a\.weight' or left it out"):
            MODULE._check_weights(iter(wrong), state, np.float32)


def test_what_cannot_be_written_is_refused_before_anything_is(tmp_path):
    model, x = nn.Linear(4, 3), torch.randn(1, 4)
    with pytest.raises(ValueError, match=r"does not end with \.mlpackage"):
        mm.export.coreml(model, tmp_path / "model.onnx", x)
    with pytest.raises(ValueError, match="fp16, fp32"):
        mm.export.coreml(model, tmp_path / PATH, x, precision="int8")
    assert not list(tmp_path.iterdir())
    (tmp_path / PATH).mkdir()
    (tmp_path / PATH / "mine").write_text("not to be lost")
    with pytest.raises(ValueError, match="is there and no Core ML package, so it is not replaced"):
        mm.export.coreml(model, tmp_path / PATH, x)
    assert (tmp_path / PATH / "mine").is_file()
