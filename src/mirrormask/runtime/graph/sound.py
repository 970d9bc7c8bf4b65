"""Whether a graph that a file holds can be one: names, shapes and weights that belong together.

What kernels read and write is checked again, number by number, when a plan is made (``kernels.base.check_op``), for the
memory of a plan. Tensors from outside are as large as the graph's shapes say, which is why those are checked here.
"""

from __future__ import annotations

import math

from mirrormask.runtime.graph.ir import Graph, Node, shape_made

__all__ = ["Unsound", "check"]

#: Numbers of a value, and of a dimension, that a plan can count.
MOST = 1 << 31
#: Settings of a window that are at most so large: code for a window is written out.
SETTINGS = {"conv": 64, "pool": 1024}


class Unsound(ValueError):
    """A graph that no capture makes; the message names the operation."""


def check(graph: Graph) -> None:
    """Look at every node.

    Raises:
        Unsound: a name is missing or there twice, or a shape, a weight or a setting does not fit.
    """
    seen: dict[str, Node] = {}
    for node in graph.nodes:
        _require(node.name not in seen, node, "is there twice")
        _require(all(name in seen for name in node.inputs), node, "reads what was not made before it")
        _require((node.op == "input") == (not node.inputs), node, "has inputs where it should have none, or none")
        mask = node.op == "input" and node.kind == "mask"
        dimensions = (0,) if mask else (1,) if graph.rows else (1, 3)
        sizes = all(1 <= size < MOST for size in node.shape) and math.prod(node.shape) < MOST
        _require(len(node.shape) in dimensions and sizes, node, f"has the shape {node.shape}")
        if node.op != "input":
            _operation(node, [seen[name] for name in node.inputs])
        seen[node.name] = node
    inputs = [node.name for node in graph.nodes if node.op == "input"]
    if sorted(inputs) != sorted(graph.inputs) or not inputs or not graph.outputs:
        raise Unsound("the inputs of the graph are not those that it names, or it gives nothing")
    first_mask = len(inputs) - len(graph.masks)
    if any(name in graph.masks for name in graph.inputs[:first_mask]):
        raise Unsound("masks do not come last")
    if len(set(graph.outputs)) != len(graph.outputs) or any(name not in seen for name in graph.outputs):
        raise Unsound("it gives something that is not made, or one thing twice")
    for name in (*graph.inputs, *graph.outputs):
        shape = graph.shapes.get(name)
        if shape is None or not _same(shape, seen[name].shape):
            raise Unsound(f"{name[:80]!r} has the shape {seen[name].shape}, and outside {shape}")


def _require(condition: bool, node: Node, fault: str) -> None:
    if not condition:
        raise Unsound(f"{(node.layer or node.name)[:80]!r} ({node.op[:20]}) {fault}")


def _same(outside: tuple[int, ...], inside: tuple[int, ...]) -> bool:
    """Whether a tensor of one shape is the value of another: a sequence of numbers is a map of one row."""
    return outside == inside or (len(outside) == 2 and (outside[0], 1, outside[1]) == inside)


def _operation(node: Node, sources: list[Node]) -> None:
    weight, windows = node.weight, (*node.stride, *node.dilation, *node.kernel, node.groups)
    _require(all(n >= 1 for n in windows) and all(n >= 0 for n in node.padding), node, f"has the settings {windows}")
    most = SETTINGS.get(node.op, MOST)
    _require(max(*node.kernel, *node.padding, *node.dilation) <= most, node, f"has a window of {node.kernel}")
    for numbers in (node.bias, node.gain):
        _require(numbers is None or numbers.shape == node.shape[:1], node, "has another number of biases than outputs")
    _require((weight is None) == (node.op not in ("conv", "linear")), node, "lacks a weight, or has one")
    shapes = [source.shape for source in sources]
    if node.op == "conv":
        assert weight is not None
        _require(len(shapes[0]) == 3, node, f"reads a value of shape {shapes[0]}")
        inputs, outputs = shapes[0][0], node.shape[0]
        _require(inputs % node.groups == 0 and outputs % node.groups == 0, node, f"has {node.groups} groups")
        wanted: tuple[int, ...] = (outputs, inputs // node.groups, *node.kernel)
        _require(weight.shape == wanted, node, f"has a weight of shape {weight.shape}, not {wanted}")
    elif node.op == "linear":
        assert weight is not None
        wanted = (*node.shape, *shapes[0])
        _require(weight.shape == wanted, node, f"has a weight of shape {weight.shape}, not {wanted}")
    elif node.op == "slice":
        fits = len(node.span) == 2 and 0 <= node.span[0] < node.span[1] <= shapes[0][0]
        _require(fits and node.span[1] - node.span[0] == node.shape[0], node, f"takes the channels {node.span}")
    elif node.op == "gather":
        fits = all(0 <= channel < shapes[0][0] for channel in node.span)
        _require(fits and len(node.span) == node.shape[0], node, "takes channels that are not there")
    if node.op == "attention":
        fits = len(sources) in (3, 4) and len(node.span) == 3 * node.groups
        made: tuple[int, ...] = (node.groups * node.kernel[1],) if fits else ()
    else:
        made = shape_made(node, shapes)
    _require(made == node.shape, node, f"makes {made} of {shapes}, not {node.shape}")
