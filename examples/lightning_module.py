"""Lightning: one callback.

python examples/lightning_module.py [EPOCHS]
"""

import sys

import lightning as L
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.datasets import load_digits
from torch import nn

import mirrormask as mm
from mirrormask.integrations.lightning import SparsityCallback

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 10
digits = load_digits()
images, labels = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images[:1400], labels[:1400]), 32, shuffle=True)
test = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images[1400:], labels[1400:]), 397)


class Digits(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=2e-3, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def trainer(*callbacks):
    return L.Trainer(max_epochs=EPOCHS, accelerator="auto", logger=False, enable_checkpointing=False,
                     enable_model_summary=False, callbacks=list(callbacks))  # fmt: skip


# The network that you already have; here it is trained first.
module = Digits()
trainer().fit(module, train, test)

# The same module and data; the average of weights that is validated, and kept, gets the final mask too.
sparse = trainer(EMAWeightAveraging(decay=0.99), SparsityCallback(mm.methods.mirror(0.9)))
sparse.fit(module, train, test)
print(f"sparse: {100 * sparse.callback_metrics['accuracy']:.1f}%")
print(mm.sparsity(module.net))
mm.save(module.net, "lightning_module.safetensors")
