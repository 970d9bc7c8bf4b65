"""The curves of one run, from its log, thinned to what a screen can show."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mirrormask.train import log

__all__ = ["BY_EPOCH", "BY_STEP", "curves", "places"]

#: What is known at the end of an epoch only.
BY_EPOCH = ("train_accuracy", "test_accuracy", "validation_accuracy")
#: What each line of the log has.
BY_STEP = (
    "loss",
    "alpha",
    "decay_integral",
    "median_a",
    "l1_norm",
    "sparsity",
    "below_threshold",
    "sign_flips",
    "lr",
)


def curves(folder: str | Path, points: int) -> dict[str, Any] | None:
    """What the log of a run says, as two blocks of columns over epochs; None where there is no log to read.

    Args:
        folder: the run's folder.
        points: the most that each curve keeps, at least 2: evenly spaced lines, the first and the last among them.

    Returns:
        ``{"epoch": {"x": [...], name: [...]}, "step": {...}}``; a curve that has one value all along is that number,
        and one without any value is left out.
    """
    # Of each line where it lies and when it was; a log may have more lines than memory has room for.
    offsets, progress, is_end = array("q"), array("d"), bytearray()
    try:
        for place, record in log.stream(folder):
            event, when = record.get("event"), record.get("epoch_progress")
            if event in ("step", "epoch") and _is_number(when):
                offsets.append(place)
                progress.append(float(when))  # type: ignore[arg-type]
                is_end.append(event == "epoch")
        if not offsets:
            return None
        order = np.argsort(np.frombuffer(progress), kind="stable")
        lines = np.frombuffer(offsets, dtype=np.int64)[order]
        ends = lines[np.frombuffer(is_end, dtype=np.bool_)[order]]
        return {
            "epoch": _block(_chosen(folder, ends, points), BY_EPOCH),
            "step": _block(_chosen(folder, lines, points), BY_STEP),
        }
    except (OSError, ValueError, RecursionError):  # it may be written into meanwhile
        return None


def _chosen(folder: str | Path, offsets: np.ndarray, points: int) -> list[dict[str, Any]]:
    return log.at(folder, offsets[places(len(offsets), points)].tolist())


def places(n: int, points: int) -> list[int]:
    """At most ``points`` of the indices ``0 .. n - 1``, evenly spaced, the first and the last among them.

    Example:
        >>> places(10, 4), places(3, 4)
        ([0, 3, 6, 9], [0, 1, 2])
    """
    if n <= points:
        return list(range(n))
    return [round(i * (n - 1) / (points - 1)) for i in range(points)]


def _block(chosen: Sequence[dict[str, Any]], names: Sequence[str]) -> dict[str, Any]:
    block: dict[str, Any] = {"x": [r["epoch_progress"] for r in chosen]}
    for name in names:
        values = [r[name] if _is_number(r.get(name)) else None for r in chosen]
        if all(v is None for v in values):
            continue
        block[name] = values[0] if len(values) > 1 and all(v == values[0] for v in values) else values
    return block


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
