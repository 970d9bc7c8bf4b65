"""``mirrormask export``: a run's folder, or a model's file, into another format."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mirrormask import checks, outcome, waiting
from mirrormask.train.arguments import formatter, spelled

__all__ = ["export_model", "main"]

#: The format of one's own that is compiled, beside those of storage.
MIRROR = "mirror"
ENDINGS = {MIRROR: ".mirror", "onnx": ".onnx", "coreml": ".mlpackage", "safetensors": ".dense.safetensors"}


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
    weights: str = "fp32",
    pixels: bool = False,
    allow_code: bool = False,
) -> Path:
    """Turn the model of a run, or a model's file, into another format.

    Args:
        path: a run's folder, a file of mm.save, or any safetensors file.
        out: where to write; by default beside the run's model.
        to: mirror (compiled: one file that mirrormask serve and mirrormask.runtime.load run); onnx; coreml;
            torch_sparse or two_four (a state dict of torch.save with CSR or 2:4 weights); safetensors (dense).
        model: what builds the model of a file, as package.module.function; not needed for safetensors.
        model_args: its keyword arguments.
        input_shape: the shape of an example input with its batch, for mirror, onnx and coreml; random normal values
            are used.
        weights: of mirror: fp32; int8 or fp16, which rounds them.
        pixels: put the normalisation of a run's training in front, so that the model takes pixel values as they are.
        allow_code: import the code that a run's model is made by.

    Returns:
        What was written.
    """
    from mirrormask.storage import commands

    checks.check_known("format", to, (MIRROR, *commands.FORMATS))
    if weights != "fp32" and to != MIRROR:
        raise ValueError(f"weights={weights!r} is for --to {MIRROR}; leave it out for --to {to}")
    if path.is_dir():
        if model is not None or model_args is not None:
            raise ValueError(f"{str(path)!r} is a run's folder, which says itself what its model is; leave out --model")
        if pixels and to not in (MIRROR, "onnx", "coreml"):
            raise ValueError(f"--to {to} writes weights alone: leave out --pixels")
        return _export_run(path, out, to, input_shape, weights, pixels=pixels, allow_code=allow_code)
    if out is None:
        raise ValueError(f"say where to write what {str(path)!r} becomes: mirrormask export {path} OUT --to {to}")
    if pixels:
        raise ValueError(f"{str(path)!r} is a file, which does not say how images were normalised: leave out --pixels")
    if to == MIRROR:
        if model is None:
            raise ValueError(f"--to {to} needs --model package.module.function, to build what the weights belong to")
        from mirrormask.storage.reader import load

        _compiled(load(path, commands.build_model(model, model_args or {})), out, input_shape, weights, {})
    else:
        own = cast("commands.Format", to)
        commands.export_file(path, out, to=own, model=model, model_args=model_args, input_shape=input_shape)
    return out


def _export_run(
    path: Path, out: Path | None, to: str, shape: Sequence[int] | None, weights: str, *, pixels: bool, allow_code: bool
) -> Path:
    from mirrormask.storage import commands
    from mirrormask.train.run_folder import RunResult
    from mirrormask.train.trained import load_model

    result = RunResult.read(path)
    target = out or path / f"model{ENDINGS.get(to, f'.{to}.pt')}"
    about = _about(result, pixels=pixels)
    # Of two images, ONNX leaves the number open.
    shape = [2 if to == "onnx" else 1, *result.input_shape] if shape is None else list(shape)
    if to == "safetensors":
        commands.export_file(path / "model.safetensors", target, to="safetensors")
    elif to == MIRROR:
        _compiled(load_model(path, allow_code=allow_code, pixels=pixels), target, shape, weights, about)
    else:
        module = load_model(path, allow_code=allow_code, pixels=pixels)
        own = cast("commands.Format", to)
        commands.export_module(module, target, to=own, input_shape=shape, metadata=about)
    for key, value in about.items():
        print(f"  {key}: {checks.one_line(value, 300)}")
    return target


# Modules and results are not annotated: jsonargparse imports what annotations name, and help must not wait for torch.


def _compiled(module: Any, out: Path, shape: Sequence[int] | None, weights: str, about: Mapping[str, str]) -> None:
    """Compile a model for the processor at hand, and write that.

    Raises:
        ValueError: no shape is given, or part of the model stays in PyTorch, which the file would lack.
    """
    if not shape:
        raise ValueError(f"--to {MIRROR} needs --input_shape with the batch first, for example [1,3,224,224]")
    import torch

    import mirrormask as mm

    with waiting.stages("export") as at:
        at("compiling")
        # Whoever runs this file need not have PyTorch, in which a layer could stay.
        fast = mm.compile(module.eval(), torch.randn(*shape), weights=weights, force=True)
        fast.save(out, metadata=about)
    print(f"{out}: {out.stat().st_size:,} bytes, within {fast.report.error:.2g} of PyTorch; run it: "
          f"mirrormask serve {shlex.quote(str(out))}")  # fmt: skip


def _about(result: Any, *, pixels: bool) -> dict[str, str]:
    """What whoever runs the model must know of its inputs and outputs."""
    inputs = "pixel values as they are in the images"
    if not pixels:
        inputs = "(pixels - pixel_mean) / pixel_std"
        if not result.pixel_mean:
            inputs = "images that are normalised as in its training"
    about = {"input": inputs}
    if result.pixel_mean and not pixels:
        about |= {"pixel_mean": json.dumps(result.pixel_mean), "pixel_std": json.dumps(result.pixel_std)}
    if result.class_names:
        about["classes"] = json.dumps(result.class_names, ensure_ascii=False)
    return about
