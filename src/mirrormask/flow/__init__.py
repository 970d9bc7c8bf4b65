"""The theory made computable: time-dependent mirror flow, Bregman potentials and diagonal linear networks.

The formulas of the potential live in :mod:`mirrormask.geometry.hypentropy`, where the geometry that trains networks
takes them from too. The experiments that check the theory are in :mod:`mirrormask.flow.commands`, and on the command
line ``mirrormask flow recovery | bias | depth | signs | rates | norm | all``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrormask.lazy import lazily

if TYPE_CHECKING:
    from mirrormask.flow.decays import ConstantDecay, SwitchedOff, VanishingDecay
    from mirrormask.flow.dual import minimize_potential
    from mirrormask.flow.flows import gradient_flow, mirror_flow
    from mirrormask.flow.linear import DiagonalLinearNetwork, min_l1, min_l2, proximal_gradient, sparse_regression
    from mirrormask.flow.problem import Flow, FlowError
    from mirrormask.geometry.hypentropy import (
        bregman_divergence,
        effective_exponent,
        hessian_metric,
        initial_latents,
        initial_offset,
        inverse_mirror_map,
        mirror_map,
        penalty,
        potential,
        scale,
    )

__all__ = [
    "ConstantDecay",
    "DiagonalLinearNetwork",
    "Flow",
    "FlowError",
    "SwitchedOff",
    "VanishingDecay",
    "bregman_divergence",
    "effective_exponent",
    "gradient_flow",
    "hessian_metric",
    "initial_latents",
    "initial_offset",
    "inverse_mirror_map",
    "min_l1",
    "min_l2",
    "minimize_potential",
    "mirror_flow",
    "mirror_map",
    "penalty",
    "potential",
    "proximal_gradient",
    "scale",
    "sparse_regression",
]

__getattr__ = lazily(
    __name__,
    {
        "ConstantDecay": "mirrormask.flow.decays",
        "DiagonalLinearNetwork": "mirrormask.flow.linear",
        "Flow": "mirrormask.flow.problem",
        "FlowError": "mirrormask.flow.problem",
        "SwitchedOff": "mirrormask.flow.decays",
        "VanishingDecay": "mirrormask.flow.decays",
        "bregman_divergence": "mirrormask.geometry.hypentropy",
        "effective_exponent": "mirrormask.geometry.hypentropy",
        "gradient_flow": "mirrormask.flow.flows",
        "hessian_metric": "mirrormask.geometry.hypentropy",
        "initial_latents": "mirrormask.geometry.hypentropy",
        "initial_offset": "mirrormask.geometry.hypentropy",
        "inverse_mirror_map": "mirrormask.geometry.hypentropy",
        "min_l1": "mirrormask.flow.linear",
        "min_l2": "mirrormask.flow.linear",
        "minimize_potential": "mirrormask.flow.dual",
        "mirror_flow": "mirrormask.flow.flows",
        "mirror_map": "mirrormask.geometry.hypentropy",
        "penalty": "mirrormask.geometry.hypentropy",
        "potential": "mirrormask.geometry.hypentropy",
        "proximal_gradient": "mirrormask.flow.linear",
        "scale": "mirrormask.geometry.hypentropy",
        "sparse_regression": "mirrormask.flow.linear",
    },
    # no other: the command line's library asks for attributes named like the commands, which the experiments' files are
    modules=("decays", "dual", "flows", "linear", "problem"),
)
