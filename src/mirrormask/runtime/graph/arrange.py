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
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import argument
from mirrormask.runtime.graph.chains import is_move, root_of, sizes
from mirrormask.runtime.graph.convert import CONVERTERS, writes_in_place
from mirrormask.runtime.graph.functions import (
    arrange,
    attend_maps,
    channel_norm,
    per_channel,
    pointwise,
    response,
    spaced_conv,
    stored,
)
from mirrormask.runtime.graph.pointwise import ACTIVATIONS, KINDS
from mirrormask.runtime.graph.scores import Scores, scores_of
from mirrormask.runtime.graph.traces import Ints, Spread, Traced, spread, stored_index, trace

__all__ = ["CONVOLUTIONS", "tokens_as_maps"]

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    pointwise,
    spaced_conv,
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
    if not any(node.target in CONVOLUTIONS for node in graph.nodes):
        return
    if any(writes_in_place(node) for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)):
        return
    work = _Work(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor) and not is_move(node):
            work.visit(node)
    graph.eliminate_dead_code()
    graph.lint()


class _Work:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.known: dict[str, tuple[Ints, int] | None] = {}
        self.native: set[fx.Node] = set()
        """What is made of convolutions' maps, channels first."""
        self.made: dict[Any, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Rewrite an operation, or note that its result is a map."""
        with self.graph.inserting_before(node):
            found = self._rewritten(node)
        if found is not None:
            node.replace_all_uses_with(found)
        elif node.target in CONVOLUTIONS:
            self.native.add(node)
        elif node.target in CONVERTERS or node.target is channel_norm:
            operands = [arg for arg in node.all_input_nodes if arg.op != "get_attr"]
            if operands and all(arg in self.native for arg in operands):
                self.native.add(node)

    def _rewritten(self, node: fx.Node) -> fx.Node | None:
        scores = scores_of(node)
        if scores is not None:
            return self._attention(node, scores)
        if not any(root_of(arg) in self.native and is_move(arg) for arg in _operands(node)):
            return None
        target = node.target
        if target is aten.linear.default:
            return self._linear(node)
        if target is aten.layer_norm.default:
            return self._norm(node)
        if target in ON_MAPS:
            return self._on_maps(node)
        if target in ACTIVATIONS:
            return self._each(node)
        if target is response and node.args[2]:
            return self._response(node)
        if target in KINDS:
            return self._arithmetic(node)
        if target is aten.cat.default:
            return self._together(node)
        if target is aten.mean.dim:
            return self._mean(node)
        return None

    # -- views as places --------------------------------------------------------------------------------------------

    def traced(self, node: Any) -> Traced | None:
        """Of which map a value is made, if it is one."""
        if not isinstance(node, fx.Node) or root_of(node) not in self.native:
            return None
        return trace(node, self.known)

    def placed(self, traced: Traced, found: Spread, size: tuple[int, ...]) -> fx.Node:
        """The map of these places: the root itself, if it is that."""
        root = traced.root
        if found.is_all(traced) and tuple(root.meta["val"].shape[2:]) == size:
            return root
        if found.is_all(traced) and not size:
            flat = self.view(aten.flatten.using_ints, root, 1)
            self.native.add(flat)
            return flat
        key = (root, found.first.tobytes(), found.second.tobytes(), size)
        if key not in self.made:
            first, second = tuple(found.first.tolist()), tuple(found.second.tolist())
            self.made[key] = self.put(arrange, (root, first, second, size), (len(first), *size), root)
        return self.made[key]

    def put(self, target: Any, args: tuple[Any, ...], item: tuple[int, ...], like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new map with items of this shape."""
        made = self.graph.call_function(target, args, kwargs)
        value = like.meta["val"]
        made.meta = {"val": value.new_empty((value.shape[0], *item))}
        self.native.add(made)
        return made

    def rows(self, node: Any) -> fx.Node | None:
        """A view whose last dimension is that of rows, as a map whose channels are these."""
        traced = self.traced(node)
        if traced is None:
            return None
        lead = traced.lead(node)
        if lead is None:
            return None
        found = spread(traced.index.reshape(-1, _last(node)).T)
        return None if found is None else self.placed(traced, found, _size(lead))

    def maps(self, node: Any) -> fx.Node | None:
        """A view as the map whose channels are its second dimension."""
        traced, shape = self.traced(node), sizes(node)
        if traced is None or traced.batch or not 2 <= len(shape) <= 4 or not all(size.isdigit() for size in shape[1:]):
            return None
        item = [int(size) for size in shape[1:]]
        if math.prod(item) != traced.index.size:
            return None
        found = spread(traced.index.reshape(item[0], -1))
        return None if found is None else self.placed(traced, found, tuple(item[1:]))

    def back(self, made: fx.Node, node: fx.Node, source: Any) -> fx.Node:
        """A map with channels first as ``node`` has its rows, whose batch is where that of ``source`` is."""
        shape, dims = sizes(node), len(sizes(made))
        traced = self.traced(source)
        assert traced is not None
        last = made
        if dims > 2:
            last = self.view(aten.permute.default, made, [0, *range(2, dims), 1])
        if traced.batch:
            lead = traced.lead(node) or [1]
            wide = self.view(aten.reshape.default, last, [-1, *lead, _last(node)])
            last = self.view(aten.transpose.int, wide, 0, 1)
            if traced.batch == 1:
                return last
        return last if sizes(last) == shape else self.view(aten.reshape.default, last, _shape(node))

    def view(self, target: Any, node: fx.Node, *args: Any) -> fx.Node:
        made = self.graph.call_function(target, (node, *args))
        made.meta = {"val": target(node.meta["val"], *args)}
        return made

    # -- operations -------------------------------------------------------------------------------------------------

    def _linear(self, node: fx.Node) -> fx.Node | None:
        x, weight, bias = node.args[0], node.args[1], argument(node, 2, "bias")
        if not isinstance(weight, fx.Node) or weight.op != "get_attr":
            return None
        rows = self.rows(x)
        if rows is None:
            return None
        item = (_last(node), *_item(rows)[1:])
        if len(item) == 1:
            made = self.put(aten.linear.default, (rows, weight, bias), item, rows)
        else:
            made = self.put(pointwise, (rows, weight, bias), item, rows)
        self._named(made, node)
        return self.back(made, node, x)

    def _norm(self, node: fx.Node) -> fx.Node | None:
        rows = self.rows(node.args[0]) if len(node.args[1]) == 1 else None  # type: ignore[arg-type]
        if rows is None:
            return None
        weight, bias, eps = (argument(node, i, n) for i, n in ((2, "weight"), (3, "bias"), (4, "eps")))
        eps = 1e-5 if eps is None else eps
        if len(_item(rows)) == 1:
            made = self.put(aten.layer_norm.default, (rows, node.args[1], weight, bias, eps), _item(rows), rows)
        else:
            made = self.put(channel_norm, (rows, weight, bias, eps), _item(rows), rows)
        self._named(made, node)
        return self.back(made, node, node.args[0])

    def _response(self, node: fx.Node) -> fx.Node | None:
        rows = self.rows(node.args[0])
        if rows is None or len(_item(rows)) != 3 or sizes(node.args[0])[0] != sizes(rows)[0]:  # type: ignore[arg-type]
            return None
        made = self.put(response, (rows, node.args[1], False), _item(rows), rows)
        return self.back(made, node, node.args[0])

    def _on_maps(self, node: fx.Node) -> fx.Node | None:
        x: Any = node.args[0]
        by_rows = node.target is aten.batch_norm.default and len(sizes(x)) == 2
        source = self.rows(x) if by_rows else self.maps(x)
        if source is None or (len(sizes(source)) < 3 and node.target is aten.batch_norm.default):
            return None
        item = _item(source) if by_rows else tuple(int(size) for size in sizes(node)[1:])
        made = self.put(node.target, (source, *node.args[1:]), item, source, **dict(node.kwargs))
        self._named(made, node)
        return self.back(made, node, x) if by_rows else made

    def _each(self, node: fx.Node) -> fx.Node | None:
        """A function of each number: on the map, if the view only gives it another shape."""
        found = self._form(node.args[0])
        if found is None:
            return None
        source, last = found
        made = self.put(node.target, (source, *node.args[1:]), _item(source), source, **dict(node.kwargs))
        return self.back(made, node, node.args[0]) if last else made

    def _form(self, node: Any) -> tuple[fx.Node, bool] | None:
        """A view as a map with the channels of its root, and whether they are its last dimension."""
        traced = self.traced(node)
        if traced is None:
            return None
        lead = traced.lead(node)
        if lead is not None:
            found = spread(traced.index.reshape(-1, _last(node)).T)
            if found is not None and found.keeps_channels(traced):
                return self.placed(traced, found, _size(lead)), True
        shape = sizes(node)
        if not traced.batch and 2 <= len(shape) <= 4 and all(size.isdigit() for size in shape[1:]):
            item = [int(size) for size in shape[1:]]
            found = spread(traced.index.reshape(item[0], -1)) if math.prod(item) == traced.index.size else None
            if found is not None and found.keeps_channels(traced):
                return self.placed(traced, found, tuple(item[1:])), False
        return None

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
        found = self._form(a)
        if found is None or not isinstance(b, fx.Node) or sizes(a) != sizes(node):
            return None
        source, last = found
        item = _item(source)
        one, two = self.traced(a), self.traced(b)
        assert one is not None
        index = None if one.batch else stored_index(b, node, source)
        if index is not None:
            with_stored = self._with_stored(source, root_of(b), index, kind, last)
            return None if with_stored is None else (self.back(with_stored, node, a) if last else with_stored)
        other = None
        if two is not None and two.batch == one.batch and sizes(b) == sizes(node):
            other = self.rows(b) if last else self.maps(b)
        if other is None or _item(other) != item or kind not in ("add", "sub", "mul", "div", "rsub"):
            return None
        pair = (other, source) if kind == "rsub" else (source, other)
        target = aten.sub.Tensor if kind == "rsub" else node.target
        made = self.put(target, pair, item, source)
        return self.back(made, node, a) if last else made

    def _with_stored(self, source: fx.Node, numbers: fx.Node, index: Ints, kind: str, last: bool) -> fx.Node | None:
        """With stored numbers: one for each channel, or a map of them."""
        item = _item(source)
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

    def stored(self, numbers: fx.Node, found: Spread, size: tuple[int, ...], like: fx.Node) -> fx.Node:
        first, second = tuple(found.first.tolist()), tuple(found.second.tolist())
        return self.put(stored, (like, numbers, first, second, size), (len(first), *size), like)

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
            found = spread(index.reshape(-1, _last(part)).T)
            lead = [int(size) for size in sizes(part)[1:-1] if size.isdigit()]
            if found is None or len(lead) != last - 1:
                return None
            made.append(self.stored(root_of(part), found, _size([1, *lead]), like))
        if any(part is None for part in made):
            return None
        items = [_item(part) for part in made if part is not None]
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
        if source is None or len(_item(source)) < 2 or sizes(source)[0] != shape[0]:
            return None
        spatial = list(range(2, 1 + len(_item(source))))
        made = self.put(aten.mean.dim, (source, spatial), _item(source)[:1], source)
        return made if sizes(made) == sizes(node) else self.view(aten.reshape.default, made, _shape(node))

    def _attention(self, node: fx.Node, scores: Scores) -> fx.Node | None:
        heads = []
        for part in (scores.query, scores.key, scores.value):
            traced = self.traced(part)
            if traced is None or traced.batch:
                return None
            found = self._heads(part, traced, scores.swapped and part is scores.key)
            if found is None:
                return None
            heads.append(found)
        count, place, lead = heads[0][1:4]
        if any(one[1:4] != (count, place, lead) for one in heads[1:]):
            return None
        (q, _, _, _, q_starts, width), (k, *_, k_starts, k_width), (v, *_, v_starts, v_width) = heads
        if width != k_width or _item(k)[1:] != _item(v)[1:] or _item(q)[1] != _item(k)[1]:
            return None
        rows, queries, keys = _item(q)[1], _item(q)[2], _item(k)[2]
        bias = scores.bias_of(lead, place, (rows, count, queries, keys))
        if bias is None:
            return None
        kept = None
        if bias.numel():
            kept = _registered(node.graph, bias)
        scale = scores.scale if scores.scale is not None else width**-0.5
        item = (count * v_width, rows, queries)
        made = self.put(
            attend_maps,
            (q, k, v, kept, (q_starts, k_starts, v_starts), (width, v_width), float(scale), scores.causal),
            item,
            q,
        )
        made.meta |= {name: value for name, value in node.meta.items() if name == "nn_module_stack"}
        # [batch, heads * width, rows, queries] as the scores have their leading dimensions
        others = [size for i, size in enumerate(lead) if i != place]
        wide = self.view(aten.reshape.default, made, [-1, count, v_width, *others, queries])
        order = list(range(3, 3 + len(others)))
        order.insert(place, 1)
        moved = self.view(aten.permute.default, wide, [0, *order, 3 + len(others), 2])
        return self.view(aten.reshape.default, moved, _shape(node))

    def _heads(self, part: fx.Node, traced: Traced, swapped: bool) -> tuple[Any, ...] | None:
        """The map of a query (or key, or value), its heads, which leading dimension they are, those of an item, the
        first channel of each head, and the features of one."""  # fmt: skip
        shape = [int(size) if size.isdigit() else 0 for size in sizes(part)]
        if len(shape) < 3 or 0 in shape[1:]:
            return None
        first = traced.index.size // math.prod(shape[1:])
        lead = [first, *shape[1:-2]]
        index = traced.index.reshape(*lead, *shape[-2:])
        index = index.swapaxes(-1, -2) if swapped else index
        length, width = index.shape[-2:]
        each = math.prod(traced.size)
        for place in (*range(len(lead) - 1, -1, -1), -1):
            whole = index[None] if place == -1 else np.moveaxis(index, place, 0)
            count = whole.shape[0]
            flat = whole.reshape(count, -1, length, width)
            found = spread(flat.transpose(0, 3, 1, 2).reshape(count * width, -1))
            if found is None or (found.second < 0).any():
                continue
            if place == -1 and len(lead) > 1:
                continue
            size = (flat.shape[1], length)
            starts = found.first.reshape(count, width)
            plain = np.array_equal(starts - starts[:, :1], np.broadcast_to(np.arange(width) * each, starts.shape))
            all_of_it = np.array_equal(found.second - found.second[0], np.arange(each)) and traced.size == size
            if plain and all_of_it and int(found.second[0]) % each == 0 and len(sizes(traced.root)) == 4:
                begin = found.second[0] // each + starts[:, 0] // each
                return traced.root, count, place, lead, tuple(begin.tolist()), width
            made = self.placed(traced, found, size)
            return made, count, place, lead, tuple(range(0, count * width, width)), width
        return None

    def _named(self, made: fx.Node, node: fx.Node) -> None:
        made.meta |= {name: value for name, value in node.meta.items() if name == "nn_module_stack"}


def _operands(node: fx.Node) -> list[fx.Node]:
    return [arg for arg in node.all_input_nodes if arg.op != "get_attr"]


def _item(node: fx.Node) -> tuple[int, ...]:
    return tuple(int(size) for size in sizes(node)[1:])


def _last(node: fx.Node) -> int:
    return int(sizes(node)[-1])


def _shape(node: fx.Node) -> list[int]:
    """The shape of a node, its first size as what remains."""
    return [-1, *(int(size) for size in sizes(node)[1:])]


def _size(lead: list[int]) -> tuple[int, ...]:
    """Rows and columns for the leading dimensions of an item; none for a single row."""
    if lead == [1]:
        return ()
    return (math.prod(lead[:-1]), lead[-1])


def _registered(graph: fx.Graph, value: Tensor) -> fx.Node:
    """A new stored tensor."""
    module = graph.owning_module
    assert module is not None
    number = sum(1 for name, _ in module.named_buffers() if name.startswith("_bias_"))
    name = f"_bias_{number}"
    module.register_buffer(name, value)
    made = graph.get_attr(name)
    made.meta["val"] = value
    return made
