"""Grids: what is trained, in what order and where; and every mistake is found before anything trains."""

import importlib.util
import json
from pathlib import Path

import compare_forge as forge
import pytest

from mirrormask import cli
from mirrormask.compare.comparison import Failure
from mirrormask.compare.grid import Grid, check_cells
from mirrormask.compare.options import load_grid, parse
from mirrormask.train import Recipe

ROOT = Path(__file__).parent.parent.parent
FAST = ["--epochs", "1", "--model.options", '{"hidden": [8]}', "--threads", "1"]
#: The identity of a run and its folder, as they were when the tables of docs/results.md were trained.
FINGERPRINTS = {
    "fashion-mnist/test/dense-0-4": "9c8d2ae1f766",
    "fashion-mnist/tune/magnitude-at=0.2-0.98-0": "9f483492a578",
    "fashion-mnist-adamw/test/dense-0-2": "9571701052ff",
    "fashion-mnist-adamw/tune/mirror-lr=0.002-0.995-0": "6dac00262758",
    "cifar10/test/mirror-0.95-1": "f3c1c6fcebcf",
}


def names(*arguments):
    grid, _ = parse(arguments)
    return [cell.name for cell in grid.cells()]


def test_dense_is_trained_once_a_seed_and_seeds_come_one_after_the_other():
    assert names("--methods", "dense,gmp", "--sparsity", "0.9,0.95", "--seeds", "2") == [
        "dense seed 0",
        "gmp 90% seed 0",
        "gmp 95% seed 0",
        "dense seed 1",
        "gmp 90% seed 1",
        "gmp 95% seed 1",
    ]
    assert names("--methods", "dense", "--seeds", "4,7") == ["dense seed 4", "dense seed 7"]


def test_every_option_of_a_recipe_reaches_every_cell():
    arguments = ["--methods", "dense,gmp", "--sparsity", "0.9", "--options.gmp.end_at", "0.5", "--data.crop", "1"]
    grid, values = parse([*arguments, "--optimizer", "adamw", "--epochs", "3", "--out", "runs/x", "--workers", "2"])
    dense, gmp = grid.cells()[:2]
    assert gmp.recipe.method.options == {"end_at": 0.5}
    assert dense.recipe.dense("") == gmp.recipe.dense("")
    assert (gmp.recipe.optimizer.name, gmp.recipe.epochs, gmp.recipe.data.crop) == ("adamw", 3, 1)
    assert gmp.recipe.out == "runs/x/gmp-end_at=0.5-0.9-0"
    assert values["workers"] == 2


def test_a_method_may_have_a_learning_rate_of_its_own(tmp_path):
    grid, _ = parse(
        ["--methods", "dense,gmp,gmp/fast", "--sparsity", "0.9", "--seeds", "1", "--options.gmp/fast.lr", "0.2"]
    )
    assert [cell.recipe.optimizer.lr for cell in grid.cells()] == [0.05, 0.05, 0.2]
    assert [cell.recipe.method.options for cell in grid.cells()] == [{}, {}, {}]
    assert [Path(cell.recipe.out).name for cell in grid.cells()][2] == "gmp-fast-lr=0.2-0.9-0"


def test_a_file_has_methods_with_options_and_seeds_of_their_own(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "data: digits\nmethods: {dense: , pilot: {}, pilot/a: {beta: 1.0, gain: null}}\nsparsity: [0.9]\n"
        "seeds: {default: 1, dense: 2}\nepochs: 7\n"
    )
    grid = load_grid(tmp_path / "c.yaml", {"epochs": 2})
    assert [cell.name for cell in grid.cells()] == [
        "dense seed 0",
        "pilot 90% seed 0",
        "pilot/a 90% seed 0",
        "dense seed 1",
    ]
    cell = grid.cells()[2]
    assert cell.recipe.method.options == {"beta": 1.0, "gain": None}
    assert cell.recipe.epochs == 2
    assert Path(cell.recipe.out).name == "pilot-a-beta=1.0-gain=None-0.9-0"
    assert names(str(tmp_path / "c.yaml"), "--methods", "pilot/a", "--seeds", "1") == ["pilot/a 90% seed 0"]


