"""Folders of runs that were never trained: everything a run leaves, made up from a formula, in a moment."""

import base64
import io
import json
import math
import random
from pathlib import Path

from PIL import Image

from mirrormask.selection import LayerSparsity
from mirrormask.train import Data, Method, Model, Optimizer, Recipe, RunResult, recipe_file

VERSIONS = {"mirrormask": "0.1.0", "torch": "2.14.1"}
ENVIRONMENT = {"python": "3.11.7", "platform": "Linux", "processor": "A processor", "cores": 2, "threads": 1}
SHAPES = {"1.weight": (300, 784), "3.weight": (100, 300), "5.weight": (10, 100)}
#: How far below the dense model a method ends at 99%, in this made-up world.
LOSS = {"mirror": 0.01, "pilot": 0.015, "spred": 0.02, "gmp": 0.03}


def make_run(
    folder,
    method="mirror",
    sparsity=0.9,
    seed=0,
    *,
    options=None,
    accuracy=None,
    shapes=None,
    epochs=5,
    lines=1,
    classes=("shirt", "boot", "bag"),
    images=60,
    extras=True,
    timed=False,
    data="fashion-mnist",
    environment=None,
):
    """Write the folder of one finished run; its result.

    Args:
        folder, method, sparsity, seed, options, data: the run.
        accuracy: of the final model; from a formula by default.
        shapes: layer -> shape.
        epochs, lines: of the log: so many lines an epoch.
        classes, images: the test set of predictions.json.
        extras: whether distributions.json and predictions.json are there.
        timed: whether bench.json is there.
        environment: what the run was made with.
    """
    folder, shapes = Path(folder), shapes or SHAPES
    folder.mkdir(parents=True)
    draw = random.Random(f"{method} {sparsity} {seed}")
    dense = method == "dense"
    sparsity = 0.0 if dense else sparsity
    if accuracy is None:
        lost = 0.0 if dense else LOSS.get(method, 0.04) * (-math.log10(1 - sparsity) / 2) ** 3
        accuracy = 0.9 - lost + 0.003 * math.sin(7 * seed) + draw.uniform(-0.001, 0.001)
    recipe = Recipe(
        Data(data),
        Model("lenet-300-100"),
        Method(method, options or {}),
        sparsity,
        Optimizer(lr=0.1),
        epochs=epochs,
        batch_size=128,
        seed=seed,
        threads=1,
        out=str(folder),
    )
    layers = []
    for name, shape in shapes.items():
        numel = math.prod(shape)
        layers.append(LayerSparsity(name, shape, numel, numel if dense else round((1 - sparsity) * numel)))
    numel, nonzeros = sum(layer.numel for layer in layers), sum(layer.nonzeros for layer in layers)
    result = RunResult(
        folder=str(folder),
        method=method,
        seed=seed,
        sparsity_asked=sparsity,
        nonzeros_asked=nonzeros,
        nonzeros=nonzeros,
        numel=numel,
        test_accuracy=accuracy,
        validation_accuracy=None,
        unpruned_accuracy=accuracy,
        train_accuracy=min(1.0, accuracy + 0.02),
        train_loss=0.3,
        epochs=epochs,
        steps=468 * epochs,
        seconds=17.6,
        skipped_steps=0,
        file_bytes=2000 + 4 * nonzeros,
        input_shape=(1, 28, 28),
        classes=len(classes),
        layers=tuple(layers),
        recipe=recipe_file.to_dict(recipe),
        environment={**ENVIRONMENT, "versions": VERSIONS, **(environment or {})},
    )
    recipe_file.save(recipe, folder / "recipe.yaml")
    _log(folder, result, lines)
    if extras:
        _distributions(folder, result, product=method in ("mirror", "pilot", "spred"))
        _predictions(folder, draw, accuracy, classes, images)
    if timed:
        _bench(folder, result)
    result.write()
    return result


