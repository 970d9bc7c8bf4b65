"""Tokens as the columns of maps: what works on the rows of a view of maps works on the channels of maps instead.

A vision transformer makes tokens of the maps of a convolution by views, puts a class token before them, and gives
maps back in the end. With channels first throughout, its linear layers are convolutions of one number each, its norms
are norms over channels, and its views say only where numbers lie: :func:`functions.arrange`, which is nothing at all
where they lie there already. So the whole network is one region over images.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from mirrormask.runtime.graph.aten import argument
from mirrormask.runtime.graph.attending import Attending
from mirrormask.runtime.graph.chains import is_move, root_of, sizes
from mirrormask.runtime.graph.convert import CONVERTERS
from mirrormask.runtime.graph.frames import frames_conv
from mirrormask.runtime.graph.functions import (
    channel_norm,
    map_norm,
    per_channel,
    pointwise,
    response,
    spaced_conv,
)
from mirrormask.runtime.graph.making import Making, keep
from mirrormask.runtime.graph.passes import operations_beside
from mirrormask.runtime.graph.patterns import normalised
from mirrormask.runtime.graph.placing import item_of, last_of, shape_of, size_of
from mirrormask.runtime.graph.pointwise import ACTIVATIONS, KINDS
from mirrormask.runtime.graph.rowwise import LEAST
from mirrormask.runtime.graph.scores import scores_of
from mirrormask.runtime.graph.traces import Ints, Traced, spread, stored_index

__all__ = ["CONVOLUTIONS", "tokens_as_maps"]

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    pointwise,
    spaced_conv,
    frames_conv,
}
#: What works on ``[batch, channels, height, width]`` and finds that in a view.
ON_MAPS = {
    *CONVOLUTIONS,
    aten.batch_norm.default,
    aten.group_norm.default,
    aten.max_pool2d.default,
    aten.avg_pool2d.default,
    aten.adaptive_avg_pool2d.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
}
REVERSED = {"sub": "rsub"}


def tokens_as_maps(module: fx.GraphModule) -> None:
    """Rewrite, in place, what works on views of maps that convolutions make."""
    graph = module.graph
    operations = operations_beside(graph, CONVOLUTIONS)
    if not operations:
        return
    work = _Work(graph)
    for node in operations:
        if not is_move(node):
            work.visit(node)
    graph.eliminate_dead_code()
    graph.lint()


class _Work(Attending):
    """The operations, one method for each kind."""

    def visit(self, node: fx.Node) -> None:
        """Rewrite an operation, or note that its result is a map."""
        with self.graph.inserting_before(node):
            found = self._rewritten(node)
        if found is not None:
            node.replace_all_uses_with(found)
            if node.target is aten.scaled_dot_product_attention.default:
                self.graph.erase_node(node)  # which PyTorch takes for one with effects
        elif node.target in CONVOLUTIONS:
            self.native.add(node)
        elif node.target in CONVERTERS or node.target is channel_norm:
            operands = [arg for arg in node.all_input_nodes if arg.op != "get_attr"]
            if operands and all(_sliced(arg) in self.native for arg in operands):
                self.native.add(node)

    def _rewritten(self, node: fx.Node) -> fx.Node | None:
        scores = scores_of(node)
        if scores is not None:
            return self.attention(node, scores)
        if not any(root_of(arg) in self.native and is_move(arg) for arg in _operands(node)):
            return None
        target = node.target
        if target is aten.linear.default:
            return self._linear(node)
        if target in (aten.layer_norm.default, aten.rms_norm.default):
            return self._norm(node)
        if target in ON_MAPS:
            return self._on_maps(node)
        if target in ACTIVATIONS:
            return self._each(node)
        if target is response and node.args[2]:
            return self._response(node)
        if target in KINDS:
            return self._unit(node) or self._arithmetic(node) or self._beside(node)
        if target is aten.cat.default:
            return self._together(node)
        if target is aten.mean.dim:
            return self._mean(node)
        return None

    def _linear(self, node: fx.Node) -> fx.Node | None:
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        rows = self.rows(x)
        if rows is None:
            return None
        item = (last_of(node), *item_of(rows)[1:])
        if len(item) == 1:
            made = self.put(aten.linear.default, (rows, weight, bias), item, rows)
        else:
            made = self.put(pointwise, (rows, weight, bias), item, rows)
        self.named(made, node)
        return self.back(made, node, x)

    def _norm(self, node: fx.Node) -> fx.Node | None:
        rows = self.rows(node.args[0]) if len(node.args[1]) == 1 else None  # type: ignore[arg-type]
        if rows is None:
            return None
        rms = node.target is aten.rms_norm.default
        weight, eps = argument(node, 2, "weight"), argument(node, 3 if rms else 4, "eps")
        bias = None if rms else argument(node, 3, "bias")
        if eps is None:
            eps = LEAST if rms else 1e-5
        if len(item_of(rows)) > 1:
            made = self.put(channel_norm, (rows, weight, bias, eps, "rms" if rms else "layer"), item_of(rows), rows)
        elif rms:
            made = self.put(aten.rms_norm.default, (rows, node.args[1], weight, eps), item_of(rows), rows)
        else:
            made = self.put(aten.layer_norm.default, (rows, node.args[1], weight, bias, eps), item_of(rows), rows)
        self.named(made, node)
        return self.back(made, node, node.args[0])

    def _response(self, node: fx.Node) -> fx.Node | None:
        rows = self.rows(node.args[0])
        if rows is None or len(item_of(rows)) != 3 or sizes(node.args[0])[0] != sizes(rows)[0]:  # type: ignore[arg-type]
            return None
        made = self.put(response, (rows, node.args[1], False), item_of(rows), rows)
        return self.back(made, node, node.args[0])

    def _on_maps(self, node: fx.Node) -> fx.Node | None:
        x: Any = node.args[0]
        by_rows = node.target is aten.batch_norm.default and len(sizes(x)) == 2
        source = self.rows(x) if by_rows else self.maps(x)
        if source is None or (len(sizes(source)) < 3 and node.target is aten.batch_norm.default):
            return None
        item = item_of(source) if by_rows else tuple(int(size) for size in sizes(node)[1:])
        made = self.put(node.target, (source, *node.args[1:]), item, source, **dict(node.kwargs))
        self.named(made, node)
        return self.back(made, node, x) if by_rows else made

    def _each(self, node: fx.Node) -> fx.Node | None:
        """A function of each number: on the map, if the view only gives it another shape."""
        found = self.form(node.args[0])
        if found is None:
            return None
        source, last = found
        made = self.put(node.target, (source, *node.args[1:]), item_of(source), source, **dict(node.kwargs))
        return self.back(made, node, node.args[0]) if last else made

    def _arithmetic(self, node: fx.Node) -> fx.Node | None:
        a: Any = node.args[0]
        b: Any = node.args[1]
        kind = KINDS[node.target]
        if node.kwargs.get("alpha", 1) != 1:
            return None
        if isinstance(b, (int, float)):
            return self._each(node)
        if self.traced(a) is None:
            a, b, kind = b, a, REVERSED.get(kind, kind)
            if kind == "div":
                return None
        found = self.form(a)
        if found is None or not isinstance(b, fx.Node) or sizes(a) != sizes(node):
            return None
        source, last = found
        item = item_of(source)
        one, two = self.traced(a), self.traced(b)
        assert one is not None
        index = None if one.batch else stored_index(b, node, source)
        if index is not None:
            with_stored = self._with_stored(source, root_of(b), index, kind, last)
            return None if with_stored is None else (self.back(with_stored, node, a) if last else with_stored)
        other = None
        if two is not None and two.batch == one.batch and sizes(b) == sizes(node):
            other = self.rows(b) if last else self.maps(b)
        if other is None or item_of(other) != item or kind not in ("add", "sub", "mul", "div", "rsub"):
            return None
        pair = (other, source) if kind == "rsub" else (source, other)
        target = aten.sub.Tensor if kind == "rsub" else node.target
        made = self.put(target, pair, item, source)
        return self.back(made, node, a) if last else made

    def _beside(self, node: fx.Node) -> fx.Node | None:
        """Maps with what a view shows as fewer numbers, which PyTorch repeats."""
        args = list(node.args)
        for i, arg in enumerate(args[:2]):
            if not isinstance(arg, fx.Node) or len(sizes(arg)) != len(sizes(node)) or len(sizes(node)) < 3:
                return None
            args[i] = self.maps(arg) if is_move(arg) else arg
            if args[i] not in self.native:
                return None
        made = self.graph.call_function(node.target, tuple(args), dict(node.kwargs))  # type: ignore[arg-type]
        made.meta = dict(node.meta)
        self.native.add(made)
        return made

    def _unit(self, node: fx.Node) -> fx.Node | None:
        """Each row over the root of its squares' sum, but at least eps."""
        x, eps = normalised(node)
        traced, shape = self.traced(x), sizes(node)
        if x is None or traced is None or traced.batch or not all(size.isdigit() for size in shape[1:]):
            return None
        return self._unit_heads(node, x, traced, eps) or self._unit_channels(node, traced, eps)

    def _unit_heads(self, node: fx.Node, x: fx.Node, traced: Traced, eps: float) -> fx.Node | None:
        """Where rows are heads of channels: over the root of the sum over each head's channels.

        Adding up the channels of a head, and giving each of them the sum, are layers of zeros and ones.
        """
        heads = self._heads(x, traced, False)
        if heads is None or heads[0] is not traced.root:
            return None
        source, count, place, lead, starts, width = heads
        if starts != tuple(range(starts[0], starts[0] + count * width, width)):
            return None
        item = (count * width, *item_of(source)[1:])
        if item != item_of(source):
            source = self.put(aten.slice.Tensor, (source, 1, starts[0], starts[0] + item[0]), item, source)
        spreads, adds = (self._of_heads(count, width, dim) for dim in (0, 1))
        sums = self.put(aten.square.default, (source,), item, source)
        sums = self.put(pointwise, (sums, adds, None), (count, *item[1:]), source)
        norm = self.put(aten.sqrt.default, (sums,), (count, *item[1:]), source)
        norm = self.put(aten.clamp_min.default, (norm, eps), (count, *item[1:]), source)
        whole = self.put(pointwise, (norm, spreads, None), item, source)
        made = self.put(aten.div.Tensor, (source, whole), item, source)
        return self.heads_as(made, (count, place, lead), node)

    def _of_heads(self, count: int, width: int, dim: int) -> fx.Node:
        """Which channel is of which head, stored as ones: channels by heads, or the other way (``dim`` of channels)."""
        key = ("heads", count, width, dim)
        if key not in self.made:
            making, module = Making(), self.graph.owning_module
            assert module is not None
            ones = making.do(aten.repeat_interleave.self_int, making.do(aten.eye.default, count), width, dim)
            self.made[key] = keep(module, "heads", *making.done(ones))
        return self.made[key]

    def _unit_channels(self, node: fx.Node, traced: Traced, eps: float) -> fx.Node | None:
        """On maps whose channels these rows are."""
        shape = sizes(node)
        length = last_of(node)
        if traced.index.size != math.prod(int(size) for size in shape[1:]):
            return None
        found = spread(traced.index.reshape(-1, length))
        if found is None or (found.second < 0).any():
            return None
        rows = self.placed(traced, found, (1, length))
        channels = item_of(rows)[0]
        norm = self.put(map_norm, (rows,), (channels, 1, 1), rows)
        least = self.put(aten.clamp_min.default, (norm, eps), (channels, 1, 1), rows)
        made = self.put(aten.div.Tensor, (rows, least), item_of(rows), rows)
        return self.view(aten.reshape.default, made, shape_of(node))

    def _with_stored(self, source: fx.Node, numbers: fx.Node, index: Ints, kind: str, last: bool) -> fx.Node | None:
        """With stored numbers: one for each channel, or a map of them."""
        item = item_of(source)
        flat = index.reshape(-1, item[0]).T if last else index.reshape(item[0], -1)
        count = math.prod(numbers.meta["val"].shape)
        if (flat == flat[:, :1]).all() and np.array_equal(flat[:, 0], np.arange(item[0])) and count == item[0]:
            return self.put(per_channel, (source, numbers, kind), item, source)
        found = spread(flat)
        if found is None or kind not in ("add", "sub", "mul"):
            return None
        kept = self.stored(numbers, found, item[1:], source)
        target = {"add": aten.add.Tensor, "sub": aten.sub.Tensor, "mul": aten.mul.Tensor}[kind]
        return self.put(target, (source, kept), item, source)

    def _together(self, node: fx.Node) -> fx.Node | None:
        """Rows after rows, or features beside features."""
        parts: Any = node.args[0]
        dim = int(argument(node, 1, "dim", 0)) % len(sizes(node))
        last = len(sizes(node)) - 1
        if not isinstance(parts, (list, tuple)) or dim == 0:
            return None
        found_parts = [(part, traced) for part in parts if (traced := self.traced(part)) is not None]
        if not found_parts or any(traced.batch for _, traced in found_parts):
            return None
        like = found_parts[0][1].root
        made = []
        for part in parts:
            index = stored_index(part, part, like) if isinstance(part, fx.Node) else None
            if index is None:
                made.append(self.rows(part))
                continue
            found = spread(index.reshape(-1, last_of(part)).T)
            lead = [int(size) for size in sizes(part)[1:-1] if size.isdigit()]
            if found is None or len(lead) != last - 1:
                return None
            made.append(self.stored(root_of(part), found, size_of([1, *lead]), like))
        if any(part is None for part in made):
            return None
        items = [item_of(part) for part in made if part is not None]
        dims = {last: 1, last - 1: len(items[0])}
        if dim not in dims or (dim == last - 1 and dim == 0) or len(items[0]) < 2:
            return None
        if dim == last - 1 and any(item[:-1] != items[0][:-1] for item in items):
            return None
        item = list(items[0])
        item[dims[dim] - 1] = sum(one[dims[dim] - 1] for one in items)
        joined = self.put(aten.cat.default, (made, dims[dim]), tuple(item), like)
        return self.back(joined, node, found_parts[0][0])

    def _mean(self, node: fx.Node) -> fx.Node | None:
        """Over all tokens of each item."""
        x: Any = node.args[0]
        shape, given = sizes(x), argument(node, 1, "dim")
        dims = sorted(int(d) % len(shape) for d in given) if isinstance(given, (list, tuple)) else []
        source = None
        if dims == list(range(1, len(shape) - 1)):
            source = self.rows(x)
        elif dims == list(range(2, len(shape))):
            source = self.maps(x)
        if source is None or len(item_of(source)) < 2 or sizes(source)[0] != shape[0]:
            return None
        spatial = list(range(2, 1 + len(item_of(source))))
        made = self.put(aten.mean.dim, (source, spatial), item_of(source)[:1], source)
        return made if sizes(made) == sizes(node) else self.view(aten.reshape.default, made, shape_of(node))


def _operands(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if arg.op != "get_attr"]


def _sliced(node: fx.Node) -> fx.Node:
    """What a map is made of by taking some channels, rows or columns."""
    while node.target is aten.slice.Tensor and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
