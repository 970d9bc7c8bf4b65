"""Recurrent layers: every kind against PyTorch's own in 64 bits, at lengths and batches that the build never saw."""

import copy

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.machine.targets import available_targets
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.graph.moments import moments
from mirrormask.runtime.model.accuracy import difference
from mirrormask.runtime.model.moments import Moments
from mirrormask.runtime.schedule.tune import Tuner


@pytest.fixture(autouse=True)
def _own_cache(nothing_is_settled, tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path_factory.getbasetemp() / "recurrent"))


class Tagger(nn.Module):
    """A recurrent layer between two others; it takes a state, and gives one, if ``states`` says so."""

    def __init__(self, layer: nn.Module, outputs: int, states: bool) -> None:
        super().__init__()
        self.embed, self.layer, self.states = nn.Linear(6, 10), layer, states
        self.head = nn.Linear(outputs, 3)

    def forward(self, x, *state):
        given = (state if len(state) > 1 else state[0]) if state else None
        y, last = self.layer(self.embed(x), given)
        return (self.head(y), last) if self.states else self.head(y)


def sparse(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(torch.rand_like(p) >= 0.7)
    return model.eval()


#: name -> the model, numbers of states of one layer and direction, layers times directions, whether the batch is first.
MODELS = {
    "lstm": lambda: (Tagger(nn.LSTM(10, 12), 12, states=False), 2, 1, False),
    "lstm with states, ragged": lambda: (Tagger(nn.LSTM(10, 13, 2, batch_first=True), 13, states=True), 2, 2, True),
    "lstm both ways, no bias": lambda: (Tagger(nn.LSTM(10, 8, bidirectional=True, bias=False), 16, True), 2, 2, False),
    "gru": lambda: (Tagger(nn.GRU(10, 12, 2, bidirectional=True, batch_first=True), 24, states=True), 1, 4, True),
    "tanh": lambda: (Tagger(nn.RNN(10, 9), 9, states=True), 1, 1, False),
    "relu": lambda: (Tagger(nn.RNN(10, 16, nonlinearity="relu", bias=False), 16, states=False), 1, 1, False),
}


def agree(fast, model, *given):
    exact = copy.deepcopy(model).double()(*(x.double() for x in given))
    assert difference(fast(*given), exact) < 2e-6


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_a_recurrent_layer_is_native_at_any_length_and_batch(name):
    model, states, number, first = MODELS[name]()
    model = sparse(model)

    def called(length: int, batch: int, *, state: bool) -> list[torch.Tensor]:
        x = torch.randn((batch, length, 6) if first else (length, batch, 6))
        return [x, *(torch.randn(number, batch, model.layer.hidden_size) for _ in range(states if state else 0))]

    for state in (False, True):
        fast = mm.compile(model, tuple(called(5, 2, state=state)), tune=False, force=True)
        assert fast.report.compiled and not any("lstm" in what or "gru" in what for what, _ in fast.report.left)
        assert sum(isinstance(region, Moments) for region in fast.regions) == number
        for length, batch in ((5, 2), (1, 1), (9, 1), (3, 37)):
            agree(fast, model, *called(length, batch, state=state))
        assert len(fast._body.captures) == 1, "other lengths are no new captures"


class Cells(nn.Module):
    """A loop in Python over cells of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.gru, self.rnn, self.head = (
            nn.LSTMCell(4, 8),
            nn.GRUCell(8, 8),
            nn.RNNCell(8, 8),
            nn.Linear(8, 2),
        )

    def forward(self, x):
        h = c = g = r = x.new_zeros(x.shape[1], 8)
        for t in range(3):
            h, c = self.lstm(x[t], (h, c))
            g = self.gru(h, g)
            r = self.rnn(g, r)
        return self.head(r), c


@torch.no_grad()
def test_cells_in_a_loop_of_the_users_own():
    model = sparse(Cells())
    fast = mm.compile(model, torch.randn(3, 2, 4), tune=False, force=True)
    assert fast.report.compiled and not any("cell" in what for what, _ in fast.report.left)
    for batch in (2, 1, 5):
        agree(fast, model, torch.randn(3, batch, 4))


@torch.no_grad()
def test_what_the_loop_does_not_know_stays_in_pytorch_and_is_right():
    projected = sparse(Tagger(nn.LSTM(10, 12, proj_size=5), 5, states=True))
    fast = mm.compile(projected, torch.randn(4, 2, 6), tune=False, force=True)
    assert any("lstm" in what for what, _ in fast.report.left)
    agree(fast, projected, torch.randn(4, 2, 6))
    model = sparse(Tagger(nn.LSTM(10, 12), 12, states=False))
    fast = mm.compile(model, torch.randn(4, 2, 6), tune=False, force=True)
    again = mm.compile(model, torch.randn(4, 2, 6), tune=False, force=True)  # its structure comes from the cache
    agree(again, model, torch.randn(7, 3, 6))
    agree(copy.deepcopy(again), model, torch.randn(2, 9, 6))
    with pytest.raises(RuntimeError, match="sequence length"):  # in the model's own words
        fast(torch.randn(0, 2, 6))
    with pytest.raises(ValueError, match="moments of a recurrent layer"):
        fast.save("nowhere.mirror")


@torch.no_grad()
@pytest.mark.parametrize("target", available_targets(), ids=lambda target: target.name)
@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_every_instruction_set_computes_what_the_reference_does(target, kind):
    layer = {"lstm": nn.LSTM, "gru": nn.GRU}[kind](10, 13)
    model = sparse(Tagger(layer, 13, states=True))
    captured = capture(model, (torch.randn(5, 2, 6),))
    (graph,) = (graph for graph in captured.regions.values() if graph.recurrent)
    region = Moments(graph, target, Tuner(measure=False))
    weight, bias = layer.weight_hh_l0, layer.bias_hh_l0
    for batch in (1, 2, 40):
        pre, first = torch.randn(4, batch, len(bias)), torch.randn(batch, 26 if kind == "lstm" else 13)
        if batch == 2:
            pre[1, 0, 3] = float("nan")
        got, want = region(pre, first), moments(pre, first, weight, bias, kind)
        both = ~want.isnan()
        assert difference(got[both], want[both]) < 1e-5 and not got[both].isnan().any()
        assert batch != 2 or bool(got[1, 0].isnan().any())  # it goes where nonzero weights lead, in its own sequence