def make_grid(folder, methods=("mirror", "gmp"), sparsities=(0.9, 0.99), seeds=3, **options):
    """Write a whole comparison, with its dense runs; how many runs that is."""
    n = 0
    for seed in range(seeds):
        make_run(Path(folder) / f"dense-{seed}", "dense", 0.0, seed, **options)
        n += 1
        for method in methods:
            for sparsity in sparsities:
                make_run(Path(folder) / f"{method}-{sparsity}-{seed}", method, sparsity, seed, **options)
                n += 1
    return n


def _log(folder, result, lines):
    records = []
    for k in range(1, result.epochs * lines + 1):
        epoch = k / lines
        done = epoch / result.epochs
        end = k % lines == 0
        records.append(
            {
                "event": "epoch" if end else "step",
                "step": round(468 * epoch),
                "epoch": math.ceil(epoch),
                "epoch_progress": epoch,
                "loss": 0.3 + math.exp(-3 * done) + 0.01 * math.sin(k),
                "train_accuracy": result.train_accuracy - 0.2 * math.exp(-4 * done),
                **({"test_accuracy": result.test_accuracy - 0.2 * math.exp(-4 * done)} if end else {}),
                "lr": 0.1 * (1 - done),
                "alpha": 0.0 if result.method in ("dense", "gmp") else 0.01 * math.sin(3 * done),
                "decay_integral": 0.0 if result.method in ("dense", "gmp") else done,
                "median_a": None if result.method in ("dense", "gmp") else 0.03 * math.exp(-4 * done),
                "l1_norm": 2000 * math.exp(-2 * done),
                "sparsity": result.sparsity * min(1.0, 1.5 * done),
                "below_threshold": result.sparsity * min(1.0, 1.6 * done),
                "sign_flips": round(60000 * done * (1 - done)),
                "skipped_steps": 0,
                "seconds": 1.7 * epoch,
            }
        )
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


def _bell(n, width, bins=61):
    weights = [math.exp(-0.5 * (6 * (i + 0.5) / bins - 3) ** 2) for i in range(bins)]
    scale = n / sum(weights)
    return {"low": -width, "high": width, "counts": [round(scale * w) for w in weights], "zeros": 0}


def _distributions(folder, result, product):
    rows = []
    for layer in result.layers:
        final = {**_bell(layer.nonzeros, 0.9), "zeros": layer.numel - layer.nonzeros}
        imbalance = {**_bell(layer.nonzeros, 1.0), "low": -4.0, "high": -2.0, "negative": 0}
        rows.append(
            {
                "name": layer.name,
                "start": _bell(layer.numel, 0.1),
                "trained": final,
                "final": final,
                "imbalance": imbalance if product else None,
                "imbalance_start": 0.1 if product else None,
            }
        )
    (folder / "distributions.json").write_text(json.dumps({"version": 1, "layers": rows}))


def _predictions(folder, draw, accuracy, classes, images):
    truth = [i % len(classes) for i in range(images)]
    said = [t if draw.random() < accuracy else (t + 1) % len(classes) for t in truth]
    wrong = [i for i in range(images) if said[i] != truth[i]][:64]
    tree = {
        "version": 1,
        "classes": list(classes),
        "truth": truth,
        "predicted": said,
        "images": {str(i): picture(i) for i in wrong},
    }
    (folder / "predictions.json").write_text(json.dumps(tree))


def picture(i, side=28):
    """A grey PNG in base64 whose pixels depend on ``i``."""
    pixels = bytes((x * y + 13 * i) % 256 for y in range(side) for x in range(side))
    buffer = io.BytesIO()
    Image.frombytes("L", (side, side), pixels).save(buffer, "png")
    return base64.b64encode(buffer.getvalue()).decode()


def _bench(folder, result):
    seconds = 2e-5 + 1e-9 * result.nonzeros
    names = [layer.name.removesuffix(".weight") for layer in result.layers]
    layers = [{"layer": n, "kernel": "rows", "seconds": seconds / 4, "dense_seconds": 2e-5} for n in names]
    tree = {
        "processor": "A processor",
        "threads": 1,
        "shape": [1, 1, 28, 28],
        "seconds": {"mirrormask": seconds, "eager": 1e-4},
        "report": {"layers": layers},
    }
    (folder / "bench.json").write_text(json.dumps(tree))
