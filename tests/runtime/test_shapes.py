"""Many shapes, one after the other: what is made for them stays within bounds."""

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.runtime.model import piece
from mirrormask.runtime.schedule import runner

FEATURES, HEADS = 16, 2


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path_factory.getbasetemp() / "shapes"))


class Attends(nn.Module):
    """Two layers with attention between, beside a table that stays in PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.three, self.last = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)
        self.table = nn.Embedding(50, FEATURES)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.three(x).chunk(3, -1))
        return self.last(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def held(fast: mm.runtime.CompiledModel) -> dict[str, int]:
    """How much of everything there is."""
    (region,) = fast.regions
    core = region.core
    body = fast._body
    return {
        "captures": len(body.captures),
        "calls of the module": len(body._found),
        "calls": len(core._calls),
        "plans": len(core.plans()),
        "sizes": len(core._sized),
        "bytes": region.nbytes,
    }


def test_hundreds_of_lengths_leave_a_few_plans():
    model = Attends().eval()
    fast = mm.compile(model, torch.randint(50, (1, 40)), tune=False, force=True)
    order, seen = random.Random(0), []
    lengths = order.sample(range(2, 302), 200)
    with torch.no_grad():
        for number, length in enumerate(lengths):
            x = torch.randint(50, (order.randint(1, 3), length))
            got = fast(x)
            if number % 25 == 0:
                torch.testing.assert_close(got, model(x), rtol=0, atol=1e-5)
                seen.append(held(fast))
    last = seen[-1]
    assert last["captures"] == 1 and last["plans"] <= 12
    assert last["calls"] <= runner.MOST_CALLS < len(lengths) and last["calls of the module"] <= piece.MOST_CALLS
    half = len(seen) // 2
    assert all(one["plans"] == last["plans"] and one["bytes"] == last["bytes"] for one in seen[half:])


def test_many_image_sizes_leave_the_latest(monkeypatch):
    monkeypatch.setattr(runner, "MOST_SHAPES", 3)
    monkeypatch.setattr(runner, "MOST_CALLS", 5)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 3)).eval()
    fast = mm.compile(model, torch.randn(1, 2, 8, 8), tune=False, force=True)
    with torch.no_grad():
        for number in range(9):
            x = torch.randn(1, 2, 8, 4 + number % 7)
            torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    now = held(fast)
    assert now["captures"] == 1 and now["sizes"] <= runner.MOST_SHAPES and now["calls"] <= runner.MOST_CALLS
