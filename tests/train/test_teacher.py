"""A run with a teacher: what it may be, that it is learned from, and what is refused before the first step."""

import dataclasses

import pytest
import torch

from mirrormask.train import Method, Model, Recipe, Teacher, load_model, recipe_file, run
from mirrormask.train.session import Session

MODEL = Model("mlp", {"hidden": [32]})


def small(out, teacher=None, **changes):
    changes = {"model": MODEL, "epochs": 2, "threads": 1, "figure": False, "method": Method("gmp"), **changes}
    return Recipe(teacher=teacher or Teacher(), out=str(out), **changes)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return run(small(tmp_path_factory.mktemp("dense") / "run", method=Method("dense"), epochs=6)).folder


def agreement(folder, teacher):
    splits = Session(small("unused")).splits
    mean, std = splits.statistics()
    x = (splits.test.x - mean) / std
    return float((load_model(folder)(x).argmax(1) == load_model(teacher)(x).argmax(1)).float().mean())


def test_a_run_with_a_teacher_says_what_the_teacher_says(dense, tmp_path):
    file = tmp_path / "teacher.pt"
    torch.save(load_model(dense).state_dict(), file)
    alone = run(small(tmp_path / "alone"))
    taught = run(small(tmp_path / "taught", Teacher(dense, weight=1.0)))
    by_file = run(small(tmp_path / "file", Teacher(str(file), weight=1.0)))
    assert agreement(taught.folder, dense) > agreement(alone.folder, dense)
    ends = [load_model(result.folder).state_dict() for result in (taught, by_file)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert taught.nonzeros == taught.nonzeros_asked


def test_the_loss_is_shared_and_without_a_teacher_a_recipe_is_what_it_was(dense):
    plain, whole, half = (
        Session(small("unused", teacher)) for teacher in (None, Teacher(dense, weight=1.0), Teacher(dense, weight=0.25))
    )
    x, y = next(iter(plain.train.in_order()))
    losses = [session._loss(session.model(x), x, y) for session in (plain, whole, half)]
    torch.testing.assert_close(losses[2], 0.75 * losses[0] + 0.25 * losses[1])
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), half.model.parameters(), strict=True))
    recipe = small("unused")
    assert "teacher" not in recipe.identity()
    assert dataclasses.replace(recipe, teacher=Teacher(dense)).fingerprint() != recipe.fingerprint()


def test_the_command_line_and_recipes_name_it_like_other_parts(dense):
    recipe = recipe_file.parse(
        recipe_file.expand({"teacher": dense}), ["--temperature", "4", "--teacher.weight", "0.75"]
    )
    assert recipe.teacher == Teacher(dense, 4.0, 0.75)
    assert recipe_file.parse({}, ["--teacher", dense]).teacher.name == dense


def test_a_teacher_that_was_trained_on_other_data_is_told_of(dense, tmp_path, recwarn):
    """Its classes may be others, or in another order, which no shape shows."""
    (tmp_path / "own.py").write_text(
        "import torch\n\nx, y = torch.zeros(40, 1, 8, 8, dtype=torch.uint8), torch.arange(40) % 10\n\n\n"
        "def digits():\n    return (x, y), (x, y)\n"
    )
    Session(small("unused", Teacher(dense)))
    assert not [w for w in recwarn if "was trained on" in str(w.message)]
    other = dataclasses.replace(Recipe().data, name=f"{tmp_path / 'own.py'}:digits")
    with pytest.warns(UserWarning, match=r"was trained on 'digits', and this run's data is .*own.py:digits"):
        Session(small("unused", Teacher(dense), data=other))


def test_what_does_not_fit_is_refused_before_the_first_step(dense, tmp_path):
    cases = {
        "neither a run's folder nor a file": Teacher(str(tmp_path / "nothing")),
        "no finished run": Teacher(str(tmp_path)),
    }
    other = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 7))
    torch.save(other.state_dict(), tmp_path / "seven.pt")
    cases["for 10 classes: its own head would be random"] = Teacher(str(tmp_path / "seven.pt"))
    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    cases["does not fit"] = Teacher(str(tmp_path / "wide.pt"))
    for name, change in (("nan or inf in 1.weight", lambda w: w / 0), ("as torch.int8", lambda w: w.to(torch.int8))):
        state = load_model(dense).state_dict()
        torch.save({**state, "1.weight": change(state["1.weight"])}, tmp_path / f"{name}.pt")
        cases[name] = Teacher(str(tmp_path / f"{name}.pt"))
    for message, teacher in cases.items():
        with pytest.raises(ValueError, match=message):
            run(small(tmp_path / "run", teacher))
        assert not (tmp_path / "run").exists()
    grey = small("unused", Teacher(dense), data=dataclasses.replace(Recipe().data, channels=3))
    with pytest.raises(ValueError, match=r"takes images of \(1, 8, 8\), this run's are \(3, 8, 8\)"):
        Session(grey)
    for values in ({"temperature": 0.0}, {"weight": 0.0}, {"weight": 1.5}):
        with pytest.raises(ValueError, match=next(iter(values))):
            Teacher(dense, **values)
    with pytest.raises(ValueError, match=r"teacher[.]temperature=4.0 has no effect without a teacher"):
        recipe_file.parse({}, ["--temperature", "4"])
