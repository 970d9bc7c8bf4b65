"""timm: its model, optimizer, scheduler and average of weights.

python examples/timm_finetune.py [EPOCHS [MODEL]]     # MODEL with ImageNet weights: such as efficientnet_lite0
"""

import sys

import timm
import torch
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy, interpolate

import mirrormask as mm

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 6
MODEL = sys.argv[2] if len(sys.argv) > 2 else None
digits = load_digits()
images = interpolate(torch.tensor(digits.images).float()[:, None] / 16, size=32).repeat(1, 3, 1, 1)
labels, n = torch.tensor(digits.target), 1400 if EPOCHS > 1 else 64
data = torch.utils.data.TensorDataset(images[:n], labels[:n])
loader = torch.utils.data.DataLoader(data, 32, shuffle=True, drop_last=True)
torch.manual_seed(0)
model = timm.create_model(MODEL or "test_efficientnet", pretrained=MODEL is not None, num_classes=10)


def train(optimizer, scheduler=None, average=None):
    model.train()
    for step, (x, y) in enumerate(batch for _ in range(EPOCHS) for batch in loader):
        cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update(model, step)
            scheduler.step_update(step + 1)


@torch.no_grad()
def accuracy(model):
    return f"{100 * (model.eval()(images[1400:]).argmax(1) == labels[1400:]).float().mean():.1f}%"


if MODEL is None:  # the network that you already have; here it is trained first
    train(create_optimizer_v2(model, "adamw", lr=3e-3))
    print(f"dense: {accuracy(model)}")

steps = EPOCHS * len(loader)
base = create_optimizer_v2(model, "adamw", lr=1e-3, weight_decay=0.0)
optimizer = mm.sparsify(model, base, mm.methods.mirror(0.8), steps=steps)
average = ModelEmaV3(model, decay=0.98, use_warmup=True)
train(optimizer, CosineLRScheduler(optimizer, steps, t_in_epochs=False), average)
optimizer.finalize()
mm.apply_masks(average, optimizer.masks)  # an average of many masks is dense: give it the last one,
mm.recalibrate(average.module, (x for x, _ in loader))  # and let batch norm see what is left

print(f"sparse: {accuracy(average.module)}")
print(mm.sparsity(average.module))
mm.save(average.module, "timm_finetune.safetensors")
