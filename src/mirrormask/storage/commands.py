"""What ``mirrormask info FILE`` and ``mirrormask export`` do; plain functions, wired by the command line."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from mirrormask.checks import check_known, one_line, printable
from mirrormask.files import atomic_write
from mirrormask.storage import export as exports
from mirrormask.storage.contents import COMPILED, PREFIX
from mirrormask.storage.reader import Contents, load, read_contents
from mirrormask.storage.rival import zstd_size
from mirrormask.storage.sizes import file_sizes

__all__ = ["FORMATS", "build_model", "export_file", "export_module", "info"]

Format = Literal["onnx", "coreml", "torch_sparse", "two_four", "safetensors"]
FORMATS = ("onnx", "coreml", "torch_sparse", "two_four", "safetensors")


def info(path: Path) -> dict[str, Any]:
    """Print what a model file holds: metadata, bytes per tensor, and what other encodings would take.

    Args:
        path: a file of mm.save, or any safetensors file.

    Returns:
        The same as values; ``given`` is what came with the call of :func:`mirrormask.save`.
    """
    contents, sizes = read_contents(path), file_sizes(path)
    print(f"{printable(str(path))}: {_kind(contents)}")
    own: dict[str, str] = {}
    given: dict[str, str] = {}
    for key, value in contents.metadata.items():
        if key == COMPILED:
            print("  a compiled model: mirrormask.runtime.load runs it, mirrormask serve serves it")
        elif key not in (PREFIX + "index", PREFIX + "header_sha256", PREFIX + "separator"):
            (own if key.startswith(PREFIX) else given)[key.removeprefix(PREFIX)] = value
            # What came with the call of mm.save is said to be: a run's "sparsity" is the one that was asked for.
            of_ours = key.startswith(PREFIX)
            said = one_line(key.removeprefix(PREFIX)) if of_ours else f"given with it, {one_line(key)}"
            print(f"  {said}: {one_line(value, 300)}")
    print(sizes)
    rival = zstd_size(path)
    if rival is not None:
        print(f"zstd -19 of the dense file: {rival:,} bytes; this file takes {sizes.total / rival:.2f} of that")
    tied = {name: first for name, first in contents.entries.items() if isinstance(first, str)}
    for name, first in tied.items():
        print(f"{one_line(name)} is tied to {one_line(first)}")
    return {
        "path": path,
        "compressed": contents.compressed,
        "compiled": COMPILED in contents.metadata,
        "metadata": own,
        "given": given,
        "bytes": sizes.total,
        "header_bytes": sizes.overhead,
        "dense_bytes": sizes.dense,
        "zstd_bytes": rival,
        "tensors": [{**dataclasses.asdict(one), "numel": one.numel, "sparsity": one.sparsity} for one in sizes.tensors],
        "tied": tied,
    }


def export_file(
    path: Path,
    out: Path,
    *,
    to: Format = "onnx",
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
) -> None:
    """Turn a model file into another format.

    Args:
        path: a file of mm.save, or any safetensors file.
        out: where to write.
        to: onnx; coreml; torch_sparse or two_four (a state dict of torch.save with CSR or 2:4 weights); safetensors
            (dense).
        model: what builds the model, as package.module.function; needed for every format but safetensors.
        model_args: its keyword arguments.
        input_shape: the shape of an example input with its batch, for onnx and coreml; random normal values are
            used.
    """
    check_known("format", to, FORMATS)
    if to == "safetensors":
        exports.dense(load(path), out)
        print(f"{out}: {out.stat().st_size:,} bytes of dense safetensors")
        return
    if model is None:
        raise ValueError(f"--to {to} needs --model package.module.function, to build what the weights belong to")
    export_module(load(path, build_model(model, model_args or {})).eval(), out, to=to, input_shape=input_shape)


def export_module(
    module: nn.Module,
    out: Path,
    *,
    to: Format,
    input_shape: Sequence[int] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a model, in evaluation mode, as onnx, coreml, torch_sparse or two_four; see :func:`export_file`.

    Args:
        metadata: notes, which the first two hold.
    """
    if to in ("onnx", "coreml") and not input_shape:
        raise ValueError(f"--to {to} needs --input_shape with the batch first, for example [2,3,224,224]")
    if to == "coreml":
        package = exports.coreml(module, out, torch.randn(*(input_shape or ())), metadata=metadata)
        print(
            f"{out}: {package.nbytes:,} bytes, {len(package.sparse)} weights stored sparse; not run: that needs a Mac"
        )
        return
    if to == "onnx":
        done = exports.onnx(module, out, torch.randn(*(input_shape or ())), metadata=metadata)
        print(f"{out}: {done.nbytes:,} bytes, opset {done.opset}, within {done.error:.2g} of PyTorch in ONNX Runtime")
        return
    sparse = exports.torch_sparse(module) if to == "torch_sparse" else exports.two_four(_half(module))
    with atomic_write(out) as file:
        torch.save(sparse.state_dict(), file)
    print(f"{out}: {out.stat().st_size:,} bytes, a state dict with {to} weights")


def build_model(target: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Call ``package.module.function`` and check that it returns a module.

    Example:
        >>> build_model("torch.nn.Linear", {"in_features": 2, "out_features": 1})
        Linear(in_features=2, out_features=1, bias=True)
    """
    where, _, name = target.rpartition(".")
    try:
        builder = getattr(importlib.import_module(where), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import {target!r} ({error}); give it as package.module.function") from None
    model = builder(**arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(f"{target} returned a {type(model).__name__}, not a torch.nn.Module")
    return model


def _half(model: nn.Module) -> nn.Module:
    """2:4 tensors have 16 bits; a model that has more is rounded, which whoever asks for this format asks for."""
    wide = any(parameter.dtype == torch.float32 for parameter in model.parameters())
    return model.half() if wide else model


def _kind(contents: Contents) -> str:
    tensors = f"{len(contents.entries):,} tensors"
    return f"{tensors}, compressed by mirrormask" if contents.compressed else f"{tensors}, plain safetensors"
