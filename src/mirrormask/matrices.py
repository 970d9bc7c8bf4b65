"""Which parameters of a model are the matrices of its layers: the one definition of what is sparsifiable.

``mm.sparsify``, ``mm.sparsity``, the metadata of a file and the benchmarks all ask here. A layer that the library
learns is a row in ``MATRICES``.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod

__all__ = [
    "EMBEDDINGS",
    "FLOATS",
    "Candidate",
    "candidates",
    "check_module",
    "default_weights",
    "defaults",
    "inputs_elsewhere",
    "made_from",
    "normed_dims",
    "output_axis",
]

#: Class of layer -> the names of its matrices, as a regular expression; subclasses are meant too.
MATRICES: dict[type[nn.Module], str] = {
    nn.Linear: "weight",
    nn.modules.conv._ConvNd: "weight",  # Conv1d to Conv3d and ConvTranspose1d to ConvTranspose3d
    nn.Bilinear: "weight",
    nn.MultiheadAttention: "in_proj_weight|[qkv]_proj_weight",  # its out_proj is a Linear of its own
    nn.RNNBase: r"weight_(ih|hh|hr)_l\d+(_reverse)?",  # RNN, LSTM, GRU
    nn.RNNCellBase: "weight_(ih|hh)",
}
#: The same for packages that need not be installed; the class too is a regular expression, over its full name.
MATRICES_ELSEWHERE = {
    r"transformers\.(pytorch|modeling)_utils\.Conv1D": "weight",
    r"transformers\.models\..*Experts": "(gate_up|gate|up|down)_proj",  # of mixtures of experts, all in one tensor
}
#: Layers of the table whose input is not dimension 1 of their matrix, where N:M patterns count: by the full name.
INPUTS_ELSEWHERE = r"(torch\.nn\.modules\.conv\._ConvTranspose.*|torch\.nn\.modules\.linear\.Bilinear)"
#: Layers of other packages whose outputs are not dimension 0 of their matrix -> which it is; experts come first there.
OUTPUTS_ELSEWHERE = dict(zip(MATRICES_ELSEWHERE, (1, 2), strict=True))
#: Layers whose matrix is looked up by rows: not sparsifiable unless asked for, and of sparse gradients if so built.
EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)

#: What weights may be of: not the 4 and 8-bit integers and floats of quantized layers.
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

WEIGHT_NORM = r"torch\.nn\.utils\.(parametrizations\._|weight_norm\.)WeightNorm"
SPECTRAL_NORM = r"torch\.nn\.utils\.(parametrizations\._|spectral_norm\.)SpectralNorm"
COMPLEX = "it is complex, and its real and imaginary part would have to become zero together"


@dataclass(frozen=True)
class Candidate:
    """One parameter of a model, under all its names and with all its owners.

    Attributes:
        parameter: the tensor.
        names: every name that leads to it; the first is the one of ``named_parameters``.
        owners: the module behind each name.
        is_matrix: a layer of ``MATRICES`` computes with it; for a parametrized layer, with what is made of it.
        is_embedding: an Embedding or EmbeddingBag owns it, whoever else does.
        is_scale: the ``g`` of weight norm, a zero of which would be a row of zeros.
        is_normed: the ``v`` of weight norm, whose rows are divided by their norms.
        barred: why this tensor is not chosen by default though its layer be of the table; empty if it may be.
    """

    parameter: nn.Parameter
    names: tuple[str, ...]
    owners: tuple[nn.Module, ...]
    is_matrix: bool
    is_embedding: bool
    is_scale: bool
    is_normed: bool
    barred: str

    @property
    def name(self) -> str:
        """The name under which it is chosen."""
        return self.names[0]

    @functools.cached_property
    def numel(self) -> int:
        """The number of elements; 0 for a lazy layer's, which has no shape yet."""
        return 0 if is_lazy(self.parameter) else self.parameter.numel()

    @property
    def is_default(self) -> bool:
        """Whether it is sparsifiable when nobody says otherwise: a matrix, and no embedding's, of a real float type."""
        return self.is_matrix and not self.is_embedding and not self.barred and self.parameter.dtype in FLOATS


