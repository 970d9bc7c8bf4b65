"""A model as a graph of ATen operations (``torch.export``), and the regions of it that a plan can take over."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from mirrormask.checks import few
from mirrormask.runtime.graph.arrange import CONVOLUTIONS, tokens_as_maps
from mirrormask.runtime.graph.aten import Context, Unsupported, open_shape
from mirrormask.runtime.graph.bind import bind, names_in, tensors_of
from mirrormask.runtime.graph.blueprint import Blueprint
from mirrormask.runtime.graph.convert import CONVERTERS, aten, convert, streams_of, why_not
from mirrormask.runtime.graph.export import LOCK, Arguments, Export, Refused, export, private_copy, signature_of
from mirrormask.runtime.graph.fold import Folded, fold_constants
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
from mirrormask.runtime.graph.guards import Guards
from mirrormask.runtime.graph.ir import Graph
from mirrormask.runtime.graph.leading import views_last
from mirrormask.runtime.graph.passes import once, out_of_place, without_identities, written
from mirrormask.runtime.graph.program import Unstorable, made_by, module_of, program_of
from mirrormask.runtime.graph.simplify import simplify
from mirrormask.runtime.graph.turned import respond, turn

__all__ = ["Capture", "capture", "from_blueprint"]

#: Layers over rows, and which of their arguments is the weight.
LINEARS = {
    aten.linear.default: 1,
    aten.addmm.default: 2,
    aten.mm.default: 1,
    aten.matmul.default: 1,
    product: 2,
}
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
}
#: Operations that may only give a tensor another shape.
FLATTENS = {aten.flatten.using_ints, aten.view.default, aten.reshape.default}


@dataclass(frozen=True)
class Capture:
    """What became of a model.

    Attributes:
        module: the model as operations; ``call_module`` nodes stand for the regions. Empty for a model of a single
            region that came from the cache.
        regions: name of the ``call_module`` target -> its graph.
        left: (operations, why) of what stays in PyTorch.
        whole: the name of the region that is the entire model, or ``""``.
        guards: for which arguments it holds.
        nodes: names of the operations in each region.
        blueprint: the same without weights, when plain values can hold it and the model's own tensors can fill it.
        has_maps: whether there are convolutions.
    """

    module: nn.Module
    regions: dict[str, Graph]
    left: list[tuple[str, str]]
    whole: str
    guards: Guards
    nodes: dict[str, frozenset[str]] = field(default_factory=dict)
    blueprint: Blueprint | None = None
    has_maps: bool = False


def capture(
    model: nn.Module, arguments: Arguments | tuple[Any, ...], without: Mapping[str, str] | None = None
) -> Capture:
    """Export ``model`` and cut it into regions.

    Args:
        arguments: an example of what it is called with.
        without: operations that must stay in PyTorch, by name, and why.

    Raises:
        Refused: ``torch.export`` cannot capture the model, or a call of it changes the model.
    """
    if not isinstance(arguments, Arguments):
        arguments = Arguments.of(signature_of(model), arguments, {})
    found = _captured(model, arguments, without, batch_alone=False)
    many = bool(found.regions) and (len(found.regions) > 1 or bool(found.left))
    if many and found.has_maps and any(dim for _, dim in found.guards.free):
        # Views of maps are places in them where sizes are known, and a region with them is worth more than a size.
        with contextlib.suppress(Refused):
            fixed = _captured(model, arguments, without, batch_alone=True)
            one = (len(fixed.regions), bool(fixed.left))
            if fixed.regions and one < (len(found.regions), bool(found.left)):
                return fixed
    return found


def _captured(
    model: nn.Module, arguments: Arguments, without: Mapping[str, str] | None, *, batch_alone: bool
) -> Capture:
    """One capture; where rewriting a program of a kind that was never seen fails, it is taken as it is."""
    with LOCK:
        exported = export(private_copy(model), arguments, batch_alone=batch_alone)
        try:
            return _cut(model, exported, without, rewrite=True)
        except Refused:
            raise
        except Exception:
            exported = export(private_copy(model), arguments, batch_alone=batch_alone)
    try:
        return _cut(model, exported, without, rewrite=False)
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"its program cannot be cut into regions: {type(error).__name__}: {error}") from error


def _cut(model: nn.Module, exported: Export, without: Mapping[str, str] | None, *, rewrite: bool) -> Capture:
    """The regions of an exported program, and the program around them.

    Args:
        rewrite: whether patterns are looked for first.
    """
    if exported.writes:
        raise Refused(f"a call changes its {', '.join(exported.writes)}, which a plan would not")
    module = exported.module
    folded = fold_constants(module) if rewrite else {}
    out_of_place(module.graph)
    without_identities(module.graph)
    if rewrite:
        once(module.graph)
        simplify(module)
        turn(module)
        tokens_as_maps(module)
        views_last(module)
        respond(module)
    constants, constant_names = _constants(module)
    tensors = {constant_names[node]: tensor for node, tensor in constants.items()}
    reasons: dict[str, str] = {}
    shared = dict.fromkeys(written(module.graph), "it shares memory with what an operation changes in place")
    regions: dict[str, Graph] = {}
    members: dict[str, frozenset[str]] = {}
    has_maps = any(n.target in CONVOLUTIONS for n in module.graph.nodes)
    # First the images (with the linear layers of their heads), then the linear layers over rows of what is left.
    for rows in (False, True) if has_maps else (True,):
        for leading in _leadings(module, rows):
            context = Context(module, *_constants(module), rows)
            support = _Support(context, leading, {**(without or {}), **shared}, reasons)
            for graph_module in _fuse(module, support, f"{'rows' if rows else 'maps'}_{len(regions)}_"):
                target = str(graph_module.target)
                inner = module.get_submodule(target)
                assert isinstance(inner, fx.GraphModule)
                names = frozenset(n.name for n in inner.graph.nodes if n.op == "call_function")
                graph = _region(inner, graph_module, module, rows)
                regions[target], members[target] = graph, names
                if rows and _take_over_flatten(graph_module):
                    regions[target] = replace(graph, flattens=True)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    left = _left(module, reasons)
    whole = _whole(module, regions)
    blueprint = _blueprint(module, regions, whole, left, exported.guards, tensors, tensors_of(model), folded)
    bound = {name: bind(graph, tensors) for name, graph in regions.items()}
    return Capture(module, bound, left, whole, exported.guards, members, blueprint, has_maps)


def _leadings(module: fx.GraphModule, rows: bool) -> list[tuple[str, ...]]:
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


def _left(module: fx.GraphModule, reasons: dict[str, str]) -> list[tuple[str, str]]:
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


def from_blueprint(blueprint: Blueprint, model: nn.Module) -> Capture:
    """What :func:`capture` made of a model of this structure, with this model's weights.

    Raises:
        AttributeError: there is no operation of some name.
        KeyError: the model has no tensor of some name.
    """
    tensors = tensors_of(model)
    tensors |= {name: made_by(steps, tensors) for name, steps in blueprint.constants.items()}
    bound = {name: bind(graph, tensors) for name, graph in blueprint.regions.items()}
    module = module_of(blueprint, tensors)
    return Capture(module, bound, blueprint.left, blueprint.whole, blueprint.guards, {}, blueprint)


def _blueprint(
    module: fx.GraphModule,
    regions: dict[str, Graph],
    whole: str,
    left: list[tuple[str, str]],
    guards: Guards,
    tensors: dict[str, Tensor],
    own: dict[str, Tensor],
    folded: Mapping[str, Folded],
) -> Blueprint | None:
    names = {name for graph in regions.values() for name in names_in(graph)}
    names |= {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    constants = {name: folded[name] for name in sorted(names & set(folded))}
    if not all(name in constants or _same(tensors, own, name) for name in names):
        return None  # it holds tensors that only the export has names for
    if not all(_same(one.sources, own, name) for one in constants.values() for name in one.sources):
        return None
    try:
        steps = {name: one.steps for name, one in constants.items()}
        return Blueprint(regions, whole, left, guards, program_of(module, steps=not whole), steps)
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
    regions[name] = replace(graph, inputs=[names[n] for n in inputs])
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
    """Which operations a plan takes over, among those with these leading dimensions."""

    def __init__(
        self, context: Context, leading: tuple[str, ...], without: Mapping[str, str], reasons: dict[str, str]
    ) -> None:
        self.context, self.leading, self.without, self.reasons = context, leading, without, reasons

    def is_node_supported(self, submodules: Any, node: fx.Node) -> bool:
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


def _fuse(module: fx.GraphModule, support: _Support, prefix: str) -> list[fx.Node]:
    """Replace the largest supported subgraphs that hold a weight by submodules; returns the new nodes."""
    partitioner = CapabilityBasedPartitioner(module, support, allows_single_node_partition=True)
    found = [p for p in partitioner.propose_partitions() if any(_is_layer(n) for n in p.nodes)]
    for partition in found:
        for node in partition.nodes:
            support.reasons.pop(node.name, None)
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
    if not isinstance(source, fx.Node) or made.dim() != 2 or value.dim() < 2:
        return False
    if open_shape(before)[0] != open_shape(source)[0] or len(before.users) > 1:
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
