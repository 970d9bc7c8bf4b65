"""A model that was read from a file: NumPy arrays in, NumPy arrays out, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.guards import Guards
from mirrormask.runtime.graph.ir import Unfit
from mirrormask.runtime.schedule.runner import Call, Runner

__all__ = ["LoadedModel", "Loading", "Port", "Variant"]

Array = npt.NDArray[np.float32]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Port:
    """An input or an output.

    Attributes:
        name: of an input the model's argument; of an output its place in what the model returns.
        shape: sizes; ``None`` where any will do, or where it depends on those of the inputs.
        example: the sizes that the model was compiled for.
    """

    name: str
    shape: tuple[int | None, ...]
    example: Shape

    def __str__(self) -> str:
        return f"{self.name} [{', '.join('any' if size is None else str(size) for size in self.shape)}]"


@dataclass(frozen=True)
class Variant:
    """What a model does with one kind of call.

    Attributes:
        inputs, outputs: what goes in and out.
        guards: for which sizes it holds, by the inputs' names.
        small: the sizes below 2 that were compared with the model's results, see :class:`Guards`.
        steps: (runner, names of the values that it reads, names of those that it makes), one after the other.
        results: what is returned: ``{"node": name}`` for an array, in lists, and in ``{"tuple": [...]}`` and
            ``{"dict": {...}}``; anything else stands for itself.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    guards: Guards
    small: frozenset[frozenset[tuple[int, int, int]]]
    steps: tuple[tuple[Runner, tuple[str, ...], tuple[str, ...]], ...]
    results: Any

    def takes(self, arrays: Mapping[str, Array]) -> bool:
        """Whether these are the names of its inputs."""
        return {port.name for port in self.inputs} == set(arrays)

    def holds(self, arrays: Mapping[str, Array]) -> bool:
        """Whether it was captured for arrays of these sizes."""
        if any(arrays[port.name].ndim != len(port.shape) for port in self.inputs):
            return False
        if not self.guards.hold(arrays):
            return False
        small = self.guards.small([arrays[port.name].shape for port in self.inputs])
        return not small or small in self.small

    def broken(self, arrays: Mapping[str, Array]) -> str:
        """The first condition that these arrays do not meet, if they have the right number of dimensions."""
        if any(arrays[port.name].ndim != len(port.shape) for port in self.inputs):
            return ""
        each = (text for text in self.guards.conditions if not Guards((text,), frozenset()).hold(arrays))
        return next((f": it was captured for {text}" for text in each), ": sizes of 0 or 1 were not tried")

    def run(self, arrays: Mapping[str, Array], threads: int) -> Any:
        """What it returns for these arrays."""
        values: dict[str, Array] = dict(arrays)
        for runner, reads, makes in self.steps:
            given = [values[name] for name in reads]
            call = runner.call_for([x.shape for x in given], threads)
            values |= zip(makes, _run(call, given), strict=True)
        return _results(self.results, values)


@dataclass(frozen=True)
class Loading:
    """How a file was loaded.

    Attributes:
        instruction_set, threads: what it runs on.
        tuned: whether the kernels were measured on such a processor: there, here now, or here before.
        seconds: that loading took.
    """

    instruction_set: str
    threads: int
    tuned: bool
    seconds: float


