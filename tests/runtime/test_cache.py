"""What builds leave on the disk: read again by later processes, checked, never trusted, and kept small."""

import dataclasses
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mirrormask as mm
from mirrormask.machine import cache as machine_cache
from mirrormask.runtime.graph import known, structure
from mirrormask.runtime.graph.blueprint import Blueprint
from mirrormask.runtime.graph.capture import capture
from mirrormask.runtime.graph.structure import structure_key
from mirrormask.runtime.kernels import code as kernel_code
from mirrormask.runtime.schedule import tune


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(tmp_path))
    return tmp_path


FACTOR = 2.0


def doubled(x: Tensor) -> Tensor:
    return FACTOR * x


class Scaled(nn.Module):
    """A layer, a setting, and a function of this file."""

    def __init__(self, power: int = 1) -> None:
        super().__init__()
        self.layer, self.power = nn.Linear(20, 12), power

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.layer(x))
        return y if self.power == 1 else doubled(y)


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv1d(8, 8, 1)]
    model = nn.Sequential(*layers[:3], nn.Flatten(2), layers[3], nn.BatchNorm1d(8), nn.ReLU())
    model[0].weight.data *= torch.rand_like(model[0].weight) > 0.7
    return model.eval()


class Partial(nn.Module):
    """An encoder layer, of which attention and norms stay in PyTorch, and several results."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.position, self.head = nn.Parameter(torch.randn(1, 7, 32)), nn.Linear(32, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        y = self.layer(x + self.position)
        quarter, rest = y.to(torch.float32).split([8, 24], dim=-1)
        blocked = torch.where(rest > 1, torch.full_like(rest, -float("inf")), rest)
        return {"logits": self.head(y[:, 0]), "more": (quarter, blocked)}


def agree(fast, model, x):
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=0, atol=1e-5)


SCRIPT = """
import sys, torch, mirrormask as mm
torch.manual_seed(0)
model = NETWORK.eval()
model[0].weight.data *= torch.rand_like(model[0].weight) > 0.7
x = torch.randn(1, 3, 16, 16)
fast = mm.compile(model, x, force=True)
assert torch.allclose(fast(x), model(x), atol=1e-5)
print(fast.report.cached, "torch.export._trace" in sys.modules, "llvmlite.ir" in sys.modules)
"""


WHOLE = "torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())"
IN_PARTS = "torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.LayerNorm(14), torch.nn.Linear(14, 8))"


@pytest.mark.parametrize("network", [WHOLE, IN_PARTS], ids=["whole", "in parts"])
@pytest.mark.cases(1)
def test_a_second_process_neither_exports_nor_tunes_nor_generates(folder, network):
    def run() -> list[str]:
        environment = {**os.environ, "MIRRORMASK_CACHE": str(folder)}
        script = SCRIPT.replace("NETWORK", network)
        result = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        return result.stdout.split()[:2]

    assert run() == ["False", "True"]
    files = {path: path.read_bytes() for path in folder.iterdir()}
    assert run() == ["True", "False"]
    assert {path: path.read_bytes() for path in folder.iterdir()} == files


@pytest.mark.parametrize("make", [Scaled, Partial])
def test_a_stored_structure_serves_other_weights_and_zeros(make, monkeypatch):
    x = torch.randn(2, 20) if make is Scaled else torch.randn(3, 7, 32)
    first = mm.compile(make().eval(), x, force=True, tune=False)
    monkeypatch.setattr("mirrormask.runtime.model.piece.capture", lambda *_: pytest.fail("captured again"))
    other = make().eval()
    for parameter in other.parameters():
        parameter.data *= torch.rand_like(parameter) > 0.8
    again = mm.compile(other, x, force=True, tune=False)
    agree(again, other, x)
    assert again.report.left == first.report.left and bool(again.report.left) == (make is Partial)


@pytest.mark.parametrize("change", ["operation", "tensor", "node", "step", "argument", "no torch name"])
@pytest.mark.cases(1)
def test_a_wrong_program_in_the_cache_is_not_used(change):
    model, x = Partial().eval(), torch.randn(3, 7, 32)
    mm.compile(model, x, force=True, tune=False)
    (path,) = (p for p in machine_cache.cache_folder().glob("*.json") if '"program"' in p.read_text())
    plain = known.load(path.stem)
    steps = {step[2]: step for step in plain["program"]}
    if change == "operation":
        steps["aten.add.Tensor"][2] = "aten.no_such.Tensor"
    elif change == "tensor":
        steps["position"][2] = "no.such"
    elif change == "node":
        steps["aten.add.Tensor"][3]["tuple"][0] = {"node": "no such"}
    elif change == "step":
        plain["program"].remove(steps["aten.add.Tensor"])
    elif change == "argument":
        steps["aten.gt.Scalar"][3]["tuple"][1] = -1
    else:
        steps["aten.add.Tensor"][3]["tuple"][1] = {"torch": "no such"}
    known.store(path.stem, plain)
    agree(mm.compile(model, x, force=True, tune=False), model, x)
    assert known.load(path.stem) != plain, "the wrong file is replaced"


def test_what_plain_values_cannot_hold_is_captured_each_time():
    class Constant(Partial):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)["logits"] + torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])

    x = torch.randn(3, 7, 32)
    assert capture(Partial().eval(), (x,)).blueprint is not None
    assert capture(Constant().eval(), (x,)).blueprint is None, "a tensor that is not the model's"


class Derived(nn.Module):
    """With tensors that are made of its own: what they are made of is stored, not what they are."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 4)
        self.gain, self.pace = nn.Parameter(torch.rand(4, 2)), nn.Parameter(torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * self.gain.flatten() + torch.arange(8.0) * self.pace.repeat(2))


