"""The Hugging Face Trainer: one callback.

python examples/hf_trainer.py [EPOCHS [MODEL]]     # MODEL: a folder or a name for from_pretrained, with ten labels
"""

import sys

import numpy as np
from sklearn.datasets import load_digits
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments

import mirrormask as mm
from mirrormask.integrations.transformers import SparsityCallback

EPOCHS = int(sys.argv[1]) if len(sys.argv) > 1 else 4
MODEL = sys.argv[2] if len(sys.argv) > 2 else None
digits = load_digits()  # an image is a text of 64 pixels in 17 shades: nothing has to be fetched
rows = [{"input_ids": x.astype(int), "labels": int(y)} for x, y in zip(digits.data, digits.target, strict=True)]
train, test = (rows[:1400], rows[1400:]) if EPOCHS > 1 else (rows[:64], rows[64:96])


def arguments(name, **options):
    return TrainingArguments(
        output_dir=f"runs/{name}", num_train_epochs=EPOCHS, per_device_train_batch_size=32, logging_steps=10,
        lr_scheduler_type="cosine", weight_decay=0.0, report_to="none", **options,
    )  # fmt: skip


def accuracy(output):
    return {"accuracy": float((np.argmax(output.predictions, 1) == output.label_ids).mean())}


# The network that you already have; here it is trained first.
if MODEL is None:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    config = BertConfig(vocab_size=17, max_position_embeddings=64, num_labels=10, **sizes)
    model = AutoModelForSequenceClassification.from_config(config)
    Trainer(model, arguments("dense", learning_rate=2e-3, save_strategy="no"), train_dataset=train).train()
else:
    model = AutoModelForSequenceClassification.from_pretrained(MODEL, num_labels=10)

trainer = Trainer(
    model,
    arguments("sparse", learning_rate=1e-3, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
              metric_for_best_model="accuracy"),
    train_dataset=train, eval_dataset=test, compute_metrics=accuracy,
    callbacks=[SparsityCallback(mm.methods.mirror(0.9))],
)  # fmt: skip
trainer.train()
print(trainer.evaluate())
print(mm.sparsity(model))
model.save_pretrained("runs/sparse/final")  # dense files with exact zeros, as transformers reads them
mm.save(model, "hf_trainer.safetensors")  # ... and without them
