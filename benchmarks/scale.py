"""What sharded training keeps and sends, counted from the tensors of a real world of processes; no time is measured.

python benchmarks/scale.py
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

import mirrormask as mm

#: Sparsifiable weights: of ResNet-50's convolutions and head, and of a Llama-like network (32 blocks of width 4096).
NETWORKS = {"ResNet-50": 25_502_912, "7 B": 6_476_005_376}
RANKS = (8, 64, 1024)
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
                rows.append((what, label, own + theirs))
    if rank == 0:
        report(rows)
    dist.destroy_process_group()


def report(rows):
    """For larger networks: what a rank keeps for them."""
    print()
    print("| method | base | network |", " | ".join(f"{ranks} ranks" for ranks in RANKS), "|")
    print("|---|---|---|" + "---:|" * len(RANKS))
    for what, label, bytes_a_weight in rows:
        for network, weights in NETWORKS.items():
            kept = " | ".join(f"{weights * bytes_a_weight / ranks / 2**20:,.1f} MiB" for ranks in RANKS)
            print(f"| {what} | {label} | {network} | {kept} |")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(measure, (2, f"{folder}/store"), nprocs=2, start_method="spawn")