def test_long_options_give_short_folders():
    grid = Grid(Recipe(), {"gmp": {"end_at": 0.5}, "gmp/" + "x" * 300: {"end_at": 0.6}}, (0.9,), {"": (0,)})
    assert all(len(Path(cell.recipe.out).name) <= 120 for cell in grid.cells())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the grid is empty: give a recipe file, --methods"),
        (["--methods", "gmp"], "the grid is empty: give at least one sparsity"),
        (["--methods", "gmp", "--sparsity", "0.9", "--seeds", "0"], "seeds=0 is below 1"),
        (["--methods", "gmp,", "--sparsity", "0.9"], "'gmp,' has an empty name in it"),
        (["--methods", "gmp,mirrr", "--sparsity", "0.9"], "unknown method 'mirrr'; did you mean 'mirror'"),
        (["--methods", "gmp,gmp", "--sparsity", "0.9"], "the method 'gmp' is named twice"),
        (["--methods", "gmp", "--sparsity", "0.9,0.95,0.9"], "the sparsity 0.9 is given twice"),
        (["--methods", "gmp", "--sparsity", "0.9", "--seeds", "1,1"], "the seed 1 is given twice"),
        (["--methods", "gmp/a,gmp/b", "--sparsity", "0.9"], "'gmp/a 90% seed 0' and 'gmp/b 90% seed 0' are the same"),
        (["--methods", "gmp", "--sparsity", "high"], "--sparsity 'high' must be numbers"),
        (["--methods", "gmp", "--sparsity", "1.5"], "sparsity=1.5 is outside [0, 1)"),
        (["--methods", "gmp", "--sparsity", "0.9", "--seeds", "1.5"], "must be whole numbers"),
        (["--methods", "gmp", "--sparsity", "0.9", "--options.gmp.beta", "1"], "does not take the option 'beta'"),
        (["--methods", "gmp", "--sparsity", "0.9", "--options.mirror.gain", "1"], "unknown method in --options"),
        (["--methods", "gmp,[red]", "--sparsity", "0.9"], "the label '[red]' is not the name of a method"),
        (["--methods", "gmp", "--sparsity", "0.9", "--method", "gmp"], "--method"),
        (["--methods", "gmp", "--sparsity", "0.9", "--workers", "0"], "--workers=0 is below 1"),
        (["--methods", "gmp", "--sparsity", "0.9", "--gpus", "1"], "--gpus for a cluster that is named with --ray"),
        (["--methods", "gmp", "--sparsity", "0.9", "--gpus", "-1"], "--gpus=-1.0 is outside"),
        (["--import", ".", "--sparsity", "0.9"], "the grid is empty: give a recipe file, --methods"),
        (["--methods", "gmp", "--sparsity", "0.9", "--model", "lenet"], "unknown model 'lenet'"),
        (["--methods", "gmp", "--sparsity", "0.9", "--data", "mnist"], "unknown data set 'mnist'"),
        (["--methods", "gmp", "--sparsity", "0.9", "--batch_size", "5000"], "larger than the 1442 training images"),
        (
            ["--methods", "gmp,magnitude", "--sparsity", "0.9", "--options.magnitude.pattern", "3:7"],
            "magnitude 90% seed",
        ),
        (["nowhere.yaml"], "cannot read the recipe 'nowhere.yaml'"),
        ([str(ROOT / "recipes" / "digits-mlp.yaml")], "a comparison has 'methods', not 'method'"),
        (["--import", "nowhere"], "--import 'nowhere' does not exist"),
        (["--import", "."], "there is no finished run to compare\n  .: no run in it"),
    ],
)
def test_a_mistake_becomes_one_message_and_writes_nothing(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--out", "runs/a", *arguments]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("mirrormask compare: error: ") and message in err
    assert "Traceback" not in out + err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("methods: 3", "neither a list of names nor a mapping"),
        ("methods: [gmp, gmp]", "named twice"),
        ("methods: {gmp: fast}", "are 'fast', not a mapping"),
        ("methods: {}\nsparsity: 0.9", "the grid is empty"),
        ("methods: [gmp]\nsparsity: 0.9\nseeds: []", "no seeds"),
        ("methods: [gmp]\nsparsity: 0.9\nseeds: {default: 1, mirror: 2}\nepoch: 3", "unknown recipe key 'epoch'"),
        ("methods: [gmp]\nsparsity: 0.9\nseeds: true", "must be whole numbers"),
        ("methods: [gmp]\nsparsity: {a: 1}", "must be numbers"),
        ("- 1", "holds a list"),
        ("methods: [", "is not YAML"),
    ],
)
def test_a_mistake_in_a_file_names_itself(tmp_path, text, message):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises((TypeError, ValueError), match=message.replace("[", r"\[")):
        load_grid(tmp_path / "c.yaml")


