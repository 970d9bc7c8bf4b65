"""From a graph to a plan: layouts, fusion, memory, and which kernel each layer gets."""

from __future__ import annotations

import numpy as np

from mirrormask.machine.targets import Target
from mirrormask.runtime.graph.ir import Graph
from mirrormask.runtime.schedule.arranged import Arranged
from mirrormask.runtime.schedule.channels import Channels
from mirrormask.runtime.schedule.layers import Layers
from mirrormask.runtime.schedule.moments import Moments
from mirrormask.runtime.schedule.places import Chooser, Value
from mirrormask.runtime.schedule.plan import Plan
from mirrormask.runtime.schedule.reach import trimmed
from mirrormask.runtime.schedule.rowwise import Rowwise
from mirrormask.runtime.schedule.spatial import Spatial

__all__ = ["lower"]


def lower(graph: Graph, target: Target, threads: int, choose: Chooser, tokens: int = 1) -> Plan:
    """The plan of a region.

    Args:
        choose: picks the kernel of each convolution or linear layer over tokens.
        tokens: rows per item of a region over rows: 1, or a multiple of ``target.lanes``.

    Raises:
        ValueError: ``tokens`` is neither.
        IndexError: a constant is out of bounds, which would be an error of this library.
    """
    if tokens == 1 and graph.sequences:
        raise ValueError("sequences take whole vectors of tokens")
    if tokens != 1 and tokens % target.lanes:
        raise ValueError(f"{tokens} tokens are not whole vectors of {target.lanes}")
    return _Lowering(trimmed(graph), target, threads, choose, tokens).plan()


class _Lowering(Layers, Channels, Spatial, Rowwise, Arranged, Moments):
    """One method ``_op`` for each operation that a node may be."""

    def plan(self) -> Plan:
        graph = self.graph
        strides = []
        for number, name in enumerate(graph.inputs):
            self.values[name] = Value(self._shape(name), external=number)
            strides.append(self._stride(name))
        done: set[str] = set()
        for node in graph.nodes:
            if node.op == "input" or node.name in done:
                continue
            fused = self._fuse(node, done)
            done |= {node.name, fused.out}
            getattr(self, f"_{node.op}")(node, fused)
            self._release(done)
        for number, name in enumerate(graph.outputs):
            self._export(name, len(graph.inputs) + number)
            strides.append(self._stride(name))
        self._clear_disturbed()
        shapes = [graph.shapes[name] for name in graph.outputs]
        numbers = self.memory.size + 4096
        tokens = self.tokens if graph.sequences else 0
        kind = self.target.dtype
        return Plan(self.ops, numbers, strides, shapes, self.threads, kind, self.panels, tokens, self.state)

    def _stride(self, name: str) -> int:
        """Floats of a tensor outside from one item to the next; of sequences, from one token; of a mask, none."""
        if not self.graph.sequences:
            return int(np.prod(self._shape(name)))
        return 0 if self.nodes[name].kind == "mask" else self.nodes[name].shape[0]
