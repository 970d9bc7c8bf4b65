"""Three pretrained networks made sparse on one thread, the tables of docs/results.md ("Pretrained networks").

    python benchmarks/pretrained.py --fetch
    python benchmarks/demonstrations.py vision --data DIR/cifar10        # folders train/ and test/ of classes
    python benchmarks/demonstrations.py language
    python benchmarks/demonstrations.py distill
    python benchmarks/demonstrations.py language --table                 # the table of what is there

| demonstration | network, base | task |
|---|---|---|
| `vision` | EfficientNet-Lite0 with ImageNet's weights, SGD | CIFAR-10 at 64 pixels |
| `language` | MiniLM (its embeddings frozen), AdamW | the supersense of a gloss of WordNet, 45 classes |
| `distill` | MiniLM (its embeddings frozen), AdamW | its dense self's features, by `mm.distill`, without labels |

Every run of a seed begins with the same weights, has the same batches, steps and learning rate, which nobody tuned, and
a cosine to zero. A new head is fitted on the frozen network first (`linear probe`). The sparse networks are exactly as
sparse as asked over all convolutions and linear layers, depthwise ones and the head included. Batch norm keeps
ImageNet's statistics: with those of 32 images of 64 pixels, a hundred steps left the dense network at 41.6%, where the
linear probe alone has 62.0%.

A run is a line of DEMONSTRATION.jsonl in `--out`; what is there is not run again. `distill` keeps its networks there,
and times them in the end, compiled by `mm.compile`: processor time, in turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mirrormask as mm
from finetune import append, optimizer
from pretrained import ROOT, SUPERSENSES, efficientnet_lite0, glosses, minilm, tokens
from prune_pretrained import IMAGENET

PIXELS, BATCH, HELD_OUT, PROBED = 64, 32, 1000, 1000
SETTINGS = {"vision": ("sgd", 0.01), "language": ("adamw", 3e-4), "distill": ("adamw", 3e-4)}
#: The order of the runs: what interests most first.
METHODS = ("dense", "mirror", "gmp", "magnitude")


@dataclass(frozen=True)
class Demonstration:
    """A network, what it learns, and how good it is.

    Args:
        start: the network as every run finds it.
        batches: an endless stream by seed.
        objective: for a model, the loss of a batch.
        judge: numbers by name.
        inputs: those of `mm.prune`, without labels.
        named: what `start` is in the table.
        pruned: whether `mm.prune` without training is one of the rows.
    """

    start: nn.Module
    batches: Callable[[int], Iterator[Any]]
    objective: Callable[[nn.Module], Callable[[Any], Tensor]]
    judge: Callable[[nn.Module], dict[str, float]]
    inputs: list[Any]
    named: str = "linear probe"
    pruned: bool = False


class Sentences(nn.Module):
    """MiniLM and its sentences' embeddings: the mean over tokens, of length 1; or, of these, the logits of a head."""

    def __init__(self, bert: nn.Module, head: nn.Module | None = None) -> None:
        super().__init__()
        self.bert, self.pool = bert, Mean()
        self.head = nn.Identity() if head is None else head
        bert.pooler = None  # type: ignore[assignment]  # nothing here reads it, so that nothing would train it
        for parameter in bert.embeddings.parameters():  # type: ignore[union-attr]
            parameter.requires_grad_(False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.bert(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.head(self.pool(hidden, attention_mask))  # type: ignore[no-any-return]


class Mean(nn.Module):
    """Over the tokens that count, of length 1: a module, so that its output can be a feature."""

    def forward(self, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


# -- the three -----------------------------------------------------------------------------------------------------


def vision(root: Path, data: Path) -> Demonstration:
    """CIFAR-10; images stay 32 pixels in memory and are enlarged a batch at a time."""
    from torchvision.io import read_image

    names = sorted(IMAGENET)

    def images(part: str, count: int) -> tuple[Tensor, Tensor]:
        files = [(path, c) for c, n in enumerate(names) for path in sorted((data / part / n).iterdir())[: count // 10]]
        random.Random(0).shuffle(files)
        return torch.stack([read_image(str(path)) for path, _ in files]), torch.tensor([c for _, c in files])

    def enlarged(x: Tensor) -> Tensor:
        x = nn.functional.interpolate(x.float() / 127.5 - 1, size=PIXELS, mode="bicubic")
        return x.contiguous(memory_format=torch.channels_last)

    train, test = images("train", 10000), images("test", HELD_OUT)

    def batches(seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(1000 + seed)
        while True:
            for index in torch.randperm(len(train[1]), generator=generator).split(BATCH)[:-1]:
                x = enlarged(train[0][index])
                flipped = torch.rand(len(x), generator=generator) < 0.5
                yield torch.where(flipped[:, None, None, None], x.flip(3), x), train[1][index]

    def objective(model: nn.Module) -> Callable[[Any], Tensor]:
        return lambda batch: nn.functional.cross_entropy(model(batch[0]), batch[1])

    @torch.no_grad()
    def judge(model: nn.Module) -> dict[str, float]:
        parts = zip(test[0].split(100), test[1].split(100), strict=True)
        right = [(model(enlarged(x)).argmax(1) == y).float() for x, y in parts]
        return {"accuracy": 100 * float(torch.cat(right).mean())}

    model = efficientnet_lite0(root).to(memory_format=torch.channels_last)
    model.classifier = nn.Identity()
    inputs = [enlarged(part) for part in train[0][:PROBED].split(50)]
    model.classifier = probe(model, inputs, train[1][:PROBED], 10)
    return Demonstration(model, batches, objective, judge, inputs)


def language(root: Path, labelled: bool) -> Demonstration:
    """Glosses, each batch of about one length: with their supersenses, or with the dense network's features."""
    bert, tokenizer = minilm(root)
    tokenizer.enable_truncation(32)
    held = glosses(root)
    test, train = sorted(held[:HELD_OUT], key=lambda one: len(one.text)), held[HELD_OUT : HELD_OUT + 20000]

    def batch(part: Sequence[Any]) -> tuple[dict[str, Tensor], Tensor]:
        return tokens(tokenizer, [one.text for one in part]), torch.tensor([one.label for one in part])

    def batches(seed: int) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        draw = random.Random(1000 + seed)
        while True:
            pool = sorted(draw.sample(train, 50 * BATCH), key=lambda one: len(one.text))
            groups = [pool[i : i + BATCH] for i in range(0, len(pool), BATCH)]
            draw.shuffle(groups)
            yield from map(batch, groups)

    tests = [batch(test[i : i + BATCH]) for i in range(0, len(test), BATCH)]
    probed = sorted(train[:PROBED], key=lambda one: len(one.text))
    inputs = [batch(probed[i : i + BATCH])[0] for i in range(0, len(probed), BATCH)]
    model = Sentences(bert).eval()

    @torch.no_grad()
    def outputs(net: nn.Module) -> Tensor:
        return torch.cat([net(**x) for x, _ in tests])

    if labelled:
        model.head = probe(model, inputs, torch.tensor([one.label for one in probed]), len(SUPERSENSES))
        labels = torch.cat([y for _, y in tests])

        def accuracy(net: nn.Module) -> dict[str, float]:
            return {"accuracy": 100 * float((outputs(net).argmax(1) == labels).float().mean())}

        def supervised(net: nn.Module) -> Callable[[Any], Tensor]:
            return lambda one: nn.functional.cross_entropy(net(**one[0]), one[1])

        return Demonstration(model, batches, supervised, accuracy, inputs)

    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # the teacher has none either
    teacher, dense = copy.deepcopy(model), outputs(model)

    def distilled(net: nn.Module) -> Callable[[Any], Tensor]:
        features = [f"bert.encoder.layer.{i}" for i in range(6)] + ["pool"]
        loss = mm.distill(net, teacher, temperature=None, features=features)
        return lambda one: loss(net(**one[0]), **one[0])

    def agreement(net: nn.Module) -> dict[str, float]:
        found = outputs(net)
        ours, theirs = found @ found.T, dense @ dense.T
        rows, columns = torch.triu_indices(len(found), len(found), 1)
        pairs = torch.stack([ours[rows, columns], theirs[rows, columns]])
        nearest = [one.fill_diagonal_(-2).argmax(1) for one in (ours, theirs)]
        return {
            "cosine": float((found * dense).sum(1).mean()),
            "correlation of similarities": float(torch.corrcoef(pairs)[0, 1]),
            "same nearest gloss": 100 * float((nearest[0] == nearest[1]).float().mean()),
        }

    return Demonstration(model, batches, distilled, agreement, inputs, "dense", pruned=True)


def probe(model: nn.Module, inputs: list[Any], labels: Tensor, classes: int) -> nn.Module:
    """A linear head on what the network puts out as it is."""
    with torch.no_grad():
        x = torch.cat([model(**one) if isinstance(one, dict) else model(one) for one in inputs])
    torch.manual_seed(0)
    head, scale = nn.Linear(x.shape[1], classes), x.std()
    fit = torch.optim.LBFGS(head.parameters(), max_iter=100)

    def closure() -> Tensor:
        fit.zero_grad()
        loss = nn.functional.cross_entropy(head(x / scale), labels) + 1e-3 * head.weight.square().sum()
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    fit.step(closure)  # type: ignore[arg-type]
    head.weight.data /= scale
    return head


# -- the runs ------------------------------------------------------------------------------------------------------


def train(demo: Demonstration, name: str, method: str, sparsity: float, seed: int, steps: int) -> nn.Module:
    """One run from the start."""
    torch.manual_seed(seed)
    model = copy.deepcopy(demo.start)
    if method == "prune":
        mm.prune(model, demo.inputs[:8], sparsity, batch_norm=False)
        return model
    trained = optimizer(SETTINGS[name][0], model, SETTINGS[name][1])
    if method != "dense":
        trained = mm.sparsify(model, trained, mm.methods.get(method)(sparsity), steps=steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(trained, lambda k: 0.5 * (1 + math.cos(math.pi * k / steps)))
    loss_of, stream = demo.objective(model), demo.batches(seed)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    for _ in range(steps):
        trained.zero_grad()
        loss_of(next(stream)).backward()  # type: ignore[no-untyped-call]
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
            for method in a.methods:
                if method != "dense":
                    wanted += [(method, sparsity, seed) for sparsity in a.sparsity]
                elif name != "distill":  # where the dense network is the teacher itself
                    wanted.append((method, 0.0, seed))
        complete(demo, name, wanted, a.steps, a.out)
    print("\n" + table(name, read(a.out / f"{name}.jsonl"), a.steps))
    if name == "distill" and not a.table:
        print("\n" + speed(demo, a.sparsity, a.out))


if __name__ == "__main__":
    main()
