"""The histograms of a run, from its ``distributions.json``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mirrormask.train.distributions import FILE

__all__ = ["read"]

#: More bins or layers than this did not come from a run.
MAX_BINS, MAX_LAYERS = 1000, 2000


def read(folder: str | Path) -> list[list[Any]] | None:
    """One row a layer: name, histograms of the weights (start, trained, final) and the imbalance, and its first value.

    Each histogram is ``[low, high, zeros, counts]``, or None. The trained weights are None where the final ones are the
    same. None altogether where a run left no such file, or it is not what a run writes.
    """
    try:
        layers = json.loads((Path(folder) / FILE).read_text("utf-8"))["layers"]
        if not isinstance(layers, list) or len(layers) > MAX_LAYERS:
            return None
        rows = []
        for layer in layers:
            trained, final = _histogram(layer["trained"]), _histogram(layer["final"])
            start = layer["imbalance_start"]
            rows.append(
                [
                    str(layer["name"]),
                    _histogram(layer["start"]),
                    None if trained == final else trained,
                    final,
                    _histogram(layer["imbalance"]),
                    start if _is_number(start) else None,
                ]
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return rows


def _histogram(tree: dict[str, Any] | None) -> list[Any] | None:
    if tree is None:
        return None
    low, high, zeros, counts = tree["low"], tree["high"], tree["zeros"], tree["counts"]
    if not all(map(_is_number, (low, high, zeros, *counts))) or len(counts) > MAX_BINS:
        raise ValueError("not a histogram")
    return [low, high, zeros, counts]


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
