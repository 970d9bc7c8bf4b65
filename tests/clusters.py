"""The small problem that every method must stand: four noisy clusters, a network of three layers, and bases.

It needs PyTorch and mirrormask alone: machines with a GPU may have no more (tests/cuda).
"""

import torch
from torch import nn

import mirrormask as mm

SPARSITY = 0.8
STEPS = 60
TOTAL = 8 * 24 + 24 * 16 + 16 * 4
NAMES = list(mm.methods.names())
#: What every base must stand: momentum, and weight decay both coupled and decoupled.
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
}
OPTIONS = {"pilot": {"alpha_init": 0.01}, "spred": {"alpha": 0.01}, "l1": {"alpha": 1e-3}, "set": {"every": 0.1}}


def make_method(name):
    sparsity = 0.0 if name == "dense" else SPARSITY
    return mm.methods.get(name)(sparsity, **OPTIONS.get(name, {}))


def make_model(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def batch(step, dtype=torch.float32):
    """Four noisy clusters: a problem that a small network learns in a few steps."""
    generator = torch.Generator().manual_seed(step)
    y = torch.randint(0, 4, (32,), generator=generator)
    centres = torch.eye(8)[:4] * 2
    return (centres[y] + 0.5 * torch.randn(32, 8, generator=generator)).to(dtype), y


def expected_nonzeros(name):
    return TOTAL if name == "dense" else round((1 - SPARSITY) * TOTAL)