def inputs_elsewhere(module: nn.Module) -> bool:
    """Whether the input dimension of a layer's matrix is not dimension 1, as it is in Linear and Conv.

    Example:
        >>> inputs_elsewhere(nn.ConvTranspose2d(4, 8, 3)), inputs_elsewhere(nn.Conv2d(4, 8, 3))
        (True, False)
    """
    kinds = [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
    patterns = (INPUTS_ELSEWHERE, *MATRICES_ELSEWHERE)
    return any(re.fullmatch(pattern, kind) for pattern in patterns for kind in kinds)


def output_axis(module: nn.Module) -> int:
    """The dimension of a layer's matrix that counts its outputs: 0, but for transposed convolutions and their kind.

    Example:
        >>> output_axis(nn.Linear(4, 8)), output_axis(nn.ConvTranspose2d(4, 8, 3))
        (0, 1)
    """
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        return 1
    for pattern, axis in OUTPUTS_ELSEWHERE.items():
        if _is_a(module, pattern):
            return axis
    return 0


def check_module(model: Any, name: str = "model") -> None:
    """Raise a TypeError that says what to pass, unless ``model`` is a module.

    Example:
        >>> check_module({"weight": torch.ones(2)})
        Traceback (most recent call last):
        ...
        TypeError: model is a dict, not an nn.Module; load the state dict into its model, and pass that
    """
    if isinstance(model, nn.Module):
        return
    kind = type(model).__name__
    remedy = ""
    if isinstance(model, Mapping):
        remedy = "; load the state dict into its model, and pass that"
    elif isinstance(model, type) and issubclass(model, nn.Module):
        kind, remedy = f"class, {model.__name__}", "; pass an instance of it"
    raise TypeError(f"{name} is a {kind}, not an nn.Module{remedy}")


def candidates(model: nn.Module) -> list[Candidate]:
    """All parameters of ``model``, each once, in the order of ``named_parameters``."""
    check_module(model)
    found: dict[int, list[tuple[str, nn.Module, nn.Parameter]]] = {}
    for prefix, module in _walk(model, "", frozenset()):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), []).append((prefix + name, module, parameter))
    embeddings: set[int] = set()
    matrices: set[int] = set()
    uses: dict[int, list[_Use]] = {}
    for module in model.modules():
        if isinstance(module, EMBEDDINGS):
            embeddings.update(id(parameter) for parameter in module.parameters())
        is_matrix = _matrix_names(_class_of(module))
        if not _is_made(module):  # as most are
            matrices.update(id(p) for name, p in module._parameters.items() if p is not None and is_matrix(name))
            continue
        for use in _trained(module):
            if use.role != "plain":
                uses.setdefault(id(use.parameter), []).append(use)
            if use.role != "g" and is_matrix(use.tensor):
                matrices.add(id(use.parameter))
    listed = []
    for key, places in found.items():
        names, owners, (parameter, *_) = zip(*places, strict=True)
        roles, barred = "", COMPLEX if parameter.is_complex() else ""
        if key in uses:  # of few: most parameters are what their module computes with
            roles = "".join(use.role for use in uses[key] if use.role in "gv")
            barred = next((use.barred for use in uses[key] if use.barred), barred)
        own = key in matrices, key in embeddings, "g" in roles, "v" in roles
        listed.append(Candidate(parameter, names, owners, *own, barred))
    return listed


