"""A hash of what a model computes with whatever weights: its modules, their settings, and the code of their forward.

``torch.export`` takes seconds to load; a model whose structure was captured before need not be captured again. The hash
covers every attribute of every module and the code of every class and function that forward can reach by name. Names in
the code of an installed package are not followed: for what they lead to stand the package's version and the file; for
PyTorch, its version. What the hash cannot cover makes the model one without, which is captured each time; and because
no such list is ever complete, a build from a hash is checked against eager PyTorch like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import dis
import enum
import functools
import hashlib
import itertools
import logging
import os
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask.runtime.graph.tensors import INTERNAL, held_tensors

__all__ = ["structure_key"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range)
#: Code that versions in the key stand for.
KNOWN = frozenset(sys.stdlib_module_names) | {"torch", "builtins"}
#: Where packages are installed.
INSTALLED = tuple(os.path.join(sysconfig.get_path(kind), "") for kind in ("purelib", "platlib"))
#: Values that are looked at: a module that holds a data set is none whose structure is worth so long a look.
MOST_VALUES = 200_000


class Unknown(Exception):
    """Something that a hash cannot be made of."""


class _Plain:
    """An object as large as those whose attributes are all that there is to them."""


def structure_key(model: nn.Module, inputs: tuple[Tensor, ...], *facts: object) -> str | None:
    """A hash of the model's structure, the inputs' shapes and ``facts``; ``None`` if there can be none."""
    walk = _Walk(model)
    try:
        walk.add("inputs", [(tuple(x.shape), str(x.dtype)) for x in inputs], facts, sys.version)
        for name, module in model.named_modules(remove_duplicate=False):
            walk.module(name, module)
    except Exception:  # Unknown, no end of it, or whatever a stranger's attributes raise
        return None
    return walk.digest.hexdigest()


class _Walk:
    def __init__(self, model: nn.Module) -> None:
        self.digest = hashlib.blake2b(digest_size=20)
        self._own: dict[int, str] = {}
        """The names of the model's modules and tensors, by identity."""
        self._own |= {id(one): name for name, one in held_tensors(model).items()}
        for kind in (model.named_modules, model.named_parameters, model.named_buffers):
            self._own |= {id(one): name for name, one in kind(remove_duplicate=False)}
        self._left = MOST_VALUES
        self._seen: dict[int, int] = {}
        self._keep: list[object] = []

    def add(self, *facts: object) -> None:
        self.digest.update(repr(facts).encode())

    def module(self, name: str, module: nn.Module) -> None:
        """One module: its class, its settings, and the names and shapes of its own tensors."""
        self.add("module", name)
        self.value(type(module))
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(module, kind).items()
            self.add(kind, [(key, None if t is None else _looks(t)) for key, t in tensors])
        hooks = [key for key, value in vars(module).items() if key in INTERNAL and "hook" in key and value]
        if hooks:
            raise Unknown(hooks)
        for key, value in sorted(vars(module).items()):
            if key not in INTERNAL:
                self.add("attribute", key)
                self.value(value)

    def value(self, value: Any) -> None:
        """Anything that an attribute, a constant or a global name may hold."""
        self._left -= 1
        if self._left < 0:
            raise Unknown("more values than are looked at")
        if isinstance(value, (*PLAIN, enum.Enum)):
            self.add(type(value).__name__, repr(value))
        elif id(value) in self._own:
            self.add("own", self._own[id(value)], _looks(value) if isinstance(value, Tensor) else "")
        elif isinstance(value, (tuple, list, dict, set, frozenset)):
            self._items(value)
        elif isinstance(value, functools.partial):
            self.value([value.func, value.args, value.keywords])
        elif isinstance(value, contextlib._GeneratorContextManager):  # of a decorator, which makes it anew at each call
            self.value([value.func, value.args, value.kwds])
        elif isinstance(value, (types.FunctionType, types.MethodType, type, types.BuiltinFunctionType)):
            self._code_of(value)
        elif isinstance(value, types.ModuleType):
            self.add("import", value.__name__)
        elif isinstance(value, dataclasses.Field):
            self.value([value.name, value.default, value.default_factory])
        elif type(value) is object:  # it stands for nothing but itself
            self.add("sentinel", self._again(value))
        elif isinstance(value, logging.Logger):
            self.add("logger", value.name)
        elif isinstance(value, (nn.Module, Tensor)):
            raise Unknown(type(value))
        elif isinstance(value, weakref.ref):
            self.value([value()])
        elif isinstance(value, types.GenericAlias):
            self.add("alias", repr(value))
        elif _is_its_attributes(type(value)):
            self._object(value)
        elif _known(type(value)) and not hasattr(value, "__dict__") and " at 0x" not in repr(value):
            self.add("object", type(value).__qualname__, repr(value))
        else:
            raise Unknown(type(value))

    def _items(self, value: Any) -> None:
        """What a container holds, and what one of a class of its own is besides."""
        self.add("container", len(value))
        self._code_of(type(value))
        for key, item in sorted(getattr(value, "__dict__", {}).items()):
            self.add("attribute", key)
            self.value(item)
        if isinstance(value, (set, frozenset)):
            self.add("set", sorted(map(repr, value)))
            if not all(isinstance(item, PLAIN) for item in value):
                raise Unknown(value)
            return
        for item in itertools.chain.from_iterable(value.items()) if isinstance(value, dict) else value:
            self.value(item)

    def _object(self, value: object) -> None:
        """An object that is its class and its attributes: a model's settings, for one."""
        if self._again(value):
            return
        self._code_of(type(value))
        for key, item in sorted(vars(value).items()):
            if key.startswith("_") and key.endswith("hash") and type(item) is int:
                continue  # of the other attributes, and another in each process
            self.add("attribute", key)
            self.value(item)

    def _again(self, value: object) -> bool:
        """Whether this very thing was met before; if so, which one it was is noted."""
        number = self._seen.setdefault(id(value), len(self._seen))
        if number < len(self._keep):
            self.add("again", number)
            return True
        self._keep.append(value)  # or its number could become another's
        return False

    def _code_of(self, value: Any) -> None:
        """A function or a class: by name if a version stands for it, else by its code."""
        self.add("code", getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
        if _known(value) or self._again(value):
            return
        if isinstance(value, types.MethodType):
            self._bound_to(value.__self__)
            self._code_of(value.__func__)
        elif isinstance(value, type):
            for base in value.__mro__[1:]:
                self._code_of(base)
            self._members(value)
        elif isinstance(value, types.FunctionType):
            self._function(value)
        else:
            raise Unknown(value)

    def _bound_to(self, owner: object) -> None:
        """The object of a bound method: modules are hashed as modules, classes as classes."""
        if isinstance(owner, type):
            self._code_of(owner)
        elif not isinstance(owner, nn.Module):
            raise Unknown(owner)

    def _members(self, cls: type) -> None:
        skipped = ("__dict__", "__weakref__", "__slotnames__", "__doc__", "__annotations__", "__init__", "__module__")
        for name, member in sorted(vars(cls).items(), key=lambda pair: pair[0]):
            if name in skipped or name.startswith(("__dataclass", "__annot")):
                continue
            self.add("member", name)
            if isinstance(member, (staticmethod, classmethod)):
                self.value(member.__func__)
            elif isinstance(member, property):
                self.value([member.fget])
            else:
                self.value(member)

    def _function(self, function: types.FunctionType) -> None:
        wrapped = getattr(function, "__wrapped__", None)
        if wrapped is not None:
            self.value(wrapped)
        self.value([function.__defaults__, function.__kwdefaults__])
        cells = function.__closure__ or ()
        for cell in cells:
            content = cell.cell_contents
            if not (isinstance(content, type) and issubclass(content, nn.Module)):  # __class__, of super()
                self.value(content)
        # Where the code is from, whatever a decorator wrote into ``__module__``.
        release = _release(function.__globals__.get("__name__", ""))
        self.add("release", release)
        self._code(function.__code__, None if release else function.__globals__)

    def _code(self, code: types.CodeType, scope: dict[str, Any] | None) -> None:
        """Instructions and constants, and what they name in ``scope``; without, a release stands for that."""
        self.add(code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
        for step in dis.get_instructions(code) if scope is not None else ():
            if step.opname == "IMPORT_NAME" and str(step.argval).partition(".")[0] not in KNOWN:
                raise Unknown(step.argval)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, scope)
            else:
                self.value(Ellipsis.__class__.__name__ if constant is ... else constant)
        if scope is not None:
            self._names(code.co_names, scope)

    def _names(self, names: Iterable[str], scope: dict[str, Any]) -> None:
        """The global names that code reads, and the attributes that it reads of modules."""
        modules = []
        for name in names:
            if name in scope:
                found = scope[name]
                self.add("global", name)
                if isinstance(found, types.ModuleType):
                    modules.append(found)
                self.value(found)
        for module in modules:
            if module.__name__.partition(".")[0] not in KNOWN:
                for name in names:
                    if name in vars(module):
                        found = vars(module)[name]
                        self.add("of module", name)
                        self.value(found)
                        if isinstance(found, types.ModuleType) and found not in modules:
                            modules.append(found)  # the loop reaches it


def _looks(tensor: Tensor) -> tuple[object, ...]:
    """What is said of a tensor whose numbers are not part of the structure."""
    return tuple(tensor.shape), str(tensor.dtype)


def _is_its_attributes(kind: type) -> bool:
    """Whether objects of this class are what ``vars`` shows: no base in C with a state of its own, no slots."""
    slots = any(vars(base).get("__slots__") for base in kind.__mro__)
    return kind.__basicsize__ == _Plain.__basicsize__ and kind.__dictoffset__ == _Plain.__dictoffset__ and not slots


@functools.cache
def _release(module: str) -> tuple[object, ...] | None:
    """What stands for the code of a module of an installed package; ``None`` for code that no version stands for."""
    package, source = (sys.modules.get(name) for name in (module.partition(".")[0], module))
    version, file = getattr(package, "__version__", None), getattr(source, "__file__", None)
    if not isinstance(version, str) or not str(file).startswith(INSTALLED):
        return None
    try:
        stat, folder = os.stat(str(file)), os.stat(os.path.dirname(str(file)))
    except OSError:
        return None
    return version, stat.st_size, stat.st_mtime_ns, folder.st_mtime_ns  # of the folder: installing renews it


def _known(value: Any) -> bool:
    """Whether PyTorch's or Python's version says what this is."""
    return str(getattr(value, "__module__", None) or "builtins").partition(".")[0] in KNOWN