def test_tensors_that_are_made_of_the_models_own_come_from_the_cache():
    x = torch.randn(2, 5, 8)
    assert len(capture(Derived().eval(), (x,)).blueprint.constants) == 2
    with torch.no_grad():
        mm.compile(Derived().eval(), x, force=True, tune=False)
        (path,) = (p for p in machine_cache.cache_folder().glob("*.json") if '"program"' in p.read_text())
        other = Derived().eval()  # other numbers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mirrormask.runtime.model.piece.capture", None)
            agree(mm.compile(other, x, force=True, tune=False), other, x)
        stored = known.load(path.stem)
        (steps, *_) = stored["constants"].values()
        steps[-1][2] = "aten.no_such.default"
        known.store(path.stem, stored)
        agree(mm.compile(other, x, force=True, tune=False), other, x)
    assert known.load(path.stem) != stored, "the wrong file is replaced"


class Holding(Derived):
    """With tensors in attributes, of which PyTorch knows nothing, and a number in the code."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.tables = torch.rand(8), {"first": torch.rand(4)}
        self.pair = (torch.rand(4), torch.rand(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(torch.relu(self.a(x)) * self.table) + self.tables["first"] * torch.tensor(2.5)
        return y * self.pair[1] - self.pair[0]


def test_tensors_in_attributes_are_the_models_own():
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        mm.compile(Holding().eval(), x, force=True, tune=False)
        other, moved = Holding().eval(), Holding().eval()
        moved.table = torch.rand(1, 8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("mirrormask.runtime.model.piece.capture", None)
            agree(mm.compile(other, x, force=True, tune=False), other, x)
        agree(mm.compile(moved, x, force=True, tune=False), moved, x)
        deep = Holding().eval()
        deep.tables["last"] = [torch.rand(4)]
        assert structure_key(deep, (x,)) is None, "a tensor deeper than that: it is captured each time"


class Marked(Derived):
    """With a table that the code writes into, number by number."""

    def forward(self, x: Tensor) -> Tensor:
        marks = x.new_zeros(8)
        marks[2:4], marks[5:] = 1.5, -2
        return self.b(torch.relu(self.a(x)) * (marks * self.pace.repeat(2)))


def test_tensors_that_are_written_into_come_from_the_cache_as_they_are_in_the_end(monkeypatch):
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        mm.compile(Marked().eval(), x, force=True, tune=False)
        other = Marked().eval()
        monkeypatch.setattr("mirrormask.runtime.model.piece.capture", None)
        agree(mm.compile(other, x, force=True, tune=False), other, x)


@pytest.mark.parametrize("change", ["activation", "tensor", "input", "field", "shape"])
def test_a_wrong_structure_in_the_cache_is_not_used(change):
    model, x = Scaled().eval(), torch.randn(2, 20)
    mm.compile(model, x, force=True, tune=False)
    (path,) = (p for p in machine_cache.cache_folder().glob("*.json") if '"program"' in p.read_text())
    stored = known.load(path.stem)
    (plain,) = stored["regions"].values()
    if change == "activation":
        plain["nodes"][2]["kind"] = "silu"
    elif change == "tensor":
        plain["nodes"][1]["origin"]["weight"] = "no.such"
    elif change == "input":
        plain["nodes"][2]["inputs"] = ["no such"]
    elif change == "field":
        del plain["nodes"][0]["op"]
    else:
        plain["nodes"][1]["shape"] = [11]
    known.store(path.stem, stored)
    agree(mm.compile(model, x, force=True, tune=False), model, x)
    assert known.load(path.stem) != stored, "the wrong file is replaced"


def test_a_blueprint_survives_json():
    models = ((Scaled(), torch.randn(2, 20)), (Partial(), torch.randn(3, 7, 32)), (Derived(), torch.randn(2, 5, 8)))
    for model, x in models:
        blueprint = capture(model.eval(), (x,)).blueprint
        known.store("0" * 40, blueprint.as_plain())
        assert Blueprint.from_plain(known.load("0" * 40)) == blueprint


def test_structure_keys_follow_settings_code_and_shapes(monkeypatch):
    x = torch.randn(2, 20)
    seen = {structure_key(Scaled(), (x,)), structure_key(Scaled(2), (x,)), structure_key(Scaled(2), (x[:1],))}
    seen |= {structure_key(nn.Sequential(Scaled(2)), (x,)), structure_key(Scaled(2), (x,), "version")}
    monkeypatch.setattr(f"{__name__}.FACTOR", 3.0)
    seen.add(structure_key(Scaled(2), (x,)))
    monkeypatch.setattr(f"{__name__}.doubled", lambda x: x + x)
    seen.add(structure_key(Scaled(2), (x,)))
    monkeypatch.setattr(Scaled, "forward", lambda self, x: self.layer(x))
    seen.add(structure_key(Scaled(2), (x,)))
    assert len(seen) == 8 and None not in seen
    monkeypatch.undo()
    assert structure_key(Scaled(2), (x,)) in seen


class Settings:
    """What some models hold: values, and nothing behind them."""

    def __init__(self, factor: float) -> None:
        self.factor, self.names = factor, ["a"]
        self.own: Any = None

    def scaled(self, x: Tensor) -> Tensor:
        return self.factor * x


class Row(list[float]):
    """A container of the user's own."""


