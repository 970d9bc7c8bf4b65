"""A model as a graph of ATen operations (``torch.export``), and the regions of it that a plan can take over."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from mirrormask.runtime.graph.alike import fold_items
from mirrormask.runtime.graph.arrange import CONVOLUTIONS, tokens_as_maps
from mirrormask.runtime.graph.aten import Context
from mirrormask.runtime.graph.bind import bind, names_in
from mirrormask.runtime.graph.blueprint import Blueprint
from mirrormask.runtime.graph.chains import is_move
from mirrormask.runtime.graph.export import LOCK, Arguments, Export, Refused, export, private_copy, signature_of
from mirrormask.runtime.graph.flattened import flatten_first
from mirrormask.runtime.graph.fold import fold_constants
from mirrormask.runtime.graph.guards import Guards
from mirrormask.runtime.graph.ir import Graph
from mirrormask.runtime.graph.leading import views_last
from mirrormask.runtime.graph.left import left_of
from mirrormask.runtime.graph.making import Made, fetched, made_in, number
from mirrormask.runtime.graph.moments import loops
from mirrormask.runtime.graph.open_sizes import TokensOfMaps
from mirrormask.runtime.graph.partition import (
    Support,
    constants_of,
    fuse,
    leadings,
    region_of,
    take_over_flatten,
)
from mirrormask.runtime.graph.passes import (
    in_order,
    once,
    out_of_place,
    put_in_order,
    views_of_results,
    without_identities,
    written,
)
from mirrormask.runtime.graph.program import Unstorable, made_by, module_of, program_of
from mirrormask.runtime.graph.settled import OpenSizes
from mirrormask.runtime.graph.simplify import simplify
from mirrormask.runtime.graph.tensors import held_tensors, tensors_of
from mirrormask.runtime.graph.turned import respond, turn
from mirrormask.runtime.graph.volumes import VOLUME_CONVOLUTIONS, volumes_as_frames

__all__ = ["Capture", "capture", "from_blueprint"]


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
    # Views of maps are places in them where sizes are known, and a region with them is worth more than a size. So are
    # volumes, whose convolutions are none over maps where their depth is open. No need to try that first.
    fixed = found = None
    if _has(model, (nn.Conv3d, nn.ConvTranspose3d)):
        fixed = _fixed(model, arguments, without)
    elif _has(model, nn.Conv2d):
        try:
            found = _captured(model, arguments, without, until_tokens=True)
        except TokensOfMaps:
            fixed = _fixed(model, arguments, without)
    if fixed is not None and fixed.regions and not _is_many(fixed):
        return fixed
    found = found or _captured(model, arguments, without)
    if _is_many(found) and found.has_maps and any(dim for _, dim in found.guards.free):
        fixed = fixed or _fixed(model, arguments, without)
        if fixed is not None and fixed.regions and _parts(fixed) < _parts(found):
            return fixed
    return found


def _has(model: nn.Module, kinds: Any) -> bool:
    return any(isinstance(module, kinds) for module in model.modules())


def _fixed(model: nn.Module, arguments: Arguments, without: Mapping[str, str] | None) -> Capture | None:
    """A capture in which the batch alone is open, if there is one."""
    with contextlib.suppress(Refused):
        return _captured(model, arguments, without, batch_alone=True)
    return None


def _is_many(found: Capture) -> bool:
    """Whether it is more than one region that is all of the model but for views of what it gives."""
    beside = any(node.op == "call_function" and not _is_view(node) for node in _nodes(found.module))
    return len(found.regions) > 1 or beside or _parts(found)[0] > 0


def _is_view(node: fx.Node) -> bool:
    return is_move(node) or node.target is operator.getitem or not isinstance(node.meta.get("val"), Tensor)


def _parts(found: Capture) -> tuple[int, int, bool]:
    """Of what less is better: convolutions over volumes that stay, regions, and operations that stay."""
    volumes = sum(node.target in VOLUME_CONVOLUTIONS for node in _nodes(found.module))
    return volumes, len(found.regions), bool(found.left)


def _nodes(module: nn.Module) -> list[fx.Node]:
    return list(module.graph.nodes) if isinstance(module, fx.GraphModule) else []


def _captured(model: nn.Module, arguments: Arguments, without: Mapping[str, str] | None, **options: bool) -> Capture:
    """One capture; where rewriting a program of a kind that was never seen fails, it is taken as it is."""
    with LOCK:
        exported = export(private_copy(model), arguments, **options)
        try:
            return _cut(model, exported, without, rewrite=True)
        except Refused:
            raise
        except Exception:
            exported = export(private_copy(model), arguments, **options)
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
    open_sizes, dense = OpenSizes(module), in_order(module.graph)
    if rewrite:
        fold_items(module)
        fold_constants(module)
    out_of_place(module.graph)
    without_identities(module.graph)
    if rewrite:
        once(module.graph)
        simplify(module, written(module.graph))
        flatten_first(module)
        turn(module)
        volumes_as_frames(module)
        tokens_as_maps(module)
        views_last(module)
        respond(module)
    constants, constant_names = constants_of(module)
    tensors = {constant_names[node]: tensor for node, tensor in constants.items()}
    regions = loops(module, constant_names) if rewrite else {}
    reasons: dict[str, str] = {}
    shared = dict.fromkeys(written(module.graph), "it shares memory with what an operation changes in place")
    shared |= dict.fromkeys(views_of_results(module.graph), "it is a view of what is returned too")
    members: dict[str, frozenset[str]] = {name: frozenset() for name in regions}
    has_maps = any(n.target in (*CONVOLUTIONS, *VOLUME_CONVOLUTIONS) for n in module.graph.nodes)
    # First the images (with the linear layers of their heads), then the linear layers over rows of what is left.
    for rows in (False, True) if has_maps else (True,):
        for leading in leadings(module, rows):
            context = Context(module, *constants_of(module), rows)
            support = Support(context, leading, {**(without or {}), **shared}, reasons)
            for graph_module in fuse(module, support, f"{'rows' if rows else 'maps'}_{len(regions)}_"):
                target = str(graph_module.target)
                inner = module.get_submodule(target)
                assert isinstance(inner, fx.GraphModule)
                names = frozenset(n.name for n in inner.graph.nodes if n.op == "call_function")
                graph = region_of(inner, graph_module, module, rows)
                regions[target], members[target] = graph, names
                if rows and take_over_flatten(graph_module):
                    regions[target] = replace(graph, flattens=True)
    put_in_order(module.graph, dense)
    module.graph.eliminate_dead_code()
    module.delete_all_unused_submodules()
    module.recompile()
    left = left_of(module, reasons)
    if rewrite:
        open_sizes.check()
    whole = _whole(module, regions)
    blueprint = _blueprint(
        module, regions, whole, left, exported.guards, tensors, held_tensors(model) | tensors_of(model), made_in(module)
    )
    bound = {name: bind(graph, tensors) for name, graph in regions.items()}
    return Capture(module, bound, left, whole, exported.guards, members, blueprint, has_maps)


def from_blueprint(blueprint: Blueprint, model: nn.Module) -> Capture:
    """What :func:`capture` made of a model of this structure, with this model's weights.

    Raises:
        AttributeError: there is no operation of some name.
        KeyError: the model has no tensor of some name.
        ValueError: the numbers of its tensors ask for another program.
    """
    tensors = held_tensors(model) | tensors_of(model)
    for name, steps in blueprint.constants.items():
        tensors[name] = made_by(steps, tensors)  # perhaps of those before
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
    made: Mapping[str, Made],
) -> Blueprint | None:
    names = {name for graph in regions.values() for name in names_in(graph)}
    names |= {str(node.target) for node in module.graph.nodes if node.op == "get_attr"}
    names |= {name for name, one in made.items() if one.decides}
    for name in reversed(list(made)):  # each is made of those before it
        names |= made.keys() & made[name].sources.keys() if name in names else set()
    constants = {name: one.steps for name, one in made.items() if name in names}
    needed = {name: tensors.get(name) for name in names - constants.keys()}
    for name in constants:
        needed |= {source: one for source, one in made[name].sources.items() if source not in constants}
    named = {}
    for name, tensor in needed.items():
        if tensor is None:
            return None
        if _is(tensor, own.get(name)):
            continue
        same = next((path for path, one in own.items() if _is(tensor, one)), None)
        if same is not None:
            named[name] = fetched(same)
        elif tensor.dim() or name in own:
            return None  # it holds tensors that only the export has names for
        else:
            named[name] = number(tensor)  # which the code of the model says
    try:
        return Blueprint(regions, whole, left, guards, program_of(module, steps=not whole), named | constants)
    except Unstorable:
        return None


def _is(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are the same memory, looked at in the same way."""
    if other is None or one.data_ptr() != other.data_ptr() or one.dtype != other.dtype:
        return False
    return one.shape == other.shape and one.stride() == other.stride()


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
