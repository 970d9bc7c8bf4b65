"""Sharded training is one process's training: each law in worlds of real processes, many in one world."""

import contextlib
import functools
import warnings

import pytest
import torch
import torch.distributed as dist
import world
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from world import BASES, STEPS, batch, make_method, make_model, mesh_of, run_world, sharded, train, whole

import mirrormask as mm

#: What differs in how it sums, chooses or exchanges; every other method is made of these parts.
METHODS = [("mirror", "sgd"), ("mirror", "adamw"), ("str", "sgd"), ("cs", "adamw"), ("rigl", "sgd"), ("set", "adamw"),
           ("acdc_ham", "sgd"), ("pilot", "sgd"), ("sign_in", "sgd"), ("powerprop", "adamw"),
           ("lth", "sgd"), ("elsa", "adamw"), ("dwf", "sgd")]  # fmt: skip


@pytest.mark.early
def test_two_processes(tmp_path, request):
    step = 3 if request.config.getoption("sample") else 1
    run_world(2, functools.partial(_two, methods=METHODS[::step]), tmp_path)


@pytest.mark.long
def test_three_processes(tmp_path):
    run_world(3, _three, tmp_path)


@pytest.mark.long
def test_four_processes(tmp_path):
    run_world(4, _four, tmp_path)


def _two(rank, size, folder, methods):
    warnings.simplefilter("ignore")
    alone = [dist.new_group([r]) for r in range(size)][rank]
    for name, base in methods:
        yield f"{name}-{base}", lambda name=name, base=base: equals_one_process(name, base, rank, size, alone)
    floor = {"floor": 0.5, "small": 1e-3}
    for name in ("gmp", "str"):
        yield f"floor-{name}", lambda name=name: equals_one_process(name, "sgd", rank, size, alone, **floor)
    yield "exchanges", exchanges_do_not_grow_with_the_model
    yield "nan", lambda: a_nan_of_one_rank_skips_all(rank)
    yield "sparsity", lambda: zeros_are_counted_and_kept(rank)
    yield "file", lambda: each_process_reads_its_part(folder)
    yield "refused", refused_by_name
    yield "order", sharded_afterwards_is_refused
    yield "agreement", lambda: disagreement_is_named(rank)
    yield "one goes its own way", lambda: one_process_goes_its_own_way(rank)
    yield "scores", lambda: what_each_measures_is_averaged(rank)
    yield "weight norm", an_empty_row_of_weight_norm_is_refused
    yield "ddp", lambda: rank_0_s_latents_are_everyone_s(rank)
    yield "columns", lambda: columns_sharded(rank, size, alone)
    for kind in ("bf16", "checkpointing", "compile", "offload"):
        yield kind, lambda kind=kind: tools_work(kind, rank)
    yield "accumulated", lambda: gradients_are_those_of_one_process("accumulated", rank, size, alone)
    yield "sequence parallel", lambda: a_sequence_in_parts(rank, alone)


def _three(rank, size, folder):
    """Nothing divides by three: rows, batches and columns are uneven."""
    warnings.simplefilter("ignore")
    alone = [dist.new_group([r]) for r in range(size)][rank]
    for name, base in METHODS:
        yield f"{name}-{base}", lambda name=name, base=base: equals_one_process(name, base, rank, size, alone)
    for kind in ("scaled", "clipped"):
        yield kind, lambda kind=kind: gradients_are_those_of_one_process(kind, rank, size, alone)
    yield "columns", lambda: columns_sharded(rank, size, alone)
    yield "exchanges", exchanges_do_not_grow_with_the_model


def _four(rank, size, folder):
    warnings.simplefilter("ignore")
    alone = [dist.new_group([r]) for r in range(size)][rank]
    for kind in ("fsdp", "hsdp", "tp", "tp+fsdp"):
        yield kind, lambda kind=kind: equals_one_process("mirror", "adamw", rank, size, alone, kind)
    yield "str", lambda: equals_one_process("str", "sgd", rank, size, alone, "tp+fsdp")


# -- laws ------------------------------------------------------------------------------------------------------------


