"""Operations on the heads of rows as operations on the rows: rotary embeddings, and what else comes before attention.

A layer gives ``[batch, length, features]``, which a model sees as ``[batch, heads, length, width]``. What works there
number by number, with tables of positions or on halves of a head, works on the features of each token alone. Said so,
it belongs to the region that the layers are in: tables are rows as others are, halves are features in another order.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import argument
from mirrormask.runtime.graph.chains import Known, came_from, is_move, sizes, sources
from mirrormask.runtime.graph.convert import ROW_OPERATIONS
from mirrormask.runtime.graph.functions import features, product
from mirrormask.runtime.graph.pointwise import ACTIVATIONS, ARITHMETIC

__all__ = ["Heads"]

aten = torch.ops.aten
LAYERS = {aten.linear.default, aten.matmul.default, product}
#: What is made of all numbers of a head.
OF_A_HEAD = {aten.layer_norm.default, aten.rms_norm.default, aten.softmax.int}
#: How many heads are taken one after the other.
MOST_HEADS = 256
#: How many features a head may be seen to have: their order is written down.
MOST = 1 << 15


@dataclass(frozen=True)
class Seen:
    """A tensor as rows.

    Attributes:
        rows: ``[batch, length, features]``.
        places: which dimensions of the tensor count batch and length.
        order: of the other dimensions, the feature of each number.
        signs: what each is multiplied with, 1 or -1.
    """

    rows: fx.Node
    places: tuple[int, int]
    order: np.ndarray[Any, Any]
    signs: np.ndarray[Any, Any]


class Heads:
    """The rewriting of one program.

    Attributes:
        known: what is known of chains of views.
        leading: the (batch, length) of layers: other rows are tables, or no rows at all.
    """

    def __init__(self, graph: fx.Graph, known: Known) -> None:
        self.known = known
        self.leading = {sizes(node)[:-1] for node in graph.nodes if node.target in LAYERS and len(sizes(node)) == 3}
        self._tables: dict[tuple[fx.Node, tuple[int, int]], fx.Node] = {}

    def on_rows(self, node: fx.Node) -> bool:
        """Replace an operation on views of rows by one on these rows, if it is one; whether it is."""
        value = node.meta["val"]
        if node.target in OF_A_HEAD:
            return self._of_each(node)
        cat = node.target is aten.cat.default
        if not (cat or node.target in ACTIVATIONS or node.target in ARITHMETIC) or value.dtype != torch.float32:
            return False
        given: Any = node.args[0] if cat else node.args[:2]
        parts = [part for part in given if isinstance(part, fx.Node)] if isinstance(given, (list, tuple)) else []
        if not any(is_move(part) for part in parts) or value.dim() < 3:
            return False
        seen = [self._seen(part) if cat or sizes(part) == sizes(node) else None for part in parts]
        first = next((one for one in seen if one is not None), None)
        if first is None or any(one is not None and one.places != first.places for one in seen):
            return False
        rest = [size for i, size in enumerate(sizes(node)) if i not in first.places]
        if not all(size.isdigit() for size in rest):
            return False
        with node.graph.inserting_before(node):
            made = _joined(node, seen) if cat else self._each(node, parts, seen, first)
            if made is None:
                return False
            last = _back(made, first.places, [int(size) for size in rest])
        made.meta |= {name: kept for name, kept in node.meta.items() if name == "nn_module_stack"}
        node.replace_all_uses_with(last)
        return True

    def _seen(self, node: fx.Node) -> Seen | None:
        """A tensor as the rows that it is a view of; with a sign, where these are others with another sign."""
        found = None
        for source in (node, *sources(node)):
            shape = sizes(source)
            if source.target not in ROW_OPERATIONS or source.meta["val"].dtype != torch.float32:
                continue
            if len(shape) == 3 and shape[:2] in self.leading and shape[2].isdigit():
                found = _places(node, source, self.known) or found
        if found is None or found.order.size > MOST:
            return None
        rows = found.rows
        if rows.target is aten.neg.default and isinstance(rows.args[0], fx.Node):
            found = Seen(rows.args[0], found.places, found.order, -found.signs)
            rows = found.rows
        if rows.target is features:
            taken, order, signs = rows.args
            assert isinstance(taken, fx.Node)
            whole = np.array(order), np.array(signs or [1.0] * len(order))  # type: ignore[arg-type]
            found = Seen(taken, found.places, whole[0][found.order], whole[1][found.order] * found.signs)
        return found

    def _each(self, node: fx.Node, parts: list[fx.Node], seen: list[Seen | None], first: Seen) -> fx.Node | None:
        """Number by number."""
        args = list(node.args)
        for i, arg in enumerate(args[:2]):
            if isinstance(arg, fx.Node):
                one = seen[parts.index(arg)]
                rows = _taken(one) if one is not None else self._table(arg, node, first)
                if rows is None:
                    return None
                args[i] = rows
        target: Any = node.target
        made = node.graph.call_function(target, tuple(args), dict(node.kwargs))
        like = next(arg for arg in args if isinstance(arg, fx.Node)).meta["val"]
        made.meta["val"] = like.new_empty(like.shape)
        return made

    def _of_each(self, node: fx.Node) -> bool:
        """Replace what is done to the numbers of each head, a norm or softmax, by that for one head after the other."""
        x = node.args[0]
        if not isinstance(x, fx.Node) or not is_move(x) or not self._of_the_last(node):
            return False
        seen, last = self._seen(x), len(sizes(x)) - 1
        rest = [size for i, size in enumerate(sizes(x)) if seen is None or i not in seen.places]
        if seen is None or last in seen.places or not all(size.isdigit() for size in rest):
            return False
        orders, signs = (part.reshape(-1, int(rest[-1])) for part in (seen.order, seen.signs))
        if len(orders) > MOST_HEADS:
            return False
        with node.graph.inserting_before(node):
            made = []
            for order, sign in zip(orders, signs, strict=True):
                taken = _taken(Seen(seen.rows, seen.places, order, sign))
                made.append(node.graph.call_function(node.target, (taken, *node.args[1:]), dict(node.kwargs)))  # type: ignore[arg-type]
                value = taken.meta["val"]
                made[-1].meta |= node.meta | {"val": value.new_empty(value.shape)}
            whole = made[0] if len(made) == 1 else _put(aten.cat.default, made, -1)
            back = _back(whole, seen.places, [int(size) for size in rest])
        node.replace_all_uses_with(back)
        return True

    def _of_the_last(self, node: fx.Node) -> bool:
        """Whether an operation is over the last dimension alone, and makes the same type."""
        if node.target in (aten.layer_norm.default, aten.rms_norm.default):
            return len(argument(node, 1, "normalized_shape")) == 1
        rank = len(sizes(node))
        return int(argument(node, 1, "dim")) % rank == rank - 1 and argument(node, 2, "dtype") in (None, torch.float32)

    def _table(self, table: fx.Node, node: fx.Node, like: Seen) -> fx.Node | None:
        """What all heads, or all of a batch, have in common as rows: repeated to the batch outside of a region, and to
        heads inside."""  # fmt: skip
        value, whole = table.meta.get("val"), sizes(node)
        if not isinstance(value, Tensor) or value.dtype != torch.float32 or value.dim() > len(whole):
            return None
        own = (*["1"] * (len(whole) - value.dim()), *sizes(table))
        rest = [i for i in range(len(whole)) if i not in like.places]
        repeats = all(one in ("1", wanted) for one, wanted in zip(own, whole, strict=True))
        if not repeats or not all(own[i].isdigit() for i in rest):
            return None
        made = self._tables.get((table, like.places))
        if made is None:
            made = _as_rows(table, own, like, rest)
            if made is None:
                return None
            self._tables[table, like.places] = made
        few, many = ([int(of[i]) for i in rest] for of in (own, whole))
        index = np.broadcast_to(np.arange(math.prod(few)).reshape(few), many).reshape(-1)
        return _taken(Seen(made, like.places, index, np.ones(index.size)))


def _as_rows(table: fx.Node, own: tuple[str, ...], like: Seen, rest: list[int]) -> fx.Node | None:
    """``[batch, length, features]`` of a tensor that may have ones for batch and length."""
    shape: list[Any] = [-1] * len(own)
    for place, size in zip(like.places, like.rows.meta["val"].shape, strict=False):
        if own[place] == "1":
            shape[place] = _size(table.graph, size)
            if shape[place] is None:
                return None
    made = table
    for _ in range(len(own) - len(sizes(table))):
        made = _put(aten.unsqueeze.default, made, 0)
    if any(size != -1 for size in shape):
        made = _put(aten.expand.default, made, shape)
    order = [*like.places, *rest]
    if order != sorted(order):
        made = _put(aten.permute.default, made, order)
    return _put(aten.flatten.using_ints, made, 2) if len(rest) > 1 else made


def _size(graph: fx.Graph, size: Any) -> Any:
    """A size as an argument: that of an input, where it is left open."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    for node in graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or not isinstance(value, Tensor):
            continue
        for dim, one in enumerate(value.shape):
            if isinstance(one, torch.SymInt) and one.node.expr == size.node.expr:
                for user in node.users:
                    if user.target is aten.sym_size.int and user.args[1] == dim:
                        return user
                last = next(n for n in reversed(graph.nodes) if n.op == "placeholder")
                with graph.inserting_after(last):
                    made = graph.call_function(aten.sym_size.int, (node, dim))
                made.meta["val"] = one
                return made
    return None