def test_a_grid_without_cells_is_refused():
    with pytest.raises(ValueError, match="there is no cell"):
        check_cells([])


def test_a_folder_with_another_run_in_a_cell_s_place_is_refused(tmp_path, capsys):
    forge.write(tmp_path / "gmp-0.9-0", epochs=2)
    arguments = ["compare", "--methods", "gmp", "--sparsity", "0.9", "--seeds", "1", "--out", str(tmp_path), *FAST]
    assert cli.main(arguments) == 2
    assert "with another recipe (epochs: 2 there, 1 now" in capsys.readouterr().err


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("compare-*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_that_come_along_are_grids(path):
    grid = load_grid(path)
    assert "dense" in grid.methods and "mirror" in grid.methods
    assert len(grid.cells()) == len({cell.recipe.fingerprint() for cell in grid.cells()})


@pytest.fixture
def results(monkeypatch):
    """The module benchmarks/results.py."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("results", ROOT / "benchmarks" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_benchmark_reads_what_is_finished(results, tmp_path, capsys):
    grid = Grid(forge.recipe(out=tmp_path), {"dense": {}, "gmp": {}}, (0.9,), {"": (0, 1)})
    for cell in grid.cells():
        recipe = cell.recipe
        forge.write(recipe.out, recipe.method.name, recipe.sparsity, recipe.seed, 0.5 + recipe.seed / 10)
    assert results.accuracies(grid, workers=1) == {
        ("dense", 0.0, 0): 0.5,
        ("gmp", 0.9, 0): 0.5,
        ("dense", 0.0, 1): 0.6,
        ("gmp", 0.9, 1): 0.6,
    }
    assert "4 cells: 4 finished, 0 to train" in capsys.readouterr().out


def test_the_benchmark_s_table_is_printed_without_what_failed_and_the_command_fails(results, monkeypatch, tmp_path):
    grid = Grid(forge.recipe(out=tmp_path), {"dense": {}, "gmp": {}}, (0.9,), {"": (0,)})
    dense, gmp = grid.cells()
    forge.write(dense.recipe.out, "dense", 0.0, 0, 0.5)
    failure = Failure(gmp.name, str(gmp.recipe.out), "the loss was not finite")
    monkeypatch.setattr(results, "train_missing", lambda *_, **__: [failure])
    values = results.accuracies(grid, workers=1)
    assert values == {("dense", 0.0, 0): 0.5}
    with pytest.raises(SystemExit, match="1 of 2 cells failed"):
        results.check_complete(grid, values)


def test_the_benchmark_s_cells_and_folders_are_what_they_were(results, monkeypatch, capsys, tmp_path):
    seen = {}

    def accuracies(grid, workers):
        seen.update({Path(cell.recipe.out).relative_to("o"): cell.recipe for cell in grid.cells()})
        return {(c.label, c.recipe.sparsity, c.recipe.seed): 0.5 + c.recipe.seed / 100 for c in grid.cells()}

    monkeypatch.setattr(results, "accuracies", accuracies)
    names = ("fashion-mnist", "fashion-mnist-others", "fashion-mnist-adamw", "cifar10-adamw")
    suites = [[suite, *tune] for suite in names for tune in ([], ["--tune"])]
    for arguments in [*suites, ["cifar10", "--json", str(tmp_path / "j")]]:
        monkeypatch.setattr("sys.argv", ["results.py", *arguments, "--data", "d", "--out", "o"])
        results.main()
    # Finished runs must be found again.
    for name, fingerprint in FINGERPRINTS.items():
        assert seen[Path(name)].fingerprint() == fingerprint, name
    assert len(json.loads((tmp_path / "j").read_text())["rows"]) == 50
    assert "mirror - gmp, paired over seeds: 90%: +0.00 ± 0.00; 95%: +0.00 ± 0.00" in capsys.readouterr().out
