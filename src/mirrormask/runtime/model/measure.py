"""Timing a region step by step, and each layer against PyTorch's dense one."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mirrormask.machine.timing import median_seconds, own_time
from mirrormask.runtime.graph.frames import frames_conv
from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.model.report import LayerReport
from mirrormask.runtime.schedule.trial import op_seconds

__all__ = ["layer_reports"]


def layer_reports(region: Region, inputs: tuple[Tensor, ...], dense: dict[str, float]) -> list[LayerReport]:
    """Each step of the region for ``inputs``.

    Args:
        dense: seconds of the dense layers by name, from an earlier build; filled in where they are missing.
    """
    if region.parts != [region]:
        return _by_parts(region, inputs, dense)
    graph, moments = region.graph, 1
    if graph.recurrent:
        moments, inputs = inputs[0].shape[0], (inputs[0][0],)
    items = math.prod(graph.leading(inputs[0].shape))
    length = graph.leading(inputs[0].shape)[-1] if graph.sequences else 0
    plan, tokens = region.plan_for(items, length), region.tokens(items, length)
    results = [torch.empty((max(items, tokens), *shape)) for shape in plan.outputs]
    # Masks are not read: their steps are 0 here, and their first number too.
    padded = [torch.zeros(max(items, tokens), *graph.shapes[name]) for name in graph.inputs]
    for zeros, given, name in zip(padded, inputs, graph.inputs, strict=True):
        if name not in graph.masks:
            zeros[:items] = given.detach().reshape(items, *zeros.shape[1:])
    addresses = np.array([t.data_ptr() for t in (*padded, *results)], np.int64)
    place = addresses.ctypes.data
    plan.run(place, 1, plan.tokens)
    calls = moments * -(-items // tokens)
    owners = _owners(region)
    rows: list[LayerReport] = []
    clearing, before = 0.0, ""
    for index, op in enumerate(plan.ops):
        seconds = clearing + calls * op_seconds(plan, index, place)
        clearing = 0.0
        if op.kind == "clear":  # part of whatever fills the buffer
            clearing = seconds
            continue
        node = owners.get(op.node) if op.kernel.is_layer else None
        if node is None or node.weight is None:
            rows.append(LayerReport(op.node, (), 0.0, op.kind, seconds, 0.0, 0.0))
            continue
        if node.span and before == op.node:  # another frame
            rows[-1] = replace(rows[-1], seconds=rows[-1].seconds + seconds)
            continue
        before = op.node
        if node.name not in dense:
            dense[node.name] = moments * _dense_seconds(node, graph.node(node.inputs[0]).shape, items)
        weight = node.weight
        rows.append(LayerReport(node.layer, weight.shape, weight.sparsity, op.label, seconds, dense[node.name], 0.0))
    return rows


def _by_parts(region: Region, inputs: tuple[Tensor, ...], dense: dict[str, float]) -> list[LayerReport]:
    """The steps of each part, on what the parts before it give."""
    seen: list[tuple[Region, tuple[Tensor, ...]]] = []
    hooks = [part.register_forward_pre_hook(lambda part, given: seen.append((part, given))) for part in region.parts]
    region(*inputs)
    for hook in hooks:
        hook.remove()
    return [row for part, given in seen for row in layer_reports(part, given, dense)]


def _owners(region: Region) -> dict[str, Node]:
    """The layer behind each op: fused additions and activations gave the op their own value's name."""
    graph = region.graph
    owners: dict[str, Node] = {}
    for node in graph.nodes:
        if node.weight is not None:
            owners[node.name] = node
        elif node.op in ("add", "act"):
            # Of two layers that meet in an addition, the later one computes it.
            found = [owners[name] for name in reversed(node.inputs) if name in owners]
            if found:
                owners[node.name] = max(found, key=graph.nodes.index)
    return owners


def _dense_seconds(node: Node, source: tuple[int, ...], items: int) -> float:
    """PyTorch's time for the layer, with its weight's zeros multiplied like any other number."""
    assert node.weight is not None
    weight = torch.from_numpy(node.weight.dense())
    bias = None if node.bias is None else torch.from_numpy(node.bias)
    x = torch.randn(items, *source, *([] if node.op == "linear" or len(source) == 3 else [1, 1]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad():
            if node.op == "linear":
                return median_seconds(lambda: F.linear(x, weight, bias), repeats=3, clock=own_time)
            settings = (node.stride, node.padding, node.dilation, node.groups)
            if node.span:
                given = (x, weight, bias, node.span, *settings, False)
                return median_seconds(lambda: frames_conv(*given), repeats=3, clock=own_time)
            return median_seconds(lambda: F.conv2d(x, weight, bias, *settings), repeats=3, clock=own_time)
    finally:
        torch.set_num_threads(threads)
