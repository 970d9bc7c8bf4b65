"""Distillation: a loss that draws a network to another's outputs, and to what it computes on the way."""

from __future__ import annotations

import difflib
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from mirrormask.checks import check_int, check_number, few
from mirrormask.matrices import check_module
from mirrormask.overlaps import sharing

__all__ = ["Distillation", "distill", "feature_loss", "logit_loss"]

Features = Sequence[str] | Mapping[str, str]
Positions = Callable[..., Tensor]

#: The least that a token's squared norm counts as, as a share of the mean: padding may be next to zero.
FLOOR = 1e-3

#: Below, the teacher's probabilities are 0 and 1; above, the differences of float32 probabilities are rounding.
TEMPERATURES = (1e-3, 1e4)


def logit_loss(
    student: Tensor, teacher: Tensor, temperature: float, classes: int = -1, counted: Tensor | None = None
) -> Tensor:
    """``T² KL(softmax(teacher / T) ‖ softmax(student / T))``, summed over classes and averaged over all else.

    Args:
        student, teacher: logits of one shape.
        temperature: T, in [0.001, 10000].
        classes: the dimension of the classes.
        counted: a bool tensor of the logits' shape without the classes: what is averaged over; None for all.

    Returns:
        A scalar, float32 or, for float64 logits, float64.

    Example:
        >>> round(float(logit_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2.0]]), 2.0)), 4)
        0.4438

    Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531, section 2 and 2.1 (for the factor T²).
    """
    student, teacher = (_counting(logits, counted, classes) for logits in (student, teacher))
    # A difference of logarithms of nearly the same size is rounding in half precision.
    dtype = torch.promote_types(student.dtype, torch.float32)
    ours = F.log_softmax(student.to(dtype) / temperature, classes)
    theirs = F.log_softmax(teacher.to(dtype) / temperature, classes)
    terms = F.kl_div(ours, theirs, reduction="none", log_target=True)
    terms = terms.masked_fill(theirs == -torch.inf, 0.0)  # 0 log 0 is none, and torch makes it nan
    return temperature**2 * _mean(terms.sum(classes), counted)


def feature_loss(student: Tensor, teacher: Tensor, counted: Tensor | None = None) -> Tensor:
    """``mean over i of ‖s_i - t_i‖² / ‖t_i‖²``, for the vector of channels of each token or pixel i.

    Args:
        student, teacher: features of one shape, ``(..., channels)`` with up to three dimensions, and with more, as
            convolutions have them, ``(examples, channels, ...)``.
        counted: a bool tensor of the features' shape without the channels: which i count; None for all.

    Example:
        >>> float(feature_loss(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), torch.tensor([[4.0, 0.0], [0.0, 1.0]])))
        0.03125

    Source: this library; features as hints are Romero et al.'s, arXiv 1412.6550, normalised so that no layer and no
    token counts more for being larger.
    """
    channels = _channels(student)
    student, teacher = (_counting(features, counted, channels) for features in (student, teacher))
    dtype = torch.promote_types(student.dtype, torch.float32)  # squares overflow in half precision
    student, theirs = student.to(dtype), teacher.to(dtype)
    size = theirs.square().sum(channels)
    floor = FLOOR * _mean(size, counted) + torch.finfo(size.dtype).tiny
    return _mean((student - theirs).square().sum(channels) / torch.maximum(size, floor), counted)


def _channels(features: Tensor) -> int:
    return -1 if features.dim() <= 3 else 1


def _counting(x: Tensor, counted: Tensor | None, channels: int) -> Tensor:
    """Zeros where nothing counts: whatever is there, nan too, has no gradient then."""
    return x if counted is None else x.masked_fill(~counted.unsqueeze(channels), 0.0)


def _mean(values: Tensor, counted: Tensor | None) -> Tensor:
    """The mean of what counts, of zeros elsewhere; 0 where nothing does."""
    return values.mean() if counted is None else values.sum() / counted.sum().clamp_min(1)


