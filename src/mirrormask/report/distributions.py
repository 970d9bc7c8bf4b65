"""The histograms of a run, from its ``distributions.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirrormask.train import schema
from mirrormask.train.distributions import FILE

__all__ = ["read"]


def read(folder: str | Path) -> list[list[Any]] | None:
    """One row a layer: name, histograms of the weights (start, trained, final) and the imbalance, and its first value.

    Each histogram is ``[low, high, zeros, counts]``, or None. The trained weights are None where the final ones are the
    same. None altogether where a run left no such file, or it is not what a run writes.
    """
    try:
        held = schema.read(Path(folder) / FILE, schema.Distributions)
    except (OSError, ValueError):
        return None
    rows = []
    for layer in held.layers:
        trained, final = _histogram(layer.trained), _histogram(layer.final)
        moments = [_histogram(layer.start), None if trained == final else trained, final, _histogram(layer.imbalance)]
        rows.append([layer.name, *moments, layer.imbalance_start])
    return rows


def _histogram(held: schema.Histogram | None) -> list[Any] | None:
    return None if held is None else [held.low, held.high, held.zeros, held.counts]
