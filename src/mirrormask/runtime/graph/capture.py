"""A model as a graph of ATen operations (``torch.export``), and the regions of it that a plan can take over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from mirrormask.runtime.graph.aten import Context
from mirrormask.runtime.graph.bind import bind, names_in, tensors_of
from mirrormask.runtime.graph.blueprint import Blueprint, Unstorable, program_of
from mirrormask.runtime.graph.convert import CONVERTERS, aten, convert, why_not
from mirrormask.runtime.graph.ir import Graph
from mirrormask.runtime.graph.simplify import simplify

__all__ = ["Capture", "capture", "from_blueprint"]

WEIGHTED = {aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding, aten.linear.default}
#: Operations that may only give a tensor another shape.
FLATTENS = {aten.flatten.using_ints, aten.view.default, aten.reshape.default}


@dataclass
class Capture:
    """What became of a model.

    Attributes:
        module: the model as operations; ``call_module`` nodes stand for the regions. Empty for a model of a single
            region that came from the cache.
        regions: name of the ``call_module`` target -> its graph.
        left: (operation, why) of what stays in PyTorch.
        whole: the name of the region that is the entire model, or ``""``.
        blueprint: the same without weights, when plain values can hold it and the model's own tensors can fill it.
    """

    module: nn.Module
    regions: dict[str, Graph]
    left: list[tuple[str, str]]
    whole: str
    blueprint: Blueprint | None = None


def capture(model: nn.Module, inputs: tuple[Tensor, ...]) -> Capture:
    """Export ``model`` and cut it into regions.

    Raises:
        ValueError: ``torch.export`` cannot capture the model.
    """
    try:
        module = torch.export.export(model, inputs, strict=False).module(check_guards=False)
    except Exception as error:
        first = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{type(model).__name__} cannot be captured: {type(error).__name__}: {first}; compile the submodules that "
            "can be (mm.compile(model.backbone, example)), or rewrite the part that torch.export refuses"
        ) from error
    assert isinstance(module, fx.GraphModule)
    simplify(module)
    nodes = list(module.graph.nodes)
    constants, constant_names = _constants(module)
    tensors = {constant_names[node]: tensor for node, tensor in constants.items()}
    reasons: dict[str, str] = {}
    regions: dict[str, Graph] = {}
    has_maps = any(n.target in WEIGHTED and n.target is not aten.linear.default for n in nodes)
    # First the images (with the linear layers of their heads), then the linear layers over rows of what is left.
    for rows in (False, True) if has_maps else (True,):
        context = Context(module, *_constants(module), rows)
        for graph_module in _fuse(module, context, reasons):
            target = str(graph_module.target)
            inner = module.get_submodule(target)
            assert isinstance(inner, fx.GraphModule)
            regions[target] = _region(inner, graph_module, module, rows)
            if rows and _take_over_flatten(graph_module):
                regions[target].flattens = True
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    left = [
        (f"{n.name} ({n.target})", reasons[n.name])
        for n in module.graph.nodes
        if n.op == "call_function" and n.name in reasons
    ]
    whole = _whole(module, regions)
    blueprint = _blueprint(module, regions, whole, left, tensors, tensors_of(model))
    bound = {name: bind(graph, tensors) for name, graph in regions.items()}
    return Capture(module, bound, left, whole, blueprint)


def from_blueprint(blueprint: Blueprint, model: nn.Module) -> Capture:
    """What :func:`capture` made of a model of this structure, with this model's weights.

    Raises:
        AttributeError: there is no operation of some name.
        KeyError: the model has no tensor of some name.
    """
    tensors = tensors_of(model)
    bound = {name: bind(graph, tensors) for name, graph in blueprint.regions.items()}
    return Capture(blueprint.module(tensors), bound, blueprint.left, blueprint.whole, blueprint)


def _blueprint(
    module: fx.GraphModule,
    regions: dict[str, Graph],
    whole: str,
    left: list[tuple[str, str]],
    tensors: dict[str, Tensor],
    own: dict[str, Tensor],
) -> Blueprint | None:
    names = {name for graph in regions.values() for name in names_in(graph)}
    names |= {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    if not all(_same(tensors, own, name) for name in names):
        return None  # it holds tensors that only the export has names for
    try:
        return Blueprint(regions, whole, left, [] if whole else program_of(module))
    except Unstorable:
        return None


def _same(one: dict[str, Tensor], other: dict[str, Tensor], name: str) -> bool:
    return (
        name in one
        and name in other
        and one[name].data_ptr() == other[name].data_ptr()
        and one[name].shape == other[name].shape
    )


def _whole(module: fx.GraphModule, regions: dict[str, Graph]) -> str:
    """The name of the region that is all of the model: it takes the model's inputs and gives its one output tensor."""
    calls = [n for n in module.graph.nodes if n.op in ("call_function", "call_module", "call_method")]
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    codegen = module.graph._codegen
    spec = codegen.pytree_info.out_spec if isinstance(codegen, fx.graph._PyTreeCodeGen) else None
    bare = spec is not None and spec.is_leaf()
    if len(calls) != 1 or calls[0].op != "call_module" or not bare or set(calls[0].args) != set(inputs):
        return ""
    # The region's own order of inputs is that of their first use; make it the model's.
    name = str(calls[0].target)
    graph = regions[name]
    names = dict(zip(calls[0].args, graph.inputs, strict=True))
    graph.inputs = [names[n] for n in inputs]
    calls[0].args = tuple(inputs)
    module.recompile()
    return name


