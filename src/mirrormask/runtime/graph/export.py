"""A model as a graph of ATen operations (``torch.export``), with sizes left open where the model allows it.

An export replaces a module's parameters for a while by fakes. It works on a private copy, which shares the model's
memory, so that whoever calls the model meanwhile sees nothing of it; and one at a time, as PyTorch's tracing has state
of its own.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from mirrormask.runtime.graph.guards import Guards
from mirrormask.runtime.graph.lengths import open_lengths
from mirrormask.runtime.graph.moments import ByMoments
from mirrormask.runtime.graph.open_sizes import OpenTrace, TokensOfMaps
from mirrormask.runtime.graph.paddings import zeros_for_padding
from mirrormask.runtime.graph.strides import StridesAsked, StridesOfInputs
from mirrormask.runtime.graph.tensors import held_tensors

__all__ = ["LOCK", "Arguments", "Export", "Refused", "export", "private_copy", "signature_of"]

#: Held by whoever captures a model: one thread of the process at a time.
LOCK = threading.RLock()


class Refused(ValueError):
    """A model that ``torch.export`` cannot capture; the message says why."""


def signature_of(model: nn.Module) -> inspect.Signature | None:
    """How a model is called: the names and kinds of its arguments, and which may be left out."""
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    empty = inspect.Parameter.empty
    return inspect.Signature(
        [p.replace(annotation=empty, default=empty if p.default is empty else None) for p in parameters]
    )


@dataclass(frozen=True)
class Arguments:
    """What a model is called with: by position as far as its ``forward`` allows it, and by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    signature: inspect.Signature | None

    @classmethod
    def of(cls, signature: inspect.Signature | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments of a call, in one order however the caller gave them.

        Raises:
            TypeError: ``signature`` does not take them.
        """
        if signature is None:
            return cls(args, dict(kwargs), None)
        bound = signature.bind(*args, **kwargs)
        return cls(bound.args, bound.kwargs, signature)

    @property
    def leaves(self) -> list[Any]:
        """Tensors and other values, in order."""
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors among the leaves."""
        return [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]

    @property
    def shapes(self) -> tuple[torch.Size | None, ...]:
        """The shape of each leaf; ``None`` for one that is not a tensor, or has none."""
        return tuple(leaf.shape if isinstance(leaf, Tensor) and not leaf.is_nested else None for leaf in self.leaves)

    @property
    def nested(self) -> bool:
        """Whether one is a tensor of tensors of several lengths, which has no shape."""
        return any(x.is_nested for x in self.tensors)

    @property
    def kind(self) -> str:
        """All but the tensors' sizes and values: what must be equal for a capture to be of use."""
        leaves, spec = pytree.tree_flatten((self.args, self.kwargs))
        facts = [_fact(leaf) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves]
        return repr((str(spec), facts))

    def named(self) -> dict[str, Any]:
        """The arguments by their names, as guards read them."""
        if self.signature is None:
            return {}
        return _named(self.signature, self.args, self.kwargs)

    def called(self) -> tuple[tuple[str, tuple[int, ...] | None], ...]:
        """(name, shape) of each leaf, where all arguments are tensors, or ``None`` and without a shape.

        Raises:
            TypeError: an argument is something else; the message names it.
        """
        if self.signature is None:
            raise TypeError("its forward has no signature")
        found: dict[int, tuple[str, tuple[int, ...] | None]] = {}
        leaves = self.leaves
        for name, value in self.named().items():
            if value is not None and not isinstance(value, Tensor):
                raise TypeError(f"its argument {name!r} is a {type(value).__name__}")
            place = next(i for i, leaf in enumerate(leaves) if leaf is value and i not in found)
            found[place] = (name, None if value is None else tuple(value.shape))
        return tuple(found[place] for place in sorted(found))

    def with_tensors(self, change: Callable[[Tensor], Tensor]) -> Arguments:
        """The same with ``change(tensor)`` in place of each tensor."""
        args, kwargs = pytree.tree_map(
            lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf, (self.args, self.kwargs)
        )
        return Arguments(args, kwargs, self.signature)

    def copied(self) -> Arguments:
        """The same in memory of its own, for a call whose result alone is wanted: some models write into their inputs.

        One tensor given twice stays one.
        """
        made: dict[int, Tensor] = {}
        return self.with_tensors(lambda x: made[id(x)] if id(x) in made else made.setdefault(id(x), x.clone()))


def _fact(x: Tensor) -> tuple[Any, ...]:
    plain = (str(x.dtype), x.dim())
    return plain if x.layout is torch.strided else (*plain, str(x.layout))


def _named(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    values = dict(signature.bind(*args, **kwargs).arguments)
    for name, parameter in signature.parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            values |= values.pop(name, {})
    return values


@dataclass(frozen=True)
class Export:
    """What ``torch.export`` made of a model.

    Attributes:
        module: the model as operations.
        guards: for which arguments it computes what the model does.
        writes: names of the model's buffers that a call changes.
    """

    module: fx.GraphModule
    guards: Guards
    writes: tuple[str, ...]


def private_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules that shares the memory of the tensors; the model itself where it cannot be copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    for tensor in (*model.buffers(), *held_tensors(model).values()):
        memo[id(tensor)] = tensor.detach()
    try:
        return copy.deepcopy(model, memo)
    except Exception:  # whatever a stranger's attributes raise
        return model


def export(model: nn.Module, arguments: Arguments, *, batch_alone: bool = False, until_tokens: bool = False) -> Export:
    """Export a model; to be called under :data:`LOCK`, with a :func:`private_copy`.

    All sizes are left open that the model leaves open; where that fails, or with ``batch_alone``, the first dimension
    alone, else none.

    Args:
        until_tokens: whether to end a trace in which maps of open sizes become tokens.

    Raises:
        Refused: no attempt succeeds.
        TokensOfMaps: with ``until_tokens``, they do.
    """
    # One tensor given twice would become one argument of the program, which reads it for the other too.
    arguments = arguments.with_tensors(Tensor.detach)
    doubled = arguments.with_tensors(_two) if _one_item(arguments) else arguments
    attempts: list[tuple[Arguments, int | None]] = [(doubled, None), (doubled, 0)]
    attempts += [(arguments, None)] if doubled is not arguments else []
    attempts = [one for one in attempts if not batch_alone or one[1] is not None]
    attempts += [(arguments, -1)]
    failure: Exception | None = None
    last: Exception | None = None
    for given, which in attempts:
        try:
            with _quiet(), OpenTrace(until_tokens), ByMoments(), StridesOfInputs(model), _as_in_python(model):
                made = _export(model, given, which)
            if made.guards.hold(arguments.named()):
                return made
            last = failure = failure or ValueError("it computes something else for a first dimension of 1")
        except TokensOfMaps:
            raise
        except StridesAsked as error:
            raise Refused(f"{type(model).__name__} cannot be captured: {error}") from error
        except Exception as error:  # of torch's many
            failure = failure or error
            last = error
    first = str(last).strip().partition("\n")[0]
    raise Refused(f"{type(model).__name__} cannot be captured: {type(last).__name__}: {first}") from last


@contextlib.contextmanager
def _as_in_python(model: nn.Module) -> Iterator[None]:
    """What Python decides by numbers that a trace does not have, as operations of the program."""
    with open_lengths(model), zeros_for_padding(model):
        yield


def _export(model: nn.Module, arguments: Arguments, which: int | None) -> Export:
    """With every dimension open (``which`` is None), the one of this number, or none (-1)."""

    def open_(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return None
        dims = range(leaf.dim()) if which is None else [which] if 0 <= which < leaf.dim() else []
        return dict.fromkeys(dims, torch.export.Dim.AUTO)

    shapes: Any = None
    if which != -1:
        args, kwargs = pytree.tree_map(open_, (arguments.args, arguments.kwargs))
        shapes = args if arguments.signature is None else _named(arguments.signature, args, kwargs)
    program = torch.export.export(model, arguments.args, arguments.kwargs, dynamic_shapes=shapes, strict=False)
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    given = [node for node in module.graph.nodes if node.op == "placeholder"]
    free = {
        (number, dim)
        for number, node in enumerate(given)
        if isinstance(node.meta.get("val"), Tensor)
        for dim, size in enumerate(node.meta["val"].shape)
        if isinstance(size, torch.SymInt)
    }
    conditions = tuple(getattr(program, "_guards_code", None) or ())
    fixed = tuple(
        f"{place}.size()[{dim}] == {int(size)}"
        for place, node in zip(_places(arguments), given, strict=True)
        if place and isinstance(node.meta.get("val"), Tensor)
        for dim, size in enumerate(node.meta["val"].shape)
        if not isinstance(size, torch.SymInt)
    )
    signature = program.graph_signature
    writes = tuple(signature.buffers_to_mutate.values())
    return Export(module, Guards(tuple(dict.fromkeys((*conditions, *fixed))), frozenset(free)), writes)


def _places(arguments: Arguments) -> list[str]:
    """Where each leaf lies, as the conditions write it; ``""`` for what is not a tensor."""
    places = {}
    for path, leaf in pytree.tree_flatten_with_path(arguments.named())[0]:
        if isinstance(leaf, Tensor):
            places[id(leaf)] = "L" + "".join(str(key) for key in path)
    return [places.get(id(leaf), "") if isinstance(leaf, Tensor) else "" for leaf in arguments.leaves]


def _one_item(arguments: Arguments) -> bool:
    """Whether all tensors have a first dimension of 1, as a batch of one has."""
    tensors = arguments.tensors
    return bool(tensors) and all(x.dim() > 1 and x.shape[0] == 1 for x in tensors)


def _two(x: Tensor) -> Tensor:
    return x.expand(2, *x.shape[1:]).clone()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """What torch logs and prints of an attempt that fails is thousands of lines long, and none of them the user's."""
    level, stream = logging.root.manager.disable, sys.stderr
    logging.disable(logging.ERROR)
    sys.stderr = _Muted(stream, threading.get_ident())  # type: ignore[assignment]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        sys.stderr = stream


class _Muted:
    """A stream on which one thread says nothing."""

    def __init__(self, stream: TextIO, thread: int) -> None:
        self._stream, self._thread = stream, thread

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._thread else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
