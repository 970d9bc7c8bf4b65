"""A hash of what a model computes with whatever weights: its modules, their settings, and the code of their forward.

``torch.export`` takes seconds to load; a model whose structure was captured before need not be captured again. The hash
covers every plain attribute of every module and the code of every class and function outside of PyTorch that forward
can reach by name. What it cannot cover makes the model one without a hash, which is captured each time; and because no
such list is ever complete, a build from a hash is checked against eager PyTorch like any other.
"""

from __future__ import annotations

import dis
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["structure_key"]

PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, slice, range)
#: Code that versions in the key stand for.
KNOWN = frozenset(sys.stdlib_module_names) | {"torch", "builtins"}
#: Attributes of ``nn.Module`` that are hashed in another way, or that say nothing about what it computes.
INTERNAL = frozenset(vars(nn.Module()))


class Unknown(Exception):
    """Something that a hash cannot be made of."""


def structure_key(model: nn.Module, inputs: tuple[Tensor, ...], *facts: object) -> str | None:
    """A hash of the model's structure, the inputs' shapes and ``facts``; ``None`` if there can be none."""
    walk = _Walk()
    try:
        walk.add("inputs", [(tuple(x.shape), str(x.dtype)) for x in inputs], facts, sys.version)
        for name, module in model.named_modules(remove_duplicate=False):
            walk.module(name, module)
    except (Unknown, RecursionError):
        return None
    return walk.digest.hexdigest()


class _Walk:
    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=20)
        self._seen: set[int] = set()
        self._keep: list[object] = []

    def add(self, *facts: object) -> None:
        self.digest.update(repr(facts).encode())

    def module(self, name: str, module: nn.Module) -> None:
        """One module: its class, its settings, and the names and shapes of its own tensors."""
        self.add("module", name)
        self.value(type(module))
        for kind in ("_parameters", "_buffers"):
            tensors = getattr(module, kind).items()
            self.add(kind, [(key, None if t is None else (tuple(t.shape), str(t.dtype))) for key, t in tensors])
        hooks = [key for key, value in vars(module).items() if key in INTERNAL and "hook" in key and value]
        if hooks:
            raise Unknown(hooks)
        for key, value in sorted(vars(module).items()):
            if key not in INTERNAL:
                self.add("attribute", key)
                self.value(value)

    def value(self, value: Any) -> None:
        """Anything that an attribute, a constant or a global name may hold."""
        if isinstance(value, (*PLAIN, enum.Enum)):
            self.add(type(value).__name__, repr(value))
        elif isinstance(value, (tuple, list)):
            self.add(type(value).__name__, len(value))
            for item in value:
                self.value(item)
        elif isinstance(value, dict):
            self.add("dict", len(value))
            for key, item in value.items():
                self.value(key)
                self.value(item)
        elif isinstance(value, (set, frozenset)):
            self.add("set", sorted(map(repr, value)))
            if not all(isinstance(item, PLAIN) for item in value):
                raise Unknown(value)
        elif isinstance(value, functools.partial):
            self.value([value.func, value.args, value.keywords])
        elif isinstance(value, (types.FunctionType, types.MethodType, type, types.BuiltinFunctionType)):
            self._code_of(value)
        elif isinstance(value, types.ModuleType):
            self.add("import", value.__name__)
        elif _known(type(value)) and not isinstance(value, (nn.Module, Tensor)) and not hasattr(value, "__dict__"):
            self.add("object", type(value).__qualname__, repr(value))
        else:
            raise Unknown(type(value))

    def _code_of(self, value: Any) -> None:
        """A function or a class: by name if a version stands for it, else by its code."""
        self.add("code", getattr(value, "__module__", ""), getattr(value, "__qualname__", ""))
        if id(value) in self._seen or _known(value):
            return
        self._seen.add(id(value))
        self._keep.append(value)  # or its number could become another's
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
        skipped = ("__dict__", "__weakref__", "__doc__", "__annotations__", "__init__", "__module__")
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
        self._code(function.__code__, function.__globals__)

    def _code(self, code: types.CodeType, scope: dict[str, Any]) -> None:
        self.add(code.co_code, code.co_names, code.co_varnames, code.co_freevars, code.co_flags)
        for step in dis.get_instructions(code):
            if step.opname == "IMPORT_NAME" and str(step.argval).partition(".")[0] not in KNOWN:
                raise Unknown(step.argval)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                self._code(constant, scope)
            else:
                self.value(Ellipsis.__class__.__name__ if constant is ... else constant)
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


def _known(value: Any) -> bool:
    """Whether PyTorch's or Python's version says what this is."""
    return str(getattr(value, "__module__", None) or "builtins").partition(".")[0] in KNOWN
