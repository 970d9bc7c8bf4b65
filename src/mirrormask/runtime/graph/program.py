"""A captured module as plain values for the cache, and the module that they become again."""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mirrormask.runtime.graph.blueprint import Blueprint
from mirrormask.runtime.graph.frames import as_frames, as_volume, channels_of, frames_conv, frames_norm
from mirrormask.runtime.graph.functions import (
    additive,
    arrange,
    attend,
    attend_maps,
    by_mean,
    channel_norm,
    compact,
    features,
    largest,
    map_norm,
    numbered,
    per_channel,
    pointwise,
    product,
    response,
    shaped,
    spaced,
    spaced_conv,
    stored,
)

__all__ = ["Unstorable", "Written", "made_by", "module_of", "program_of", "steps_of"]

#: Of the operations of a program, all but these are PyTorch's registered ones: they reckon with sizes.
OTHERS: dict[str, Any] = {
    "getitem": operator.getitem,
    "largest": largest,
    "attend": attend,
    "attend_maps": attend_maps,
    "arrange": arrange,
    "stored": stored,
    "spaced": spaced,
    "spaced_conv": spaced_conv,
    "per_channel": per_channel,
    "additive": additive,
    "product": product,
    "pointwise": pointwise,
    "channel_norm": channel_norm,
    "features": features,
    "map_norm": map_norm,
    "by_mean": by_mean,
    "response": response,
    "compact": compact,
    "shaped": shaped,
    "numbered": numbered,
    **{f.__name__: f for f in (as_frames, as_volume, channels_of, frames_conv, frames_norm)},
    **{name: getattr(operator, name) for name in ("add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow")},
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")},
    **{name: getattr(torch, name) for name in ("sym_max", "sym_min", "sym_float", "sym_int", "sym_not", "sym_ite")},
}
#: What an argument's name under ``torch`` stands for.
NAMED = (torch.dtype, torch.layout, torch.memory_format)


#: An operation, its arguments, and those by name.
Written = tuple[Any, tuple[Any, ...], dict[str, Any]]


class Unstorable(Exception):
    """Something that plain values cannot name."""


def module_of(blueprint: Blueprint, tensors: Mapping[str, Tensor]) -> nn.Module:
    """The model around its regions, which are empty modules, with these parameters and buffers.

    Raises:
        AttributeError, KeyError: there is no such operation or tensor.
        RuntimeError, ValueError: PyTorch does not know the type of the result.
    """
    if not blueprint.program:
        return nn.Module()
    graph, nodes = fx.Graph(), dict[str, fx.Node]()
    attributes: dict[str, Any] = {name: nn.Module() for name in blueprint.regions}
    result: fx.Node | None = None
    for kind, name, target, args, kwargs in blueprint.program:
        if kind == "get_attr":
            attributes[target] = tensors[target]
        if kind == "structure":
            attributes[name] = _Structure(pytree.treespec_loads(target))
            result = graph.call_module(name, _read(args, nodes))
            continue
        function = _operation(target) if kind == "call_function" else target
        given = _read(args, nodes) if kind != "output" or result is None else (result,)
        nodes[name] = graph.create_node(kind, function, given, _read(kwargs, nodes), name)
    return fx.GraphModule(attributes, graph)


def program_of(module: fx.GraphModule, steps: bool = True) -> list[list[Any]]:
    """The program of a captured module that takes no lists or dicts; its result may be such of tensors.

    Raises:
        Unstorable: some step is not a registered operation, or some value has no plain form.
    """
    spec = getattr(module.graph._codegen, "pytree_info", None)
    if spec is None or not _takes_leaves(module, spec.in_spec):
        raise Unstorable("it takes lists or dicts")
    if not steps:
        return []
    *nodes, output = module.graph.nodes
    # The export returns a flat tuple, which its code makes the model's own structure of.
    leaves = list(output.args[0])
    whole = pytree.tree_unflatten(leaves, spec.out_spec)
    try:
        return steps_of([*nodes, output], {output: (output.target, (whole,), {})})
    except Unstorable:  # of a type of its own, if it is not some other step
        made = _structured(leaves, spec.out_spec)
        return [*steps_of(nodes), made, *steps_of([output], {output: (output.target, (), {})})]


class _Structure(nn.Module):
    """Makes the model's result of its parts."""

    def __init__(self, spec: pytree.TreeSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, *leaves: Any) -> Any:
        """The result."""
        return pytree.tree_unflatten(list(leaves), self.spec)


def _structured(leaves: list[Any], spec: pytree.TreeSpec) -> list[Any]:
    """The step that makes a result of a type that has no plain form, which PyTorch has been told the name of.

    Raises:
        Unstorable: it has not.
    """
    try:
        text = pytree.treespec_dumps(spec)
    except NotImplementedError as error:
        raise Unstorable(spec) from error
    return ["structure", "_structure", text, _plain(tuple(leaves)), {}]


def steps_of(nodes: Sequence[fx.Node], instead: Mapping[fx.Node, Written] | None = None) -> list[list[Any]]:
    """What makes the last of these nodes, which fetch tensors or work on nodes before them.

    Args:
        instead: the operation, its arguments and those by name, for nodes that are to be written otherwise.

    Raises:
        Unstorable: some step is not a registered operation, or some value has no plain form.
    """
    steps = []
    for node in nodes:
        target, args, kwargs = (instead or {}).get(node, (node.target, node.args, dict(node.kwargs)))
        name = _name(target) if node.op == "call_function" else str(target)
        steps.append([node.op, node.name, name, _plain(args), _plain(kwargs)])
    return steps


def made_by(steps: list[list[Any]], tensors: Mapping[str, Tensor]) -> Tensor:
    """The tensor that such steps make of these parameters and buffers.

    Raises:
        AttributeError, LookupError: there is no such operation or tensor.
        ValueError: it has another shape than the program was written for.
    """
    values: dict[str, Any] = {}
    made: Any = None
    for kind, name, target, args, kwargs in steps:
        if kind == "get_attr":
            made = tensors[target]
        else:
            made = _operation(target)(*_read(args, values), **_read(kwargs, values))
        values[name] = made
    return made.detach().clone().contiguous()  # type: ignore[no-any-return]


def _takes_leaves(module: fx.GraphModule, spec: Any) -> bool:
    """Whether each argument is one value, and those by name have the names of the program's inputs."""
    args, kwargs = spec.child(0), spec.child(1)
    names = [str(node.target) for node in module.graph.nodes if node.op == "placeholder"]
    leaves = not any(child.num_children for child in (*args.children(), *kwargs.children()))
    return leaves and names[args.num_children :] == list(kwargs.context or ())


def _name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    for name, function in OTHERS.items():
        if target is function:
            return name
    raise Unstorable(target)


def _operation(name: str) -> Any:
    return OTHERS[name] if name in OTHERS else functools.reduce(getattr, name.split("."), torch.ops)


def _plain(value: Any) -> Any:
    """Plain values that :func:`_read` makes the same arguments of."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if type(value) is tuple:
        return {"tuple": [_plain(item) for item in value]}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _plain(item) for key, item in value.items()}}
    if isinstance(value, NAMED):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise Unstorable(value)


def _read(value: Any, nodes: Mapping[str, Any]) -> Any:
    if isinstance(value, list):
        return [_read(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "node":
        return nodes[content]
    if kind == "tuple":
        return tuple(_read(item, nodes) for item in content)
    if kind == "dict":
        return {key: _read(item, nodes) for key, item in content.items()}
    return torch.device(content) if kind == "device" else getattr(torch, content)
