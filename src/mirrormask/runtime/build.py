"""``mirrormask.compile``: from a model and an example to a module that runs it with generated kernels."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.checks import check_known
from mirrormask.machine.cache import processor_name
from mirrormask.machine.targets import Target, best_target, fp16_target
from mirrormask.machine.timing import in_turns, own_time
from mirrormask.runtime.graph import known
from mirrormask.runtime.graph.blueprint import Blueprint
from mirrormask.runtime.graph.capture import Capture, capture, from_blueprint
from mirrormask.runtime.graph.structure import structure_key
from mirrormask.runtime.model.compiled import CompiledModel
from mirrormask.runtime.model.half import make_region
from mirrormask.runtime.model.measure import layer_reports
from mirrormask.runtime.model.ranges import RangeFinder
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.model.report import LayerReport, Report
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["compile"]

PRECISIONS = ("auto", "fp16", "fp32")
#: A plan whose output differs more than this from eager PyTorch, relative to the largest output, is not used.
TOLERANCE = {"fp32": 1e-4, "fp16": 2e-2}


def compile(
    model: nn.Module,
    example_input: Tensor | tuple[Tensor, ...],
    *,
    precision: str = "fp32",
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
        model: a module in eval mode, float32, on the CPU; it is not changed.
        example_input: one input (or a tuple of them); any first dimension works later, another shape makes a new plan.
        precision: ``"fp32"``; ``"fp16"``, on a processor with AVX512-FP16: half precision, but for the layers in which
            a sum may pass 65,504 for the example, which stay in fp32; and if the output for the example then still
            differs by more than 2% of its largest element, all of the plan does; ``"auto"``: ``"fp16"`` where the
            processor has it.
        instruction_set: ``"avx512"``, ``"avx2"``, ``"neon"`` or ``"scalar"``; the best of this machine by default.
        tune: measure the candidates; without, take good guesses.
        force: use the plan even where it is not faster than the model.
        check_range: in fp16, look at every result of every call. When one is not finite though the input is, the
            layers that left the range move to fp32 with a ``RuntimeWarning``, and the call runs again. Costs a
            comparison per stored vector; without, such values become infinite. No effect in fp32.

    Returns:
        A :class:`CompiledModel`: called like ``model``, equal to it to about 1e-6 of the largest output, with a
        ``report``. NaN and infinity reach every output that a nonzero weight connects them to; what meets only zeros
        stays finite.

    Raises:
        TypeError: ``model`` is not a module, or an input not a float32 tensor.
        ValueError: the model is in training mode, not on the CPU or cannot be captured; an input requires grad; or an
            option is unknown.

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
    inputs = _check_inputs(example_input)
    _check_model(model)
    target = best_target(instruction_set)
    half = fp16_target() if precision != "fp32" and instruction_set is None else None
    if precision == "fp16" and half is None:
        raise ValueError(
            "precision='fp16' needs a processor with AVX512-FP16 (and no other instruction_set), and this one "
            f"({processor_name()}) runs {target.name}; use 'fp32', or 'auto' to take fp16 where it is there"
        )
    note = ""
    with torch.no_grad():
        if half is not None:
            fast = _build(model, inputs, Options(half, tune, force, check_range, start))
            if fast.report.compiled:
                return fast
            note = f"in fp32, as in fp16 {fast.report.reason}"
        return _build(model, inputs, Options(target, tune, force, False, start, note))


@dataclass(frozen=True)
class Options:
    """What a build is asked for, when it began, and what the report shall say besides."""

    target: Target
    tune: bool
    force: bool
    check_range: bool
    start: float
    note: str = ""


def _build(model: nn.Module, inputs: tuple[Tensor, ...], options: Options) -> CompiledModel:
    """From the structure that the cache holds for such a model, if its output is right; else from a new capture."""
    key, tolerance = structure_key(model, inputs, _versions()), TOLERANCE[options.target.precision]
    stored = None if key is None else known.load(key)
    if stored is not None:
        # Nothing in a wrong file may do more harm than the time that this takes.
        with contextlib.suppress(
            ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError
        ):
            captured = from_blueprint(Blueprint.from_plain(stored), model)
            fast = _built(model, captured, inputs, options)
            if fast.report.error <= tolerance:
                return fast
    captured = capture(model, inputs)
    fast = _built(model, captured, inputs, options)
    if key is not None and captured.blueprint is not None and fast.report.error <= tolerance:
        known.store(key, captured.blueprint.as_plain())
    return fast


def _built(model: nn.Module, captured: Capture, inputs: tuple[Tensor, ...], options: Options) -> CompiledModel:
    graphs, target = list(captured.regions.values()), options.target
    shapes = [tuple(x.shape) for x in inputs]
    weights = known.weights_key(graphs, _versions(), target.name)
    wide, peaks = _wide(captured, inputs) if target.half else ({}, {})
    settings = (torch.get_num_threads(), options.tune, sorted(peaks), options.check_range)
    key = known.graph_key(graphs, weights, shapes, *settings)
    found = known.load(key) or {}
    around = sum(node.weight.nbytes for graph in graphs for node in graph.layers() if node.weight is not None)
    tuner = Tuner(weights, measure=options.tune, around=around)
    regions = {
        name: make_region(graph, target, tuner, wide.get(name, ()), options.check_range)
        for name, graph in captured.regions.items()
    }
    for name, region in regions.items():
        captured.module.set_submodule(name, region)
    # A model that is one region is called without the captured module around it, as CompiledModel will.
    plan = regions[captured.whole].forward if captured.whole in regions else captured.module
    error = _error(plan(*inputs), model(*inputs))
    if "layers" in found:
        eager, seconds = float(found["eager"]), float(found["seconds"])
        layers = [LayerReport(**{**row, "shape": tuple(row["shape"])}) for row in found["layers"]]
    else:
        eager, seconds = _race(model, plan, inputs)
        layers = _layers(plan, regions, inputs)
        known.store(key, {"eager": eager, "seconds": seconds, "layers": [asdict(row) for row in layers]})
    reason = ""
    if not graphs:
        reason = "it holds no layer that the runtime knows"
    elif not error <= TOLERANCE[target.precision]:
        reason = f"its output would differ by {error:.1e}"
    elif seconds >= eager and not options.force:
        reason = f"the plan takes {1e3 * seconds:.3f} ms where eager PyTorch takes {1e3 * eager:.3f} ms"
    report = Report(
        compiled=not reason,
        reason=reason or options.note,
        layers=tuple(layers),
        wide=tuple(sorted(peaks.items())),
        left=tuple(captured.left),
        eager_seconds=eager,
        seconds=eager if reason else seconds,
        error=error,
        nbytes=sum(region.nbytes for region in regions.values()),
        build_seconds=time.perf_counter() - options.start,
        cached="layers" in found,
        instruction_set=target.name,
        precision=target.precision,
        threads=torch.get_num_threads(),
        processor=processor_name(),
    )
    return CompiledModel(None if reason else captured, model, inputs, report)


def _wide(captured: Capture, inputs: tuple[Tensor, ...]) -> tuple[dict[str, set[str]], dict[str, float]]:
    """The nodes of each region that leave half precision's range for the example, and the layers' sums."""
    finders = {name: RangeFinder(graph) for name, graph in captured.regions.items()}
    for name, finder in finders.items():
        captured.module.set_submodule(name, finder)
    whole = finders.get(captured.whole)
    (captured.module if whole is None else whole)(*inputs)
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


def _race(model: nn.Module, plan: Callable[..., Any], inputs: tuple[Tensor, ...]) -> tuple[float, float]:
    """Median seconds of both, taken in turns so that a busy moment hits both."""
    clock = own_time if torch.get_num_threads() == 1 else time.perf_counter
    calls = {"eager": lambda: model(*inputs), "plan": lambda: plan(*inputs)}
    turns = in_turns(calls, rounds=3, budget=0.01, clock=clock, limit=2.0)
    return statistics.median(turns["eager"]), statistics.median(turns["plan"])


def _layers(plan: Callable[..., Any], regions: dict[str, Region], inputs: tuple[Tensor, ...]) -> list[LayerReport]:
    """The steps of every region, on the tensors that the example brings to it."""
    if len(regions) == 1 and plan == next(iter(regions.values())).forward:
        seen = dict.fromkeys(regions, inputs)
    else:
        seen = _inputs_of(plan, regions, inputs)
    rows = [row for name, region in regions.items() for row in layer_reports(region, seen[name], {})]
    total = sum(row.seconds for row in rows) or 1.0
    return [replace(row, share=row.seconds / total) for row in rows]


def _inputs_of(
    plan: Callable[..., Any], regions: dict[str, Region], inputs: tuple[Tensor, ...]
) -> dict[str, tuple[Tensor, ...]]:
    """What each region is called with."""
    seen: dict[str, tuple[Tensor, ...]] = {}
    hooks = [
        region.register_forward_pre_hook(lambda _, given, name=name: seen.__setitem__(name, given))  # type: ignore[misc]
        for name, region in regions.items()
    ]
    plan(*inputs)
    for hook in hooks:
        hook.remove()
    return seen


def _error(result: Any, expected: Any) -> float:
    """The largest difference over the largest expected element, over all output tensors."""
    pairs = zip(_tensors(result), _tensors(expected), strict=True)
    worst = 0.0
    for got, want in pairs:
        if got.shape != want.shape or not torch.equal(got.isfinite(), want.isfinite()):
            return float("inf")
        got, want = got[want.isfinite()], want[want.isfinite()]
        scale = float(want.abs().max()) if want.numel() else 1.0
        difference = float((got - want).abs().max()) if want.numel() else 0.0
        worst = max(worst, difference / scale if scale else difference)
    return worst


def _tensors(value: Any) -> list[Tensor]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _check_inputs(example: Any) -> tuple[Tensor, ...]:
    inputs = example if isinstance(example, tuple) else (example,)
    for x in inputs:
        if not isinstance(x, Tensor):
            raise TypeError(f"example_input holds a {type(x).__name__}; pass a tensor or a tuple of tensors")
        if x.device.type != "cpu":
            raise ValueError(f"example_input is on {x.device}, and the runtime is for the CPU; pass x.cpu()")
        if x.requires_grad:
            raise ValueError("example_input requires grad, and a compiled model computes none; pass x.detach()")
    return inputs


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
