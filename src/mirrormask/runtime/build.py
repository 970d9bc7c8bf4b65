"""``mirrormask.compile``: from a model and an example to a module that runs it with generated kernels."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.checks import check_known
from mirrormask.machine.cache import processor_name
from mirrormask.machine.targets import Target, best_target, fp16_target
from mirrormask.machine.timing import in_turns, own_time
from mirrormask.matrices import default_weights
from mirrormask.runtime.graph import known
from mirrormask.runtime.graph.blueprint import Blueprint
from mirrormask.runtime.graph.capture import Capture, from_blueprint
from mirrormask.runtime.graph.export import Arguments, Refused, private_copy, signature_of
from mirrormask.runtime.graph.structure import structure_key
from mirrormask.runtime.model.accuracy import acceptable, difference
from mirrormask.runtime.model.compiled import CompiledModel
from mirrormask.runtime.model.levels import with_weights
from mirrormask.runtime.model.measure import layer_reports
from mirrormask.runtime.model.piece import Captured, Piece, Tools, own_tensors, working
from mirrormask.runtime.model.ranges import RangeFinder
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.model.report import LayerReport, Report
from mirrormask.runtime.model.snapshot import Snapshot
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["compile"]

#: Arguments beside tensors with which the structure of a model is kept in the cache.
PLAIN = (bool, int, float, str, type(None))
PRECISIONS = ("auto", "fp16", "fp32")
WEIGHTS = ("fp16", "fp32", "int8")


def compile(
    model: nn.Module,
    example_input: Any = (),
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    precision: str = "fp32",
    weights: str = "fp32",
    instruction_set: str | None = None,
    tune: bool = True,
    force: bool = False,
    check_range: bool = False,
) -> CompiledModel:
    """Compile a model for this processor; its zeros are skipped, and it never becomes slower than it was.

    Each layer runs ``y = W x`` over the nonzeros of ``W`` alone, with code generated for its shape. Layers, tiles and
    blocks are measured on this machine and the fastest kept, on disk too (``$MIRRORMASK_CACHE``, else the user's cache
    folder), so that the next build is quick. What the runtime does not know stays in PyTorch.

    Args:
        model: a module in eval mode, float32, on the CPU; it is not changed. The compiled model keeps the weights that
            it has now.
        example_input: what the model is called with: a tuple of arguments by position, a mapping of arguments by name,
            or the one argument. Arguments may be tensors, numbers, strings, ``None``, and lists, tuples and dicts of
            them. Sizes that the model leaves open may be others later; a call that does not fit makes a new capture.
        example_kwargs: arguments by name beside those of ``example_input``.
        precision: ``"fp32"``; ``"fp16"``, on a processor with AVX512-FP16: half precision, but for the layers in which
            a sum may pass 65,504 for the example, which stay in fp32; and if the output for the example then still
            differs by more than 2% of its largest element, all of the plan does; ``"auto"``: ``"fp16"`` where the
            processor has it.
        weights: ``"fp32"``, or ``"int8"``: each weight is rounded to one of 255 levels with a scale for each output, as
            :func:`mirrormask.quantize` without batches does to a model; sums stay in fp32, zeros stay zero. Linear
            layers on one row then read 3 bytes a weight instead of 6. ``"fp16"``: rounded to half precision, 4 bytes.
            The compiled model keeps a rounded copy of the model. A model that ``mm.quantize`` has rounded gets such
            kernels by itself.
        instruction_set: ``"avx512"``, ``"avx2"``, ``"neon"`` or ``"scalar"``; the best of this machine by default.
        tune: measure the candidates; without, take good guesses.
        force: use the plan even where it is not faster than the model.
        check_range: in fp16, look at every result of every call. When one is not finite though the input is, the
            layers that left the range move to fp32 with a ``RuntimeWarning``, and the call runs again. Costs a
            comparison per stored vector; without, such values become infinite. No effect in fp32.

    Returns:
        A :class:`CompiledModel`: called like ``model``, equal to it to about 1e-6 of the largest output, with a
        ``report``, which says what stays in PyTorch and why. NaN and infinity reach every output that a nonzero weight
        connects them to; what meets only zeros stays finite.

    Raises:
        TypeError: ``model`` is not a module, or does not take such arguments.
        ValueError: the model is in training mode, not in float32 or not on the CPU, or it cannot run the example; an
            input requires grad; or an option is unknown.

    Example:
        >>> import torch, mirrormask as mm
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
        >>> x = torch.randn(8, 64)
        >>> fast = mm.compile(model, x)
        >>> torch.allclose(fast(x), model(x), atol=1e-5)
        True
    """
    start = time.perf_counter()
    check_known("precision", precision, PRECISIONS)
    check_known("weights", weights, WEIGHTS)
    _check_model(model)
    arguments = _arguments(model, example_input, example_kwargs)
    target = best_target(instruction_set)
    half = fp16_target() if precision != "fp32" else None
    if half is not None and instruction_set not in (None, half.name):
        half = None
    note = ""
    if precision != "fp32" and half is None:
        why = f"this processor ({processor_name()}) runs {target.name}"
        if instruction_set is not None:
            why = f"instruction_set={instruction_set!r} has no half precision; leave it out"
        if precision == "fp16":
            raise ValueError(
                "precision='fp16' needs a processor with AVX512-FP16 (and no other instruction_set): "
                f"{why}; use 'fp32', or 'auto' to take fp16 where it is there"
            )
        note = f"in fp32: {why}"
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        snapshot = Snapshot(model)
        source = model if weights == "fp32" else with_weights(model, weights)
        if half is not None:
            fast = _build(source, arguments, Options(half, tune, force, check_range, start), snapshot)
            if fast.report.compiled:
                return fast
            note = f"in fp32, as in fp16 {fast.report.reason}"
        return _build(source, arguments, Options(target, tune, force, False, start, note), snapshot)


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


def _build(model: nn.Module, arguments: Arguments, options: Options, snapshot: Snapshot) -> CompiledModel:
    """The model's own results, captures of the model or of its parts, the check of what they give, the race.

    Args:
        snapshot: of the model, or of the one that it is a copy of.
    """
    expected = _expected(model, arguments)
    parts, left, around = _parts(model, arguments, options)
    regions = [region for part in parts for region in part.regions.values()]
    body = _body(model, parts, around, snapshot)
    call = _Call(body, arguments)
    rows: list[LayerReport] = []
    error, reason, eager, seconds, cached = 0.0, "", 0.0, 0.0, False
    if not regions:
        reason = f"it cannot be captured: {left[0][1]}" if left else "it holds no layer that the runtime knows"
    elif difference(model(*arguments.args, **arguments.kwargs), expected) > 0.0:
        reason = "it gives another result at every call: it draws random numbers or keeps a state"
    else:
        result = call()
        error = difference(result, expected)
        if not acceptable(error, options.target.half, model, arguments, expected, result):
            reason = f"its output would differ by {error:.1e}"
        rows, eager, seconds, cached = _measured(model, parts, regions, call, arguments, options)
        if not reason and seconds >= eager and not options.force:
            reason = f"the plan takes {1e3 * seconds:.3f} ms where eager PyTorch takes {1e3 * eager:.3f} ms"
    report = Report(
        compiled=not reason,
        reason=reason or options.note,
        layers=tuple(rows),
        wide=tuple(sorted(pair for part in parts for pair in part.peaks.items())),
        left=(*left, *(row for part in parts for row in part.captured.left)),
        regions=len(regions),
        eager_seconds=eager,
        seconds=eager if reason else seconds,
        error=error,
        nbytes=sum(region.nbytes for region in regions),
        build_seconds=time.perf_counter() - options.start,
        cached=cached,
        instruction_set=options.target.name,
        precision=options.target.precision,
        threads=torch.get_num_threads(),
        processor=processor_name(),
        unsure=len({(tuner.key, name) for tuner in _tuners(parts) for name in tuner.unsure}),
    )
    return CompiledModel(_own_copy(model) if reason else body, arguments.signature, snapshot, report)


# -- capturing ------------------------------------------------------------------------------------------------------


def _parts(
    model: nn.Module, arguments: Arguments, options: Options
) -> tuple[list[Part], list[tuple[str, str]], nn.Module | None]:
    """The model as one part, or its largest submodules that can be captured; why others cannot; a copy around them."""
    try:
        return [_part("", model, arguments, options)], [], None
    except Refused as error:
        left = [(type(model).__name__, _short(error))]
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
                parts.append(_part(inner, child, calls[child], options))
            except Refused as error:
                left.append((inner, _short(error)))
                descend(child, inner)

    descend(around, "")
    return parts, left, around


def _short(error: Exception) -> str:
    return str(error).partition("\n")[0][:300]


def _calls_of(model: nn.Module, arguments: Arguments) -> dict[nn.Module, Arguments]:
    """What the example calls each submodule with, the first time."""
    calls: dict[nn.Module, Arguments] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with contextlib.suppress(TypeError):
            calls.setdefault(module, Arguments.of(signature_of(module), args, kwargs))

    hooks = [m.register_forward_pre_hook(note, with_kwargs=True) for m in model.modules()]  # type: ignore[arg-type]
    model(*arguments.args, **arguments.kwargs)
    for hook in hooks:
        hook.remove()
    return calls


def _part(path: str, module: nn.Module, arguments: Arguments, options: Options) -> Part:
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
            part, result = _at_work(path, module, arguments, options, first)
            expected = module(*arguments.args, **arguments.kwargs)
            if acceptable(difference(result, expected), options.target.half, module, arguments, expected, result):
                return part
    part, _ = _at_work(path, module, arguments, options)
    if key is not None and part.captured.blueprint is not None and part.regions:
        known.store(key, part.captured.blueprint.as_plain())
    return part


def _at_work(
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
        few = arguments.with_tensors(lambda x, n=size: x[:n] if x.dim() and x.shape[0] == batch else x)  # type: ignore[misc]
        if at_work.guards.hold(few.named()) and at_work.guards.small(few.shapes):
            with contextlib.suppress(Exception):  # what the model does not take
                at_work.compare(module, few)


def _body(model: nn.Module, parts: list[Part], around: nn.Module | None, snapshot: Snapshot) -> nn.Module:
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


def _own_copy(model: nn.Module) -> nn.Module:
    """The model with the weights that it has now; the model itself where it cannot be copied."""
    try:
        return copy.deepcopy(model)
    except Exception:  # whatever a stranger's attributes raise
        return model


def _wide(captured: Capture, arguments: Arguments) -> tuple[dict[str, set[str]], dict[str, float]]:
    """The nodes of each region that leave half precision's range for the example, and the layers' sums."""
    finders = {name: RangeFinder(graph) for name, graph in captured.regions.items()}
    for name, finder in finders.items():
        captured.module.set_submodule(name, finder)
    whole = finders.get(captured.whole)
    if whole is None:
        captured.module(*arguments.args, **arguments.kwargs)
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


# -- measuring ------------------------------------------------------------------------------------------------------


class _Call:
    """A call of the example."""

    def __init__(self, module: nn.Module, arguments: Arguments) -> None:
        self.module, self.arguments = module, arguments

    def __call__(self) -> Any:
        if isinstance(self.module, Piece):
            return self.module.run(self.arguments)
        return self.module(*self.arguments.args, **self.arguments.kwargs)


def _measured(
    model: nn.Module,
    parts: list[Part],
    regions: list[Region],
    call: Callable[[], Any],
    arguments: Arguments,
    options: Options,
) -> tuple[list[LayerReport], float, float, bool]:
    """The steps of all regions, the seconds of a call before and after, and whether the cache knew them."""
    facts = [part.facts for part in parts]
    key = known.graph_key([region.graph for region in regions], facts, arguments.shapes)
    stored = known.load(key) or {}
    if "layers" in stored and not any(tuner.again for tuner in _tuners(parts)):
        rows = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in stored["layers"]]
        return rows, float(stored["eager"]), float(stored["seconds"]), True
    whole = parts[0].at_work.region if len(parts) == 1 and not parts[0].path else None
    if whole is not None:
        inputs = arguments.tensors  # a model that is one region is called without anything around it
        call = lambda: whole.forward(*inputs)  # noqa: E731
    eager, seconds = _race(_Call(model, arguments), call)
    rows = _layers(call, regions, {whole: tuple(arguments.tensors)} if whole is not None else {})
    known.store(key, {"eager": eager, "seconds": seconds, "layers": [asdict(row) for row in rows]})
    return rows, eager, seconds, False


def _tuners(parts: list[Part]) -> list[Tuner]:
    return [tuner for part in parts for _, tuner, _, _ in part.tools.values()]


def _race(eager: Callable[[], Any], plan: Callable[[], Any]) -> tuple[float, float]:
    """Median seconds of both, taken in turns so that a busy moment hits both."""
    clock = own_time if torch.get_num_threads() == 1 else time.perf_counter
    turns = in_turns({"eager": eager, "plan": plan}, rounds=3, budget=0.01, clock=clock, limit=2.0)
    return statistics.median(turns["eager"]), statistics.median(turns["plan"])


def _layers(
    call: Callable[[], Any], regions: list[Region], seen: dict[Region | None, tuple[Tensor, ...]]
) -> list[LayerReport]:
    """The steps of every region, on the tensors that the example brings to it."""
    if not seen:
        hooks = [r.register_forward_pre_hook(lambda region, given: seen.setdefault(region, given)) for r in regions]  # type: ignore[arg-type, func-returns-value]
        call()
        for hook in hooks:
            hook.remove()
    rows = [row for region in regions if region in seen for row in layer_reports(region, seen[region], {})]
    total = sum(row.seconds for row in rows) or 1.0
    return [replace(row, share=row.seconds / total) for row in rows]


# -- what is asked for ----------------------------------------------------------------------------------------------


def _arguments(model: nn.Module, example: Any, kwargs: Mapping[str, Any] | None) -> Arguments:
    """The example's arguments.

    Raises:
        TypeError: the model does not take such.
        ValueError: a tensor is not on the CPU, or requires grad.
    """
    named = dict(kwargs or {})
    args: tuple[Any, ...] = example if isinstance(example, tuple) else (example,)
    if isinstance(example, Mapping):
        args, named = (), {**example, **named}
    try:
        arguments = Arguments.of(signature_of(model), args, named)
    except TypeError as error:
        raise TypeError(f"{type(model).__name__}.forward does not take the example: {error}") from None
    for x in arguments.tensors:
        if x.device.type != "cpu":
            raise ValueError(f"example_input is on {x.device}, and the runtime is for the CPU; pass x.cpu()")
        if x.requires_grad:
            raise ValueError("example_input requires grad, and a compiled model computes none; pass x.detach()")
    if not arguments.tensors:
        raise TypeError(f"example_input holds no tensor: {example!r}")
    return arguments


def _expected(model: nn.Module, arguments: Arguments) -> Any:
    """What the model gives for the example.

    Raises:
        ValueError: it cannot run it.
    """
    try:
        return model(*arguments.args, **arguments.kwargs)
    except Exception as error:
        shapes = [tuple(x.shape) for x in arguments.tensors]
        raise ValueError(
            f"{type(model).__name__} cannot run the example, of shapes {shapes}: {type(error).__name__}: "
            f"{_short(error)}; pass an example that model(*example) takes"
        ) from error


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, not a torch.nn.Module")
    for name, module in model.named_modules():
        if module.training:
            raise ValueError(f"{name or 'the model'!r} is in training mode; call model.eval() first")
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.device.type != "cpu":
            raise ValueError(f"{name!r} is on {tensor.device}, and the runtime is for the CPU; call model.cpu()")
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ValueError(f"{name!r} is {tensor.dtype}, not torch.float32; call model.float()")
