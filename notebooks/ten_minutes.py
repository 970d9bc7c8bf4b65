# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A trained network, sparse and fast in ten minutes
#
# A network that is trained already, a few more epochs, and 90% of its weights are gone: how accurate, how small, how fast is what is left?
# On one thread of an AMD EPYC that others used too it came to this:
#
# | | dense | 90% sparse |
# |---|---|---|
# | accuracy | 98.7% | 98.2% |
# | file | 902,963 bytes | 91,404; with 8-bit values 42,295 |
# | one image | 2.1 ms | 0.13 ms |
#
# Everything here runs on a laptop in about a minute: the digits come with scikit-learn. Put your own network and loader in the first two cells.
#
# It needs `pip install '.[train]'`. Open it as a notebook (`jupytext --to ipynb ten_minutes.py`), or run it as a program
# (`python ten_minutes.py`).

# %%
import copy
import tempfile
import time
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import mirrormask as mm

torch.manual_seed(0)
data = load_digits()
images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
images = nn.functional.interpolate(images, scale_factor=2)
labels = torch.tensor(data.target)
order = torch.randperm(len(labels))
train, test = order[:1400], order[1400:]

# %% [markdown]
# ## The network that you have
#
# Ours is trained here first; yours is loaded.


# %%
def block(inputs, outputs, stride):
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


network = nn.Sequential(
    *block(1, 64, 1), *block(64, 128, 2), *block(128, 128, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)
)


def epochs(model, optimizer, number, scheduler=None):
    """An ordinary training loop."""
    model.train()
    for _ in range(number):
        for batch in torch.randperm(len(train)).split(100):
            loss = nn.functional.cross_entropy(model(images[train[batch]]), labels[train[batch]])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if scheduler is not None:
                scheduler.step()


def accuracy(model):
    model.eval()
    with torch.no_grad():
        return float((model(images[test]).argmax(1) == labels[test]).float().mean())


epochs(network, torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9), 6)
mm.recalibrate(network, images[train].split(200))
print(f"dense: {100 * accuracy(network):.1f}% right")

# %% [markdown]
# ## Sparse
#
# Three lines are new: `mm.sparsify`, `finalize`, and `mm.recalibrate`, which gives batch norm the statistics of what is left.

# %%
dense = copy.deepcopy(network)
number = 4
steps = number * len(torch.arange(len(train)).split(100))
optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
optimizer = mm.sparsify(network, optimizer, mm.methods.mirror(0.9), steps=steps)
epochs(network, optimizer, number, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps))
optimizer.finalize()
mm.recalibrate(network, images[train].split(200))
print(f"sparse: {100 * accuracy(network):.1f}% right")
print(mm.sparsity(network))

# %% [markdown]
# ## Small
#
# The file without its zeros, beside what `torch.save` writes.

# %%
folder = Path(tempfile.mkdtemp())
mm.save(network, folder / "sparse.safetensors")
mm.save(network, folder / "int8.safetensors", values="int8")
torch.save(dense.state_dict(), folder / "dense.pt")
for path in sorted(folder.iterdir(), key=lambda path: -path.stat().st_size):
    print(f"{path.name:20} {path.stat().st_size:9,} bytes")

# %% [markdown]
# ## Fast
#
# `mm.compile` writes machine code for the nonzeros. The report says what each layer took, and what PyTorch takes for it.

# %%
image = images[:1]
fast = mm.compile(network.eval(), image)
print(fast.report)


def milliseconds(call):
    """The median of many calls."""
    times = []
    with torch.no_grad():
        for _ in range(30):
            start = time.perf_counter()
            call(image)
            times.append(1000 * (time.perf_counter() - start))
    return sorted(times)[len(times) // 2]


print(f"one image: PyTorch {milliseconds(network):.3f} ms, compiled {milliseconds(fast):.3f} ms")
assert torch.allclose(fast(image), network(image), atol=1e-4)