def lay(model, kind):
    """The model, sharded in one of the ways that there are, and how many parts of a batch there are."""
    if kind == "fsdp":
        return sharded(model), dist.get_rank(), dist.get_world_size()
    if kind == "hsdp":
        return sharded(model, mesh_of(2, 2, names=("replicate", "shard"))), dist.get_rank(), 4
    shape = (1, 4) if kind == "tp" else (2, 2)
    mesh = mesh_of(*shape, names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    if kind == "tp+fsdp":
        sharded(model, mesh["dp"])
        return model, mesh.get_local_rank("dp"), 2
    return model, 0, 1


def equals_one_process(name, base, rank, size, alone, kind="fsdp", small=1.0, **options):
    """The same masks and weights, what is said of them, and exactly so many; ``small`` scales the second layer."""
    widths = (6, 8, 8, 1) if "tp" in kind else world.WIDTHS
    models = [make_model(widths) for _ in range(2)]
    with torch.no_grad():
        for each in models:
            each[2].weight.mul_(small)
    model, part, parts = lay(models[0], kind)
    method = make_method(name, **options)
    optimizer = mm.sparsify(model, BASES[base](model.parameters()), method, steps=STEPS)
    examples = 9 if parts == 3 else 8  # as many for each
    train(model, optimizer, rank=part, world=parts, size=examples)
    optimizer.finalize()
    masks = {key: whole(mask) for key, mask in optimizer.masks.items()}
    values, said = [whole(p) for p in model.parameters()], optimizer.diagnostics()
    nonzeros = mm.sparsity(model).nonzeros
    if rank:
        return
    one = models[1]
    reference = mm.sparsify(one, BASES[base](one.parameters()), method, steps=STEPS, process_group=alone)
    train(one, reference, size=examples)
    reference.finalize()
    for key, mask in reference.masks.items():
        assert torch.equal(mask, masks[key]), key
    for p, value in zip(one.parameters(), values, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=1e-6, atol=1e-7)
    assert said == pytest.approx(reference.diagnostics(), rel=1e-5, nan_ok=True)
    assert nonzeros == mm.sparsity(one).nonzeros == round(0.3 * sum(x.numel() for x in reference.weights.values()))


@contextlib.contextmanager
def counted():
    """The sizes of all tensors that are added up."""
    sizes, own = [], dist.all_reduce

    def noted(tensor, *args, **kwargs):
        sizes.append(tensor.numel())
        return own(tensor, *args, **kwargs)

    dist.all_reduce = noted
    try:
        yield sizes
    finally:
        dist.all_reduce = own


def exchanges_do_not_grow_with_the_model():
    """Two histograms a change of the mask, and as many small numbers, for three layers and for nine."""
    for options in ({}, {"allocation": "uniform"}):
        found = []
        for widths in (world.WIDTHS, (6, 9, 7, 9, 7, 9, 7, 9, 5, 1)):
            model = sharded(make_model(widths).float())
            method = mm.methods.magnitude(0.3, at=0.1, **options)  # no layer is emptied, which would be looked into
            optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=10)
            nn.functional.mse_loss(model(batch(0)[0].float()), batch(0)[1].float()).backward()
            with counted() as sizes:
                optimizer.step()
            assert optimizer.diagnostics()["sparsity"] > 0.2
            assert sum(size >= 2**16 for size in sizes) == 2
            found.append(len(sizes))
        assert found[0] == found[1], found


def a_nan_of_one_rank_skips_all(rank):
    model = sharded(make_model())
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("mirror"), steps=STEPS)
    before = [whole(p).clone() for p in model.parameters()]
    nn.functional.mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
    if rank == 1:
        model[0].weight.grad._local_tensor[0, 0] = torch.nan
    optimizer.step()
    assert (optimizer.step_count, optimizer.skipped_steps) == (0, 1)
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(p), value)


def zeros_are_counted_and_kept(rank):
    model = sharded(make_model())
    assert mm.sparsity(model).total == 0
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("gmp"), steps=STEPS)
    train(model, optimizer)
    model.eval()
    with torch.no_grad():
        model(batch(0)[0])  # FSDP leaves its root whole after this
    optimizer.finalize()
    wanted = round(0.3 * mm.sparsity(model).numel)
    assert mm.sparsity(model).nonzeros == wanted
    other = fully_shard(make_model(seed=5))
    with pytest.raises(ValueError, match="has no zeros to keep"):
        mm.keep_zeros(other, torch.optim.SGD(other.parameters(), lr=0.1))
    seen(other)
    mm.apply_masks(other, optimizer.masks)
    seen(other)
    assert mm.sparsity(other).nonzeros == wanted
    tuned = torch.optim.AdamW(model.parameters(), lr=0.1)
    seen(model)
    mm.keep_zeros(model, tuned)
    nn.functional.mse_loss(model(batch(1)[0]), batch(1)[1]).backward()
    tuned.step()
    assert mm.sparsity(model).nonzeros == wanted


