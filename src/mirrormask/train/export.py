"""``mirrormask export``: a run's folder, or a model's file, into another format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

__all__ = ["export_model"]

Format = Literal["onnx", "torch_sparse", "two_four", "safetensors"]
ENDINGS = {"onnx": ".onnx", "safetensors": ".dense.safetensors"}


def export_model(
    path: Path,
    out: Path | None = None,
    *,
    to: Format = "onnx",
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    allow_code: bool = False,
) -> None:
    """Turn the model of a run, or a model's file, into another format.

    Args:
        path: a run's folder, a file of mm.save, or any safetensors file.
        out: where to write; by default beside the run's model.
        to: onnx; torch_sparse or two_four (a state dict of torch.save with CSR or 2:4 weights); safetensors (dense).
        model: what builds the model of a file, as package.module.function; not needed for safetensors.
        model_args: its keyword arguments.
        input_shape: the shape of an example input with its batch, for onnx; random normal values are used.
        allow_code: import the code that a run's model is made by.
    """
    from mirrormask.checks import check_known
    from mirrormask.storage import commands

    check_known("format", to, commands.FORMATS)
    if not path.is_dir():
        if out is None:
            raise ValueError(f"say where to write what {str(path)!r} becomes: mirrormask export {path} OUT --to {to}")
        commands.export_file(path, out, to=to, model=model, model_args=model_args, input_shape=input_shape)
        return
    if model is not None or model_args is not None:
        raise ValueError(f"{str(path)!r} is a run's folder, which says itself what its model is; leave out --model")
    from mirrormask.train.loop import load_model
    from mirrormask.train.run_folder import RunResult

    module = load_model(path, allow_code=allow_code)
    shape = [1, *RunResult.read(path).input_shape] if input_shape is None else list(input_shape)
    target = out or path / f"model{ENDINGS.get(to, f'.{to}.pt')}"
    if to == "safetensors":
        commands.export_file(path / "model.safetensors", target, to=to)
    else:
        commands.export_module(module, target, to=to, input_shape=shape)
