"""ONNX: the graph as PyTorch exports it, the weights bit for bit, the result checked with ONNX Runtime."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mirrormask.checks import check_int, check_number, require
from mirrormask.files import write_bytes
from mirrormask.storage.export.arguments import expected_outputs, inputs_of, tolerance_of
from mirrormask.storage.plan import texts
from mirrormask.storage.tensors import named_tensors, ties
from mirrormask.storage.torch_types import to_bits

__all__ = ["OPSET", "OnnxExport", "eval_mode", "onnx"]

#: The operator set that is written unless another is asked for.
OPSET = 18
#: protobuf's limit for one message; beyond it ONNX needs a second file, and then nothing is atomic.
_MAX_BYTES = 2**31 - 1


@dataclass(frozen=True)
class OnnxExport:
    """What was written and how it was checked.

    Attributes:
        opset: the operator set of the file.
        nbytes: its size; ONNX stores the zeros.
        tensors: names of the model's tensors in the file, each compared with the model bit for bit.
        error: the largest difference between ONNX Runtime and PyTorch on the example.
    """

    opset: int
    nbytes: int
    tensors: tuple[str, ...]
    error: float


def onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | tuple[Tensor, ...],
    *,
    opset: int = OPSET,
    dynamic_batch: bool = True,
    tolerance: float | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> OnnxExport:
    """Export a model to ONNX, with its exact zeros, and check the file before it replaces the old one.

    The graph is not optimised: folding a batch norm into a convolution would change the weights, and every runtime
    folds by itself when it loads the file.

    Args:
        model: exported in eval mode; its own mode is restored.
        path: where to write, atomically.
        example: the positional inputs, a tensor or a tuple of tensors. Give two rows or more for a dynamic batch.
        opset: the ONNX operator set, at least 18.
        dynamic_batch: leave the first dimension of every input open, where the model allows it.
        tolerance: how far ONNX Runtime may be from PyTorch, relative to the largest output but at least 1; by default
            1e-5, or four units in the last place where the outputs are of half precision.
        metadata: notes for the file's ``metadata_props``; texts are stored as they are, other values as JSON.

    Returns:
        An :class:`OnnxExport`.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is missing.
        TypeError: an argument is not of its kind.
        ValueError: the model does not take the example or holds what is not finite, the exporter changed a weight,
            ONNX Runtime disagrees or does not run the file, or the model has 2 GB or more.

    Example:
        >>> import tempfile
        >>> path = os.path.join(tempfile.mkdtemp(), "model.onnx")
        >>> layer = nn.Linear(4, 3)
        >>> onnx(layer, path, torch.randn(2, 4)).tensors
        ('weight', 'bias')
    """
    inputs = inputs_of("onnx", model, path, example)
    check_int("opset", opset, low=18, hint="the exporter writes opset 18 and later")
    if tolerance is not None:
        check_number("tolerance", tolerance, low=0.0)
    notes = texts(metadata)
    for module in ("onnx", "onnxscript", "onnxruntime"):
        require(module, "export", "exporting to ONNX")
    state = named_tensors(model)
    size = sum(tensor.nbytes for tensor in state.values())
    if size > _MAX_BYTES:
        raise ValueError(f"the model has {size:,} bytes; an ONNX file holds {_MAX_BYTES:,}; export it in parts")
    if any(x.dtype is torch.bfloat16 for x in (*inputs, *state.values())):
        raise ValueError("ONNX Runtime has no kernels for bfloat16 on a CPU, so the file could not be checked; export "
                         "model.float()")  # fmt: skip
    with eval_mode(model), torch.no_grad():
        expected = expected_outputs(model, inputs, state)
        proto = _export(model, inputs, opset, dynamic_batch)
    for key, value in notes.items():
        proto.metadata_props.add(key=key, value=value)
    data: bytes = proto.SerializeToString()
    kept = _check_tensors(proto, state)
    error = _check_outputs(data, inputs, expected, tolerance_of(tolerance, expected))
    write_bytes(path, data)
    return OnnxExport(opset, len(data), kept, error)


def _export(model: nn.Module, inputs: tuple[Tensor, ...], opset: int, dynamic_batch: bool) -> Any:
    auto = torch.export.Dim.AUTO
    shapes = tuple({0: auto} if tensor.ndim else None for tensor in inputs) if dynamic_batch else None
    with contextlib.redirect_stdout(io.StringIO()):  # the exporter prints its progress
        program = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=opset, optimize=False, verbose=False, dynamic_shapes=shapes
        )
    assert program is not None, "torch.onnx.export returns a program when dynamo=True"
    return program.model_proto


def _check_tensors(proto: Any, state: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Every tensor of the model that the graph holds, compared bit for bit; a missing matrix is an error."""
    numpy_helper = require("onnx.numpy_helper", "export", "exporting to ONNX")
    stored = {item.name: item for item in proto.graph.initializer}
    kept = tuple(name for name in state if name in stored)
    for name in kept:
        array = np.ascontiguousarray(numpy_helper.to_array(stored[name]))
        if array.tobytes() != to_bits(state[name]).tobytes():
            raise ValueError(f"the ONNX exporter changed {name!r}; please report this with the model")
    tied = ties(state)
    present = {tied.get(name, name) for name in kept}  # of a tied group the exporter keeps any one
    lost = [name for name, tensor in state.items() if tensor.ndim > 1 and tied.get(name, name) not in present]
    if lost:
        raise ValueError(f"the ONNX exporter left out or renamed {lost[:3]}; are they used in forward()?")
    return kept


def _check_outputs(data: bytes, inputs: tuple[Tensor, ...], expected: Any, tolerance: float) -> float:
    runtime = require("onnxruntime", "export", "checking the ONNX file")
    try:
        session = runtime.InferenceSession(data, providers=["CPUExecutionProvider"])
        names = [item.name for item in session.get_inputs()]
        feed = {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, inputs, strict=True)}
        outputs = session.run(None, feed)
    except Exception as fault:  # of many classes, none of which says which file it speaks of
        raise ValueError(f"ONNX Runtime does not run what was exported: {str(fault)[:500]}") from fault
    flat, _ = torch.utils._pytree.tree_flatten(expected)
    tensors = [item.detach().cpu().double().numpy() for item in flat if isinstance(item, Tensor)]
    worst = 0.0
    for index, (one, other) in enumerate(zip(tensors, outputs, strict=True)):
        error = float(np.abs(one - other.astype(np.float64)).max(initial=0.0))
        allowed = tolerance * max(1.0, float(np.abs(one).max(initial=0.0)))
        if not error <= allowed:  # NaN is not
            raise ValueError(f"output {index} of ONNX Runtime differs from PyTorch's by {error:g}, allowed {allowed:g}")
        worst = max(worst, error)
    return worst


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, all modules are in eval mode; afterwards each is in its own again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