def each_process_reads_its_part(folder):
    """Of a file that holds the whole model, also where a forward pass has left whole tensors."""
    one = make_model(seed=3)
    path = folder / f"whole-{dist.get_rank()}.safetensors"
    mm.save(one, path)
    model = sharded(make_model(seed=4))
    seen(model)
    assert mm.load(path, model) is model
    for p, value in zip(model.parameters(), one.parameters(), strict=True):
        assert isinstance(p, DTensor)
        assert torch.equal(whole(p), value.detach())
    assert torch.equal(model(batch(0)[0]), one(batch(0)[0]))
    mm.save(make_model((6, 9, 5, 2)), path)
    with pytest.raises(ValueError, match=r"4\.weight"):
        mm.load(path, model)


def seen(model):
    """After this FSDP leaves whole tensors where its parameters were; what is written into them is lost."""
    with torch.no_grad():
        model.eval()(batch(0)[0].to(next(model.parameters()).dtype))


class Mixing(mm.methods.get("mirror")(0.5).geometry.__class__):
    """Whoever derives from a geometry may sum in a way of their own."""


def refused_by_name():
    def fails(match, method, base=torch.optim.SGD, model=None, **options):
        model = model or sharded(make_model())
        with pytest.raises(ValueError, match=match):
            mm.sparsify(model, base(model.parameters(), lr=0.1), method, steps=STEPS, **options)

    fails("score='lamp' ranks a weight among all", make_method("gmp", score="lamp"))
    for name in ("snip", "synflow", "grasp"):
        fails(f"score='{name}' reads gradients of whole weights", make_method(name), batches=[batch(0)])
    fails("Adafactor steps a part of a tensor otherwise", make_method("gmp"), torch.optim.Adafactor)
    shared_out = functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD)
    for model in (make_model(), nn.parallel.DistributedDataParallel(make_model())):
        fails("ZeroRedundancyOptimizer shares parameters out .*fully_shard", make_method("gmp"), shared_out, model)
    method = mm.methods.Method(Mixing(), make_method("dense").decay, make_method("gmp").mask)
    fails("Mixing of the method .* does not say that it may be given a part", method)
    torn = nn.Linear(12, 4)
    torn.weight = nn.Parameter(distribute_tensor(torch.ones(4, 12), mesh_of(2), [Shard(1)]))
    method = mm.methods.gmp(0.5, pattern="2:4")
    fails("runs across the edge of a shard in weight: shard its rows, or columns in multiples of 4", method, model=torn)
    torn.weight = nn.Parameter(distribute_tensor(torch.randn(4, 16), mesh_of(2), [Shard(1)]))
    mm.sparsify(torn, torch.optim.SGD(torn.parameters(), lr=0.1), method, steps=STEPS).finalize()
    groups = whole(torn.weight).view(4, 4, 4)
    assert ((groups != 0).sum(-1) == 2).all()
    for use_orig_params in (True, False):
        old = FullyShardedDataParallel(make_model(), use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        fails("FullyShardedDataParallel lays parameters end to end", make_method("gmp"), model=old)

    model = fully_shard(make_model().float())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    tools = {
        "prune": lambda: mm.prune(model, [batch(0)[0]], 0.5),
        "quantize": lambda: mm.quantize(model),
        "compile": lambda: mm.compile(model, batch(0)[0].float()),
        "export": lambda: mm.export.torch_sparse(model),
        "exp": lambda: mm.export.two_four(model),
    }
    for verb, tool in tools.items():
        seen(model)
        with pytest.raises(ValueError, match=f"0.weight.*sharded over processes; {verb}"):
            tool()
    seen(model)
    with pytest.raises(ValueError, match="after a forward pass, which leaves whole tensors in their place until"):
        mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), make_method("gmp"), steps=STEPS)
    mm.sparsify(model, base, make_method("gmp"), steps=STEPS)


def sharded_afterwards_is_refused():
    model = make_model()
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("gmp"), steps=STEPS)
    sharded(model)
    nn.functional.mse_loss(model(batch(0)[0]), batch(0)[1]).backward()
    with pytest.raises(RuntimeError, match=r"sharded after mm.sparsify.*fully_shard\(model\).*first"):
        optimizer.step()


