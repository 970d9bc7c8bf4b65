"""What builds found, kept in the user's cache folder; a file that is damaged or of another version counts as none."""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from typing import Any

from mirrormask.machine.cache import read, source_hash, write
from mirrormask.runtime.graph.ir import Graph
from mirrormask.runtime.graph.levels import stored_as

__all__ = ["graph_key", "load", "store", "weights_key"]

#: Raised whenever the meaning of what is stored changes.
FORMAT = 3


def weights_key(graphs: list[Graph], *facts: object) -> str:
    """A hash of the graphs' layers, where their zeros are, and ``facts``; whatever the shapes of the inputs."""
    digest = hashlib.blake2b(repr((FORMAT, facts)).encode(), digest_size=20)
    for graph in graphs:
        for node in graph.layers():
            assert node.weight is not None
            digest.update(repr((node.op, node.stride, node.padding, node.groups, node.weight.shape)).encode())
            digest.update(stored_as(node.weight).encode())
            digest.update((node.weight.values if node.weight.gaps is None else node.weight.gaps).tobytes())
    return digest.hexdigest()


def graph_key(graphs: list[Graph], *facts: object) -> str:
    """A hash of the graphs, shapes included and weights left out, and of ``facts``."""
    digest = hashlib.blake2b(repr((FORMAT, facts)).encode(), digest_size=20)
    left_out = ("weight", "bias", "gain", "layer", "origin")
    for graph in graphs:
        digest.update(repr((graph.rows, graph.flattens, graph.inputs, graph.outputs, graph.shapes)).encode())
        for node in graph.nodes:
            plain = [getattr(node, f.name) for f in fields(node) if f.name not in left_out]
            digest.update(repr(plain).encode())
    return digest.hexdigest()


def load(key: str) -> dict[str, Any] | None:
    """What was stored under ``key``; ``None`` when there is nothing, or nothing that can be trusted."""
    try:
        stored = json.loads(read(f"{key}.json"))
        body = stored["body"]
        if stored["key"] != key or stored["checksum"] != _checksum(key, body) or not _is_sound(body):
            return None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return None
    else:
        return dict(body)


def store(key: str, body: dict[str, Any]) -> None:
    """Keep ``body`` under ``key``; a folder that cannot be written to is no reason to fail."""
    body = json.loads(json.dumps(body))
    text = json.dumps({"key": key, "checksum": _checksum(key, body), "body": body})
    write(f"{key}.json", text.encode())


def _checksum(key: str, body: object) -> str:
    return hashlib.sha256((key + source_hash() + json.dumps(body, sort_keys=True)).encode()).hexdigest()


def _is_sound(body: object) -> bool:
    """Whether it is a structure, what tuning found, or a report, as far as can be seen from here."""
    if not isinstance(body, dict):
        return False
    tables = all(isinstance(body.get(name, {}), dict) for name in ("regions", "choices", "facts"))
    rows, unsure = body.get("layers", []), body.get("unsure", {})
    return (
        tables
        and isinstance(unsure, dict)
        and all(type(tries) is int for tries in unsure.values())
        and all(isinstance(choice, dict) for choice in body.get("choices", {}).values())
        and all(isinstance(fact, bool) for fact in body.get("facts", {}).values())
        and isinstance(rows, list)
        and all(isinstance(row, dict) and isinstance(row.get("shape"), list) for row in rows)
        and ("layers" not in body or all(isinstance(body.get(name), float) for name in ("eager", "seconds")))
    )
