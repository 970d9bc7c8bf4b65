"""A graph as plain values and arrays, and back.

What a field of a :class:`Node` or :class:`Graph` becomes follows from its type: numbers, texts and tuples of them are
plain values, fractions their hexadecimal text (which is exact, and which the container's strict JSON takes), weights
and other arrays the names of stored tensors. A field that holds its default is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mirrormask.runtime.graph.ir import Graph, Node, Weight

__all__ = ["from_plain", "graph_from", "graph_plain", "table", "to_plain"]

T = TypeVar("T")
Array = npt.NDArray[Any]

#: Types of fields that are stored as tensors.
ARRAYS = ("Weight | None", "Floats | None")
#: Types of fields that a graph with its weights in it does not hold.
EMPTY = ("Origin | None",)


def to_plain(kind: str, value: Any) -> Any:
    """The plain form of a field of type ``kind``."""
    if kind in ("str", "bool", "int", "float"):
        return float(value).hex() if kind == "float" else value
    if kind == "tuple[float, ...]":
        return [float(number).hex() for number in value]
    if kind in ("tuple[int, ...]", "tuple[int, int]", "list[str]"):
        return list(value)
    if kind == "dict[str, tuple[int, ...]]":
        return {name: list(shape) for name, shape in value.items()}
    raise TypeError(f"a file cannot hold a field of type {kind}")


def from_plain(kind: str, value: Any) -> Any:
    """The field of type ``kind`` that a plain value stands for.

    Raises:
        ValueError: it stands for none.
    """
    simple: dict[str, type] = {"str": str, "bool": bool, "int": int}
    if kind in simple and type(value) is simple[kind]:
        return value
    if kind == "float" and type(value) is str:
        return float.fromhex(value)
    if kind.startswith(("tuple", "list")) and type(value) is list:
        inner = kind[kind.index("[") + 1 :].rstrip("]").partition(",")[0]
        items = [from_plain(inner, item) for item in value]
        if kind == "tuple[int, int]" and len(items) != 2:
            raise ValueError(f"{len(items)} numbers where there should be two")
        return items if kind.startswith("list") else tuple(items)
    if kind == "dict[str, tuple[int, ...]]" and type(value) is dict:
        return {name: from_plain("tuple[int, ...]", shape) for name, shape in value.items()}
    raise ValueError(f"{str(value)[:60]} where there should be a {kind}")


def graph_plain(graph: Graph, keep: Callable[[Node, str, Array], str]) -> dict[str, Any]:
    """The plain form of a graph.

    Args:
        keep: told of each array (node, field, array), says under which name it is stored.
    """
    rows = [_node_plain(node, keep) for node in graph.nodes]
    named = {f.name: to_plain(str(f.type), getattr(graph, f.name)) for f in fields(Graph) if f.name != "nodes"}
    return {**named, "nodes": rows}


def graph_from(values: Any, arrays: Mapping[str, Array]) -> Graph:
    """The graph of a plain form, with these stored arrays.

    Raises:
        ValueError: it is no such form.
    """
    stored = table(values, "a graph")
    nodes = stored.pop("nodes", None)
    if not isinstance(nodes, list):
        raise ValueError("a graph without nodes")
    weights: dict[str, Weight] = {}
    made = [_made(Node, _node_fields(), table(row, "a node"), arrays, weights) for row in nodes]
    wanted = [f for f in fields(Graph) if f.name != "nodes"]
    return _made(lambda **named: Graph(nodes=made, **named), wanted, stored, {}, {})


def table(value: Any, what: str) -> dict[str, Any]:
    """``value`` as a table of its own, if it is one."""
    if not isinstance(value, dict):
        raise ValueError(f"{str(value)[:60]} where there should be {what}")
    return dict(value)


def _node_fields() -> list[Field[Any]]:
    return [f for f in fields(Node) if str(f.type) not in EMPTY]


def _node_plain(node: Node, keep: Callable[[Node, str, Array], str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for field in fields(Node):
        kind, value = str(field.type), getattr(node, field.name)
        if value is None:
            continue
        if kind in ARRAYS:
            row[field.name] = keep(node, field.name, value.dense() if isinstance(value, Weight) else value)
        elif value != field.default:
            row[field.name] = to_plain(kind, value)
    return row


def _made(
    make: Callable[..., T],
    wanted: list[Field[Any]],
    row: dict[str, Any],
    arrays: Mapping[str, Array],
    weights: dict[str, Weight],
) -> T:
    values: dict[str, Any] = {}
    for field in wanted:
        kind = str(field.type)
        if field.name not in row:
            if field.default is MISSING:
                raise ValueError(f"it lacks its {field.name}")
            continue
        value = row.pop(field.name)
        if kind in ARRAYS:
            values[field.name] = _array(kind, value, arrays, weights)
        else:
            values[field.name] = from_plain(kind, value)
    if row:
        raise ValueError(f"it holds {next(iter(row))[:40]!r}, which this version does not know")
    return make(**values)


def _array(kind: str, name: Any, arrays: Mapping[str, Array], weights: dict[str, Weight]) -> Any:
    if not isinstance(name, str) or name not in arrays:
        raise ValueError(f"it names the stored array {str(name)[:60]!r}, which is not there")
    if kind == "Weight | None" and name in weights:
        return weights[name]
    array = arrays[name]  # reads and decodes it
    if array.dtype != np.float32:
        raise ValueError(f"the stored array {name[:60]!r} is {array.dtype}, not float32")
    if kind != "Weight | None":
        return array
    weights[name] = Weight.of(array)
    return weights[name]
