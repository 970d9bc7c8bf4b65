"""Tensors that a rewritten program has of a model's own, and the steps that make them again of other weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.chains import stored_value
from mirrormask.runtime.graph.functions import shaped
from mirrormask.runtime.graph.program import steps_of

__all__ = ["Made", "Making", "fetched", "keep", "made_in", "number"]

aten = torch.ops.aten


@dataclass(frozen=True)
class Made:
    """How a tensor was made.

    Attributes:
        steps: see :func:`mirrormask.runtime.graph.program.steps_of`.
        sources: the tensors that they fetch, by name: the model's own, or others that were made.
        decides: whether the program was rewritten for this tensor's shape, which its numbers gave it, or its numbers.
    """

    steps: list[list[Any]]
    sources: dict[str, Tensor]
    decides: bool = False


class Making:
    """Operations on stored tensors, done at once and kept as steps."""

    def __init__(self) -> None:
        self._graph = fx.Graph()
        self._fetched: dict[str, fx.Node] = {}

    def fetch(self, node: fx.Node) -> fx.Node:
        """A tensor that a program fetches."""
        name = str(node.target)
        if name not in self._fetched:
            self._fetched[name] = self._graph.get_attr(name)
            self._fetched[name].meta["val"] = stored_value(node)
        return self._fetched[name]

    def do(self, operation: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """The result of an operation on what was fetched or done.

        Raises:
            Whatever the operation does.
        """
        given, named = fx.map_arg((args, kwargs), lambda node: node.meta["val"])
        value = operation(*given, **named)
        made = self._graph.call_function(operation, args, kwargs)
        made.meta["val"] = value
        return made

    def done(self, node: fx.Node) -> tuple[Tensor, Made]:
        """The tensor, whose shape its numbers decided, and how it was made.

        Raises:
            Unstorable: plain values cannot say it.
        """
        value = node.meta["val"]
        return value, self.decided(self.do(shaped, node, list(value.shape)))

    def decided(self, node: fx.Node) -> Made:
        """How a tensor was made for which the program was rewritten: where it is another, the last step raises.

        Raises:
            Unstorable: plain values cannot say it.
        """
        sources = {name: fetched.meta["val"] for name, fetched in self._fetched.items()}
        return Made(steps_of(list(self._graph.nodes)), sources, decides=True)


def keep(module: fx.GraphModule, kind: str, value: Tensor, made: Made | None) -> fx.Node:
    """A new stored tensor of a program, fetched where nodes are inserted."""
    name = f"_{kind}_{sum(1 for name, _ in module.named_buffers() if name.startswith(f'_{kind}_'))}"
    module.register_buffer(name, value.detach().clone().contiguous())
    if made is not None:
        module.meta.setdefault("made", {})[name] = made
    node = module.graph.get_attr(name)
    node.meta = {"val": getattr(module, name)}
    return node


def made_in(module: fx.GraphModule) -> dict[str, Made]:
    """What :func:`keep` kept that can be made again, by name, in order."""
    return dict(module.meta.get("made", {}))


def fetched(name: str) -> list[list[Any]]:
    """The step that fetches a tensor of the model."""
    graph = fx.Graph()
    graph.get_attr(name)
    return steps_of(list(graph.nodes))


def number(tensor: Tensor) -> list[list[Any]]:
    """The steps that make a tensor without dimensions."""
    graph = fx.Graph()
    graph.call_function(aten.full.default, ([], tensor.item()), {"dtype": tensor.dtype})
    return steps_of(list(graph.nodes))