class Distillation:
    """The loss that :func:`distill` returns: ``loss = distill(output, inputs...)``.

    It is also a context; its end, :meth:`close`, and the end of the object itself remove the hooks on both networks.

    Attributes:
        parts: what the last call was made of, detached: ``"logits"``, and each of the student's features by name.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float | None,
        features: Features | None,
        feature_weight: float,
        classes: int,
        positions: Positions | None,
    ) -> None:
        for name, model in (("student", student), ("teacher", teacher)):
            check_module(model, name)
        own, others = ({id(p): p for p in model.parameters()} for model in (student, teacher))
        # load_state_dict(..., assign=True) makes parameters of their own in the same memory.
        alike = sharing([*own.values(), *others.values()], own)
        if student is teacher or own.keys() & others.keys() or any(id(p) in others for pair in alike for p in pair):
            raise ValueError(
                "the teacher shares parameters with the student, and would change with it; pass copy.deepcopy(model)"
            )
        if temperature is not None:
            check_number("temperature", temperature, low=TEMPERATURES[0], high=TEMPERATURES[1])
        check_number("feature_weight", feature_weight, low=0.0)
        check_int("classes", classes, low=-10)
        if positions is not None and not callable(positions):
            raise TypeError(
                f"positions is a {type(positions).__name__}, not a function of what the student is given, such as "
                "lambda input_ids, attention_mask, **_: attention_mask"
            )
        if temperature is None and not features:
            raise ValueError("temperature=None leaves out the logits; name features=, or nothing is left to learn")
        if isinstance(features, str):
            raise TypeError(f"features={features!r} is one name; pass [{features!r}]")
        pairs = dict(features) if isinstance(features, Mapping) else {name: name for name in features or ()}
        self.teacher = teacher
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.classes = classes
        self.positions = positions
        self.pairs = pairs
        self.parts: dict[str, Tensor] = {}
        self._ours: dict[str, Tensor] = {}
        self._theirs: dict[str, Tensor] = {}
        self._given: list[tuple[weakref.ref[Tensor], int]] = []
        modules = [(_module(student, "student", name), _module(teacher, "teacher", pairs[name])) for name in pairs]
        if modules and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # code that was compiled before hooks were set, for any module alike, calls none
        handles = [student.register_forward_pre_hook(_Versions(self._given), with_kwargs=True)]
        for name, (ours, theirs) in zip(pairs, modules, strict=True):
            handles.append(ours.register_forward_hook(_Catch(name, self._ours, True)))
            handles.append(theirs.register_forward_hook(_Catch(name, self._theirs, False)))
        self._end = weakref.finalize(self, _remove, handles)

    def __call__(self, output: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the batch that the student has just seen.

        Args:
            output: what the student returned for it: logits; something with ``.logits`` or ``["logits"]``; or a tuple
                that begins with them. Not read with ``temperature=None``.
            args, kwargs: what the student was given, for the teacher.

        Raises:
            ValueError: outputs or features of student and teacher differ in shape, the student has not run, or has
                written into its inputs, or a module returns no tensor; the object is closed.
        """
        if not self._end.alive:
            raise ValueError("this distillation is closed; make another with mm.distill")
        ours, theirs = dict(self._ours), self._theirs
        self._ours.clear()  # the next call shall not read what this batch left
        missing = [name for name in self.pairs if name not in ours]
        if missing:
            raise ValueError(
                f"the student has not computed {few(missing)} since the last call; run it, in training and with "
                "gradients, on each batch before this loss; of checkpointed parts none but use_reentrant=False counts"
            )
        given = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor)]
        if any(tensor() is part and part._version != version for tensor, version in self._given for part in given):
            raise ValueError(
                "the inputs have changed since the student was given them: it writes into them, and the teacher would "
                "see others; give the student copies, as in distill(student(x.clone()), x)"
            )
        target = self._teach(args, kwargs)
        missing = [self.pairs[name] for name in self.pairs if name not in theirs]
        if missing:
            raise ValueError(f"the teacher does not reach {few(missing)} with these inputs; name other features")
        parts: dict[str, Tensor] = {}
        counts = _Counted(self.positions, args, kwargs)
        if self.temperature is not None:
            student, teacher = logits(output, "student"), logits(target, "teacher")
            if student.shape != teacher.shape:
                raise ValueError(
                    f"the student's output is {tuple(student.shape)}, the teacher's {tuple(teacher.shape)}; both need "
                    "the same classes in the same order: exchange the head of one, or pass temperature=None with "
                    "features="
                )
            if not -student.dim() <= self.classes < student.dim():
                raise ValueError(
                    f"the output {tuple(student.shape)} has no dimension {self.classes} of classes; pass logits, not a "
                    "loss, or name their dimension with classes="
                )
            if student.shape[self.classes] == 1:
                raise ValueError(
                    f"the output {tuple(student.shape)} has one class along dimension {self.classes}, and the softmax "
                    "of one is 1 whatever the student learns; name the dimension with classes=, give a sigmoid's "
                    "logit z as (0, z), or pass temperature=None with features="
                )
            counted = counts.of(student, self.classes)
            parts["logits"] = logit_loss(student, teacher, self.temperature, self.classes, counted)
        for name, theirs_name in self.pairs.items():
            if ours[name].shape != theirs[name].shape:
                raise ValueError(
                    f"{name!r} of the student is {tuple(ours[name].shape)}, {theirs_name!r} of the teacher "
                    f"{tuple(theirs[name].shape)}; name modules of the same width with features={{student: teacher}}"
                )
            counted = counts.of(ours[name], _channels(ours[name]))
            parts[name] = self.feature_weight * feature_loss(ours[name], theirs[name], counted) / len(self.pairs)
        counts.check()
        theirs.clear()
        self.parts = {name: part.detach() for name, part in parts.items()}
        return torch.stack(list(parts.values())).sum()

    def _teach(self, args: Any, kwargs: Any) -> Any:
        """The teacher's outputs, in evaluation mode, without gradients."""
        training = [module for module in self.teacher.modules() if module.training]
        self.teacher.eval()
        try:
            with torch.no_grad():
                return self.teacher(*args, **kwargs)
        finally:
            for module in training:
                module.training = True

    def close(self) -> None:
        """Remove the hooks from both networks; twice is no error."""
        self._end()

    def __enter__(self) -> Distillation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def distill(
    student: nn.Module,
    teacher: nn.Module,
    *,
    temperature: float | None,
    features: Features | None = None,
    feature_weight: float = 1.0,
    classes: int = -1,
    positions: Positions | None = None,
) -> Distillation:
    """A loss that draws ``student`` to ``teacher``: its logits, and the features of chosen modules.

        loss = T² KL(teacher ‖ student) + feature_weight · mean over features of ‖s - t‖² / ‖t‖²

    The student runs as it does anyway, and what its modules put out is caught on the way; the teacher runs once a
    batch, in evaluation mode and without gradients.

    Args:
        student: the network in training; dense, sparse, or becoming so.
        teacher: the one to learn from, often a copy of the student before it is sparse; it is not changed.
        temperature: T, in [0.001, 10000]: the larger, the more the teacher's small probabilities count; 2 to 4 is
            usual. None leaves out the logits.
        features: names of modules whose outputs shall agree, ``["encoder.layer.5"]``, or a mapping from the student's
            to the teacher's. A tuple's first tensor counts, and the last output of a module that runs more than once.
        feature_weight: in [0, inf).
        classes: the dimension of the classes in the logits.
        positions: which tokens or pixels count: a function of what the student was given that returns a tensor, 0 or
            False for the others: padding (``lambda input_ids, attention_mask, **_: attention_mask``), or what the
            labels leave out (``lambda input_ids, labels, **_: labels != -100``). It counts for the logits and features
            of its shape, their classes or channels aside; None counts all.

    Returns:
        A :class:`Distillation`.

    Raises:
        TypeError: an argument is not of its kind.
        ValueError: a name is no module's (the nearest is suggested), a number is out of range, there is nothing to
            learn, or the teacher shares the student's parameters.

    Example:
        >>> import copy
        >>> student = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> teacher, x = copy.deepcopy(student), torch.randn(5, 4)
        >>> _ = student[2].weight.data.mul_(0.5)
        >>> with distill(student, teacher, temperature=2.0, features=["0"]) as loss_of:
        ...     loss = loss_of(student(x), x)
        >>> loss.requires_grad, float(loss_of.parts["0"])
        (True, 0.0)

    Source: Hinton, Vinyals and Dean 2015, arXiv 1503.02531; features after Romero et al. 2014, arXiv 1412.6550.
    """
    return Distillation(
        student,
        teacher,
        temperature=temperature,
        features=features,
        feature_weight=feature_weight,
        classes=classes,
        positions=positions,
    )


