"""ATen operations to nodes: which ones the plan knows, and what each becomes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.arranged import ARRANGED
from mirrormask.runtime.graph.aten import (
    MOST_BESIDE,
    Context,
    Unsupported,
    argument,
    item_shape,
    one_dimensional,
    pair,
    reaches_far,
    shape_of,
    source_of,
)
from mirrormask.runtime.graph.channels import CHANNELS
from mirrormask.runtime.graph.framed import FRAMED
from mirrormask.runtime.graph.frames import as_frames, as_volume
from mirrormask.runtime.graph.functions import attend, pointwise, product
from mirrormask.runtime.graph.ir import Graph, Node, Origin
from mirrormask.runtime.graph.pointwise import ACTIVATIONS, ARITHMETIC, each_channel
from mirrormask.runtime.graph.reduced import REDUCED
from mirrormask.runtime.graph.rowwise import ROWWISE
from mirrormask.runtime.graph.spatial import SPATIAL, slice_
from mirrormask.runtime.graph.turned import TURNED
from mirrormask.runtime.graph.views import RESHAPES, SAME

__all__ = ["CONVERTERS", "convert", "streams_of", "why_not", "writes_in_place"]

aten = torch.ops.aten


def _conv(context: Context, node: fx.Node) -> Node:
    one = one_dimensional(node)
    weight, shape = context.constant(node.args[1])
    bias, _ = context.constant(argument(node, 2, "bias"))
    stride = pair(argument(node, 3, "stride", 1), one=one)
    padding = argument(node, 4, "padding", 0)
    dilation = pair(argument(node, 5, "dilation", 1), one=one)
    kernel = (1, shape[2]) if one else (shape[2], shape[3])
    if isinstance(padding, str):
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        if padding == "same" and any(r % 2 for r in reach):
            raise Unsupported("its 'same' padding is uneven")
        padding = (0, 0) if padding == "valid" else (reach[0] // 2, reach[1] // 2)
    else:
        padding = pair(padding, one=one, fill=0)
    # What lies left and right of a row are a few zeros; without padding nothing past a row is read.
    if kernel[1] > MOST_BESIDE or reaches_far(padding[1], kernel[1], dilation[1]):
        raise Unsupported("its kernel or padding is wider than 48")
    return Node(
        "conv",
        node.name,
        [source_of(node).name],
        item_shape(context, node),
        layer=context.layer(node.args[1]),
        origin=Origin(weight, bias),
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=int(argument(node, 6, "groups", 1)),
        kernel=kernel,
    )


def _pointwise(context: Context, node: fx.Node) -> Node:
    """A linear layer over channels: a convolution of one number each."""
    weight, _ = context.constant(node.args[1])
    bias, _ = context.constant(node.args[2])
    layer, origin = context.layer(node.args[1]), Origin(weight, bias)
    if context.rows:
        raise Unsupported("it works on maps")
    return Node("conv", node.name, [source_of(node).name], item_shape(context, node), layer=layer, origin=origin)


def _linear(context: Context, node: fx.Node) -> Node:
    if not context.rows and len(shape_of(node)) != 2:
        raise Unsupported("it is a linear layer over a map")
    bias, _ = context.constant(argument(node, 2, "bias"))
    weight, _ = context.constant(node.args[1])
    return Node(
        "linear",
        node.name,
        [source_of(node).name],
        item_shape(context, node),
        layer=context.layer(node.args[1]),
        origin=Origin(weight, bias),
    )


def _product(context: Context, node: fx.Node) -> Node:
    """``x W`` and ``b + x W``, with a stored ``W`` of ``[inputs, outputs]``: a linear layer by another name."""
    bias, x, weight = (None, *node.args[:2]) if len(node.args) == 2 else node.args[:3]
    if any(node.kwargs.get(name, 1) != 1 for name in ("alpha", "beta")) or not isinstance(x, fx.Node):
        raise Unsupported("it adds multiples")
    if x in context.constants:
        raise Unsupported("it multiplies a stored tensor by another")
    if not context.rows and len(shape_of(node)) != 2:
        raise Unsupported("it is a linear layer over a map")
    name, shape = context.constant(weight)
    added, length = context.constant(bias)
    if len(shape) != 2 or (added and length != shape[1:]):
        raise Unsupported("it multiplies by something else than a matrix")
    origin = Origin(name, added, transposed=True)
    return Node("linear", node.name, [x.name], item_shape(context, node), layer=context.layer(weight), origin=origin)


def _batch_norm(context: Context, node: fx.Node) -> Node:
    """A batch norm of its own is a 1x1 convolution with one weight per channel, or over rows a diagonal matrix; binding
    merges it with the layer before if it can."""  # fmt: skip
    shape = item_shape(context, node)
    if context.rows and len(shape_of(node)) != 2:
        raise Unsupported("it normalises otherwise than feature by feature")
    weight, bias, mean, variance = (context.constant(node.args[i])[0] for i in (1, 2, 3, 4))
    if argument(node, 5, "training") or not mean or not variance:
        raise Unsupported("it normalises by the batch's own statistics")
    layer, names = context.layer(node.args[1]) or node.name, [source_of(node).name]
    origin = Origin(weight, bias, mean, variance, float(argument(node, 7, "eps")))
    return each_channel(node.name, names, shape, layer, origin)


CONVERTERS: dict[Any, Callable[[Context, fx.Node], Node]] = {
    aten.conv1d.default: _conv,
    aten.conv1d.padding: _conv,
    aten.conv2d.default: _conv,
    aten.conv2d.padding: _conv,
    aten.linear.default: _linear,
    aten.addmm.default: _product,
    aten.mm.default: _product,
    aten.matmul.default: _product,
    product: _product,
    pointwise: _pointwise,
    aten.batch_norm.default: _batch_norm,
    **ACTIVATIONS,
    **ARITHMETIC,
    **ROWWISE,
    **REDUCED,
    **SPATIAL,
    **CHANNELS,
    **ARRANGED,
    **TURNED,
    **FRAMED,
    aten.slice.Tensor: slice_,
    **RESHAPES,
    **SAME,
}


#: What may read or make a volume; of all others item shapes say nothing.
VOLUMES = {as_frames, as_volume, *RESHAPES}
#: What may stand beside linear layers over rows; the rest belongs to maps.
ROW_OPERATIONS = {
    target
    for target, converter in CONVERTERS.items()
    if converter in (_linear, _product) or any(target in table for table in (SAME, ACTIVATIONS, ARITHMETIC, ROWWISE))
} | {aten.cat.default, aten.concat.default, aten.batch_norm.default}
#: The same, of which nobody thinks as rows.
ON_ROWS = {*ROW_OPERATIONS, *REDUCED, aten.slice.Tensor}


def writes_in_place(node: fx.Node) -> bool:
    """Whether an operation changes its input, or a tensor that it is given as ``out``."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def convert_node(context: Context, node: fx.Node) -> Node:
    """The node that an ATen operation becomes.

    Raises:
        Unsupported: the plan does not know it; the message says why.
    """
    converter = CONVERTERS.get(node.target)
    if node.op != "call_function" or converter is None:
        raise Unsupported(f"the operation {node.target} is not known to the runtime")
    if writes_in_place(node):
        raise Unsupported("it works in place on a tensor that others read")
    if context.rows and node.target not in ON_ROWS:
        raise Unsupported("no convolution is near it")
    tensors = [node, *(source for source in streams_of(node) if source not in context.constants)]
    if not context.rows and node.target not in VOLUMES and any(len(shape_of(tensor)) == 5 for tensor in tensors):
        raise Unsupported("it works on volumes, and not as the convolutions over volumes beside it do")
    made = converter(context, node)
    if any(name in context.constants and name.name in made.inputs for name in node.all_input_nodes):
        raise Unsupported("it works on a stored tensor")
    for source in streams_of(node):
        if source not in context.constants:
            item_shape(context, source)
            if not _varies(context, source):
                raise Unsupported("it reads what is made of stored tensors alone, which has no items")
    return made