def with_settings(factor: float, own: bool = False) -> nn.Module:
    model = Scaled()
    model.settings = Settings(factor)
    model.settings.self = model.settings
    if own:
        model.settings.own = model.layer
    return model


def test_settings_that_are_objects_are_part_of_the_key(monkeypatch):
    x = torch.randn(2, 20)
    seen = [structure_key(with_settings(*given), (x,)) for given in ((1.0,), (2.0,), (1.0, True))]
    again = with_settings(1.0)
    for salted in (1, 2):
        again.settings._hash = salted
        assert structure_key(again, (x,)) == seen[0], "the same attributes, whatever they hash to in this process"
    monkeypatch.setattr(Settings, "scaled", lambda self, x: x)
    seen.append(structure_key(with_settings(1.0), (x,)))
    assert len(set(seen)) == 4 and None not in seen


def installed(folder: Path, version: str, body: str = "torch.relu(x)") -> type[nn.Module]:
    """A class of a package that lies where packages are installed."""
    structure._release.cache_clear()
    text = f"""
import torch
__version__ = {version!r}

class Block(torch.nn.Module):
    def forward(self, x):
        if x is None:
            import not_there_at_all
        return {body}
"""
    (folder / "some_package.py").write_text(text)
    sys.modules.pop("some_package", None)
    importlib.invalidate_caches()
    return importlib.import_module("some_package").Block


