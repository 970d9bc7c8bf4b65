"""The engines that a model is measured in beside this runtime: in fp32, and quantized to 8 bits."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["ENGINES", "INT8_ENGINES", "Call", "prepare_engines"]

Call = Callable[[], object]


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
    return _session(_onnx(model, x), x, threads)


def _session(source: bytes | str, x: Tensor, threads: int) -> Call:
    """A call of ONNX Runtime on a model in memory or in a file."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def _onnxruntime_int8(model: nn.Module, x: Tensor, threads: int) -> Call:
    from onnxruntime import quantization as q
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Once(q.CalibrationDataReader):  # type: ignore[misc]
        """The input, once."""

        def __init__(self, name: str) -> None:
            self.left = iter([{name: x.numpy()}])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        plain, ready, narrow = (str(Path(folder) / name) for name in ("plain", "ready", "narrow"))
        program = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
        assert program is not None
        Path(plain).write_bytes(program.model_proto.SerializeToString())
        quant_pre_process(plain, ready, skip_symbolic_shape=True)
        inputs = program.model_proto.graph.input
        kinds = {"weight_type": q.QuantType.QInt8, "activation_type": q.QuantType.QUInt8}
        q.quantize_static(ready, narrow, Once(inputs[0].name), per_channel=True, **kinds)
        return _session(Path(narrow).read_bytes(), x, threads)


def _openvino(model: nn.Module, x: Tensor, threads: int) -> Call:
    import openvino

    return _request(openvino.convert_model(model, example_input=x), x, threads)


def _openvino_int8(model: nn.Module, x: Tensor, threads: int) -> Call:
    import nncf
    import openvino

    converted = openvino.convert_model(model, example_input=x)
    return _request(nncf.quantize(converted, nncf.Dataset([x.numpy()])), x, threads)


def _request(model: Any, x: Tensor, threads: int) -> Call:
    """A call of OpenVINO."""
    import openvino

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    tensor = openvino.Tensor(x.numpy(), shared_memory=True)
    return lambda: request.infer({0: tensor}, share_inputs=True, share_outputs=True)


Prepare = Callable[[nn.Module, Tensor, int], Call]

#: How each engine is prepared, and the modules it needs.
ENGINES: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "eager": (_eager, ("torch",)),
    "torch.compile": (_torch_compile, ("torch",)),
    "onnxruntime": (_onnxruntime, ("onnxruntime", "onnxscript")),
    "openvino": (_openvino, ("openvino",)),
}
#: What users take who want cheap inference: weights and activations of 8 bits, after training. Their results differ.
INT8_ENGINES: dict[str, tuple[Prepare, tuple[str, ...]]] = {
    "onnxruntime-int8": (_onnxruntime_int8, ("onnxruntime", "onnx", "onnxscript")),
    "openvino-int8": (_openvino_int8, ("openvino", "nncf")),
}


def prepare_engines(
    model: nn.Module,
    x: Tensor,
    threads: int,
    engines: Sequence[str],
    before: Callable[[str], object] = lambda name: None,
) -> tuple[dict[str, Call], dict[str, str]]:
    """A call per engine that can run ``model``, and why for those that cannot; ``before`` hears of each first."""
    calls: dict[str, Call] = {}
    missing: dict[str, str] = {}
    for name in engines:
        prepare, modules = (ENGINES | INT8_ENGINES)[name]
        lacking = [module for module in modules if importlib.util.find_spec(module) is None]
        if lacking:
            missing[name] = f"{' and '.join(lacking)} is not installed"
            continue
        before(name)
        try:
            with _quiet():
                calls[name] = prepare(model, x, threads)
                calls[name]()
        except Exception as error:  # an engine that cannot run this model is a row of the table, not the end
            missing[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:100]}"
    return calls, missing