def disagreement_is_named(rank):
    model = make_model()
    method = mm.methods.gmp(0.5 + 0.25 * rank)
    with pytest.raises(RuntimeError, match=r"method\.mask\.sparsity is 0\.5 on rank 0 and 0\.75 on rank 1"):
        mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=STEPS)
    with pytest.raises(RuntimeError, match=f"steps is {STEPS} on rank 0 and {STEPS + 1} on rank 1"):
        mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("gmp"), steps=STEPS + rank)
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("gmp"), steps=STEPS)
    with pytest.raises(RuntimeError, match=r"the mask of '[02].weight' is not that of rank 0 on rank 1"):
        train(model, optimizer, rank=rank, world=2)  # nobody averages the gradients
    if rank == 0:
        state, other = optimizer.state_dict(), make_model()
    other = make_model()
    optimizer = mm.sparsify(other, BASES["sgd"](other.parameters()), make_method("gmp"), steps=STEPS)
    if rank == 0:
        optimizer.load_state_dict(state)
    with pytest.raises(RuntimeError, match=r"step is \d+ on rank 0 and 0 on rank 1"):
        train(other, optimizer, 0, 1)


def one_process_goes_its_own_way(rank):
    """A rate of its own, an end of its own; a score of its own is one of several."""
    for kind in ("fsdp", "ddp"):
        model = sharded(make_model()) if kind == "fsdp" else nn.parallel.DistributedDataParallel(make_model())
        method = mm.methods.magnitude(0.5, at=0.5)
        optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), method, steps=8)
        optimizer.param_groups[0]["lr"] *= 1 + rank
        with pytest.raises(RuntimeError, match=r"groups.0.lr is 0.05 on rank 0 and 0.1 on rank 1"):
            train(model, optimizer, 0, 1, rank, 2)
    model = nn.parallel.DistributedDataParallel(make_model())
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("gmp"), steps=STEPS)
    train(model, optimizer, 0, 2, rank, 2)
    if rank:
        optimizer.finalize()
    with pytest.raises(RuntimeError, match="finalized is False on rank 0 and True on rank 1"):
        train(model, optimizer, 2, STEPS, rank, 2)
    model = nn.parallel.DistributedDataParallel(make_model())
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("pilot"), steps=STEPS)
    for score in (0.5, 0.6 - 0.4 * rank):  # the mean falls
        optimizer.epoch_end(score=score)
    assert optimizer.parts.training.decay.state["score"] == pytest.approx(0.4)
    assert optimizer.parts.training.decay.state["alpha"] == pytest.approx(0.01)


def what_each_measures_is_averaged(rank):
    """With the weights of rank 0, whatever each began with, and each one's own batches."""
    found = mm.masks.saliency.snip
    one, loss = make_model(), nn.functional.mse_loss
    weights = {name: p for name, p in one.named_parameters() if name.endswith("weight")}
    scores = [sum(each) for each in zip(*(found(one, weights, [batch(i)], loss) for i in range(2)), strict=True)]
    model = make_model(seed=rank)
    base = BASES["sgd"](model.parameters())
    optimizer = mm.sparsify(model, base, mm.methods.snip(0.7), steps=STEPS, batches=[batch(rank)], loss_fn=loss)
    for mask, expected in zip(optimizer.masks.values(), mm.masks.select(scores, 0.7, "global"), strict=True):
        assert torch.equal(mask, expected)
    base, own = BASES["sgd"](model.parameters()), [batch(0)][: 1 - rank]
    kind, said = (ValueError, "batches") if rank else (RuntimeError, "another process could not measure its scores")
    with pytest.raises(kind, match=said):
        mm.sparsify(model, base, mm.methods.snip(0.7), steps=STEPS, batches=own, loss_fn=loss)


def an_empty_row_of_weight_norm_is_refused():
    for dim in (0, 1):
        model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 8), dim=dim))
        with torch.no_grad():
            model[0].parametrizations.weight.original1.select(dim, 5).mul_(1e-3)
        fully_shard(model)
        method = mm.methods.Method(mm.geometry.Euclidean(), mm.decay.ConstantDecay(), mm.masks.AtStart(0.5))
        with pytest.raises(RuntimeError, match=r"leaves nothing of some rows of 0\.parametrizations\.weight"):
            mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method, steps=4)


def rank_0_s_latents_are_everyone_s(rank):
    model = make_model(seed=rank)
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("mirror"), steps=STEPS)
    train(nn.parallel.DistributedDataParallel(model), optimizer, rank=rank, world=2)
    optimizer.finalize()
    for x in optimizer.weights.values():
        for tensor in (x.detach(), *optimizer.state[x].values()):
            if isinstance(tensor, torch.Tensor):
                both = [torch.empty_like(tensor) for _ in range(2)]
                dist.all_gather(both, tensor)
                assert torch.equal(*both)


