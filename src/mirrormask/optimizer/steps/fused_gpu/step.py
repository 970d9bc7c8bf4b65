"""The step on a GPU: whether it may serve, and what the kernel is given."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mirrormask.geometry import Hadamard
from mirrormask.geometry.base import steps_like
from mirrormask.methods import Method
from mirrormask.optimizer.base_groups import Group
from mirrormask.optimizer.base_optimizer import BaseOptimizer, Link
from mirrormask.optimizer.steps.base import Now, Step
from mirrormask.optimizer.weights import SparseWeights

__all__ = ["FusedGPU"]

#: Elements that one program steps: some eight for each of its 128 threads.
BLOCK = 1024
KERNEL = "mirrormask.optimizer.steps.fused_gpu.kernel"
#: Options that need another update than the kernel's.
UNSERVED = ("dampening", "maximize", "differentiable", "amsgrad", "capturable")
ADAM = (torch.optim.Adam, torch.optim.AdamW)


class FusedGPU(Step):
    """SGD with momentum, Adam and AdamW on ``x = m ⊙ w``, in one launch; the base steps all other parameters itself.

    It allocates nothing of a weight's size and waits for nothing: what changes between steps (addresses of gradients,
    rates) is sent from page-locked memory, and whether gradients are finite stays on the device.
    """

    #: Where it serves; a test adds the CPU, on which Triton's interpreter runs the kernel.
    devices: ClassVar[tuple[str, ...]] = ("cuda",)

    def __init__(self, method: Method, weights: SparseWeights, base: BaseOptimizer) -> None:
        super().__init__(method, weights, base)
        self._possible = self._can_serve()
        self._of: dict[Tensor, tuple[Link, Group]] = {}
        self._good: Tensor | None = None
        self._pieces: dict[tuple[int, ...], dict[bool, Tensor]] = {}

    def _can_serve(self) -> bool:
        """What cannot change between steps: the kinds of base and geometry, devices, dtypes and layouts."""
        if type(self.base.torch) not in (torch.optim.SGD, *ADAM) or self.method.correction is not None:
            return False
        if not steps_like(self.weights.geometry, Hadamard) or self.weights.geometry.masked:
            return False
        devices = {x.device for x in self.weights.values()}
        if len(devices) != 1 or devices.pop().type not in self.devices or importlib.util.find_spec("triton") is None:
            return False
        return all(
            _is_plain(x) and _is_plain(latent) and latent.dtype == torch.float32 and latent.stride() == x.stride()
            for x in self.weights.values()
            for latent in self.weights.latents_of(x).values()
        )

    def ready(self, now: Now) -> bool:
        """Whether the options and gradients allow this step."""
        if not self._possible or self.base.has_hooks:
            return False
        latent_groups = [(link, group) for link, group in self.base.groups if link.rate is not None]
        for _, group in latent_groups:
            betas = group.get("betas", ())
            if any(group.get(option) for option in UNSERVED) or any(isinstance(beta, Tensor) for beta in betas):
                return False
            if not self._adam and not group["momentum"]:
                return False
        if len({bool(group.get("nesterov")) for _, group in latent_groups}) != 1:
            return False
        live = [x for x in self.weights.values() if x.grad is not None]
        if not live or not all(_is_plain(x.grad) and x.grad.stride() == x.stride() for x in live if x.grad is not None):
            return False
        self._of = {held: (link, group) for link, group in latent_groups for held in group["params"]}
        return all(tensor.stride() == x.stride() for x in live for tensor in self._tensors(x)[2:])

    def finite(self) -> bool | Tensor:
        """Whether all gradients are finite, on the device; the kernel reads it, and takes zeros where they are not."""
        if self.method.mask.regrows or self.weights.shards.spread or not self._on_device:
            return super().finite()  # somebody else looks at the gradients, or counts them
        own = [x.grad for x in self.weights.values() if x.grad is not None]
        plain = [p.grad for p in self.base.plain if p.grad is not None]
        norms = torch._foreach_norm([*own, *plain])
        self._good = torch.stack([norm.to(norms[0].device) for norm in norms]).isfinite().all()
        for grad in plain:
            grad.masked_fill_(~self._good, 0.0)
        return self._good

    def run(self, now: Now) -> None:
        """One launch for the weights of each pair of dtypes, then the base's step of all else."""
        live = [x for x in self.weights.values() if x.grad is not None]
        good, self._good = self._good, None
        if good is None:
            good = torch.ones((), dtype=torch.bool, device=live[0].device)
        with torch.cuda.device(good.device) if self._on_device else contextlib.nullcontext():
            self._launch(live, now, good)
        self.base.step_plain()
        for x in live:
            torch.autograd.graph.increment_version(x)  # torch has not seen that it was written

    def _launch(self, live: list[nn.Parameter], now: Now, good: Tensor) -> None:
        kernel = importlib.import_module(KERNEL)
        by_dtypes: dict[tuple[torch.dtype, torch.dtype], list[nn.Parameter]] = {}
        for x in live:
            assert x.grad is not None
            by_dtypes.setdefault((x.dtype, x.grad.dtype), []).append(x)
        for (own, grad), some in by_dtypes.items():
            tensors = [self._tensors(x) for x in some]
            width = len(kernel.FIELDS)
            places = [[t.data_ptr() for t in row] + [0] * (width - len(row)) for row in tensors]
            table, numbers = self._sent(places, torch.int64, good), self._numbers(some, now, good)
            for whole, pieces in self._cut(some).items():
                kernel.step[(len(pieces),)](
                    table,
                    numbers,
                    pieces,
                    good,
                    x_dtype=kernel.DTYPES[str(own).removeprefix("torch.")],
                    grad_dtype=kernel.DTYPES[str(grad).removeprefix("torch.")],
                    adam=self._adam,
                    nesterov=bool(self._of[tensors[0][2]][1].get("nesterov")),
                    aligned=all(place % 16 == 0 for row in places for place in row),
                    whole=whole,
                    block=BLOCK,
                )

    @property
    def _adam(self) -> bool:
        return type(self.base.torch) in ADAM

    @property
    def _on_device(self) -> bool:
        return all(x.device.type != "cpu" for x in self.weights.values())

    def _tensors(self, x: nn.Parameter) -> list[Tensor]:
        """The arrays of a weight, as the kernel's table has them."""
        assert x.grad is not None
        factors = [self.weights.state(x)[name] for name in ("m", "w")]
        if not self._adam:
            return [x, x.grad, *factors, *map(self.base.momentum, factors)]
        states = [self._moments(factor) for factor in factors]
        return [x, x.grad, *factors, *(state[name] for name in ("exp_avg", "exp_avg_sq") for state in states)]

    def _moments(self, factor: Tensor) -> dict[str, Any]:
        """Adam's state of a factor, as torch begins it."""
        state: dict[str, Any] = self.base.torch.state[factor]
        if not state:
            fused = self._of[factor][1].get("fused")
            state["step"] = torch.zeros((), dtype=torch.float32, device=factor.device if fused else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(factor), torch.zeros_like(factor)
        return state

    def _numbers(self, some: list[nn.Parameter], now: Now, good: Tensor) -> Tensor:
        """What :data:`NUMBERS` names, a row a weight, on the device."""
        rows: list[list[float]] = []
        steps: list[Tensor] = []
        for x in some:
            factors = [self.weights.state(x)[name] for name in ("m", "w")]
            link, group = self._of[factors[0]]
            assert link.rate is not None
            coupled = 2 * now.alpha(link.group) if now.coupled else 0.0
            row = [now.lrs[link.group] * link.rate, now.keep(link.group), coupled]
            if not self._adam:
                rows.append([*row, group["momentum"], 0.0, 0.0, 1.0, 1.0])
                continue
            beta1, beta2 = group["betas"]
            counts = [self._moments(factor)["step"] for factor in factors]
            torch._foreach_add_(counts, 1)
            steps.append(counts[0])
            taken = counts[0].item() if counts[0].device.type == "cpu" else 1.0
            rows.append([*row, beta1, beta2, group["eps"], 1 - beta1**taken, 1 - beta2**taken])
        numbers = self._sent(rows, torch.float32, good)
        if steps and steps[0].device.type != "cpu":  # of AdamW(fused=True): to read them would mean to wait
            taken_there = torch.stack(steps).double()
            for column, beta in ((6, 3), (7, 4)):
                # In float64: 1 - beta2^t of a first step has three digits less than beta2.
                betas = self._sent([[row[beta]] for row in rows], torch.float64, good)[:, 0]
                numbers[:, column] = (1 - betas**taken_there).float()
        return numbers

    def _cut(self, some: list[nn.Parameter]) -> dict[bool, Tensor]:
        """The pieces of these weights, one a program: the whole ones and the rests, each where there are any.

        They are kept, since weights do not change their size.
        """
        key = tuple(x.numel() for x in some)
        if key not in self._pieces:
            cut = [
                (index, start, min(start + BLOCK, count))
                for index, count in enumerate(key)
                for start in range(0, count, BLOCK)
            ]
            kinds = {whole: [p for p in cut if (p[2] - p[1] == BLOCK) == whole] for whole in (True, False)}
            self._pieces[key] = {
                whole: torch.tensor(found, dtype=torch.int64).to(some[0].device)
                for whole, found in kinds.items()
                if found
            }
        return self._pieces[key]

    def _sent(self, rows: list[Any], dtype: torch.dtype, like: Tensor) -> Tensor:
        """A table on the device, without waiting for it to arrive."""
        on_gpu = like.device.type == "cuda"
        return torch.tensor(rows, dtype=dtype, pin_memory=on_gpu).to(like.device, non_blocking=True)


def _is_plain(tensor: Tensor) -> bool:
    """A tensor without holes, in one of torch's two layouts, of a dtype that the kernel knows, of no special kind."""
    kind = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    if not kind or tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    channels_last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor.is_contiguous() or channels_last