class _Counted:
    """Which positions of a batch count, and whether that was of any use."""

    def __init__(self, positions: Positions | None, args: Any, kwargs: Any) -> None:
        mask = None if positions is None else positions(*args, **kwargs)
        if positions is not None and not isinstance(mask, Tensor):
            raise ValueError(f"positions returned a {type(mask).__name__}, not a tensor that says which count")
        self.mask = None if mask is None else mask.bool()
        self.seen: list[tuple[int, ...]] = []

    def of(self, tensor: Tensor, channels: int) -> Tensor | None:
        """The mask, where it is of the tensor's shape without its channels."""
        shape = list(tensor.shape)
        del shape[channels]
        self.seen.append(tuple(shape))
        return self.mask if self.mask is not None and self.mask.shape == tuple(shape) else None

    def check(self) -> None:
        """Raise a ValueError where it was of no tensor's shape."""
        if self.mask is not None and tuple(self.mask.shape) not in self.seen:
            raise ValueError(
                f"positions returned {tuple(self.mask.shape)}, and logits and features have {self.seen}, their classes "
                "or channels aside; it must be of one of these shapes"
            )


def logits(output: Any, whose: str) -> Tensor:
    """The logits in what a network returns."""
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("logits")
    if found is None and isinstance(output, (tuple, list)) and output:
        found = output[0]
    found = output if found is None else found
    if not isinstance(found, Tensor):
        raise ValueError(
            f"the {whose} returned a {type(output).__name__} without logits; pass a tensor of its output, or leave the "
            "logits out with temperature=None"
        )
    return found


