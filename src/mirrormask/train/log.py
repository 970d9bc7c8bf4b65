"""The log of a run: one JSON object a line, and the same scalars for TensorBoard."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mirrormask import checks
from mirrormask.train import schema

__all__ = ["Log", "at", "read", "stream"]


class Log:
    """Writes records to ``log.jsonl`` and ``tensorboard/`` of a run's folder.

    Args:
        folder: the run's folder.
        offset: how many bytes of an older ``log.jsonl`` to keep. A resumed run passes what its checkpoint
            recorded, so that lines written after the checkpoint do not appear twice.
        digest: SHA-256 of these bytes, as the checkpoint recorded it; None to take them as they are.
        step: the step at which a resumed run goes on; TensorBoard drops what it has of later ones.

    Raises:
        ValueError: the log is not the one that the checkpoint belongs to.
    """

    def __init__(self, folder: Path, *, offset: int = 0, digest: str | None = None, step: int = 0) -> None:
        self.path = folder / "log.jsonl"
        kept = self.path.read_bytes()[:offset] if offset else b""
        if len(kept) < offset:
            raise ValueError(
                f"{str(self.path)!r} has {len(kept)} bytes but the checkpoint belongs to one of at least {offset}; put "
                f"it back, or remove {str(folder)!r} to start again"
            )
        self._hash = hashlib.sha256(kept)
        if digest is not None and self._hash.hexdigest() != digest:
            raise ValueError(
                f"{str(self.path)!r} is not what this run had written; put it back, or remove "
                f"{str(folder)!r} to start again"
            )
        self.offset = offset
        # Unbuffered: what a full disk did not take must not be tried again when the file is closed.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        self._file.truncate(offset)
        board = checks.require("torch.utils.tensorboard", "train", "writing TensorBoard events")
        self._excepthook = threading.excepthook
        threading.excepthook = self._hear
        older = (folder / "tensorboard").is_dir()
        self._board = board.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if older else None)

    @property
    def digest(self) -> str:
        """SHA-256 of ``log.jsonl`` so far."""
        return self._hash.hexdigest()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; numbers that are not finite become null, which JSON can hold.

        Raises:
            OSError: there is no room for it; names the file and the bytes.
        """
        clean = {key: _finite(value) for key, value in record.items()}
        line = (json.dumps(clean) + "\n").encode()
        with self._named(len(line)):
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            for key, value in clean.items():
                if isinstance(value, (int, float)) and key not in ("step", "epoch", "epoch_progress"):
                    self._board.add_scalar(f"{record['event']}/{key}", value, record["step"])
        self._hash.update(line)
        self.offset += len(line)

    def sync(self) -> None:
        """Bring everything written so far to the disk."""
        with self._named(0):
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Close both files; what could not be written was said before."""
        threading.excepthook = self._excepthook
        self._file.close()
        with contextlib.suppress(OSError):
            self._board.close()

    @contextlib.contextmanager
    def _named(self, nbytes: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno is None:
                raise
            where = os.fsdecode(error.filename or self.path)
            reason = f"{error.strerror}: appending {nbytes:,} bytes to the log"
            raise type(error)(error.errno, reason, where) from error

    def _hear(self, args: threading.ExceptHookArgs) -> None:
        """What TensorBoard's thread raises comes again in the next call here; a traceback beside that is too much."""
        if not (isinstance(args.exc_value, OSError) and "tensorboard" in type(args.thread).__module__):
            self._excepthook(args)


def read(folder: str | Path) -> list[dict[str, Any]]:
    """The records of a run, oldest first, up to a line that is none; with a warning unless a crash cut it off.

    Each has ``event`` (``step``, ``epoch`` or ``final``), ``step``, ``epoch``, ``seconds`` and the scalars of that
    moment.
    """
    return [record for _, record in stream(folder)]


#: No line of a run's is longer; one that is would take all memory before anything is known of it.
MOST_LINE = 2**20


def stream(folder: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The same one by one, each after its place in the file, so that a log of any length takes the memory of a line."""
    decoder, place, number = schema.record_decoder(), 0, 1
    path = Path(folder) / "log.jsonl"
    with open(path, "rb") as file:
        while line := file.readline(MOST_LINE):
            try:
                record = decoder.decode(line)
            except (ValueError, RecursionError):
                if line.endswith(b"\n") or file.read(1):  # else a crash cut it off, or it is being written
                    warnings.warn(
                        f"{checks.printable(str(path))}: line {number} is damaged, and what comes after it is not read",
                        stacklevel=checks.callers_level(),
                    )
                return
            yield place, record
            place, number = place + len(line), number + 1


def at(folder: str | Path, places: Iterable[int]) -> list[dict[str, Any]]:
    """The records at these places, as :func:`stream` gave them."""
    decoder, found = schema.record_decoder(), []
    with open(Path(folder) / "log.jsonl", "rb") as file:
        for place in places:
            file.seek(place)
            found.append(decoder.decode(file.readline()))
    return found


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
