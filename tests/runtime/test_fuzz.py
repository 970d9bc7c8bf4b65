"""Random small graphs of the supported layers, with random shapes, settings and sparsities, against eager PyTorch.

They run in a process of its own: a crash of generated code is then a failed test with the graph's seed, not the end of
the whole run.
"""

import os
import random
import sys
import traceback
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn

import mirrormask as mm
from mirrormask.compare.runner import processes
from mirrormask.machine.targets import EMULATED_FP16, available_targets
from mirrormask.runtime.schedule.maps import MapProblem
from mirrormask.runtime.schedule.vectors import VectorProblem

ACTIVATIONS = [nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Hardswish, nn.Identity, nn.Sigmoid, nn.Tanh, nn.ELU, nn.Softplus]
#: The instruction sets of this machine, and half precision, emulated, without and with its check of the range.
NAMES = [target.name for target in available_targets()]
if "avx512" in NAMES:
    NAMES += ["fp16", "fp16 checked"]
SPARSITIES = [0.0, 0.5, 0.9, 0.98, 1.0]


class Sum(nn.Module):
    """``x + f(x)``, with an activation after it."""

    def __init__(self, inner: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.inner, self.activation = inner, activation

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(x + self.inner(x))


@st.composite
def convolution(draw, channels: int, one: bool) -> tuple[nn.Module, int]:
    kernel, stride = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    dilation, padding = draw(st.integers(1, 2)), draw(st.integers(0, 3))
    groups = draw(st.sampled_from([g for g in (1, 2, channels) if channels % g == 0]))
    outputs = groups * draw(st.integers(1, 4))
    make = nn.Conv1d if one else nn.Conv2d
    bias = draw(st.booleans())
    return make(channels, outputs, kernel, stride, padding, dilation, groups, bias=bias), outputs


@st.composite
def image_networks(draw) -> tuple[nn.Module, torch.Tensor, str, str]:
    one = draw(st.booleans())
    channels = draw(st.integers(1, 6))
    size = draw(st.integers(1, 40))
    other = draw(st.integers(1, 40))
    shape = (draw(st.integers(1, 3)), channels, size) if one else (draw(st.integers(1, 3)), channels, size, other)
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["conv", "conv", "residual", "norm", "pool", "activation"]))
        activation = draw(st.sampled_from(ACTIVATIONS))
        if kind == "conv":
            layer, channels = draw(convolution(channels, one))
            layers += [layer, activation()]
        elif kind == "residual":
            kernel = draw(st.sampled_from([1, 3, 5]))
            make = nn.Conv1d if one else nn.Conv2d
            layers.append(Sum(make(channels, channels, kernel, padding=kernel // 2), activation()))
        elif kind == "norm":
            layers.append(nn.BatchNorm1d(channels) if one else nn.BatchNorm2d(channels))
        elif kind == "pool":
            window, step = draw(st.integers(1, 4)), draw(st.integers(1, 3))
            padding = draw(st.integers(0, window // 2))
            pools = (nn.MaxPool1d, nn.AvgPool1d) if one else (nn.MaxPool2d, nn.AvgPool2d)
            layers.append(draw(st.sampled_from(pools))(window, step, padding))
        else:
            layers.append(activation())
    if draw(st.booleans()):
        pool = nn.AdaptiveAvgPool1d(1) if one else nn.AdaptiveAvgPool2d(1)
        layers += [pool, nn.Flatten(), nn.Linear(channels, draw(st.integers(1, 40)))]
    return nn.Sequential(*layers), torch.randn(shape), *draw(options())


@st.composite
def row_networks(draw) -> tuple[nn.Module, torch.Tensor, str, str]:
    features = draw(st.integers(1, 70))
    leading = draw(st.sampled_from([(1,), (2,), (17,), (140,), (2, 3), (1, 1)]))
    layers: list[nn.Module] = []
    x = torch.randn(*leading, features)
    for _ in range(draw(st.integers(1, 3))):
        activation = draw(st.sampled_from(ACTIVATIONS))
        if draw(st.booleans()):
            outputs = draw(st.integers(1, 70))
            layers += [nn.Linear(features, outputs, bias=draw(st.booleans())), activation()]
            features = outputs
        else:
            layers.append(Sum(nn.Linear(features, features), activation()))
    return nn.Sequential(*layers), x, *draw(options())


@st.composite
def options(draw) -> tuple[str, float]:
    return draw(st.sampled_from(NAMES)), draw(st.sampled_from(SPARSITIES))


def agrees(model: nn.Module, x: torch.Tensor, name: str, sparsity: float) -> None:
    for module in model.modules():
        if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            module.weight.data *= torch.rand_like(module.weight) >= sparsity
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    model.eval()
    try:
        with torch.no_grad():
            expected = model(x)
    except RuntimeError:
        return  # PyTorch refuses the shapes: a kernel larger than its input, or nothing left
    half = name.startswith("fp16")
    if half:
        settings_ = {"precision": "fp16", "check_range": "checked" in name}
        with mock.patch("mirrormask.runtime.build.fp16_target", lambda: EMULATED_FP16):
            fast = mm.compile(model, x, tune=False, force=True, **settings_)
    else:
        fast = mm.compile(model, x, tune=False, force=True, instruction_set=name)
    holds_layer = any(isinstance(m, (nn.Conv1d, nn.Conv2d, nn.Linear)) for m in model.modules())
    assert fast.report.compiled == holds_layer, str(fast.report)
    scale = max(1e-3, float(expected.abs().max()))
    torch.testing.assert_close(fast(x), expected, rtol=0, atol=(2.1e-2 if half else 2e-5) * scale)


COMMON = settings(deadline=None, database=None, suppress_health_check=list(HealthCheck))


def fuzz(kind: str, start: int, examples: int) -> None:
    """Check ``examples`` random networks."""
    networks = {"images": image_networks, "rows": row_networks}[kind]

    @seed(start)
    @settings(COMMON, max_examples=examples)
    @given(networks())
    def check(case) -> None:
        agrees(*case)

    torch.set_num_threads(1)
    generator = random.Random(start)
    # Without measuring, a tuner takes the first candidate: let that be any.
    in_order = {kind: kind.candidates for kind in (MapProblem, VectorProblem)}

    def shuffled(problem):
        found = list(in_order[type(problem)](problem))
        return iter(generator.sample(found, len(found)))

    with (
        mock.patch.object(MapProblem, "candidates", shuffled),
        mock.patch.object(VectorProblem, "candidates", shuffled),
    ):
        check()


@pytest.mark.parametrize(("kind", "examples"), [("images", 60), ("rows", 30)])
@pytest.mark.long
def test_random_networks_agree_with_eager(kind, examples, tmp_path):
    process = processes().Process(target=_fuzz_apart, args=(kind, examples, tmp_path))
    process.start()
    process.join()
    error = tmp_path / "error.txt"
    said = error.read_text()[-4000:] if error.exists() else ""
    assert process.exitcode == 0, f"exit code {process.exitcode} (negative: a crash)\n{said}"


def _fuzz_apart(kind: str, examples: int, folder) -> None:
    os.environ["MIRRORMASK_CACHE"] = str(folder / "cache")
    try:
        fuzz(kind, 0, examples)
    except BaseException:
        (folder / "error.txt").write_text(traceback.format_exc())
        raise


if __name__ == "__main__":
    fuzz(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
