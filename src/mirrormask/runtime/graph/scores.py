"""Attention in a captured program, by name or written out: the query, key and value, and what becomes of the scores.

Written out it is ``matmul(softmax(f(matmul(q, k^T))), v)``, where ``f`` multiplies by numbers, adds stored tensors and
changes shapes. What ``f`` adds is found by trying it out on zeros.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import argument
from mirrormask.runtime.graph.chains import (
    MOVES,
    concrete,
    is_move,
    root_of,
    sizes,
    steps_from,
    symbols,
)
from mirrormask.runtime.graph.functions import compact
from mirrormask.runtime.graph.making import Made, Making
from mirrormask.runtime.graph.program import Unstorable

__all__ = ["SOFTMAX", "Scores", "scores_of"]

aten = torch.ops.aten
PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.einsum.default}
SOFTMAX = {aten.softmax.int, aten._softmax.default}
AFFINE = {aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor}
#: What scores go through before their softmax; a view may have to copy.
KNOWN = {one: one for one in (*MOVES, *AFFINE, operator.getitem)} | {aten.view.default: aten.reshape.default}


@dataclass(frozen=True)
class Scores:
    """Attention between views.

    Attributes:
        swapped: whether the key's last two dimensions are exchanged.
        scale: of the scores; ``None`` for one over the root of the width.
        steps: what adds stored tensors to the scores, from the first operation to the last, if it is written out.
        first: the scores before.
        mask: a stored mask of attention by name.
        gain: stored numbers that the scores are multiplied with, one for each head.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    swapped: bool
    scale: float | None
    causal: bool
    steps: tuple[fx.Node, ...] = ()
    first: fx.Node | None = None
    mask: fx.Node | None = None
    gain: fx.Node | None = None

    def bias_of(
        self, lead: list[int], place: int, shape: tuple[int, int, int, int]
    ) -> tuple[Tensor, Made | None] | None:
        """What is added to the scores, ``[rows or 1, heads or 1, queries, keys]``, and how it is made; empty for
        nothing, None where it cannot be found.

        Args:
            lead: the leading dimensions of the scores of an item, of which ``place`` counts heads (-1 for one head).
            shape: rows, heads, queries and keys.
        """  # fmt: skip
        rows, heads, queries, keys = shape
        making = Making()
        try:
            whole = making.do(aten.zeros.default, [*lead, queries, keys])
            if self.mask is not None:
                found = making.do(aten.add.Tensor, whole, _masked(making, self.mask))
            elif self.steps and self.first is not None:
                found = _tried(making, self.steps, self.first, [*lead, queries, keys])
            else:
                return torch.zeros(0), None
            if found.meta["val"].shape != whole.meta["val"].shape:
                return None
            moved = (aten.unsqueeze.default, -3) if place == -1 else (aten.movedim.int, place, -3)
            found = making.do(moved[0], found, *moved[1:])
            found = making.do(aten.reshape.default, found, [rows, heads, queries, keys])
            return making.done(making.do(compact, found))
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, Unstorable):
            return None


def scores_of(node: fx.Node) -> Scores | None:
    """Attention that ends in this operation."""
    if node.target is aten.scaled_dot_product_attention.default:
        return _by_name(node)
    value = _second(node, transposed=False)
    if value is None:
        return None
    powers, v, _ = value
    if not isinstance(powers, fx.Node) or powers.target not in SOFTMAX or not isinstance(v, fx.Node):
        return None
    last = len(sizes(powers)) - 1
    if int(argument(powers, 1, "dim")) % (last + 1) != last or argument(powers, 2, "dtype") not in (
        None,
        torch.float32,
        False,
    ):
        return None
    steps: list[fx.Node] = []
    scale: float = 1.0
    gain: fx.Node | None = None
    at: Any = powers.args[0]
    while isinstance(at, fx.Node) and at.target not in PRODUCTS:
        if len(at.users) != 1 or not (is_move(at) or at.target in AFFINE):
            return None
        number: Any = at.args[1] if at.target in (aten.mul.Tensor, aten.div.Tensor) else None
        if isinstance(number, (int, float)):
            if number == 0:
                return None
            scale *= float(number) if at.target is aten.mul.Tensor else 1.0 / float(number)
        elif number is not None:
            # Scores times stored numbers, each for all pairs of a head.
            if gain is not None or not _each_head(at):
                return None
            gain = number
        steps.append(at)
        at = _stream(at)
    product = _second(at, transposed=True) if isinstance(at, fx.Node) else None
    if product is None or not isinstance(at, fx.Node) or len(at.users) != 1:
        return None
    q, k, swapped = product
    (q, a), (k, b) = _peeled(q), _peeled(k)
    if len(sizes(q)) != len(sizes(k)) or len(sizes(q)) != len(sizes(v)) or len(sizes(q)) < 3:
        return None
    adds = any(step.target in (aten.add.Tensor, aten.sub.Tensor) for step in steps)
    return Scores(q, k, v, swapped, scale * a * b, False, tuple(reversed(steps)) if adds else (), at, gain=gain)


