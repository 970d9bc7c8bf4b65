"""Recurrent layers as a linear layer over all moments, and a loop over them for what depends on the moment before.

While a model is exported, PyTorch's own recurrent functions are replaced by

    pre = x W_ih^T + b_ih                       a linear layer, for all moments at once
    s_t = step(pre_t, h_(t-1) W_hh^T + b_hh, s_(t-1))       :func:`moments`

with ``s`` the hidden state ``h``, of an LSTM followed by the cells ``c``. PyTorch's trace would write the loop out for
the example's length; this one holds for any.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from mirrormask.runtime.graph.ir import Graph, Node, Origin

__all__ = ["OPERATION", "ByMoments", "loops", "moments"]

aten = torch.ops.aten

#: Kind of layer -> gates, which are computed of each moment and of the state before.
GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}
ZEROS = {aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default}


def moments(pre: Tensor, first: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """The states of a recurrent layer at all moments, ``[length, batch, states]``.

    Args:
        pre: ``[length, batch, gates * hidden]``.
        first: the state before the first moment, ``[batch, states]``; zeros if ``None``.
        weight, bias: of the hidden state, ``[gates * hidden, hidden]``.
        kind: ``"lstm"`` (gates input, forget, cell, output; states hidden and cell), ``"gru"`` (reset, update, new),
            ``"rnn_tanh"`` or ``"rnn_relu"``.
    """
    hidden = weight.shape[1]
    state = pre.new_zeros(pre.shape[1], _states(kind) * hidden) if first is None else first
    found = []
    for now in pre:
        before, past = state[:, :hidden], F.linear(state[:, :hidden], weight, bias)
        if kind == "lstm":
            i, f, g, o = (now + past).chunk(4, -1)
            cells = f.sigmoid() * state[:, hidden:] + i.sigmoid() * g.tanh()
            state = torch.cat((o.sigmoid() * cells.tanh(), cells), -1)
        elif kind == "gru":
            r, z, n = now.chunk(3, -1)
            past_r, past_z, past_n = past.chunk(3, -1)
            new = (n + (r + past_r).sigmoid() * past_n).tanh()
            state = new + (z + past_z).sigmoid() * (before - new)
        else:
            state = (now + past).tanh() if kind == "rnn_tanh" else (now + past).relu()
        found.append(state)
    return torch.stack(found) if found else pre.new_empty(0, *state.shape)


def _states(kind: str) -> int:
    return 2 if kind == "lstm" else 1


def _shape_of_moments(pre: Tensor, first: Tensor | None, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    return pre.new_empty(pre.shape[0], pre.shape[1], _states(kind) * weight.shape[1])


_Library: Any = torch.library.Library
_library = _Library("mirrormask_runtime", "DEF")  # lives as long as the process
_library.define("moments(Tensor pre, Tensor? first, Tensor weight, Tensor? bias, str kind) -> Tensor")
_library.impl("moments", moments, "CompositeExplicitAutograd")
torch.library.register_fake("mirrormask_runtime::moments", _shape_of_moments, lib=_library)
OPERATION = torch.ops.mirrormask_runtime.moments.default


class ByMoments(TorchFunctionMode):
    """Inside, recurrent layers are computed as this file's head says."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        made = None
        if function in LAYERS and not kwargs and _is_plain(function, args):
            made = _layer(LAYERS[function], *args)
        elif function in CELLS and not kwargs:
            made = _cell(CELLS[function], *args)
        return function(*args, **(kwargs or {})) if made is None else made


#: PyTorch's functions -> the kind of layer.
LAYERS = {torch.lstm: "lstm", torch.gru: "gru", torch.rnn_tanh: "rnn_tanh", torch.rnn_relu: "rnn_relu"}
CELLS = {
    torch.lstm_cell: "lstm",
    torch.gru_cell: "gru",
    torch.rnn_tanh_cell: "rnn_tanh",
    torch.rnn_relu_cell: "rnn_relu",
}


def _is_plain(function: Any, args: tuple[Any, ...]) -> bool:
    """Whether it is a call for tensors rather than for packed sequences."""
    lists = isinstance(args[1], (list, tuple)) == (function == torch.lstm) and isinstance(args[2], (list, tuple))
    return len(args) == 9 and lists