def test_a_version_and_a_file_stand_for_the_code_of_an_installed_package(tmp_path, monkeypatch):
    x = torch.randn(2, 20)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    assert structure_key(installed(tmp_path, "1.0")(), (x,)) is None, "code of the user's, with what it may import"
    monkeypatch.setattr(structure, "INSTALLED", (str(tmp_path),))
    seen = [structure_key(installed(tmp_path, version)(), (x,)) for version in ("1.0", "1.1")]
    seen.append(structure_key(installed(tmp_path, "1.1", "torch.relu(x) + 1")(), (x,)))
    block = installed(tmp_path, "1.1", "torch.relu(x) + 1")
    monkeypatch.setattr(block, "forward", lambda self, x: x)
    seen.append(structure_key(block(), (x,)))
    assert len(set(seen)) == 4 and None not in seen


def test_what_code_of_an_installed_package_was_made_with_is_part_of_the_key(tmp_path, monkeypatch):
    x, keys = torch.randn(2, 20), []
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(structure, "INSTALLED", (str(tmp_path),))
    block = installed(tmp_path, "1.0")
    block.scaled_by = eval("lambda limit, low=0: lambda x: x.clamp(low, limit)", vars(sys.modules["some_package"]))

    def key(limit: float, low: float = 0) -> str | None:
        model = block()
        model.act = block.scaled_by(limit, low)
        return structure_key(model, (x,))

    keys = [key(3.0), key(4.0), key(3.0, 1)]
    assert key(3.0) == keys[0]
    monkeypatch.setattr(block, "limit", 1.0, raising=False)
    keys.append(key(3.0))
    monkeypatch.setattr(block, "limit", 2.0)
    keys.append(key(3.0))
    for body in (lambda self, x: x * 2, lambda self, x: x * 3):  # the same instructions, other constants
        monkeypatch.setattr(block, "forward", body)
        keys.append(key(3.0))
    assert len(set(keys)) == 7 and None not in keys


@dataclasses.dataclass
class Answer:
    """A result of the user's own type, which PyTorch was told how to take apart."""

    logits: Tensor
    more: Tensor


torch.utils._pytree.register_dataclass(Answer, serialized_type_name="tests.Answer")


class Answering(Partial):
    """A part stays in PyTorch, or the model is one region."""

    def forward(self, x: Tensor) -> Answer:
        found = super().forward(x)
        return Answer(found["logits"], found["more"][0])


def test_a_result_of_the_models_own_type_comes_from_the_cache(monkeypatch):
    x = torch.randn(3, 7, 32)
    mm.compile(Answering().eval(), x, force=True, tune=False)
    monkeypatch.setattr("mirrormask.runtime.model.piece.capture", lambda *_: pytest.fail("captured again"))
    other = Answering().eval()
    found = mm.compile(other, x, force=True, tune=False)(x)
    with torch.no_grad():
        expected = other(x)
    assert type(found) is Answer
    torch.testing.assert_close(found.logits, expected.logits, rtol=0, atol=1e-5)
    torch.testing.assert_close(found.more, expected.more, rtol=0, atol=1e-5)


