"""Volumes as frames: what works on ``[batch, channels, depth, height, width]`` works on maps instead, see
:mod:`graph.frames`. Depth, height and width are known then; where they are open, volumes stay in PyTorch."""  # fmt: skip

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mirrormask.runtime.graph.aten import argument
from mirrormask.runtime.graph.convert import writes_in_place
from mirrormask.runtime.graph.frames import as_frames, as_volume, channels_of, frames_conv, frames_norm, taps_of
from mirrormask.runtime.graph.functions import arrange, per_channel, spaced, stored
from mirrormask.runtime.graph.pointwise import ACTIVATIONS, ARITHMETIC, KINDS

__all__ = ["VOLUME_CONVOLUTIONS", "volumes_as_frames"]

aten = torch.ops.aten

VOLUME_CONVOLUTIONS = {aten.conv3d.default, aten.conv3d.padding, aten.conv_transpose3d.input}
#: What may stand before or after a stored number, and the kind that it is then.
REVERSED = {"sub": "rsub", "add": "add", "mul": "mul"}


def volumes_as_frames(module: fx.GraphModule) -> None:
    """Rewrite, in place, what works on the volumes that convolutions read and make."""
    graph = module.graph
    if not any(node.target in VOLUME_CONVOLUTIONS for node in graph.nodes):
        return
    if any(writes_in_place(node) for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)):
        return
    work = _Volumes(graph)
    for node in list(graph.nodes):
        if node.op == "call_function" and isinstance(node.meta.get("val"), Tensor):
            work.visit(node)
    graph.eliminate_dead_code()
    graph.lint()


@dataclass(frozen=True)
class Frames:
    """A volume as maps.

    Attributes:
        node: ``[batch, depth * channels, height, width]``.
        depth, channels, size: of the volume; ``size`` is ``(height, width)``.
    """

    node: fx.Node
    depth: int
    channels: int
    size: tuple[int, int]

    @property
    def item(self) -> tuple[int, int, int, int]:
        """The shape of an item of the volume."""
        return (self.channels, self.depth, *self.size)


