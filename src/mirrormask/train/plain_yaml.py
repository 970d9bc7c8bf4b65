"""YAML from files that are not trusted: what could take long or much memory is refused before anything is built.

A file of a few hundred bytes can stand for a value of any size (aliases of aliases), and brackets alone can exhaust a
parser. So the stream of events is looked at first, each with an end in sight; only then values are made.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from typing import Any

from mirrormask import checks

__all__ = ["check_strings", "load"]

MAX_CHARACTERS, MAX_DEPTH, MAX_NODES, MAX_SCALAR = 250_000, 30, 20_000, 10_000
#: Digits beyond this make no number that anything here could use, and numbers of base 60 take quadratic time.
MAX_NUMBER = 400


def load(text: str, what: str) -> Any:
    """The value of a YAML document.

    Args:
        text: the document.
        what: to call it in messages.

    Raises:
        ValueError: it is not YAML, too large, nested too deep, has an alias or a key twice.

    Example:
        >>> load("a: [1, 2]", "the recipe")
        {'a': [1, 2]}
        >>> load("a: 1\\na: 2", "the recipe")
        Traceback (most recent call last):
        ValueError: the recipe has the key 'a' twice (line 2); keep one
    """
    yaml = checks.require("yaml", "train", "reading YAML")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"{what} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read")
    try:
        _check_events(yaml, text, what)
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _check_keys(yaml, loader, node, what)
            value = loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"{what} is not YAML: {_short(error)}") from error
    except (OverflowError, RecursionError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(f"{what} holds what is no value: {_short(error)}") from error
    check_strings(value, what)
    return value


def check_strings(value: Any, what: str) -> None:
    """Refuse a text among values that is itself YAML with aliases, too large or too deep, or acts on a terminal.

    The parser of options reads a text as YAML where the option is no text. No path holds a NUL, and a folder of the
    recipe's is named in many messages.
    """
    yaml = checks.require("yaml", "train", "reading YAML")
    for text in _strings(value):
        control = next((c for c in text if unicodedata.category(c) == "Cc" and c not in "\t\n\r"), None)
        if control is not None:
            raise ValueError(f"{what} has the control character {control!r} in {text[:60]!r}; take it out")
        if not any(character in text for character in "&*[{"):
            continue
        try:
            _check_events(yaml, text, what)
        except yaml.YAMLError:
            continue  # a text, and nothing but


def _check_events(yaml: Any, text: str, what: str) -> None:
    depth = nodes = 0
    anchors = set()
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in anchors:
                raise yaml.YAMLError(f"the alias *{event.anchor} (line {line}) stands for nothing")
            raise ValueError(f"{what} has the alias *{event.anchor[:40]} (line {line}); write the value out")
        if isinstance(event, yaml.NodeEvent):
            nodes += 1
            if event.anchor is not None:
                anchors.add(event.anchor)
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent):
            plain = event.style is None and event.value[:1] in "+-.0123456789"
            most = MAX_NUMBER if plain or event.tag is not None else MAX_SCALAR
            if len(event.value) > most:
                raise ValueError(
                    f"{what} has a value of {len(event.value):,} characters (line {line}); at most {most:,}"
                )
        if depth > MAX_DEPTH:
            raise ValueError(f"{what} is nested more than {MAX_DEPTH} deep (line {line})")
        if nodes > MAX_NODES:
            raise ValueError(f"{what} has more than {MAX_NODES:,} values (line {line})")


def _check_keys(yaml: Any, loader: Any, node: Any, what: str) -> None:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(yaml, loader, item, what)
    if not isinstance(node, yaml.MappingNode):
        return
    seen = set()
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise ValueError(f"{what} has a key that is no plain value (line {key.start_mark.line + 1})")
        made = loader.construct_object(key)
        if made in seen:
            raise ValueError(f"{what} has the key {made!r} twice (line {key.start_mark.line + 1}); keep one")
        seen.add(made)
        _check_keys(yaml, loader, value, what)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _strings(item)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
