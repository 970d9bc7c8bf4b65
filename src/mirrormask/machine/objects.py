"""Object code into memory without LLVM, whose library takes 75 MB: more than the training of a small network.

This is the least that code of ours needs: x86-64 on Linux, functions and constants of one object, no symbols of others.
Whatever goes beyond is left to :meth:`mirrormask.machine.jit.Engine.load`.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys
from collections.abc import Iterable
from typing import NamedTuple

__all__ = ["defines", "load", "serves"]

#: What stays loaded: functions have no owner.
_loaded: list[object] = []

X86_64, AARCH64, RELOCATABLE = 62, 183, 1
ALLOCATED, PROGRAM, SYMBOLS, RELOCATIONS, NO_BITS = 2, 1, 2, 4, 8
#: What an object that is not one, or not whole, leads to.
FAULTS = (struct.error, LookupError, ValueError, ArithmeticError, MemoryError, OSError, AttributeError)
#: Relocations, to ``symbol + addend``: its address in eight bytes, and how far it is in four (PC32, PLT32) or eight.
ABSOLUTE, NEAR, FAR = 1, (2, 4), 24


class _Section(NamedTuple):
    """A section header, in ELF's order, but for its name."""

    kind: int
    flags: int
    address: int
    offset: int
    size: int
    link: int
    info: int
    align: int
    entry: int


def serves() -> bool:
    """Whether this machine's object code is of the kind that :func:`load` reads."""
    return sys.platform == "linux" and platform.machine() == "x86_64" and sys.maxsize > 2**32


def load(code: bytes, names: Iterable[str]) -> dict[str, int] | None:
    """Put object code where it can be called.

    The memory is written first and made executable then, never both at once.

    Args:
        code: an ELF object for this processor, from a source that is trusted.
        names: the functions that are wanted.

    Returns:
        name -> address; None where the object has what this loader does not know, or lacks a name.
    """
    try:
        return _load(code, list(names))
    except FAULTS:
        return None


def defines(code: bytes, name: str) -> bool:
    """Whether LLVM can be given this object for a function's sake: on one that is not whole, it ends the process.

    Of what is not ELF (macOS, Windows) only that there is something is known.

    Args:
        code: an object from a source that is trusted.
        name: the function that is wanted.
    """
    machine = {"x86_64": X86_64, "aarch64": AARCH64}.get(platform.machine())
    if sys.platform != "linux" or machine is None:
        return name.encode() in code
    try:
        sections = _sections(code, machine)
        symbols, strings = _symbols(sections)
        inside = all(section.offset + section.size <= len(code) for section in sections if section.kind != NO_BITS)
        table = code[symbols.offset : symbols.offset + symbols.size]
        names = (_text(code, strings + at) for at, _, _, of, _, _ in struct.iter_unpack("<IBBHQQ", table) if of)
        return inside and name in names
    except FAULTS:
        return False


def _load(code: bytes, names: list[str]) -> dict[str, int]:
    sections = _sections(code, X86_64)
    places: dict[int, int] = {}  # of each section that is needed at run time
    size = 0
    for index, section in enumerate(sections):
        if section.flags & ALLOCATED and section.kind in (PROGRAM, NO_BITS):
            size += -size % max(section.align, 1)
            places[index], size = size, size + section.size
    memory = mmap.mmap(-1, max(size, 1), prot=mmap.PROT_READ | mmap.PROT_WRITE)
    start = ctypes.addressof(anchor := ctypes.c_char.from_buffer(memory))
    for index, place in places.items():
        section = sections[index]
        if section.kind == PROGRAM:
            memory[place : place + section.size] = code[section.offset : section.offset + section.size]
    symbols, strings = _symbols(sections)
    found: dict[str, int] = {}
    addresses: list[int | None] = []
    for offset in range(symbols.offset, symbols.offset + symbols.size, 24):
        name, _, _, of, value, _ = struct.unpack_from("<IBBHQQ", code, offset)
        addresses.append(start + places[of] + value if of in places else None)
        address = addresses[-1]
        if address is not None:
            found[_text(code, strings + name)] = address
    for section in sections:
        if section.kind == RELOCATIONS and section.info in places and section.size:
            _relocate(code, section, memory, start, places[section.info], addresses)
    wanted = {name: found[name] for name in names}
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    if protect(start, size, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "mprotect")
    _loaded.append((memory, anchor))
    return wanted


def _sections(code: bytes, wanted: int) -> list[_Section]:
    magic, kind, machine = struct.unpack_from("<6s10xHH", code)
    if magic != b"\x7fELF\x02\x01" or kind != RELOCATABLE or machine != wanted:
        raise ValueError("not an object of this processor")
    table, entry, count = (*struct.unpack_from("<Q", code, 40), *struct.unpack_from("<HH", code, 58))
    return [_Section(*struct.unpack_from("<IQQQQIIQQ", code, table + i * entry + 4)) for i in range(count)]


def _symbols(sections: list[_Section]) -> tuple[_Section, int]:
    """The table of symbols, and where their names begin."""
    symbols = next((section for section in sections if section.kind == SYMBOLS), None)
    if symbols is None:
        raise ValueError("no symbols")
    return symbols, sections[symbols.link].offset


def _text(code: bytes, start: int) -> str:
    return code[start : code.index(b"\0", start)].decode()


def _relocate(
    code: bytes, section: _Section, memory: mmap.mmap, start: int, base: int, addresses: list[int | None]
) -> None:
    """Write into one section, which is at ``base``, where its symbols are."""
    for offset in range(section.offset, section.offset + section.size, 24):
        where, info, addend = struct.unpack_from("<QQq", code, offset)
        address, kind, place = addresses[info >> 32], info & 0xFFFFFFFF, base + where
        if address is None:
            raise ValueError("a symbol of another object")
        if kind == ABSOLUTE:
            struct.pack_into("<Q", memory, place, address + addend)
        elif kind in NEAR:
            struct.pack_into("<i", memory, place, address + addend - (start + place))
        elif kind == FAR:
            struct.pack_into("<q", memory, place, address + addend - (start + place))
        else:
            raise ValueError(f"a relocation of type {kind}")
