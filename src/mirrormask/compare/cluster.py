"""Cells on a Ray cluster: one task a cell, retried where a node is lost, its folder sent back to this machine.

Nodes need the same version of this package, and nothing else: the data goes to them from here, once a node, and what
they train comes back as the files of the run's folder, so that no disk need be shared.
"""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from mirrormask import checks
from mirrormask.compare.comparison import Failure
from mirrormask.compare.grid import Cell
from mirrormask.compare.parcel import pack, unpack
from mirrormask.compare.runner import DiskFull, Watcher, explain, is_disk_full, record_failure
from mirrormask.train import recipe_file
from mirrormask.train.data import Images, Splits
from mirrormask.train.run_folder import RunFolder, RunResult

__all__ = ["connect", "train_cells"]

#: Seconds within which a cluster must answer; Ray itself tries for two minutes.
ANSWER = 25.0
#: How often a cell is begun anew when the node or the process that trains it is lost.
RETRIES = 5
#: Tried in a process of its own, since a connection that hangs cannot be given up within this one.
PROBE = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


def connect(address: str) -> Any:
    """Join the cluster at ``address`` and return the module ``ray``.

    Args:
        address: ``host:port`` of its head node, or ``auto`` for the one that this machine belongs to.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the address is neither.
        ConnectionError: nothing answers within 25 seconds, or what answers is no Ray cluster of this version.
    """
    ray = checks.require("ray", "cluster", "mirrormask compare --ray")
    _, colon, port = address.rpartition(":")
    if address != "auto" and not (colon and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"the Ray address {address!r} is not host:port or auto")
    if not ray.is_initialized():
        remedy = "start one with `ray start --head`, or leave --ray out to train on this machine"
        _probe(address, remedy)
        ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    return ray


def train_cells(
    cells: Sequence[Cell], *, ray: Any, threads: int, gpus: float, splits: Splits, watcher: Watcher
) -> list[Failure]:
    """Train the cells on the cluster; see :func:`mirrormask.compare.runner.train_cells`.

    A cell whose folder here holds a checkpoint goes on from it. A cell whose node is lost begins again elsewhere;
    whatever happens there, each folder here is written once, by this process.

    Args:
        cells: to be trained.
        ray: what :func:`connect` returned.
        threads: CPUs that a cell takes.
        gpus: GPUs that it takes.
        splits: the data of every cell.
        watcher: is told of starts and ends.

    Raises:
        ValueError: no node has so many CPUs or GPUs.
        DiskFull: a run could not be written here; every one that was is kept.
    """
    room = _room(ray, threads, gpus)
    data = ray.put(_to_arrays(splits))
    task = ray.remote(num_cpus=threads, num_gpus=gpus, max_retries=RETRIES)(_train_far)
    refs = {}
    for cell in cells:
        earlier = pack(Path(cell.recipe.out)) if Path(cell.recipe.out).is_dir() else b""
        refs[task.remote(recipe_file.to_dict(cell.recipe), earlier, data, threads)] = cell
    waiting, failures = list(cells), []
    for _ in range(min(room, len(waiting))):
        watcher.started(waiting.pop(0))
    try:
        while refs:
            (done, *_), _ = ray.wait(list(refs), num_returns=1)
            cell = refs.pop(done)
            archive, error = _take(ray, done)
            if error is None:
                _land(archive, cell)
                watcher.finished(cell, RunResult.read(cell.recipe.out))
            else:
                failures.append(record_failure(cell, error))
                watcher.failed(cell, failures[-1].reason)
            if waiting:
                watcher.started(waiting.pop(0))
    finally:
        for ref in refs:
            ray.cancel(ref, force=True)
    return failures


def _train_far(tree: dict[str, Any], earlier: bytes, arrays: Any, threads: int) -> tuple[bytes, str | None]:
    """On a node: the archive of the finished run, or what went wrong; only the loss of the node is left to Ray."""
    from mirrormask.train.loop import run

    try:
        with tempfile.TemporaryDirectory(prefix="mirrormask-") as folder:
            recipe = recipe_file.from_dict({**tree, "out": str(Path(folder) / "run")})
            if earlier:
                unpack(earlier, recipe)
            torch.set_num_threads(threads)
            run(recipe, resume=True, splits=_from_arrays(arrays))
            return pack(Path(recipe.out)), None
    except Exception as error:
        return b"", explain(error)


def _take(ray: Any, ref: Any) -> tuple[bytes, str | None]:
    try:
        result: tuple[bytes, str | None] = ray.get(ref)
        return result
    except ray.exceptions.RayError as error:
        return b"", f"Ray gave it up after {RETRIES} new starts: {error}"


def _land(archive: bytes, cell: Cell) -> None:
    folder = RunFolder(cell.recipe.out)
    try:
        with folder.locked(wait=True):
            unpack(archive, cell.recipe)
            (folder / "error.txt").unlink(missing_ok=True)
    except OSError as error:
        if is_disk_full(error):
            raise DiskFull(
                f"the disk of {cell.recipe.out!r} is full; every finished cell is kept: make room and run the same "
                "command again"
            ) from error
        raise


def _probe(address: str, remedy: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        if host:
            socket.create_connection((host.removeprefix("ray://"), int(port)), timeout=ANSWER).close()
    except OSError as error:
        raise ConnectionError(f"no Ray cluster answers at {address!r}: {error.strerror or error}; {remedy}") from error
    command = [sys.executable, "-c", PROBE, address]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=False)
    except subprocess.TimeoutExpired:
        raise ConnectionError(f"no Ray cluster answers at {address!r} within {ANSWER:.0f} s; {remedy}") from None
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no reason given"
        raise ConnectionError(f"cannot join a Ray cluster at {address!r}: {reason}; {remedy}")


def _room(ray: Any, threads: int, gpus: float) -> int:
    """How many cells the cluster can train at a time."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(
        int(min(node.get("CPU", 0) / threads, node.get("GPU", 0) / gpus if gpus else float("inf"))) for node in nodes
    )
    if room == 0:
        most = max((node.get("CPU", 0) for node in nodes), default=0)
        cards = max((node.get("GPU", 0) for node in nodes), default=0)
        raise ValueError(
            f"a cell needs {threads} CPU(s) and {gpus:g} GPU(s), but no node of the cluster has them (at most {most:g} "
            f"and {cards:g}); lower --threads or --gpus"
        )
    return room


def _to_arrays(splits: Splits) -> dict[str, Any]:
    # Ray gives arrays to every task of a node from one shared piece of memory; tensors it would copy.
    parts = {"train": splits.train, "test": splits.test, "validation": splits.validation}
    arrays = {name: (images.x.numpy(), images.y.numpy()) for name, images in parts.items() if images is not None}
    return {**arrays, "classes": splits.classes}


def _from_arrays(arrays: dict[str, Any]) -> Splits:
    def images(name: str) -> Images:
        with warnings.catch_warnings():
            # The shared memory is read-only, which torch has no word for; nothing here writes into a split.
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return Images(*map(torch.from_numpy, arrays[name]))

    validation = images("validation") if "validation" in arrays else None
    return Splits(images("train"), images("test"), validation, tuple(arrays["classes"]))
