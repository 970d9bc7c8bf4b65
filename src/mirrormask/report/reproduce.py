"""The command that trains a run again, from its recipe alone."""

from __future__ import annotations

import dataclasses
import json
import shlex
from typing import Any

from mirrormask.train import recipe_file
from mirrormask.train.recipe import Optimizer, Recipe
from mirrormask.train.run_folder import RunResult

__all__ = ["command", "environment"]

#: Always named, so that a command says what it does even where it agrees with the defaults.
NAMED = ("data", "model", "method")
#: Named already, or without an effect on the weights.
NOT_NAMED = ("sparsity", "seed", "out", "log_every", "figure", "checkpoint_every", "stop_after", "stop_dead")


def command(result: RunResult, out: str = "runs/again") -> str:
    """A line for a shell that gives the same weights: every setting that differs from the defaults is in it.

    Args:
        result: the run.
        out: the folder that the new run goes into, below which each method has its own.
    """
    recipe = recipe_file.from_dict(result.recipe)
    tree = dataclasses.asdict(recipe)
    plain = dataclasses.asdict(Recipe(optimizer=Optimizer(recipe.optimizer.name)))
    parts = [f"--{name} {shlex.quote(tree[name]['name'])}" for name in NAMED]
    if recipe.method.name != "dense":
        parts.append(f"--sparsity {recipe.sparsity!r}")
    parts.append(f"--seed {recipe.seed}")
    for key, value in tree.items():
        if key in recipe_file.SECTIONS:
            # The plain tree has this optimizer's own defaults, so its name is compared with the recipe's default.
            usual = Optimizer().name if key == "optimizer" else plain[key]["name"]
            if key not in NAMED and value["name"] != usual:
                parts.append(f"--{key} {shlex.quote(value['name'])}")
            parts += [
                f"--{key}.{name} {_argument(entry)}"
                for name, entry in value.items()
                if name != "name" and entry != plain[key][name]
            ]
        elif key not in NOT_NAMED and value != plain[key]:
            parts.append(f"--{key} {_argument(value)}")
    return " ".join(["mirrormask train", *parts, f"--out {shlex.quote(out)}"])


def environment(result: RunResult) -> dict[str, Any]:
    """Where a run was made, as flat text: processor, threads, platform and versions."""
    held = result.environment
    versions = held.get("versions")
    names = versions.items() if isinstance(versions, dict) else ()
    return {
        "processor": str(held.get("processor") or "not recorded"),
        "gpu": str(held.get("gpu") or ""),
        "cores": str(held.get("cores") or ""),
        "threads": str(held.get("threads") or ""),
        "python": str(held.get("python") or ""),
        "platform": str(held.get("platform") or ""),
        "versions": ", ".join(f"{name} {version}" for name, version in names),
    }


def _argument(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return shlex.quote(value if isinstance(value, str) else json.dumps(value))
