"""A compiled model as a file: the same bits without torch, and what cannot be saved is refused by name."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fuzz_bundle import written
from torch import nn

import mirrormask as mm
from mirrormask.runtime.bundle import read
from mirrormask.runtime.graph import sound
from mirrormask.runtime.graph.capture import capture
from mirrormask.storage import read_contents

SOURCE = str(Path(mm.__path__[0]).parent)


def pruned(model, sparsity=0.8):
    torch.manual_seed(1)
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.data *= torch.rand_like(weight) >= sparsity
    return model.eval()


def images():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 24, 3, stride=2),
        nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10),
    )  # fmt: skip


class Residual(nn.Module):
    """Tokens, attention, two inputs and a norm."""

    def __init__(self):
        super().__init__()
        self.norm, self.all, self.out = nn.LayerNorm(32), nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, tokens, other):
        query, key, value = self.all(self.norm(tokens)).view(*tokens.shape[:2], 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return tokens + self.out(mixed) * other


class Two(nn.Module):
    """What it returns has a form of its own."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(20, 12), nn.Linear(12, 6)

    def forward(self, x, unused=None):
        inner = self.one(x).relu()
        return {"inner": inner, "both": (self.two(inner), [None])}


def saved(model, example, path, **options):
    options = {"tune": False, "force": True, **options}
    fast = mm.compile(pruned(model), example, **options)
    fast.save(path)
    return fast


def load(path, **options):
    return mm.runtime.load(path, threads=torch.get_num_threads(), **options)


