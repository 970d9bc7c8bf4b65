"""A compiled model: checks its inputs, and hands them to the plan made for their shapes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, empty_strided, float32, get_num_threads, nn

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.capture import Capture, capture
from mirrormask.runtime.model.half import make_region
from mirrormask.runtime.model.region import Quick, Region
from mirrormask.runtime.model.report import Report
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["CompiledModel"]

#: Input shapes whose plans a compiled model keeps; the oldest goes.
MOST_SHAPES = 32


def _keys(inputs: tuple[Tensor, ...]) -> tuple[torch.Size, ...]:
    """What a region is made for: the shapes, the first dimension left out (of a vector it is the only one)."""
    return tuple(x.shape[1:] if x.dim() > 1 else x.shape for x in inputs)


class CompiledModel(nn.Module):
    """A model compiled by :func:`compile`; call it as the model was called.

    Attributes:
        report: what was chosen for each layer, and the times. ``print(fast.report)``.
    """

    report: Report
    _model: Any
    _examples: list[tuple[tuple[int, ...], torch.dtype]]
    _regions: dict[tuple[torch.Size, ...], Region]
    _partial: dict[tuple[tuple[int, ...], ...], nn.Module]
    _quick: dict[torch.Size, Quick]
    _tools: dict[str, tuple[Target, Tuner, frozenset[str], bool]]

    def __init__(
        self, captured: Capture | None, model: nn.Module, examples: tuple[Tensor, ...], report: Report
    ) -> None:
        super().__init__()
        self.training = False
        self.report = report
        self._examples = [(tuple(x.shape), x.dtype) for x in examples]
        whole = captured.module.get_submodule(captured.whole) if captured is not None and captured.whole else None
        region = whole if isinstance(whole, Region) else None
        # Kept out of the submodules: what is in them is not this module's to train or to move. A model that is one
        # region needs its dense weights no more.
        self.__dict__["_model"] = model if region is None else None
        self.__dict__["_regions"] = {} if region is None else {_keys(examples): region}
        self.__dict__["_partial"], self.__dict__["_quick"] = {}, {}
        if captured is not None and region is None:
            self.__dict__["_tools"] = {n: m.tools for n, m in captured.module.named_modules() if isinstance(m, Region)}
            self._partial[tuple(shape for shape, _ in self._examples)] = captured.module

    def __call__(self, *inputs: Tensor) -> Any:
        """Run the model without recording gradients."""
        x = inputs[0] if inputs else None
        if type(x) is Tensor and len(inputs) == 1:
            # Small models take microseconds: one look-up, and the call without another layer between.
            quick = self._quick.get(x.shape)
            if (
                quick is not None
                and quick.threads == get_num_threads()
                and x.dtype is float32
                and x.is_cpu
                and not x.requires_grad
                and x.is_contiguous()
            ):
                result = empty_strided(quick.size, quick.strides)
                with quick.lock:
                    quick.addresses[0], quick.addresses[1] = x.data_ptr(), result.data_ptr()
                    quick.function(quick.words)
                    spread = quick.spreads and quick.lower_flag()
                return quick.direct().forward(x) if spread else result
        self._check(inputs)
        with torch.no_grad():
            if self._regions:
                region = self._region_for(inputs)
                result = region.forward(*inputs)
                self._remember(region, inputs)
                return result
            return self._partial_for(inputs)(*inputs) if self.report.compiled else self._model(*inputs)

    def _remember(self, region: Region, inputs: tuple[Tensor, ...]) -> None:
        """Let calls of this shape take the short way from now on, if there is one."""
        quick = region.quick(inputs[0].shape) if len(inputs) == 1 else None
        if quick is not None:
            self._quick[inputs[0].shape] = quick
            while len(self._quick) > MOST_SHAPES:
                self._quick.pop(next(iter(self._quick)))

    def _region_for(self, inputs: tuple[Tensor, ...]) -> Region:
        """The region for these shapes; a new one for shapes not seen before."""
        region: Region
        key = _keys(inputs)
        rows = next(iter(self._regions.values())).graph.rows
        leading = [x.shape[:-1] if rows else x.shape[:1] for x in inputs]
        if len(set(leading)) > 1:
            raise ValueError(f"the inputs have shapes {[tuple(x.shape) for x in inputs]}; they must have equal batches")
        if key not in self._regions:
            region = next(iter(self._regions.values()))
            try:
                self._regions[key] = region.resized([tuple(shape) for shape in key])
            except ValueError as error:
                raise ValueError(
                    f"the input has shape {tuple(inputs[0].shape)}, and the model was compiled for "
                    f"{self._examples[0][0]} (any first dimension): {error}; compile it again with such an example"
                ) from error
        region = self._regions[key]
        while len(self._regions) > MOST_SHAPES:
            self._regions.pop(next(iter(self._regions)))
        return region

    def _partial_for(self, inputs: tuple[Tensor, ...]) -> nn.Module:
        """The captured model for these shapes, of which parts stay in PyTorch: batch sizes may be baked in there."""
        module: nn.Module
        shapes = tuple(tuple(x.shape) for x in inputs)
        if shapes not in self._partial:
            captured = capture(self._model, inputs)
            for name, graph in captured.regions.items():
                tools = self._tools.get(name) or next(iter(self._tools.values()))
                captured.module.set_submodule(name, make_region(graph, *tools))
            self._partial[shapes] = captured.module
        module = self._partial[shapes]
        while len(self._partial) > MOST_SHAPES:
            self._partial.pop(next(iter(self._partial)))
        return module

    def _check(self, inputs: tuple[Tensor, ...]) -> None:
        if len(inputs) != len(self._examples):
            raise TypeError(
                f"the compiled model takes {len(self._examples)} tensors, as its example, not {len(inputs)}"
            )
        for x, (shape, dtype) in zip(inputs, self._examples, strict=True):
            if not isinstance(x, Tensor):
                raise TypeError(f"the input is a {type(x).__name__}, not a tensor")
            if not x.is_cpu:
                raise ValueError(f"the input is on {x.device}, and the compiled model runs on the CPU; pass x.cpu()")
            if x.dtype != dtype:
                raise TypeError(f"the input is {x.dtype}, and the model was compiled for {dtype}; pass x.to({dtype})")
            if x.requires_grad:
                raise ValueError("the input requires grad, and a compiled model computes none; pass x.detach()")
            if x.dim() != len(shape):
                raise ValueError(f"the input has {x.dim()} dimensions, and the model was compiled for {shape}")

    def __getstate__(self) -> dict[str, Any]:
        # Captured modules are made anew from the model when they are needed.
        return {**self.__dict__, "_partial": {}, "_quick": {}}

    def train(self, mode: bool = True) -> CompiledModel:
        """A compiled model is for inference: only ``train(False)`` is allowed."""
        if mode:
            raise ValueError("a compiled model cannot be trained; train the original and compile it again")
        return self
