"""Makes the frozen checkpoints of tests/optimizer/data: ``python tests/optimizer/frozen.py VERSION``.

They are of the version that wrote them and are never made again: that every later version continues them is the test.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import mirrormask as mm

FOLDER = Path(__file__).parent / "data"
#: What version 0.1.0 had as defaults; `mirror` has others since.
METHODS = {"mirror": {"growth": None}, "gmp": {}, "lth": {"prunings": 2}, "acdc": {}, "str": {}}
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
}
CUT, STEPS = 26, 40


def build(name, base):
    """A model and its optimizer, without random numbers."""
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.sin(torch.arange(p.numel()) * (1.7 + i)).reshape(p.shape) / 2)
    method = mm.methods.get(name)(0.75, **METHODS[name])
    return model, mm.sparsify(model, BASES[base](model.parameters()), method, steps=STEPS)


def train(model, optimizer, first, last):
    """Steps on waves."""
    for step in range(first, last):
        x = torch.sin(torch.arange(48) * (0.3 + 0.01 * step)).reshape(8, 6)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(8) % 3).backward()
        optimizer.step()


def make(version):
    """One file a method and base: the state after ``CUT`` steps, and the weights at the end."""
    for name in METHODS:
        for base in BASES:
            model, optimizer = build(name, base)
            train(model, optimizer, 0, CUT)
            saved = {
                "model": {key: value.clone() for key, value in model.state_dict().items()},
                "optimizer": optimizer.state_dict(),
            }
            saved = torch.load(_through_memory(saved), weights_only=True)
            train(model, optimizer, CUT, STEPS)
            optimizer.finalize()
            saved["final"] = model.state_dict()
            torch.save(saved, FOLDER / f"{version}-{name}-{base}.pt")


def _through_memory(value):
    import io

    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return buffer


if __name__ == "__main__":
    make(sys.argv[1])
