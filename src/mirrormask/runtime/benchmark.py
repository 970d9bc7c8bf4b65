"""Measuring a model in every engine that is installed, against ``mirrormask.compile``."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.checks import check_int, check_known
from mirrormask.files import write_text
from mirrormask.machine.cache import processor_name
from mirrormask.machine.timing import SPINNING, in_turns
from mirrormask.matrices import default_weights
from mirrormask.runtime.build import compile
from mirrormask.runtime.engines import ENGINES, INT8_ENGINES, Call, prepare_engines
from mirrormask.selection import count_zeros

__all__ = ["BenchResult", "bench"]


@dataclass(frozen=True)
class BenchResult:
    """Medians of one model on one number of threads.

    Attributes:
        seconds: engine -> median seconds per call.
        spread: engine -> (lower, upper) quartile.
        missing: engine -> why it was not measured.
        report: of the compiled model, as plain values.
    """

    processor: str
    threads: int
    shape: tuple[int, ...]
    sparsity: float
    seconds: dict[str, float]
    spread: dict[str, tuple[float, float]]
    missing: dict[str, str]
    report: dict[str, Any]

    @property
    def best_other(self) -> str:
        """The fastest engine in fp32 that is not this runtime."""
        return min((n for n in self.seconds if n in ENGINES), key=lambda n: self.seconds[n])

    @property
    def ratio(self) -> float:
        """How many times faster than the fastest other engine in fp32 the compiled model is."""
        return self.seconds[self.best_other] / self.seconds["mirrormask"]

    @property
    def best_int8(self) -> str:
        """The fastest engine that quantized the model to 8 bits; ``""`` where none was measured."""
        return min((n for n in self.seconds if n in INT8_ENGINES), key=lambda n: self.seconds[n], default="")

    @property
    def int8_ratio(self) -> float | None:
        """How many times faster than that the compiled model is; ``None`` where none was measured."""
        return self.seconds[self.best_int8] / self.seconds["mirrormask"] if self.best_int8 else None

    def __str__(self) -> str:
        ours = self.seconds["mirrormask"]
        lines = [f"{self.processor}, {self.threads} thread(s), input {'x'.join(map(str, self.shape))}"]
        lines.append(f"{'engine':<16} {'median ms':>10} {'quartiles':>19} {'mirrormask is':>14}")
        for name, seconds in sorted(self.seconds.items(), key=lambda pair: -pair[1]):
            low, high = (1e3 * q for q in self.spread[name])
            lines.append(f"{name:<16} {1e3 * seconds:>10.3f} {low:>9.3f} {high:>9.3f} {seconds / ours:>12.2f} x")
        lines += [f"{name:<16} not measured: {why}" for name, why in self.missing.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            **self.__dict__,
            "best_other": self.best_other,
            "ratio": self.ratio,
            "best_int8": self.best_int8,
            "int8_ratio": self.int8_ratio,
        }


@torch.no_grad()
def bench(
    model: nn.Module,
    example_input: Tensor,
    *,
    threads: int | None = None,
    engines: tuple[str, ...] = (*ENGINES, *INT8_ENGINES),
    rounds: int = 15,
    seconds_per_round: float = 0.1,
    json_path: str | Path | None = None,
    progress: Callable[[str, str], object] | None = None,
) -> BenchResult:
    """Time ``model`` in every engine and compiled by this library, in turns.

    All engines are warmed up; then each round gives every engine one turn of about ``seconds_per_round``, so that a
    busy moment of the machine hits all of them; the result is the median over rounds of the time per call. With several
    threads a turn begins after a rest, so that no engine's threads spin on cores that another's need.

    Args:
        model: a module in eval mode.
        example_input: one batch.
        threads: for all engines; PyTorch's present number by default.
        engines: which to compare with; those not installed are listed as missing. ``openvino-int8`` (with NNCF) and
            ``onnxruntime-int8`` quantize weights and activations to 8 bits first, calibrated on ``example_input``:
            their accuracy is another, and is to be looked at beside their time.
        rounds: at least 1.
        json_path: where to write the result as JSON.
        progress: called with what begins, ``("timing", "round 2 of 15")``; never in what is timed.

    Raises:
        ValueError: an engine is unknown.

    Example:
        >>> import torch
        >>> from mirrormask.runtime import bench
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval()
        >>> result = bench(model, torch.randn(4, 64), engines=("eager",), rounds=1, seconds_per_round=0.01)
        >>> sorted(result.seconds)
        ['eager', 'mirrormask']
    """
    check_int("rounds", rounds, low=1)
    for name in engines:
        check_known("engine", name, (*ENGINES, *INT8_ENGINES))
    before = torch.get_num_threads()
    threads = check_int("threads", threads, low=1) if threads is not None else before
    at = progress or (lambda stage, detail: None)
    torch.set_num_threads(threads)
    try:
        at("compiling", "")
        fast = compile(model, example_input)
        calls: dict[str, Call] = {"mirrormask": lambda: fast(example_input)}
        others, missing = prepare_engines(model, example_input, threads, engines, lambda name: at("preparing", name))
        calls |= others
        times = in_turns(
            calls,
            rounds,
            seconds_per_round,
            pause=SPINNING if threads > 1 else 0.0,
            before_round=lambda number: at("timing", f"round {number + 1} of {rounds}"),
        )
    finally:
        torch.set_num_threads(before)
    quartiles = {n: statistics.quantiles(t, n=4) if len(t) > 1 else [t[0]] * 3 for n, t in times.items()}
    result = BenchResult(
        processor_name(),
        threads,
        tuple(example_input.shape),
        count_zeros(default_weights(model, frozen=True)).total,
        {name: statistics.median(t) for name, t in times.items()},
        {name: (q[0], q[2]) for name, q in quartiles.items()},
        missing,
        fast.report.as_dict(),
    )
    if json_path is not None:
        write_text(json_path, json.dumps(result.as_dict(), indent=1))
    return result
