"""Which operations of an exported program plans take over: the largest subgraphs that hold a layer, as submodules."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from mirrormask.runtime.graph.arrange import CONVOLUTIONS
from mirrormask.runtime.graph.aten import Context, Unsupported, open_shape
from mirrormask.runtime.graph.convert import CONVERTERS, aten, convert, streams_of, why_not
from mirrormask.runtime.graph.functions import attend, product
from mirrormask.runtime.graph.ir import Graph

__all__ = ["Support", "constants_of", "fuse", "leadings", "region_of", "take_over_flatten"]

#: Layers over rows, and which of their arguments is the weight.
LINEARS = {
    aten.linear.default: 1,
    aten.addmm.default: 2,
    aten.mm.default: 1,
    aten.matmul.default: 1,
    product: 2,
}
#: Operations that may only give a tensor another shape.
FLATTENS = {aten.flatten.using_ints, aten.view.default, aten.reshape.default}


def leadings(module: fx.GraphModule, rows: bool) -> list[tuple[str, ...]]:
    """The leading dimensions that layers have: each makes regions of its own, as a plan counts items by them."""
    found = []
    for node in module.graph.nodes:
        if _is_layer(node) and (rows or node.target in CONVOLUTIONS):
            with contextlib.suppress(Unsupported):
                found.append(_leading(node, rows))
    return list(dict.fromkeys(found))


def _is_layer(node: fx.Node) -> bool:
    """Whether an operation multiplies by a stored weight."""
    if node.target in LINEARS and len(node.args) > LINEARS[node.target]:
        weight = node.args[LINEARS[node.target]]
        return isinstance(weight, fx.Node) and weight.op == "get_attr"
    return node.target in CONVOLUTIONS


def _leading(node: fx.Node, rows: bool) -> tuple[str, ...]:
    shape = open_shape(node)
    return shape[:-1] if rows else shape[:1]


def constants_of(module: fx.GraphModule) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, str]]:
    """The parameters and buffers that nodes fetch, with their names."""
    constants: dict[fx.Node, Tensor] = {}
    names: dict[fx.Node, str] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            value: Any = getattr(module.get_submodule(owner), name)
            if isinstance(value, Tensor):
                constants[node], names[node] = value, str(node.target)
    return constants, names


class Support(OperatorSupportBase):
    """Which operations a plan takes over, among those with these leading dimensions, and why not the others."""

    def __init__(
        self, context: Context, leading: tuple[str, ...], without: Mapping[str, str], reasons: dict[str, str]
    ) -> None:
        self.context, self.leading, self.without, self.reasons = context, leading, without, reasons

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        """Whether a plan takes an operation over; :attr:`reasons` says why not."""
        if node.op != "call_function":
            return False
        reason = self._why_not(node)
        if reason:
            self.reasons.setdefault(node.name, reason)
        return not reason

    def _why_not(self, node: fx.Node) -> str:
        if node.name in self.without:
            return self.without[node.name]
        if node.target not in CONVERTERS:
            return "the runtime does not know this operation"
        try:
            tensors = [node, *(n for n in streams_of(node) if n not in self.context.constants)]
            if any(_leading(n, self.context.rows) != self.leading for n in tensors):
                return "no layer with such leading dimensions is near it"
        except Unsupported as reason:
            return str(reason)
        return why_not(self.context, node)


def fuse(module: fx.GraphModule, support: Support, prefix: str) -> list[fx.Node]:
    """Replace the largest supported subgraphs that hold a weight by submodules; returns the new nodes."""
    partitioner = CapabilityBasedPartitioner(module, support, allows_single_node_partition=True)
    found = [p for p in partitioner.propose_partitions() if any(_is_layer(n) for n in p.nodes)]
    for partition in found:
        for node in partition.nodes:
            support.reasons.pop(node.name, None)
    partitioner.fuse_partitions(found, prefix=prefix)
    return [n for n in module.graph.nodes if n.op == "call_module" and str(n.target).startswith(prefix)]


def take_over_flatten(call: fx.Node) -> bool:
    """Let a region over rows read what a flatten before it reads: images in memory are rows already.

    Only for a region of one input that is a contiguous ``(items, ...)`` made into ``(items, features)``.
    """
    before = call.args[0]
    if len(call.args) != 1 or not isinstance(before, fx.Node) or before.target not in FLATTENS:
        return False
    source = before.args[0]
    value, made = (node.meta.get("val") for node in (source, before) if isinstance(node, fx.Node))
    if not (isinstance(value, Tensor) and isinstance(made, Tensor)):
        return False
    if not isinstance(source, fx.Node) or made.dim() != 2 or value.dim() < 2:
        return False
    if open_shape(before)[0] != open_shape(source)[0] or len(before.users) > 1:
        return False
    call.args = (source,)
    return True


def region_of(inner: fx.GraphModule, call: fx.Node, outer: fx.GraphModule, rows: bool) -> Graph:
    """Convert a fused submodule; its arguments that are parameters become constants."""
    # Fusing may have remade the outer graph's nodes, hence fetch them again.
    outer_constants, outer_names = constants_of(outer)
    placeholders = [n for n in inner.graph.nodes if n.op == "placeholder"]
    constants: dict[fx.Node, Tensor] = {}
    names: dict[fx.Node, str] = {}
    inputs, given_inputs = [], []
    for placeholder, given in zip(placeholders, call.args, strict=True):
        assert isinstance(given, fx.Node)
        if given in outer_constants:
            constants[placeholder], names[placeholder] = outer_constants[given], outer_names[given]
        else:
            placeholder.meta.setdefault("val", given.meta.get("val"))
            inputs.append(placeholder)
            given_inputs.append(given)
    masks = {n.args[3] for n in inner.graph.nodes if n.target is attend}
    order = sorted(range(len(inputs)), key=lambda i: inputs[i] in masks)  # as the region has them
    inputs, given_inputs = [inputs[i] for i in order], [given_inputs[i] for i in order]
    # What replaces the submodule takes the inputs alone: it holds the constants itself.
    call.args = tuple(given_inputs)
    context = Context(inner, constants, names, rows)
    body = [n for n in inner.graph.nodes if n.op not in ("placeholder", "output")]
    (result,) = next(n for n in inner.graph.nodes if n.op == "output").args
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    return convert(context, body, inputs, outputs)
