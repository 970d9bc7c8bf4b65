"""What docs/contributing.md adds is short, and passes the battery: each of its examples, as it stands on the page."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mirrormask as mm
import test_battery as battery
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Hadamard
from mirrormask.masks import Gradual
from mirrormask.methods import Method, base, named
from mirrormask.progress import Clock
from mirrormask.runtime.graph import convert, pointwise
from mirrormask.runtime.kernels import activation
from mirrormask.runtime.schedule import lower

PAGE = Path(__file__).parent.parent / "docs" / "contributing.md"
BLOCK, GEOMETRY, DECAY, OPERATION, KERNEL = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)


@pytest.fixture
def module_of(tmp_path, monkeypatch):
    """One of the page's examples as a module; what it adds to the table of methods stays for one test."""
    monkeypatch.setattr(base, "_METHODS", dict(base._METHODS))
    monkeypatch.setattr(base, "_REFERENCES", dict(base._REFERENCES))

    def make(name, block):
        path = tmp_path / f"{name}_example.py"
        path.write_text(block)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, module)
        spec.loader.exec_module(module)
        return module

    return make


@pytest.fixture
def one_cycle(module_of, monkeypatch):
    module = module_of("one_cycle", BLOCK)
    monkeypatch.setattr(mm.methods, "one_cycle", module.one_cycle, raising=False)
    return module


def in_the_table(monkeypatch, name, geometry, decay):
    """A method of these parts."""

    def method(sparsity: float) -> Method:
        """An example of the page.

        Source: none.
        """
        return Method(geometry, decay, Gradual(sparsity), name)

    method.__name__ = method.__qualname__ = name
    monkeypatch.setattr(mm.methods, name, named("none")(method), raising=False)
    return name


def passes(name, optimizer):
    battery.test_learns(name, optimizer)
    battery.test_is_exactly_as_sparse_as_asked_and_keeps_its_zeros(name, optimizer)
    battery.test_save_load_continue_is_bit_for_bit(name, 33, optimizer)
    battery.test_dead_weights_are_zero_after_every_step(name)
    battery.test_bfloat16_weights(name)


def test_it_is_short_and_in_the_table(one_cycle):
    assert len(BLOCK.splitlines()) < 60
    assert mm.methods.names()["one_cycle"].startswith("One-cycle pruning")
    curve = one_cycle.OneCycle(0.9, steepness=8.0, offset=4.0, every=0.25)
    values = [curve.sparsity_at(Clock(step, 4)) for step in range(5)]
    top = 0.9 * (1 + math.exp(-4))
    assert values == [None, *(pytest.approx(top / (1 + math.exp(4 - 8 * t))) for t in (0.25, 0.5, 0.75)), 0.9]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.cases(1)
def test_it_passes_the_battery(one_cycle, optimizer):
    passes("one_cycle", optimizer)
    battery.test_every_method_says_what_it_is("one_cycle")


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.cases(1)
def test_the_geometry_passes_the_battery(module_of, monkeypatch, optimizer):
    passes(
        in_the_table(monkeypatch, "soft_square", module_of("soft_square", GEOMETRY).SoftSquare(), ConstantDecay()),
        optimizer,
    )


def test_the_geometry_keeps_the_laws(module_of):
    geometry = module_of("soft_square", GEOMETRY).SoftSquare(a=0.3)
    x, grad = torch.randn(20, 30, dtype=torch.float64), torch.randn(20, 30, dtype=torch.float64)
    theta = geometry.init(x)["theta"].requires_grad_()
    (theta.sign() * ((theta.square() + 0.09).sqrt() - 0.3)).backward(grad)
    (pulled,) = geometry.pullback([grad], [x], {"theta": [theta.detach()]})["theta"]
    torch.testing.assert_close(pulled, theta.grad)
    back = torch.empty_like(x)
    geometry.push([back], {"theta": [theta.detach()]})
    torch.testing.assert_close(back, x)
    slope = theta.detach().abs() / (theta.detach().square() + 0.09).sqrt()
    for adaptive, speed in ((False, slope.square()), (True, slope)):
        rate = geometry.rate(x, {"theta": theta.detach()}, adaptive=adaptive)
        assert rate * float(speed.mean()) == pytest.approx(1.0)


def test_the_decay_passes_the_battery_and_is_the_integral(module_of, monkeypatch):
    decay = module_of("cosine", DECAY).CosineDecay(alpha=0.4)
    assert sum(decay.increment({}, Clock(t, 1000), 0.1, 0.0) for t in range(1000)) == pytest.approx(20.0, rel=1e-2)
    passes(in_the_table(monkeypatch, "cosine", Hadamard(), module_of("cosine", DECAY).CosineDecay()), "sgd")


class Small(nn.Module):
    """A convolution, a function of its maps, and another one."""

    def __init__(self, function):
        super().__init__()
        self.first, self.last, self.function = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 5, 3), function

    def forward(self, x):
        return self.last(self.function(self.first(x)))


def is_native(function):
    """In one region with nothing left, at two sizes and batches."""
    torch.manual_seed(0)
    model = Small(function).eval()
    for layer in (model.first, model.last):
        layer.weight.data *= torch.rand_like(layer.weight) > 0.7
    fast = mm.compile(model, torch.randn(2, 3, 9, 11), tune=False, force=True)
    left = fast.report.left
    for size in ((2, 3, 9, 11), (1, 3, 17, 8), (3, 3, 9, 11)):
        x = torch.randn(size)
        with torch.no_grad():
            torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)
    return fast.report.regions == 1 and not left


@pytest.mark.parametrize("bound", [0.5, 0.1])
@pytest.mark.cases(1)
def test_the_operation_is_native_and_was_not(module_of, monkeypatch, tmp_path, bound):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))
    assert not is_native(lambda y: F.softshrink(y, bound))
    module = module_of("softshrink", OPERATION)
    target = torch.ops.aten.softshrink.default
    converter = pointwise._activation(module.read_softshrink)
    monkeypatch.setitem(convert.CONVERTERS, target, converter)
    monkeypatch.setitem(activation.ACTIVATIONS, "softshrink", module.softshrink)
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path / "another"))
    assert is_native(lambda y: F.softshrink(y, bound))


def test_the_kernel_is_native_and_was_not(module_of, monkeypatch, tmp_path):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))
    assert not is_native(lambda y: y.cumsum(1))
    module = module_of("running_sum", KERNEL)
    for target, converter in module.TABLE.items():
        monkeypatch.setitem(convert.CONVERTERS, target, converter)
    monkeypatch.setattr(lower._Lowering, "_running_sum", module.lower, raising=False)
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path / "another"))
    assert is_native(lambda y: y.cumsum(1))
