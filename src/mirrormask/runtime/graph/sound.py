"""Whether a graph that a file holds can be one: names, shapes and weights that belong together.

What kernels read and write is checked again, number by number, when a plan is made (``kernels.base.check_op``), for the
memory of a plan. Tensors from outside are as large as the graph's shapes say, which is why those are checked here.
"""

from __future__ import annotations

import math

from mirrormask.runtime.graph.ir import Graph, Node, inner, shape_made

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
        made_of_none = node.op in ("input", "stored")
        _require(made_of_none == (not node.inputs), node, "has inputs where it should have none, or none")
        mask = node.op == "input" and node.kind == "mask"
        dimensions = (0,) if mask else (1,) if graph.rows else (1, 3)
        sizes = all(1 <= size < MOST for size in node.shape) and math.prod(node.shape) < MOST
        _require(len(node.shape) in dimensions and sizes, node, f"has the shape {node.shape}")
        if node.op == "stored":
            _require(
                node.gain is not None and node.gain.shape == _plane(node), node, "stores other numbers than it gives"
            )
        elif node.op != "input":
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
    """Whether a tensor of one shape is the value of another: see :func:`graph.ir.inner`."""
    return outside == inside or (len(outside) in (2, 4) and inner(outside) == inside)


def _operation(node: Node, sources: list[Node]) -> None:
    weight, windows = node.weight, (*node.stride, *node.dilation, *node.kernel, node.groups)
    _require(all(n >= 1 for n in windows) and all(n >= 0 for n in node.padding), node, f"has the settings {windows}")
    most = SETTINGS.get(node.op, MOST)
    _require(max(*node.kernel, *node.padding, *node.dilation) <= most, node, f"has a window of {node.kernel}")
    outputs = node.shape[:1] if weight is None else weight.shape[:1]
    for numbers in (node.bias, None if node.op == "attend" else node.gain):
        _require(numbers is None or numbers.shape == outputs, node, "has another number of biases than outputs")
    _require((weight is None) == (node.op not in ("conv", "linear")), node, "lacks a weight, or has one")
    shapes = [source.shape for source in sources]
    if node.op == "conv":
        assert weight is not None
        _require(len(shapes[0]) == 3, node, f"reads a value of shape {shapes[0]}")
        inputs, filters, depth = shapes[0][0], node.shape[0], _depth(node, shapes[0][0])
        if depth:
            inputs, filters = weight.shape[1] * node.groups, weight.shape[0]
        _require(inputs % node.groups == 0 and filters % node.groups == 0, node, f"has {node.groups} groups")
        wanted: tuple[int, ...] = (filters, inputs // node.groups, *depth, *node.kernel)
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
        fits = fits and len(node.values) in (0, len(node.span))
        _require(fits and len(node.span) == node.shape[0], node, "takes channels that are not there")
    elif node.op == "arrange":
        channels, count = _plane(node)
        first, second = node.span[:channels], node.span[channels:]
        _require(len(first) == channels and len(second) == count, node, "does not say where its numbers come from")
        there = [place for place in second if place >= 0]
        fits = bool(there) and min(first) >= 0 and max(first) + max(there) < math.prod(shapes[0])
        _require(fits, node, "takes numbers that are not there")
    elif node.op == "join":
        _require(
            node.span in ((0,), (1,)) and all(len(shape) == 3 for shape in shapes), node, f"joins along {node.span}"
        )
    elif node.op == "group_norm":
        fits = len(shapes[0]) == 3 and len(node.values) == 1 and shapes[0][0] % node.groups == 0
        _require(fits, node, f"has {node.groups} groups of {shapes[0]}")
    elif node.op == "norm":
        fits = node.kind in ("layer", "rms", "mean") and len(node.values) == 1
        _require(fits, node, f"is a norm of the kind {node.kind[:20]!r}")
    elif node.op == "reduce":
        _require(node.kind in ("sum", "mean", "max", "norm"), node, f"is a sum of the kind {node.kind[:20]!r}")
    elif node.op == "adaptive":
        fits = node.span in ((), (0,), (1,)) and (not node.span or len(shapes[0]) == 3)
        _require(fits, node, f"pools along {node.span}")
    elif node.op == "mean":
        _require(node.kind in ("", "norm", "sum"), node, f"is a mean of the kind {node.kind[:20]!r}")
    elif node.op == "attend":
        _attention_of_maps(node, shapes)
    if node.op == "attention":
        fits = len(sources) in (3, 4) and len(node.span) == 3 * node.groups
        made: tuple[int, ...] = (node.groups * node.kernel[1],) if fits else ()
    else:
        made = shape_made(node, shapes)
    _require(made == node.shape, node, f"makes {made} of {shapes}, not {node.shape}")


def _depth(node: Node, channels: int) -> tuple[int, ...]:
    """The taps in depth of a convolution over frames, whose table must fit; nothing of another."""
    weight = node.weight
    if not node.span:
        return ()
    fits = weight is not None and len(weight.shape) == 5 and min(weight.shape) >= 1
    _require(fits, node, "has frames, and a weight without a depth")
    assert weight is not None
    inputs, outputs, taps = weight.shape[1] * node.groups, weight.shape[0], weight.shape[2]
    made, rest = divmod(len(node.span), taps)
    fits = rest == 0 and node.shape[0] == made * outputs and channels % inputs == 0
    fits = fits and all(-1 <= frame < channels // inputs for frame in node.span)
    _require(fits, node, f"reads frames that are not there, or makes others than {made}")
    return (taps,)


def _plane(node: Node) -> tuple[int, int]:
    """The channels of a map, and the numbers of each."""
    return node.shape[0], math.prod(node.shape[1:])


def _attention_of_maps(node: Node, shapes: list[tuple[int, ...]]) -> None:
    maps = [(*shape, *[1] * (3 - len(shape))) for shape in (*shapes, node.shape)]
    fits = len(shapes) == 3 and len(node.span) == 3 * node.groups
    _require(fits, node, f"is no attention of {node.groups} heads")
    query, key, value, made = maps
    fits = query[1] == key[1] == value[1] == made[1] and query[2] == made[2] and key[2] == value[2]
    _require(fits and made[0] == node.groups * node.kernel[1], node, f"makes {node.shape} of {shapes}")
    widths = (node.kernel[0], *node.kernel)
    for i, (shape, width) in enumerate(zip(maps, widths, strict=False)):
        starts = node.span[i * node.groups : (i + 1) * node.groups]
        _require(all(0 <= start <= shape[0] - width for start in starts), node, "has a head that is not there")
    if node.gain is not None:
        rows, heads = node.stride
        fits = rows in (1, made[1]) and heads in (1, node.groups)
        _require(fits and node.gain.size == rows * heads * query[2] * key[2], node, "has a bias of another size")
