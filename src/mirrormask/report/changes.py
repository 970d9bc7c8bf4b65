"""What a sparse model says otherwise than the dense one, from the ``predictions.json`` of both."""

from __future__ import annotations

import base64
from collections import Counter
from pathlib import Path
from typing import Any

from mirrormask.train import predictions, schema

__all__ = ["MAX_SHOWN", "changes", "read"]

#: Pictures a run; the page shows a grid of them.
MAX_SHOWN = 18
#: A picture of more characters than this is not one that a run wrote.
MAX_CHARACTERS = 60_000


def read(folder: str | Path) -> dict[str, Any] | None:
    """The predictions of a run; None where it left none, or the file is not what a run writes."""
    try:
        held = schema.read(Path(folder) / predictions.FILE, schema.Predictions)
        classes, truth, predicted = held.classes, held.truth, held.predicted
        fits = len(truth) == len(predicted) > 0 and max(max(truth), max(predicted)) < len(classes)
        images = {int(i[:20]): png for i, png in held.images.items() if _is_png(png)}
    except (OSError, ValueError):
        return None
    return {"classes": classes, "truth": truth, "predicted": predicted, "images": images} if fits else None


def changes(dense: dict[str, Any], sparse: dict[str, Any], shown: int = MAX_SHOWN) -> dict[str, Any] | None:
    """Where two models differ on the test images.

    Args:
        dense, sparse: as :func:`read` gives them.
        shown: the most pictures.

    Returns:
        ``n`` images, ``changed`` of them; ``lost`` were right before, ``won`` are right now, the others wrong both
        times; ``by_class`` (class, images, right dense, right sparse) and ``examples`` (truth, dense, sparse, picture);
        None if the two were not tested on the same images.
    """
    if dense["classes"] != sparse["classes"] or dense["truth"] != sparse["truth"]:
        return None
    truth, before, now = dense["truth"], dense["predicted"], sparse["predicted"]
    changed = [i for i in range(len(truth)) if before[i] != now[i]]
    lost = [i for i in changed if before[i] == truth[i]]
    won = [i for i in changed if now[i] == truth[i]]
    other = [i for i in changed if before[i] != truth[i] != now[i]]
    pictures = {**dense["images"], **sparse["images"]}
    # Each kind in turn, so that a page does not show losses only.
    kinds = [[i for i in kind if i in pictures] for kind in (lost, won, other)]
    places = [(k, rank, i) for rank, kind in enumerate(kinds) for k, i in enumerate(kind)]
    chosen = [i for _, _, i in sorted(places)][:shown]
    count = Counter(truth)
    right = [Counter(t for t, k in zip(truth, said, strict=True) if t == k) for said in (before, now)]
    by_class = [[name, count[c], right[0][c], right[1][c]] for c, name in enumerate(dense["classes"])]
    return {
        "n": len(truth),
        "changed": len(changed),
        "lost": len(lost),
        "won": len(won),
        "by_class": by_class,
        "examples": [
            [*(dense["classes"][k] for k in (truth[i], before[i], now[i])), pictures[i]] for i in sorted(chosen)
        ],
    }


def _is_png(text: Any) -> bool:
    """Whether this is base64 of a PNG and nothing else: it goes into the page as a picture's address."""
    if not isinstance(text, str) or len(text) > MAX_CHARACTERS:
        return False
    try:
        return base64.b64decode(text, validate=True)[:8] == b"\x89PNG\r\n\x1a\n"
    except ValueError:
        return False
