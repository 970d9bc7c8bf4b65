"""Momenta in bfloat16, rounded at random: the plain equations with the same bits, and right on average."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import mirrormask as mm
from mirrormask.optimizer.steps.fused_cpu import table
from mirrormask.optimizer.steps.fused_cpu.rounding import key_halves
from mirrormask.optimizer.weights import STATE_SNAP

BF16 = torch.bfloat16


def build(factors=True, steps=20, sparsity=0.8, nesterov=False, shape=(37, 53), **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(*shape), nn.ReLU(), nn.Linear(shape[1], 3))
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=nesterov)
    method = mm.methods.mirror(sparsity, factors=factors)
    return model, mm.sparsify(model, base, method, steps=steps, **{"state_dtype": BF16, **options})


def train(model, optimizer, steps):
    for _ in range(steps):
        generator = torch.Generator().manual_seed(optimizer.step_count)
        optimizer.zero_grad()
        inputs = torch.randn(16, model[0].in_features, generator=generator)
        (model(inputs) - 1).square().mean().backward()
        optimizer.step()


def momenta(optimizer):
    base, weights = optimizer.parts.base, optimizer.parts.weights
    return [base.state(held)["momentum_buffer"] for x in weights.values() for _, held in weights.trained(x)]


def draws(step, tensor, numel, half):
    """The 16 random bits of each element, in plain integers."""
    low, high = key_halves(step, tensor)
    bits = (np.arange(numel, dtype=np.uint64) + low + (high << 16)) & 0xFFFFFFFF
    bits ^= bits >> 16
    bits = bits * 0x7FEB352D & 0xFFFFFFFF
    bits ^= bits >> 15
    bits = bits * 0x846CA68B & 0xFFFFFFFF
    bits ^= bits >> 16
    return (bits >> 16 if half else bits & 0xFFFF).astype(np.uint32)


def rounded(values, bits):
    """float32 as bfloat16, rounded up where what is cut off and the random bits carry."""
    whole = values.numpy().reshape(-1).view(np.uint32) + bits
    return torch.from_numpy((whole >> 16).astype(np.uint16).view(np.int16)).view(BF16).view(values.shape)


def fma(a, b, c):
    return (torch.as_tensor(a).double() * b.double() + c.double()).float()


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("factors", [True, False])
@pytest.mark.parametrize("threads", [1, 5])
def test_a_step_is_the_plain_equation_with_the_same_random_bits(factors, nesterov, threads, monkeypatch):
    monkeypatch.setattr(table, "ELEMENTS_PER_THREAD", 50)
    monkeypatch.setattr(table, "ELEMENTS_PER_OWN_THREAD", 50)
    monkeypatch.setattr(table, "STREAMED_ELEMENTS", 0 if threads > 1 else 1 << 62)
    torch.set_num_threads(threads)
    model, optimizer = build(factors, nesterov=nesterov, shape=(61, 47))
    train(model, optimizer, 3)
    weights, mu = optimizer.parts.weights, np.float32(0.9)
    for _ in range(3):
        before = [{k: v.clone() for k, v in weights.latents_of(x).items()} for x in weights.values()]
        held = [value.float() for value in momenta(optimizer)]
        grads = [torch.randn_like(x) for x in weights.values()]
        for x, grad in zip(weights.values(), grads, strict=True):
            x.grad = grad
        coupled = np.float32(2 * optimizer._now().alpha(0)) if optimizer._now().coupled else np.float32(0)
        step = optimizer.step_count
        optimizer.step()
        found = iter(momenta(optimizer))
        for k, (latents, grad, alive) in enumerate(zip(before, grads, weights.masks.values(), strict=True)):
            pairs = [("m", "w"), ("w", "m")] if factors else [("u", None)]
            for half, (own, other) in enumerate(pairs):
                pulled = fma(grad, latents[other], coupled * latents[own]) if factors else grad
                b = fma(mu, held.pop(0), pulled)
                b[b.abs() < STATE_SNAP] = 0
                wanted = rounded(b, draws(step, k, b.numel(), half)) * alive
                assert torch.equal(next(found), wanted)
    torch.set_num_threads(1)


def test_what_is_rounded_is_right_on_average():
    """A constant gradient g: the exact momentum tends to g / (1 - mu), where each step's gain is far under one unit."""
    _, optimizer = build(steps=400, sparsity=0.5, shape=(100, 100), factors=False)
    weights = list(optimizer.parts.weights.values())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        group["momentum"] = 0.999
    grad = 1.0
    for _ in range(300):
        for x in weights:
            x.grad = torch.full_like(x, grad)
        optimizer.step()
    exact = sum(0.999**k for k in range(300)) * grad
    alive = momenta(optimizer)[0].float()[optimizer.masks["0.weight"]]
    # Rounded to the nearest, it would stand still where a gain is under half a unit, at 128 of 259.
    assert alive.mean().item() == pytest.approx(exact, rel=2e-3)
    assert 0.001 < alive.std().item() / exact < 0.05


