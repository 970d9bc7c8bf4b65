"""The curves of one run, from its log, thinned to what a screen can show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    try:
        records = [record for record in log.read(folder) if isinstance(record, dict)]
    except (OSError, RecursionError):
        return None
    lines = [r for r in records if r.get("event") in ("step", "epoch") and _is_number(r.get("epoch_progress"))]
    if not lines:
        return None
    lines.sort(key=lambda r: float(r["epoch_progress"]))
    ends = [r for r in lines if r["event"] == "epoch"]
    return {"epoch": _block(ends, BY_EPOCH, points), "step": _block(lines, BY_STEP, points)}


def places(n: int, points: int) -> list[int]:
    """At most ``points`` of the indices ``0 .. n - 1``, evenly spaced, the first and the last among them.

    Example:
        >>> places(10, 4), places(3, 4)
        ([0, 3, 6, 9], [0, 1, 2])
    """
    if n <= points:
        return list(range(n))
    return [round(i * (n - 1) / (points - 1)) for i in range(points)]


def _block(records: Sequence[dict[str, Any]], names: Sequence[str], points: int) -> dict[str, Any]:
    chosen = [records[i] for i in places(len(records), points)]
    block: dict[str, Any] = {"x": [r["epoch_progress"] for r in chosen]}
    for name in names:
        values = [r[name] if _is_number(r.get(name)) else None for r in chosen]
        if all(v is None for v in values):
            continue
        block[name] = values[0] if len(values) > 1 and all(v == values[0] for v in values) else values
    return block


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
