"""All random states of a process, to be kept, given back and seeded together: torch's, Python's and NumPy's."""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["deterministic", "isolated", "seed", "state", "use"]


def seed(value: int) -> None:
    """Seed them all with a number of up to 63 bits."""
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % 2**32)  # noqa: NPY002 - the global state is what a model's own code may draw from


def state() -> dict[str, Any]:
    """All of them, as tensors and plain values: what :func:`use` takes."""
    version, words, gauss = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]  # noqa: NPY002
    inner = numpy["state"]
    return {
        "torch": torch.get_rng_state(),
        "accelerator": _accelerator_state(),
        "python": [version, torch.tensor(words, dtype=torch.int64), gauss],
        "numpy": {
            "key": torch.from_numpy(inner["key"].astype(np.int64)),
            "pos": int(inner["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "gauss": float(numpy["gauss"]),
        },
    }


def use(saved: dict[str, Any]) -> None:
    """Give all of them the states that :func:`state` returned."""
    torch.set_rng_state(saved["torch"])
    if saved["accelerator"] is not None and torch.accelerator.is_available():
        _device_module().set_rng_state(saved["accelerator"])
    version, words, gauss = saved["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    numpy = saved["numpy"]
    inner = {"key": numpy["key"].numpy().astype(np.uint32), "pos": numpy["pos"]}
    held = {"bit_generator": "MT19937", "state": inner, "has_gauss": numpy["has_gauss"], "gauss": numpy["gauss"]}
    np.random.set_state(held)  # noqa: NPY002


@contextlib.contextmanager
def isolated(threads: int | None) -> Iterator[None]:
    """Give the random states and the number of threads back as they were."""
    before, held = torch.get_num_threads(), state()
    with torch.random.fork_rng():
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            yield
        finally:
            torch.set_num_threads(before)
            use({**held, "accelerator": None})  # fork_rng gives those of all devices back


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Refuse, within the block, every operation that may give other bits the next time (see torch's documentation)."""
    if not wanted:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    # cuBLAS reads it when it is first used; a process that has used it before keeps what it had.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    try:
        torch.use_deterministic_algorithms(True)
        if benchmark:  # where it is off there is nothing to set, which some hosts of torch forbid
            torch.backends.cudnn.benchmark = False
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        if benchmark:
            torch.backends.cudnn.benchmark = True


def _accelerator_state() -> Tensor | None:
    held: Tensor | None = _device_module().get_rng_state() if torch.accelerator.is_available() else None
    return held


def _device_module() -> Any:
    return torch.get_device_module(torch.accelerator.current_accelerator())