class _Catch:
    """A hook that puts a module's output into a dict; it knows no more of the distillation, which may end before.

    A copy of the network, an average of its weights for one, has hooks that do nothing.
    """

    def __init__(self, name: str, into: dict[str, Tensor] | None, learning: bool) -> None:
        self.name, self.into, self.learning = name, into, learning

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, None, self.learning)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.into is None or (self.learning and not torch.is_grad_enabled()):
            return  # an evaluation in between
        first = output[0] if isinstance(output, (tuple, list)) and output else output
        if isinstance(first, Mapping):
            first = next(iter(first.values()), None)
        if not isinstance(first, Tensor) or not first.is_floating_point():
            raise ValueError(
                f"features: {self.name!r} puts out a {type(output).__name__}, no floating tensor; name another module"
            )
        self.into[self.name] = first.clone()  # what comes behind may write into it, as nn.ReLU(inplace=True) does


class _Versions:
    """A hook that notes the versions of a network's inputs; the copy of one does nothing."""

    def __init__(self, into: list[tuple[weakref.ref[Tensor], int]] | None) -> None:
        self.into = into

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (None,)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.into is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        tensors = [part for part in (*args, *kwargs.values()) if isinstance(part, Tensor) and not part.is_inference()]
        self.into[:] = [(weakref.ref(tensor), tensor._version) for tensor in tensors]


def _module(model: nn.Module, whose: str, name: str) -> nn.Module:
    names = [known for known, _ in model.named_modules() if known]
    if not isinstance(name, str) or name not in names:
        close = difflib.get_close_matches(str(name), names, n=3)
        guess = f"; did you mean {' or '.join(map(repr, close))}?" if close else f"; it has {few(names)}"
        raise ValueError(f"features: the {whose} has no module {name!r}{guess}")
    return model.get_submodule(name)


def _remove(handles: list[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
