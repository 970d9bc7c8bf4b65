"""A loop of Hugging Face Accelerate: any device, any number of processes, mixed precision.

accelerate launch examples/accelerate_loop.py [EPOCHS]
"""

import sys

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn

import mirrormask as mm

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
HAS_GPU = torch.accelerator.is_available()
accelerator = Accelerator(mixed_precision="bf16" if HAS_GPU else "no", cpu=not HAS_GPU)
digits = load_digits()
images, labels = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
data = torch.utils.data.TensorDataset(images[:1400], labels[:1400])
loader = torch.utils.data.DataLoader(data, batch_size=32, shuffle=True, drop_last=True)
torch.manual_seed(0)
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2), nn.ReLU(), nn.Flatten(),
    nn.Linear(64 * 9, 10),
)  # fmt: skip
model, loader = accelerator.prepare(model, loader)


def train(optimizer, scheduler, epochs):
    for _ in range(epochs):
        for x, y in loader:
            accelerator.backward(nn.functional.cross_entropy(model(x), y))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()


# The network that you already have; here it is trained first.
dense = torch.optim.AdamW(model.parameters(), lr=3e-3)
train(accelerator.prepare(dense), torch.optim.lr_scheduler.ConstantLR(dense, 1.0), EPOCHS)

# mm.sparsify after the model is prepared, for the steps that this process takes; then the scheduler.
plain = accelerator.unwrap_model(model)
base = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
sparse = mm.sparsify(plain, base, mm.methods.mirror(0.9), steps=EPOCHS * len(loader))
train(accelerator.prepare(sparse), torch.optim.lr_scheduler.LinearLR(sparse, 1.0, 0.0, sparse.steps), EPOCHS)
sparse.finalize()

if accelerator.is_main_process:
    with torch.no_grad():
        right = (plain(images[1400:].to(accelerator.device)).argmax(1).cpu() == labels[1400:]).float().mean()
    print(f"sparse: {100 * right:.1f}%")
    print(mm.sparsity(plain))
    mm.save(plain, "accelerate_loop.safetensors")