def _item(node: Any) -> tuple[int, ...]:
    """The sizes of a volume of numbers, batch aside; empty for what is none, or whose sizes are open."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, Tensor) or value.dim() != 5 or value.dtype != torch.float32:
        return ()
    sizes = tuple(value.shape[1:])
    return sizes if all(isinstance(size, int) and size for size in sizes) else ()


def _three(value: Any) -> tuple[int, int, int]:
    values = [value] * 3 if isinstance(value, int) else [*value]
    return tuple(int(v) for v in (values * 3 if len(values) == 1 else values))  # type: ignore[return-value]


def _stored(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


class _Volumes:
    """The operations, one method for each kind."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.found: dict[fx.Node, Frames] = {}

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

    # -- helpers --------------------------------------------------------------------------------------------------------

    def put(self, target: Any, args: tuple[Any, ...], item: Sequence[int], like: fx.Node, **kwargs: Any) -> fx.Node:
        """A new node with items of this shape."""
        made = self.graph.call_function(target, args, kwargs)
        value = like.meta["val"]
        made.meta = {"val": value.new_empty((value.shape[0], *item))}
        return made

    def given(self, node: Any) -> Frames | None:
        """A volume that is there as frames already."""
        return self.found.get(node)

    def frames(self, node: Any) -> Frames | None:
        """A volume as frames, which are made of it where they are not there yet."""
        item = _item(node)
        if not item:
            return None
        if node not in self.found:
            channels, depth, *size = item
            made = self.put(as_frames, (node,), (depth * channels, *size), node)
            self.found[node] = Frames(made, depth, channels, (size[0], size[1]))
        return self.found[node]

    def like(self, x: Frames, target: Any, *args: Any, **kwargs: Any) -> Frames:
        """A function of each number."""
        made = self.put(target, (x.node, *args), x.node.meta["val"].shape[1:], x.node, **kwargs)
        return Frames(made, x.depth, x.channels, x.size)

    def picked(self, x: Frames, frames: Sequence[int]) -> Frames:
        """These frames, in this order."""
        if list(frames) == list(range(x.depth)):
            return x
        order = tuple(frame * x.channels + c for frame in frames for c in range(x.channels))
        return self.ordered(x, order, len(frames), x.channels)

    def ordered(self, x: Frames, order: tuple[int, ...], depth: int, channels: int) -> Frames:
        """Other channels of all frames, in this order."""
        made = self.put(channels_of, (x.node, order, ()), (len(order), *x.size), x.node)
        return Frames(made, depth, channels, x.size)

    def together(self, target: Any, parts: list[Frames]) -> Frames:
        """Sums or maxima of frames with frames."""
        made = parts[0]
        for part in parts[1:]:
            made = self.like(made, target, part.node)
        return made

    # -- layers ---------------------------------------------------------------------------------------------------------

    def conv(self, node: fx.Node) -> Frames | None:
        """A convolution, or a transposed one of spaced maps."""
        x, weight, bias = (argument(node, i, name) for i, name in enumerate(("input", "weight", "bias")))
        item = _item(node)
        if not item or not _item(x) or not _stored(weight) or not (bias is None or _stored(bias)):
            return None
        transposed = node.target is aten.conv_transpose3d.input
        kernel = tuple(int(size) for size in weight.meta["val"].shape[2:])
        stride = _three(argument(node, 3, "stride", 1))
        dilation = _three(argument(node, 7 if transposed else 5, "dilation", 1))
        groups = int(argument(node, 6, "groups", 1))
        padding: Any = argument(node, 4, "padding", 0)
        if isinstance(padding, str):
            reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            if padding == "same" and any(r % 2 for r in reach):
                return None
            padding = [0, 0, 0] if padding == "valid" else [r // 2 for r in reach]
        padding = _three(padding)
        source = self.frames(x)
        assert source is not None
        taps = (kernel[0], stride[0], padding[0], dilation[0])
        frames = taps_of(source.depth, item[1], *taps, transposed=transposed)
        inner, settings = source.node, (stride[1:], padding[1:])
        if transposed:
            more = _three(argument(node, 5, "output_padding", 0))
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
        if x is None or argument(node, 5, "training") or not _stored(mean) or not _stored(variance):
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

    # -- number by number -----------------------------------------------------------------------------------------------

    def each(self, node: fx.Node) -> Frames | None:
        """A function of each number."""
        x = self.given(node.args[0])
        return None if x is None else self.like(x, node.target, *node.args[1:], **dict(node.kwargs))

    def same(self, node: fx.Node) -> Frames | None:
        """What gives its input back."""
        return self.given(node.args[0]) if _item(node) == _item(node.args[0]) else None

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
        if _stored(b):
            return self._with_stored(node, a, b, kind)
        if _stored(a):
            return self._with_stored(node, b, a, REVERSED.get(kind, ""))
        made = _item(node)
        parts = [self._spread(part, made) for part in (a, b)]
        if not made or parts[0] is None or parts[1] is None:
            return None
        pair = (parts[0].node, parts[1].node)
        whole = self.put(node.target, pair, (made[1] * made[0], *made[2:]), parts[0].node)
        return Frames(whole, made[1], made[0], (made[2], made[3]))

    def _spread(self, node: fx.Node, made: tuple[int, ...]) -> Frames | None:
        """A volume with as many frames and channels as the result."""
        item = _item(node)
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
        if x is None or not kind or _item(node) != x.item or len(aligned) != 5 or aligned[0] != 1:
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

    # -- sizes ----------------------------------------------------------------------------------------------------------

    def max_pool(self, node: fx.Node) -> Frames | None:
        """Maxima of each frame, and of these over frames."""
        x, item = self.given(node.args[0]), _item(node)
        kernel = _three(argument(node, 1, "kernel_size"))
        stride = _three(argument(node, 2, "stride") or kernel)
        padding, dilation = _three(argument(node, 3, "padding", 0)), _three(argument(node, 4, "dilation", 1))
        if x is None or not item or dilation != (1, 1, 1):
            return None
        inner = x
        if (kernel[1:], stride[1:]) != ((1, 1), (1, 1)):
            ceil = bool(argument(node, 5, "ceil_mode", False))
            args = (x.node, list(kernel[1:]), list(stride[1:]), list(padding[1:]), [1, 1], ceil)
            made = self.put(aten.max_pool2d.default, args, (x.depth * x.channels, *item[2:]), x.node)
            inner = Frames(made, x.depth, x.channels, (item[2], item[3]))
        starts = [out * stride[0] - padding[0] for out in range(item[1])]
        # What a window has outside is what it has inside already.
        picks = [[min(max(start + k, 0), x.depth - 1) for start in starts] for k in range(kernel[0])]
        return self.together(aten.maximum.default, [self.picked(inner, pick) for pick in picks])

    def mean_pool(self, node: fx.Node) -> Frames | None:
        """Means of each frame, and of these over frames."""
        x, item = self.given(node.args[0]), _item(node)
        kernel = _three(argument(node, 1, "kernel_size"))
        stride = _three(argument(node, 2, "stride") or kernel)
        padding = _three(argument(node, 3, "padding", 0))
        if x is None or not item or padding[0] or argument(node, 6, "divisor_override") is not None:
            return None
        if (item[1] - 1) * stride[0] + kernel[0] > x.depth:
            return None  # its last window runs over the edge
        ceil, count = bool(argument(node, 4, "ceil_mode", False)), bool(argument(node, 5, "count_include_pad", True))
        inner = x
        if (kernel[1:], stride[1:]) != ((1, 1), (1, 1)):
            args = (x.node, list(kernel[1:]), list(stride[1:]), list(padding[1:]), ceil, count)
            made = self.put(aten.avg_pool2d.default, args, (x.depth * x.channels, *item[2:]), x.node)
            inner = Frames(made, x.depth, x.channels, (item[2], item[3]))
        return self._means(inner, [[out * stride[0] + k for out in range(item[1])] for k in range(kernel[0])])

    def _means(self, x: Frames, picks: list[list[int]]) -> Frames:
        total = self.together(aten.add.Tensor, [self.picked(x, pick) for pick in picks])
        return total if len(picks) == 1 else self.like(total, aten.mul.Tensor, 1.0 / len(picks))

    def adaptive(self, node: fx.Node) -> Frames | None:
        """An adaptive mean whose windows in depth have one size."""
        x, item = self.given(node.args[0]), _item(node)
        if x is None or not item or x.depth % item[1]:
            return None
        if item[1:] == (1, 1, 1):
            return self._mean(x)
        args = (x.node, list(item[2:]))
        made = self.put(aten.adaptive_avg_pool2d.default, args, (x.depth * x.channels, *item[2:]), x.node)
        window = x.depth // item[1]
        inner = Frames(made, x.depth, x.channels, (item[2], item[3]))
        return self._means(inner, [list(range(k, x.depth, window)) for k in range(window)])

    def mean(self, node: fx.Node) -> Frames | fx.Node | None:
        """Over all of a volume, or over rows and columns of each frame."""
        x, dims = self.given(node.args[0]), argument(node, 1, "dim")
        keep = bool(argument(node, 2, "keepdim", False))
        if x is None or not isinstance(dims, (list, tuple)):
            return None
        wanted = sorted(int(d) % 5 for d in dims)
        if wanted == [2, 3, 4]:
            made = self._mean(x)
        elif wanted == [3, 4] and keep:
            made = Frames(self._over(x, True), x.depth, x.channels, (1, 1))
        else:
            return None
        return made if keep else self.put(aten.flatten.using_ints, (made.node, 1), (x.channels,), made.node)

    def _over(self, x: Frames, keep: bool) -> fx.Node:
        """The mean of each frame."""
        item = (x.depth * x.channels, 1, 1) if keep else (x.depth * x.channels,)
        return self.put(aten.mean.dim, (x.node, [2, 3], keep), item, x.node)

    def _mean(self, x: Frames) -> Frames:
        """The mean of each channel, a map of one number."""
        if x.depth == 1:
            return Frames(self._over(x, True), 1, x.channels, (1, 1))
        flat = self._over(x, False)
        places = (tuple(range(x.channels)), tuple(d * x.channels for d in range(x.depth)), (1, x.depth))
        wide = self.put(arrange, (flat, *places), (x.channels, 1, x.depth), flat)
        return Frames(self.put(aten.mean.dim, (wide, [2, 3], True), (x.channels, 1, 1), wide), 1, x.channels, (1, 1))

    def resample(self, node: fx.Node) -> Frames | None:
        """Rows and columns of each frame, then frames: the nearest, or between two."""
        x, item = self.given(node.args[0]), _item(node)
        linear = node.target is aten.upsample_trilinear3d.vec
        corners = linear and bool(argument(node, 2, "align_corners", False))
        scales: Any = argument(node, 3 if linear else 2, "scale_factors")
        if x is None or not item:
            return None
        given = [*scales] if scales else None
        size, plane = (None, given[1:]) if given else (list(item[2:]), None)
        target = aten.upsample_bilinear2d.vec if linear else aten.upsample_nearest2d.vec
        args = (x.node, size, corners, plane) if linear else (x.node, size, plane)
        made = self.put(target, args, (x.depth * x.channels, *item[2:]), x.node)
        inner = Frames(made, x.depth, x.channels, (item[2], item[3]))
        # Where each frame lies among the old ones, by PyTorch itself.
        line = torch.arange(x.depth, dtype=torch.float32).reshape(1, 1, -1)
        options: dict[str, Any] = {"scale_factor": float(given[0])} if given else {"size": item[1]}
        if linear:
            options |= {"mode": "linear", "align_corners": corners}
        with torch._subclasses.fake_tensor.unset_fake_temporarily():
            place = torch.nn.functional.interpolate(line, **options).reshape(-1)
            low = place.floor().long().clamp(max=x.depth - 1)
            share = (place - low).tolist()
        if not linear or not any(share):
            return self.picked(inner, low.tolist())
        nexts = (low + 1).clamp(max=x.depth - 1).tolist()
        sides = []
        for pick, gains in ((low.tolist(), [1 - s for s in share]), (nexts, share)):
            order = tuple(frame * x.channels + c for frame in pick for c in range(x.channels))
            each = tuple(gain for gain in gains for _ in range(x.channels))
            sides.append(self.put(channels_of, (inner.node, order, each), (len(order), *item[2:]), inner.node))
        whole = self.put(aten.add.Tensor, (sides[0], sides[1]), (item[1] * x.channels, *item[2:]), inner.node)
        return Frames(whole, item[1], x.channels, (item[2], item[3]))

    def pad(self, node: fx.Node) -> Frames | None:
        """Zeros around rows and columns."""
        x, item = self.given(node.args[0]), _item(node)
        sizes: Any = argument(node, 1, "pad")
        given = [*sizes, *[0] * 10][:10]
        if x is None or not item or any(given[4:]):
            return None
        args = (x.node, list(given[:4]), *node.args[2:])
        made = self.put(node.target, args, (x.depth * x.channels, *item[2:]), x.node, **dict(node.kwargs))
        return Frames(made, x.depth, x.channels, (item[2], item[3]))

    # -- parts ----------------------------------------------------------------------------------------------------------

    def cat(self, node: fx.Node) -> Frames | None:
        """Channels of each frame together, frames after frames, or maps beside and below each other."""
        given, item = argument(node, 0, "tensors"), _item(node)
        dim = int(argument(node, 1, "dim", 0)) % 5
        if not item or dim == 0 or all(self.given(part) is None for part in given):
            return None
        parts = [self.frames(part) for part in given]
        if any(part is None for part in parts):
            return None
        found = [part for part in parts if part is not None]
        nodes = [part.node for part in found]
        size = (item[1] * item[0], *item[2:])
        if dim > 1:
            made = self.put(aten.cat.default, (nodes, 1 if dim == 2 else dim - 1), size, nodes[0])
            return Frames(made, item[1], item[0], (item[2], item[3]))
        whole = Frames(self.put(aten.cat.default, (nodes, 1), size, nodes[0]), item[1], item[0], (item[2], item[3]))
        starts = [sum(item[1] * part.channels for part in found[:i]) for i in range(len(found))]
        order = tuple(
            start + d * part.channels + c
            for d in range(item[1])
            for start, part in zip(starts, found, strict=True)
            for c in range(part.channels)
        )
        return whole if item[1] == 1 else self.ordered(whole, order, item[1], item[0])

    def slice(self, node: fx.Node) -> Frames | None:
        """Some channels, frames, rows or columns."""
        x, item, dim = self.given(node.args[0]), _item(node), int(argument(node, 1, "dim", 0)) % 5
        bounds = [argument(node, 2, "start"), argument(node, 3, "end"), argument(node, 4, "step", 1)]
        if x is None or not item or dim == 0 or any(not isinstance(b, (int, type(None))) for b in bounds):
            return None
        if dim > 2:
            args = (x.node, dim - 1, *bounds)
            made = self.put(aten.slice.Tensor, args, (x.depth * x.channels, *item[2:]), x.node)
            return Frames(made, x.depth, x.channels, (item[2], item[3]))
        taken = range(x.item[dim - 1])[slice(*bounds)]
        if dim == 2:
            return self.picked(x, taken)
        order = tuple(d * x.channels + c for d in range(x.depth) for c in taken)
        return self.ordered(x, order, x.depth, len(taken))

    def select(self, node: fx.Node) -> fx.Node | None:
        """One frame."""
        x, (dim, index) = self.given(node.args[0]), node.args[1:3]
        if x is None or not isinstance(dim, int) or dim % 5 != 2 or not isinstance(index, int):
            return None
        return self.picked(x, [index % x.depth]).node


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
