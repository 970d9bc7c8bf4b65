"""A method as plain values, for checkpoints: what it is made of, and where two of them differ."""

from __future__ import annotations

import ast
import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from mirrormask.methods.base import Method

__all__ = ["describe", "differences", "parse_repr"]


def describe(method: Method) -> dict[str, Any]:
    """The method as values that JSON keeps exactly.

    A part is ``{"type": its class, option: value, ...}``, parts within parts included. Numbers, strings, booleans and
    None are themselves, but for ``"inf"``, ``"-inf"`` and ``"nan"``; a tuple is a list. Whatever else there is, such as
    a part that is no dataclass, is its ``repr``.

    Example:
        >>> from mirrormask.methods import l1
        >>> describe(l1(0.9))["correction"]
        {'type': 'Proximal', 'alpha': 0.0001, 'until': 0.5}
    """
    described: dict[str, Any] = _plain(method)
    return described


def parse_repr(text: str) -> dict[str, Any]:
    """What :func:`describe` says of the method whose ``repr`` is ``text``; nothing of the text is run.

    Checkpoints of version 0.1.0 hold a method as its repr. Their field ``after`` is read as ``correction``.

    Raises:
        ValueError: the text is not made of calls and literals.

    Example:
        >>> from mirrormask.methods import gmp
        >>> parse_repr(repr(gmp(0.9))) == describe(gmp(0.9))
        True
    """
    try:
        part = _read(ast.parse(text, mode="eval").body, text)
        if not isinstance(part, dict):
            raise ValueError("it is no call with named options")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ValueError(
            f"cannot read the method {text[:200]!r}: {error}; go on with the version of mirrormask that saved it"
        ) from error
    method: Any = part
    while isinstance(method, dict):
        if "after" in method:
            method.setdefault("correction", method.pop("after"))
        method = method.get("adaptive")
    return part


def differences(saved: Mapping[str, Any], own: Method) -> list[str]:
    """Where the method that a description tells of differs from ``own``; empty if they are the same.

    An option that the description lacks was not there yet when it was made: it counts as having had its default, that
    of the class of ``own``'s part; or, where parts of then did otherwise, what the field's metadata has as
    ``"before"``.

    Args:
        saved: of :func:`describe` or :func:`parse_repr`, through JSON or not.
        own: the method to compare with.

    Returns:
        One line a difference, as in the example.

    Example:
        >>> from mirrormask.methods import gmp
        >>> differences(describe(gmp(0.5)), gmp(0.6))
        ['mask.sparsity: 0.5 there, 0.6 here']
    """
    return list(_differences("", saved, own))


def _plain(value: object) -> Any:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    options = _options(value)
    if options is None:
        return repr(value)
    return {"type": type(value).__qualname__} | {name: _plain(getattr(value, name)) for name in options}


def _options(value: object) -> dict[str, dataclasses.Field[Any]] | None:
    """The fields that a dataclass's own repr shows; None for what is known by its repr alone."""
    for kind in type(value).__mro__:
        if "__dataclass_fields__" in vars(kind):
            shown = {field.name: field for field in dataclasses.fields(kind) if field.repr}
            return None if "type" in shown else shown
        if "__repr__" in vars(kind):  # a class that is no dataclass itself and says more than the one it extends
            return None
    return None


def _read(node: ast.expr, text: str) -> Any:
    segment = ast.get_source_segment(text, node)
    match node:
        case ast.Call(func, [], keywords) if all(k.arg not in (None, "type") for k in keywords):
            return {"type": _name(func)} | {str(k.arg): _read(k.value, text) for k in keywords}
        case ast.Call(ast.Attribute(ast.Name("np")), [number], []):  # NumPy's own repr: np.float64(0.9)
            return _read(number, text)
        case ast.Call(func, arguments, keywords) if all(k.arg for k in keywords):
            _name(func)
            for inner in (*arguments, *(k.value for k in keywords)):
                _read(inner, text)
            return segment  # as describe gives what is no dataclass: its repr
        case ast.Name("inf" | "nan" as word):
            return word
        case ast.UnaryOp(ast.USub(), ast.Name("inf")):
            return "-inf"
        case ast.List(items) | ast.Tuple(items):
            return [_read(item, text) for item in items]
    try:
        value = ast.literal_eval(node)
    except ValueError as error:
        raise ValueError(f"{segment!r} is neither a literal nor a part") from error
    return _plain(value) if value is None or isinstance(value, (bool, int, float, str)) else segment


def _name(node: ast.expr) -> str:
    match node:
        case ast.Name(name):
            return name
        case ast.Attribute(owner, name):
            return f"{_name(owner)}.{name}"
    raise ValueError(f"{ast.unparse(node)!r} is no name of a class")


def _differences(path: str, saved: Any, own: object) -> Iterator[str]:
    here, options = _plain(own), _options(own)
    if isinstance(here, dict) != isinstance(saved, dict):  # one of them as its repr
        saved, here = _part(saved), _part(here)
    if isinstance(own, (list, tuple)) and isinstance(saved, list) and len(saved) == len(own):
        for index, (there, item) in enumerate(zip(saved, own, strict=True)):
            yield from _differences(f"{path}[{index}]", there, item)
    elif options is not None and isinstance(saved, Mapping) and saved.get("type") == here["type"]:
        prefix = f"{path}." if path else ""
        for name, field in options.items():
            if name in saved:
                yield from _differences(prefix + name, saved[name], getattr(own, name))
            elif "before" in field.metadata:
                yield from _differences(prefix + name, field.metadata["before"], getattr(own, name))
            elif field.default is not dataclasses.MISSING:
                yield from _differences(prefix + name, _plain(field.default), getattr(own, name))
            elif field.default_factory is not dataclasses.MISSING:
                yield from _differences(prefix + name, _plain(field.default_factory()), getattr(own, name))
            else:
                yield f"{prefix}{name}: not there, {_shown(here[name])} here"
        for name in saved:
            if name != "type" and name not in options:
                yield f"{prefix}{name}: {_shown(saved[name])} there, unknown here"
    elif saved != here:
        kinds = [value.get("type") if isinstance(value, Mapping) else None for value in (saved, here)]
        if all(kinds) and kinds[0] != kinds[1]:
            yield f"{path or 'the method'}: {kinds[0]} there, {kinds[1]} here"
        else:
            yield f"{path or 'the method'}: {_shown(saved)} there, {_shown(here)} here"


def _part(value: Any) -> Any:
    """A part that is given by its repr, if it can be read."""
    try:
        return _read(ast.parse(value, mode="eval").body, value) if isinstance(value, str) else value
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return value


def _shown(value: Any) -> str:
    """As Python would show it: a part as a call."""
    if isinstance(value, Mapping) and "type" in value:
        return f"{value['type']}({', '.join(f'{k}={_shown(v)}' for k, v in value.items() if k != 'type')})"
    return f"[{', '.join(map(_shown, value))}]" if isinstance(value, list) else repr(value)
