"""A network that you have, your own loop: 90% sparse in as many epochs as you give it.

python examples/plain_loop.py [EPOCHS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import mirrormask as mm

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
loader = torch.utils.data.DataLoader(
    torch.utils.data.TensorDataset(images[:1400], labels[:1400]), batch_size=32, shuffle=True, drop_last=True
)
model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


def train(optimizer, epochs, scheduler=None):
    for _ in range(epochs):
        for x, y in loader:
            cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()


def accuracy():
    with torch.no_grad():
        return (model(images[1400:]).argmax(1) == labels[1400:]).float().mean().item()


# The network that you already have; here it is trained first.
train(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), EPOCHS)
print(f"dense: {100 * accuracy():.1f}%")

# The same loop, with the optimizer wrapped and the scheduler built on what wraps it.
base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
optimizer = mm.sparsify(model, base, mm.methods.mirror(0.9), steps=EPOCHS * len(loader))
train(optimizer, EPOCHS, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, optimizer.steps))
optimizer.finalize()  # exactly 90%, before the last evaluation

print(f"sparse: {100 * accuracy():.1f}%")
print(mm.sparsity(model))
mm.save(model, "plain_loop.safetensors")
