"""Measuring a model in every engine that is installed, against ``mirrormask.compile``."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
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
from mirrormask.selection import count_zeros

__all__ = ["ENGINES", "BenchResult", "bench", "prepare_engines"]

Call = Callable[[], object]


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
        """The fastest engine that is not this runtime."""
        return min((n for n in self.seconds if n != "mirrormask"), key=lambda n: self.seconds[n])

    @property
    def ratio(self) -> float:
        """How many times faster than the fastest other engine the compiled model is."""
        return self.seconds[self.best_other] / self.seconds["mirrormask"]

    def __str__(self) -> str:
        ours = self.seconds["mirrormask"]
        lines = [f"{self.processor}, {self.threads} thread(s), input {'x'.join(map(str, self.shape))}"]
        lines.append(f"{'engine':<14} {'median ms':>10} {'quartiles':>19} {'mirrormask is':>14}")
        for name, seconds in sorted(self.seconds.items(), key=lambda pair: -pair[1]):
            low, high = (1e3 * q for q in self.spread[name])
            lines.append(f"{name:<14} {1e3 * seconds:>10.3f} {low:>9.3f} {high:>9.3f} {seconds / ours:>12.2f} x")
        lines += [f"{name:<14} not measured: {why}" for name, why in self.missing.items()]
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**self.__dict__, "best_other": self.best_other, "ratio": self.ratio}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print; a table should not."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _eager(model: nn.Module, x: Tensor, threads: int) -> Call:
    return lambda: model(x)


def _torch_compile(model: nn.Module, x: Tensor, threads: int) -> Call:
    compiled = torch.compile(model)
    compiled(x)
    return lambda: compiled(x)


def _onnx(model: nn.Module, x: Tensor) -> bytes:
    program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    assert program is not None
    return bytes(program.model_proto.SerializeToString())


def _onnxruntime(model: nn.Module, x: Tensor, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(_onnx(model, x), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _openvino(model: nn.Module, x: Tensor, threads: int) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(openvino.convert_model(model, example_input=x), "CPU", settings)
    request = compiled.create_infer_request()
    tensor = openvino.Tensor(x.numpy(), shared_memory=True)
    return lambda: request.infer({0: tensor}, share_inputs=True, share_outputs=True)


#: How each engine is prepared, and the module it needs.
ENGINES: dict[str, tuple[Callable[[nn.Module, Tensor, int], Call], str]] = {
    "eager": (_eager, "torch"),
    "torch.compile": (_torch_compile, "torch"),
    "onnxruntime": (_onnxruntime, "onnxruntime"),
    "openvino": (_openvino, "openvino"),
}


def prepare_engines(
    model: nn.Module, x: Tensor, threads: int, engines: Sequence[str]
) -> tuple[dict[str, Call], dict[str, str]]:
    """A call per engine that can run ``model``, and why for those that cannot."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name in engines:
        prepare, module = ENGINES[name]
        if importlib.util.find_spec(module) is None:
            missing[name] = f"{module} is not installed"
            continue
        try:
            with _quiet():
                calls[name] = prepare(model, x, threads)
                calls[name]()
        except Exception as error:  # an engine that cannot run this model is a row of the table, not the end
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
    return calls, missing


@torch.no_grad()
def bench(
    model: nn.Module,
    example_input: Tensor,
    *,
    threads: int | None = None,
    engines: tuple[str, ...] = tuple(ENGINES),
    rounds: int = 15,
    seconds_per_round: float = 0.1,
    json_path: str | Path | None = None,
) -> BenchResult:
    """Time ``model`` in every engine and compiled by this library, in turns.

    All engines are warmed up; then each round gives every engine one turn of about ``seconds_per_round``, so that a
    busy moment of the machine hits all of them; the result is the median over rounds of the time per call. With several
    threads a turn begins after a rest, so that no engine's threads spin on cores that another's need.

    Args:
        model: a module in eval mode.
        example_input: one batch.
        threads: for all engines; PyTorch's present number by default.
        engines: which to compare with; those not installed are listed as missing.
        rounds: at least 1.
        json_path: where to write the result as JSON.

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
        check_known("engine", name, ENGINES)
    before = torch.get_num_threads()
    threads = check_int("threads", threads, low=1) if threads is not None else before
    torch.set_num_threads(threads)
    try:
        fast = compile(model, example_input)
        calls: dict[str, Call] = {"mirrormask": lambda: fast(example_input)}
        others, missing = prepare_engines(model, example_input, threads, engines)
        calls |= others
        times = in_turns(calls, rounds, seconds_per_round, pause=SPINNING if threads > 1 else 0.0)
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
