"""The product of two factors whose scale is set anew from time to time: Sign-In."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mirrormask.checks import check_number
from mirrormask.geometry.hadamard import Hadamard, balance, factorize
from mirrormask.progress import Clock

__all__ = ["SignIn"]


@dataclass(frozen=True)
class SignIn(Hadamard):
    """``x = m ⊙ w``, refactored every so often: ``m² - w² = β`` again, with x as it is.

    Training (and decay) wears the imbalance down, and with it the ability of a weight to cross zero; setting it back
    to what it was keeps the signs able to flip.

    Args:
        beta, gain: as in :class:`Hadamard`; β = 1 is the paper's. ``"rms"`` is that of x at the start, at every
            refactoring: weights grow, and with a β that grew along, the learning rate that suited the first one would
            diverge.
        every: the fraction of training between two refactorings, in (0, 1].
        until: the fraction of training after which there are no more, in [0, 1].

    Raises:
        ValueError: a field is outside its range.

    Example:
        >>> import torch
        >>> geometry = SignIn()
        >>> latents = {"m": torch.tensor([0.5]), "w": torch.tensor([0.5]), "imbalance": torch.tensor(1.0)}
        >>> geometry.refresh(torch.tensor([0.25]), latents, None)
        >>> imbalance, x = latents["m"] ** 2 - latents["w"] ** 2, latents["m"] * latents["w"]
        >>> round(imbalance.item(), 6), round(x.item(), 6)
        (1.0, 0.25)

    Source: Gadhikar, Jacobs, Zhou and Burkholz 2025, arXiv 2504.12801: ``dθ = -sqrt(θ² + β) ∇L dt`` and the reset to
    β = 1 every p epochs.

    Differs from the paper: p is a fraction of training, a reading of ours, as are when the resets end and that momentum
    goes on through them.
    """

    beta: float | str = 1.0
    every: float = 0.1
    until: float = 0.75

    constants: ClassVar[tuple[str, ...]] = ("imbalance",)
    shards: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("every", self.every, low=0.0, high=1.0, open_low=True, hint="a fraction of training")
        check_number("until", self.until, low=0.0, high=1.0, hint="a fraction of training")

    def init(self, x: Tensor) -> dict[str, Tensor]:
        """The factors of :class:`Hadamard`, and β."""
        latents = super().init(x)
        return {**latents, "imbalance": latents["m"].new_tensor(balance(self.beta, x.detach(), self.held))}

    def prune(self, latents: Mapping[str, Tensor], mask: Tensor) -> None:
        """Both factors are zero."""
        super().prune({name: latents[name] for name in self.latents}, mask)

    def refresh_due(self, clock: Clock) -> bool:
        """Every ``every``, up to ``until``."""
        return clock.step % max(clock.at(self.every), 1) == 0 and clock.step <= clock.at(self.until)

    def refresh(self, x: Tensor, latents: Mapping[str, Tensor], mask: Tensor | None) -> None:
        """:func:`factorize` of x as it is now."""
        x = x.detach().to(latents["m"].dtype)
        m, w = factorize(x, float(latents["imbalance"]))
        latents["m"].copy_(m)
        latents["w"].copy_(w)
