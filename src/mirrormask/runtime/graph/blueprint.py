"""What capturing found of a model, without weights: plain values for the cache, and a module to fill with tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from mirrormask.runtime.graph.guards import Guards
from mirrormask.runtime.graph.ir import Graph

__all__ = ["Blueprint"]


@dataclass
class Blueprint:
    """The structure of a captured model.

    Attributes:
        regions: the graphs that plans take over, without weights, by name.
        whole: the name of the region that is the entire model, or ``""``.
        left: (operation, why) of what stays in PyTorch.
        guards: for which arguments it holds.
        program: (kind, name, target, arguments, keyword arguments) of each step of the model around its regions, as
            ``fx`` has them, in plain values; empty for a model that is one region.
        constants: such steps for each tensor that is made of the model's own, by name; the last one makes it.
    """

    regions: dict[str, Graph]
    whole: str
    left: list[tuple[str, str]]
    guards: Guards
    program: list[list[Any]]
    constants: dict[str, list[list[Any]]] = field(default_factory=dict)

    def as_plain(self) -> dict[str, Any]:
        """Plain values, for JSON; :meth:`from_plain` reads them."""
        regions = {name: graph.as_plain() for name, graph in self.regions.items()}
        return {
            "regions": regions,
            "whole": self.whole,
            "left": self.left,
            "guards": self.guards.as_plain(),
            "program": self.program,
            "constants": self.constants,
        }

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Blueprint:
        """The blueprint that :meth:`as_plain` made the values of.

        Raises:
            AttributeError, TypeError, LookupError: they are not such values.
        """
        regions = {name: Graph.from_plain(graph) for name, graph in values["regions"].items()}
        left = [(name, why) for name, why in values["left"]]
        guards, constants = Guards.from_plain(values["guards"]), dict(values["constants"])
        return cls(regions, values["whole"], left, guards, values["program"], constants)