def test_a_container_of_another_class_is_all_that_it_is():
    x, keys = torch.randn(2, 20), set()
    for kind, names in ((list, ""), (Row, ""), (Row, "a")):
        model = Scaled()
        model.row = kind([1.0, 2.0])
        if names:
            model.row.names = names
        keys.add(structure_key(model, (x,)))
    assert len(keys) == 3 and None not in keys


class Opaque:
    """Something whose state lies beside its attributes."""

    __slots__ = ("__dict__", "factor")


def test_what_cannot_be_hashed_has_no_key():
    x = torch.randn(2, 20)
    for state in ((n for n in range(3)), threading.Lock(), Opaque()):
        model = Scaled()
        model.helper = state
        assert structure_key(model, (x,)) is None, "what lies behind it is not to be seen"
    strange = Scaled()
    strange.settings = Settings(1.0)
    vars(strange.settings)[1] = "a name that is none"
    assert structure_key(strange, (x,)) is None
    large = Scaled()
    large.table = [0] * (structure.MOST_VALUES + 1)
    assert structure_key(large, (x,)) is None
    hooked = Scaled()
    hooked.register_forward_hook(lambda *_: None)
    assert structure_key(hooked, (x,)) is None
    cyclic = Scaled()
    cyclic.table = {}
    cyclic.table["self"] = cyclic.table
    assert structure_key(cyclic, (x,)) is None
    agree(mm.compile(model.eval(), x, force=True, tune=False), model, x)


def test_shapes_that_come_later_are_not_measured(monkeypatch):
    model, x = network(), torch.randn(1, 3, 16, 16)
    fast = mm.compile(model, x, force=True)
    monkeypatch.setattr(tune, "_fastest", lambda *_: pytest.fail("a call was made to wait"))
    for shape in [(1, 3, 9, 12), (2, 3, 21, 5), (7, 3, 16, 16)]:
        agree(fast, model, torch.randn(shape))


def test_two_tuners_of_one_model_keep_what_either_measured():
    one, two = tune.Tuner("1" * 40), tune.Tuner("1" * 40)
    assert one.decide("a", lambda: True) and not two.decide("b", lambda: False)
    one.save()
    two.save()
    assert tune.Tuner("1" * 40).facts == {"a": True, "b": False}


def made(folder, name: str, size: int, hours: float) -> str:
    path = folder / name
    path.write_bytes(b"x" * size)
    then = time.time() - 3600 * hours
    os.utime(path, (then, then))
    return name