@pytest.mark.parametrize("factors", [True, False])
def test_a_resumed_training_is_the_same_to_the_last_bit(factors):
    model, optimizer = build(factors)
    assert {value.dtype for entry in optimizer.state_dict()["state"].values() for key, value in entry.items()
            if key.endswith("m.momentum_buffer")} <= {BF16}  # fmt: skip
    train(model, optimizer, 7)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    twin_model, twin = copy.deepcopy((model, optimizer))
    other_model, other = build(factors)
    other_model.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    for m, o in ((model, optimizer), (other_model, other), (twin_model, twin)):
        train(m, o, 13)
        o.finalize()
        assert {value.dtype for value in momenta(o)} == {BF16}
        assert mm.sparsity(m).nonzeros == round(0.2 * mm.sparsity(m).numel)
    for a, b, c in zip(model.parameters(), other_model.parameters(), twin_model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    plain_model, plain = build(factors, state_dtype=None)
    plain_model.load_state_dict(saved[0])
    with pytest.warns(UserWarning, match=r"saved with state_dtype=torch.bfloat16 and are kept with state_dtype=None"):
        plain.load_state_dict(saved[1])
    assert {value.dtype for value in momenta(plain)} == {torch.float32}
    train(plain_model, plain, 1)
    with pytest.warns(UserWarning, match="state_dtype=None"):
        other.load_state_dict({**plain.state_dict()})
    assert {value.dtype for value in momenta(other)} == {BF16}
    train(other_model, other, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"state_dtype": torch.float16}, "neither torch.bfloat16 nor None"),
        ({"fused": False}, "fused=False"),
        ({"base": lambda p: torch.optim.AdamW(p)}, "AdamW"),
        ({"base": lambda p: torch.optim.SGD(p, lr=0.1)}, "momentum=0"),
        ({"base": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.1)}, "dampening=0.1"),
        ({"method": mm.methods.gmp(0.5)}, "'gmp' trains Euclidean"),
        ({"model": nn.Linear(8, 8).double()}, "float32"),
    ],
)
def test_where_no_step_keeps_it_it_is_refused_before_the_first_one(change, message):
    model = change.get("model", nn.Linear(8, 8))
    make = change.get("base", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))
    options = {"state_dtype": BF16, **{key: value for key, value in change.items() if key in ("state_dtype", "fused")}}
    method = change.get("method", mm.methods.mirror(0.5))
    with pytest.raises(ValueError, match=message):
        mm.sparsify(model, make(model.parameters()), method, steps=5, **options)


def test_a_step_that_would_round_otherwise_is_refused_with_what_is_in_the_way():
    model, optimizer = build()
    train(model, optimizer, 2)
    model[0].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"there is no gradient of 0\.weight"):
        train(model, optimizer, 1)
