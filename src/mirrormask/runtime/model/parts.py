"""The model as parts that are captured, each at work in regions: from the cache where it holds their structure."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.machine.cache import processor_name
from mirrormask.machine.targets import Target
from mirrormask.matrices import default_weights
from mirrormask.runtime.graph import known
from mirrormask.runtime.graph.blueprint import Blueprint
from mirrormask.runtime.graph.capture import Capture, from_blueprint
from mirrormask.runtime.graph.export import Arguments, Refused, private_copy, signature_of
from mirrormask.runtime.graph.structure import structure_key
from mirrormask.runtime.model.accuracy import acceptable, difference
from mirrormask.runtime.model.asked import first_line
from mirrormask.runtime.model.piece import Captured, Piece, Tools, own_tensors, working
from mirrormask.runtime.model.ranges import RangeFinder
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.model.snapshot import Snapshot
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["Options", "Part", "body_of", "captured_parts", "own_copy"]

#: Arguments beside tensors with which the structure of a model is kept in the cache.
PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Options:
    """What a build is asked for, when it began, and what the report shall say besides."""

    target: Target
    tune: bool
    force: bool
    check_range: bool
    start: float
    note: str = ""


@dataclass
class Part:
    """A module of the model that is captured: the model itself, or the largest submodules that can be.

    Attributes:
        path: its name in the model.
        arguments: what the example calls it with.
        facts: what its plans depend on besides their graphs.
        peaks: (layer, how large its sums may become) of what stays in fp32.
    """

    path: str
    module: nn.Module
    arguments: Arguments
    captured: Capture
    regions: dict[str, Region]
    at_work: Captured
    tools: dict[str, Tools]
    facts: tuple[Any, ...]
    peaks: dict[str, float] = field(default_factory=dict)


def captured_parts(
    model: nn.Module, arguments: Arguments, options: Options
) -> tuple[list[Part], list[tuple[str, str]], nn.Module | None]:
    """The model as one part, or its largest submodules that can be captured; why others cannot; a copy around them."""
    try:
        return [captured_part("", model, arguments, options)], [], None
    except Refused as error:
        left = [(type(model).__name__, first_line(error))]
    around = private_copy(model)
    if around is model:
        return [], left, None
    calls = _calls_of(around, arguments)
    parts: list[Part] = []

    def descend(module: nn.Module, path: str) -> None:
        for name, child in module.named_children():
            inner = f"{path}.{name}".lstrip(".")
            if not default_weights(child, frozen=True):
                continue
            if child not in calls:
                descend(child, inner)
                continue
            try:
                parts.append(captured_part(inner, child, calls[child], options))
            except Refused as error:
                left.append((inner, first_line(error)))
                descend(child, inner)

    descend(around, "")
    return parts, left, around


def _calls_of(model: nn.Module, arguments: Arguments) -> dict[nn.Module, Arguments]:
    """What the example calls each submodule with, the first time."""
    calls: dict[nn.Module, Arguments] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with contextlib.suppress(TypeError):
            call = Arguments.of(signature_of(module), args, kwargs)
            if not call.nested:
                calls.setdefault(module, call)

    hooks = []
    for module in model.modules():
        with contextlib.suppress(RuntimeError):  # a scripted module takes none
            hooks.append(module.register_forward_pre_hook(note, with_kwargs=True))  # type: ignore[arg-type]
    given = arguments.copied()
    model(*given.args, **given.kwargs)
    for hook in hooks:
        hook.remove()
    return calls


def captured_part(path: str, module: nn.Module, arguments: Arguments, options: Options) -> Part:
    """From the structure that the cache holds for such a module, if its output is right; else from a new capture.

    Raises:
        Refused: it cannot be captured.
    """
    values = (*arguments.args, *arguments.kwargs.values())
    plain = all(isinstance(x, (Tensor, *PLAIN)) for x in values)
    key = structure_key(module, tuple(arguments.tensors), arguments.kind, _versions()) if plain else None
    stored = None if key is None else known.load(key)
    if stored is not None:
        # Nothing in a wrong file may do more harm than the time that this takes.
        with contextlib.suppress(
            ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
        ):
            first = from_blueprint(Blueprint.from_plain(stored), module)
            part, result = part_at_work(path, module, arguments, options, first)
            given = arguments.copied()
            expected = module(*given.args, **given.kwargs)
            if acceptable(difference(result, expected), options.target.half, module, arguments, expected, result):
                return part
    part, _ = part_at_work(path, module, arguments, options)
    if key is not None and part.captured.blueprint is not None and part.regions:
        known.store(key, part.captured.blueprint.as_plain())
    return part


def part_at_work(
    path: str, module: nn.Module, arguments: Arguments, options: Options, first: Capture | None = None
) -> tuple[Part, Any]:
    """A capture with regions that run, and what it makes of the example."""
    target = options.target
    made: dict[str, Any] = {}

    def tools(captured: Capture) -> dict[str, Tools]:
        graphs = list(captured.regions.values())
        weights = known.weights_key(graphs, _versions(), target.name)
        wide, peaks = _wide(captured, arguments) if target.half else ({}, {})
        around = sum(node.weight.nbytes for graph in graphs for node in graph.layers() if node.weight is not None)
        tuner = Tuner(weights, measure=options.tune, around=around)
        made["facts"] = (weights, torch.get_num_threads(), options.tune, sorted(peaks), options.check_range)
        made["peaks"] = peaks
        made["tools"] = {
            name: (target, tuner, frozenset(wide.get(name, ())), options.check_range) for name in captured.regions
        }
        return made["tools"]  # type: ignore[no-any-return]

    captured, regions, at_work, result = working(module, arguments, tools, first)
    for _, tuner, _, _ in made["tools"].values():
        tuner.measure = False  # shapes that come later are not made to wait
    _compare_small(at_work, module, arguments)
    part = Part(path, module, arguments, captured, regions, at_work, made["tools"], made["facts"], made["peaks"])
    return part, result


def _compare_small(at_work: Captured, module: nn.Module, arguments: Arguments) -> None:
    """Whether a batch of one, and an empty one, are as they should be: guards leave that open."""
    batch = next((x.shape[0] for x in arguments.tensors if x.dim()), 0)
    for size in (1, 0):
        if size > batch:
            continue
        with contextlib.suppress(Exception):  # what the model does not take, or a tensor of which there are no parts
            few = arguments.with_tensors(lambda x, n=size: x[:n] if x.dim() and x.shape[0] == batch else x)  # type: ignore[misc]
            if at_work.guards.hold(few.named()) and at_work.guards.small(few.shapes):
                at_work.compare(module, few)


def body_of(model: nn.Module, parts: list[Part], around: nn.Module | None, snapshot: Snapshot) -> nn.Module:
    """What runs instead of the model: a piece, or a copy of the model with pieces in it."""
    for part in parts:
        if part.at_work.module is not None:
            own_tensors(part.at_work.module)
    if around is None:
        if not parts:
            return model
        (part,) = parts
        own = snapshot if snapshot.model is model else Snapshot(model)
        keep = own is not snapshot  # nobody else keeps it
        return Piece(model, own, part.at_work, part.tools, part.arguments.signature, keep=keep)
    for part in parts:
        if part.regions:
            piece = Piece(
                part.module, Snapshot(part.module), part.at_work, part.tools, part.arguments.signature, keep=True
            )
            around.set_submodule(part.path, piece)
    own_tensors(around)
    return around


def _wide(captured: Capture, arguments: Arguments) -> tuple[dict[str, set[str]], dict[str, float]]:
    """The nodes of each region that leave half precision's range for the example, and the layers' sums."""
    finders = {name: RangeFinder(graph) for name, graph in captured.regions.items()}
    for name, finder in finders.items():
        captured.module.set_submodule(name, finder)
    whole = finders.get(captured.whole)
    if whole is None:
        given = arguments.copied()
        captured.module(*given.args, **given.kwargs)
    else:
        whole(*arguments.tensors)
    peaks = {
        finder.graph.node(node).layer or node: peak
        for finder in finders.values()
        for node, peak in finder.peaks.items()
        if finder.graph.node(node).op != "act"
    }
    return {name: finder.wide for name, finder in finders.items()}, peaks


def _versions() -> tuple[str, ...]:
    import llvmlite

    import mirrormask

    return (mirrormask.__version__, torch.__version__, llvmlite.__version__, processor_name())


def own_copy(model: nn.Module) -> nn.Module:
    """The model with the weights that it has now; the model itself where it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever a stranger's attributes raise
        return model
