"""Attention between views of maps as attention between the columns of maps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import fx

from mirrormask.runtime.graph.chains import sizes
from mirrormask.runtime.graph.functions import attend_maps
from mirrormask.runtime.graph.making import keep
from mirrormask.runtime.graph.placing import Placing, item_of, shape_of
from mirrormask.runtime.graph.scores import Scores
from mirrormask.runtime.graph.traces import Spread, Traced, spread

__all__ = ["Attending"]

aten = torch.ops.aten


class Attending(Placing):
    """Finds the heads of queries, keys and values."""

    def attention(self, node: fx.Node, scores: Scores) -> fx.Node | None:
        """The attention that ends in an operation, as one of maps; None where its parts are no such views."""
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
        if width != k_width or item_of(k)[1:] != item_of(v)[1:] or item_of(q)[1] != item_of(k)[1]:
            return None
        rows, queries, keys = item_of(q)[1], item_of(q)[2], item_of(k)[2]
        bias = scores.bias_of(lead, place, (rows, count, queries, keys))
        if bias is None:
            return None
        kept = None
        if bias[1] is not None:
            assert node.graph.owning_module is not None
            kept = keep(node.graph.owning_module, "bias", *bias)
            kept = kept if bias[0].numel() else None
        if scores.gain is not None:
            given = self._gained(q, scores.gain, (len(lead), place), (count, width))
            if given is None:
                return None
            q = given
        scale = scores.scale if scores.scale is not None else width**-0.5
        item = (count * v_width, rows, queries)
        made = self.put(
            attend_maps,
            (q, k, v, kept, (q_starts, k_starts, v_starts), (width, v_width), float(scale), scores.causal),
            item,
            q,
        )
        made.meta |= {name: value for name, value in node.meta.items() if name == "nn_module_stack"}
        return self.heads_as(made, (count, place, lead), node)

    def heads_as(self, made: fx.Node, heads: tuple[int, int, list[int]], node: fx.Node) -> fx.Node:
        """A map ``[batch, heads * width, rows, columns]`` as what has leading dimensions: how many heads, which counts
        them, and all of an item."""  # fmt: skip
        count, place, lead = heads
        others = [size for i, size in enumerate(lead) if i != place]
        width, columns = item_of(made)[0] // count, item_of(made)[2]
        wide = self.view(aten.reshape.default, made, [-1, count, width, *others, columns])
        order = list(range(3, 3 + len(others)))
        order.insert(place, 1)
        moved = self.view(aten.permute.default, wide, [0, *order, 3 + len(others), 2])
        return self.view(aten.reshape.default, moved, shape_of(node))

    def _gained(self, query: fx.Node, gain: fx.Node, dims: tuple[int, int], heads: tuple[int, int]) -> fx.Node | None:
        """A query times one stored number for each head; None where there are others.

        Args:
            dims: how many leading dimensions the scores have, and which counts heads.
            heads: how many there are, and the features of one: all channels of the query.
        """
        (rank, place), (count, width), shape = dims, heads, tuple(gain.meta["val"].shape)
        aligned = (1,) * (rank + 2 - len(shape)) + shape
        others = [size for i, size in enumerate(aligned) if i != place]
        if item_of(query)[0] != count * width or any(size != 1 for size in others):
            return None
        if place >= 0 and aligned[place] not in (1, count):
            return None
        step = 1 if place >= 0 and aligned[place] > 1 else 0
        first = np.repeat(np.arange(count) * step, width)
        kept = self.stored(gain, Spread(first, np.zeros(1, np.int64)), (1, 1), query)
        return self.put(aten.mul.Tensor, (query, kept), item_of(query), query)

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
