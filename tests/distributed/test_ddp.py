"""DistributedDataParallel's own tools: hooks, no_sync, join, static graphs, each in a world of two processes."""

import contextlib
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from world import BASES, STEPS, batch, make_method, make_model, run_world

import mirrormask as mm

#: Not torch's batched PowerSGD, which fails in a check of its own (torch 2.14) before anything of ours is called.
HOOKS = ("bf16", "fp16", "powersgd")


def test_the_tools_of_ddp(tmp_path):
    run_world(2, _smoke, tmp_path)


@pytest.mark.distributed
def test_the_tools_of_ddp_with_many_methods(tmp_path):
    run_world(2, _all, tmp_path)


def _smoke(rank, size, folder):
    warnings.simplefilter("ignore")
    alone = [dist.new_group([r]) for r in range(size)][rank]
    yield "bf16", lambda: hooked("bf16", "mirror", "sgd", rank)
    yield "no_sync", lambda: accumulated("rigl", "sgd", rank, alone)
    yield "static", lambda: static("gmp", "adamw", rank, alone)
    yield "throwing", lambda: joined_that_throws(rank)
    yield "join", lambda: joined(rank)


def _all(rank, size, folder):
    warnings.simplefilter("ignore")
    alone = [dist.new_group([r]) for r in range(size)][rank]
    for name, base in (("mirror", "adamw"), ("pilot", "sgd"), ("rigl", "sgd"), ("str", "sgd"), ("acdc", "adamw")):
        for hook in HOOKS:
            yield f"{hook}-{name}", lambda hook=hook, name=name, base=base: hooked(hook, name, base, rank)
        yield f"no_sync-{name}", lambda name=name, base=base: accumulated(name, base, rank, alone)
        yield f"static-{name}", lambda name=name, base=base: static(name, base, rank, alone)
        for kind in ("checkpointing", "compile", "buckets"):
            yield f"{kind}-{name}", lambda kind=kind, name=name, base=base: static(name, base, rank, alone, kind)


def parts(step, rank, pieces=1):
    """This process's part of a batch, in so many pieces."""
    x, y = batch(step)
    return list(zip(x[rank::2].chunk(pieces), y[rank::2].chunk(pieces), strict=True))


def fit(model, optimizer, rank, pieces=1, steps=STEPS):
    """One epoch and its end; gradients of pieces are added up within no_sync."""
    for step in range(steps):
        optimizer.zero_grad()
        own = parts(step, rank, pieces)
        for i, (x, y) in enumerate(own):
            with model.no_sync() if i + 1 < len(own) else contextlib.nullcontext():
                (nn.functional.mse_loss(model(x.to(dtype_of(model))), y.to(dtype_of(model))) / pieces).backward()
        optimizer.step()
        if step % 8 == 7:
            optimizer.epoch_end(score=step / 100)
    optimizer.finalize()


def dtype_of(model):
    return next(model.parameters()).dtype


def ranks_are_equal(optimizer):
    """Weights, latents and masks are the same bits on both, and exactly so many live."""
    weights = optimizer.weights
    for x in weights.values():
        for value in (x.detach(), *weights.latents_of(x).values(), weights.mask_of(x)):
            both = [torch.empty_like(value) for _ in range(2)]
            dist.all_gather(both, value.contiguous())
            assert torch.equal(*both)
    total = sum(x.numel() for x in weights.values())
    assert sum(int((x != 0).sum()) for x in weights.values()) == round(0.3 * total)


def hooked(hook, name, base, rank):
    """Gradients are sent with fewer bits, or as products of thin matrices; both sides still do the same."""
    model, steps = DistributedDataParallel(make_model().float()), 24
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), make_method(name), steps=steps)
    if hook in ("bf16", "fp16"):
        hooks = {"bf16": default_hooks.bf16_compress_hook, "fp16": default_hooks.fp16_compress_hook}
        model.register_comm_hook(None, hooks[hook])
    else:
        options = {"matrix_approximation_rank": 1, "start_powerSGD_iter": 3, "min_compression_rate": 0.5}
        state = powerSGD_hook.PowerSGDState(dist.group.WORLD, **options)
        model.register_comm_hook(state, powerSGD_hook.powerSGD_hook)
    before = loss_of(model)
    fit(model, optimizer, rank, steps=steps)
    ranks_are_equal(optimizer)
    assert loss_of(model) < before


def loss_of(model):
    with torch.no_grad():
        batches = [batch(step) for step in range(8)]
        return sum(float(nn.functional.mse_loss(model(x.float()), y.float())) for x, y in batches)


def reference(name, base, alone):
    """One process with whole batches."""
    model = make_model()
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), make_method(name), steps=STEPS, process_group=alone)
    for step in range(STEPS):
        optimizer.zero_grad()
        x, y = batch(step)
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
        if step % 8 == 7:
            optimizer.epoch_end(score=step / 100)
    optimizer.finalize()
    return model


def same(model, other):
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=1e-6, atol=1e-7)
        assert torch.equal(a == 0, b == 0)


def accumulated(name, base, rank, alone):
    model = DistributedDataParallel(make_model())
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), make_method(name), steps=STEPS)
    fit(model, optimizer, rank, pieces=2)
    ranks_are_equal(optimizer)
    same(model.module, reference(name, base, alone))


class Checkpointed(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def static(name, base, rank, alone, kind="static"):
    """A static graph; activations that are made again; a compiled model; gradients as views of small buckets."""
    model = make_model()
    if kind == "checkpointing":
        model = Checkpointed(*model)
    options = {"bucket_cap_mb": 1e-4, "gradient_as_bucket_view": True} if kind == "buckets" else {}
    wrapped = DistributedDataParallel(model, static_graph=kind == "static", **options)
    called = torch.compile(wrapped, backend="eager") if kind == "compile" else wrapped
    optimizer = mm.sparsify(called, BASES[base](model.parameters()), make_method(name), steps=STEPS)
    fit(called, optimizer, rank)
    ranks_are_equal(optimizer)
    same(model, reference(name, base, alone))


def uneven(model, optimizer, rank, **options):
    with model.join(**options):
        for step in range(6 - 3 * rank):
            optimizer.zero_grad()
            for x, y in parts(step, rank):
                nn.functional.mse_loss(model(x), y).backward()
            optimizer.step()


def joined(rank):
    model = DistributedDataParallel(make_model())
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("gmp"), steps=STEPS)
    with pytest.raises(RuntimeError, match=r"takes no part in changes of the mask; give every process as many batches"):
        uneven(model, optimizer, rank)
    assert optimizer.step_count == 0


def joined_that_throws(rank):
    model = DistributedDataParallel(make_model())
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("gmp"), steps=STEPS)
    with pytest.raises(RuntimeError, match="exhaust"):
        uneven(model, optimizer, rank, throw_on_early_termination=True)
    assert optimizer.step_count == 3