def left(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_pruning_removes_the_longest_unused_first_and_nothing_else(folder):
    foreign = made(folder, "notes.json", 900, 9999)
    old = made(folder, f"sparse_{'a' * 24}.o", 100, 24 * 100)
    part = made(folder, f".{'b' * 40}.json.x1y2.part", 100, 24 * 100)
    third, second, first = (made(folder, f"{n * 40}.json", 100, hours) for n, hours in (("3", 9), ("2", 5), ("1", 2)))
    busy = made(folder, f"{'4' * 40}.json", 1000, 0.5)
    assert machine_cache.prune(most_bytes=10_000) == 2
    assert left(folder) == {foreign, first, second, third, busy}, f"{old} and {part} were past their age"
    assert machine_cache.prune(most_bytes=1250) == 1 and left(folder) == {foreign, first, second, busy}
    assert machine_cache.prune(most_bytes=0) == 2 and left(folder) == {foreign, busy}, "what is in use stays"
    assert machine_cache.prune(most_bytes=0) == 0


def test_reading_counts_as_use_and_storing_prunes(folder, monkeypatch):
    for n in "12":
        known.store(n * 40, {"n": n})
        made_at = time.time() - 7200
        os.utime(folder / f"{n * 40}.json", (made_at, made_at))
    assert known.load("1" * 40) == {"n": "1"}
    monkeypatch.setattr(machine_cache, "PRUNE_EVERY", 1)
    monkeypatch.setattr(machine_cache.prune, "__defaults__", (0, 90.0))
    known.store("3" * 40, {})
    assert left(folder) == {f"{n * 40}.json" for n in "13"}


def test_a_missing_or_read_only_folder_is_no_error(folder, monkeypatch):
    monkeypatch.setenv("MIRRORMASK_CACHE", str(folder / "none" / "here"))
    assert machine_cache.prune() == 0 and known.load("1" * 40) is None
    (folder / "file").write_text("")
    monkeypatch.setenv("MIRRORMASK_CACHE", str(folder / "file"))
    model, x = Scaled().eval(), torch.randn(2, 20)
    agree(mm.compile(model, x, force=True, tune=False), model, x)


def no_longer_loaded() -> None:
    """As in a new process: what was compiled is looked for on the disk again."""
    kernel_code.address_of.cache_clear()
    kernel_code.run_functions.cache_clear()


@pytest.fixture
def small():
    """A model, an example, and its files in the cache."""
    model, x = Scaled().eval(), torch.randn(2, 20)
    no_longer_loaded()
    mm.compile(model, x, force=True)
    folder = machine_cache.cache_folder()
    return model, x, {path: path.read_bytes() for path in folder.iterdir()}


def rebuilt(model, x) -> None:
    """The law: the next call is right."""
    no_longer_loaded()
    agree(mm.compile(model, x, force=True), model, x)


def test_a_bit_that_flips_in_any_file_changes_nothing(small):
    model, x, files = small
    assert {path.suffix for path in files} == {".json", ".o"}
    generator = random.Random(0)
    for _ in range(4):
        for path, data in files.items():
            flipped = bytearray(data)
            for _ in range(generator.choice((1, 1, 20))):
                flipped[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
            path.write_bytes(flipped)
        rebuilt(model, x)


def test_files_that_are_damaged_are_made_again(small):
    model, x, files = small
    others = dict(zip(sorted(files), sorted(files)[1:] + sorted(files)[:1], strict=True))
    for how in ("half", "exchanged", "empty", "longer"):
        for path, data in files.items():
            changed = {"empty": b"", "half": data[: len(data) // 2], "longer": data + b"x"}
            path.write_bytes(changed.get(how, files[others[path]]))
            assert path.suffix == ".o" or known.load(path.stem) is None
            assert path.suffix == ".json" or machine_cache.load_bytes(path.stem) is None
        if how in ("half", "exchanged"):
            rebuilt(model, x)
            # (what this build did not choose may still be damaged, and is not read)
            objects = {path: data for path, data in files.items() if path.suffix == ".o"}
            assert all(p.read_bytes() == d or machine_cache.load_bytes(p.stem) is None for p, d in objects.items())
            assert any(p.read_bytes() == d for p, d in objects.items())


def test_json_of_the_wrong_kind_is_made_again(small):
    model, x, files = small
    values = (None, 3, "text", [], [1], {}, [["eager", 1.0]], True)
    for path, data in files.items():
        if path.suffix == ".json":
            stored = json.loads(data)
            for value in values:
                for wrong in (
                    value,
                    {**stored, "body": value},
                    {**stored, "key": value},
                    {**stored, "checksum": value},
                ):
                    path.write_text(json.dumps(wrong))
                    assert known.load(path.stem) is None
    for value in values[1:4]:
        for path, data in files.items():
            if path.suffix == ".json":
                known.store(path.stem, dict.fromkeys(json.loads(data)["body"], value))  # with the right checksum
        rebuilt(model, x)


def test_json_without_end_is_none(folder):
    for text in ("[" * 100_000, '{"a":' * 100_000, "1" * 10_000, "\xff", '{"body"'):
        (folder / f"{'1' * 40}.json").write_bytes(text.encode("latin-1"))
        assert known.load("1" * 40) is None


def test_an_entry_of_another_version_is_not_read(small, monkeypatch):
    model, x, files = small
    monkeypatch.setattr(known, "source_hash", lambda: "another version")
    assert all(known.load(path.stem) is None for path in files if path.suffix == ".json")
    rebuilt(model, x)


def test_object_code_that_is_none_is_compiled_again(small):
    model, x, files = small
    objects = [path for path in files if path.suffix == ".o"]
    for change in (b"", b"not an object", None):
        for path in objects:
            code = files[path][32:]
            machine_cache.store_bytes(path.stem, code[: len(code) // 2] if change is None else change)
        rebuilt(model, x)
        made = [path for path in objects if path.read_bytes() == files[path]]
        assert any("run_plan" in path.name for path in made) and len(made) >= 2, "and those that lost are not loaded"


def test_a_folder_that_goes_during_a_build_is_no_error(small, monkeypatch):
    model, x, _ = small
    folder = machine_cache.cache_folder()
    fsync, count = os.fsync, iter(range(1000))

    def goes(descriptor):
        if next(count) % 3 == 0:
            shutil.rmtree(folder)
        fsync(descriptor)

    shutil.rmtree(folder)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", goes)
        rebuilt(model, x)
    rebuilt(model, x)
    assert any(folder.iterdir())


BUILD = """
import os, signal, sys, torch, mirrormask as mm
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
x = torch.randn(1, 3, 8, 8)
print("ready", flush=True)
kills = int(sys.stdin.readline())
for call in ("fsync", "replace"):
    def dies(*a, really=getattr(os, call), call=call, **k):
        global kills
        kills -= 1
        if kills == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return really(*a, **k)
    setattr(os, call, dies)
assert torch.allclose(mm.compile(model, x, force=True)(x), model(x), atol=1e-5)
print("done")
"""


@pytest.mark.skipif(os.name != "posix", reason="no SIGKILL")
@pytest.mark.long
def test_killed_in_the_middle_or_beside_another_the_next_build_is_right(folder):
    environment = {**os.environ, "MIRRORMASK_CACHE": str(folder)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", BUILD], env=environment, **pipes) for _ in range(3)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    # One is killed in the second file that it writes; two build the same at once, over what is left.
    assert running[0].communicate("5\n")[0] == "" and running[0].returncode == -signal.SIGKILL
    assert any(path.suffix == ".part" for path in folder.iterdir())
    for process in running[1:]:
        process.stdin.write("0\n")
        process.stdin.flush()
    for process in running[1:]:
        assert process.communicate()[0] == "done\n" and process.returncode == 0
    for path in folder.glob("*.json"):
        assert known.load(path.stem) is not None
    assert all(machine_cache.load_bytes(path.stem) for path in folder.glob("[a-z]*.o"))


class Named(nn.Module):
    """Called by keywords, with numbers and ``None`` among them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 6)

    def forward(self, x: Tensor, other: Tensor | None = None, *, scale: float = 1.0, added: Tensor | None = None):
        y = self.layer(x) * scale
        return {"y": y if added is None else y + added}


def test_a_model_called_by_keywords_is_captured_once(monkeypatch):
    model, x, more = Named().eval(), torch.randn(3, 8), torch.randn(3, 6)
    calls = ({"x": x, "scale": 2.0, "added": more}, {"x": x, "added": more}, {"x": x, "other": None, "scale": 0.5})
    for call in calls:
        mm.compile(model, call, tune=False, force=True)

    def never(*_):
        raise AssertionError("it was captured again")

    monkeypatch.setattr("mirrormask.runtime.model.piece.capture", never)
    with torch.no_grad():
        for call in calls:
            fast = mm.compile(model, call, tune=False, force=True)
            assert fast.report.compiled
            torch.testing.assert_close(fast(**call)["y"], model(**call)["y"])
    with pytest.raises(AssertionError, match="captured again"):  # another number is another structure
        mm.compile(model, {"x": x, "scale": 3.0, "added": more}, tune=False, force=True)
