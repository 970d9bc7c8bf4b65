"""The sizes that are promised, and that the prediction is the file, to the byte."""

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.storage import file_sizes

#: sparsity -> the file may be at most this share of the dense float32 file.
BARS = {0.90: 1 / 6, 0.95: 1 / 12, 0.98: 1 / 25}


def resnet18():
    """The shapes of torchvision's ResNet-18, without the forward pass."""
    model, width = nn.Module(), 64
    model.conv1, model.bn1 = nn.Conv2d(3, 64, 7, bias=False), nn.BatchNorm2d(64)
    for stage, out in enumerate((64, 128, 256, 512), 1):
        blocks = nn.ModuleList()
        for index in range(2):
            block = nn.Module()
            block.conv1, block.bn1 = nn.Conv2d(width, out, 3, bias=False), nn.BatchNorm2d(out)
            block.conv2, block.bn2 = nn.Conv2d(out, out, 3, bias=False), nn.BatchNorm2d(out)
            if index == 0 and width != out:
                block.downsample = nn.Sequential(nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out))
            blocks.append(block)
            width = out
        setattr(model, f"layer{stage}", blocks)
    model.fc = nn.Linear(512, 1000)
    return model


def prune(model, sparsity, spread):
    """Random masks; with ``spread``, layers differ as they do after global magnitude pruning."""
    weights = list(mm.select_weights(model).values())
    with torch.no_grad():
        keys = [torch.rand_like(weight) * (1 + spread * weight[0].numel() ** 0.5) for weight in weights]
        flat = torch.cat([key.reshape(-1) for key in keys])
        cut = flat.kthvalue(flat.numel() - round((1 - sparsity) * flat.numel())).values
        for weight, key in zip(weights, keys, strict=True):
            weight.copy_(torch.where(key > cut, torch.randn_like(weight), 0.0))
    assert abs(mm.sparsity(model).total - sparsity) < 1e-6


@pytest.mark.parametrize("sparsity", list(BARS))
def test_resnet18_reaches_its_sizes(sparsity, tmp_path):
    model = resnet18()
    assert sum(parameter.numel() for parameter in model.parameters()) == 11_689_512
    for spread in (0.0, 0.02):
        prune(model, sparsity, spread)
        path = tmp_path / "model.safetensors"
        mm.save(model, path, metadata={"method": "pilot"})
        dense = sum(tensor.nbytes for tensor in model.state_dict().values())
        assert path.stat().st_size <= BARS[sparsity] * dense


@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"values": "int8"}, {"values": "float16"}], ids=str)
def test_the_prediction_is_the_size_of_the_file(options, tmp_path):
    model = nn.Sequential(nn.Linear(100, 80), nn.BatchNorm1d(80), nn.Linear(60, 12), nn.Linear(12, 7))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(80, 100) < 0.03).add_(0.0)
        model[2].weight.mul_(torch.rand(12, 60) < 0.5).add_(0.0)
    path = tmp_path / "model.safetensors"
    predicted = mm.predict_size(model, metadata={"run": "1"}, **options)
    mm.save(model, path, metadata={"run": "1"}, **options)
    assert int(predicted) == predicted.total == path.stat().st_size
    assert file_sizes(path) == predicted
    by_name = {tensor.name: tensor for tensor in predicted.tensors}
    assert by_name["0.weight"].encoding == "gaps"
    assert by_name["2.weight"].encoding == "bitmask"
    assert by_name["3.weight"].encoding == "dense"


def test_the_table_shows_what_other_encodings_would_give():
    weight = torch.zeros(100, 100)
    weight[0, :4] = 1.0
    sizes = mm.predict_size({"w": weight})
    (tensor,) = sizes.tensors
    coded = tensor.others.pop("coded")
    # gaps: 4 codes, 39 escapes for the 9996 zeros after them, 4 values; blocks: 4:16, 625 * 11 bits and 625 * 4 values
    assert tensor.nbytes == tensor.others["gaps"] == 4 + 39 + 16
    assert tensor.others == {"dense": 40_000, "bitmask": 1250 + 16, "gaps": 59, "blocked": 860 + 10_000}
    tensor.others["coded"] = coded
    header, row, total = str(sizes).splitlines()
    columns = [
        "tensor",
        "shape",
        "type",
        "zeros",
        "encoding",
        "bytes",
        "as_dense",
        "as_bitmask",
        "as_gaps",
        "as_blocked",
        "as_coded",
    ]
    assert header.replace("as ", "as_").split() == columns
    assert row.split() == ["w", "100x100", "F32", "99.96%", "gaps", "59", "40,000", "1,266", "59", "10,860", f"{coded}"]
    assert f"{sizes.total:,} bytes" in total and "dense 40,000" in total
