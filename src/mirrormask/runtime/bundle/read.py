"""``mirrormask.runtime.load``: a file of ``fast.save`` as a model that runs; nothing in the file is trusted."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from mirrormask.checks import check_int
from mirrormask.machine.cache import processor_facts
from mirrormask.machine.targets import Target, available_targets, best_target, fp16_target
from mirrormask.runtime.bundle.loaded import LoadedModel, Loading, Port, Variant
from mirrormask.runtime.bundle.plain import from_plain, graph_from, table
from mirrormask.runtime.graph.guards import Guards
from mirrormask.runtime.graph.sound import check
from mirrormask.runtime.schedule.problem import Choice
from mirrormask.runtime.schedule.runner import Runner
from mirrormask.runtime.schedule.tune import Tuner
from mirrormask.storage.container import open_container, parse_json
from mirrormask.storage.contents import COMPILED, PREFIX, Entry, contents_of, opened, stored_bits
from mirrormask.storage.errors import FormatError

__all__ = ["KEY", "VERSION", "load", "processor"]

#: The metadata that makes a file of weights one that runs, and the version of what it says.
KEY, VERSION = COMPILED, 1
#: Characters of a condition on sizes.
LONGEST = 4096
#: Kinds of damage that a graph may have beyond what is looked at by name.
FAULTS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    MemoryError,
    RuntimeError,
)


def load(path: str | os.PathLike[str], *, tune: bool = True, threads: int | None = None) -> LoadedModel:
    """Read a model that ``fast.save`` wrote, and make it ready to run here. NumPy and llvmlite are all it needs.

    On a processor like the one that the file was made on, with as many threads, it gives the same bits as ``fast``
    did. On another, the kernels are chosen anew for the best instruction set that there is, and results are equal to
    rounding.

    Args:
        path: the file. It holds no code: a graph, what was chosen, and weights, each with its checksum.
        tune: on another processor, measure the candidates once (kept in the cache, as builds are); without, take good
            guesses. Where the file was tuned on such a processor nothing is measured.
        threads: how many a call may use; by default ``$OMP_NUM_THREADS``, else the cores that this process may use.

    Returns:
        A :class:`LoadedModel`: called with float32 arrays, by position or by name.

    Raises:
        FormatError: the file is damaged, of another version, or not a compiled model.
        ValueError: ``threads`` is below 1.
        OSError: there is no such file, or it cannot be read.

    Example:
        >>> import tempfile, torch, mirrormask as mm
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4)).eval()
        >>> path = os.path.join(tempfile.mkdtemp(), "model.mirror")
        >>> mm.compile(model, torch.randn(8, 64), tune=False, force=True).save(path)
        >>> loaded = mm.runtime.load(path, threads=1)
        >>> loaded(np.zeros((3, 64), np.float32)).shape
        (3, 4)
    """
    start = time.perf_counter()
    if threads is not None:
        check_int("threads", threads, low=1)
    with opened(path) as (file, nbytes):
        container = open_container(file, nbytes)
        contents = contents_of(container)
        text = contents.metadata.get(KEY)
        if text is None:
            raise FormatError("it holds weights, and no compiled model; fast.save writes those that run")
        stored = _Stored(file, contents.entries)
        with _faults("what it says of the model"):
            found = _described(parse_json(text, "what it says of the model"), stored, tune)
        stored.check_all_read()
        notes = {key: value for key, value in contents.metadata.items() if not key.startswith(PREFIX)}
        count = threads or _threads()
        with _faults("the model cannot be run"):
            for variant in found.variants:
                for runner, shapes in _examples(variant):
                    runner.call_for(shapes, count)
                    runner.tuner.measure = False  # shapes that come later are not made to wait
        loading = Loading(found.target.name, count, found.like or tune, time.perf_counter() - start)
        return LoadedModel(found.variants, notes, loading)


def processor() -> str:
    """A hash of what this processor is: choices that were measured on another are not those for this one."""
    return hashlib.sha256(processor_facts().encode()).hexdigest()


def _threads() -> int:
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # further ones are of nested teams
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class _faults:
    """Whatever goes wrong in here is the file's fault."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, FAULTS) and not isinstance(error, FormatError):
            name = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            raise FormatError(f"{self.what}: {name}{str(error)[:300]}") from error


