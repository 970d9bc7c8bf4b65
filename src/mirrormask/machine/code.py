"""Functions of generated modules, compiled once a machine: later processes load them, if they can, without LLVM."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence

from mirrormask.machine import cache, objects
from mirrormask.machine.jit import host_engine

__all__ = ["functions"]


def functions(kind: str, ir: str, names: Sequence[str]) -> dict[str, int]:
    """The addresses of functions of a module of LLVM IR, compiled for this processor.

    Args:
        kind: what its file in the cache is called, in small letters.
        ir: the module; it must need no functions of others.
        names: the functions that are wanted.

    Returns:
        name -> address.
    """
    if not objects.serves():
        engine = host_engine()
        engine.compile(ir)
        return {name: engine.address(name) for name in names}
    facts = (ir, importlib.metadata.version("llvmlite"), cache.processor_facts())
    key = f"{kind}_{hashlib.sha256(repr(facts).encode()).hexdigest()[:24]}"
    code = cache.load_bytes(key)
    found = None if code is None else objects.load(code, names)
    if found is None:
        code = host_engine().object_code(ir)
        cache.store_bytes(key, code)
        found = objects.load(code, names)
    if found is None:  # something that only LLVM can load
        host_engine().load(code or b"")
        found = {name: host_engine().address(name) for name in names}
    return found
