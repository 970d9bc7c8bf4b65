"""Three pretrained networks made sparse on one thread, the tables of docs/results.md ("Pretrained networks").

    python benchmarks/pretrained.py --fetch
    python benchmarks/demonstrations.py vision --data DIR/cifar10        # folders train/ and test/ of classes
    python benchmarks/demonstrations.py language
    python benchmarks/demonstrations.py distill
    python benchmarks/demonstrations.py language --table                 # the table of what is there

| demonstration | network, base | task |
|---|---|---|
| `vision` | EfficientNet-Lite0 with ImageNet's weights, AdamW | CIFAR-10 at 64 pixels |
| `language` | MiniLM (its embeddings frozen), AdamW | the supersense of a gloss of WordNet, 45 classes |
| `distill` | MiniLM (its embeddings frozen), AdamW | its dense self's features, by `mm.distill`, without labels |

Every run of a seed begins with the same weights, has the same batches, steps and learning rate, and a cosine to zero. A
new head is fitted on the frozen network first (`linear probe`). The sparse networks are exactly as sparse as asked over
all convolutions and linear layers, depthwise ones and the head included. EfficientNet-Lite0's batch norm keeps the
statistics of ImageNet, and it has a warm-up and clipped gradients: with statistics of 32 images of 64 pixels and SGD at
0.02 a hundred steps left the dense network at 41.6%, where the probe alone has 62.0%; with ImageNet's and SGD at 0.01,
at 10%.

A run is a line of DEMONSTRATION.jsonl in `--out`; what is there is not run again. `distill` keeps its networks there,
and times them in the end, compiled by `mm.compile`: processor time, in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import mirrormask as mm
from demonstration_tasks import Demonstration, language, vision
from finetune import append, optimizer
from pretrained import ROOT

#: Base optimizer, learning rate, warm-up as a share of all steps, bound of the gradient's norm.
SETTINGS = {
    "vision": ("adamw", 3e-4, 0.1, 1.0),
    "language": ("adamw", 3e-4, 0.0, math.inf),
    "distill": ("adamw", 3e-4, 0.0, math.inf),
}
#: The order of the runs: what interests most first.
METHODS = ("dense", "mirror", "gmp", "magnitude")


# -- the runs ------------------------------------------------------------------------------------------------------


def train(demo: Demonstration, name: str, method: str, sparsity: float, seed: int, steps: int) -> nn.Module:
    """One run from the start."""
    torch.manual_seed(seed)
    model = copy.deepcopy(demo.start)
    if method == "prune":
        mm.prune(model, demo.inputs[::4], sparsity, batch_norm=False)
        return model
    base, rate, warm_up, bound = SETTINGS[name]
    trained = optimizer(base, model, rate)
    if method != "dense":
        trained = mm.sparsify(model, trained, mm.methods.get(method)(sparsity), steps=steps)

    def share(step: int) -> float:
        return min((step + 1) / max(warm_up * steps, 1), 1.0) * 0.5 * (1 + math.cos(math.pi * step / steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(trained, share)
    loss_of, stream = demo.objective(model), demo.batches(seed)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for _ in range(steps):
        trained.zero_grad()
        loss_of(next(stream)).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), bound)
        trained.step()
        schedule.step()
    if isinstance(trained, mm.SparseOptimizer):
        trained.finalize()
        held = mm.sparsity(model)
        if held.nonzeros != round((1 - sparsity) * held.numel):
            raise AssertionError(f"{method} at {sparsity}: {held.nonzeros} nonzeros of {held.numel}")
    return model.eval()


def complete(demo: Demonstration, name: str, wanted: list[tuple[str, float, int]], steps: int, out: Path) -> None:
    """Run what is missing."""
    path = out / f"{name}.jsonl"
    there = {tuple(row["run"]) for row in read(path)}
    for method, sparsity, seed in wanted:
        run = (method, sparsity, seed, 0 if method in ("start", "prune") else steps)
        if run in there:
            continue
        begin = time.process_time()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*mirrormask.*|.*singular")
            model = demo.start if method == "start" else train(demo, name, method, sparsity, seed, steps)
        spent = time.process_time() - begin
        file = out / f"{name}-{method}-{sparsity:g}-{seed}.safetensors"
        mm.save(model, file)
        row = {"run": list(run), **demo.judge(model.eval()), "MB": file.stat().st_size / 1e6, "seconds": spent}
        append(path, row)
        print(row, flush=True)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def table(demo_name: str, rows: list[dict[str, Any]], steps: int) -> str:
    """A row a method and sparsity: means over seeds, their least and largest value where there are two or more."""
    named = {"start": "dense" if demo_name == "distill" else "linear probe", "dense": "dense, fine-tuned"}
    named["prune"] = "`mm.prune`, no training"
    groups: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for row in rows:
        method, sparsity, _, taken = row["run"]
        if taken in (0, steps):
            groups.setdefault((sparsity, method), []).append(row)
    columns = [key for key in rows[0] if key not in ("run", "seconds")]
    lines = ["| sparsity | method | " + " | ".join(columns) + " | processor seconds | seeds |"]
    lines.append("|---" * (len(columns) + 4) + "|")
    order = ("start", *METHODS, "prune")
    for (sparsity, method), runs in sorted(groups.items(), key=lambda one: (one[0][0], order.index(one[0][1]))):
        cells = [f"{sparsity:.0%}", named.get(method, f"`{method}`")]
        for column in (*columns, "seconds"):
            values = [run[column] for run in runs]
            digits = {"cosine": 3, "correlation of similarities": 3, "seconds": 0}.get(column, 1)
            text = f"{statistics.fmean(values):.{digits}f}"
            if len(values) > 1 and column not in ("MB", "seconds"):
                text += f" ({min(values):.{digits}f} to {max(values):.{digits}f})"
            cells.append(text)
        lines.append("| " + " | ".join([*cells, str(len(runs))]) + " |")
    return "\n".join(lines)


# -- speed ---------------------------------------------------------------------------------------------------------


def speed(demo: Demonstration, sparsities: list[float], out: Path, rounds: int = 15) -> str:
    """Processor milliseconds of a call, medians of rounds in turns, for one gloss and for 32."""
    rows = []
    for size in (1, 32):
        x, _ = next(batch for batch in demo.batches(0) if batch[0]["input_ids"].shape[1] == 16)
        example = {key: value[:size] for key, value in x.items()}
        calls: dict[str, Callable[..., Any]] = {"PyTorch, dense": demo.start}
        for sparsity in (0.0, *sparsities):
            model = copy.deepcopy(demo.start)
            if sparsity:
                mm.load(out / f"distill-mirror-{sparsity:g}-0.safetensors", model)
            calls[f"compiled, {sparsity:.0%}"] = mm.compile(model, example)
        taken: dict[str, list[float]] = {name: [] for name in calls}
        with torch.no_grad():
            for _ in range(rounds + 2):
                for name, call in calls.items():
                    begin = time.process_time()
                    call(**example)
                    taken[name].append(1000 * (time.process_time() - begin))
        row = {"glosses": size, **{name: statistics.median(values[2:]) for name, values in taken.items()}}
        append(out / "speed.jsonl", row)
        rows.append(row)
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    lines += ["| " + " | ".join(f"{value:.3g}" for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("demonstration", choices=tuple(SETTINGS))
    parser.add_argument("--root", type=Path, default=ROOT)
    parser.add_argument("--data", type=Path, help="CIFAR-10 as folders of images, for vision")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--sparsity", nargs="+", type=float, default=[0.9, 0.8])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--out", type=Path, default=Path("runs/demonstrations"))
    parser.add_argument("--table", action="store_true", help="run nothing, print the table of what is there")
    a = parser.parse_args()
    name = a.demonstration
    if name == "vision" and a.data is None and not a.table:
        parser.error("vision needs --data")
    torch.set_num_threads(1)
    a.out.mkdir(parents=True, exist_ok=True)
    if not a.table:
        demo = vision(a.root, a.data) if name == "vision" else language(a.root, labelled=name == "language")
        wanted = [("start", 0.0, 0)]
        if demo.pruned:
            wanted += [("prune", sparsity, 0) for sparsity in a.sparsity]
        for seed in range(a.seeds):
            if "dense" in a.methods and name != "distill":  # where the dense network is the teacher itself
                wanted.append(("dense", 0.0, seed))
            for sparsity in a.sparsity:
                wanted += [(method, sparsity, seed) for method in a.methods if method != "dense"]
        complete(demo, name, wanted, a.steps, a.out)
    print("\n" + table(name, read(a.out / f"{name}.jsonl"), a.steps))
    if name == "distill" and not a.table:
        print("\n" + speed(demo, a.sparsity, a.out))


if __name__ == "__main__":
    main()
