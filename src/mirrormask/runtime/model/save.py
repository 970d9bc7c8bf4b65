"""A compiled model into a file that runs without torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from mirrormask.checks import few
from mirrormask.runtime.bundle.loaded import Port
from mirrormask.runtime.bundle.plain import graph_plain
from mirrormask.runtime.bundle.read import KEY, VERSION, processor
from mirrormask.runtime.graph.ir import Node
from mirrormask.runtime.model.half import Mixed
from mirrormask.runtime.model.piece import Captured, Piece
from mirrormask.runtime.model.region import Region
from mirrormask.runtime.model.report import Report
from mirrormask.storage.contents import PREFIX
from mirrormask.storage.plan import Form, make_plan
from mirrormask.storage.writer import write

__all__ = ["save"]

Open = tuple[int | None, ...]
Shape = tuple[int, ...]


def save(body: nn.Module, report: Report, path: str | os.PathLike[str], metadata: Mapping[str, Any] | None) -> None:
    """Write what runs instead of a model; see :meth:`CompiledModel.save`.

    Raises:
        ValueError: a part of it needs torch.
    """
    if not isinstance(body, Piece):
        raise ValueError(_why_not(report))
    native = [captured for captured in body.captures if _steps(captured) is not None]
    if any(region.graph.recurrent for region in _regions(body.captures[0])):
        raise ValueError(
            "a file runs without PyTorch, and the loop over the moments of a recurrent layer does not yet; "
            "save the weights by mm.save, or export to ONNX"
        )
    if body.captures[0] not in native:
        raise ValueError(_why_not(report))
    arrays = _Arrays()
    variants = [_variant(captured, arrays) for captured in native]
    said = {
        "version": VERSION,
        "processor": processor(),
        "target": next(region.target.name for captured in native for region, _, _ in _steps(captured) or ()),
        "digest": arrays.digest.hexdigest(),
        "variants": variants,
    }
    text = json.dumps(said, ensure_ascii=False, separators=(",", ":"))
    form = Form(signed_zeros=True)  # of dense weights and biases: the same bits
    write(make_plan(arrays.tensors, metadata, None, form, more={KEY.removeprefix(PREFIX): text}), path)


def _regions(captured: Captured) -> list[Region]:
    inner = () if captured.module is None else captured.module.modules()
    return [module for module in (captured.region, *inner) if isinstance(module, Region)]


def _why_not(report: Report) -> str:
    if not report.compiled:
        return (
            f"there is nothing compiled to save: the model itself runs, as {report.reason}; "
            "compile it with force=True to save it all the same"
        )
    left = [f"{name} ({why})" for name, why in report.left]
    what = few(left) if left else "what puts its regions together"
    return f"a file runs without PyTorch, and these stay in it: {what}; save the weights by mm.save, or export to ONNX"


Step = tuple[Region, tuple[str, ...], tuple[str, ...]]


def _steps(captured: Captured) -> list[Step] | None:
    """The regions with the names of what they read and make; None where there is more to a call than regions."""
    if captured.region is not None:
        inputs = () if isinstance(captured.called, str) else captured.called
        names = tuple(name for name, shape in inputs if shape is not None)
        return [(captured.region, names, ("output:",))]
    if not captured.program or captured.module is None:
        return None
    steps: list[Step] = []
    groups: dict[str, str] = {}
    for kind, name, target, args, _ in captured.program:
        if kind == "call_module":
            region = captured.module.get_submodule(target)
            assert isinstance(region, Region)
            several = len(region.graph.outputs) > 1
            makes = tuple(f"{name}:{i}" for i in range(len(region.graph.outputs))) if several else (name,)
            steps.append((region, tuple(item["node"] for item in _items(args)), makes))
            groups[name] = name if several else ""
        elif kind == "call_function" and target == "getitem" and groups.get(_items(args)[0]["node"]):
            source, index = _items(args)
            steps[-1:] = [_renamed(step, f"{source['node']}:{index}", name) for step in steps[-1:]]
            if not any(name in makes for _, _, makes in steps):
                return None
        elif kind not in ("placeholder", "output"):
            return None
    return steps


def _items(args: Any) -> list[Any]:
    return list(args["tuple"]) if isinstance(args, dict) else list(args)


def _renamed(step: Step, old: str, new: str) -> Step:
    region, reads, makes = step
    return region, reads, tuple(new if name == old else name for name in makes)


def _variant(captured: Captured, arrays: _Arrays) -> dict[str, Any]:
    if isinstance(captured.called, str):
        raise ValueError(
            f"a file takes arrays by name, and {captured.called}; compile a module that takes tensors alone"
        )
    number = {i: n for n, i in enumerate(i for i, (_, shape) in enumerate(captured.called) if shape is not None)}
    free = sorted((number[leaf], dim) for leaf, dim in captured.guards.free)
    conditions = captured.guards.conditions
    small = [
        sorted([number[leaf], dim, size] for leaf, dim, size in sizes)
        for sizes, agreed in captured.agreed.items()
        if agreed and sizes
    ]
    inputs = [(name, shape) for name, shape in captured.called if shape is not None]
    examples: dict[str, Shape] = dict(inputs)
    opened: dict[str, Open] = {
        name: tuple(
            None if (n, dim) in free and f"L[{name!r}].size()[{dim}] == {size}" not in conditions else size
            for dim, size in enumerate(shape)
        )
        for n, (name, shape) in enumerate(inputs)
    }
    ports = [_port(Port(name, opened[name], shape)) for name, shape in inputs]
    rows = []
    names = _placeholders(captured)
    for region, reads, makes in _steps(captured) or ():
        if isinstance(region, Mixed):
            wide = sorted(region.wide) or ["none"]
            raise ValueError(
                f"a file holds one precision, and {few(wide)} run in fp32 beside half precision, or its range is "
                "checked; compile with precision='fp32'"
            )
        reads = tuple(names.get(name, name) for name in reads)
        _follow(region, reads, makes, examples, opened)
        rows.append({"region": _region(region, arrays), "reads": list(reads), "makes": list(makes)})
    results = _results(captured)
    outputs = [_port(Port(path, opened[name], examples[name])) for path, name in _leaves(results, "output")]
    return {
        "inputs": ports,
        "outputs": outputs,
        "guards": {"conditions": list(conditions), "free": [list(pair) for pair in free]},
        "small": small,
        "steps": rows,
        "results": results,
    }


def _placeholders(captured: Captured) -> dict[str, str]:
    """The names of a program's inputs -> those of the model's arguments."""
    if captured.region is not None or captured.program is None:
        return {}
    assert not isinstance(captured.called, str)
    inner = [name for kind, name, *_ in captured.program if kind == "placeholder"]
    return {
        inside: outside for inside, (outside, shape) in zip(inner, captured.called, strict=True) if shape is not None
    }


def _results(captured: Captured) -> Any:
    """What is returned, in the form of :attr:`Variant.results`."""
    if captured.region is not None or captured.program is None:
        return {"node": "output:"}
    (args,) = (_items(args) for kind, _, _, args, _ in captured.program if kind == "output")
    return args[0]


def _leaves(results: Any, path: str) -> list[tuple[str, str]]:
    """(where it is in what is returned, the value's name) of each array."""
    if isinstance(results, list):
        return [leaf for i, item in enumerate(results) for leaf in _leaves(item, f"{path}_{i}")]
    if not isinstance(results, dict):
        return []
    ((kind, content),) = results.items()
    if kind == "node":
        return [(path, content)]
    if kind == "tuple":
        return _leaves(content, path)
    return [
        leaf for key, item in content.items() for leaf in _leaves(item, key if path == "output" else f"{path}.{key}")
    ]


def _follow(
    region: Region,
    reads: tuple[str, ...],
    makes: tuple[str, ...],
    examples: dict[str, Shape],
    opened: dict[str, Open],
) -> None:
    """The shapes of what a region makes, for the example and in general."""
    call = region.core.call_for([examples[name] for name in reads], torch.get_num_threads())
    graph = region.graph
    first = opened[reads[0]]
    leading = first[:1] if graph.flattens or not graph.rows else first[:-1]
    varies = any(size is None for name in reads for size in opened[name][1:]) and not graph.rows
    for name, whole, inner in zip(makes, call.outer, call.plan.outputs, strict=True):
        examples[name] = whole
        tail: Open = (inner[0], *([None] * (len(inner) - 1))) if varies else inner
        opened[name] = (*leading, *tail)


def _port(port: Port) -> dict[str, Any]:
    return {"name": port.name, "shape": list(port.shape), "example": list(port.example)}


def _region(region: Region, arrays: _Arrays) -> dict[str, Any]:
    core = region.core
    return {
        "graph": graph_plain(core.graph, arrays.keep),
        "exact": sorted(map(list, core.exact)),
        "choices": {key: asdict(choice) for key, choice in sorted(core.tuner.choices.items())},
        "facts": dict(sorted(core.tuner.facts.items())),
    }


@dataclass
class _Arrays:
    """The arrays of a file: under their layers' names, and each but once."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    digest: Any = field(default_factory=hashlib.sha256)

    def keep(self, node: Node, what: str, array: npt.NDArray[Any]) -> str:
        array = np.ascontiguousarray(array)
        content = hashlib.sha256(repr((array.shape, array.dtype.str)).encode() + array.tobytes()).hexdigest()
        if content not in self.names:
            plain = f"{node.layer or node.name}.{what}"
            name, number = plain, 1
            while name in self.tensors:
                number += 1
                name = f"{plain}.{number}"
            self.names[content] = name
            self.tensors[name] = torch.from_numpy(array)
            self.digest.update(content.encode())
        return self.names[content]
