"""The laws on a GPU. Without one they are skipped; MIRRORMASK_TEST_DEVICE=cpu runs those that a CPU can answer."""

import os

import pytest
import torch
from torch import nn

import mirrormask as mm
from clusters import BASES, NAMES, OPTIONS, batch, expected_nonzeros, make_method, make_model
from mirrormask.decay import ConstantDecay
from mirrormask.geometry import Hadamard
from mirrormask.masks import Never
from mirrormask.optimizer.steps import FusedGPU

DEVICE = os.environ.get("MIRRORMASK_TEST_DEVICE", "cuda")
THERE = DEVICE != "cuda" or torch.cuda.is_available()
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(
        not THERE, reason="there is no GPU here: `python benchmarks/gpu.py` runs these where there is one"
    ),
]
only_cuda = pytest.mark.skipif(DEVICE != "cuda", reason="of the GPU's own stream, graphs or kernels")
STEPS = 40


def on_device(step, dtype=torch.float32):
    x, y = batch(step, dtype)
    return x.to(DEVICE), y.to(DEVICE)


def wrapped(name, base="sgd", dtype=torch.float32, **options):
    model = make_model(dtype).to(DEVICE)
    method = make_method(name)
    data = {"batches": [on_device(10_000, dtype)]} if method.reads_data else {}
    return model, mm.sparsify(model, BASES[base](model.parameters()), method, steps=STEPS, **data, **options)


def train(model, optimizer, first, last, dtype=torch.float32):
    for step in range(first, last):
        x, y = on_device(step, dtype)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x).float(), y).backward()
        optimizer.step()
        if step % 10 == 9:
            optimizer.epoch_end(score=step / 100)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_is_exactly_as_sparse_as_asked(name, base):
    model, optimizer = wrapped(name, base)
    train(model, optimizer, 0, STEPS)
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == expected_nonzeros(name)
    train(model, optimizer, STEPS, STEPS + 3)
    for key, mask in optimizer.masks.items():
        assert torch.equal(optimizer.weights[key] != 0, mask)


def test_tiny_exact_sparsity():
    test_is_exactly_as_sparse_as_asked("mirror", "adamw")


@pytest.mark.parametrize("name", NAMES)
def test_save_load_continue_is_bit_for_bit(name):
    model, straight = wrapped(name)
    train(model, straight, 0, 15)
    saved = {k: v.clone() for k, v in model.state_dict().items()}, straight.state_dict()
    other, again = wrapped(name)
    other.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    for pair in ((model, straight), (other, again)):
        train(*pair, 15, STEPS)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_kernel_is_the_path_of_tensor_operations(base, dtype):
    (model, fast), (other, plain) = (wrapped("mirror", base, dtype, fused=fused) for fused in (True, False))
    for step in range(8):
        for own, optimizer in ((model, fast), (other, plain)):
            for p in own.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p)
            optimizer.step()
    if DEVICE == "cuda":
        assert isinstance(fast._first_ready(fast._now()), FusedGPU)
    for x, y in zip(fast.weights.values(), plain.weights.values(), strict=True):
        torch.testing.assert_close(fast.state[x]["m"], plain.state[y]["m"], rtol=1e-3, atol=1e-5)


def test_tiny_imbalance_falls_as_the_flow_says():
    """``m² - w² = β exp(-4A)`` where nothing but the decay acts on it, in the limit of small steps."""
    model = make_model().to(DEVICE)
    method = mm.Method(Hadamard(beta=0.3, gain=None), ConstantDecay(0.5), Never())
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.0), method, steps=STEPS)
    train(model, optimizer, 0, STEPS)
    integral = optimizer.diagnostics()["decay_integral"]
    for x in optimizer.weights.values():
        state = optimizer.state[x]
        wanted = torch.full_like(x, 0.3) * torch.exp(torch.tensor(-4 * integral))
        torch.testing.assert_close(state["m"] ** 2 - state["w"] ** 2, wanted, rtol=2e-3, atol=1e-4)


def test_tiny_files_hold_what_the_device_held(tmp_path):
    model, optimizer = wrapped("mirror")
    train(model, optimizer, 0, STEPS)
    optimizer.finalize()
    mm.save(model, tmp_path / "m.safetensors")
    for key, value in mm.load(tmp_path / "m.safetensors").items():
        assert torch.equal(value, model.state_dict()[key].cpu())


@only_cuda
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "name", [name for name in ("dense", "gmp", "gmp_ham", "spred", "pilot", "mirror") if name in NAMES]
)
def test_a_step_never_waits_for_the_device(name, base):
    method = mm.methods.get(name)(**({} if name == "dense" else {"sparsity": 0.5, **OPTIONS.get(name, {})}))
    model = make_model().to(DEVICE)
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), method, steps=100_000)
    data = [on_device(step) for step in range(STEPS)]

    def step(x, y):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    step(*data[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in data[1:]:
            step(x, y)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@only_cuda
def test_forward_and_backward_in_a_graph_and_a_step_after_each_replay():
    pairs = [wrapped("mirror") for _ in range(2)]
    model, optimizer = pairs[0]
    x, y = on_device(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            model.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
    torch.cuda.current_stream().wait_stream(side)
    model.zero_grad()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        nn.functional.cross_entropy(model(x), y).backward()
    for step in range(STEPS):
        new_x, new_y = on_device(step)
        x.copy_(new_x)
        y.copy_(new_y)
        graph.replay()
        optimizer.step()
        train(*pairs[1], step, step + 1)
    optimizer.finalize()
    pairs[1][1].finalize()
    for a, b in zip(*(pair[0].parameters() for pair in pairs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@only_cuda
def test_a_step_inside_a_captured_graph_is_refused():
    model, optimizer = wrapped("mirror")
    train(model, optimizer, 0, 3)
    with (
        pytest.raises(RuntimeError, match="capture forward and backward alone"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


@only_cuda
def test_a_scaled_loss_that_overflows_leaves_the_step_out():
    model, optimizer = wrapped("mirror")
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
    for step in range(6):
        x, y = on_device(step)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss * (1e30 if step == 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert optimizer.step_count == 5
    assert all(p.isfinite().all() for p in model.parameters())


@only_cuda
def test_the_compiled_model_trains():
    model, optimizer = wrapped("mirror")
    train(torch.compile(model), optimizer, 0, STEPS)
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == expected_nonzeros("mirror")
