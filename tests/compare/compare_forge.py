"""Results without training, for tests that only look at what is made of them."""

import dataclasses
from pathlib import Path

from mirrormask.selection import LayerSparsity
from mirrormask.train import Method, Model, Recipe, RunResult, recipe_file


def recipe(method="gmp", sparsity=0.9, seed=0, options=None, out="run", **changes):
    base = Recipe(model=Model("mlp", {"hidden": [8]}), epochs=1, threads=1, figure=False)
    changes = {"method": Method(method, options or {}), "sparsity": sparsity, "seed": seed, "out": str(out)} | changes
    return dataclasses.replace(base, **changes)


def result(recipe, accuracy=0.8, file_bytes=1000, **changes):
    layers = (LayerSparsity("1.weight", (8, 64), 512, 51),)
    whole = RunResult(
        folder=recipe.out,
        method=recipe.method.name,
        seed=recipe.seed,
        sparsity_asked=recipe.sparsity,
        nonzeros_asked=51,
        nonzeros=51,
        numel=512,
        test_accuracy=accuracy,
        validation_accuracy=None,
        unpruned_accuracy=accuracy,
        train_accuracy=accuracy,
        train_loss=0.5,
        epochs=recipe.epochs,
        steps=45,
        seconds=1.5,
        skipped_steps=0,
        file_bytes=file_bytes,
        input_shape=(1, 8, 8),
        classes=10,
        layers=layers,
        recipe=recipe_file.to_dict(recipe),
        environment={},
    )
    return dataclasses.replace(whole, **changes)


def write(folder, method="gmp", sparsity=0.9, seed=0, accuracy=0.8, options=None, **changes):
    """A finished run's folder, as far as a comparison reads it."""
    folder = Path(folder)
    folder.mkdir(parents=True)
    made = recipe(method, sparsity, seed, options, folder, **changes)
    recipe_file.save(made, folder / "recipe.yaml")
    finished = result(made, accuracy)
    finished.write()
    return finished
