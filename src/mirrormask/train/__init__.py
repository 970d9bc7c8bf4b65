"""Training from recipes: data sets, models, the loop, checkpoints, logs and figures.

:func:`run` trains one :class:`Recipe` in its own folder and returns a :class:`RunResult`; ``mirrormask train`` puts
several beside each other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mirrormask.lazy import lazily

if TYPE_CHECKING:
    from mirrormask.train.checkpoint import CheckpointError
    from mirrormask.train.loop import Observer, run
    from mirrormask.train.recipe import Data, Method, Model, Optimizer, Recipe, Schedule, Teacher
    from mirrormask.train.recipe_file import load
    from mirrormask.train.reference import dense_run
    from mirrormask.train.run_folder import RunFolder, RunResult
    from mirrormask.train.signals import Stopped
    from mirrormask.train.trained import load_model

__all__ = [
    "CheckpointError",
    "Data",
    "Method",
    "Model",
    "Observer",
    "Optimizer",
    "Recipe",
    "RunFolder",
    "RunResult",
    "Schedule",
    "Stopped",
    "Teacher",
    "dense_run",
    "load",
    "load_model",
    "run",
]

__getattr__ = lazily(
    __name__,
    {
        "CheckpointError": "mirrormask.train.checkpoint",
        "Data": "mirrormask.train.recipe",
        "Method": "mirrormask.train.recipe",
        "Model": "mirrormask.train.recipe",
        "Observer": "mirrormask.train.loop",
        "Optimizer": "mirrormask.train.recipe",
        "Recipe": "mirrormask.train.recipe",
        "RunFolder": "mirrormask.train.run_folder",
        "RunResult": "mirrormask.train.run_folder",
        "Schedule": "mirrormask.train.recipe",
        "Teacher": "mirrormask.train.recipe",
        "Stopped": "mirrormask.train.signals",
        "dense_run": "mirrormask.train.reference",
        "load": "mirrormask.train.recipe_file",
        "load_model": "mirrormask.train.trained",
        "run": "mirrormask.train.loop",
    },
)