class LoadedModel:
    """A compiled model from a file; see :func:`mirrormask.runtime.load`. Any number of threads may call it.

    Attributes:
        inputs, outputs: what it takes and gives: names, and sizes with ``None`` for any.
        metadata: the notes that it was saved with.
        loading: how it was loaded.
    """

    def __init__(self, variants: Sequence[Variant], metadata: Mapping[str, str], loading: Loading) -> None:
        self.variants, self.metadata, self.loading = tuple(variants), dict(metadata), loading
        self.inputs, self.outputs = self.variants[0].inputs, self.variants[0].outputs

    def __call__(self, *args: Array, **kwargs: Array) -> Any:
        """Run the model.

        Args:
            args, kwargs: float32 arrays, by position or by the names of :attr:`inputs`.

        Returns:
            What the model returns, with arrays for tensors.

        Raises:
            TypeError: an input is missing, unknown, or no float32 array.
            ValueError: the sizes of an input are not those that the file holds the model for.
        """
        arrays = self._bound(args, kwargs)
        return self._run(arrays)[1]

    def run(self, arrays: Mapping[str, Array]) -> dict[str, Array]:
        """Run the model on arrays by name; the arrays that it returns, by the names of :attr:`outputs`.

        Raises:
            TypeError, ValueError: as for a call.
        """
        variant, results = self._run(self._bound((), arrays))
        names = [port.name for port in variant.outputs]
        return dict(zip(names, _leaves(results), strict=True))

    def check(self, arrays: Mapping[str, Array]) -> None:
        """Refuse what a call would refuse for its names, types and sizes, without running it.

        Raises:
            TypeError, ValueError: as for a call.
        """
        bound = self._bound((), arrays)
        if not any(variant.takes(bound) and variant.holds(bound) for variant in self.variants):
            raise self._refused(bound)

    def _run(self, arrays: dict[str, Array]) -> tuple[Variant, Any]:
        reason = ""
        for variant in self.variants:
            if variant.takes(arrays) and variant.holds(arrays):
                try:
                    return variant, variant.run(arrays, self.loading.threads)
                except Unfit as error:
                    reason = f": {error}"
        raise self._refused(arrays, reason)

    def _refused(self, arrays: dict[str, Array], reason: str = "") -> ValueError:
        broken = (variant.broken(arrays) for variant in self.variants if variant.takes(arrays))
        reason = reason or next((text for text in broken if text), "")
        given = ", ".join(f"{name} {list(x.shape)}" for name, x in arrays.items())
        takes = " or ".join(", ".join(map(str, variant.inputs)) for variant in self.variants)
        return ValueError(
            f"the file holds no model for {given}{reason}; it takes {takes}; compile the model with such an example, "
            "and save it again"
        )

    def __repr__(self) -> str:
        ports = ", ".join(map(str, self.inputs)), ", ".join(map(str, self.outputs))
        return f"LoadedModel({ports[0]} -> {ports[1]}; {self.loading.instruction_set})"

    def _bound(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Array]:
        names = [port.name for port in self.inputs]
        if len(args) > len(names):
            raise TypeError(f"{len(args)} arrays for the inputs {', '.join(names)}")
        given: dict[str, Any] = dict(zip(names, args, strict=False))
        twice = sorted(set(given) & set(kwargs))
        if twice:
            raise TypeError(f"the input {twice[0]!r} is given by position and by name")
        given |= kwargs
        sets = [{port.name for port in variant.inputs} for variant in self.variants]
        if set(given) not in sets:
            unknown, missing = sorted(set(given) - set().union(*sets)), sorted(sets[0] - set(given))
            fault = (
                f"there is no input {unknown[0]!r}" if unknown else f"the input {(missing or ['?'])[0]!r} is missing"
            )
            raise TypeError(f"{fault}; the inputs are {', '.join(names)}")
        for name, x in given.items():
            if isinstance(x, np.ma.MaskedArray):
                raise TypeError(f"the input {name!r} is a masked array; pass x.filled(...)")
            if not isinstance(x, np.ndarray):
                raise TypeError(f"the input {name!r} is a {type(x).__name__}; pass a NumPy array of float32")
            if x.dtype != np.float32 or not x.dtype.isnative:
                raise TypeError(f"the input {name!r} is {x.dtype}, not float32; pass x.astype(numpy.float32)")
        return given


def _run(call: Call, inputs: Sequence[Array]) -> list[Array]:
    arrays = [np.ascontiguousarray(x).reshape(x.shape) for x in inputs]
    masks = arrays[call.streams :]
    if call.padded != call.items:
        arrays[: call.streams] = [_padded(x, call.items, call.padded) for x in arrays[: call.streams]]
    results = [np.empty(shape, np.float32) for shape in call.inner]
    strides = [[step // mask.itemsize for step in mask.strides] for mask in masks]
    if call.run([x.ctypes.data for x in (*arrays, *results)], strides):
        return _run(call.directly(), inputs)
    if call.inner != call.outer:
        results = [x[: call.items].reshape(shape) for x, shape in zip(results, call.outer, strict=True)]
    return results


def _padded(x: Array, items: int, count: int) -> Array:
    rows = x.reshape(items, x.size // items if items else 0)
    padded = np.zeros((count, rows.shape[1]), np.float32)
    padded[:items] = rows
    return padded


def _results(form: Any, values: Mapping[str, Array]) -> Any:
    if isinstance(form, list):
        return [_results(item, values) for item in form]
    if not isinstance(form, dict):
        return form
    ((kind, content),) = form.items()
    if kind == "node":
        return values[content]
    if kind == "tuple":
        return tuple(_results(item, values) for item in content)
    return {key: _results(item, values) for key, item in content.items()}


def _leaves(results: Any) -> list[Array]:
    """The arrays in what a model returns, in order."""
    if isinstance(results, np.ndarray):
        return [results]
    if isinstance(results, dict):
        results = list(results.values())
    return [leaf for item in results for leaf in _leaves(item)] if isinstance(results, (list, tuple)) else []
