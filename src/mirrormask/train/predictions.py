"""``predictions.json``: what a run's final model says about each test image, and small pictures of some it gets wrong.

Where two models differ on an image, one of them is wrong. With these files of both runs, a report shows what
changed between a dense model and a sparse one on a machine that has neither the data nor the models.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mirrormask import files
from mirrormask.train.batches import Batches
from mirrormask.train.session import Session

__all__ = ["FILE", "MAX_IMAGES", "MAX_SIDE", "predict", "write"]

FILE = "predictions.json"
#: How many misclassified images are kept: the first in the order of the test set, so that runs keep the same ones.
MAX_IMAGES = 64
#: Larger images are shrunk to this many pixels a side.
MAX_SIDE = 48


@torch.no_grad()
def predict(session: Session, model: nn.Module) -> Tensor:
    """The class that the model gives each test image, int64 of shape (n,), all of them in this process.

    Args:
        session: whose images these are.
        model: the session's, with whole weights.
    """
    own = session.test
    layout = own.layout is torch.channels_last
    whole = Batches(session.splits.test, session.mean, session.std, own.size, device=own.device, channels_last=layout)
    model.eval()
    return torch.cat([model(x).argmax(1).cpu() for x, _ in whole.in_order()])


def write(folder: Path, session: Session, model: nn.Module) -> None:
    """Write ``predictions.json``, atomically; see :func:`predict`."""
    predicted, test = predict(session, model), session.splits.test
    wrong = (predicted != test.y).nonzero().reshape(-1)[:MAX_IMAGES].tolist()
    tree: dict[str, Any] = {
        "version": 1,
        "classes": list(session.splits.classes),
        "truth": test.y.tolist(),
        "predicted": predicted.tolist(),
        "images": {str(i): _png(test.x[i]) for i in wrong},
    }
    files.write_text(folder / FILE, json.dumps(tree, separators=(",", ":")) + "\n")


def _png(x: Tensor) -> str:
    """An image, uint8 of shape (channels, height, width), as a PNG in base64; values scaled to use the whole range."""
    from PIL import Image

    height, width = x.shape[1:]
    scale = MAX_SIDE / max(height, width)
    pixels = x.cpu().float()
    if scale < 1:
        size = (max(1, round(height * scale)), max(1, round(width * scale)))
        pixels = F.interpolate(pixels[None], size=size, mode="area")[0]
    # The digits have values up to 16 only; as they are, they would be black.
    if x.shape[0] == 1 and 0 < int(x.max()) < 64:
        pixels = pixels * (255 / float(x.max()))
    array = pixels.round().clamp(0, 255).to(torch.uint8)
    image = Image.fromarray(array[0].numpy() if len(array) == 1 else array.permute(1, 2, 0).contiguous().numpy())
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
