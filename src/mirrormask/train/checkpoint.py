"""The checkpoints of a run: the last two and the best, and which of them to go on from.

``checkpoints/`` in the run's folder holds ``step-000000120.safetensors`` and so on, and ``best.safetensors``: the end
of the epoch with the highest held-out accuracy so far. Each is a file of :mod:`mirrormask.train.checkpoint_file`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mirrormask import files
from mirrormask.train import checkpoint_file, parallel
from mirrormask.train.checkpoint_file import CheckpointError, DamagedError
from mirrormask.train.recipe import Recipe

__all__ = ["BEST", "FOLDER", "OLD", "CheckpointError", "Checkpoints"]

FOLDER, BEST = "checkpoints", "best.safetensors"
#: Where version 0.1 kept its only one, as a pickle.
OLD = "checkpoint.pt"
#: How many are kept beside the best.
KEPT = 2
_NAME = re.compile(r"step-(\d{9,18})\.safetensors")


class Checkpoints:
    """Writes and reads the checkpoints in the folder of one run.

    Args:
        folder: the run's.
        recipe: of the run; checkpoints of another one are refused.
    """

    def __init__(self, folder: Path, recipe: Recipe) -> None:
        self.run, self.folder, self.fingerprint = folder, folder / FOLDER, recipe.fingerprint()

    def __iter__(self) -> Iterator[Path]:
        """The files there are, the newest first."""
        names = sorted(self._steps(), reverse=True)
        return iter([self.path(step) for step in names])

    def path(self, step: int) -> Path:
        """The file of one step."""
        return self.folder / f"step-{step:09d}.safetensors"

    def save(self, step: int, state: Any, *, best: bool = False) -> int:
        """Write the state after ``step``, remove what is older than the last two; the number of bytes.

        Raises:
            OSError: there is no room, or the folder cannot be written; those of before are untouched.
        """
        if not self.run.is_dir():
            # Made again it would hold this checkpoint and nothing that it belongs to.
            raise FileNotFoundError(2, "the run's folder is gone", str(self.run))
        self.folder.mkdir(exist_ok=True)
        nbytes = checkpoint_file.write(self.path(step), self.fingerprint, state)
        if best:
            self._name_best(step)
        for old in sorted(self._steps())[:-KEPT]:
            self.path(old).unlink(missing_ok=True)
        return nbytes

    def load(
        self, use: Callable[[Any], None], shared: Callable[[Callable[[], Any]], Any] = lambda make: make()
    ) -> tuple[Path | None, list[DamagedError]]:
        """Hand the newest state that is whole to ``use``.

        Args:
            use: takes the state; whatever it raises, the checkpoint is refused by name.
            shared: where several processes load together: gives each what the first one reads.

        Returns:
            The file that it came from, or None if there is none, and what is wrong with those that were passed over.

        Raises:
            CheckpointError: all are damaged, or the newest whole one does not fit; names each, and what to do.
        """
        path, state, damaged = shared(self._newest)
        if path is not None:
            try:
                use(state)
            except Exception as error:  # whatever is in a file, one error says what to do
                if parallel.lost(error):
                    raise
                raise CheckpointError(
                    f"the checkpoint {str(path)!r} does not fit this run ({type(error).__name__}: {_line(error)}); "
                    f"remove it to go on from the one before, or {str(self.folder)!r} to start again"
                ) from error
        return path, damaged

    def _newest(self) -> tuple[Path | None, Any, list[DamagedError]]:
        """The newest state that is whole, where it is, and what is wrong with those that were passed over."""
        damaged: list[DamagedError] = []
        best = self.folder / BEST
        for path in [*self, *([best] if os.path.lexists(best) else [])]:
            try:
                return path, checkpoint_file.read(path, self.fingerprint), damaged
            except DamagedError as error:
                damaged.append(error)
        if damaged:
            raise CheckpointError(
                f"every checkpoint of this run is damaged; remove {str(self.folder)!r} to start again:\n  "
                + "\n  ".join(map(str, damaged))
            )
        if (self.run / OLD).exists():
            raise CheckpointError(
                f"{str(self.run / OLD)!r} was written by mirrormask 0.1, as a pickle, which this version does not "
                "open; finish the run with 0.1, or remove it to start again"
            )
        return None, None, []

    def set_aside(self, damaged: Iterable[DamagedError]) -> None:
        """Rename damaged checkpoints, so that they do not count among the last two."""
        for error in damaged:
            if error.path is not None:
                with contextlib.suppress(OSError):
                    os.replace(error.path, f"{error.path}.damaged")

    def clean(self) -> None:
        """Remove what killed writers have left; only for the one process that trains here."""
        files.remove_parts(self.folder)

    def _steps(self) -> list[int]:
        try:
            matches = [_NAME.fullmatch(entry.name) for entry in self.folder.iterdir()]
        except FileNotFoundError:
            return []
        return [int(match[1]) for match in matches if match]

    def _name_best(self, step: int) -> None:
        part = self.folder / f".{BEST}.{step}{files.PART}"
        part.unlink(missing_ok=True)
        try:
            os.link(self.path(step), part)  # one file under two names takes the room of one
        except OSError:
            shutil.copyfile(self.path(step), part)
        os.replace(part, self.folder / BEST)
        files.sync_folder(self.folder)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
