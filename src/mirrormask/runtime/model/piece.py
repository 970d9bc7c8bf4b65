"""A module at work in captured form: which capture holds for a call, and what becomes of a call that none holds for."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mirrormask.checks import few
from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.capture import Capture, capture
from mirrormask.runtime.graph.export import LOCK, Arguments, Refused, private_copy
from mirrormask.runtime.graph.guards import Guards
from mirrormask.runtime.graph.ir import Unfit
from mirrormask.runtime.model.accuracy import difference
from mirrormask.runtime.model.half import make_region
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.model.snapshot import Snapshot
from mirrormask.runtime.schedule.tune import Tuner

__all__ = ["Captured", "Piece", "Tools", "own_tensors", "pieces_of", "working"]

Tools = tuple[Target, Tuner, frozenset[str], bool]

#: Captures that a piece keeps; further kinds of calls run in PyTorch.
MOST_CAPTURES = 8
#: Calls whose capture is remembered.
MOST_CALLS = 256
#: How far results may be from the module's, over the largest, where shapes are new or not covered by guards.
CLOSE = 1e-3


@dataclass
class Captured:
    """A capture with its regions in place.

    Attributes:
        kind: what its calls have in common, see :attr:`Arguments.kind`.
        module: runs it; ``None`` if the region alone is all of it.
        region: the one region that is the entire module, if there is one.
        agreed: which sizes below 2 were compared with the module, and whether the results agreed.
        unfit: shapes that its guards allow and its regions do not.
        called: the names and shapes of the example's arguments; a text that says why they cannot be named.
        program: its steps as plain values, see :attr:`Blueprint.program`; ``None`` where they have no such form.
    """

    kind: str
    guards: Guards
    module: nn.Module | None
    region: Region | None
    agreed: dict[Any, bool] = field(default_factory=dict)
    unfit: set[Any] = field(default_factory=set)
    called: tuple[tuple[str, tuple[int, ...] | None], ...] | str = ""
    program: list[list[Any]] | None = None

    def __call__(self, arguments: Arguments) -> Any:
        """Run it."""
        if self.region is not None:
            return self.region.forward(*arguments.tensors)
        assert self.module is not None
        return self.module(*arguments.args, **arguments.kwargs)

    def compare(self, module: nn.Module, arguments: Arguments) -> bool:
        """Whether it gives what the module gives where sizes are 0 or 1, of which its guards say nothing."""
        small = self.guards.small(arguments.shapes)
        if small not in self.agreed:
            given = arguments.copied()
            expected = module(*given.args, **given.kwargs)
            try:
                error = difference(self(arguments.copied()), expected)
            except Exception:  # of a program that was captured for other shapes: anything
                error = float("inf")
            self.agreed[small] = error <= CLOSE
        return self.agreed[small]


def working(
    module: nn.Module, arguments: Arguments, tools: Callable[[Capture], dict[str, Tools]], first: Capture | None = None
) -> tuple[Capture, dict[str, Region], Captured, Any]:
    """A capture whose regions run, and what it makes of ``arguments``.

    Regions of which no plan can be made stay in PyTorch.

    Args:
        tools: what the regions of a capture are made with.
        first: a capture to begin with.

    Raises:
        Refused: ``torch.export`` cannot capture the module.
    """
    without: dict[str, str] = {}
    while True:
        captured = first or capture(module, arguments, without)
        made_with = tools(captured)
        regions = {name: make_region(graph, *made_with[name]) for name, graph in captured.regions.items()}
        for name, region in regions.items():
            captured.module.set_submodule(name, region)
        whole = regions.get(captured.whole)
        at_work = Captured(arguments.kind, captured.guards, None if whole is not None else captured.module, whole)
        at_work.called = _called(arguments)
        at_work.program = None if captured.blueprint is None else captured.blueprint.program
        try:
            return captured, regions, at_work, at_work(arguments.copied())
        except Exception as error:
            failed = {name: region.failed for name, region in regions.items() if region.failed}
            if not failed or not captured.nodes:
                raise Refused(f"what was captured of it fails: {type(error).__name__}: {error}") from error
            without |= {node: why for name, why in failed.items() for node in captured.nodes[name]}
            first = None


def _called(arguments: Arguments) -> tuple[tuple[str, tuple[int, ...] | None], ...] | str:
    try:
        return arguments.called()
    except TypeError as error:
        return str(error)


def own_tensors(module: nn.Module) -> None:
    """Copy the parameters and buffers that are read outside of regions, so that no later change reaches them."""
    for owner in module.modules():
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None:
                owner._parameters[name] = nn.Parameter(parameter.detach().clone(), requires_grad=False)
        for name, buffer in list(owner._buffers.items()):
            if buffer is not None:
                owner._buffers[name] = buffer.detach().clone()


class Piece(nn.Module):
    """Runs a module by its captures.

    A call is run by a capture whose guards hold for it. If none does, the module is captured again, as long as it has
    the weights of the build; where it cannot be captured, the module itself runs.

    Attributes:
        captures: those made so far.
        tools: what regions are made with.
        signature: how the module is called.
        snapshot: the weights of the build.
        original: the module, kept for calls of other kinds; not by a module that is one region, which needs its dense
            weights no more, and for which the owner's is asked for.
    """

    captures: tuple[Captured, ...]
    snapshot: Snapshot
    original: nn.Module | None

    def __init__(
        self,
        module: nn.Module,
        snapshot: Snapshot,
        first: Captured,
        tools: dict[str, Tools],
        signature: inspect.Signature | None,
        keep: bool = False,
    ) -> None:
        super().__init__()
        self.training = False
        self.tools, self.signature, self.captures = tools, signature, (first,)
        self.snapshot = snapshot
        self.__dict__["original"] = module if keep or first.region is None else None
        self._found: dict[Any, Captured] = {}

    def __getstate__(self) -> dict[str, Any]:
        kept = tuple(captured for captured in self.captures if captured.region is not None)
        if not kept and self.snapshot.model is not None and self.snapshot.changed():
            raise RuntimeError("the model has changed since it was compiled; compile it again, and copy that")
        state = {**self.__dict__, "captures": kept, "_found": {}}
        state.pop("_seen", None)
        return state

    def __getattr__(self, name: str) -> Any:
        # The code around a part may look at it: PyTorch's encoders ask their first layer for its settings.
        try:
            return super().__getattr__(name)
        except AttributeError:
            original = self.__dict__.get("original")
            if original is None or name.startswith("__"):
                raise
            if "_seen" not in self.__dict__:
                self._module(Arguments((), {}, None))  # with the weights of the build
                self.__dict__["_seen"] = private_copy(original)
                own_tensors(self.__dict__["_seen"])
            return getattr(self.__dict__["_seen"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the module."""
        return self.run(Arguments.of(self.signature, args, kwargs))

    def run(self, arguments: Arguments) -> Any:
        """Run the module on ``arguments``.

        Raises:
            ValueError: no capture holds for them, and the module is gone.
            RuntimeError: no capture holds for them, and the module has other weights by now.
        """
        key = (arguments.kind, arguments.shapes)
        captured = self._found.get(key)
        if captured is None:
            captured = None if arguments.nested else self.capture_for(arguments)
            if captured is None:
                module = self._module(arguments)
                return module(*arguments.args, **arguments.kwargs)
            with LOCK:
                found = {**self._found, key: captured}  # others may be looking into the old one
                while len(found) > MOST_CALLS:
                    found.pop(next(iter(found)))
                self._found = found
        try:
            return captured(arguments)
        except Unfit:
            captured.unfit.add(arguments.shapes)
            self._found.pop(key, None)
        return self.run(arguments)

    def region_of(self, arguments: Arguments) -> Region | None:
        """The region that was all of the last call with such arguments, if there is one."""
        captured = self._found.get((arguments.kind, arguments.shapes))
        return None if captured is None else captured.region

    def capture_for(self, arguments: Arguments) -> Captured | None:
        """The capture for a call, made if there is none; ``None`` if the module itself has to run."""
        captured = self._holding(arguments)
        if captured is not None:
            return captured
        with LOCK:
            captured = self._holding(arguments)  # another thread may have made it meanwhile
            if captured is not None:
                return captured
            module = self._module(arguments)
            given = arguments.copied()
            expected = module(*given.args, **given.kwargs)  # what it refuses, it refuses in its own words
            if len(self.captures) >= MOST_CAPTURES:
                return None
            try:
                _, _, captured, result = working(module, arguments, self._tools_for)
            except Refused:
                return None
            if difference(result, expected) > CLOSE or (captured.region is None and not _regions_in(captured)):
                return None
            if captured.module is not None:
                own_tensors(captured.module)
            captured.agreed[captured.guards.small(arguments.shapes)] = True
            self.captures = (*self.captures, captured)
            return captured

    def _holding(self, arguments: Arguments) -> Captured | None:
        kind, named = arguments.kind, arguments.named()
        for captured in self.captures:
            if captured.kind != kind or arguments.shapes in captured.unfit or not captured.guards.hold(named):
                continue
            small = captured.guards.small(arguments.shapes)
            if not small or captured.agreed.get(small):
                return captured
            if small not in captured.agreed and captured.compare(self._module(arguments), arguments):
                return captured
        return None

    def _tools_for(self, captured: Capture) -> dict[str, Tools]:
        return {name: self.tools.get(name) or next(iter(self.tools.values())) for name in captured.regions}

    def _module(self, arguments: Arguments) -> nn.Module:
        """The module with the weights of the build.

        Raises:
            ValueError: it is gone.
            RuntimeError: it has other weights by now.
        """
        owners = self.snapshot.model
        module = owners if self.original is None else self.original
        if module is None:
            given = ", ".join(f"{x.dtype} {tuple(x.shape)}".removeprefix("torch.") for x in arguments.tensors)
            raise ValueError(
                f"a call with {given} does not fit what was compiled, and the model, which could be captured again for "
                "it, is gone; keep the model, or compile it again with such an example"
            )
        if owners is not None:
            changed = self.snapshot.changed()
            if changed:
                raise RuntimeError(
                    f"a call of a shape that the compiled model was not made for needs the model, and {few(changed)} "
                    "changed since it was compiled; compile it again"
                )
        return module


def _regions_in(captured: Captured) -> bool:
    return captured.module is not None and any(isinstance(m, Region) for m in captured.module.modules())


def pieces_of(body: nn.Module | None) -> list[Piece]:
    """The compiled parts of a model."""
    return [] if body is None else [module for module in body.modules() if isinstance(module, Piece)]