def columns_sharded(rank, size, alone):
    """FSDP along columns: rows are summed over processes; and a part that is all of it on each."""
    full = torch.nn.Linear(5, 4, dtype=torch.float64)
    with torch.no_grad():
        full.weight.copy_(torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    grad = torch.randn(4, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    found = []
    for placement in (Shard(1), Shard(0), Replicate(), None):
        model = nn.Linear(5, 4, bias=False, dtype=torch.float64)
        p = grad_of = None
        if placement is None:
            p, grad_of = full.weight.detach().clone(), grad.clone()
        else:
            p, grad_of = (
                distribute_tensor(t.detach().clone(), mesh_of(size), [placement]) for t in (full.weight, grad)
            )
        model.weight = nn.Parameter(p)
        method = make_method("magnitude", score="sensitivity")
        group = alone if placement is None else None
        optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.0), method, steps=2,
                                process_group=group)  # fmt: skip
        model.weight.grad = grad_of
        optimizer.step()
        found.append(whole(optimizer.masks["weight"]))
    assert all(torch.equal(mask, found[-1]) for mask in found)
    assert int(found[-1].sum()) == 6


def tools_work(kind, rank):
    """bf16 policies, checkpointing of activations, compile and offload train, with the fused step on float32 shards."""
    model = make_model().float()
    options = {}
    if kind == "bf16":
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    elif kind == "offload":
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    elif kind == "checkpointing":
        from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

        apply_activation_checkpointing(model, check_fn=lambda layer: isinstance(layer, nn.Linear))
    fully_shard(model, **options)
    called = torch.compile(model, backend="eager") if kind == "compile" else model
    optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("mirror"), steps=STEPS)
    for step in range(STEPS):
        x, y = (t.float() for t in batch(step))
        optimizer.zero_grad()
        nn.functional.mse_loss(called(x).float(), y).backward()
        optimizer.step()
    assert type(optimizer._steps[0]).__name__ == "FusedCPU"
    assert optimizer._steps[0]._table is not None, "the fused step did not serve"
    optimizer.finalize()
    assert mm.sparsity(model).nonzeros == round(0.3 * mm.sparsity(model).numel)
    assert all(isinstance(p, DTensor) for p in model.parameters())


def gradients_are_those_of_one_process(kind, rank, size, alone):
    """Pieces of a batch added up without an exchange, gradients scaled and clipped: the weights of one process."""
    models, found = (sharded(make_model()), make_model()), []
    for model, pieces, part in zip(models, (2, 1), (slice(rank, None, size), slice(None)), strict=True):
        one = model is models[1]
        optimizer = mm.sparsify(model, BASES["sgd"](model.parameters()), make_method("mirror"), steps=STEPS,
                                process_group=alone if one else None)  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=kind == "scaled")
        for step in range(STEPS):
            optimizer.zero_grad()
            x, y = (t[part] for t in batch(step, 4 * size))
            own = list(zip(x.chunk(pieces), y.chunk(pieces), strict=True))
            for i, (x_of, y_of) in enumerate(own):
                if not one and kind == "accumulated":
                    model.set_requires_gradient_sync(i + 1 == len(own))
                scaler.scale(nn.functional.mse_loss(model(x_of), y_of) / pieces).backward()
            scaler.unscale_(optimizer)
            if kind == "clipped":
                torch.nn.utils.clip_grad_norm_(model.parameters(), 0.3)
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.step_count == STEPS
        optimizer.finalize()
        found.append([whole(p) for p in model.parameters()])
        assert mm.sparsity(model).nonzeros == round(0.3 * mm.sparsity(model).numel)
    for a, b in zip(*found, strict=True):
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def a_sequence_in_parts(rank, alone):
    """Norms over a part of each sequence, their parameters whole on every process, between layers in parts."""
    found = []
    for one in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.LayerNorm(6), nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6), nn.LayerNorm(6),
                              nn.Linear(6, 4)).double()  # fmt: skip
        if not one:
            plan = {"0": SequenceParallel(), "1": ColwiseParallel(input_layouts=Shard(1)),
                    "3": RowwiseParallel(output_layouts=Shard(1)), "4": SequenceParallel(),
                    "5": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())}  # fmt: skip
            parallelize_module(model, mesh_of(2), plan)
        optimizer = mm.sparsify(model, BASES["adamw"](model.parameters()), make_method("mirror"), steps=STEPS,
                                process_group=alone if one else None)  # fmt: skip
        for step in range(STEPS):
            x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
            optimizer.zero_grad()
            out = model(x if one else x[:, 2 * rank : 2 * rank + 2])
            (out - x[..., :4].sin()).square().mean().backward()
            optimizer.step()
        optimizer.finalize()
        assert mm.sparsity(model).nonzeros == round(0.3 * mm.sparsity(model).numel)
        found.append([whole(p) for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a == 0, b == 0)
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
