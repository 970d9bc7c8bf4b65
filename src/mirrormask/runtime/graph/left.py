"""What stays in PyTorch, as a reader of the model's code would name it."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mirrormask.checks import few
from mirrormask.runtime.graph.frames import as_frames, as_volume, channels_of, frames_conv, frames_norm
from mirrormask.runtime.graph.functions import (
    arrange,
    attend,
    attend_maps,
    by_mean,
    channel_norm,
    features,
    map_norm,
    pointwise,
    product,
    response,
    spaced,
    spaced_conv,
)
from mirrormask.runtime.graph.moments import OPERATION

__all__ = ["left_of"]

#: What a reader of the model's code would call operations that this capture made.
NAMES = {
    attend: "scaled_dot_product_attention",
    attend_maps: "scaled_dot_product_attention",
    arrange: "permute",
    product: "addmm",
    pointwise: "linear",
    channel_norm: "layer_norm",
    features: "index",
    map_norm: "linalg_vector_norm",
    by_mean: "div",
    response: "linalg_vector_norm",
    spaced_conv: "conv_transpose2d",
    spaced: "conv_transpose2d",
    frames_conv: "conv3d",
    frames_norm: "batch_norm",
    channels_of: "index",
    as_frames: "transpose",
    as_volume: "transpose",
    OPERATION: "recurrent layer",
}


def left_of(module: fx.GraphModule, reasons: dict[str, str]) -> list[tuple[str, str]]:
    """What stays in PyTorch, as a reader of the model's code would name it: an operation, where it is, and why."""
    found: dict[tuple[str, str], list[str]] = {}
    for node in module.graph.nodes:
        value = node.meta.get("val")
        tensors = isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and isinstance(value[0], Tensor))
        known = isinstance(node.target, torch._ops.OpOverload) or node.target in NAMES
        if known and node.name in reasons and tensors:
            name = NAMES.get(node.target) or str(node.target).removeprefix("aten.").partition(".")[0]
            found.setdefault((name, reasons[node.name]), []).append(_owner(node))
    rows = []
    for (name, why), owners in found.items():
        places = list(dict.fromkeys(owner for owner in owners if owner))
        rows.append((f"{name} in {few(places)}" if places else name, why))
    return rows


def _owner(node: fx.Node) -> str:
    """The name of the module whose code an operation is in."""
    stack = node.meta.get("nn_module_stack") or {}
    names = [str(name) for name, _ in stack.values()] if isinstance(stack, dict) else []
    return names[-1].removeprefix("L['self'].").replace("L['self']", "") if names else ""
