"""The folder of one run: what lies where, who may write into it, and how a run that stopped is found again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mirrormask import files
from mirrormask.selection import LayerSparsity
from mirrormask.train import recipe_file, schema
from mirrormask.train.lock import locked
from mirrormask.train.recipe import Recipe

__all__ = ["RunFolder", "RunResult"]

#: What the recipe of every version has.
RECORDED = ("data", "model", "method", "sparsity", "optimizer", "schedule", "epochs", "batch_size", "seed")


@dataclass(frozen=True)
class RunResult:
    """What a finished run gave; ``result.json`` holds the same.

    Args:
        folder: the run's folder.
        method: the name of its method.
        seed: its seed.
        sparsity_asked: the sparsity of the recipe.
        nonzeros_asked: ``round((1 - sparsity) * numel)``.
        nonzeros: how many weights are not zero, counted in the final model.
        numel: the number of sparsifiable weights.
        test_accuracy: of the final model, in [0, 1].
        validation_accuracy: likewise, where the recipe holds a validation split out.
        unpruned_accuracy: on the same images as the log's last epoch, before ``finalize`` and re-estimated batch norm.
        train_accuracy: over the last epoch, while the weights were still changing.
        train_loss: likewise.
        epochs, steps: how long it trained.
        seconds: of wall clock, tests and checkpoints included.
        skipped_steps: steps left out because a gradient was not finite.
        file_bytes: the size of ``model.safetensors``.
        input_shape: channels, height and width of an image.
        classes: the number of outputs.
        layers: the sparsifiable weights, one by one.
        recipe: the recipe's tree.
        environment: versions, processor and threads.
        processes: how many trained it, at its end.
        parallel: how the model lay on them: ``none``, ``ddp`` or ``fsdp``.
        class_names: of the outputs, in their order; none where an older version trained it.
        pixel_mean, pixel_std: the model takes ``(pixels - pixel_mean) / pixel_std``, a number for each channel;
            likewise.
    """

    folder: str
    method: str
    seed: int
    sparsity_asked: float
    nonzeros_asked: int
    nonzeros: int
    numel: int
    test_accuracy: float
    validation_accuracy: float | None
    unpruned_accuracy: float
    train_accuracy: float
    train_loss: float
    epochs: int
    steps: int
    seconds: float
    skipped_steps: int
    file_bytes: int
    input_shape: tuple[int, ...]
    classes: int
    layers: tuple[LayerSparsity, ...]
    recipe: dict[str, Any]
    environment: dict[str, Any]
    processes: int = 1
    parallel: str = "none"
    class_names: tuple[str, ...] = ()
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()

    @property
    def sparsity(self) -> float:
        """The fraction of zeros obtained."""
        return 1.0 - self.nonzeros / self.numel

    @classmethod
    def read(cls, folder: str | Path) -> RunResult:
        """The result of a finished run.

        Raises:
            ValueError: the folder holds no finished run, or its ``result.json`` is damaged.
        """
        path = Path(folder) / "result.json"
        try:
            result = schema.read(path, cls)
            # A run folder may have been moved since; what it holds is found where it is now.
            return dataclasses.replace(result, folder=str(folder), recipe=_whole_recipe(result))
        except OSError as error:
            raise ValueError(f"{str(folder)!r} holds no finished run: {path.name} cannot be read") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{str(path)!r} is damaged ({error}); remove it and train with --resume true") from error

    def write(self) -> None:
        """Write ``result.json``, atomically: its presence marks a finished run."""
        tree = dataclasses.asdict(self)
        files.write_text(Path(self.folder) / "result.json", json.dumps(tree, indent=1) + "\n")


def _whole_recipe(result: RunResult) -> dict[str, Any]:
    """The recipe with all that a report reads of it, in its own type; a result whose recipe is none is refused."""
    lacks = [name for name in RECORDED if name not in result.recipe]
    if lacks:
        raise ValueError(f"its recipe has no {', '.join(lacks)}")
    whole = recipe_file.to_dict(recipe_file.from_dict(result.recipe))
    recipe = schema.convert(whole, Recipe)
    for name, there, here in (
        ("method", result.method, recipe.method.name),
        ("seed", result.seed, recipe.seed),
        ("sparsity", result.sparsity_asked, recipe.sparsity),
    ):
        if there != here:
            raise ValueError(f"its {name} is {there!r}, and {here!r} in its recipe")
    return whole


class RunFolder:
    """The files of a run.

    ``recipe.yaml`` (resolved), ``log.jsonl``, ``tensorboard/``, ``checkpoints/`` (``checkpoint.pt`` in version 0.1),
    ``model.safetensors``, ``distributions.json``, ``predictions.json``, ``figure.png`` and ``figure.svg`` where the
    recipe asks for them and, last, ``result.json``; ``bench.json`` once ``mirrormask bench`` has timed it.
    """

    NAMES = (
        "result.json",
        "recipe.yaml",
        "log.jsonl",
        "tensorboard",
        "checkpoints",
        "checkpoint.pt",
        "model.safetensors",
        "distributions.json",
        "predictions.json",
        "bench.json",
        "figure.png",
        "figure.svg",
    )

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @property
    def finished(self) -> bool:
        """Whether a run ended here."""
        return (self / "result.json").is_file()

    def held(self, like: Recipe | None = None) -> Recipe | None:
        """The recipe of the run that lies here, or None.

        Args:
            like: what it is expected to be; if that is what the file says, letter by letter, nothing is parsed, which
                a comparison of a thousand runs would wait for.
        """
        path = self / "recipe.yaml"
        if not path.is_file():
            return None
        if like is not None and path.stat().st_size < 100_000 and path.read_bytes() == recipe_file.dump(like).encode():
            return like
        return recipe_file.from_dict(recipe_file.read(self / "recipe.yaml"))

    def check(self, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that a run must not write into, before anything is read or written.

        Raises:
            ValueError: both options at once; another run lies here; or a run lies here and neither option is set.
        """
        if resume and overwrite:
            raise ValueError("resume and overwrite exclude each other; choose one")
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{str(self.path)!r} is a file; give --out a folder")
        if overwrite or not self.path.is_dir():
            return
        held = self.held(recipe)
        if held is None:
            if any((self / name).exists() for name in self.NAMES):
                raise ValueError(f"{str(self.path)!r} holds files of a run but no recipe.yaml; choose another --out")
            return
        state = "a finished" if self.finished else "an unfinished"
        what = (
            f"{str(self.path)!r} already holds {state} run of method {held.method.name!r} at sparsity {held.sparsity:g}"
        )
        if held.fingerprint() != recipe.fingerprint():
            differs = "; ".join(_differences(held.identity(), recipe.identity()))
            raise ValueError(f"{what}, with another recipe ({differs}); choose another --out or pass --overwrite true")
        if not resume:
            raise ValueError(f"{what}, of this recipe; go on with --resume true, or pass --overwrite true")

    def prepare(self, recipe: Recipe, *, overwrite: bool) -> None:
        """Make the folder, remove an older run's files if asked to (no others), and write the recipe."""
        self.path.mkdir(parents=True, exist_ok=True)
        if overwrite:
            for name in self.NAMES:
                entry = self / name
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
        # Of writers that were killed; `bench` writes without the lock, so its own are left alone.
        files.remove_parts(self.path, [name for name in self.NAMES if name != "bench.json"])
        files.remove_parts(self / "checkpoints")
        recipe_file.save(recipe, self / "recipe.yaml")

    @contextlib.contextmanager
    def locked(self, *, wait: bool = False, given_up: Callable[[], bool] = bool) -> Iterator[None]:
        """Keep other processes from training here, until the block or the process ends.

        Raises:
            ValueError: another process trains here, and ``wait`` is not set, or it was given up.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self / ".lock", wait=wait, given_up=given_up))
            except BlockingIOError as error:
                raise ValueError(f"another process is training in {str(self.path)!r}; choose another --out") from error
            yield


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[str]:
    for key in new:
        if isinstance(new[key], dict) and isinstance(old.get(key), dict) and key != "options":
            yield from _differences(old[key], new[key], f"{prefix}{key}.")
        elif old.get(key) != new[key]:
            yield f"{prefix}{key}: {old.get(key)!r} there, {new[key]!r} now"
