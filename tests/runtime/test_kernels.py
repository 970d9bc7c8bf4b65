"""Every kernel a tuner may choose, with every tile and block, against eager PyTorch on each instruction set."""

import dataclasses

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mirrormask.runtime.capture import capture
from mirrormask.runtime.lower import lower
from mirrormask.runtime.problem import Choice, Problem
from mirrormask.runtime.targets import EMULATED_FP16, Target, available_targets
from mirrormask.runtime.tune import candidates

EVERY = available_targets()
if "avx512" in {target.name for target in EVERY}:
    EVERY = (*EVERY, EMULATED_FP16)

#: (outputs, inputs, kernel, stride, padding, dilation, groups), size
LAYERS = [
    ((6, 8, 3, 1, 1, 1, 1), (28, 28)),
    ((5, 8, 3, 1, 1, 1, 1), (14, 14)),
    ((7, 8, 3, 1, 1, 1, 1), (7, 7)),
    ((6, 8, 3, 2, 1, 1, 1), (28, 27)),
    ((6, 8, 1, 2, 0, 1, 1), (14, 14)),
    ((9, 8, 1, 1, 0, 1, 1), (20, 33)),
    ((8, 8, 3, 1, 1, 1, 8), (14, 14)),
    ((8, 4, 5, 1, 2, 1, 2), (16, 16)),
    ((6, 3, 7, 2, 3, 1, 1), (32, 32)),
    ((4, 3, 3, 1, 0, 2, 1), (17, 19)),
]


def choices(problem: Problem) -> list[Choice]:
    """What the tuner would measure, and the same with blocks of one and three planes."""
    found = list(dict.fromkeys(candidates(problem)))
    blocked = [dataclasses.replace(c, block=n) for c in found if c.kernel != "dense" for n in (1, 3)]
    return list(dict.fromkeys(found + blocked))


def outputs(model: nn.Module, x: Tensor, target: Target) -> list[tuple[Choice, Tensor]]:
    """The output of the model's only layer with each choice."""
    with torch.no_grad():
        captured = capture(model, (x,))
    graph = captured.regions[captured.whole]
    tokens = len(x) if graph.rows else 1
    seen: list[Choice] = []

    def note(problem: Problem) -> Choice:
        seen.extend(choices(problem))
        return seen[0]

    lower(graph, target, 1, note, tokens)
    results = []
    for choice in seen:
        plan = lower(graph, target, 1, lambda _, choice=choice: choice, tokens)
        out = torch.full((len(x), *plan.outputs[0]), float("nan"))
        addresses = np.array([x.data_ptr(), out.data_ptr()], np.int64)
        for _ in range(2):  # the second run finds the first one's memory
            plan.run(addresses.ctypes.data, len(x) // tokens)
        results.append((choice, out))
    return results


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))


def check(model: nn.Module, x: Tensor, target: Target, sparsity: float) -> set[str]:
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight.data *= torch.rand_like(module.weight) >= sparsity
    with torch.no_grad():
        expected = model.eval()(x)
    kernels = set()
    atol = 3e-3 * float(expected.abs().max()) if target.half else 2e-6
    for choice, got in outputs(model, x, target):
        kernels.add(choice.kernel)
        torch.testing.assert_close(got, expected, rtol=0, atol=atol, msg=lambda m, choice=choice: f"{choice}: {m}")
    return kernels


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize(("layer", "size"), LAYERS, ids=str)
@pytest.mark.parametrize("sparsity", [0.3, 0.9])
def test_convolutions(target, layer, size, sparsity):
    outputs_, inputs, kernel, stride, padding, dilation, groups = layer
    conv = nn.Conv2d(inputs, outputs_, kernel, stride, padding, dilation, groups)
    kernels = check(nn.Sequential(conv, nn.ReLU()), torch.randn(2, inputs, *size), target, sparsity)
    assert ("dense" in kernels) == (sparsity < 0.7 and groups == 1)


@pytest.mark.parametrize("target", EVERY, ids=lambda target: target.name)
@pytest.mark.parametrize("tokens", [16, 48, 128])
def test_linear_layers_over_tokens(target, tokens):
    tokens *= 2 if target.half else 1  # whole vectors of them
    check(nn.Sequential(nn.Linear(30, 21), nn.ReLU()), torch.randn(2 * tokens, 30)[:tokens], target, 0.8)
