"""``mirrormask export``: a run's folder, or a model's file, into another format."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mirrormask import checks, outcome
from mirrormask.train.arguments import formatter, spelled

__all__ = ["export_model", "main"]

ENDINGS = {"onnx": ".onnx", "coreml": ".mlpackage", "safetensors": ".dense.safetensors"}


def main(arguments: Sequence[str]) -> int:
    """Run ``mirrormask export`` with these arguments; the exit status."""
    jsonargparse = checks.require("jsonargparse", "train", "mirrormask export")
    parser = jsonargparse.ArgumentParser(
        prog="mirrormask export",
        exit_on_error=False,
        allow_abbrev=False,
        formatter_class=formatter(jsonargparse.DefaultHelpFormatter),
        description="Turn the model of a run, or a model's file, into another format.",
        epilog="Example: mirrormask export runs/last --to onnx",
    )
    parser.add_argument("path", type=Path, help="a run's folder, a file of mm.save, or any safetensors file")
    parser.add_argument("out", nargs="?", type=Path, help="where to write; by default beside the run's model")
    parser.add_function_arguments(export_model, None, as_group=False, skip={"path", "out"})
    try:
        values = parser.parse_args(spelled(arguments, parser._option_string_actions))
    except argparse.ArgumentError as error:
        raise ValueError(" ".join(str(error).split())) from error
    outcome.tell({"files": [export_model(**values.as_dict())]})
    return 0


def export_model(
    path: Path,
    out: Path | None = None,
    *,
    to: str = "onnx",
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    input_shape: Sequence[int] | None = None,
    allow_code: bool = False,
) -> Path:
    """Turn the model of a run, or a model's file, into another format.

    Args:
        path: a run's folder, a file of mm.save, or any safetensors file.
        out: where to write; by default beside the run's model.
        to: onnx; coreml; torch_sparse or two_four (a state dict of torch.save with CSR or 2:4 weights); safetensors
            (dense).
        model: what builds the model of a file, as package.module.function; not needed for safetensors.
        model_args: its keyword arguments.
        input_shape: the shape of an example input with its batch, for onnx and coreml; random normal values are
            used.
        allow_code: import the code that a run's model is made by.

    Returns:
        What was written.
    """
    from mirrormask.storage import commands

    to = cast("commands.Format", checks.check_known("format", to, commands.FORMATS))
    if not path.is_dir():
        if out is None:
            raise ValueError(f"say where to write what {str(path)!r} becomes: mirrormask export {path} OUT --to {to}")
        commands.export_file(path, out, to=to, model=model, model_args=model_args, input_shape=input_shape)
        return out
    if model is not None or model_args is not None:
        raise ValueError(f"{str(path)!r} is a run's folder, which says itself what its model is; leave out --model")
    from mirrormask.train.run_folder import RunResult
    from mirrormask.train.trained import load_model

    module = load_model(path, allow_code=allow_code)
    shape = [1, *RunResult.read(path).input_shape] if input_shape is None else list(input_shape)
    target = out or path / f"model{ENDINGS.get(to, f'.{to}.pt')}"
    if to == "safetensors":
        commands.export_file(path / "model.safetensors", target, to=to)
    else:
        commands.export_module(module, target, to=to, input_shape=shape)
    return target
