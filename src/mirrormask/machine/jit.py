"""LLVM IR to machine code at run time, with llvmlite alone: no compiler is needed on the user's machine."""

from __future__ import annotations

import functools
import threading
from typing import Any

from mirrormask.checks import require

__all__ = ["Engine", "host_engine", "host_features"]

_LOCK = threading.Lock()


@functools.cache
def _binding() -> Any:
    binding = require("llvmlite.binding", "runtime", "generating machine code")
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    return binding


@functools.cache
def host_features() -> frozenset[str]:
    """The instruction-set features of this processor, in LLVM's names (``"avx512f"``, ``"fma"``, ``"neon"``)."""
    return frozenset(name for name, present in _binding().get_host_cpu_features().items() if present)


class Engine:
    """Compiles IR modules for one processor and keeps the machine code alive.

    Args:
        features: LLVM feature flags joined by commas (``"+avx2,+fma"``); ``None`` for all that the host has.
            The host's *features* are passed beside its name, because the name alone can be wrong under a
            hypervisor.
    """

    def __init__(self, features: str | None = None) -> None:
        self._llvm = _binding()
        cpu = "" if features is not None else self._llvm.get_host_cpu_name()
        features = self._llvm.get_host_cpu_features().flatten() if features is None else features
        target = self._llvm.Target.from_default_triple()
        self._machine = target.create_target_machine(cpu=cpu, features=features, opt=3, jit=True)
        self._engine = self._llvm.create_mcjit_compiler(self._llvm.parse_assembly(""), self._machine)

    def compile(self, ir: str) -> Any:
        """Optimise and load one module of textual IR; returns the llvmlite module, after ``verify``."""
        with _LOCK:
            module = self._optimised(ir, level=3)
            self._engine.add_module(module)
            self._engine.finalize_object()
        return module

    def object_code(self, ir: str, level: int = 3) -> bytes:
        """Optimise one module of textual IR at LLVM's ``level``, and return its object code, for :meth:`load` now or in
        a later process."""  # fmt: skip
        with _LOCK:
            return bytes(self._machine.emit_object(self._optimised(ir, level)))

    def load(self, code: bytes) -> None:
        """Load object code that :meth:`object_code` made for the same processor."""
        with _LOCK:
            self._engine.add_object_file(self._llvm.ObjectFileRef.from_data(code))
            self._engine.finalize_object()

    def _optimised(self, ir: str, level: int) -> Any:
        module = self._llvm.parse_assembly(ir)
        module.verify()
        options = self._llvm.create_pipeline_tuning_options(speed_level=level)
        builder = self._llvm.create_pass_builder(self._machine, options)
        builder.getModulePassManager().run(module, builder)
        return module

    def address(self, function: str) -> int:
        """The address of a compiled function, for ``ctypes``.

        Raises:
            KeyError: no compiled module defines it.
        """
        address = int(self._engine.get_function_address(function))
        if address == 0:
            raise KeyError(f"no compiled function is named {function!r}")
        return address

    def assembly(self, module: Any) -> str:
        """The assembly text of a module that :meth:`compile` returned."""
        return str(self._machine.emit_assembly(module))


@functools.cache
def host_engine() -> Engine:
    """The engine for this processor, one per process."""
    return Engine()
