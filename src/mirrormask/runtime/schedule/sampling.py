"""The tables of pools with windows of any sizes, and of what picks rows and columns: padding, crops, interpolation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Node

__all__ = ["picks", "windows"]

Tables = dict[str, npt.NDArray[Any]]
AXES = ("row", "column")


def windows(node: Node, source: Sequence[int], out: Sequence[int], dtype: npt.DTypeLike) -> Tables:
    """The window of each row and column, and one over what its sum is divided by, for maps of these sizes."""
    tables: Tables = {}
    for i, (axis, size, count) in enumerate(zip(AXES, source, out, strict=True)):
        place = np.arange(count)
        if node.op == "adaptive":
            low, high = place * size // count, -(-(place + 1) * size // count)
            divisor = high - low
        else:
            start = place * node.stride[i] - node.padding[i]
            end = np.minimum(start + node.kernel[i], size + node.padding[i])
            low, high = np.maximum(start, 0), np.minimum(end, size)
            divisor = end - start if node.count_padding else high - low
        tables |= {f"{axis}_low": low.astype(np.int32), f"{axis}_high": high.astype(np.int32)}
        tables[f"{axis}_share"] = (1 / np.maximum(divisor, 1)).astype(dtype)
    return tables


def picks(node: Node, source: Sequence[int], out: Sequence[int], dtype: npt.DTypeLike) -> Tables:
    """Which row and column each one of the result is, counted from 1, 0 for none; of linear ones, between which."""
    tables: Tables = {}
    for i, (axis, size, count) in enumerate(zip(AXES, source, out, strict=True)):
        if node.op == "resample" and node.kind != "nearest":
            place = _between(node, i, size, count)
            low = np.minimum(place.astype(np.int64), size - 1)
            tables |= {
                f"{axis}s": low.astype(np.int32),
                f"{axis}s_next": np.minimum(low + 1, size - 1).astype(np.int32),
            }
            tables[f"{axis}_weight"] = (place - low).astype(dtype)
            continue
        if node.op == "resample":
            scale = np.float32(1 / node.values[i] if node.values else size / count)
            index = np.minimum(np.floor(np.arange(count, dtype=np.float32) * scale).astype(np.int64), size - 1)
        elif node.op == "pad":
            index = _padded(node.kind, np.arange(count) - node.span[2 - 2 * i], size, node.stride[i])
        else:
            dim, start, stop, step = node.span
            index = np.arange(*slice(start, stop, step).indices(size)) if dim == i else np.arange(size)
        tables[f"{axis}s"] = (index + 1).astype(np.int32)
    return tables


def _between(node: Node, axis: int, size: int, count: int) -> npt.NDArray[np.float32]:
    """Where each row or column lies in the source, as PyTorch has it."""
    place = np.arange(count, dtype=np.float32)
    scale = np.float32(1 / node.values[axis] if node.values else size / count)
    if node.kind == "corners":
        place = place * np.float32((size - 1) / (count - 1) if count > 1 else 0)
    else:
        place = np.maximum((place + np.float32(0.5)) * scale - np.float32(0.5), np.float32(0))
    return place


def _padded(mode: str, index: npt.NDArray[np.int64], size: int, step: int) -> npt.NDArray[np.int64]:
    if mode == "spaced":
        index = np.where(index % step, -1, index // step)
    if mode == "reflect":
        index = np.abs(index)
        return np.where(index >= size, 2 * (size - 1) - index, index)
    if mode == "replicate":
        return np.clip(index, 0, size - 1)
    if mode == "circular":
        return index % size
    return np.where((index < 0) | (index >= size), -1, index)