class _Stored(Mapping[str, npt.NDArray[np.float32]]):
    """The stored tensors by name, each read when it is asked for: one at a time is dense."""

    def __init__(self, file: IO[bytes], entries: Mapping[str, Entry | str]) -> None:
        self._file, self._entries, self._read = file, entries, set[str]()

    def __getitem__(self, name: str) -> npt.NDArray[np.float32]:
        entry = self._entries[name]
        if not isinstance(entry, Entry) or entry.dtype != "F32" or entry.becomes:
            raise FormatError("a compiled model's tensors are float32", tensor=name)
        self._read.add(name)
        return stored_bits(self._file, entry).view(np.float32).reshape(entry.shape)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def check_all_read(self) -> None:
        """No tensor may be there that the model does not name: its checksum would not have been looked at."""
        left = sorted(set(self._entries) - self._read)
        if left:
            raise FormatError("it is stored, but the model does not name it", tensor=left[0])


@dataclass(frozen=True)
class _Found:
    """What a file says: the variants, whether it was tuned on such a processor, and what they run on here."""

    variants: tuple[Variant, ...]
    like: bool
    target: Target


def _described(said: dict[str, Any], stored: _Stored, tune: bool) -> _Found:
    version = said.get("version")
    if version != VERSION:
        raise FormatError(f"it holds a model of version {str(version)[:40]}; this library reads {VERSION}; update it")
    known = {target.name: target for target in available_targets()}
    half = fp16_target()
    if half is not None:
        known[half.name] = half
    like = said["processor"] == processor() and said["target"] in known
    target = known[said["target"]] if like else best_target()
    variants = []
    for number, row in enumerate(_list(said["variants"], "variants")):
        key = hashlib.sha256(f"{said['digest']} {number} {target.name} {processor_facts()}".encode()).hexdigest()[:40]
        variants.append(_variant(table(row, "a variant"), stored, target, _Tuning(key, tune and not like, like)))
    if not variants:
        raise ValueError("no variants")
    return _Found(tuple(variants), like, target)


@dataclass(frozen=True)
class _Tuning:
    """How kernels are chosen: the cache's key, whether to measure, and whether the file's choices hold here."""

    key: str
    measure: bool
    like: bool


def _variant(row: dict[str, Any], stored: _Stored, target: Target, tuning: _Tuning) -> Variant:
    inputs, outputs = (tuple(_port(port) for port in _list(row[name], name)) for name in ("inputs", "outputs"))
    names = [port.name for port in inputs]
    if len(set(names)) != len(names) or not names:
        raise ValueError("an input is there twice, or there is none")
    steps, made = [], set(names)
    for number, step in enumerate(_list(row["steps"], "steps")):
        region = table(step["region"], "a region")
        runner = _runner(region, stored, target, tuning, number)
        reads, makes = (tuple(from_plain("list[str]", step[key])) for key in ("reads", "makes"))
        graph = runner.graph
        if len(reads) != len(graph.inputs) or len(makes) != len(graph.outputs) or not set(reads) <= made:
            raise ValueError("a step reads what is not there, or makes more or less than its region")
        made |= set(makes)
        steps.append((runner, reads, makes))
    _check_results(row["results"], made)
    guards = table(row["guards"], "guards")
    conditions = tuple(from_plain("list[str]", guards["conditions"]))
    free = frozenset(_pair(item, 2) for item in _list(guards["free"], "free sizes"))
    if not steps or any(number >= len(inputs) or dim >= len(inputs[number].shape) for number, dim in free):
        raise ValueError("free sizes of an input that is not there, or no steps")
    small = frozenset(
        frozenset(_pair(item, 3) for item in _list(sizes, "sizes")) for sizes in _list(row["small"], "small sizes")
    )
    if any(len(condition) > LONGEST for condition in conditions):
        raise ValueError("a condition that is too long")
    found = Variant(inputs, outputs, Guards(conditions, free), small, tuple(steps), row["results"])  # type: ignore[arg-type]
    if not found.guards.hold({port.name: _Sized(port.example) for port in inputs}):
        raise ValueError("its conditions do not hold for its own example")
    return found