def streams_of(node: fx.Node) -> list[fx.Node]:
    """The tensors whose rows or maps an operation reads: all but the mask of attention."""
    return [source for source in node.all_input_nodes if node.target is not attend or source is not node.args[3]]


def _varies(context: Context, node: fx.Node) -> bool:
    """Whether a value depends on an input."""
    seen, found = {node}, [node]
    while found:
        one = found.pop()
        if one.op == "placeholder" and one not in context.constants:
            return True
        fresh = [source for source in one.all_input_nodes if source not in seen]
        seen |= set(fresh)
        found += reversed(fresh)
    return False


def why_not(context: Context, node: fx.Node) -> str:
    """Why an operation stays in PyTorch; empty when the plan knows it."""
    try:
        convert_node(context, node)
    except Unsupported as reason:
        return str(reason)
    return ""


def convert(context: Context, body: list[fx.Node], inputs: list[fx.Node], outputs: list[fx.Node]) -> Graph:
    """The graph of a region: its inputs, then its operations, without weights."""
    masks = {n.args[3] for n in body if n.target is attend}
    nodes = [
        Node("input", node.name, [], (), kind="mask")
        if node in masks
        else Node("input", node.name, [], item_shape(context, node))
        for node in sorted(inputs, key=lambda node: node in masks)
    ]
    nodes += [convert_node(context, node) for node in body]
    kept = [n for n in (*inputs, *outputs) if n not in masks]
    shapes = {n.name: shape_of(n)[-1:] if context.rows else shape_of(n)[1:] for n in kept}
    shapes |= {node.name: () for node in nodes if node.kind == "mask"}
    return Graph(context.rows, nodes, [n.name for n in nodes[: len(inputs)]], [n.name for n in outputs], shapes)
