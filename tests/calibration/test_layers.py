"""A layer as a matrix, and what its inputs are."""

import pytest
import torch
from torch import nn

from mirrormask.calibration import evaluating, feed, held, layers_of, moment_of, survey
from mirrormask.calibration.batches import looks


class Conv1D(nn.Module):
    """As Hugging Face's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs))
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return x @ self.weight + self.bias


Conv1D.__module__ = "transformers.pytorch_utils"


class Conv2dSame(nn.Conv2d):
    """As timm's, of networks from TensorFlow."""

    def forward(self, x):
        padding = []
        for n, k, s, d in zip(x.shape[2:], self.kernel_size, self.stride, self.dilation, strict=True):
            out = (n + s - 1) // s
            total = max((out - 1) * s + (k - 1) * d + 1 - n, 0)
            padding = [total // 2, total - total // 2, *padding]
        return super().forward(nn.functional.pad(x, padding))


Conv2dSame.__module__ = "timm.layers.conv2d_same"

LAYERS = [
    (Conv2dSame(4, 6, 3, stride=2, groups=2), (2, 4, 8, 7)),
    (Conv2dSame(4, 6, (2, 5), stride=(3, 1)), (2, 4, 8, 7)),
    (nn.Linear(6, 4), (3, 6)),
    (nn.Linear(6, 4, bias=False), (2, 3, 6)),
    (nn.Linear(6, 4), (6,)),
    (Conv1D(6, 4), (2, 3, 6)),
    (nn.Conv1d(4, 6, 3), (2, 4, 9)),
    (nn.Conv1d(4, 6, 3, padding=2, stride=2, dilation=2, groups=2), (2, 4, 9)),
    (nn.Conv2d(4, 6, 3, padding=1), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, (3, 2), padding=(2, 1), stride=(1, 2), dilation=(2, 1), groups=2, bias=False), (2, 4, 7, 6)),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3), (4, 7, 6)),
    (nn.Conv2d(4, 6, (4, 3), padding="same"), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 7, 6)),
    (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 6)),
    (nn.Conv3d(2, 4, (1, 2, 3), padding=(0, 1, 1), groups=2), (2, 2, 3, 4, 5)),
]


@pytest.mark.parametrize(("module", "shape"), LAYERS, ids=[f"{m}{s}" for m, s in LAYERS])
def test_the_output_is_the_matrix_times_the_columns(module, shape):
    module.double()
    layer = layers_of(module)[0]
    x = torch.randn(shape, dtype=torch.float64)
    columns = torch.cat(list(layer.columns(x)), 1)
    made = columns @ layer.matrix().mT
    if module.bias is not None:
        made = made + module.bias.view(made.shape[0], 1, -1)
    torch.testing.assert_close(made, layer.outputs(module(x)))
    assert torch.equal(layer.weight_of(layer.matrix()), module.weight)
    with evaluating(module):
        stages = survey(module, [layer], [x, x])
        moment = moment_of(module, stages[0], [x, x])
    torch.testing.assert_close(moment.matrix, 2 * columns.mT @ columns)
    torch.testing.assert_close(moment.norms, (2 * columns.square().sum(1)).sqrt())
    assert moment.places == 2 * columns.shape[1]


def test_a_convolution_unfolded_is_a_linear_layer_on_im2col():
    conv = nn.Conv2d(3, 5, (2, 3), stride=2, padding=1)
    x = torch.randn(2, 3, 6, 7)
    columns = torch.cat(list(layers_of(conv)[0].columns(x)), 1)[0]
    theirs = nn.functional.unfold(x, (2, 3), padding=1, stride=2).mT.reshape(-1, 3, 6).mT.reshape(-1, 18)
    torch.testing.assert_close(columns, theirs)  # theirs has the channels first


def test_many_images_come_some_at_a_time(monkeypatch):
    conv, x = nn.Conv2d(3, 5, 3), torch.randn(7, 3, 6, 6)
    whole = list(layers_of(conv)[0].columns(x))
    monkeypatch.setattr("mirrormask.calibration.layers.CHUNK", 2 * 3 * 36 * 9)
    parts = list(layers_of(conv)[0].columns(x))
    assert len(whole) == 1 and len(parts) == 4
    assert torch.equal(torch.cat(parts, 1), whole[0])


class Attention(nn.Module):
    """Queries, keys and values of one input; the last layer's input is another."""

    def __init__(self):
        super().__init__()
        self.v, self.k, self.q, self.o = (nn.Linear(6, 6) for _ in range(4))
        self.calls = 0

    def forward(self, x, scale=1.0):
        self.calls += 1
        q, k, v = self.q(x), self.k(x), self.v(x)
        return self.o(torch.softmax(q @ k.mT * scale, -1) @ v)


def test_layers_come_in_the_order_of_the_forward_pass_and_those_with_one_input_together():
    model = Attention()
    with evaluating(model):
        stages = survey(model, layers_of(model), [torch.randn(2, 3, 6)] * 2)
        assert [[layer.name[0] for layer in stage.layers] for stage in stages] == [["q", "k", "v"], ["o"]]
        before = model.calls
        moment_of(model, stages[0], [torch.randn(2, 3, 6)] * 2)
        assert model.calls == before + 2


def test_an_input_that_changes_in_place_is_another():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            x += 1
            return y + self.b(x)

    model = InPlace()
    with evaluating(model):
        assert len(survey(model, layers_of(model), [torch.randn(2, 4)])) == 2


def test_a_layer_that_is_called_twice_sees_both_inputs():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x)))

    model, x = Twice().double(), torch.randn(5, 4, dtype=torch.float64)
    layers = layers_of(model)
    with evaluating(model):
        moment = moment_of(model, survey(model, layers, [x])[0], [x])
        both = torch.cat([x, torch.tanh(model.a(x))])
    torch.testing.assert_close(moment.matrix[0], both.mT @ both)
    assert moment.places == 10


def test_tied_layers_are_one_with_the_inputs_of_all():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    x = torch.randn(5, 4, dtype=torch.float64)
    (layer,) = layers_of(model)
    with evaluating(model):
        moment = moment_of(model, survey(model, [layer], [x])[0], [x])
        both = torch.cat([x, model[:2](x)])
    torch.testing.assert_close(moment.matrix[0], both.mT @ both)


def test_batches_are_inputs_pairs_or_keywords():
    model = Attention()
    x = torch.randn(1, 2, 6)
    expected = model(x)
    assert torch.equal(feed(model, (x, 3)), expected)
    assert torch.equal(feed(model, [x]), expected)
    assert torch.equal(feed(model, {"x": x, "scale": 1.0}), expected)
    assert torch.equal(feed(model, 1, lambda model, batch: model(x)), expected)
    assert looks({"x": x, "y": None}) == "a mapping of x: a tensor (1, 2, 6), y: a NoneType"


@pytest.mark.parametrize("one", [torch.zeros(2, 3), {"x": torch.zeros(2)}, (torch.zeros(2), 1), "ab", 3])
def test_one_batch_is_not_several(one):
    with pytest.raises(TypeError, match=r"pass \[batch\]"):
        held(one)


def test_looking_leaves_a_model_as_it_was():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.zeros(()))
            self.a = nn.Linear(3, 3)

        def forward(self, x):
            self.count += 1
            return self.a(x)

    model = nn.Sequential(nn.Dropout(), Counter(), nn.BatchNorm1d(3))
    model[2].eval()
    with evaluating(model):
        survey(model, layers_of(model), [torch.randn(4, 3)])
        assert not model[0].training
    assert [m.training for m in model] == [True, True, False]
    assert model[1].count == 0
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