def _constants(module: fx.GraphModule) -> tuple[dict[fx.Node, Tensor], dict[fx.Node, str]]:
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


class _Support(OperatorSupportBase):
    def __init__(self, context: Context, reasons: dict[str, str]) -> None:
        self.context, self.reasons = context, reasons

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
        if node.op != "call_function" or node.target not in CONVERTERS:
            if node.op == "call_function":
                self.reasons[node.name] = "the runtime does not know this operation"
            return False
        reason = why_not(self.context, node)
        if reason:
            self.reasons[node.name] = reason
        return not reason


def _fuse(module: fx.GraphModule, context: Context, reasons: dict[str, str]) -> list[fx.Node]:
    """Replace the largest supported subgraphs that hold a weight by submodules; returns the new nodes."""
    support = _Support(context, reasons)
    partitioner = CapabilityBasedPartitioner(module, support, allows_single_node_partition=True)
    found = [p for p in partitioner.propose_partitions() if any(n.target in WEIGHTED for n in p.nodes)]
    for partition in found:
        for node in partition.nodes:
            reasons.pop(node.name, None)
    prefix = "rows_" if context.rows else "maps_"
    partitioner.fuse_partitions(found, prefix=prefix)
    return [n for n in module.graph.nodes if n.op == "call_module" and str(n.target).startswith(prefix)]


def _take_over_flatten(call: fx.Node) -> bool:
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
    if made.dim() != 2 or value.dim() < 2 or made.shape[0] != value.shape[0] or len(before.users) > 1:
        return False
    call.args = (source,)
    return True


def _region(inner: fx.GraphModule, call: fx.Node, outer: fx.GraphModule, rows: bool) -> Graph:
    """Convert a fused submodule; its arguments that are parameters become constants."""
    # Fusing may have remade the outer graph's nodes, hence fetch them again.
    outer_constants, outer_names = _constants(outer)
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
    # What replaces the submodule takes the inputs alone: it holds the constants itself.
    call.args = tuple(given_inputs)
    context = Context(inner, constants, names, rows)
    body = [n for n in inner.graph.nodes if n.op not in ("placeholder", "output")]
    (result,) = next(n for n in inner.graph.nodes if n.op == "output").args
    outputs = list(result) if isinstance(result, (tuple, list)) else [result]
    return convert(context, body, inputs, outputs)