def _back(made: fx.Node, places: tuple[int, int], rest: list[int]) -> fx.Node:
    """Rows as the tensor that an operation on their heads makes."""
    wide = _put(aten.unflatten.int, made, -1, rest) if len(rest) > 1 else made
    order = [*places, *(i for i in range(2 + len(rest)) if i not in places)]
    back = [order.index(i) for i in range(len(order))]
    return wide if back == sorted(back) else _put(aten.permute.default, wide, back)


def _put(target: Any, *args: Any) -> fx.Node:
    first: Any = args[0][0] if isinstance(args[0], list) else args[0]
    made: fx.Node = first.graph.call_function(target, args)
    made.meta["val"] = target(*fx.map_arg(args, lambda arg: arg.meta["val"]))
    return made


def _places(node: fx.Node, source: fx.Node, known: Known) -> Seen | None:
    """How a view shows the rows of ``source``, if every token's numbers are its own, and of the same features."""
    tried = came_from(node, source, known) if node is not source else _itself(source)
    shape, wanted = sizes(node), sizes(source)
    for batch, length in ((b, n) for b in range(len(shape)) for n in range(len(shape)) if b != n):
        if (shape[batch], shape[length]) != wanted[:2]:
            continue
        orders = [_order(index, one, batch, length) for one, index in tried or []]
        if orders and orders[0] is not None and all(o is not None and np.array_equal(o, orders[0]) for o in orders):
            return Seen(source, (batch, length), orders[0], np.ones(orders[0].size))
    return None


