"""``mirrormask.compile``: from a model and an example to a module that runs it with generated kernels."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mirrormask.checks import check_known
from mirrormask.machine.cache import processor_name
from mirrormask.machine.targets import best_target, fp16_target
from mirrormask.made_sparse import warn_of_filled
from mirrormask.runtime.graph.export import Arguments
from mirrormask.runtime.model.accuracy import acceptable, difference
from mirrormask.runtime.model.asked import check_model, example_arguments, expected_of, first_line
from mirrormask.runtime.model.compiled import CompiledModel
from mirrormask.runtime.model.levels import with_weights
from mirrormask.runtime.model.parts import Options, body_of, captured_parts, own_copy
from mirrormask.runtime.model.piece import pieces_of
from mirrormask.runtime.model.race import ExampleCall, measured, tuners_of
from mirrormask.runtime.model.report import LayerReport, Report
from mirrormask.runtime.model.snapshot import Snapshot, unchanged

__all__ = ["compile"]

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
    check_model(model)
    warn_of_filled(model)
    arguments = example_arguments(model, example_input, example_kwargs)
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


def _build(model: nn.Module, arguments: Arguments, options: Options, snapshot: Snapshot) -> CompiledModel:
    """The model's own results, captures of the model or of its parts, the check of what they give, the race.

    Args:
        snapshot: of the model, or of the one that it is a copy of.
    """
    with unchanged(model):
        body, report = _raced(model, arguments, options, snapshot)
    for one in (snapshot, *(piece.snapshot for piece in pieces_of(body))):
        one.settle()
    return CompiledModel(own_copy(model) if body is None else body, arguments.signature, snapshot, report)


def _raced(
    model: nn.Module, arguments: Arguments, options: Options, snapshot: Snapshot
) -> tuple[nn.Module | None, Report]:
    """What shall run instead of the model, or None if itself, and what is to be said of it."""
    expected = expected_of(model, arguments.copied())
    parts, left, around = captured_parts(model, arguments, options)
    regions = [region for part in parts for region in part.regions.values()]
    body = body_of(model, parts, around, snapshot)
    call = ExampleCall(body, arguments.copied())
    rows: list[LayerReport] = []
    error, reason, eager, seconds, cached = 0.0, "", 0.0, 0.0, False
    if not regions:
        reason = f"it cannot be captured: {left[0][1]}" if left else "it holds no layer that the runtime knows"
    elif difference(ExampleCall(model, arguments.copied())(), expected) > 0.0:
        reason = "it gives another result at every call: it draws random numbers or keeps a state"
    else:
        try:
            result = call()
        except Exception as failure:  # of the model's own code, around parts that are others now
            reason = f"its code does not run around compiled parts: {type(failure).__name__}: {first_line(failure)}"
        else:
            error = difference(result, expected)
            if not acceptable(error, options.target.half, model, arguments, expected, result):
                reason = f"its output would differ by {error:.1e}"
            rows, eager, seconds, cached = measured(model, parts, regions, call, arguments.copied(), options)
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
        unsure=len({(tuner.key, name) for tuner in tuners_of(parts) for name in tuner.unsure}),
    )
    return (None if reason else body), report