def normed_dims(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Each name of a tensor of weight norm -> the dimensions of what is divided by its norm, a row mostly."""
    found: dict[str, tuple[int, ...]] = {}
    if not any(map(_is_made, model.modules())):
        return found  # nobody has put a norm there, and to list all parameters takes a while
    for c in candidates(model):
        for name, owner in zip(c.names, c.owners, strict=True) if c.is_normed else ():
            leaf = name.rpartition(".")[2]
            lengths = getattr(owner, "original0" if leaf == "original1" else f"{leaf.removesuffix('_v')}_g")
            dims = [d for d in range(c.parameter.dim()) if not lengths.dim() or lengths.shape[d] == 1]
            found[name] = tuple(dims)
    return found


def default_weights(model: nn.Module, *, frozen: bool) -> dict[str, nn.Parameter]:
    """The sparsifiable weights of ``model`` by name: what every part of the library means by its sparsity.

    A tensor that several modules share is judged by all of them: it is sparsifiable if a layer computes with it and
    no embedding owns it, in whichever order the modules stand.

    Args:
        model: any module.
        frozen: whether weights with ``requires_grad=False`` count: not for training, but for what a model holds.
    """
    return {c.name: c.parameter for c in defaults(candidates(model), frozen=frozen)}


def defaults(listed: list[Candidate], *, frozen: bool) -> list[Candidate]:
    """Those of a model's :func:`candidates` that :func:`default_weights` returns."""
    return [c for c in listed if c.is_default and (frozen or c.parameter.requires_grad)]


def made_from(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The name of a weight that a parametrization or a hook makes -> the names of the parameters it makes it from."""
    names = {id(c.parameter): c.name for c in candidates(model)}
    made: dict[str, tuple[str, ...]] = {}
    for prefix, module in _walk(model, "", frozenset()):
        for use in _trained(module):
            if use.role != "plain" and id(use.parameter) in names:
                made[prefix + use.tensor] = (*made.get(prefix + use.tensor, ()), names[id(use.parameter)])
    return made


class _Use(NamedTuple):
    """How a module computes with a parameter: as its ``tensor``, or as what ``tensor`` is made of."""

    tensor: str
    parameter: object
    role: str  # "plain", "v", "g" (weight norm), "made" (everything else that makes a tensor)
    barred: str = ""


@functools.lru_cache(1024)
def _matrix_names(module: Hashable) -> Callable[[str], object]:
    """Whether a name is one of a layer's matrices, or, of a layer that is none of the table, of nothing."""
    assert isinstance(module, type)
    patterns = [pattern for kind, pattern in MATRICES.items() if issubclass(module, kind)]
    patterns += [pattern for kind, pattern in MATRICES_ELSEWHERE.items() if _is_kind(module, kind)]
    return re.compile("|".join(patterns) or "(?!)").fullmatch


def _is_made(module: nn.Module) -> bool:
    """Whether a module may compute with something that is made of its parameters, so that to ask is worth the time."""
    return bool(module._forward_pre_hooks) or "parametrizations" in module._modules


def _trained(module: nn.Module) -> Iterator[_Use]:
    """The parameters that a module trains, by the tensors that it computes with."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            yield _Use(name, parameter, "plain")
    if parametrize.is_parametrized(module):
        assert isinstance(module.parametrizations, nn.ModuleDict)
        for name, steps in module.parametrizations.items():
            if isinstance(steps, parametrize.ParametrizationList):  # no modules of the user's under that name
                yield from _parametrized(name, steps)
    for hook in module._forward_pre_hooks.values():
        if _is_a(hook, WEIGHT_NORM):
            name = str(vars(hook)["name"])
            yield _Use(name, module._parameters.get(f"{name}_v"), "v")
            yield _Use(name, module._parameters.get(f"{name}_g"), "g")
        elif _is_a(hook, SPECTRAL_NORM):
            name = str(vars(hook)["name"])
            yield _Use(name, module._parameters.get(f"{name}_orig"), "made")
        elif isinstance(hook, BasePruningMethod):
            name = hook._tensor_name
            why = f"torch.nn.utils.prune masks it; torch.nn.utils.prune.remove(module, {name!r}) makes it plain"
            yield _Use(name, module._parameters.get(f"{name}_orig"), "made", why)


def _parametrized(name: str, steps: parametrize.ParametrizationList) -> Iterator[_Use]:
    """The originals of one parametrized tensor: those whose zeros are its zeros may be chosen."""
    foreign = [type(step).__name__ for step in steps if not _is_a(step, f"{WEIGHT_NORM}|{SPECTRAL_NORM}")]
    why = ""
    if foreign:
        why = (
            f"under {', '.join(foreign)} a zero of it need not be a zero of the weight; "
            f"torch.nn.utils.parametrize.remove_parametrizations(module, {name!r}) makes it plain"
        )
    for local, original in steps._parameters.items():
        if not foreign and _is_a(steps[0], WEIGHT_NORM):
            yield _Use(name, original, "g" if local == "original0" else "v")
        else:
            yield _Use(name, original, "made", why)


def _walk(module: nn.Module, prefix: str, above: frozenset[int]) -> Iterator[tuple[str, nn.Module]]:
    """Every path to every module, in the order of ``named_modules``; a module inside itself is not entered again."""
    yield prefix, module
    above |= {id(module)}
    for name, child in module._modules.items():
        if child is not None and id(child) not in above:
            yield from _walk(child, f"{prefix}{name}.", above)


def _is_a(thing: object, kind: str) -> bool:
    """``isinstance`` by full name: for classes that are private, may go, or are in a package that is not imported."""
    return _is_kind(_class_of(thing), kind)


def _class_of(thing: Any) -> Any:
    return type(thing)  # mypy does not know that a class can be hashed whose instances cannot


@functools.lru_cache(1024)
def _is_kind(own: Hashable, kind: str) -> bool:
    assert isinstance(own, type)
    return any(re.fullmatch(kind, f"{known.__module__}.{known.__qualname__}") for known in own.__mro__)
