"""What a recipe accepts, how it is read and written, and which recipes count as the same run."""

import dataclasses

import pytest

from mirrormask.train import Data, Method, Model, Optimizer, Recipe, Schedule, load
from mirrormask.train import recipe_file as rf

OLDER = "bbcac8652509"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Recipe(sparsity=1.2), r"sparsity=1.2 is outside \[0, 1\)"),
        (lambda: Recipe(epochs=0), "epochs=0 is below 1"),
        (lambda: Recipe(batch_size=0), "batch_size=0 is below 1"),
        (lambda: Recipe(threads=0), "threads=0 is below 1"),
        (lambda: Recipe(label_smoothing=1.0), r"label_smoothing=1.0 is outside \[0, 1\)"),
        (lambda: Recipe(precision="fp8"), "unknown precision 'fp8'.*Known: bf16, fp16, fp32"),
        (lambda: Data("digit"), "unknown data set 'digit'; did you mean 'digits'.*folder:PATH"),
        (lambda: Data("folder:"), "names no folder; write folder:PATH"),
        (lambda: Data(channels=2), "channels=2 is not 1 or 3"),
        (lambda: Data(crop=-1), "crop=-1 is below 0"),
        (lambda: Optimizer("lion"), "unknown optimizer 'lion'.*Known: adam, adamw, rmsprop, sgd"),
        (lambda: Optimizer(lr=0.0), r"lr=0.0 is outside \(0, inf\)"),
        (lambda: Optimizer("adam", momentum=0.9), "adam has no momentum"),
        (lambda: Optimizer("adamw", nesterov=True), "nesterov=True needs sgd"),
        (lambda: Optimizer(weight_decay=-1.0), "weight_decay=-1.0 is outside"),
        (lambda: Schedule("stairs"), "unknown schedule 'stairs'.*Known: constant, cosine, linear, one-cycle, step"),
        (lambda: Schedule("step", at=[0.5, 0.2]), r"schedule.at=.0.5, 0.2. must rise"),
        (lambda: Schedule("step", at=[1.0]), r"schedule.at=1.0 is outside \(0, 1\)"),
        (lambda: Recipe(sparsity=95), "sparsity=95 is outside.*did you mean 0.95"),
        (lambda: Recipe(device="gpu"), "unknown device 'gpu'.*Known: cpu, cuda, mps, xpu"),
        (lambda: Schedule(warmup=1.0), r"warmup=1.0 is outside \[0, 1\)"),
    ],
)
def test_a_wrong_value_says_what_is_allowed(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_defaults_that_depend_on_the_optimizer_are_resolved_in_the_recipe():
    assert (Optimizer().lr, Optimizer().momentum) == (0.05, 0.9)
    assert (Optimizer("adamw").lr, Optimizer("adamw").momentum) == (1e-3, None)
    assert Recipe(method=Method("dense"), sparsity=0.9).sparsity == 0.0
    assert Recipe(data=Data("folder:/a/birds"), model=Model("torchvision:resnet18")).out == (
        "runs/birds-torchvision-resnet18-0.95-seed0"
    )


def test_what_a_recipe_has_gained_leaves_the_fingerprints_of_older_runs():
    """That of the default recipe before networks could start from a file; its method was pilot then."""
    tree = Recipe(method=Method("pilot")).identity()
    assert "init" not in tree["model"]
    assert "device" not in tree
    assert "label_smoothing" not in tree
    assert sorted(tree["schedule"]) == ["name", "warmup"]
    assert Recipe(method=Method("pilot")).fingerprint() == OLDER
    assert Recipe(model=Model(init="net.pt")).fingerprint() != Recipe().fingerprint()


def test_a_recipe_survives_its_file_unchanged(tmp_path):
    recipe = Recipe(
        data=Data("cifar10", crop=4, flip=True, validation=5),
        model=Model("resnet20", {"stem_stride": 2}),
        method=Method("pilot", {"delta": 1.05}),
        optimizer=Optimizer("adamw", 3e-4, options={"betas": [0.9, 0.95]}),
        schedule=Schedule("linear", 0.1),
        sparsity=0.99,
        threads=2,
        out="here",
    )
    rf.save(recipe, tmp_path / "r.yaml")
    assert load(tmp_path / "r.yaml") == recipe


def test_names_stand_for_sections_and_overrides_win(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("data: fashion-mnist\nmodel: lenet-300-100\nepochs: 7\noptimizer: {name: adam, lr: 1e-4}\n")
    recipe = load(path, {"epochs": 9, "data.root": "there", "method": "mirror", "method.options": {"shrink": 2.0}})
    assert (recipe.data.name, recipe.data.root, recipe.model.name) == ("fashion-mnist", "there", "lenet-300-100")
    assert (recipe.epochs, recipe.optimizer.lr, recipe.method) == (9, 1e-4, Method("mirror", {"shrink": 2.0}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("epoch: 3", "r.yaml: unknown recipe key 'epoch'; did you mean 'epochs'"),
        ("data: {nam: digits}", "r.yaml: unknown key of recipe section 'data': 'nam'; did you mean 'name'"),
        ("data: [digits]", "r.yaml: recipe key 'data' is a list, not a name or a mapping"),
        ("epochs: many", '"epochs".*Expected a.*int.*many'),
        ("epochs: 2.5", '"epochs".*Expected a.*int.*2.5'),
        ("optimizer: {lr: fast}", '"optimizer.lr".*fast'),
        ("- 1", "r.yaml.*holds a list, not a mapping"),
        ("a: [", "r.yaml' is not YAML"),
        ("", "r.yaml.*holds a NoneType, not a mapping"),
    ],
)
def test_a_bad_file_is_named_with_its_key(tmp_path, text, message):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        load(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot read the recipe '.*no.yaml': No such file"):
        load(tmp_path / "no.yaml")


def test_an_unknown_override_is_refused(tmp_path):
    (tmp_path / "r.yaml").write_text("epochs: 1")
    with pytest.raises(ValueError, match="--sparsty"):
        load(tmp_path / "r.yaml", {"sparsty": 0.9})


def test_the_fingerprint_follows_what_decides_the_result_and_nothing_else():
    recipe = Recipe()
    where = Data(root="/data", download=True)
    same = dataclasses.replace(recipe, out="elsewhere", log_every=7, figure=False, data=where)
    assert same.fingerprint() == recipe.fingerprint()
    others = [
        dataclasses.replace(recipe, **change)
        for change in ({"seed": 1}, {"sparsity": 0.9}, {"epochs": 2}, {"threads": 1}, {"model": Model("lenet-300-100")})
    ]
    assert len({recipe.fingerprint(), *(other.fingerprint() for other in others)}) == 6


def test_runs_that_differ_in_method_and_sparsity_share_their_dense_run():
    recipe = Recipe()
    assert Recipe(method=Method("mirror"), sparsity=0.5).reference_key() == recipe.reference_key()
    assert Recipe(seed=1).reference_key() != recipe.reference_key()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"name": None}}, r"'data.name': Expected `str`, got `null`"),
        ({"data": {"root": 3}}, r"'data.root': Expected `str`, got `int`"),
        ({"epochs": True}, r"'epochs': Expected `int`, got `bool`"),
        ({"schedule": {"at": ["x"]}}, r"'schedule.at': Expected `float`, got `str`"),
        ({"method": {"options": [1]}}, r"'method.options': Expected `object`, got `array`"),
        ({"sparsity": 10**400}, r"'sparsity': "),
    ],
)
def test_a_value_of_another_kind_is_refused_before_anything_is_done_with_it(tree, message):
    with pytest.raises(TypeError, match=message):
        rf.from_dict(tree)