@dataclass(frozen=True)
class _Sized:
    """What conditions look at of an array."""

    shape: tuple[int, ...]


def _runner(region: dict[str, Any], stored: _Stored, target: Target, tuning: _Tuning, number: int) -> Runner:
    graph = graph_from(region["graph"], stored)
    check(graph)
    key = hashlib.sha256(f"{tuning.key} {number}".encode()).hexdigest()[:40]
    around = sum(node.weight.nbytes for node in graph.layers() if node.weight is not None)
    tuner = Tuner(key if tuning.measure else "", measure=tuning.measure, around=around)
    runner = Runner(graph, target, tuner)
    if tuning.like:
        choices = table(region["choices"], "choices")
        tuner.given = {problem: _choice(table(choice, "a choice")) for problem, choice in choices.items()}
        tuner.facts = {question: from_plain("bool", fact) for question, fact in table(region["facts"], "facts").items()}
        runner.exact = {_pair(item, 2) for item in _list(region["exact"], "plans")}  # type: ignore[misc]
    return runner


def _examples(variant: Variant) -> Iterator[tuple[Runner, list[tuple[int, ...]]]]:
    """The runners with the shapes that the example brings to them, as far as those are the inputs' own."""
    shapes = {port.name: port.example for port in variant.inputs}
    for runner, reads, _ in variant.steps:
        if all(name in shapes for name in reads):
            yield runner, [shapes[name] for name in reads]


def _port(value: Any) -> Port:
    row = table(value, "an input or output")
    sizes = _list(row["shape"], "sizes")
    example = from_plain("tuple[int, ...]", row["example"])
    if any(size is not None and (type(size) is not int or size < 0) for size in sizes) or len(example) != len(sizes):
        raise ValueError(f"the sizes {sizes}")
    if any(size < 0 for size in example) or math.prod(example) >= 1 << 40:
        raise ValueError(f"the sizes {example}")
    return Port(from_plain("str", row["name"]), tuple(sizes), example)


def _choice(row: dict[str, Any]) -> Choice:
    return Choice(from_plain("str", row["kernel"]), *(from_plain("int", row[k]) for k in ("rows", "vectors", "block")))


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{str(value)[:60]} where there should be {what}")
    return value


def _pair(value: Any, count: int) -> tuple[int, ...]:
    numbers: tuple[int, ...] = from_plain("tuple[int, ...]", value)
    if len(numbers) != count or min(numbers) < 0:
        raise ValueError(f"{str(value)[:60]} where there should be {count} numbers")
    return numbers


def _check_results(form: Any, made: set[str]) -> None:
    if isinstance(form, list):
        for item in form:
            _check_results(item, made)
    elif isinstance(form, dict):
        if len(form) != 1:
            raise ValueError("a result that is none")
        ((kind, content),) = form.items()
        if kind == "node" and isinstance(content, str) and content in made:
            return
        if kind == "tuple" and isinstance(content, list):
            _check_results(content, made)
        elif kind == "dict" and isinstance(content, dict):
            _check_results(list(content.values()), made)
        else:
            raise ValueError(f"a result {str(content)[:60]} that is not made")
    elif form is not None and type(form) not in (bool, int, str):
        raise ValueError(f"a result {str(form)[:60]}")
