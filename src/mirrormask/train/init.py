"""The weights that a network starts from: a file, or those that its library has."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mirrormask import checks, storage
from mirrormask.checks import few
from mirrormask.optimizer.weights import WRAPPERS, bare_names

__all__ = ["Matched", "check_values", "initialise", "match", "read"]

#: Under which names training scripts keep a state dict among other things, the average of weights first.
WITHIN = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
#: Counts batches for batch norm's momentum; files from elsewhere may lack it, and nothing here reads it.
COUNTER = "num_batches_tracked"


@dataclass(frozen=True)
class Matched:
    """Which tensor of a file goes where.

    Attributes:
        tensors: name in the model -> tensor of the file.
        fresh: names in the model that keep their first weights: a head for other classes.
        unused: names in the file that nothing asked for.
        how: in words, where names were not the same.
    """

    tensors: dict[str, Tensor]
    fresh: list[str]
    unused: list[str]
    how: str = ""


def initialise(model: nn.Module, source: str, *, name: str, classes: int) -> str:
    """Write the weights of ``source`` into the model, and say in a line what came from where.

    Args:
        model: the network; its head has ``classes`` outputs.
        source: a state dict of ``torch.save``, a safetensors file, a file of ``mm.save``, or ``pretrained`` for the
            weights that timm or torchvision have for this model.
        name: of the model, as in the recipe.
        classes: a head in the file with another number of them is left out, and the model keeps its own.

    Raises:
        ValueError: the file cannot be read or holds no state dict, a parameter of the model is not in it (those that
            are missing and those that are left over are listed), it has another shape, is not finite, or is of
            integers.
    """
    tensors = _of_library(name) if source == "pretrained" else read(Path(source))
    matched = match(tensors, model.state_dict(), classes=classes, source=source)
    check_values(matched.tensors, model.state_dict(), source)
    model.load_state_dict(matched.tensors, strict=False)
    said = f"{name} starts from {source}: {len(matched.tensors)} tensors{matched.how}"
    if matched.fresh:
        said += f"; {few(matched.fresh)} keep their first, random weights: a head for {classes} classes"
    if matched.unused:
        said += f"; nothing asked for {few(matched.unused)}"
    return said


def read(path: Path) -> dict[str, Tensor]:
    """The state dict in a file, whatever lies around it; nothing in the file is run.

    Raises:
        ValueError: there is no such file, or no state dict in it.
    """
    if not path.is_file():
        kinds = (".safetensors", ".index.json", ".bin", ".pth", ".pt")
        inside = sorted(one.name for one in path.iterdir() if one.name.endswith(kinds)) if path.is_dir() else []
        remedy = "give a state dict (.pt, .pth, .bin), .safetensors or .index.json"
        if inside:
            remedy = f"it is a folder; name a file in it: {few(inside)}"
        raise ValueError(f"model.init={str(path)!r} is not a file; {remedy}")
    if path.suffix == ".json":
        return _joined(path)
    if path.suffix == ".safetensors":
        return dict(storage.load(path))
    try:
        held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # an unpickler, on any bytes
        objects = re.findall(r"GLOBAL (\S+)", str(error))
        reason = (
            f"a {objects[0]} of Python's" if objects else f"{type(error).__name__} ({str(error).partition(chr(10))[0]})"
        )
        raise ValueError(
            f"{str(path)!r} holds no plain state dict but {reason}, and nothing in a file is run; save one with "
            "torch.save(model.state_dict(), path)"
        ) from error
    tensors = _state_dict(held)
    if not tensors:
        keys = f" (its keys: {few([str(key) for key in held])})" if isinstance(held, Mapping) and held else ""
        raise ValueError(
            f"{str(path)!r} holds a {type(held).__name__} without tensors by name{keys}, not a state dict; save one "
            "with torch.save(model.state_dict(), path)"
        )
    return tensors


def _state_dict(held: Any, depth: int = 4) -> dict[str, Tensor]:
    """The tensors by name in what a training script has saved; none where nothing, or more than one thing, has any."""
    if not isinstance(held, Mapping) or not depth:
        return {}
    for key in WITHIN:
        if isinstance(held.get(key), Mapping):
            return _state_dict(held[key], depth - 1)
    tensors = {str(name): value.to_dense() for name, value in held.items() if isinstance(value, Tensor)}
    # Under a name of the script's own.
    own = [found for value in held.values() if (found := _state_dict(value, depth - 1))]
    return own[0] if len(own) == 1 and all(value.dim() == 0 for value in tensors.values()) else tensors


def _joined(index: Path) -> dict[str, Tensor]:
    """The tensors of a file that ``save_pretrained`` has cut into several."""
    try:
        places = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted({str(name) for name in places.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{str(index)!r} is no index of a model's files, with a weight_map in it") from error
    odd = [name for name in names if name != Path(name).name or name.endswith(".json")]
    if odd:
        raise ValueError(f"{str(index)!r} names {few(odd)}; the files must lie beside it")
    tensors = {key: value for name in names for key, value in read(index.parent / name).items()}
    lost = [key for key in places if key not in tensors]
    if lost:
        raise ValueError(f"{str(index)!r} promises {few(lost)}, which its files do not hold; fetch them again")
    return tensors


def match(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], *, classes: int, source: str) -> Matched:
    """Which tensor goes where: by name, without what wrappers put in front, and else by order.

    By order only where all names but the last parts differ and the last parts and shapes are the same, one by one: the
    same network, written by someone else.

    Raises:
        ValueError: something of the model is in none of these ways found.

    Example:
        >>> file = {"module.body.weight": torch.ones(3, 2), "module.head.weight": torch.ones(7, 3)}
        >>> model = {"body.weight": torch.zeros(3, 2), "head.weight": torch.zeros(5, 3)}
        >>> found = match(file, model, classes=5, source="net.pt")
        >>> list(found.tensors), found.fresh
        (['body.weight'], ['head.weight'])
    """
    given, how = _unwrapped(given, wanted)
    names = [name for name in wanted if not name.endswith(COUNTER)]
    if not any(name in given for name in names):
        ordered = _by_order(given, wanted, classes)
        if ordered is None:
            raise ValueError(
                f"none of the names in {source!r} is one of this model's: it has {few(list(given))}; the model asks "
                f"for {few(names)}"
            )
        given, how = ordered, ", by their order and shapes, since the names differ: look at the first accuracy"
    tensors: dict[str, Tensor] = {}
    fresh: list[str] = []
    missing: list[str] = []
    wrong: list[str] = []
    last = _head(names)
    for name in names:
        if name not in given:
            (fresh if name in last else missing).append(name)
        elif given[name].shape == wanted[name].shape:
            tensors[name] = given[name]
        elif _is_head(given[name], wanted[name], classes):
            fresh.append(name)
        else:
            wrong.append(f"{name} is {tuple(given[name].shape)} there, {tuple(wanted[name].shape)} here")
    unused = [name for name in given if name not in wanted and not name.endswith(COUNTER)]
    if missing or wrong:
        left = f"; the file has left over {few(unused)}" if unused else ""
        lacks = f"lacks {few(missing)} of this model{left}" if missing else ""
        differs = f"{lacks and ' and '}does not fit: {few(wrong)}" if wrong else ""
        raise ValueError(f"{source!r} {lacks}{differs}; choose the model that it is of, or rename its keys")
    tensors.update({name: given[name] for name in wanted if name.endswith(COUNTER) and name in given})
    return Matched(tensors, fresh, unused, how)


def _unwrapped(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """Without the parts that wrappers and trainers add, where most of the names become the model's by that.

    Up to three first parts, in any order; what does not begin with one (a loss, an average's counter) keeps its name.
    A wrapper may also lie within: of a layer that was compiled by itself.
    """
    found, longest = [("", dict(given))], [("", dict(given))]
    for _ in range(3):
        longer = []
        for before, names in longest:
            for first in (*WRAPPERS, "model", "net", "backbone"):
                bare = {n.removeprefix(first + "."): value for n, value in names.items() if n.startswith(first + ".")}
                if bare:
                    rest = {n: value for n, value in names.items() if not n.startswith(first + ".") and n not in bare}
                    longer.append((before + first + ".", {**rest, **bare}))
        found, longest = found + longer, longer
    told = [(f"the {before.removesuffix('.')!r} before" if before else "", names) for before, names in found]
    for before, names in tuple(told):
        within = bare_names(names)
        told.append((f"{before} and wrappers within".removeprefix(" and "), {within[n]: v for n, v in names.items()}))
    how, best = max(told, key=lambda one: sum(name in wanted for name in one[1]))  # the first of the best
    return best, f", without {how} their names" if how else ""


def _by_order(given: Mapping[str, Tensor], wanted: Mapping[str, Tensor], classes: int) -> dict[str, Tensor] | None:
    theirs, own = ([name for name in one if not name.endswith(COUNTER)] for one in (given, wanted))
    if len(theirs) != len(own):
        return None
    for a, b in zip(theirs, own, strict=True):
        alike = given[a].shape == wanted[b].shape or _is_head(given[a], wanted[b], classes)
        if not alike or a.rpartition(".")[2] != b.rpartition(".")[2]:
            return None
    return {b: given[a] for a, b in zip(theirs, own, strict=True)}


def check_values(tensors: Mapping[str, Tensor], wanted: Mapping[str, Tensor], source: str) -> None:
    """Refuse what ``load_state_dict`` would take without a word: numbers that are codes, and those that are none.

    Raises:
        ValueError: there are none (the meta device), integers or numbers of 8 bits for real numbers (a quantized file,
            whose scales lie elsewhere), complex ones, nan or inf, or what becomes so in the model's dtype.
    """
    absent = [name for name, value in tensors.items() if value.is_meta]
    if absent:
        raise ValueError(f"{source!r} holds {few(absent)} without values, on the meta device; save a loaded model")
    floating = {name: value for name, value in tensors.items() if wanted[name].is_floating_point()}
    kinds = {n: v.dtype for n, v in floating.items() if not v.is_floating_point() or v.dtype.itemsize == 1}
    if kinds:
        name, dtype = next(iter(kinds.items()))
        raise ValueError(
            f"{source!r} has {few(list(kinds))} as {dtype}, where the model computes with {wanted[name].dtype}: a "
            "quantized file, perhaps, whose scales lie elsewhere; give the file of before it was quantized"
        )
    bad = [name for name, value in floating.items() if not bool(value.isfinite().all())]
    if bad:
        raise ValueError(f"{source!r} holds nan or inf in {few(bad)}: its training has diverged; give an earlier one")
    large = {name: wanted[name].dtype for name, value in floating.items() if not _fits(value, wanted[name].dtype)}
    if large:
        raise ValueError(f"{source!r} holds numbers in {few(list(large))} that pass {next(iter(large.values()))}")


def _fits(value: Tensor, dtype: torch.dtype) -> bool:
    """Whether finite numbers are finite in another dtype."""
    return torch.finfo(value.dtype).max <= torch.finfo(dtype).max or bool(value.to(dtype).isfinite().all())


def _head(names: list[str]) -> list[str]:
    """The last module's: what a network without its head lacks."""
    owner = names[-1].rpartition(".")[0] if names else ""
    return [name for name in names if name.rpartition(".")[0] == owner]


def _is_head(there: Tensor, here: Tensor, classes: int) -> bool:
    same_rest = there.dim() == here.dim() > 0 and there.shape[1:] == here.shape[1:]
    return same_rest and here.shape[0] == classes != there.shape[0]


def _of_library(name: str) -> dict[str, Tensor]:
    kind, _, model = name.partition(":")
    if kind == "timm":
        make = partial(checks.require("timm", "timm", f"the model {name!r}").create_model, model, pretrained=True)
    elif kind == "torchvision":
        library = checks.require("torchvision.models", "train", f"the model {name!r}")
        make = partial(library.get_model, model, weights="DEFAULT")
    else:
        raise ValueError(
            f"model.init='pretrained' asks timm: or torchvision: for their weights, and {name!r} is of neither; give a "
            "file instead"
        )
    try:
        return dict(make().state_dict())
    except (OSError, RuntimeError) as error:  # no network, a mirror that is down; a model without weights
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"the weights of {name!r} could not be had: {reason}; where there is no network, download them elsewhere "
            "and give the file: --init PATH"
        ) from error
