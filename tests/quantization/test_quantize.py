"""Weights on levels: zeros stay, nothing is rounded twice, and with batches the output is kept better."""

import itertools

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.quantization.rounding import round_together


def sparse(model, sparsity=0.6):
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand_like(p) >= sparsity)
    return model.eval()


def networks():
    return {
        "mlp": (nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 10)), (64, 20)),
        "cnn": (
            nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3, stride=2)),
            (16, 4, 11, 11),
        ),
        "up": (nn.Sequential(nn.Conv2d(3, 5, 3), nn.ConvTranspose2d(5, 4, 3)), (8, 3, 9, 9)),
    }


@pytest.mark.parametrize("name", ["mlp", "cnn", "up"])
@pytest.mark.parametrize("with_batches", [False, True])
def test_zeros_stay_and_a_second_time_changes_nothing(name, with_batches, tmp_path):
    model, shape = networks()[name]
    sparse(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batches = [torch.randn(shape) for _ in range(2)] if with_batches else None
    report = mm.quantize(model, batches)
    matrices = {key for key, value in before.items() if value.dim() > 1}
    assert {layer.name for layer in report.layers} == matrices
    once = {key: value.clone() for key, value in model.state_dict().items()}
    for key, value in once.items():
        if key in matrices:
            assert (value[before[key] == 0] == 0).all()
            assert not torch.equal(value, before[key])
        else:
            assert torch.equal(value, before[key])
    mm.save(model, tmp_path / "x", values="int8")
    assert all(torch.equal(value, once[key]) for key, value in mm.load(tmp_path / "x").items())
    mm.quantize(model)
    assert all(torch.equal(value, once[key]) for key, value in model.state_dict().items())


def test_with_batches_the_output_is_kept_better():
    torch.manual_seed(0)
    mix = torch.randn(40, 40) @ torch.diag(torch.logspace(0, -2, 40)) @ torch.randn(40, 40)
    batches = [torch.randn(128, 40) @ mix for _ in range(3)]
    for make in (lambda: nn.Linear(40, 50), lambda: nn.Sequential(nn.Unflatten(1, (4, 10)), nn.Conv1d(4, 8, 3))):
        model = sparse(make(), 0.3)
        nearest, chosen = (nn.Sequential(make()), nn.Sequential(make()))
        for other in (nearest, chosen):
            other[0].load_state_dict(model.state_dict())
        mm.quantize(nearest)
        (layer,) = mm.quantize(chosen, batches).layers
        assert layer.error < 0.95 * layer.nearest
        x = torch.cat(batches)
        with torch.no_grad():
            errors = [float((other(x) - model(x)).square().sum()) for other in (nearest, chosen)]
        assert errors[1] < 0.95 * errors[0]
        assert errors[1] / errors[0] == pytest.approx(layer.error / layer.nearest, rel=0.02)


def test_no_single_change_of_a_level_is_better():
    torch.manual_seed(1)
    x = torch.randn(2, 3, 6, dtype=torch.float64) * 4
    x[torch.rand(x.shape) < 0.3] = 0
    data = torch.randn(2, 6, 6, dtype=torch.float64)
    moment, scale = data @ data.mT, torch.full((2, 3), 0.7, dtype=torch.float64)
    start = (x / 0.7).round()
    found = round_together(x, start, scale, moment, sweeps=50)

    def cost(level):
        error = level * 0.7 - x
        return float(((error @ moment) * error).sum())

    assert cost(found) <= cost(start)
    largest = start.abs().argmax(2)
    for group, row, column in itertools.product(range(2), range(3), range(6)):
        if x[group, row, column] == 0 or column == largest[group, row]:
            assert found[group, row, column] == start[group, row, column]
            continue
        for step in (-1, 1):
            other = found.clone()
            other[group, row, column] += step
            assert cost(other) >= cost(found) - 1e-9


def test_layers_that_cannot_be_looked_at_are_rounded_too():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.lstm, self.head = nn.Embedding(20, 8), nn.LSTM(8, 6), nn.Linear(6, 3)

        def forward(self, x):
            return self.head(self.lstm(self.embedding(x))[0])

    report = mm.quantize(Words(), [torch.randint(20, (5, 7))])
    names = {"embedding.weight", "lstm.weight_ih_l0", "lstm.weight_hh_l0", "head.weight"}
    assert {layer.name for layer in report.layers} == names
    assert all(0 < layer.error <= layer.nearest < 1e-3 for layer in report.layers)
    assert "head.weight" in str(report)
    block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    errors = {each.name: each.error / each.nearest for each in mm.quantize(block, [torch.randn(9, 5, 16)]).layers}
    assert len(errors) == 4 and errors["self_attn.out_proj.weight"] == 1.0 > errors["linear1.weight"]


def test_layers_that_no_batch_reaches_and_those_of_another_forward_are_rounded_too():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 3 * super().forward(x)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.scaled = nn.Linear(20, 30), Scaled(30, 10)
            self.auxiliary = nn.Linear(30, 10)  # as GoogLeNet's: in training alone

        def forward(self, x):
            x = self.body(x).relu()
            return (self.scaled(x), self.auxiliary(x)) if self.training else self.scaled(x)

    model = Net()
    errors = {each.name: each.error / each.nearest for each in mm.quantize(model, [torch.randn(64, 20)]).layers}
    assert errors == {"body.weight": errors["body.weight"], "scaled.weight": 1.0, "auxiliary.weight": 1.0}
    assert errors["body.weight"] < 1.0 and model.training
    with pytest.raises(ValueError, match=r"no batch reaches body\.weight.*give batches that do$"):
        mm.quantize(model, [torch.randn(0, 20)])


def test_bad_input_leaves_the_model_alone():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = torch.randn(5, 4)
    cases = [
        (ValueError, "does not take batch 1", {"batches": [batch, torch.randn(5, 3)]}),
        (ValueError, "batches is empty", {"batches": []}),
        (TypeError, "not a list of batches", {"batches": batch}),
        (ValueError, "is not finite", {"batches": [batch / 0]}),
        (ValueError, "there are none", {"forward": lambda model, batch: model(batch)}),
    ]
    for kind, message, arguments in cases:
        with pytest.raises(kind, match=message):
            mm.quantize(model, **arguments)
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match="nothing to round"):
        mm.quantize(nn.ReLU())
    with pytest.raises(TypeError, match=r"not an nn\.Module"):
        mm.quantize(3)
    model[1].weight.data[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"1\.weight.*not finite"):
        mm.quantize(model)
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="on the meta device, without values"):
        mm.quantize(model)
