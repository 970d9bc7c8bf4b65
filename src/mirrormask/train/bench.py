"""``mirrormask bench``: time a trained model in every engine that is installed, against ``mm.compile``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mirrormask import checks, waiting

__all__ = ["bench_run"]


def bench_run(
    run: str, batch: int = 1, threads: int | None = None, rounds: int = 15, allow_code: bool = False
) -> dict[str, Any]:
    """Time the model of a finished run: eager, torch.compile, ONNX Runtime and OpenVINO against mm.compile.

    The last two in fp32, and quantized to 8 bits where what that needs is installed (onnx; nncf).

    Prints what was compiled and a table of medians and ratios, and writes them to ``bench.json`` in the run's folder.

    Args:
        run: the run's folder.
        batch: images at a time, at least 1.
        threads: for all engines; all cores by default.
        rounds: turns of each engine, at least 1.
        allow_code: import the code that the run's model is made by.

    Returns:
        What ``bench.json`` holds, and its path.

    Raises:
        ValueError: the folder holds no finished run, or a number is out of range.
    """
    import torch

    from mirrormask.runtime import bench
    from mirrormask.train.run_folder import RunResult
    from mirrormask.train.trained import load_model

    checks.check_int("batch", batch, low=1)
    model = load_model(run, allow_code=allow_code)
    example = torch.randn(batch, *RunResult.read(run).input_shape, generator=torch.Generator().manual_seed(0))
    path = Path(run) / "bench.json"
    with waiting.stages("bench") as at:
        result = bench(model, example, threads=threads, rounds=rounds, json_path=path, progress=at)
    print(result)
    quantized = f", {result.int8_ratio:.2f} times as fast as {result.best_int8}" if result.best_int8 else ""
    faster = f"{result.ratio:.2f} times as fast as {result.best_other}{quantized}"
    print(f"sparsity {100 * result.sparsity:.2f}%; {faster}; in {path}")
    return {"path": path, **result.as_dict()}
