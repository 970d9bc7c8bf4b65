"""One battery for every method: a new one is a row in ``mm.methods.names()`` and nothing here."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn

import mirrormask as mm
from clusters import BASES, NAMES, STEPS, batch, expected_nonzeros, make_method, make_model
from mirrormask.compare.runner import processes


def wrap(model, name, base="sgd", steps=STEPS):
    method = make_method(name)
    data = {"batches": [batch(10_000)]} if method.reads_data else {}
    return mm.sparsify(model, BASES[base](model.parameters()), method, steps=steps, **data)


def train(model, optimizer, first, last, dtype=torch.float32, scheduler=None):
    for step in range(first, last):
        optimizer.zero_grad()
        x, y = batch(step, dtype)
        loss = nn.functional.cross_entropy(model(x).float(), y)
        loss.backward()
        optimizer.step()
        if scheduler:
            scheduler.step()
        if step % 10 == 9:
            optimizer.epoch_end(score=step / 100)


def accuracy(model, dtype=torch.float32):
    x, y = batch(99_999, dtype)
    return float((model(x).argmax(1) == y).float().mean())


@pytest.mark.parametrize("base", ["sgd", "adamw"])
@pytest.mark.parametrize("name", NAMES)
def test_learns(name, base):
    model = make_model()
    optimizer = wrap(model, name, base, steps=300)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, optimizer.round_steps)
    assert accuracy(model) < 0.5
    train(model, optimizer, 0, 300, scheduler=scheduler)
    optimizer.finalize()
    assert accuracy(model) > 0.85


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("name", NAMES)
def test_is_exactly_as_sparse_as_asked_and_keeps_its_zeros(name, base):
    model = make_model()
    optimizer = wrap(model, name, base)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, optimizer.round_steps)
    train(model, optimizer, 0, STEPS, scheduler=scheduler)
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == expected_nonzeros(name)
    masks = {key: mask.clone() for key, mask in optimizer.masks.items()}
    assert sum(int(mask.sum()) for mask in masks.values()) == expected_nonzeros(name)
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"]
    train(model, optimizer, STEPS, STEPS + 8)
    for key, x in optimizer.weights.items():
        assert torch.equal(x != 0, masks[key]), "zeros came back, or weights died, after finalize"
        assert not (x.signbit() & (x == 0)).any(), "-0.0 is not what a file can leave out"
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == expected_nonzeros(name)


@pytest.mark.parametrize("name", NAMES)
def test_dead_weights_are_zero_after_every_step(name):
    model = make_model()
    optimizer = wrap(model, name, "nesterov")
    for step in range(STEPS):
        train(model, optimizer, step, step + 1)
        for key, mask in optimizer.masks.items():
            assert not optimizer.weights[key][~mask].any()


#: Early, in the middle and late, in rotation: each method stops once under either base, at two of the cuts.
CUTS = (3, 33, 50)
STOPS = [(name, CUTS[(i + j) % 3], base) for i, name in enumerate(NAMES) for j, base in enumerate(("sgd", "adamw"))]


@pytest.mark.parametrize(("name", "cut", "base"), STOPS)
def test_save_load_continue_is_bit_for_bit(name, cut, base):
    def build(scale=1.0):
        model = make_model()
        with torch.no_grad():
            model[0].weight.mul_(scale)
        optimizer = wrap(model, name, base)
        return model, optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, optimizer.round_steps)

    straight_model, straight, scheduler = build()
    train(straight_model, straight, 0, cut, scheduler=scheduler)
    saved = pickle.dumps((straight_model.state_dict(), straight.state_dict(), scheduler.state_dict()))
    train(straight_model, straight, cut, STEPS, scheduler=scheduler)
    model, optimizer, scheduler = build(scale=3.0)  # nothing of another start may stay
    weights, state, schedule = pickle.loads(saved)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    scheduler.load_state_dict(schedule)
    train(model, optimizer, cut, STEPS, scheduler=scheduler)
    straight.finalize()
    optimizer.finalize()
    for a, b in zip(straight_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert straight.diagnostics() == pytest.approx(optimizer.diagnostics(), nan_ok=True, rel=0, abs=0)


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("name", NAMES)
def test_deepcopy_and_pickle_continue_bit_for_bit(name, copier):
    model = make_model()
    optimizer = wrap(model, name)
    train(model, optimizer, 0, 35)
    pairs = [(model, optimizer), copier((model, optimizer))]
    for pair in pairs:
        train(*pair, 35, STEPS)
        pair[1].finalize()
    for a, b in zip(*(pair[0].parameters() for pair in pairs), strict=True):
        assert a is not b
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_accumulation_is_one_step_on_the_whole_batch(name):
    models = [make_model(torch.float64) for _ in range(2)]
    whole, split = (wrap(model, name) if not make_method(name).reads_data else None for model in models)
    if whole is None:
        data = [batch(10_000, torch.float64)]
        whole, split = (
            mm.sparsify(m, BASES["sgd"](m.parameters()), make_method(name), steps=STEPS, batches=data) for m in models
        )
    for step in range(20):
        x, y = batch(step, torch.float64)
        whole.zero_grad()
        nn.functional.cross_entropy(models[0](x), y).backward()
        whole.step()
        split.zero_grad()
        for half in (slice(0, 16), slice(16, 32)):
            (nn.functional.cross_entropy(models[1](x[half]), y[half]) / 2).backward()
        split.step()
    assert split.step_count == 20
    for a, b in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights(name):
    model = make_model(torch.bfloat16)
    method = make_method(name)
    data = {"batches": [batch(10_000, torch.bfloat16)]} if method.reads_data else {}
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=2 * STEPS, **data)
    train(model, optimizer, 0, 2 * STEPS, torch.bfloat16)
    optimizer.finalize()
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    assert mm.sparsity(model).nonzeros == expected_nonzeros(name)
    assert accuracy(model, torch.bfloat16) > 0.6


@pytest.mark.parametrize("name", NAMES)
def test_the_compiled_model_answers_like_the_trained_one(name, tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))
    model = make_model()
    optimizer = wrap(model, name)
    train(model, optimizer, 0, STEPS)
    optimizer.finalize()
    x, _ = batch(99_999)
    model.eval()
    torch.testing.assert_close(mm.compile(model, x, tune=False, force=True)(x), model(x).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.early
def test_ranks_agree(tmp_path, request):
    names = NAMES[::3] if request.config.getoption("sample") else NAMES
    how = processes().get_start_method()  # from a server that has imported torch, where there is one
    arguments = (str(tmp_path / "store"), names)
    torch.multiprocessing.start_processes(_train_on_a_rank, arguments, nprocs=2, start_method=how)


def _train_on_a_rank(rank, store, names):
    """Two processes with data of their own: after each method's training every weight is the same on both."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for name in names:
        model = nn.parallel.DistributedDataParallel(make_model())
        optimizer = wrap(model.module, name)
        train(model, optimizer, rank * STEPS, (rank + 1) * STEPS)
        optimizer.finalize()
        for p in model.parameters():
            both = [torch.empty_like(p) for _ in range(2)]
            dist.all_gather(both, p.detach())
            assert torch.equal(*both), f"{name}: the ranks ended with different weights"
        assert sum(int(x.count_nonzero()) for x in optimizer.weights.values()) == expected_nonzeros(name)
    dist.barrier()  # a rank that ends while the other still sends may abort
    dist.destroy_process_group()


@pytest.mark.parametrize("name", NAMES)
def test_every_method_says_what_it_is(name):
    row = next(row for row in mm.methods.table() if row.name == name)
    doc = mm.methods.get(name).__doc__
    assert row.line.endswith(".") and len(row.line) < 110
    assert make_method(name).name == name
    assert getattr(mm.methods, name) is mm.methods.get(name)
    if name not in ("dense", "mirror"):
        assert "Source:" in doc
        assert row.reference.split("arXiv")[-1].strip()[:9] in doc or "arXiv" not in row.reference
