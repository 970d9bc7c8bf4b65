"""The step for GPUs, without one: Triton's interpreter against tensor operations, and the compiler's word."""

import importlib.util
import subprocess
import sys

import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Hadamard
from mirrormask.masks import Gradual, Never, keep_count
from mirrormask.optimizer.steps import FusedCPU, FusedGPU

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

BASES = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.8, 0.95), eps=1e-6),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
}


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(FusedGPU, "devices", ("cpu",))
    monkeypatch.setattr(FusedCPU, "_can_serve", lambda self: False)


def small(dtype=torch.float32):
    torch.manual_seed(3)
    layers = (nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 36, 11), nn.Linear(11, 3))
    return nn.Sequential(*layers).to(dtype)


def wrapped(model, base, *, fused, coupled=False, mask=None, lr=None):
    method = mm.Method(Hadamard(), ConstantDecay(0.05, coupled=coupled), mask or Gradual(0.7))
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), method, steps=12, fused=fused)
    if lr is not None:
        for group in optimizer.param_groups:
            group["lr"] = lr
    return optimizer


def gradients(model, step):
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.empty_like(p).copy_(torch.randn(p.shape, generator=generator))


def both(base, dtype=torch.float32, layout=torch.contiguous_format, steps=12, **options):
    models = [small(dtype).to(memory_format=layout) for _ in range(2)]
    pairs = [
        (model, wrapped(model, base, fused=fused, **options))
        for model, fused in zip(models, (True, False), strict=True)
    ]
    for step in range(steps):
        for model, optimizer in pairs:
            gradients(model, step)
            optimizer.step()
        assert isinstance(pairs[0][1]._first_ready(pairs[0][1]._now()), FusedGPU)
    return pairs


@pytest.mark.parametrize("coupled", [False, True], ids=["beside", "coupled"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:weight_decay")
def test_the_kernel_steps_as_tensor_operations_do(base, coupled):
    (model, fast), (other, plain) = both(base, coupled=coupled)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert all(torch.equal(mask, plain.masks[name]) for name, mask in fast.masks.items())
    states = [optimizer.state_dict()["state"] for optimizer in (fast, plain)]
    assert [sorted(state) for state in states[0].values()] == [sorted(state) for state in states[1].values()]
    fast.finalize()
    assert mm.sparsity(model).nonzeros == keep_count(mm.sparsity(model).numel, 0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.usefixtures("interpreted")
def test_narrow_weights_have_factors_of_32_bits(dtype):
    (_, fast), (_, plain) = both("nesterov", dtype, mask=Never())
    for x, y in zip(fast.weights.values(), plain.weights.values(), strict=True):
        torch.testing.assert_close(fast.state[x]["m"], plain.state[y]["m"], rtol=1e-4, atol=1e-6)
        assert x.dtype == dtype
        torch.testing.assert_close(x, y, rtol=1e-2, atol=1e-5)


@pytest.mark.usefixtures("interpreted")
def test_channels_last_weights_and_rates_that_are_tensors():
    (model, fast), (other, _) = both("momentum", layout=torch.channels_last, lr=torch.tensor(0.02))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    del fast


@pytest.mark.usefixtures("interpreted")
def test_weights_of_more_than_one_piece_and_places_that_are_not_aligned():
    models = [nn.Sequential(nn.Linear(50, 60), nn.Linear(60, 7)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    pairs = [
        (model, wrapped(model, "momentum", fused=fused)) for model, fused in zip(models, (True, False), strict=True)
    ]
    for step in range(5):
        for model, optimizer in pairs:
            gradients(model, step)
            for p in model.parameters():  # as the views of a bucket of DistributedDataParallel may lie
                p.grad = torch.cat([p.grad.new_zeros(1), p.grad.flatten()])[1:].view(p.shape)
            optimizer.step()
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
def test_a_gradient_that_is_not_finite_leaves_the_step_out():
    model = small()
    optimizer = wrapped(model, "momentum", fused=True)
    gradients(model, 0)
    optimizer.step()
    before = [p.detach().clone() for p in model.parameters()]
    gradients(model, 1)
    model[3].weight.grad[2, 3] = float("nan")
    optimizer.step()
    assert optimizer.skipped_steps == 1
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.usefixtures("interpreted")
def test_on_a_device_a_bad_gradient_counts_as_zeros(monkeypatch):
    """What a GPU does, where nobody waits to find out: the flag stays there, and the kernel reads it."""
    monkeypatch.setattr(FusedGPU, "_on_device", True)
    monkeypatch.setattr(torch.cuda, "device", lambda device: __import__("contextlib").nullcontext())
    model = small()
    optimizer = wrapped(model, "momentum", fused=True, mask=Never())
    for step in range(2):
        gradients(model, step)
        if step:
            model[3].weight.grad[2, 3] = float("inf")
        optimizer.step()
    zeros = small()
    reference = wrapped(zeros, "momentum", fused=False, mask=Never())
    gradients(zeros, 0)
    reference.step()
    for p in zeros.parameters():
        p.grad.zero_()
    reference.step()
    for a, b in zip(model.parameters(), zeros.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert optimizer.skipped_steps == 1


COMPILE = """
import triton, torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mirrormask.optimizer.steps.fused_gpu import kernel
for adam, nesterov, x, aligned in ((False, True, "float32", True), (True, False, "bfloat16", False)):
    constants = {"x_dtype": kernel.DTYPES[x], "grad_dtype": kernel.DTYPES[x], "adam": adam, "nesterov": nesterov,
                 "aligned": aligned, "whole": aligned, "block": 1024}
    signature = {"table": "*i64", "numbers": "*fp32", "pieces": "*i64", "good": "*i1"}
    signature |= dict.fromkeys(constants, "constexpr")
    made = triton.compile(ASTSource(kernel.step, signature, constants), target=GPUTarget("cuda", 90, 32))
    print(len(made.asm["cubin"]), made.asm["ptx"].count("ld.global.v4"))
"""


def test_the_kernel_compiles_for_a_gpu_and_reads_whole_lines(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], capture_output=True, text=True, env=_environment(tmp_path), check=False
    )
    assert done.returncode == 0, done.stderr
    sgd, adam = (line.split() for line in done.stdout.splitlines())
    assert int(sgd[0]) and int(adam[0])
    assert int(sgd[1]) >= 5, "aligned arrays are read four values at a time"


def _environment(folder):
    import os

    return {**os.environ, "TRITON_CACHE_DIR": str(folder), "TRITON_INTERPRET": "0"}
