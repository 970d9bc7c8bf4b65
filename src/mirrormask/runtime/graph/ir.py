"""What a captured region computes: a list of nodes over named values, one item (image or row) at a time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Graph", "Node", "Origin", "Unfit", "Weight", "inner", "narrow_shapes", "shape_made"]

Floats = npt.NDArray[np.float32]


class Unfit(ValueError):
    """Shapes that a graph cannot be used for; the message says which operation is in the way."""


@dataclass(frozen=True)
class Weight:
    """A weight, kept as its nonzeros when that is smaller.

    Attributes:
        shape: of the dense tensor.
        gaps: from each nonzero's flat position to the next one's, the first counted from 0; ``None`` when the tensor
            is kept whole. 16 bits wide where no gap is wider.
        values: the nonzeros, or all elements.
        panel: for a matrix kept whole, the width of the panels of rows that it is cut into; 0 for plain order. The
            dense vector kernel reads panels, and this way the weight and the kernel's constant are one array.
    """

    shape: tuple[int, ...]
    gaps: npt.NDArray[np.uint16] | npt.NDArray[np.uint32] | None
    values: npt.NDArray[Any]
    panel: int = 0

    @classmethod
    def of(cls, dense: Floats) -> Weight:
        """Keep ``dense``: its nonzeros with their positions, or itself where that is no larger."""
        flat = np.ascontiguousarray(dense, np.float32).reshape(-1)
        index = np.flatnonzero(flat != 0)  # (of truth values it is many times faster)
        if 2 * len(index) >= flat.size:
            return cls(dense.shape, None, flat.copy())
        gaps = np.diff(index, prepend=0)
        narrow = gaps.max(initial=0) < 1 << 16
        return cls(dense.shape, gaps.astype(np.uint16) if narrow else gaps.astype(np.uint32), flat[index])

    def dense(self) -> Floats:
        """The whole tensor."""
        if self.panel:
            outputs, terms = self.shape
            rows = self.values.reshape(-1, terms, self.panel).transpose(0, 2, 1).reshape(-1, terms)
            return np.ascontiguousarray(rows[:outputs], np.float32)
        if self.gaps is None:
            return self.values.reshape(self.shape)
        flat = np.zeros(int(np.prod(self.shape)), np.float32)
        flat[np.cumsum(self.gaps, dtype=np.int64)] = self.values
        return flat.reshape(self.shape)

    @property
    def nonzeros(self) -> int:
        """How many elements are not zero."""
        return len(self.values) if self.gaps is not None else int(np.count_nonzero(self.values))

    @property
    def sparsity(self) -> float:
        """The fraction of zeros."""
        return 1.0 - self.nonzeros / max(1, int(np.prod(self.shape)))

    @property
    def nbytes(self) -> int:
        """Memory held."""
        return int(self.values.nbytes + (0 if self.gaps is None else self.gaps.nbytes))


@dataclass(frozen=True)
class Origin:
    """The names of the model's tensors that a node's numbers are made of, ``""`` for none.

    With a variance they are a batch norm's, which becomes one weight and one bias per channel; so do one stored number
    per channel to multiply with (or, ``inverse``, to divide by) or to add.

    Attributes:
        gain, bias_gain: what the weight (of ones without a name) and the bias are multiplied with.
        transposed: whether the weight is stored as ``[inputs, outputs]``.
    """

    weight: str = ""
    bias: str = ""
    mean: str = ""
    variance: str = ""
    eps: float = 0.0
    gain: float = 1.0
    bias_gain: float = 1.0
    inverse: bool = False
    transposed: bool = False


@dataclass(frozen=True)
class Node:
    """One operation.

    Attributes:
        op: ``input``, ``conv``, ``linear``, ``act``, ``add``, ``combine``, ``concat``, ``slice``, ``gather``, ``pool``,
            ``adaptive``, ``mean``, ``pad``, ``crop``, ``resample``, ``flatten``, ``norm``, ``group_norm``, ``softmax``,
            ``reduce`` (features or channels to one), ``attention`` (of rows), ``attend`` (of columns of maps),
            ``arrange``, ``stored``, ``join``, or of a recurrent layer ``state`` (the hidden state of the moment before)
            and ``moments`` (a step to the next).
        name: of the value it makes.
        inputs: names of the values it reads.
        shape: of the value, per item: ``(channels, height, width)`` or ``(features,)``.
        layer: what the user calls it (the parameter's module), or the operation's name.
        stride, padding, dilation: per (row, column), for ``conv`` and ``pool``.
        kernel: the same; or the features of a head of the query and of the value.
        groups: of a convolution or a ``group_norm``; or heads.
        gain: what a ``norm`` multiplies each feature with; ``bias`` is then added. The numbers of a ``stored`` map, as
            ``[channels, height * width]``; what ``attend`` adds to the scores, ``[rows or 1, heads or 1, queries,
            keys]``, of which ``stride`` holds the first two sizes.
        kind: the activation, what ``combine`` does, ``"max"`` / ``"mean"`` for a pool, ``"layer"`` / ``"rms"`` /
            ``"mean"`` for a norm, ``"norm"`` or ``"sum"`` for a ``mean`` that is the root of all
            squares or the sum instead, ``"sum"`` / ``"mean"`` / ``"max"`` / ``"norm"`` for a ``reduce``, ``"softmax"``
            / ``"log_softmax"``, the kind of a recurrent layer, ``"causal"`` or not, and ``"mask"`` for an input that is
            one.
        values: the activation's parameters; a norm's eps; the scale of attention; what a ``pad`` fills with; the
            scales of a ``resample``, if it has any; what a ``gather`` multiplies each channel with, if anything.
        span: the first channel and past the last of a ``slice``; the channels of a ``gather`` in their new order;
            the first feature of each head of ``attention`` in query, key and value, one after the other;
            how much a ``pad`` adds left, right, above and below (to maps with zeros between, of one number in
            ``stride``, if it is ``"spaced"``); the axis, start, stop and step of a ``crop``; the only axis that an
            ``adaptive`` pool is over; of each channel, then of each position of an ``arrange``, where in an item its
            numbers come from; the axis along which a ``join`` puts maps together; how many numbers a ``state`` has,
            cells included; of a ``conv`` over frames, whose channels are those of one frame after another and whose
            weight has a depth, for each frame of the result and each tap in depth the frame that it reads, -1 for none.
        ceil: whether the last windows of a pool may run over the edge.
        captured: the only map size that the settings hold for; empty if they hold for any.
        origin: where weight and bias come from, until they are filled in.
    """

    op: str
    name: str
    inputs: list[str]
    shape: tuple[int, ...]
    layer: str = ""
    weight: Weight | None = None
    bias: Floats | None = None
    gain: Floats | None = None
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    kernel: tuple[int, int] = (1, 1)
    kind: str = ""
    values: tuple[float, ...] = ()
    span: tuple[int, ...] = ()
    count_padding: bool = True
    ceil: bool = False
    captured: tuple[int, ...] = ()
    origin: Origin | None = None


@dataclass(frozen=True)
class Graph:
    """A region: its nodes in order of execution.

    Attributes:
        rows: whether items are rows of linear layers (any leading shape), rather than images.
        inputs, outputs: names of values, in the order of the call.
        shapes: of the tensors that go in and out, per item: a volume's as well, ``(channels, depth, height, width)``,
            whose value has the channels ``channels * depth``.
        flattens: whether all dimensions but the first are one row, as after a flatten.
    """

    rows: bool
    nodes: list[Node]
    inputs: list[str]
    outputs: list[str]
    shapes: dict[str, tuple[int, ...]]
    flattens: bool = False

    @property
    def sequences(self) -> bool:
        """Whether some rows read others of their sequence: the last leading dimension counts a sequence's tokens."""
        return any(node.op == "attention" for node in self.nodes)

    @property
    def recurrent(self) -> bool:
        """Whether items are moments, each of which needs the state that the one before left."""
        return any(node.op == "state" for node in self.nodes)

    @property
    def masks(self) -> list[str]:
        """The inputs that are masks of attention, after all others: ``[batch, heads, queries, keys]``, or ones."""
        return [node.name for node in self.nodes if node.op == "input" and node.kind == "mask"]

    def leading(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The dimensions of an input of ``shape`` that count items."""
        return tuple(shape[:1] if self.flattens or not self.rows else shape[:-1])

    def node(self, name: str) -> Node:
        """The node that makes the value ``name``."""
        return next(node for node in self.nodes if node.name == name)

    def users(self, name: str) -> list[Node]:
        """The nodes that read the value ``name``."""
        return [node for node in self.nodes if name in node.inputs]

    def layers(self) -> list[Node]:
        """The nodes that hold a weight."""
        return [node for node in self.nodes if node.weight is not None]

    @property
    def products(self) -> int:
        """Multiplications per row of a region over rows: its nonzero weights."""
        return sum(node.weight.nonzeros for node in self.layers() if node.weight is not None)

    def holding(self, weights: Mapping[str, Weight]) -> Graph:
        """The same graph with these weights, by node, in another form."""
        nodes = [replace(node, weight=weights[node.name]) if node.name in weights else node for node in self.nodes]
        return replace(self, nodes=nodes) if weights else self

    def as_plain(self) -> dict[str, Any]:
        """A graph without weights as plain values, for JSON; :meth:`from_plain` reads them."""
        return asdict(self)

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Graph:
        """The graph that :meth:`as_plain` made the values of.

        Raises:
            TypeError, KeyError: they are not such values.
        """
        nodes = []
        for stored in values["nodes"]:
            row: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
            row["inputs"] = stored["inputs"]
            row["origin"] = None if stored["origin"] is None else Origin(**stored["origin"])
            nodes.append(Node(**row))
        shapes = {name: tuple(shape) for name, shape in values["shapes"].items()}
        return cls(values["rows"], nodes, values["inputs"], values["outputs"], shapes, values["flattens"])

    def resized(self, shapes: list[tuple[int, ...]]) -> Graph:
        """The same operations for inputs of other shapes per item, as a tensor has them.

        Raises:
            Unfit: an operation does not fit them; its message names it.
        """
        nodes: dict[str, Node] = {}
        for node in self.nodes:
            if node.op == "input":
                shape = shapes[self.inputs.index(node.name)]
                if len(shape) == 4 and shape[:2] != self.shapes[node.name][:2]:
                    raise Unfit(f"the input has shape {shape} per item where {self.shapes[node.name]} was captured")
                shape = inner(shape)
                if len(shape) != len(node.shape) or shape[0] != node.shape[0]:
                    raise Unfit(f"the input has shape {shape} per item where {node.shape} was captured")
            elif not node.inputs:
                shape = node.shape
            else:
                shape = shape_made(node, [nodes[name].shape for name in node.inputs])
            nodes[node.name] = replace(node, shape=shape)
        outer = dict(zip(self.inputs, shapes, strict=True))
        for name in self.outputs:
            before, now = self.shapes[name], nodes[name].shape
            outer[name] = (now[0], now[2]) if len(before) == 2 and len(now) == 3 else now
            if len(before) == 4:
                outer[name] = (*before[:2], *now[1:])
        return replace(self, nodes=list(nodes.values()), shapes=outer)


def inner(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a value whose tensor outside has this one: a sequence is a map of one row."""
    if len(shape) == 2:
        return (shape[0], 1, shape[1])
    return (shape[0] * shape[1], *shape[2:]) if len(shape) == 4 else shape


def shape_made(node: Node, sources: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape that an operation makes of inputs of these shapes.

    Raises:
        Unfit: it does not fit them; the message names it.
    """
    shape = _shape_after(node, sources[0])
    if node.op == "add" and sources[1] != shape:
        raise Unfit(f"{node.layer!r} adds tensors of different shapes")
    if node.op == "concat":
        return _together(node, list(sources))
    if node.op == "join":
        return _joined(node, list(sources))
    if node.op == "combine":
        return _combined(node, shape, sources[1])
    return shape


def _together(node: Node, parts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of maps as channels of one."""
    if len({part[1:] for part in parts}) > 1:
        raise Unfit(f"{node.layer!r} puts maps of different sizes together")
    return (sum(part[0] for part in parts), *parts[0][1:])


def _joined(node: Node, parts: list[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of maps beside or below each other."""
    axis = 1 + node.span[0]
    if len({(*part[:axis], *part[axis + 1 :]) for part in parts}) > 1:
        raise Unfit(f"{node.layer!r} puts maps of different sizes together")
    return (*parts[0][:axis], sum(part[axis] for part in parts), *parts[0][axis + 1 :])


def _combined(node: Node, one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of two values together: one per channel or one map for all channels will do for one of them."""
    full = max(one, other, key=lambda shape: int(np.prod(shape)))
    narrow = other if full == one else one
    if narrow == full or narrow in narrow_shapes(full):
        return full
    raise Unfit(f"{node.layer!r} combines tensors of different shapes")


def narrow_shapes(full: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """What a value of this shape may be combined with: one number for all features or channels; of maps, also one for
    all of a map, or for each of its rows or columns."""  # fmt: skip
    if len(full) == 1:
        return ((1,),)
    return (1, *full[1:]), (full[0], 1, 1), (full[0], full[1], 1), (full[0], 1, full[2])


def _windows(room: int, stride: int, end: int, ceil: bool) -> int:
    """How many windows there are; with ``ceil``, none that begins beyond ``end``."""
    if not ceil:
        return room // stride + 1
    count = -(-room // stride) + 1
    return count - 1 if (count - 1) * stride >= end else count


def _resampled(node: Node, source: tuple[int, ...]) -> list[int]:
    """Rows and columns of what a ``pad``, ``crop`` or ``resample`` makes."""
    sizes = list(source[1:])
    if node.op == "pad":
        left, right, above, below = node.span
        if node.kind == "reflect" and (max(above, below) >= sizes[0] or max(left, right) >= sizes[1]):
            raise Unfit(f"{node.layer!r} reflects more than there is")
        sizes = [(n - 1) * step + 1 for n, step in zip(sizes, node.stride, strict=True)]
        sizes = [sizes[0] + above + below, sizes[1] + left + right]
    elif node.op == "crop":
        axis, *bounds = node.span
        sizes[axis] = len(range(*slice(*bounds).indices(sizes[axis])))
    elif node.values:
        sizes = [int(size * scale) for size, scale in zip(sizes, node.values, strict=True)]
    else:
        sizes = list(node.shape[1:])
    if min(sizes) < 1:
        raise Unfit(f"{node.layer!r} leaves nothing of a map of {source[1:]}")
    return sizes


def _reshaped(node: Node, source: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that ``flatten`` gives: a row, maps of a fixed size made of one, or that of the source."""
    if len(node.shape) == 1:
        return (int(np.prod(source)),)
    if len(source) == 1:
        if int(np.prod(node.shape)) != source[0]:
            raise Unfit(f"{node.layer!r} makes {node.shape} of {source[0]} features")
        return node.shape
    return source


def _shape_after(node: Node, source: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that an operation makes of ``source``."""
    if node.captured and source[1:] != node.captured:
        raise Unfit(f"{node.layer!r} was captured for another size")
    if node.op in ("conv", "pool"):
        settings = zip(source[1:], node.kernel, node.stride, node.padding, node.dilation, strict=True)
        sizes = [_windows(n + 2 * p - d * (k - 1) - 1, s, n + p, node.ceil) for n, k, s, p, d in settings]
        if min(sizes) < 1:
            raise Unfit(f"{node.layer!r} has nothing left to read of a map of {source[1:]}")
        return (node.shape[0], *sizes)
    if node.op == "linear":
        assert node.weight is not None
        if source != (node.weight.shape[1],):
            raise Unfit(f"{node.layer!r} takes {node.weight.shape[1]} features, not {source}")
        return node.shape
    if node.op == "adaptive" and node.span:
        return tuple(1 if axis == 1 + node.span[0] else size for axis, size in enumerate(source))
    if node.op in ("mean", "adaptive", "arrange", "attend"):
        return node.shape
    if node.op == "reduce":
        return (1, *source[1:])
    if node.op in ("pad", "crop", "resample"):
        return (source[0], *_resampled(node, source))
    if node.op in ("slice", "gather"):
        return (node.shape[0], *source[1:])
    if node.op == "flatten":
        return _reshaped(node, source)
    return source
