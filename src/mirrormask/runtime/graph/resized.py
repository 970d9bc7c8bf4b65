"""Volumes of other sizes as frames: pools, means, interpolation, padding, parts and what is put together of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from mirrormask.runtime.graph.aten import argument
from mirrormask.runtime.graph.frames import channels_of
from mirrormask.runtime.graph.framing import Frames, Framing, item_of, three
from mirrormask.runtime.graph.functions import arrange

__all__ = ["Resized"]

aten = torch.ops.aten


class Resized(Framing):
    """One method for each kind of operation."""

    def max_pool(self, node: fx.Node) -> Frames | None:
        """Maxima of each frame, and of these over frames."""
        x, item = self.given(node.args[0]), item_of(node)
        kernel = three(argument(node, 1, "kernel_size"))
        stride = three(argument(node, 2, "stride") or kernel)
        padding, dilation = three(argument(node, 3, "padding", 0)), three(argument(node, 4, "dilation", 1))
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
        x, item = self.given(node.args[0]), item_of(node)
        kernel = three(argument(node, 1, "kernel_size"))
        stride = three(argument(node, 2, "stride") or kernel)
        padding = three(argument(node, 3, "padding", 0))
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
        x, item = self.given(node.args[0]), item_of(node)
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
        x, item = self.given(node.args[0]), item_of(node)
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
        x, item = self.given(node.args[0]), item_of(node)
        sizes: Any = argument(node, 1, "pad")
        given = [*sizes, *[0] * 10][:10]
        if x is None or not item or any(given[4:]):
            return None
        args = (x.node, list(given[:4]), *node.args[2:])
        made = self.put(node.target, args, (x.depth * x.channels, *item[2:]), x.node, **dict(node.kwargs))
        return Frames(made, x.depth, x.channels, (item[2], item[3]))

    def cat(self, node: fx.Node) -> Frames | None:
        """Channels of each frame together, frames after frames, or maps beside and below each other."""
        given, item = argument(node, 0, "tensors"), item_of(node)
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
        x, item, dim = self.given(node.args[0]), item_of(node), int(argument(node, 1, "dim", 0)) % 5
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