def _each_head(node: fx.Node) -> bool:
    """Whether an operation multiplies by one stored number for each of the leading dimensions."""
    numbers = node.args[1]
    if node.target is not aten.mul.Tensor or not isinstance(numbers, fx.Node) or numbers.op != "get_attr":
        return False
    shape = tuple(numbers.meta["val"].shape)
    return shape[-2:] in ((), (1,), (1, 1)) and len(shape) <= len(sizes(node))


def _by_name(node: fx.Node) -> Scores | None:
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **dict(node.kwargs)}
    parts = [given.get(name) for name in names[:3]]
    if given.get("dropout_p", 0.0) != 0.0 or given.get("enable_gqa"):
        return None
    mask, scale = given.get("attn_mask"), given.get("scale")
    if not all(isinstance(part, fx.Node) for part in parts) or len({len(sizes(part)) for part in parts}) != 1:  # type: ignore[arg-type]
        return None
    if scale is not None and not isinstance(scale, (int, float)):
        return None
    if mask is not None and (not isinstance(mask, fx.Node) or root_of(mask).op != "get_attr"):
        return None
    query, key, value = parts
    return Scores(query, key, value, False, scale, bool(given.get("is_causal", False)), mask=mask)  # type: ignore[arg-type]


def _second(node: fx.Node, *, transposed: bool) -> tuple[Any, Any, bool] | None:
    """The factors of a product over the last dimension of the first; of the second, whether that is the one before the
    last."""  # fmt: skip
    if node.target in (aten.matmul.default, aten.bmm.default):
        a, b = node.args[:2]
        ranks = [len(sizes(part)) if isinstance(part, fx.Node) else 0 for part in (a, b)]
        return (a, b, transposed) if ranks[0] == ranks[1] >= 3 else None
    if node.target is not aten.einsum.default or len(node.args[1]) != 2:  # type: ignore[arg-type]
        return None
    left, _, right = str(node.args[0]).replace(" ", "").partition("->")
    one, _, other = left.partition(",")
    factors: Any = node.args[1]
    a, b = factors
    lead = one[:-2]
    if len(one) != len(other) or len(one) < 3 or not (other[:-2] == right[:-2] == lead):
        return None
    i, s, j, d = one[-2], one[-1], other[-2], other[-1]
    if transposed and s == d and right[-2:] == i + j:
        return a, b, False
    if transposed and s == j and right[-2:] == i + d:
        return a, b, True
    if not transposed and s == j and right[-2:] == i + d:
        return a, b, False
    return None


def _peeled(node: Any) -> tuple[Any, float]:
    """What is multiplied with a number, and the number."""
    scale = 1.0
    while isinstance(node, fx.Node) and node.target in (aten.mul.Tensor, aten.div.Tensor):
        number = node.args[1]
        if not isinstance(number, (int, float)) or number == 0:
            break
        scale *= float(number) if node.target is aten.mul.Tensor else 1.0 / float(number)
        node = node.args[0]
    return node, scale


def _stream(node: fx.Node) -> Any:
    """What an operation on scores reads of them: what is no stored tensor."""
    if is_move(node):
        return node.args[0]
    streams = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and root_of(arg).op != "get_attr"]
    if len(streams) != 1 or (node.target is aten.sub.Tensor and streams[0] is not node.args[0]) or node.kwargs:
        return None
    return streams[0]


def _masked(making: Making, mask: fx.Node) -> fx.Node:
    """What a mask, a view of a stored tensor, adds to the scores."""
    found = making.fetch(root_of(mask))
    steps = steps_from(mask, root_of(mask))
    known = dict.fromkeys(symbols(*steps), 1)
    for step in steps:
        found = _done(making, step, [found, *(concrete(arg, known) for arg in step.args[1:])], known)
    if found.meta["val"].dtype != torch.bool:
        return found
    zeros = making.do(aten.zeros.default, list(found.meta["val"].shape))
    return making.do(aten.masked_fill.Scalar, zeros, making.do(aten.logical_not.default, found), -math.inf)


def _tried(making: Making, steps: tuple[fx.Node, ...], first: fx.Node, shape: list[int]) -> fx.Node:
    """What the steps make of zeros, for one item."""
    known = dict.fromkeys(symbols(first, *steps), 1)
    zeros = making.do(aten.zeros.default, [concrete(size, known) for size in first.meta["val"].shape])
    if zeros.meta["val"].numel() != math.prod(shape):
        raise ValueError("scores of another size")
    values: dict[fx.Node, fx.Node] = {first: zeros}

    def value_of(arg: Any) -> Any:
        if not isinstance(arg, fx.Node) or isinstance(arg.meta.get("val"), torch.SymInt):
            return concrete(arg, known)
        if arg not in values:
            values[arg] = making.fetch(arg) if arg.op == "get_attr" else run(arg)
        return values[arg]

    def run(node: fx.Node) -> fx.Node:
        values[node] = _done(making, node, [value_of(arg) for arg in node.args], known)
        return values[node]

    for step in steps:
        run(step)
    return making.do(aten.reshape.default, values[steps[-1]], shape)


def _done(making: Making, node: fx.Node, args: list[Any], known: dict[Any, int]) -> fx.Node:
    """A view or an addition of a program, of these tensors.

    Raises:
        KeyError: it is another operation.
    """
    operation = KNOWN[node.target]
    return making.do(operation, *args, **{name: concrete(arg, known) for name, arg in node.kwargs.items()})
