"""What a measurement was made with: versions, processor, threads."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["EXTRAS", "describe", "instruction_sets", "processor", "versions"]

#: The packages behind each extra of pyproject.toml.
EXTRAS = {
    "runtime": ("llvmlite",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "flow": ("scipy", "matplotlib"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
    "train": ("torchvision", "accelerate", "jsonargparse", "plotly", "rich", "scikit-learn", "tensorboard"),
    "cluster": ("ray",),
    "transformers": ("transformers", "accelerate"),
    "lightning": ("lightning",),
    "timm": ("timm",),
    "datasets": ("datasets",),
}


def versions() -> dict[str, str | None]:
    """Package -> installed version, or None, for mirrormask, torch, numpy, safetensors and every extra's packages."""
    names = ["mirrormask", "torch", "numpy", "safetensors", *(name for extra in EXTRAS.values() for name in extra)]
    return {name: _version(name) for name in names}


def processor() -> str:
    """The processor's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def instruction_sets() -> list[str]:
    """The vector instruction sets of this processor that matter here, as LLVM names them; empty without llvmlite."""
    try:
        from llvmlite import binding
    except ImportError:
        return []
    features = binding.get_host_cpu_features()
    wanted = (
        "sse4.2",
        "avx",
        "fma",
        "f16c",
        "avx2",
        "avx512",
        "avxvnni",
        "amx",
        "neon",
        "dotprod",
        "fullfp16",
        "sve",
        "bf16",
    )
    return sorted(name for name, present in features.items() if present and name.startswith(wanted))


def describe() -> dict[str, Any]:
    """Everything together, as JSON can hold it."""
    import torch

    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version for name, version in versions().items() if version},
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "mirrormask":
            return None
        from mirrormask import __version__

        return __version__
