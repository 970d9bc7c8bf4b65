"""Training from recipes: data sets, models, the loop, checkpoints, logs and figures.

:func:`run` trains one :class:`Recipe` in its own folder and returns a :class:`RunResult`; ``mirrormask train`` puts
several beside each other.
"""

from __future__ import annotations

from mirrormask.train.checkpoint import CheckpointError
from mirrormask.train.loop import Observer, load_model, run
from mirrormask.train.recipe import Data, Method, Model, Optimizer, Recipe, Schedule
from mirrormask.train.recipe_file import load
from mirrormask.train.reference import dense_run
from mirrormask.train.run_folder import RunFolder, RunResult
from mirrormask.train.signals import Stopped

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
    "dense_run",
    "load",
    "load_model",
    "run",
]