def _layer(
    kind: str,
    x: Tensor,
    given: Any,
    weights: Sequence[Tensor],
    biases: bool,
    layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, ...] | None:
    """What PyTorch's function gives; None for what is not known here: projections, training."""
    directions, each = 2 if bidirectional else 1, 4 if biases else 2
    if len(weights) != layers * directions * each or (train and dropout) or x.dtype != torch.float32:
        return None
    first = list(given) if kind == "lstm" else [given]
    last: list[list[Tensor]] = [[] for _ in first]
    for layer in range(layers):
        both = []
        for direction in range(directions):
            number = layer * directions + direction
            of_input, of_hidden, *added = weights[number * each : (number + 1) * each]
            pre = F.linear(x, of_input, added[0] if added else None)
            if batch_first and layer == 0:
                pre = pre.transpose(0, 1)
            before = torch.cat([state[number] for state in first], -1) if len(first) > 1 else first[0][number]
            made = OPERATION(pre.flip(0) if direction else pre, before, of_hidden, added[1] if added else None, kind)
            hidden = of_hidden.shape[1]
            parts = [made[..., i * hidden : (i + 1) * hidden] if len(first) > 1 else made for i in range(len(first))]
            for states, part in zip(last, parts, strict=True):
                states.append(part[-1])
            both.append(parts[0].flip(0) if direction else parts[0])
        x = torch.cat(both, -1) if bidirectional else both[0]
    return (x.transpose(0, 1) if batch_first else x, *(torch.stack(states) for states in last))


def _cell(
    kind: str, x: Tensor, given: Any, of_input: Tensor, of_hidden: Tensor, b: Tensor | None = None, c: Any = None
) -> Any:
    """One moment; None for other types of numbers."""
    if x.dtype != torch.float32 or x.dim() != 2:
        return None
    before = torch.cat(list(given), -1) if kind == "lstm" else given
    made = OPERATION(F.linear(x, of_input, b)[None], before, of_hidden, c, kind)[0]
    hidden = of_hidden.shape[1]
    return (made[:, :hidden], made[:, hidden:]) if kind == "lstm" else made


def loops(module: fx.GraphModule, names: dict[fx.Node, str], prefix: str = "moments_") -> dict[str, Graph]:
    """Replace loops over moments whose weights are stored by submodules, in place; their graphs by name.

    Args:
        names: of the stored tensors, by the nodes that fetch them.
    """
    found: dict[str, Graph] = {}
    module.graph.eliminate_dead_code()
    for node in list(module.graph.nodes):
        if node.target is not OPERATION:
            continue
        pre, first, weight, bias, kind = node.args
        if weight not in names or (bias is not None and bias not in names):
            continue
        gates, hidden = (int(size) for size in weight.meta["val"].shape)
        states = _states(kind) * hidden
        taken = [user for user in node.users if _takes_hidden(user, node, hidden)]
        made = hidden if len(taken) == len(node.users) else states
        name = f"{prefix}{len(found)}"
        origin = Origin(names[weight], "" if bias is None else names[bias])
        nodes = [
            Node("input", "pre", [], (gates,)),
            Node("state", "before", [], (hidden,), span=(states,)),
            Node("linear", "past", ["before"], (gates,), layer=names[weight], origin=origin),
            Node("moments", "after", ["pre", "past", "before"], (made,), kind=kind),
        ]
        found[name] = Graph(True, nodes, ["pre"], ["after"], {"pre": (gates,), "after": (made,)})
        module.add_submodule(name, torch.nn.Module())
        with module.graph.inserting_before(node):
            call = module.graph.call_module(name, (pre,) if first is None or _is_zero(first) else (pre, first))
        value = node.meta["val"]
        call.meta = {**node.meta, "val": value[..., :made]}
        if made < states:
            for user in taken:
                user.replace_all_uses_with(call)
                module.graph.erase_node(user)
        node.replace_all_uses_with(call)
        module.graph.erase_node(node)
    module.graph.eliminate_dead_code()
    return found


def _takes_hidden(user: fx.Node, node: fx.Node, hidden: int) -> bool:
    """Whether an operation takes the hidden states, and no cells."""
    return user.target is aten.slice.Tensor and user.args == (node, 2, 0, hidden)


def _is_zero(node: Any) -> bool:
    """Whether a tensor is made of zeros alone."""
    if node.target is aten.cat.default:
        return all(_is_zero(part) for part in node.args[0])
    if node.target in (aten.select.int, aten.expand.default, aten.slice.Tensor):
        return _is_zero(node.args[0])
    return node.target in ZEROS
