"""The part of a convolution's kernel that meets the map: what reads nothing but padding, whatever the output, goes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mirrormask.runtime.graph.ir import Graph, Node, Weight
from mirrormask.runtime.schedule.nonzeros import nonzeros

__all__ = ["reached", "trimmed"]


def reached(size: int, made: int, taps: int, stride: int, padding: int, dilation: int) -> tuple[int, int]:
    """The first tap of a dimension that some output reads the map with, and the one past the last; all if none does.

        >>> reached(14, 14, 3, 1, 24, 24)  # 24 beside a map of 14 there is only padding
        (1, 2)
        >>> reached(14, 14, 3, 1, 12, 12)
        (0, 3)

    Args:
        size: positions of the map.
        made: positions of the output; number ``o`` reads ``stride * o + tap * dilation - padding``.
    """
    first = max(0, -(-(padding - stride * (made - 1)) // dilation))
    last = min(taps - 1, (size - 1 + padding) // dilation)
    return (first, last + 1) if first <= last else (0, taps)


def trimmed(graph: Graph) -> Graph:
    """The graph with convolutions of maps that have lost the taps that only read padding.

    Dilated kernels reach past small maps (in DeepLab, eight of nine taps of a rate of 24 on 14 x 14), as does a 3x3
    kernel on a map of one pixel. Zeros that a map was padded with before are padding as well, and where no tap is left
    that reads them beside rows, the map is not padded.
    """
    named = {node.name: node for node in graph.nodes}
    nodes = [_trimmed(node, named) for node in graph.nodes]
    if all(a is b for a, b in zip(nodes, graph.nodes, strict=True)):
        return graph
    read = {name for node in nodes for name in node.inputs} | set(graph.outputs)
    return replace(graph, nodes=[node for node in nodes if node.op != "pad" or node.name in read])


def _trimmed(node: Node, named: dict[str, Node]) -> Node:
    if node.op != "conv" or node.span or node.weight is None:
        return node
    source = named[node.inputs[0]]
    zeros = source if _adds_zeros(source) else None
    inner = source if zeros is None else named[zeros.inputs[0]]
    before = (0, 0) if zeros is None else (zeros.span[2], zeros.span[0])
    around = (node.padding[0] + before[0], node.padding[1] + before[1])
    sizes = zip(_size(inner), _size(node), strict=True)
    settings = zip(node.kernel, node.stride, around, node.dilation, strict=True)
    rows, columns = (reached(n, o, *taken) for (n, o), taken in zip(sizes, settings, strict=True))
    kernel = (rows[1] - rows[0], columns[1] - columns[0])
    if kernel == node.kernel:
        return node
    skipped = (rows[0] * node.dilation[0], columns[0] * node.dilation[1])
    node = replace(node, kernel=kernel, weight=_cut(node.weight, (rows, columns)))
    if zeros is not None and kernel[1] == 1 and around[1] == skipped[1]:
        return replace(node, inputs=[inner.name], padding=(around[0] - skipped[0], 0))
    return replace(node, padding=(node.padding[0] - skipped[0], node.padding[1] - skipped[1]))


def _adds_zeros(node: Node) -> bool:
    """Whether a map is padded with zeros on all sides: negative paddings cut off numbers, which are not zeros."""
    return node.op == "pad" and node.kind == "constant" and node.values == (0.0,) and min(node.span) >= 0


def _size(node: Node) -> tuple[int, int]:
    """Rows and columns of a value, one number per channel being a map of one."""
    return (node.shape[1], node.shape[2]) if len(node.shape) == 3 else (1, 1)


def _cut(weight: Weight, spans: tuple[tuple[int, int], tuple[int, int]]) -> Weight:
    """The rows and columns of ``spans`` of each kernel."""
    (top, bottom), (left, right) = spans
    shape = (*weight.shape[:2], bottom - top, right - left)
    kept = np.zeros(shape, np.float32)
    for position, values in nonzeros(weight):
        *channels, row, column = np.unravel_index(position, weight.shape)
        inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
        outputs, inputs = (index[inside] for index in channels)
        kept[outputs, inputs, row[inside] - top, column[inside] - left] = values[inside]
    return Weight.of(kept)
