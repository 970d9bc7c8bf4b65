"""Nested state as JSON and tensors: what pickle does for a checkpoint, without code in the file.

A number, text, True, False and None stand for themselves, a list for a list. Whatever JSON has no word for is an
object of one key: ``{"dict": [[key, value], ...]}``, ``{"tuple": [...]}``, ``{"tensor": "name"}`` and
``{"float": "nan"}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["TreeError", "flatten", "restore"]

#: Deeper nesting did not come from a training; Python's own limit would be met in the middle of one.
MAX_DEPTH = 100
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


class TreeError(ValueError):
    """A tree holds what cannot be written, or is not one that :func:`flatten` gave."""


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """A tree of plain values and tensors as a JSON value, and the tensors that it names.

    Args:
        tree: None, bool, int, float, str, torch.Tensor, and lists, tuples and dicts of such; the keys of a dict are
            bool, int, str or None. A dict keeps its order. A tensor that occurs twice is stored once.

    Returns:
        The JSON value, and name -> tensor, on whatever device they are.

    Raises:
        TreeError: something of another type, named with its place.

    Example:
        >>> json, tensors = flatten({"step": 3, "betas": (0.9, 0.99), 0: torch.zeros(2)})
        >>> json
        {'dict': [['step', 3], ['betas', {'tuple': [0.9, 0.99]}], [0, {'tensor': '0'}]]}
        >>> restore(json, tensors)
        {'step': 3, 'betas': (0.9, 0.99), 0: tensor([0., 0.])}
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def visit(value: Any, place: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise TreeError(f"{place[:200]} is nested more than {MAX_DEPTH} deep")
        kind = type(value)
        if value is None or kind in (bool, int, str):
            return value
        if kind is float:
            return value if math.isfinite(value) else {"float": str(value)}
        if isinstance(value, Tensor):
            return {"tensor": names.get(id(value)) or add(value, place)}
        if kind is list:
            return [visit(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]
        if kind is tuple:
            return {"tuple": [visit(item, f"{place}[{i}]", depth + 1) for i, item in enumerate(value)]}
        if kind is dict:
            for key in value:
                if key is not None and type(key) not in (bool, int, str):
                    raise TreeError(f"{place} has the key {key!r}, a {_name(type(key))}; keys are bool, int, str, None")
            return {"dict": [[key, visit(item, f"{place}[{key!r}]", depth + 1)] for key, item in value.items()]}
        raise TreeError(
            f"{place} is a {_name(kind)}, which no checkpoint holds; known: None, bool, int, float, str, list, tuple, "
            "dict and plain tensors"
        )

    def add(value: Tensor, place: str) -> str:
        if type(value) not in (Tensor, torch.nn.Parameter) or value.layout != torch.strided or value.is_quantized:
            raise TreeError(f"{place} is a {_name(type(value))} of layout {value.layout}, not a plain tensor")
        if value.is_meta:
            raise TreeError(f"{place} is a tensor on the meta device: it has no values")
        name = names[id(value)] = str(len(tensors))
        tensors[name] = value
        return name

    return visit(tree, "state", 0), tensors


def restore(json: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that :func:`flatten` was given.

    Raises:
        TreeError: ``json`` is not what :func:`flatten` gives, names a tensor that is not there, or leaves one out.
    """
    used: set[str] = set()

    def visit(value: Any, depth: int) -> Any:
        if depth > 2 * MAX_DEPTH + 2:
            raise TreeError("the tree is nested too deep")
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            if not math.isfinite(value):
                raise TreeError(f"the number {value} is not written as JSON")
            return value
        if isinstance(value, list):
            return [visit(item, depth + 1) for item in value]
        if not isinstance(value, dict) or len(value) != 1:
            raise TreeError(f"the tree has {str(value)[:60]!r}, which nothing is written as")
        (word, content), *_ = value.items()
        if word == "float" and isinstance(content, str) and content in _WORDS:
            return _WORDS[content]
        if word == "tensor" and isinstance(content, str):
            if content not in tensors:
                raise TreeError(f"the tree names the tensor {content[:60]!r}, which is not there")
            used.add(content)
            return tensors[content]
        if word == "tuple" and isinstance(content, list):
            return tuple(visit(item, depth + 1) for item in content)
        if word == "dict" and isinstance(content, list):
            return table(content, depth)
        raise TreeError(f"the tree has {str(value)[:60]!r}, which nothing is written as")

    def table(pairs: list[Any], depth: int) -> dict[Any, Any]:
        result: dict[Any, Any] = {}
        for pair in pairs:
            if not (isinstance(pair, list) and len(pair) == 2):
                raise TreeError("an entry of a dict is not a key and a value")
            key = pair[0]
            if not (key is None or isinstance(key, (bool, int, str))) or key in result:
                raise TreeError(f"a dict has the key {str(key)[:60]!r}, which is no key or occurs twice")
            result[key] = visit(pair[1], depth + 1)
        return result

    tree = visit(json, 0)
    if len(used) != len(tensors):
        raise TreeError(f"{len(tensors) - len(used)} tensors are not in the tree")
    return tree


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