KINDS = {
    "images": (images, (torch.randn(4, 3, 20, 20),), [(1, 3, 20, 20), (7, 3, 20, 20), (2, 3, 33, 24)]),
    "rows": (
        lambda: nn.Sequential(nn.Linear(60, 40), nn.GELU(), nn.LayerNorm(40), nn.Linear(40, 7)),
        (torch.randn(20, 60),),
        [(1, 60), (3, 60), (200, 60)],
    ),
    "one row": (
        lambda: nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 7)),
        (torch.randn(1, 60),),
        [(5, 60)],
    ),
    "tokens": (Residual, (torch.randn(2, 12, 32), torch.randn(2, 12, 32)), [(3, 9, 32), (1, 30, 32)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tune", [False, True])
def test_the_same_bits_for_any_batch(kind, tune, tmp_path):
    make, example, others = KINDS[kind]
    fast = saved(make(), example, tmp_path / "m.mirror", tune=tune)
    loaded = load(tmp_path / "m.mirror")
    for shape in [tuple(example[0].shape), *others]:
        given = [torch.randn(shape) for _ in example]
        assert np.array_equal(loaded(*[x.numpy() for x in given]), fast(*given).numpy()), shape
    assert len(loaded.inputs) == len(example) and loaded.inputs[0].shape[0] is None
    assert loaded.outputs[0].shape[-1] == fast(*example).shape[-1]
    assert loaded.loading.tuned


def test_without_torch_the_same_bits(tmp_path):
    fasts = {
        name: saved(KINDS[name][0](), KINDS[name][1], tmp_path / f"{name}.mirror") for name in ("images", "tokens")
    }
    for name, fast in fasts.items():
        given = {port.name: torch.randn(port.example) for port in load(tmp_path / f"{name}.mirror").inputs}
        np.savez(tmp_path / f"{name}.npz", **{key: x.numpy() for key, x in given.items()})
        np.save(tmp_path / f"{name}_wanted.npy", fast(**given).numpy())
    stub = tmp_path / "stub" / "torch"
    stub.mkdir(parents=True)
    (stub / "__init__.py").write_text("raise ImportError('there is no torch here')")
    script = """
        import sys
        try:
            import torch
        except ImportError:
            pass
        else:
            raise SystemExit("torch can be imported")
        import numpy as np
        import mirrormask.runtime
        for name in ("images", "tokens"):
            model = mirrormask.runtime.load(f"{sys.argv[1]}/{name}.mirror", threads=1)
            got = model(**np.load(f"{sys.argv[1]}/{name}.npz"))
            assert np.array_equal(got, np.load(f"{sys.argv[1]}/{name}_wanted.npy")), name
        assert "torch" not in sys.modules
        print(*sorted(m for m in sys.modules if "." not in m))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(stub.parent), SOURCE])}
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not {"scipy", "safetensors", "onnx"} & set(done.stdout.split())


def test_what_is_returned_keeps_its_form(tmp_path):
    fast = saved(Two(), torch.randn(4, 20), tmp_path / "m")
    loaded, x = load(tmp_path / "m"), torch.randn(3, 20)
    got, wanted = loaded(x.numpy()), fast(x)
    assert np.array_equal(got["inner"], wanted["inner"]) and np.array_equal(got["both"][0], wanted["both"][0])
    assert isinstance(got["both"], tuple) and got["both"][1] == [None]
    assert [port.name for port in loaded.outputs] == ["inner", "both_0"]
    assert [port.name for port in loaded.inputs] == ["x"]


class Maybe(nn.Module):
    """Another input that may be left out."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(20, 12)

    def forward(self, x, other=None):
        return self.one(x).relu() if other is None else self.one(x * other)


def test_each_kind_of_call_that_was_captured(tmp_path):
    x, other = torch.randn(4, 20), torch.randn(4, 20)
    model = pruned(Maybe())
    fast = mm.compile(model, x, tune=False, force=True)
    fast.save(tmp_path / "one")
    wanted = fast(x, other)
    fast.save(tmp_path / "two")
    with pytest.raises(TypeError, match="there is no input 'other'; the inputs are x"):
        load(tmp_path / "one")(x.numpy(), other=other.numpy())
    loaded = load(tmp_path / "two")
    assert np.array_equal(loaded(x.numpy()), fast(x).numpy())
    assert np.array_equal(loaded(x.numpy(), other=other.numpy()), wanted.numpy())


def test_numbers_that_are_not_finite_go_where_weights_lead(tmp_path):
    fast = saved(images(), torch.randn(4, 3, 20, 20), tmp_path / "m")
    x = torch.randn(4, 3, 20, 20)
    x[1, 0, 3, 3], x[2, 1, 4, 4] = float("inf"), float("nan")
    assert np.array_equal(load(tmp_path / "m")(x.numpy()), fast(x).numpy(), equal_nan=True)


def test_many_threads_and_many_models(tmp_path):
    fast = saved(images(), torch.randn(4, 3, 20, 20), tmp_path / "m")
    models = [load(tmp_path / "m") for _ in range(2)]
    given = [torch.randn(n, 3, 20, 20) for n in range(1, 9)]
    wanted = [fast(x).numpy() for x in given]
    wrong = []

    def work(number):
        for turn in range(10):
            i = (number + turn) % len(given)
            if not np.array_equal(models[turn % 2](given[i].numpy()), wanted[i]):
                wrong.append((number, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_views_and_other_orders_of_memory(tmp_path):
    saved(images(), torch.randn(4, 3, 20, 20), tmp_path / "m")
    loaded = load(tmp_path / "m")
    x = np.random.default_rng(0).standard_normal((4, 20, 20, 3)).astype(np.float32)
    turned = x.transpose(0, 3, 1, 2)
    assert np.array_equal(loaded(turned), loaded(np.ascontiguousarray(turned)))
    assert np.array_equal(loaded(turned[::2]), loaded(turned)[::2])


def test_on_another_processor_it_is_tuned_anew(tmp_path, monkeypatch):
    fast = saved(images(), torch.randn(4, 3, 20, 20), tmp_path / "m")
    monkeypatch.setattr(read, "processor", lambda: "another")
    x = torch.randn(4, 3, 20, 20)
    for tune in (False, True):
        loaded = load(tmp_path / "m", tune=tune)
        assert loaded.loading.tuned == tune
        assert not any(runner.tuner.given for variant in loaded.variants for runner, _, _ in variant.steps)
        np.testing.assert_allclose(loaded(x.numpy()), fast(x).numpy(), rtol=1e-4, atol=1e-5)


def test_an_instruction_set_that_is_not_here(tmp_path, monkeypatch):
    saved(images(), torch.randn(4, 3, 20, 20), tmp_path / "m")
    scalar = tuple(target for target in read.available_targets() if target.name == "scalar")
    monkeypatch.setattr(read, "available_targets", lambda: scalar)
    monkeypatch.setattr(read, "best_target", lambda: scalar[0])
    assert load(tmp_path / "m", tune=False).loading.instruction_set == "scalar"


def test_a_chosen_instruction_set_stays(tmp_path):
    x = torch.randn(4, 3, 20, 20)
    fast = saved(images(), x, tmp_path / "m", instruction_set="scalar")
    loaded = load(tmp_path / "m")
    assert loaded.loading.instruction_set == "scalar" and np.array_equal(loaded(x.numpy()), fast(x).numpy())


def test_it_is_a_file_of_weights_too(tmp_path):
    model = pruned(nn.Sequential(nn.Linear(60, 40), nn.ReLU(), nn.Linear(40, 7)))
    saved(model, torch.randn(3, 60), tmp_path / "m")
    state = mm.load(tmp_path / "m")
    assert torch.equal(state["0.weight"], model[0].weight) and torch.equal(state["2.bias"], model[2].bias)


def test_a_compiled_model_is_not_written_as_a_module_without_weights(tmp_path):
    fast = mm.compile(nn.Linear(8, 4).eval(), torch.randn(2, 8), tune=False, force=True)
    with pytest.raises(ValueError, match=r"the CompiledModel holds no tensors.*is written by its own save\(\)"):
        mm.save(fast, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_its_weights_do_not_go_into_a_module(tmp_path):
    """A transposed convolution of as many channels in as out is stored turned, in its weight's own shape."""
    model = pruned(nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 3)))
    saved(model, torch.randn(2, 4, 8, 8), tmp_path / "m")
    before, stored = model[2].weight.detach().clone(), mm.load(tmp_path / "m")["2.weight"]
    assert stored.shape == before.shape and not torch.equal(stored, before)
    with pytest.raises(ValueError, match=r"holds a compiled model, whose weights are as its kernels take them"):
        mm.load(tmp_path / "m", model)
    assert torch.equal(model[2].weight, before)


@pytest.mark.parametrize(("said", "threads"), [("3", 3), ("3,2", 3), (" 3 ", 3)])
def test_threads_are_those_of_the_environment(said, threads, tmp_path, monkeypatch):
    saved(nn.Linear(20, 10), torch.randn(4, 20), tmp_path / "m")
    monkeypatch.setenv("OMP_NUM_THREADS", said)
    assert mm.runtime.load(tmp_path / "m", tune=False).loading.threads == threads


BAD_CALLS = {
    "no array": (lambda x: ([1.0],), TypeError, "the input 'input' is a list; pass a NumPy array"),
    "masked": (lambda x: (np.ma.masked_array(x, x > 0),), TypeError, "is a masked array; pass x.filled"),
    "float64": (lambda x: (x.astype(np.float64),), TypeError, "the input 'input' is float64, not float32"),
    "other bytes": (lambda x: (x.astype(">f4"),), TypeError, "not float32"),
    "channels": (lambda x: (x[:, :2],), ValueError, r"input \[4, 2, 20, 20\].*it takes input \[any, 3, any, any\]"),
    "dimensions": (lambda x: (x[0],), ValueError, r"input \[3, 20, 20\]"),
    "nothing left": (lambda x: (x[:, :, :2],), ValueError, "it was captured for"),
    "two": (lambda x: (x, x), TypeError, "2 arrays for the inputs input"),
    "none": (lambda x: (), TypeError, "the input 'input' is missing"),
}


@pytest.mark.parametrize("kind", BAD_CALLS)
def test_bad_calls_are_refused_by_name(kind, tmp_path):
    saved(images(), torch.randn(4, 3, 20, 20), tmp_path / "m")
    make, error, words = BAD_CALLS[kind]
    loaded, x = load(tmp_path / "m"), np.zeros((4, 3, 20, 20), np.float32)
    with pytest.raises(error, match=words):
        loaded(*make(x))
    with pytest.raises(TypeError, match="there is no input 'image'"):
        loaded(image=x)
    with pytest.raises(TypeError, match="given by position and by name"):
        loaded(x, input=x)
    assert loaded(x).shape == (4, 10)


class Stays(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(20, 20)

    def forward(self, x):
        return self.one(torch.fft.fft(self.one(x)).real)


class Moded(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(20, 20)

    def forward(self, x, mode):
        return self.one(x) if mode == "plain" else -self.one(x)


def test_what_stays_in_pytorch_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"these stay in it: fft_fft.*mm\.save, or export"):
        saved(Stays(), torch.randn(4, 20), tmp_path / "m")
    with pytest.raises(ValueError, match="its argument 'mode' is a str; compile a module that takes tensors alone"):
        saved(Moded(), (torch.randn(4, 20), "plain"), tmp_path / "m")
    fast = mm.compile(nn.ReLU().eval(), torch.randn(4, 20))
    with pytest.raises(ValueError, match="nothing compiled to save: the model itself runs"):
        fast.save(tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    fast = saved(Two(), torch.randn(4, 20), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    with pytest.raises(ValueError, match="metadata"):
        fast.save(tmp_path / "m", metadata={"mirrormask.model": "forged"})
    with pytest.raises(OSError):
        fast.save(tmp_path / "nowhere" / "m")
    assert (tmp_path / "m").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_other_files_are_told_apart(tmp_path):
    mm.save({"w": torch.randn(3, 3)}, tmp_path / "weights")
    with pytest.raises(mm.FormatError, match="it holds weights, and no compiled model"):
        load(tmp_path / "weights")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="threads=0 is below 1"):
        mm.runtime.load(tmp_path / "weights", threads=0)


def test_damage_is_found_wherever_it_is(tmp_path):
    saved(Two(), torch.randn(4, 20), tmp_path / "m")
    sound = (tmp_path / "m").read_bytes()
    chance = np.random.default_rng(0)

    def refused(data):
        (tmp_path / "bad").write_bytes(data)
        with pytest.raises(mm.FormatError, match="bad"):
            load(tmp_path / "bad", tune=False)

    for position in {*range(0, 400, 7), *chance.integers(0, len(sound), 150).tolist()}:
        damaged = bytearray(sound)
        damaged[position] ^= 1 << int(chance.integers(8))
        refused(bytes(damaged))
    for length in {0, 7, 8, 100, len(sound) - 1, *chance.integers(0, len(sound), 30).tolist()}:
        refused(sound[:length])
    refused(sound + b"\0")


LIES = {
    "version 2": lambda said: said.update(version=2),
    "huge sizes": lambda said: graph_of(said)["nodes"][0].update(shape=[1 << 30]),
    "negative sizes": lambda said: graph_of(said)["nodes"][0].update(shape=[-20]),
    "outside": lambda said: graph_of(said)["shapes"].update({graph_of(said)["outputs"][0]: [2000]}),
    "no such array": lambda said: graph_of(said)["nodes"][1].update(weight="other"),
    "an array as a weight": lambda said: graph_of(said)["nodes"][1].update(weight="one.bias"),
    "unread": lambda said: graph_of(said)["nodes"][1].pop("bias"),
    "a result": lambda said: said["variants"][0].update(results={"node": "nothing"}),
    "code": lambda said: said["variants"][0]["guards"].update(conditions=["__import__('os').abort() == 1"]),
    "powers": lambda said: said["variants"][0]["guards"].update(conditions=["9 ** 9 ** 9 ** 9 > 1"]),
    "texts": lambda said: said["variants"][0]["guards"].update(conditions=["'a' * 99999999999 > 1"]),
    "deep": lambda said: said["variants"][0]["guards"].update(conditions=["-" * 4000 + "1 < 2"]),
    "strange": lambda said: said.update(variants=3),
}


def graph_of(said):
    return said["variants"][0]["steps"][0]["region"]["graph"]


@pytest.mark.parametrize("lie", LIES)
def test_lies_with_the_right_checksums_are_refused(lie, tmp_path):
    saved(Two(), torch.randn(4, 20), tmp_path / "m")
    said = json.loads(read_contents(tmp_path / "m").metadata[read.KEY])
    (tmp_path / "same").write_bytes(written(mm.load(tmp_path / "m"), said))
    assert load(tmp_path / "same", tune=False)(np.zeros((4, 20), np.float32))["inner"].shape == (4, 12)
    LIES[lie](said)
    (tmp_path / "forged").write_bytes(written(mm.load(tmp_path / "m"), said))
    with pytest.raises(mm.FormatError):
        load(tmp_path / "forged", tune=False)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are Linux's")
@pytest.mark.parametrize("kind", ["images", "tokens"])
@pytest.mark.cases(1)
def test_no_forged_model_breaks_the_process(kind, tmp_path):
    saved(KINDS[kind][0](), KINDS[kind][1], tmp_path / "m")
    script = Path(__file__).with_name("fuzz_bundle.py")
    command = [sys.executable, str(script), str(tmp_path / "m"), "2", "1"]
    environment = {**os.environ, "PYTHONPATH": SOURCE}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    refused, ran = map(int, done.stdout.split())
    assert refused > 5 and refused + ran > 10


class Tokens(nn.Module):
    """A class token and positions before attention: stored maps, maps put together, and numbers in other places."""

    def __init__(self):
        super().__init__()
        self.patches, self.kind = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 1, 16))
        self.places, self.norm = nn.Parameter(torch.randn(1, 10, 16)), nn.LayerNorm(16)
        self.attention, self.head = nn.MultiheadAttention(16, 2, batch_first=True), nn.Linear(16, 5)

    def forward(self, x):
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.kind.expand(x.shape[0], -1, -1), tokens], 1) + self.places
        mixed = self.norm(tokens)
        return self.head((tokens + self.attention(mixed, mixed, mixed, need_weights=False)[0])[:, 0])


def test_tokens_of_maps_are_in_the_file_and_what_they_read_is_checked(tmp_path):
    fast = mm.compile(pruned(Tokens(), 0.5), torch.randn(2, 3, 12, 12), tune=False, force=True)
    path = tmp_path / "tokens.mirror"
    fast.save(path)
    loaded = mm.runtime.load(path, tune=False)
    for batch in (1, 2, 5):
        x = torch.randn(batch, 3, 12, 12)
        assert np.array_equal(loaded(x.numpy()), fast(x).numpy())


@functools.cache
def tokens_graph():
    (graph,) = capture(pruned(Tokens(), 0.5), (torch.randn(2, 3, 12, 12),)).regions.values()
    return graph


@pytest.mark.parametrize(
    ("op", "change", "fault"),
    [
        ("arrange", {"span": (10**6, 0)}, "come from|not there"),
        ("stored", {"gain": np.zeros((1, 1), np.float32)}, "stores other numbers"),
        ("join", {"span": (7,)}, "joins along"),
        ("attend", {"span": (10**6,) * 6}, "a head that is not there"),
    ],
)
def test_a_graph_of_tokens_that_reads_elsewhere_is_refused(op, change, fault):
    graph = tokens_graph()
    nodes = [dataclasses.replace(node, **change) if node.op == op else node for node in graph.nodes]
    assert op in {node.op for node in graph.nodes}
    with pytest.raises(sound.Unsound, match=fault):
        sound.check(dataclasses.replace(graph, nodes=nodes))
