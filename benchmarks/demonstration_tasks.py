"""The three tasks of `demonstrations.py`: a pretrained network each, what it learns, and how good it is."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mirrormask as mm
from pretrained import SUPERSENSES, efficientnet_lite0, glosses, minilm, tokens
from prune_pretrained import IMAGENET

PIXELS, BATCH, HELD_OUT, PROBED = 64, 32, 1000, 1000


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