def _itself(source: fx.Node) -> list[tuple[tuple[int, ...], Tensor]]:
    shape = (2, 3, int(sizes(source)[2]))
    return [(shape, torch.arange(math.prod(shape), dtype=torch.int32).reshape(shape))]


def _order(index: Tensor, shape: tuple[int, ...], batch: int, length: int) -> np.ndarray[Any, Any] | None:
    if (index.shape[batch], index.shape[length]) != shape[:2]:
        return None
    tokens = index.movedim((batch, length), (0, 1)).reshape(shape[0], shape[1], -1)
    first = torch.arange(shape[0] * shape[1], dtype=index.dtype).reshape(*shape[:2], 1) * shape[2]
    order = tokens[:1, :1]
    if int(order.min()) < 0 or int(order.max()) >= shape[2] or not torch.equal(tokens, first + order):
        return None
    found: np.ndarray[Any, Any] = order.reshape(-1).numpy().astype(np.int64)
    return found


def _taken(seen: Seen) -> fx.Node:
    """The rows with their features in the order of a view."""
    count = int(sizes(seen.rows)[2])
    plain = bool((seen.signs > 0).all())
    if plain and np.array_equal(seen.order, np.arange(count)):
        return seen.rows
    order, signs = tuple(seen.order.tolist()), () if plain else tuple(seen.signs.tolist())
    for user in seen.rows.users:  # as another layer has it already
        if user.target is features and user.args[1:] == (order, signs):
            return user
    made = seen.rows.graph.call_function(features, (seen.rows, order, signs))
    value = seen.rows.meta["val"]
    made.meta["val"] = value.new_empty((*value.shape[:2], len(order)))
    return made


def _joined(node: fx.Node, seen: list[Seen | None]) -> fx.Node | None:
    """Parts of heads put together: features of the same rows in another order."""
    dim = int(argument(node, 1, "dim", 0)) % len(sizes(node))
    given: Any = node.args[0]
    found = [one for one in seen if one is not None]
    if len(found) != len(given) or dim in found[0].places:
        return None
    roots = list(dict.fromkeys(one.rows for one in found))
    starts = dict(zip(roots, np.cumsum([0, *(int(sizes(root)[2]) for root in roots)]), strict=False))
    axis = sum(1 for i in range(dim) if i not in found[0].places)
    orders, signs = [], []
    for part, one in zip(given, found, strict=True):
        rest = [int(size) for i, size in enumerate(sizes(part)) if i not in one.places]
        orders.append((one.order + starts[one.rows]).reshape(rest))
        signs.append(one.signs.reshape(rest))
    whole = roots[0] if len(roots) == 1 else _put(aten.cat.default, roots, -1)
    order, sign = (np.concatenate(part, axis).reshape(-1) for part in (orders, signs))
    return _taken(Seen(whole, found[0].places, order, sign))
