"""Scaled dot product attention between streams of rows: the views around it are proved to be splits into heads.

What the captured program then says is :func:`mirrormask.runtime.graph.functions.attend`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import argument
from mirrormask.runtime.graph.chains import Known, came_from, sizes, sources
from mirrormask.runtime.graph.functions import additive, attend
from mirrormask.runtime.graph.scores import SOFTMAX

__all__ = ["ByHand", "split_heads"]

aten = torch.ops.aten
#: Scores that are this low or lower in place of others are as low when others are added.
FAR = -1e15
#: A tensor, and the number that stands where it is true; 0 for one that is added as it is.
Mask = tuple[fx.Node, float]


def split_heads(node: fx.Node, known: Known, *, strict: bool = False) -> bool:
    """Replace attention whose inputs are proved to be heads of rows by :func:`attend` on these; whether they are.

    Args:
        strict: see :func:`additive`.
    """
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given = {**dict(zip(names, node.args, strict=False)), **dict(node.kwargs)}
    parts = [given.get(name) for name in names[:3]]
    if given.get("dropout_p", 0.0) != 0.0 or not all(isinstance(part, fx.Node) for part in parts):
        return False
    query, key, value = (part for part in parts if isinstance(part, fx.Node))
    shapes = [sizes(query), sizes(key), sizes(value)]
    if any(len(shape) != 4 for shape in shapes):
        return False
    if any((shape[0], shape[2]) != (shapes[0][0], shapes[0][2]) for shape in shapes) or shapes[0][3] != shapes[1][3]:
        return False  # keys of another length, or one batch for all
    if not all(shape[1].isdigit() and shape[3].isdigit() for shape in shapes):
        return False
    heads = int(shapes[0][1])
    found = [_heads_of(part, known) for part in (query, key, value)]
    if any(part is None for part in found):
        return False
    (q, q_starts), (k, k_starts), (v, v_starts) = (part for part in found if part is not None)
    if (
        len(k_starts) != len(v_starts)
        or heads % len(k_starts)
        or (not given.get("enable_gqa") and len(k_starts) not in (1, heads))  # PyTorch repeats the one
    ):
        return False
    shared = heads // len(k_starts)
    starts = (q_starts, *(tuple(start for start in part for _ in range(shared)) for part in (k_starts, v_starts)))
    width = (int(shapes[0][3]), int(shapes[2][3]))
    scale = given.get("scale")
    if scale is not None and not isinstance(scale, (int, float)):
        return False
    mask = given.get("attn_mask")
    graph, made = node.graph, node.meta["val"]
    if mask is not None and not _fits(mask, (*shapes[0][:3], shapes[1][2])):
        return False
    with graph.inserting_before(node):
        bias = None
        if isinstance(mask, fx.Node):
            args = (mask, True) if strict else (mask,)
            bias = next((user for user in mask.users if user.target is additive and user.args == args), None)
            if bias is None:
                with graph.inserting_after(mask):
                    bias = graph.call_function(additive, args)
                    shape = mask.meta["val"].shape
                    bias.meta["val"] = mask.meta["val"].new_empty(
                        (*[1] * (4 - len(shape)), *shape), dtype=torch.float32
                    )
        number = width[0] ** -0.5 if scale is None else float(scale)
        rows = graph.call_function(attend, (q, k, v, bias, starts, width, number, bool(given.get("is_causal", False))))
        batch, length = made.shape[0], made.shape[2]
        rows.meta = {**node.meta, "val": made.new_empty((batch, length, heads * width[1]))}
        wide = graph.call_function(aten.unflatten.int, (rows, -1, [heads, width[1]]))
        wide.meta["val"] = made.new_empty((batch, length, heads, width[1]))
        back = graph.call_function(aten.transpose.int, (wide, 1, 2))
        back.meta["val"] = wide.meta["val"].transpose(1, 2)
    node.replace_all_uses_with(back)
    return True


class ByHand:
    """Attention that is written out: ``matmul(softmax(scale matmul(q, k^T) + masks), v)``.

    Attributes:
        known: what is known of chains of views.
    """

    def __init__(self, known: Known) -> None:
        self.known = known
        self._masks: dict[tuple[Any, ...], fx.Node] = {}

    def split_heads(self, node: fx.Node) -> bool:
        """Replace such attention between heads of rows; whether it is that."""
        powers = node.args[0] if node.target is aten.matmul.default else None
        if not isinstance(powers, fx.Node) or powers.target not in SOFTMAX or len(powers.users) > 1:
            return False
        rank = len(sizes(powers))
        if rank != 4 or int(argument(powers, 1, "dim")) % rank != 3 or node.meta["val"].dtype != torch.float32:
            return False
        found = _scores(powers.args[0])
        if found is None:
            return False
        product, scale, masks = found
        graph, (query, turned) = node.graph, product.args[:2]
        assert isinstance(turned, fx.Node)
        with graph.inserting_before(node):
            key = graph.call_function(aten.transpose.int, (turned, -1, -2))
            key.meta["val"] = turned.meta["val"].transpose(-1, -2)
            mask = self._sum(masks, powers) if masks else None
            args = (query, key, node.args[1], mask)
            made = graph.call_function(aten.scaled_dot_product_attention.default, args, {"scale": scale})
        made.meta = dict(node.meta)
        node.replace_all_uses_with(made)
        if not split_heads(made, self.known, strict=True):
            made.replace_all_uses_with(node)
            graph.erase_node(made)
            return False
        graph.erase_node(made)
        return True

    def _sum(self, masks: list[Mask], powers: fx.Node) -> fx.Node:
        """All that is added to the scores, made once for all layers that add the same."""
        key = tuple(masks)
        if key not in self._masks:
            parts = [_added(part, powers) for part in masks]
            whole = parts[0]
            for part in parts[1:]:
                both = powers.graph.call_function(aten.add.Tensor, (whole, part))
                both.meta["val"] = torch.add(whole.meta["val"], part.meta["val"])
                whole = both
            self._masks[key] = whole
        return self._masks[key]


def _scores(node: Any) -> tuple[fx.Node, float, list[Mask]] | None:
    """The product of queries and keys, its scale, and the masks, the last one first; None for other scores."""
    if not isinstance(node, fx.Node) or len(node.users) > 1 or node.kwargs:
        return None
    if node.target is aten.matmul.default:
        return node, 1.0, []
    inner, other = node.args[0], node.args[1] if len(node.args) > 1 else None
    if node.target in (aten.mul.Tensor, aten.div.Tensor) and isinstance(other, (int, float)) and other:
        found = _scores(inner)
        if found is None or found[2]:
            return None
        return found[0], found[1] * float(other) if node.target is aten.mul.Tensor else found[1] / float(other), []
    if node.target is aten.masked_fill.Scalar and isinstance(node.args[2], (int, float)):
        found = _scores(inner)
        if found is None or node.args[2] > FAR or not _fits(other, sizes(node)):
            return None
        return found[0], found[1], [(other, float(node.args[2])), *found[2]]  # type: ignore[list-item]
    if node.target is aten.add.Tensor:
        for stream, mask in ((inner, other), (other, inner)):
            found = _scores(stream) if isinstance(mask, fx.Node) and sizes(stream) == sizes(node) else None  # type: ignore[arg-type]
            if found is not None and mask.meta["val"].dtype == torch.float32 and _fits(mask, sizes(node)):  # type: ignore[union-attr]
                return found[0], found[1], [(mask, 0.0), *found[2]]  # type: ignore[list-item]
    return None


def _added(mask: Mask, like: fx.Node) -> fx.Node:
    """What a mask adds: itself, or a number where it says so."""
    node, number = mask
    if not number:
        return node
    made = like.graph.call_function(aten.where.Scalar, (node, number, 0.0))
    made.meta["val"] = node.meta["val"].new_empty(node.meta["val"].shape, dtype=torch.float32)
    return made


def _heads_of(part: fx.Node, known: Known) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The farthest rows that ``[batch, heads, length, width]`` is a view of, and where each head begins in them."""
    found = None
    for source in sources(part):
        shape = sizes(source)
        if len(shape) != 3 or shape[0] != sizes(part)[0] or shape[1] != sizes(part)[2] or not shape[2].isdigit():
            continue
        tried = [_starts(shape, index) for shape, index in came_from(part, source, known) or []]
        if tried and tried[0] is not None and all(starts == tried[0] for starts in tried):
            found = source, tried[0]
    return found


def _starts(shape: tuple[int, ...], index: Tensor) -> tuple[int, ...] | None:
    """Where the heads begin in rows of ``shape``, if that is all that their views change."""
    batch, length, features = shape
    starts = index[0, :, 0, 0].clone()
    if index.shape[0] != batch or index.shape[2] != length or int(starts.max()) + index.shape[3] > features:
        return None
    first = torch.arange(batch * length, dtype=index.dtype).reshape(batch, 1, length, 1) * features
    expected = first + starts[:, None, None] + torch.arange(index.shape[3], dtype=index.dtype)
    return tuple(starts.tolist()) if torch.equal(index, expected) else None


def _fits(mask: Any, shape: tuple[str, ...]) -> bool:
    """Whether a mask is one for scores of this shape, or repeated to it."""
    value = mask.meta.get("val") if isinstance(mask, fx.Node) else None
    if not isinstance(value, Tensor) or value.dtype not in (torch.bool, torch.float32) or value.dim() > 4:
        return False
    own = sizes(mask)
    return all(size in ("1", wanted) for size, wanted in zip(own[::-1], shape[::-1], strict=False))
