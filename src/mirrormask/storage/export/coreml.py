"""Core ML: a package whose weights are stored sparse, checked in the package itself; running it needs a Mac."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mirrormask.checks import check_known, require
from mirrormask.resharding import check_whole
from mirrormask.storage.export.arguments import expected_outputs, inputs_of
from mirrormask.storage.export.onnx import eval_mode
from mirrormask.storage.plan import texts
from mirrormask.storage.tensors import named_tensors

__all__ = ["CoreMLExport", "coreml"]

#: A weight is stored sparse where it is at least so sparse and so large: a mask takes a bit an element.
_SPARSE, _LARGE = 0.1, 256
_SPARSE_OP = "constexpr_sparse_to_dense"
#: What would change weights, and what Core ML does itself when it loads a model.
_NOT_RUN = {"common::fuse_conv_batchnorm"}
#: Precision -> the type that weights are stored in.
_TYPES = {"fp32": np.float32, "fp16": np.float16}


@dataclass(frozen=True)
class CoreMLExport:
    """What was written.

    Attributes:
        nbytes: of all files of the package.
        sparse: the model's weights that are stored as a mask and their nonzeros, each compared with the model.
        dense: those that are stored whole, because they have too few zeros or are small.
    """

    nbytes: int
    sparse: tuple[str, ...]
    dense: tuple[str, ...]


def coreml(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: Tensor | tuple[Tensor, ...],
    *,
    precision: str = "fp32",
    metadata: Mapping[str, Any] | None = None,
) -> CoreMLExport:
    """Export a model to a Core ML package (iOS 16, macOS 13 and later), its sparse weights stored sparse.

    A weight with 10% zeros or more becomes ``constexpr_sparse_to_dense``: a mask of one bit an element, and the
    nonzeros. The package is read back, and every weight of two or more dimensions compared with the model's, bit for
    bit. What it computes is not checked: Core ML runs on Apple's systems alone.

    Args:
        model: exported in eval mode; its own mode is restored.
        path: where to write; it ends with ``.mlpackage``, which is a folder. An old one is replaced once the new one
            is checked.
        example: the positional inputs, a tensor or a tuple of tensors. The package takes inputs of these sizes.
        precision: ``"fp32"``, or ``"fp16"``: weights and arithmetic rounded to half precision.
        metadata: notes for the package's ``user_defined_metadata``; texts are stored as they are, other values as JSON.

    Returns:
        A :class:`CoreMLExport`.

    Raises:
        ImportError: coremltools is missing.
        TypeError: an argument is not of its kind.
        ValueError: the model does not take the example or holds what is not finite, ``path`` ends otherwise, the
            precision is unknown, or a weight of the model is not in the package.

    Example:
        >>> layer = nn.Linear(64, 32)
        >>> layer.weight.data *= torch.rand(32, 64) < 0.1
        >>> folder = tempfile.mkdtemp()
        >>> coreml(layer, os.path.join(folder, "model.mlpackage"), torch.randn(1, 64)).sparse
        ('weight',)
    """
    inputs = inputs_of("coreml", model, path, example)
    check_known("precision", precision, _TYPES)
    notes = texts(metadata)
    target = Path(path)
    if target.suffix != ".mlpackage":
        raise ValueError(f"path={str(path)!r} does not end with .mlpackage, which Core ML asks for")
    empty = target.is_dir() and not any(target.iterdir())
    if target.exists() and not empty and not (target / "Manifest.json").is_file():
        raise ValueError(f"path={str(path)!r} is there and no Core ML package, so it is not replaced; take another")
    check_whole(model, "export")
    with _quiet():
        ct = require("coremltools", "coreml", "exporting to Core ML")
        with eval_mode(model), torch.no_grad():
            expected_outputs(model, inputs, named_tensors(model))
            program = torch.export.export(model, inputs).run_decompositions({})
        package = _pruned(ct, _converted(ct, program, precision))
        package.user_defined_metadata.update(notes)
        with tempfile.TemporaryDirectory(dir=target.absolute().parent) as folder:
            new = Path(folder) / target.name
            package.save(str(new))
            sparse, dense = _check_weights(_stored(ct, new), named_tensors(model), _TYPES[precision])
            size = sum(file.stat().st_size for file in new.rglob("*") if file.is_file())
            _put(new, target, Path(folder) / "old")
    return CoreMLExport(size, sparse, dense)


def _converted(ct: Any, program: Any, precision: str) -> Any:
    passes = ct.PassPipeline.DEFAULT
    passes.remove_passes(_NOT_RUN)
    kind = {"fp32": ct.precision.FLOAT32, "fp16": ct.precision.FLOAT16}[precision]
    return ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=ct.target.iOS16,
        compute_precision=kind,
        pass_pipeline=passes,
        skip_model_load=True,
    )


def _pruned(ct: Any, package: Any) -> Any:
    """The package with its zeros left out: a threshold of 0 prunes what is zero already."""
    optimize = require("coremltools.optimize.coreml", "coreml", "exporting to Core ML")
    each = optimize.OpThresholdPrunerConfig(threshold=0.0, minimum_sparsity_percentile=_SPARSE, weight_threshold=_LARGE)
    return optimize.prune_weights(package, optimize.OptimizationConfig(global_config=each))


def _stored(ct: Any, path: Path) -> Iterator[tuple[bool, npt.NDArray[Any]]]:
    """Every array of the package that is on the disk, and whether it is stored sparse."""
    milproto = require("coremltools.converters.mil.frontend.milproto.load", "coreml", "exporting to Core ML")
    read = ct.models.MLModel(str(path), skip_model_load=True)
    spec = read.get_spec()
    program = milproto.load(spec, spec.specificationVersion, read.weights_dir)
    for function in program.functions.values():
        for op in function.operations:
            if op.op_type == _SPARSE_OP:
                yield True, np.asarray(op.materialized_val_inference())
            elif op.op_type == "const" and isinstance(op.val.val, np.ndarray):
                yield False, op.val.val


def _check_weights(
    stored: Iterator[tuple[bool, npt.NDArray[Any]]], state: Mapping[str, Tensor], kind: Any
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of the weights that are stored sparse, and of those stored whole.

    Raises:
        ValueError: a weight is not there, or with other numbers.
    """
    # A zero has no sign in a mask, and may have one in what is stored whole.
    found = {(array.shape, (array.astype(kind) + kind(0)).tobytes()): s for s, array in stored if array.ndim > 1}
    sparse, dense = list[str](), list[str]()
    for name, tensor in state.items():
        if tensor.ndim < 2 or not tensor.is_floating_point():
            continue
        array = tensor.detach().cpu().float().numpy().astype(kind) + kind(0)
        at = (array.shape, array.tobytes())
        if at not in found:
            raise ValueError(f"the Core ML exporter changed {name!r} or left it out; is it used in forward()?")
        (sparse if found[at] else dense).append(name)
    return tuple(sparse), tuple(dense)


def _put(new: Path, target: Path, aside: Path) -> None:
    """The new package in the place of the old one, which goes with the temporary folder that ``aside`` lies in."""
    if target.exists():
        target.rename(aside)
    try:
        new.rename(target)
    except OSError:
        if aside.exists():
            aside.rename(target)
        raise
    if aside.is_dir():
        shutil.rmtree(aside)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter draws bars, and says of each import what a Mac would have."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        streams = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
        with warnings.catch_warnings(), streams[0], streams[1]:
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
