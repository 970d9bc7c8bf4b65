"""What sharded training keeps and sends, and how long it takes, in a real world of processes.

python benchmarks/scale.py                      # bytes, counted from the tensors; no time is measured
python benchmarks/scale.py change --weights 285e6 --ranks 2     # seconds of one change of the mask
python benchmarks/scale.py ddp --ranks 2 --batch 128            # images a second of several processes against one
python benchmarks/scale.py fsdp                                 # a sharded step on 1, 2 and 4 processes: time, memory

The last three measure time: nothing else may run.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import mirrormask as mm
from mirrormask.environment import processor
from mirrormask.progress import Clock
from mirrormask.train import models

#: Sparsifiable weights: of ResNet-50's convolutions and head, and of a Llama-like network (32 blocks of width 4096).
NETWORKS = {"ResNet-50": 25_502_912, "7 B": 6_476_005_376}
RANKS = (8, 64, 1024)
#: Of a network between machines, in Gbit/s.
RATES = (100, 400)
BASES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
}


def held(optimizer):
    """Bytes that this process keeps for its sparsifiable weights: of the method, and of the base optimizer."""
    own = base = 0
    for x in optimizer.weights.values():
        own += sum(v.nbytes for v in optimizer.state[x].values() if isinstance(v, torch.Tensor))
        for _, latent in optimizer.weights.trained(x):
            base += sum(v.nbytes for v in optimizer.parts.base.state(latent).values() if isinstance(v, torch.Tensor))
    return own, base


def measure(rank, size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    rows, sent, add = [], [], dist.all_reduce

    def noted(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return add(tensor, *args, **kwargs)

    dist.all_reduce = noted
    if rank == 0:
        print("| method | base | method's bytes a weight | base's | a step sends | a change of the mask sends |")
        print("|---|---|---:|---:|---:|---:|")
    for name, options in (("gmp", {}), ("mirror", {}), ("mirror", {"factors": False})):
        for label, base in BASES.items():
            torch.manual_seed(0)
            model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(4)))
            fully_shard(model)
            method = mm.methods.get(name)(0.9, start_at=0.1, end_at=0.9, every=0.1, **options)
            optimizer = mm.sparsify(model, base(model.parameters()), method, steps=20)
            for step in range(5):  # the mask changes after the fourth, with the second update of the cubic
                optimizer.zero_grad()
                model(torch.randn(2, 1024)).square().mean().backward()
                sent.clear()
                optimizer.step()
                if step == 2:
                    ordinary = sum(sent)
                if step == 3:
                    change = sum(sent)
            weights = sum(x.numel() for x in optimizer.weights.values())
            own, theirs = (n / weights for n in held(optimizer))
            what = name + "".join(f", {key}={value}" for key, value in options.items())
            if rank == 0:
                print(f"| {what} | {label} | {own:.3f} | {theirs:.3f} | {ordinary:,} | {change:,} |")
                rows.append((what, label, own + theirs, change))
    if rank == 0:
        report(rows)
    dist.destroy_process_group()


def report(rows):
    """For larger networks: what a rank keeps for them."""
    print()
    print("| method | base | network |", " | ".join(f"{ranks} ranks" for ranks in RANKS), "|")
    print("|---|---|---|" + "---:|" * len(RANKS))
    for what, label, bytes_a_weight, _ in rows:
        for network, weights in NETWORKS.items():
            kept = " | ".join(f"{weights * bytes_a_weight / ranks / 2**20:,.1f} MiB" for ranks in RANKS)
            print(f"| {what} | {label} | {network} | {kept} |")
    most = max(change for *_, change in rows)
    print(f"\nA ring that adds up {most:,} bytes for a change of the mask, whatever the network, beside its latency:")
    for rate in RATES:
        times = ", ".join(f"{1e3 * ring(most, ranks, rate):.3f} ms on {ranks} ranks" for ranks in RANKS)
        print(f"{rate} Gbit/s: {times}")


def ring(count, ranks, rate):
    """Seconds in which a ring adds up so many bytes at so many Gbit/s: a rank sends each 2 (n - 1) / n times."""
    return 2 * (ranks - 1) / ranks * 8 * count / (rate * 1e9)


def begin(rank, size, store):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)


def slowest(seconds):
    """Of all processes."""
    held = torch.tensor(seconds, dtype=torch.float64)
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return float(held)


def change(rank, size, store, options):
    """One change of the mask after another, towards sparsities that grow; no process ever holds the whole model."""
    begin(rank, size, store)
    width = 4096 if options.weights >= 4 * 4096**2 else 512
    layers = max(round(options.weights / width**2), 1)
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(rank)
    for p in model.parameters():
        p.data.to_local().normal_(generator=generator)
    method = mm.methods.get(options.method)(0.99)
    optimizer = mm.sparsify(model, torch.optim.SGD(model.parameters(), lr=0.1), method, steps=100)
    weights, times = layers * width**2, []
    for at, sparsity in enumerate((0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95)[: options.rounds + 1]):
        dist.barrier()
        start = time.perf_counter()
        optimizer.parts.masks.prune(sparsity, Clock(at, 100))
        times.append(slowest(time.perf_counter() - start))
    left = mm.sparsity(model).nonzeros
    if rank == 0:
        assert left == round((1 - sparsity) * weights), (left, sparsity)
        print(f"{processor()}, {size} ranks with one thread each, {options.method}, {weights:,} weights")
        print("| changes of the mask | first, s | median of the others, s | slowest of them, s |")
        print("|---:|---:|---:|---:|")
        print(f"| {len(times)} | {times[0]:.2f} | {statistics.median(times[1:]):.2f} | {max(times[1:]):.2f} |")
    dist.destroy_process_group()


def ddp(rank, size, store, options):
    """ResNet-20, one process with a batch; all with a batch each and no word between them; all with DDP."""
    begin(rank, size, store)
    runs = {}
    for how in ("one", "apart", "ddp"):
        torch.manual_seed(0)
        model = models.build("resnet20", (3, 32, 32), 10)
        group = dist.new_group([rank], use_local_synchronization=True) if how != "ddp" else None
        called = nn.parallel.DistributedDataParallel(model) if how == "ddp" else model
        base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        optimizer = mm.sparsify(model, base, mm.methods.mirror(0.9), steps=10_000, process_group=group)
        runs[how] = (called, optimizer)
    x, y = torch.randn(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))

    def steps(how, count):
        called, optimizer = runs[how]
        for _ in range(count):
            optimizer.zero_grad()
            nn.functional.cross_entropy(called(x), y).backward()
            optimizer.step()

    times = {how: [] for how in runs}
    for turn in range(options.rounds + 1):  # the first warms up
        for how in runs:
            dist.barrier()
            start = time.perf_counter()
            if how != "one" or rank == 0:
                steps(how, options.steps)
            seconds = slowest(time.perf_counter() - start)
            if turn:
                times[how].append(seconds / options.steps)
    if rank == 0:
        one = statistics.median(times["one"])
        print(f"{processor()}, ResNet-20, batch {options.batch} a process, one thread each, mirror")
        print("| how | processes | step, ms | spread, ms | images a second | of linear |")
        print("|---|---:|---:|---:|---:|---:|")
        for how, name in (("one", "one process"), ("apart", "side by side, apart"), ("ddp", "DDP")):
            there, middle = 1 if how == "one" else size, statistics.median(times[how])
            spread = max(times[how]) - min(times[how])
            rate = there * options.batch / middle
            cells = f"{1e3 * middle:.1f} | {1e3 * spread:.1f} | {rate:,.0f} | {one / middle:.2f}"
            print(f"| {name} | {there} | {cells} |")
    dist.destroy_process_group()


def fsdp(rank, size, store, options, how):
    """Layers of 1024 x 1024 and a batch of 64 for all together, in a world of its own for what it takes at its peak."""
    begin(rank, size, store)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(FSDP_LAYERS)))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if how == "mirror":
        optimizer = mm.sparsify(model, optimizer, mm.methods.mirror(0.9), steps=10_000)
    x, whole, alone = torch.randn(64 // size, 1024), [], []
    for step in range(2 + options.steps):
        dist.barrier()
        start = time.perf_counter()
        optimizer.zero_grad()
        model(x).square().mean().backward()
        middle = time.perf_counter()
        optimizer.step()
        end = time.perf_counter()
        if step >= 2:  # the first ones build and warm up
            whole.append(slowest(end - start))
            alone.append(slowest(end - middle))
    peak = slowest(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
    if rank == 0:
        cells = f"{1e3 * statistics.median(whole):.0f} | {1e3 * statistics.median(alone):.1f}"
        print(f"| {how} | {size} | {cells} | {peak / (FSDP_LAYERS * 1024**2):.1f} |", flush=True)
    dist.destroy_process_group()


#: 33.6 million weights.
FSDP_LAYERS = 32


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("bytes", "change", "ddp", "fsdp"), default="bytes")
    parser.add_argument("--weights", type=float, default=285e6, help="of the model whose mask changes")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--method", default="gmp")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    work = {"change": change, "ddp": ddp, "fsdp": fsdp}.get(options.what)
    if work is fsdp:
        print(f"{processor()}, {FSDP_LAYERS} layers of 1024 x 1024, 64 examples for all together, one thread each")
        print("| how | processes | step, ms | optimizer alone, ms | peak of a process, bytes a weight of the whole |")
        print("|---|---:|---:|---:|---:|", flush=True)
    worlds = [(n, how) for n in (1, 2, 4) for how in ("dense", "mirror")] if work is fsdp else [(options.ranks,)]
    for ranks, *how in worlds if work else [(2,)]:
        with tempfile.TemporaryDirectory() as folder:
            arguments = (ranks, f"{folder}/store", *((options,) if work else ()), *how)
            torch.multiprocessing.start_processes(work or measure, arguments, nprocs=ranks, start_method="spawn")


if __name__ == "__main__":
    main()
