"""Volumes as frames: what works on ``[batch, channels, depth, height, width]`` works on maps, see :mod:`graph.frames`.

Depth, height and width must be known; where they are open, volumes stay in PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.aten import argument
from mirrormask.runtime.graph.frames import as_volume, frames_conv, frames_norm, taps_of
from mirrormask.runtime.graph.framing import Frames, is_stored, item_of, three
from mirrormask.runtime.graph.functions import arrange, per_channel, spaced, stored
from mirrormask.runtime.graph.passes import operations_beside
from mirrormask.runtime.graph.pointwise import ACTIVATIONS, ARITHMETIC, KINDS
from mirrormask.runtime.graph.resized import Resized

__all__ = ["VOLUME_CONVOLUTIONS", "volumes_as_frames"]

aten = torch.ops.aten

VOLUME_CONVOLUTIONS = {aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose3d.input}
#: What may stand before or after a stored number, and the kind that it is then.
REVERSED = {"sub": "rsub", "add": "add", "mul": "mul"}


def volumes_as_frames(module: fx.GraphModule) -> None:
    """Rewrite, in place, what works on the volumes that convolutions read and make."""
    graph = module.graph
    operations = operations_beside(graph, VOLUME_CONVOLUTIONS)
    if not operations:
        return
    work = _Volumes(graph)
    for node in operations:
        work.visit(node)
    graph.eliminate_dead_code()
    graph.lint()


class _Volumes(Resized):
    """The operations, one method for each kind."""

    def visit(self, node: fx.Node) -> None:
        """Rewrite an operation on volumes, if it is known."""
        handler = HANDLERS.get(node.target)
        if handler is None:
            return
        with self.graph.inserting_before(node):
            made = handler(self, node)
            if made is None:
                return
            if isinstance(made, Frames):
                made.node.meta |= {key: value for key, value in node.meta.items() if key == "nn_module_stack"}
                back = self.put(as_volume, (made.node, made.depth), made.item, made.node)
                self.found[back] = made
            else:
                back = made
        node.replace_all_uses_with(back)

    def conv(self, node: fx.Node) -> Frames | None:
        """A convolution, or a transposed one of spaced maps."""
        x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
        item = item_of(node)
        if not item or not item_of(x) or not is_stored(weight) or not (bias is None or is_stored(bias)):
            return None
        transposed = node.target is aten.conv_transpose3d.input
        kernel = tuple(int(size) for size in weight.meta["val"].shape[2:])
        stride = three(argument(node, 3, "stride", 1))
        dilation = three(argument(node, 7 if transposed else 5, "dilation", 1))
        groups = int(argument(node, 6, "groups", 1))
        padding: Any = argument(node, 4, "padding", 0)
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                return None
            padding = [0, 0, 0] if padding == "valid" else [r // 2 for r in reach]
        padding = three(padding)
        source = self.frames(x)
        assert source is not None
        taps = (kernel[0], stride[0], padding[0], dilation[0])
        frames = taps_of(source.depth, item[1], *taps, transposed=transposed)
        inner, settings = source.node, (stride[1:], padding[1:])
        if transposed:
            more = three(argument(node, 5, "output_padding", 0))
            sides = [d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True)]
            around = (sides[2], sides[2] + more[2], sides[1], sides[1] + more[1])
            wide = [
                (n - 1) * s + 1 + before + after
                for n, s, before, after in zip(source.size, stride[1:], around[2::-2], around[3::-2], strict=True)
            ]
            inner = self.put(spaced, (inner, stride[1:], around), (source.depth * source.channels, *wide), inner)
            settings = ((1, 1), (0, 0))
        args = (inner, weight, bias, frames, *settings, dilation[1:], groups, transposed)
        made = self.put(frames_conv, args, (item[1] * item[0], *item[2:]), inner)
        return Frames(made, item[1], item[0], (item[2], item[3]))

    def norm(self, node: fx.Node) -> Frames | None:
        """A batch norm by stored statistics."""
        x = self.given(node.args[0])
        weight, bias, mean, variance = node.args[1:5]
        if x is None or argument(node, 5, "training") or not is_stored(mean) or not is_stored(variance):
            return None
        return self.like(x, frames_norm, weight, bias, mean, variance, float(argument(node, 7, "eps")))

    def group_norm(self, node: fx.Node) -> Frames | None:
        """Over groups of channels, all their frames together: on maps of frames one above the other."""
        x = self.given(node.args[0])
        if x is None:
            return None
        rows, each, (height, width) = x.depth * x.size[0], math.prod(x.size), x.size
        order = (tuple(c * each for c in range(x.channels)), range(rows * width), (rows, width))
        places = tuple(d * x.channels * each + p for d in range(x.depth) for p in range(each))
        tall = self.put(arrange, (x.node, order[0], places, order[2]), (x.channels, *order[2]), x.node)
        made = self.put(node.target, (tall, *node.args[1:]), (x.channels, *order[2]), tall, **dict(node.kwargs))
        first = tuple(c * rows * width + d * each for d in range(x.depth) for c in range(x.channels))
        args = (made, first, tuple(range(each)), (height, width))
        back = self.put(arrange, args, (x.depth * x.channels, height, width), made)
        return Frames(back, x.depth, x.channels, x.size)

    def each(self, node: fx.Node) -> Frames | None:
        """A function of each number."""
        x = self.given(node.args[0])
        return None if x is None else self.like(x, node.target, *node.args[1:], **dict(node.kwargs))

    def same(self, node: fx.Node) -> Frames | None:
        """What gives its input back."""
        return self.given(node.args[0]) if item_of(node) == item_of(node.args[0]) else None

    def numbers(self, node: fx.Node) -> Frames | None:
        """With one stored number for each channel."""
        x = self.given(node.args[0])
        return None if x is None else self.like(x, per_channel, *node.args[1:])

    def arithmetic(self, node: fx.Node) -> Frames | None:
        """With a number, a stored tensor, or another volume, which may be repeated."""
        a: Any = argument(node, 0, "self")
        b: Any = argument(node, 1, "other")
        if self.given(a) is None and self.given(b) is None:
            return None
        if isinstance(b, (int, float)):
            return self.each(node)
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or node.kwargs.get("alpha", 1) != 1:
            return None
        kind = KINDS.get(node.target, "")
        if is_stored(b):
            return self._with_stored(node, a, b, kind)
        if is_stored(a):
            return self._with_stored(node, b, a, REVERSED.get(kind, ""))
        made = item_of(node)
        parts = [self._spread(part, made) for part in (a, b)]
        if not made or parts[0] is None or parts[1] is None:
            return None
        pair = (parts[0].node, parts[1].node)
        whole = self.put(node.target, pair, (made[1] * made[0], *made[2:]), parts[0].node)
        return Frames(whole, made[1], made[0], (made[2], made[3]))

    def _spread(self, node: fx.Node, made: tuple[int, ...]) -> Frames | None:
        """A volume with as many frames and channels as the result."""
        item = item_of(node)
        if not item or not made or (item[2:] != made[2:] and item[2:] != (1, 1)):
            return None
        x = self.frames(node)
        if x is None or item[:2] == made[:2]:
            return x
        steps = (x.channels if x.depth > 1 else 0, 1 if x.channels > 1 else 0)
        order = tuple(d * steps[0] + c * steps[1] for d in range(made[1]) for c in range(made[0]))
        return self.ordered(x, order, made[1], made[0])

    def _with_stored(self, node: fx.Node, a: fx.Node, numbers: fx.Node, kind: str) -> Frames | None:
        x, shape = self.given(a), tuple(numbers.meta["val"].shape)
        aligned = (1,) * (5 - len(shape)) + shape
        if x is None or not kind or item_of(node) != x.item or len(aligned) != 5 or aligned[0] != 1:
            return None
        if aligned[2:] == (1, 1, 1):
            return self.like(x, per_channel, numbers, kind)
        if aligned[1:] != x.item or kind not in ("add", "sub", "mul"):
            return None
        each = math.prod(x.size)
        first = tuple((c * x.depth + d) * each for d in range(x.depth) for c in range(x.channels))
        size = tuple(x.node.meta["val"].shape[1:])
        kept = self.put(stored, (x.node, numbers, first, tuple(range(each)), x.size), size, x.node)
        return self.like(x, node.target, kept)


HANDLERS: dict[Any, Callable[[_Volumes, fx.Node], Frames | fx.Node | None]] = {
    **dict.fromkeys(VOLUME_CONVOLUTIONS, _Volumes.conv),
    **dict.fromkeys(ACTIVATIONS, _Volumes.each),
    **dict.fromkeys(ARITHMETIC, _Volumes.arithmetic),
    **dict.fromkeys([aten.contiguous.default, aten.clone.default], _Volumes.same),
    **dict.fromkeys([aten.constant_pad_nd.default, aten.pad.default], _Volumes.pad),
    **dict.fromkeys([aten.group_norm.default, aten.instance_norm.default], _Volumes.group_norm),
    **dict.fromkeys([aten.upsample_nearest3d.vec, aten.upsample_trilinear3d.vec], _Volumes.resample),
    aten.batch_norm.default: _Volumes.norm,
    per_channel: _Volumes.numbers,
    aten.max_pool3d.default: _Volumes.max_pool,
    aten.avg_pool3d.default: _Volumes.mean_pool,
    aten.adaptive_avg_pool3d.default: _Volumes.adaptive,
    aten.mean.dim: _Volumes.mean,
    aten.cat.default: _Volumes.cat,
    aten.concat.default: _Volumes.cat,
    aten.slice.Tensor: _Volumes.slice,
    aten.select.int: _Volumes.select,
}
