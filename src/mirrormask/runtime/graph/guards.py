"""For which inputs a captured graph computes what its model does: conditions on shapes, and what else was the same.

``torch.export`` notes every decision that a model took by the sizes of its inputs, as conditions such as
``L['x'].size()[1] > 10``. They are read here with a parser that knows sizes, numbers and comparisons, and nothing else.
"""

from __future__ import annotations

import ast
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Guards", "Unreadable"]

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.truediv,
    ast.Mod: operator.mod,
    ast.Pow: lambda base, power: _power(base, power),
}
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
NAMED: dict[str, Callable[..., Any]] = {
    "Max": max,
    "Min": min,
    "max": max,
    "min": min,
    "abs": abs,
    "int": int,
    "float": float,
    "math.floor": math.floor,
    "math.ceil": math.ceil,
    "torch.sym_max": max,
    "torch.sym_min": min,
    "torch.sym_float": float,
    "torch.sym_int": int,
    "torch.sym_not": operator.not_,
}


class Unreadable(Exception):
    """A condition of another kind than those known here."""


@dataclass(frozen=True)
class Guards:
    """The conditions under which a capture holds.

    Attributes:
        conditions: Python expressions over ``L``, the model's arguments by name.
        free: (argument's number, dimension) of sizes that the graph leaves open. They were captured as 2 or more: below
            that, where PyTorch may broadcast, a call has to be compared with the model's first.
    """

    conditions: tuple[str, ...]
    free: frozenset[tuple[int, int]]

    def hold(self, arguments: Mapping[str, Any]) -> bool:
        """Whether all conditions are met by ``arguments``, by their names in the model's ``forward``."""
        try:
            return all(bool(_value(_parsed(condition), arguments)) for condition in self.conditions)
        except (Unreadable, SyntaxError, TypeError, LookupError, AttributeError, ArithmeticError):
            return False

    def small(self, shapes: Sequence[Sequence[int] | None]) -> frozenset[tuple[int, int, int]]:
        """The sizes that were left open and are 0 or 1: (argument's number, dimension, size)."""
        sizes = {(number, dim, (shapes[number] or ())[dim]) for number, dim in self.free}
        return frozenset(item for item in sizes if item[2] < 2)

    def as_plain(self) -> dict[str, Any]:
        """Plain values, for JSON; :meth:`from_plain` reads them."""
        return {"conditions": list(self.conditions), "free": sorted(map(list, self.free))}

    @classmethod
    def from_plain(cls, values: dict[str, Any]) -> Guards:
        """The guards that :meth:`as_plain` made the values of."""
        return cls(tuple(values["conditions"]), frozenset((n, dim) for n, dim in values["free"]))


@functools.lru_cache(1024)
def _parsed(condition: str) -> ast.expr:
    return ast.parse(condition, mode="eval").body


def _value(node: ast.expr, arguments: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() | None as value):
            return value
        case ast.Name(id="L"):
            return arguments
        case ast.Subscript(value=of, slice=index):
            return _value(of, arguments)[_value(index, arguments)]
        case ast.Call(func=ast.Attribute(value=of, attr="size" | "dim" as name), args=[]):
            tensor = _value(of, arguments)
            return tuple(tensor.shape) if name == "size" else len(tensor.shape)
        case ast.Call(func=function, args=given) if (called := ast.unparse(function)) in NAMED:
            return NAMED[called](*(_value(item, arguments) for item in given))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in BINARY:
            sides = _value(left, arguments), _value(right, arguments)
            if not all(isinstance(side, (int, float)) for side in sides):
                raise Unreadable(ast.dump(node))
            return BINARY[type(op)](*sides)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, arguments)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return not _value(operand, arguments)
        case ast.BoolOp(op=op, values=values):
            found = (_value(item, arguments) for item in values)
            return all(found) if isinstance(op, ast.And) else any(found)
        case ast.Compare(left=left, ops=ops, comparators=others):
            values = [_value(left, arguments), *(_value(item, arguments) for item in others)]
            return all(COMPARE[type(op)](a, b) for op, a, b in zip(ops, values[:-1], values[1:], strict=True))
    raise Unreadable(ast.dump(node))


def _power(base: Any, power: Any) -> Any:
    """Powers of sizes; conditions may come from a file, and others would take all memory."""
    if not (-64 <= power <= 64 and abs(base) < 1 << 64):
        raise ArithmeticError(f"{base} to the power of {power}")
    return base**power
